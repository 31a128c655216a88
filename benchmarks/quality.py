"""Does routing pay? Accuracy of plain LoRA, AdaLoRA, MoE-LoRA and Monkey Jump under one protocol.

    python benchmarks/quality.py --model FOLDER_OR_FILE.gguf --data FOLDER --size cpu --out results.jsonl
    python benchmarks/quality.py --report --out results.jsonl

FOLDER holds train.jsonl and test.jsonl with rows {"task", "prompt", "answer", "choices"}; each label is one token
after a space. All tasks are mixed. For one seed, every method sees the same batches in the same order, for the same
number of steps, with the same optimiser and schedule; only the learning rate is chosen per method, on one seed, with
training rows held back for it (--tune). A run already in the results file is not repeated. The CPU size adapts the
upper half of the blocks: the input of that half is computed once a row, which halves the time.

A method is a name and options, as in "mj adapter=lora top_k=1 temperature=0.1":

    lora          PEFT LoRA, the baseline: the same projections, rank and alpha, so the same trainable parameters
    peft_adalora  PEFT AdaLoRA, pruned to the same average rank
    moe_lora      four LoRA experts a projection behind a learned top-2 router (about five times the parameters)
    mj            Monkey Jump: options go to apply_monkeyjump; besides them init=random draws the centers at random
                  (with update_until=0 they stay: fixed random routing), init=redrawn before every forward (random
                  routing anew each time), and gates=uniform gives every expert the weight 1/E
    apart METHOD  a model of its own for each task, on its share of each batch: what routing by task could reach
"""

import argparse
import copy
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANK, ALPHA = 2, 16.0
SIZES = {
    "cpu": {
        "tasks": ["sentiment", "question_type", "adjective_order", "brackets_valid"],
        "steps": 360, "batch": 8, "max_tokens": 48, "upper": 15,
    },
    "gpu": {"tasks": None, "steps": 600, "batch": 16, "max_tokens": 1000, "upper": 0},
}  # fmt: skip
ADAPTERS = ["lora", "lorafa", "adalora", "propulsion"]
METHODS = ["lora", "peft_adalora", "moe_lora", *(f"mj adapter={adapter}" for adapter in ADAPTERS)]


# ---------------------------------------------------------------------------------------------------------- data


