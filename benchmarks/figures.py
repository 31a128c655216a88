"""The evidence, drawn: quality against parameters, who serves which tokens, representations with centers, costs.

    python benchmarks/figures.py                                                  # quality.png, routing.png
    python benchmarks/figures.py --model FOLDER_OR_FILE.gguf --data FOLDER        # representations.png
    python benchmarks/cost.py --json cost.json && python benchmarks/figures.py --cost cost.json        # cost.png

The first two are made of quality.jsonl, the fourth of what cost.py wrote; only the third needs a model. All are
written beside this file.
"""

import argparse
import json
import statistics
from pathlib import Path

import matplotlib
import quality
import torch
from torch import Tensor, nn

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

FOLDER = Path(__file__).parent
COLORS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb"]
plt.rcParams |= {"font.size": 9, "figure.dpi": 110, "savefig.dpi": 110, "figure.constrained_layout.use": True}


def draw_quality(results: list[dict], path: Path) -> None:
    """nll against trained parameters, a mark a method: mean and standard deviation over its seeds."""
    names = {method: name for name, method in quality.METHODS.items()}
    runs = quality.group(results)
    kinds = list(dict.fromkeys(quality.projections(method) for method in runs))
    grays = {"lora": "black", "moe_lora": "#888888", "hydra_lora": "#bbbbbb"}
    figure, axis = plt.subplots(figsize=(8, 4.2))
    drawn: dict[int, int] = {}  # methods of the same size are drawn side by side
    shades = iter(plt.get_cmap("tab20").colors)
    for method, by_seed in runs.items():
        size = next(iter(by_seed.values()))["parameters"]
        drawn[size] = drawn.get(size, -1) + 1
        nll = [run["nll"] for run in by_seed.values()]
        axis.errorbar(
            size * 1.04 ** drawn[size], statistics.mean(nll), statistics.stdev(nll) if len(nll) > 1 else None,
            fmt="osD"[kinds.index(quality.projections(method))], markersize=7, capsize=3,
            color=grays.get(method.split()[0]) or next(shades), label=f"{names.get(method, method)} ({len(nll)})",
        )  # fmt: skip
    axis.set(xscale="log", xlabel="trained parameters", ylabel="nll of the right answer (lower is better)")
    ticks = [size for size in (50_000, 100_000, 200_000, 500_000, 1_000_000) if size < 2 * max(drawn)]
    axis.set_xticks(ticks, [f"{size // 1000}k" for size in ticks])
    axis.set_xticks([], minor=True)
    axis.margins(0.15)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", title="method (seeds)")
    figure.savefig(path)


def stack(axis, labels: list[str], shares: list[list[int]], experts: list[str]) -> None:
    """Horizontal bars of shares in thousandths, an expert a color."""
    left = [0.0] * len(shares)
    for e, name in enumerate(experts):
        widths = [row[e] / 1000 for row in shares]
        axis.barh(labels, widths, left=left, color=COLORS[e], label=name, height=0.85)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set(xlim=(0, 1), xlabel="share of tokens")
    axis.invert_yaxis()


def draw_routing(result: dict, name: str, path: Path) -> None:
    """Share of each expert by block, over the second half of training, and by task in the block that separates most."""
    experts = quality.parse(result["method"])[1]["linears"]
    tasks = sorted(result["shares_by_task"])
    by_task = torch.tensor([result["shares_by_task"][task] for task in tasks], dtype=torch.float)  # [tasks, L, E]
    block = int(by_task.std(dim=0).mean(dim=-1).argmax())
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.8))
    stack(left, [str(i) for i in range(len(result["shares"]))], list(result["shares"].values()), experts)
    left.set(title="by block, in training", ylabel="adapted block")
    stack(right, tasks, by_task[:, block].tolist(), experts)
    right.set(title=f"by task, test rows, block {block}")
    figure.suptitle(f"{name}, seed {result['seed']}")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(experts))
    figure.savefig(path)


@torch.no_grad()
def representations(model: nn.Module, rows: list[dict], pad: int, blocks: list[str]) -> dict[str, Tensor]:
    """By block, the directions [N, D] of the inputs of all real tokens."""
    import monkeyjump as mj

    found: dict[str, list[Tensor]] = {block: [] for block in blocks}
    real = None

    def watch(block: str):
        return lambda _, args: found[block].append(mj.unit(args[0])[real].cpu())

    hooks = [model.get_submodule(block).register_forward_pre_hook(watch(block)) for block in blocks]
    model.eval()
    for start in range(0, len(rows), 8):
        inputs = quality.collate(rows[start : start + 8], pad, next(model.parameters()).device)
        real = inputs["attention_mask"].bool()
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return {block: torch.cat(parts) for block, parts in found.items()}


