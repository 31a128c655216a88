"""Draws the figures of README and quality.md from the results that lie beside this file.

    python benchmarks/cost.py --grow --json benchmarks/cost_grow.json    # makes the first's figures
    python benchmarks/figures.py            # cost.png, quality.png, routing.png (needs matplotlib)
"""

import json
import operator
import statistics
from pathlib import Path

import matplotlib
import quality
import torch
from matplotlib import pyplot as plt

FOLDER = Path(__file__).resolve().parent
COLORS = ["#4477aa", "#ee6677", "#228833", "#ccbb44"]
OURS = COLORS[0]
OTHERS = "#888888"
USUAL = {"tokens": 512, "experts": 4, "blocks": 8}  # cost.py's setting, from which one changes
matplotlib.use("Agg")
plt.rcParams |= {"font.size": 9, "savefig.dpi": 110, "figure.constrained_layout.use": True}


def draw_cost(cost: dict, path: Path) -> None:
    """A training step over PEFT LoRA's and over the floor's as work grows; k-means' cost."""
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.9))
    for axis, column in zip(axes, USUAL, strict=False):
        draw_growth(axis, cost["grow"], column)
    axes[0].set_ylabel("our step's time over")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    draw_kmeans(axes[3], cost["k-means"])
    figure.suptitle(cost["setting"], fontsize=8)
    figure.savefig(path)


def draw_kmeans(axis, rows: list[dict]) -> None:
    """init_router_centers by how many representations a block it takes."""
    sizes = [row["representations"] for row in rows]
    axis.plot(sizes, [row["seconds"] for row in rows], "ko-")
    axis.set(xscale="log", title="k-means", ylabel="seconds (line)", ylim=(0, None))
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.set_xticks([], minor=True)
    memory = axis.twinx()
    memory.plot(sizes, [row["MiB"] for row in rows], "k^--")
    memory.set(ylabel="MiB (dashes)", ylim=(0, None))


def draw_growth(axis, rows: list[dict], column: str) -> None:
    """One panel: what changes is one column, the others are as in the usual setting."""
    shown = []
    for row in rows:
        changed = {name for name, value in USUAL.items() if row[name] != value}
        if changed <= {column}:
            shown.append(row)
    shown.sort(key=operator.itemgetter(column))
    x = [row[column] for row in shown]
    for color, dtype in zip(COLORS, ("bf16", "fp32"), strict=False):
        for line, other in (("o-", "PEFT LoRA"), ("s--", "floor")):
            y = [row[f"{dtype} / {other}"] for row in shown]
            axis.plot(x, y, line, color=color, label=f"{other}'s, {dtype}")
    axis.axhline(1.0, color="gray", linewidth=0.8)
    axis.set(xscale="log", title=f"by {column}", ylim=(0.8, 1.45))
    axis.set_xticks(x, map(str, x))
    axis.set_xticks([], minor=True)


def draw_quality(headline: list[dict], others: list[dict], path: Path) -> None:
    """nll less LoRA's on the same projections: mean and standard error over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.4))
    draw_differences(axes[0], headline, "twenty tasks")
    draw_differences(axes[1], others, "fourteen tasks")
    axes[1].axvspan(-0.015, 0.015, color="#dddddd", label="one method run twice, three seeds each")
    figure.legend(loc="outside lower right")
    figure.suptitle("nll of the right answer less LoRA's on the same projections (less is better)")
    figure.savefig(path)


def draw_differences(axis, results: list[dict], title: str) -> None:
    """A row for each method that has at least two seeds in common with LoRA."""
    runs = quality.group(results)
    labels = []
    names = {method: name for name, method in quality.METHODS.items()}
    for (method, rate), by_seed in runs.items():
        pairs = quality.paired(by_seed, quality.plain_lora(runs, method, rate), "nll")
        if method.startswith("lora ") or len(pairs) < 2:
            continue
        color = OURS if method.startswith("mj ") else OTHERS
        error = quality.standard_error(pairs)
        mean = statistics.mean(pairs)
        y = -len(labels)
        axis.errorbar(mean, y, xerr=error, fmt="o", color=color, capsize=3)
        size = next(iter(by_seed.values()))["parameters"]
        name = f"{names[method]}, rate {rate:g}"
        labels.append(f"{name}\n{size:,} parameters, {len(pairs)} seeds")
    axis.axvline(0.0, color="gray", linewidth=0.8)
    axis.set_yticks([-index for index in range(len(labels))], labels, fontsize=7)
    axis.set_title(title)


def stack(axis, labels: list[str], shares: list[list[float]], experts: list[str]) -> None:
    """Horizontal bars of shares of tokens, an expert a color."""
    left = [0.0] * len(shares)
    for index, name in enumerate(experts):
        widths = [row[index] for row in shares]
        axis.barh(labels, widths, left=left, color=COLORS[index], label=name, height=0.85)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set(xlim=(0, 1), xlabel="share of tokens")
    axis.invert_yaxis()


def draw_routing(line: dict, path: Path) -> None:
    """Who serves the test rows' tokens: by block, and by task in the block that differs most."""
    experts = quality.parse(line["method"])[1]["linears"]
    tasks = sorted(line["shares_by_task"])
    shares = torch.tensor([line["shares_by_task"][task] for task in tasks]) / 1000  # [tasks, L, E]
    most = int(shares.std(dim=0).mean(dim=-1).argmax())
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.8))
    by_block = shares.mean(dim=0).tolist()
    stack(left, [str(block) for block in range(len(by_block))], by_block, experts)
    left.set(title="by block", ylabel="adapted block")
    stack(right, tasks, shares[:, most].tolist(), experts)
    right.set_title(f"by task, block {most}")
    figure.suptitle(f"feed-forward routed, seed {line['seed']}, test rows")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(experts))
    figure.savefig(path)


def main() -> None:
    """Draw what there are results for."""
    others = quality.read_results(FOLDER / "quality.jsonl")
    headline = quality.read_results(FOLDER / "quality_h100.jsonl")
    draw_quality(headline, others, FOLDER / "quality.png")
    routed = quality.METHODS["feed-forward routed"]
    line = next(line for line in others if line["method"] == routed)
    draw_routing(line, FOLDER / "routing.png")
    grown = FOLDER / "cost_grow.json"
    if grown.exists():
        draw_cost(json.loads(grown.read_text()), FOLDER / "cost.png")


if __name__ == "__main__":
    main()
