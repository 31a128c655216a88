r"""What the router does, drawn: experts per block, experts per task, representations with their centers, costs.

    python benchmarks/figures.py --model FOLDER_OR_FILE.gguf --data FOLDER [--options centered=true] [--adapter SAVED]
    python benchmarks/cost.py --json cost.json && python benchmarks/figures.py --cost cost.json

The first writes routing.png and representations.png, the second cost.png, beside this file or into --out. Without
--adapter, Monkey Jump is applied with --options and its centers are set by k-means on training rows.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import quality
import torch
from torch import Tensor, nn

import monkeyjump as mj

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

COLORS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb"]


@torch.no_grad()
def collect(model: nn.Module, rows: list[dict], pad: int) -> tuple[dict[str, Tensor], list[str]]:
    """By block the representations [N, D] of all real tokens (or sequences), and the task of each of the N."""
    found: dict[str, list[Tensor]] = {}
    tasks: list[str] = []
    routers = {name.removesuffix(".monkeyjump"): m for name, m in model.named_modules() if isinstance(m, mj.Router)}

    def watch(name: str, router: nn.Module):
        def hook(block: nn.Module, args: tuple, kwargs: dict) -> None:
            _, representations, valid = router.observe(args, kwargs)
            kept = representations.flatten(0, 1) if valid is None else representations[valid]
            found.setdefault(name, []).append(kept.cpu())

        return hook

    handles = [
        model.get_submodule(name).register_forward_pre_hook(watch(name, router), with_kwargs=True)
        for name, router in routers.items()
    ]
    device = next(model.parameters()).device
    model.eval()
    for start in range(0, len(rows), 32):
        batch = rows[start : start + 32]
        quality.answer_logits(model, batch, pad, device)
        first = next(iter(found.values()))[-1]
        each = [len(row["ids"]) for row in batch] if len(first) != len(batch) else [1] * len(batch)
        tasks += [row["task"] for row, count in zip(batch, each, strict=True) for _ in range(count)]
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}, tasks


def shares(assigned: Tensor, experts: int) -> Tensor:
    return torch.bincount(assigned, minlength=experts) / max(1, len(assigned))


def draw_routing(assigned: dict[str, Tensor], tasks: list[str], experts: list[str], path: Path) -> None:
    """Heat maps of top-1 shares: blocks x experts, and tasks x experts in the block that separates tasks best."""
    by_block = torch.stack([shares(a, len(experts)) for a in assigned.values()])  # [L, E]
    kinds = sorted(set(tasks))
    is_kind = {kind: torch.tensor([task == kind for task in tasks]) for kind in kinds}
    by_task = torch.stack([  # [L, tasks, E]
        torch.stack([shares(a[is_kind[kind]], len(experts)) for kind in kinds]) for a in assigned.values()
    ])  # fmt: skip
    best = int(by_task.std(dim=1).mean(dim=-1).argmax())
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
    left.imshow(by_block.T, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    left.set(title="share of tokens by block", xlabel="block", yticks=range(len(experts)), yticklabels=experts)
    image = right.imshow(by_task[best], aspect="auto", vmin=0, vmax=1, cmap="viridis")
    right.set(title=f"share of tokens by task, block {best}", xticks=range(len(experts)), xticklabels=experts)
    right.set(yticks=range(len(kinds)), yticklabels=kinds)
    figure.colorbar(image, ax=right)
    figure.savefig(path, dpi=80)


def draw_representations(points: list[tuple[str, Tensor, Tensor, Tensor]], experts: list[str], path: Path) -> None:
    """(title, representations [N, D], centers [E, D], expert of each [N]): their first two principal components."""
    figure, axes = plt.subplots(1, len(points), figsize=(4 * len(points), 3.6), layout="constrained", squeeze=False)
    for axis, (title, x, centers, assigned) in zip(axes[0], points, strict=True):
        mean = x.mean(dim=0)
        plane = torch.pca_lowrank(x - mean, q=2)[2]  # [D, 2]
        flat, stars = (x - mean) @ plane, (centers - mean) @ plane
        for e, name in enumerate(experts):
            color = COLORS[e % len(COLORS)]
            mine = flat[assigned == e]
            mine = mine[:: 1 + len(mine) // 400]  # enough to see, and a small file
            axis.scatter(*mine.T, s=4, color=color, alpha=0.5, linewidths=0, label=name)
            axis.scatter(*stars[e], s=180, marker="*", color=color, edgecolors="black")
        axis.set(title=title, xticks=[], yticks=[])
    axes[0, 0].legend(markerscale=3, fontsize=8)
    figure.savefig(path, dpi=80)


def draw_cost(cost: dict, path: Path) -> None:
    """Bars of every system for the figures of cost.py's training table that matter most."""
    rows, kinds = cost["training"], ("kept MB above floor", "peak MB above floor", "aten calls", "bf16 / PEFT LoRA")
    columns = [kind for kind in kinds if kind in rows[0]]
    figure, axes = plt.subplots(1, len(columns), figsize=(3.2 * len(columns), 3), sharey=True, layout="constrained")
    for axis, column in zip(axes, columns, strict=True):
        bars = axis.barh([row["system"] for row in rows], [row[column] for row in rows], color=COLORS[0])
        axis.bar_label(bars, fmt=lambda value: f"{value:.0f}" if value >= 100 else f"{value:.2f}", padding=3)
        axis.use_sticky_edges = False
        axis.margins(x=0.25)
        axis.set(title=column)
    axes[0].invert_yaxis()
    figure.suptitle(cost["setting"], fontsize=8)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, hub id or .gguf file")
    parser.add_argument("--data", help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--adapter", help="what save_adapter wrote")
    parser.add_argument("--options", nargs="*", default=[], help="name=value of apply_monkeyjump")
    parser.add_argument("--rows", type=int, default=24, help="test rows a task")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 15, 28], help="blocks to show in the projection")
    parser.add_argument("--cost", help="what cost.py --json wrote: draw that and stop")
    parser.add_argument("--out", default=str(Path(__file__).parent))
    args = parser.parse_args()
    if args.cost:
        draw_cost(json.loads(Path(args.cost).read_text(encoding="utf-8")), Path(args.out) / "cost.png")
        return
    if not args.model or not args.data:
        parser.error("--model and --data are needed, or --cost")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = quality.load_model(args.model, device, torch.bfloat16)
    pad = tokenizer.pad_token_id
    if args.adapter:
        mj.load_adapter(model, args.adapter)
    else:
        options = (option.split("=") for option in args.options)
        mj.apply_monkeyjump(model, **{name: quality.parse(value) for name, value in options})
        train = quality.read_rows(args.data, "train", tokenizer, None, 1000)
        batches = quality.training_batches(train, 40, 8, 0)
        mj.init_router_centers(model, [quality.collate(b, pad, device) | {"logits_to_keep": 1} for b in batches])
    rows = quality.take_per_task(quality.read_rows(args.data, "test", tokenizer, None, 1000), args.rows)
    representations, tasks = collect(model, rows, pad)
    routers = {name: model.get_submodule(name).monkeyjump for name in representations}
    centers = {name: mj.unit(router.centers).cpu() for name, router in routers.items()}
    assigned = {name: (x @ centers[name].T).argmax(dim=-1) for name, x in representations.items()}
    experts = [path.rpartition(".")[2] for path in next(iter(routers.values())).experts]
    by_block = torch.stack([shares(a, len(experts)) for a in assigned.values()])
    least = by_block.amin(dim=1)
    print(
        f"share of the least used expert of a block: mean {least.mean():.3f}, lowest {least.min():.3f}; "
        f"experts under 5 %: {(by_block < 0.05).sum()} of {by_block.numel()}"
    )
    out, names = Path(args.out), list(representations)
    draw_routing(assigned, tasks, experts, out / "routing.png")
    shown = [(f"block {i}", names[i]) for i in args.blocks if i < len(names)]
    points = [(title, representations[name], centers[name], assigned[name]) for title, name in shown]
    draw_representations(points, experts, out / "representations.png")
    for path in sorted(out.glob("*.png")):
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