def read_rows(folder: str, split: str, tokenizer, tasks: list[str] | None, max_tokens: int) -> list[dict]:
    """Rows of one split as token ids: the prompt, the answer's token and the tokens of the choices."""
    rows = []
    with open(os.path.join(folder, f"{split}.jsonl"), encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            ids = tokenizer(row["prompt"])["input_ids"]
            if (tasks is None or row["task"] in tasks) and len(ids) <= max_tokens:
                choices = [tokenizer(" " + choice)["input_ids"] for choice in row["choices"]]
                assert all(len(choice) == 1 for choice in choices), f"a label of more than one token: {row['choices']}"
                gold = row["choices"].index(row["answer"])
                rows.append({"task": row["task"], "ids": ids, "choices": [c[0] for c in choices], "gold": gold})
    return rows


def take_per_task(rows: list[dict], n: int) -> list[dict]:
    """The first `n` rows of each task."""
    counts: dict[str, int] = {}
    kept = []
    for row in rows:
        counts[row["task"]] = counts.get(row["task"], 0) + 1
        if counts[row["task"]] <= n:
            kept.append(row)
    return kept


def training_batches(rows: list[dict], steps: int, batch: int, seed: int) -> list[list[dict]]:
    """`steps` batches with every task equally often; rows of like length share a batch within windows of eight."""
    rng = random.Random(seed)
    by_task: dict[str, list[dict]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    streams = []
    for task_rows in by_task.values():
        stream = []
        while len(stream) < steps * batch // len(by_task) + 1:
            stream += rng.sample(task_rows, len(task_rows))
        streams.append(iter(stream))
    batches: list[list[dict]] = []
    while len(batches) < steps:
        window = [next(streams[i % len(streams)]) for i in range(min(8, steps - len(batches)) * batch)]
        window.sort(key=lambda row: len(row["ids"]))
        drawn = [window[i : i + batch] for i in range(0, len(window), batch)]
        batches += rng.sample(drawn, len(drawn))
    return batches


def collate(rows: list[dict], pad: int, device) -> dict[str, torch.Tensor]:
    """Left padding puts every row's answer position last, where `logits_to_keep=1` finds it."""
    width = max(len(row["ids"]) for row in rows)
    mask = [[0] * (width - len(row["ids"])) + [1] * len(row["ids"]) for row in rows]
    mask = torch.tensor(mask, device=device)
    if "hidden" in rows[0]:
        hidden = [F.pad(row["hidden"], (0, 0, width - len(row["hidden"]), 0)) for row in rows]
        return {"inputs_embeds": torch.stack(hidden), "attention_mask": mask}
    ids = [[pad] * (width - len(row["ids"])) + row["ids"] for row in rows]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": mask}


def split_model(model: nn.Module, upper: int) -> nn.Module:
    """Cut the model down to its last `upper` blocks, and return the rest for `precompute`."""
    lower = copy.deepcopy(model.model)
    lower.layers, lower.norm = lower.layers[:-upper], nn.Identity()
    model.model.layers = model.model.layers[-upper:]
    return lower


@torch.no_grad()
def precompute(lower: nn.Module, rows: list[dict], pad: int) -> None:
    """Give each row the input of the upper blocks. The frozen lower ones say the same in all steps of all methods."""
    device = next(lower.parameters()).device
    todo = sorted((row for row in rows if "hidden" not in row), key=lambda row: len(row["ids"]))
    for start in range(0, len(todo), 32):
        batch = todo[start : start + 32]
        output = lower(**collate(batch, pad, device)).last_hidden_state
        for row, hidden in zip(batch, output, strict=True):
            row["hidden"] = hidden[-len(row["ids"]) :].clone()


def answer_logits(model: nn.Module, rows: list[dict], pad: int, device) -> torch.Tensor:
    return model(**collate(rows, pad, device), logits_to_keep=1).logits[:, -1].float()


@torch.no_grad()
def evaluate(model: nn.Module, rows: list[dict], pad: int, device, batch: int = 32) -> tuple[list[int], list[float]]:
    """Per row: is the likeliest of its choices the right one, and the negative log likelihood among the choices."""
    model.eval()
    correct, nll = [0] * len(rows), [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["ids"]))
    for start in range(0, len(order), batch):
        chunk = order[start : start + batch]
        for i, logits in zip(chunk, answer_logits(model, [rows[i] for i in chunk], pad, device), strict=True):
            log_p = logits[rows[i]["choices"]].log_softmax(-1)
            correct[i] = int(log_p.argmax().item() == rows[i]["gold"])
            nll[i] = -log_p[rows[i]["gold"]].item()
    model.train()
    return correct, nll


# ------------------------------------------------------------------------------------------------------- methods


class MoELoRA(nn.Module):
    """Four LoRA experts on one linear; a learned softmax router gives each token its best two, renormalised."""

    def __init__(self, linear: nn.Linear, experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        self.linear, self.experts, self.top_k = linear, experts, top_k
        device = linear.weight.device
        self.router = nn.Linear(linear.in_features, experts, bias=False, device=device)
        self.A = nn.Parameter(torch.empty(experts, RANK, linear.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(experts, linear.out_features, RANK, device=device))
        for a in self.A:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base, x = self.linear(x), x.float()
        values, best = self.router(x).softmax(-1).topk(self.top_k)
        gates = torch.zeros(*x.shape[:-1], self.experts, device=x.device)
        gates = gates.scatter(-1, best, values / values.sum(-1, keepdim=True))
        hidden = torch.einsum("btd,erd->bter", x, self.A) * gates[..., None]
        return base + (ALPHA / RANK * torch.einsum("bter,eor->bto", hidden, self.B)).to(base.dtype)


def wrap_peft(model: nn.Module, config) -> nn.Module:
    from peft import get_peft_model

    return get_peft_model(model, config)


def build(method: str, base: nn.Module, steps: int, init_batches: list[dict], seed: int) -> tuple[nn.Module, dict]:
    """A fresh model with the method's adapters, and its callbacks: `penalty()`, `after_step(step)`, `report()`."""
    name, *options = method.split()
    options = {key: parse(value) for key, value in (option.split("=") for option in options)}
    torch.manual_seed(seed)
    model = copy.deepcopy(base).requires_grad_(False)
    if name == "lora":
        from peft import LoraConfig

        options = {"r": RANK, "lora_alpha": ALPHA, **options}
        return wrap_peft(model, LoraConfig(target_modules=PROJECTIONS, **options)), {}
    if name == "peft_adalora":
        from peft import AdaLoraConfig

        config = AdaLoraConfig(
            init_r=RANK + 1, target_r=RANK, lora_alpha=ALPHA, target_modules=PROJECTIONS, total_step=steps,
            tinit=steps // 10, tfinal=steps // 3, deltaT=10, **options,
        )  # fmt: skip
        model = wrap_peft(model, config)
        factors = [p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]

        def penalty() -> torch.Tensor:  # what PEFT adds to the loss when it computes the loss itself
            grams = [p @ p.T if p.shape[0] < p.shape[1] else p.T @ p for p in factors]
            norms = [(g - torch.eye(len(g), device=g.device)).norm() for g in grams]
            return config.orth_reg_weight * torch.stack(norms).mean()

        return model, {"penalty": penalty, "after_step": model.base_model.update_and_allocate}
    if name == "moe_lora":
        for module in list(model.modules()):
            for leaf, child in list(module.named_children()):
                if leaf in PROJECTIONS:
                    setattr(module, leaf, MoELoRA(child, **options))
        return model, {}
    if name == "mj":
        return build_monkeyjump(model, steps, init_batches, seed, **options)
    raise ValueError(f"unknown method {name!r}; known: lora, peft_adalora, moe_lora, mj")


def build_monkeyjump(
    model: nn.Module, steps: int, init_batches: list[dict], seed: int, *, init="kmeans", gates=None, **options
) -> tuple[nn.Module, dict]:
    import monkeyjump as mj

    options = {"rank": RANK, "alpha": ALPHA, "linears": PROJECTIONS, **options}
    adapter = options.get("adapter", "lora")
    if gates == "uniform":  # every expert for every token: top_k = E, and a temperature that flattens the softmax
        options |= {"top_k": len(options["linears"]), "temperature": 1e6}
    target_rank = RANK
    if adapter == "adalora":  # as for PEFT's: one rank more at the start, pruned to the same average
        options["rank"] = RANK + 1
        options["alpha"] *= (RANK + 1) / RANK
    mj.apply_monkeyjump(model, **options)
    callbacks = {"report": lambda: mj.router_statistics(model, reset=True)}
    if init == "kmeans":
        mj.init_router_centers(model, init_batches, subset_size=4000, seed=seed)
    elif init == "redrawn":
        routers = [module for module in model.modules() if isinstance(module, mj.Router)]
        model.register_forward_pre_hook(lambda *_: [router.centers.normal_() for router in routers] and None)
    elif init != "random":
        raise ValueError(f"init={init!r}; known: kmeans, random, redrawn")
    if adapter == "adalora":
        callbacks["penalty"] = lambda: 0.5 * mj.orthogonal_regularization(model)
        callbacks["after_step"] = lambda step: mj.allocate_ranks(
            model, step, steps, target_rank=target_rank, initial_steps=steps // 10, final_steps=steps // 3, interval=10
        )
    return model, callbacks


def parse(value: str):
    """An option's value: a number, true/false, a+b for a list, or text."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value.split("+") if "+" in value else value


# ------------------------------------------------------------------------------------------------------ training


def run(method: str, seed: int, lr: float, models: tuple, train: list[dict], test: list[dict], size: dict) -> dict:
    """Train one method from one seed and evaluate it; everything that the report needs, as plain numbers."""
    if method.startswith("apart "):
        return run_apart(method, seed, lr, models, train, test, size)
    base, lower, pad = models
    steps, batch = size["steps"], size["batch"]
    device = next(base.parameters()).device
    batches = training_batches(train, steps, batch, seed)
    drawn = training_batches(train, 16, batch, seed + 1000)
    if lower is not None:
        precompute(lower, unique(row for rows in (*batches, *drawn, test) for row in rows), pad)
    init_batches = [collate(rows, pad, device) | {"logits_to_keep": 1} for rows in drawn]
    model, callbacks = build(method, base, steps, init_batches, seed)
    nothing = lambda *args: 0.0  # noqa: E731
    penalty, allocate, report = (callbacks.get(k, nothing) for k in ("penalty", "after_step", "report"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, (steps - s) / max(1, steps - warm))
    )
    model.train()
    losses, seconds, router = [], [], []
    for step, rows in enumerate(batches):
        start = time.perf_counter()
        gold = torch.tensor([row["choices"][row["gold"]] for row in rows], device=device)
        loss = F.cross_entropy(answer_logits(model, rows, pad, device), gold)
        (loss + penalty()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        allocate(step + 1)  # AdaLoRA's pruning reads the gradients after the step
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        if step in (steps // 10, steps // 2, steps - 1) and "report" in callbacks:
            router.append({"step": step, "blocks": {k: plain(v) for k, v in report().items()}})
    correct, nll = evaluate(model, test, pad, device)
    per_task: dict[str, list[int]] = {}
    for row, hit in zip(test, correct, strict=True):
        per_task.setdefault(row["task"], []).append(hit)
    tail = losses[-max(1, steps // 5) :]
    return {
        "method": method, "seed": seed, "lr": lr, "rows": len(test),
        "accuracy": {task: 100 * sum(hits) / len(hits) for task, hits in per_task.items()},
        "mean": statistics.mean(100 * sum(hits) / len(hits) for hits in per_task.values()),
        "nll": statistics.mean(nll), "correct": "".join(map(str, correct)), "train_loss": statistics.mean(tail),
        "parameters": sum(p.numel() for p in trained), "step_seconds": statistics.median(seconds), "router": router,
    }  # fmt: skip


def run_apart(method: str, seed: int, lr: float, models: tuple, train: list, test: list, size: dict) -> dict:
    """`run` for each task alone, as one result."""
    tasks = list(dict.fromkeys(row["task"] for row in train))
    size = size | {"batch": size["batch"] // len(tasks)}
    runs = {}
    for task in tasks:
        own = [[row for row in rows if row["task"] == task] for rows in (train, test)]
        runs[task] = run(method.removeprefix("apart "), seed, lr, models, *own, size)
    hits = {task: iter(result["correct"]) for task, result in runs.items()}
    results = list(runs.values())
    accuracy = {task: result["accuracy"][task] for task, result in runs.items()}
    return results[0] | {
        "method": method, "rows": len(test), "accuracy": accuracy, "mean": statistics.mean(accuracy.values()),
        "nll": sum(r["nll"] * r["rows"] for r in results) / len(test),
        "correct": "".join(next(hits[row["task"]]) for row in test),
        "train_loss": statistics.mean(r["train_loss"] for r in results),
        "parameters": sum(r["parameters"] for r in results), "router": [],
    }  # fmt: skip


def unique(rows: Iterable[dict]) -> list[dict]:
    return list({id(row): row for row in rows}.values())


def plain(statistics_of_block: dict) -> dict:
    """router_statistics' tensors as rounded lists, for JSON."""
    return {
        k: [round(x, 4) for x in v.flatten().tolist()] if torch.is_tensor(v) else v
        for k, v in statistics_of_block.items()
    }


def load_model(path: str, device: str, dtype: torch.dtype):
    """A folder, hub id or GGUF file. The base is bf16 (the adapters stay float32)."""
    source = {"pretrained_model_name_or_path": path}
    if path.endswith(".gguf"):
        folder, file = os.path.split(path)
        source = {"pretrained_model_name_or_path": folder, "gguf_file": file}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # On a CPU, sdpa's backward takes as long as all matrix products of the model together; eager's does not.
    attention = "eager" if device == "cpu" else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype, attn_implementation=attention)
    # The last position is a strided view, for which the head's backward would copy its matrix once a row of the batch.
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    model.config.use_cache = False
    return model.to(device), tokenizer


# -------------------------------------------------------------------------------------------------------- report


def read_results(path: str) -> list[dict]:
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def best_rate(results: list[dict], method: str) -> float | None:
    """The learning rate with the lowest loss on the held-back rows. A variant without a search of its own takes the
    search of its adapter."""
    tried = [r for r in results if r["split"] == "heldback" and r["method"] == method]
    if not tried and method.startswith("mj "):
        family = " ".join(part for part in method.split() if part == "mj" or part.startswith("adapter="))
        tried = [r for r in results if r["split"] == "heldback" and r["method"] == family]
    return min(tried, key=lambda r: r["nll"])["lr"] if tried else None


def report(results: list[dict], split: str, baseline: str = "lora") -> str:
    """The markdown table: mean over seeds ± their standard deviation, and the paired difference to the baseline (at its
    best rate) with two standard errors, over seeds and over rows."""
    groups: dict[tuple[str, int, float], dict[int, dict]] = {}
    for r in results:
        if r["split"] == split:
            groups.setdefault((r["method"], r["steps"], r["lr"]), {})[r["seed"]] = r
    if not groups:
        return f"no results on the {split} split"
    tasks = list(next(iter(next(iter(groups.values())).values()))["accuracy"])
    lines = [
        f"| method | steps | lr | parameters | {' | '.join(tasks)} | mean | to {baseline} (± over seeds, ± over rows) "
        "| nll | s/step | seeds |",
        "|---" * (9 + len(tasks)) + "|",
    ]
    for (method, steps, lr), runs in groups.items():
        bases = [runs for (method, *size), runs in groups.items() if method == baseline and size[0] == steps]
        base = min(bases, key=lambda runs: statistics.mean(r["nll"] for r in runs.values()), default={})
        means = [r["mean"] for r in runs.values()]
        columns = [statistics.mean(r["accuracy"][t] for r in runs.values()) for t in tasks]
        spread = f" ± {statistics.stdev(means):.1f}" if len(means) > 1 else ""
        shared = [s for s in runs if s in base]
        difference = "–"
        if shared and runs is not base:
            d = [runs[s]["mean"] - base[s]["mean"] for s in shared]
            over_seeds = f"{statistics.stdev(d) / math.sqrt(len(d)):.1f}" if len(d) > 1 else "–"
            pairs = zip(*(zip(runs[s]["correct"], base[s]["correct"], strict=True) for s in shared), strict=True)
            by_row = [100 * statistics.mean(int(a) - int(b) for a, b in row) for row in pairs]
            over_rows = statistics.stdev(by_row) / math.sqrt(len(by_row))
            difference = f"{statistics.mean(d):+.1f} (± {over_seeds}, ± {over_rows:.1f})"
        first = next(iter(runs.values()))
        nll = statistics.mean(r["nll"] for r in runs.values())
        seconds = statistics.median(r["step_seconds"] for r in runs.values())
        lines.append(
            f"| {method} | {steps} | {lr:g} | {first['parameters']:,} | {' | '.join(f'{c:.1f}' for c in columns)} "
            f"| {statistics.mean(means):.1f}{spread} | {difference} | {nll:.3f} | {seconds:.2f} | {len(runs)} |"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, hub id or .gguf file of a causal language model")
    parser.add_argument("--data", help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--out", required=True, help="results, one JSON line a run; existing runs are skipped")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tune", action="store_true", help="search the rates on held-back training rows, first seed")
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2], help="the grid of the search")
    parser.add_argument("--steps", type=int, help="optimiser steps (the size's)")
    parser.add_argument("--batch", type=int, help="rows a step (the size's)")
    parser.add_argument("--tasks", nargs="+", help="subset of tasks (the size's)")
    parser.add_argument("--max_tokens", type=int, help="leave longer prompts out (the size's)")
    parser.add_argument("--upper", type=int, help="adapt only the last blocks, so many; 0: all (the size's)")
    parser.add_argument("--test_rows", type=int, default=1000, help="rows a task to evaluate on")
    parser.add_argument("--heldback", type=int, default=100, help="training rows a task kept for the search")
    parser.add_argument("--report", action="store_true", help="print the tables of --out and stop")
    args = parser.parse_args()
    if args.report:
        for split in ("test", "heldback"):
            print(f"{split} rows\n\n{report(read_results(args.out), split=split)}\n")
        return
    if not args.model or not args.data:
        parser.error("--model and --data are needed")
    size = SIZES[args.size] | {
        k: getattr(args, k) for k in ("steps", "batch", "tasks", "max_tokens", "upper") if getattr(args, k) is not None
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, tokenizer = load_model(args.model, device, torch.bfloat16)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    lower = split_model(base, size["upper"]) if size["upper"] else None
    rows = read_rows(args.data, "train", tokenizer, size["tasks"], size["max_tokens"])
    heldback = take_per_task(rows, args.heldback)
    held = {id(row) for row in heldback}
    train = [row for row in rows if id(row) not in held]
    test = take_per_task(read_rows(args.data, "test", tokenizer, size["tasks"], size["max_tokens"]), args.test_rows)
    split = "heldback" if args.tune else "test"
    print(f"{len(train)} training, {len(heldback)} held-back, {len(test)} test rows on {device}", flush=True)

    for seed in args.seeds[:1] if args.tune else args.seeds:
        for method in args.methods:
            results = read_results(args.out)
            chosen = args.lr if args.tune else [best_rate(results, method) or args.lr[0]]
            for lr in chosen:
                key = (method, seed, lr, size["steps"], split)
                if any((r["method"], r["seed"], r["lr"], r["steps"], r["split"]) == key for r in results):
                    continue
                start = time.perf_counter()
                evaluated = heldback if args.tune else test
                result = run(method, seed, lr, (base, lower, pad), train, evaluated, size)
                result |= {"split": split, **size, "seconds": time.perf_counter() - start}
                with open(args.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
                tasks = " ".join(f"{task} {value:.1f}" for task, value in result["accuracy"].items())
                print(
                    f"{method} seed {seed} lr {lr:g}: {result['mean']:.1f} ({tasks}) nll {result['nll']:.3f} "
                    f"train loss {result['train_loss']:.3f}, {result['step_seconds']:.2f} s a step, "
                    f"{result['seconds']:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
