"""Every architecture of the installed transformers, built tiny and put through the tests: prints the table "tried on".

python benchmarks/architectures.py                   # all causal, vision-language, encoder-decoder types: ten minutes
python benchmarks/architectures.py llama qwen2_vl    # these only
python benchmarks/architectures.py --failures        # only what does not pass, with the reason
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import transformers
from transformers.models.auto import modeling_auto

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import test_monkeyjump as tests  # noqa: E402
from monkeyjump import apply_monkeyjump, router_statistics  # noqa: E402

SEQ2SEQ = "t5 mt5 umt5 longt5 switch_transformers t5gemma bart mbart marian pegasus m2m_100 plbart led".split()
TYPES = (
    dict.fromkeys(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForCausalLM)
    | dict.fromkeys(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, transformers.AutoModelForImageTextToText)
    | dict.fromkeys(SEQ2SEQ, transformers.AutoModelForSeq2SeqLM)
)
TYPES |= {name: transformers.AutoModelForCausalLM for name in ("fuyu", "git") if name in TYPES}  # text alone will do
tests.CHANGES |= {
    "cohere_compass": {"text_config": tests.CHANGES["cohere_compass_text"]},
    "cosmos3_edge": {"text_config": {"rope_parameters": tests.MROPE}},
    "qwen4_exp": {"text_config": tests.CHANGES["qwen4_exp_text"]},
}
CHECKS = {
    "identity": [(tests.test_on_every_architecture_new_adapters_change_nothing_and_go_without_a_trace, {})],
    "gradients": [(tests.test_on_every_architecture_all_adapters_train_and_nothing_else_does, {})],
    "padding": [
        (tests.test_on_every_architecture_padding_is_invisible, {"rep_mode": mode})
        for mode in ("token", "last", "mean")
    ],
    "cache": [(tests.test_on_every_architecture_decoding_with_a_cache_gives_what_decoding_without_it_gives, {})],
    "sequence": [
        (tests.test_on_every_architecture_the_sequence_modes_generate_and_train, {"rep_mode": mode})
        for mode in ("last", "mean", "prompt_end")
    ],
    "save": [(tests.test_on_every_architecture_a_saved_adapter_loads_into_a_fresh_model, {"tmp_path": None})],
    "checkpoint": [(tests.test_on_every_architecture_checkpointing_does_not_change_the_gradients, {})],
}


def outcome(checks: list, model_type: str) -> tuple[str, str]:
    """("yes", ""), ("-", why it does not apply) or ("NO", the error)."""
    for check, options in checks:
        try:
            with tempfile.TemporaryDirectory() as directory:
                check(model_type, **{k: Path(directory) if k == "tmp_path" else v for k, v in options.items()})
        except pytest.skip.Exception as skipped:
            return "-", str(skipped)
        except Exception as error:
            return "NO", f"{type(error).__name__}: {error}"
    return "yes", ""


def experts_of(model_type: str) -> tuple[int, str]:
    """Number of adapted blocks, and each kind of block's experts by their last names."""
    blocks = router_statistics(apply_monkeyjump(tests.tiny_model(model_type), top_k=1)).values()
    kinds = dict.fromkeys(" ".join(name.rpartition(".")[2] for name in block["experts"]) for block in blocks)
    return len(blocks), "; ".join(kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", default=list(TYPES))
    parser.add_argument("--failures", action="store_true")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    print(f"transformers {transformers.__version__}\n")
    print("| type | blocks | experts | " + " | ".join(CHECKS) + " | notes |")
    print("|---" * (len(CHECKS) + 4) + "|")
    passed = 0
    for model_type in options.types:
        tests.AUTO[model_type] = TYPES.get(model_type, transformers.AutoModelForCausalLM)
        tests.base_model.cache_clear()
        try:
            blocks, experts = experts_of(model_type)
        except (pytest.skip.Exception, ValueError, NotImplementedError) as error:
            print(f"| {model_type} | | | " + " | " * len(CHECKS) + f"{error} |".replace("\n", " ")[:200], flush=True)
            continue
        results = {name: outcome(checks, model_type) for name, checks in CHECKS.items()}
        marks = [mark for mark, _ in results.values()]
        passed += "NO" not in marks and "yes" in marks
        notes = dict.fromkeys(note.replace("\n", " ").replace("|", "/")[:160] for _, note in results.values() if note)
        if not options.failures or "NO" in marks or "yes" not in marks:
            print(f"| {model_type} | {blocks} | {experts} | {' | '.join(marks)} | {'; '.join(notes)} |", flush=True)
    print(f"\n{passed} of {len(options.types)} types pass all checks that they can run without adapters")


if __name__ == "__main__":
    main()