def draw_representations(points: dict[str, Tensor], centers: dict[str, Tensor], experts: list[str], path: Path) -> None:
    """Two principal components of the directions; each center where its cluster is.

    A center is a unit vector and the mean of its cluster is shorter, by the mean cosine between the two: so it is
    drawn at center times mean cosine, which after k-means is the cluster's mean.
    """
    figure, axes = plt.subplots(1, len(points), figsize=(8, 3.2), squeeze=False)
    for axis, (block, x) in zip(axes[0], points.items(), strict=True):
        cosines, mine = (x @ centers[block].T).max(dim=-1)
        mean = x.mean(dim=0)
        plane = torch.linalg.svd(x - mean, full_matrices=False).Vh[:2].T  # [D, 2]
        flat = (x - mean) @ plane
        for e, name in enumerate(experts):
            some = flat[mine == e]
            axis.scatter(*some[:: 1 + len(some) // 400].T, s=5, color=COLORS[e], alpha=0.5, linewidths=0, label=name)
        for e in range(len(experts)):  # after all points, to lie above them
            star = (centers[block][e] * cosines[mine == e].mean() - mean) @ plane
            axis.scatter(*star, s=200, marker="*", color=COLORS[e], edgecolors="black")
        axis.set(title=f"block {block.rpartition('.')[2]}", xticks=[], yticks=[])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(experts), markerscale=3)
    figure.savefig(path)


def draw_cost(cost: dict, path: Path) -> None:
    """Bars of every system for the figures of cost.py's training table that matter most."""
    rows, kinds = cost["training"], ("kept MB above floor", "peak MB above floor", "aten calls", "bf16 / PEFT LoRA")
    columns = [kind for kind in kinds if kind in rows[0]]
    figure, axes = plt.subplots(1, len(columns), figsize=(8, 3), sharey=True)
    for axis, column in zip(axes, columns, strict=True):
        bars = axis.barh([row["system"] for row in rows], [row[column] for row in rows], color=COLORS[0])
        axis.bar_label(bars, fmt=lambda value: f"{value:.0f}" if value >= 100 else f"{value:.2f}", padding=3)
        axis.use_sticky_edges = False
        axis.margins(x=0.25)
        axis.set(title=column)
    axes[0].invert_yaxis()
    figure.suptitle(cost["setting"], fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=str(FOLDER / "quality.jsonl"), help="what quality.py wrote")
    parser.add_argument("--method", default="feed-forward routed", help="the form to draw, a row of the table")
    parser.add_argument("--model", help="folder, hub id or .gguf file, for the representations")
    parser.add_argument("--data", help="folder with train.jsonl and test.jsonl, for the representations")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 15, 28], help="blocks to show")
    parser.add_argument("--cost", help="what cost.py --json wrote")
    args = parser.parse_args()
    method = quality.METHODS.get(args.method, args.method)
    _, options = quality.parse(method)
    options.pop("assign", None)
    if args.cost:
        draw_cost(json.loads(Path(args.cost).read_text(encoding="utf-8")), FOLDER / "cost.png")
    elif args.model:
        import monkeyjump as mj

        model, tokenizer = quality.load_model(args.model, "cpu", torch.bfloat16)
        mj.apply_monkeyjump(model, **options)
        batches = quality.training_batches(quality.read_rows(args.data, "train", tokenizer, 60), 16, 8, 0)
        pad = tokenizer.pad_token_id
        mj.init_router_centers(model, [quality.collate(rows, pad, "cpu") for rows in batches])
        rows = quality.take_per_task(quality.read_rows(args.data, "test", tokenizer, 60), 8)
        centers, _, hooks = quality.watch_clusters(model)
        for hook in hooks:
            hook.remove()
        shown = [list(centers)[i] for i in args.blocks]
        draw_representations(
            representations(model, rows, pad, shown), centers, options["linears"], FOLDER / "representations.png"
        )
    else:
        results = quality.read_results(args.results)
        draw_quality(results, FOLDER / "quality.png")
        drawn = next((result for result in results if result["method"] == method), None)
        if drawn is None:
            parser.error(f"--method {args.method!r}: no run of it in {args.results}")
        draw_routing(drawn, args.method, FOLDER / "routing.png")


if __name__ == "__main__":
    main()
