"""Runs the tests of every architecture and prints which types pass: the table "Tried on" (three minutes on one core).

python benchmarks/architectures.py > benchmarks/architectures.md
"""

from __future__ import annotations

import collections
import contextlib
import io
import sys
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import test_monkeyjump as tests  # noqa: E402
from monkeyjump import apply_monkeyjump, router_statistics  # noqa: E402


class Outcomes:
    """Of each test of each type: "passed", "failed", or why it was skipped."""

    def __init__(self) -> None:
        self.of: dict[str, dict[str, str]] = collections.defaultdict(dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test, _, model_type = report.nodeid.rstrip("]").partition("[")
        if report.when == "call":
            why = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else report.outcome
            self.of[model_type][test.partition("architecture_")[2]] = why


def experts_of(model_type: str) -> str:
    """What apply_monkeyjump(model) takes for experts in each kind of block, by their last names."""
    blocks = router_statistics(apply_monkeyjump(tests.tiny_model(model_type), top_k=1)).values()
    return "; ".join(dict.fromkeys(" ".join(name.rpartition(".")[2] for name in b["experts"]) for b in blocks))


def main() -> None:
    outcomes = Outcomes()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["-q", "-p", "no:warnings", str(ROOT / "test_monkeyjump.py"), "-k", "on_every"], [outcomes])
    groups, partly, never = (collections.defaultdict(list) for _ in range(3))
    for model_type, results in outcomes.of.items():
        skipped = {test: why for test, why in results.items() if why != "passed"}
        if "failed" in results.values():
            never["**FAILED**"].append(model_type)
        elif len(skipped) == len(results):
            never[" ".join(skipped.popitem()[1].split())[:110]].append(model_type)
        else:
            groups[experts_of(model_type)].append(model_type)
            for test, why in skipped.items():
                partly[f"{test}: {' '.join(why.split())[:80]}"].append(model_type)
    for model_type, why in tests.UNROUTABLE.items():
        never[f"refused: {why}"].append(model_type)
    passed = sum(map(len, groups.values()))
    print("# Tried on\n\nMade with `python benchmarks/architectures.py`", end=" ")
    print(f"(transformers {transformers.__version__}, torch {torch.__version__}): **{passed} of the {len(tests.TYPES)}")
    print(
        "causal and vision-language types** that transformers registers are adapted with `apply_monkeyjump(model)` and"
    )
    print("nothing else, and pass the tests of every architecture that they can pass without adapters.\n")
    print("| projections that become experts by default (each kind of block) | types |\n|---|---|")
    for title, table in (
        ("", groups),
        ("Passed but for what the base model itself fails", partly),
        ("Not tried", never),
    ):
        print(f"\n## {title}\n\n| why | types |\n|---|---|" if title else "", end="\n" if title else "")
        for key, types in sorted(table.items(), key=lambda item: -len(item[1])):
            print(f"| {key.replace('|', '/')} | {' '.join(sorted(types))} |")


if __name__ == "__main__":
    main()
