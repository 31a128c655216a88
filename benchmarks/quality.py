"""Does routing pay? Plain LoRA, mixtures of LoRA experts and Monkey Jump, trained and tested under one protocol.

    python benchmarks/quality.py --model FOLDER_OR_FILE.gguf --data FOLDER        # runs what is missing, adds to --out
    python benchmarks/quality.py --report                                         # the table of what has been run

FOLDER holds train.jsonl and test.jsonl with rows {"task", "prompt", "answer", "choices"}; each label is one token
after a space. All tasks are mixed. For one seed every method sees the same batches in the same order, for the same
number of steps, with the same optimizer, rate and schedule. The CPU size adapts the upper half of the blocks: the
input of that half is the same in all runs, so it is computed once a row. Needs `pip install peft scipy`.

A method is a name and options. `linears` (and `shared_expert`) name its projections: q, k, v, o, gate, up, down.

    lora linears=q,k,v,o          PEFT LoRA: what every other method on the same projections is compared with
    moe_lora linears=q,k,v,o      four LoRA adapters a projection, mixed by a learned router: five times the parameters
    hydra_lora linears=q,k,v,o    one A and four B a projection, mixed by a learned router
    mj linears=q,k,v,o top_k=2    Monkey Jump: options go to apply_monkeyjump, but for two:
                                  assign=m decides by gradients which center serves which expert (assign.py),
                                  target_rank=2 is AdaLoRA's, whose schedule and penalty are then used
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
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import monkeyjump as mj  # noqa: E402

RANK, ALPHA = 2, 16.0
SIZES = {
    "cpu": {"steps": 720, "batch": 8, "max_tokens": 60, "test_rows": 100, "upper": 15},
    "gpu": {"steps": 720, "batch": 16, "max_tokens": 1000, "test_rows": 200, "upper": 0},  # 0: all blocks
}
# The rows of the table: their names and what they are. "With feed-forward": adapters on up and down as well.
METHODS = {
    "LoRA": "lora linears=q,k,v,o",
    "MoE-LoRA": "moe_lora linears=q,k,v,o",
    "HydraLoRA": "hydra_lora linears=q,k,v,o",
    "attention routed": "mj linears=q,k,v,o top_k=2",
    "attention routed, assigned": "mj linears=q,k,v,o top_k=2 assign=m",
    "LoRA with feed-forward": "lora linears=q,k,v,o,up,down",
    "MoE-LoRA with feed-forward": "moe_lora linears=q,k,v,o,up,down",
    "HydraLoRA with feed-forward": "hydra_lora linears=q,k,v,o,up,down",
    "published quick start": "mj linears=q,k,v,o shared_expert=up,down top_k=2 ema_momentum=0.2",
    "published quick start, assigned": "mj linears=q,k,v,o shared_expert=up,down top_k=2 ema_momentum=0.2 assign=m",
    "feed-forward routed": "mj linears=up,down shared_expert=q,k,v,o top_k=1",
    "feed-forward routed, assigned": "mj linears=up,down shared_expert=q,k,v,o top_k=1 assign=m",
    "feed-forward routed by sequence": "mj linears=up,down shared_expert=q,k,v,o top_k=1 rep_mode=mean",
    "feed-forward, all gates a half": "mj linears=up,down shared_expert=q,k,v,o top_k=2 temperature=1000",
    "feed-forward routed, lorafa": "mj linears=up,down shared_expert=q,k,v,o top_k=1 adapter=lorafa",
    "feed-forward routed, propulsion": "mj linears=up,down shared_expert=q,k,v,o top_k=1 adapter=propulsion",
    "feed-forward routed, adalora": "mj linears=up,down shared_expert=q,k,v,o top_k=1 adapter=adalora rank=3 "
    "target_rank=2",
    "LoRA with gate": "lora linears=q,k,v,o,gate",
    "authors' notebooks, alpha 16": "mj linears=q,k,v shared_expert=o,gate top_k=1 ema_momentum=0.5 jitter_noise=0.1",
    "authors' notebooks, alpha 5": "mj linears=q,k,v shared_expert=o,gate top_k=1 ema_momentum=0.5 jitter_noise=0.1 "
    "alpha=5",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- data


def read_rows(folder: str, split: str, tokenizer, max_tokens: int) -> list[dict]:
    """Rows of one split as token ids: the prompt, the answer's token and the tokens of the choices."""
    rows = []
    with open(os.path.join(folder, f"{split}.jsonl"), encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            ids = tokenizer(row["prompt"])["input_ids"]
            if len(ids) <= max_tokens:
                choices = [tokenizer(" " + choice)["input_ids"] for choice in row["choices"]]
                assert all(len(choice) == 1 for choice in choices), f"a label of more than one token: {row['choices']}"
                gold = row["choices"].index(row["answer"])
                rows.append({"task": row["task"], "ids": ids, "choices": [c[0] for c in choices], "gold": gold})
    return rows


def by_task(rows: list[dict]) -> dict[str, list[dict]]:
    tasks: dict[str, list[dict]] = {}
    for row in rows:
        tasks.setdefault(row["task"], []).append(row)
    return tasks


def take_per_task(rows: list[dict], n: int) -> list[dict]:
    """The first `n` rows of each task."""
    return [row for task_rows in by_task(rows).values() for row in task_rows[:n]]


def training_batches(rows: list[dict], steps: int, batch: int, seed: int) -> list[list[dict]]:
    """`steps` batches with every task equally often; rows of like length share a batch within windows of eight."""
    rng = random.Random(seed)
    tasks = by_task(rows).values()
    streams = []
    for task_rows in tasks:
        stream = []
        while len(stream) < steps * batch // len(tasks) + 1:
            stream += rng.sample(task_rows, len(task_rows))
        streams.append(iter(stream))
    batches: list[list[dict]] = []
    while len(batches) < steps:
        window = [next(streams[i % len(streams)]) for i in range(min(8, steps - len(batches)) * batch)]
        window.sort(key=lambda row: len(row["ids"]))
        drawn = [window[i : i + batch] for i in range(0, len(window), batch)]
        batches += rng.sample(drawn, len(drawn))
    return batches


def collate(rows: list[dict], pad: int, device) -> dict[str, Tensor]:
    """Left padding puts every row's answer position last, where `logits_to_keep=1` finds it."""
    width = max(len(row["ids"]) for row in rows)
    mask = [[0] * (width - len(row["ids"])) + [1] * len(row["ids"]) for row in rows]
    inputs = {"attention_mask": torch.tensor(mask, device=device), "logits_to_keep": 1}
    if "hidden" in rows[0]:
        hidden = [F.pad(row["hidden"], (0, 0, width - len(row["hidden"]), 0)) for row in rows]
        return inputs | {"inputs_embeds": torch.stack(hidden)}
    ids = [[pad] * (width - len(row["ids"])) + row["ids"] for row in rows]
    return inputs | {"input_ids": torch.tensor(ids, device=device)}


def split_model(model: nn.Module, upper: int) -> nn.Module:
    """Cut the model down to its last `upper` blocks, and return the rest for `precompute`."""
    lower = copy.deepcopy(model.model)
    lower.layers, lower.norm = lower.layers[:-upper], nn.Identity()
    model.model.layers = model.model.layers[-upper:]
    return lower


@torch.no_grad()
def precompute(lower: nn.Module, rows: list[dict], pad: int, cache: dict[tuple, Tensor]) -> None:
    """Give each row the input of the upper blocks, from the cache (by token ids); what is missing there is added."""
    device = next(lower.parameters()).device
    todo = {tuple(row["ids"]): row for row in rows if tuple(row["ids"]) not in cache}
    todo = sorted(todo.values(), key=lambda row: len(row["ids"]))
    for start in range(0, len(todo), 8):
        batch = todo[start : start + 8]
        inputs = collate([{"ids": row["ids"]} for row in batch], pad, device)
        del inputs["logits_to_keep"]
        for row, hidden in zip(batch, lower(**inputs).last_hidden_state, strict=True):
            cache[tuple(row["ids"])] = hidden[-len(row["ids"]) :].clone()
    for row in rows:
        row["hidden"] = cache[tuple(row["ids"])]


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


# ------------------------------------------------------------------------------------------------------- methods


def parse(method: str) -> tuple[str, dict]:
    """mj linears=q,k top_k=1 -> "mj", {"linears": ["q_proj", "k_proj"], "top_k": 1}."""
    name, *pairs = method.split()
    options = dict(pair.split("=") for pair in pairs)
    for key, value in options.items():
        if key in ("linears", "shared_expert"):
            options[key] = [f"{leaf}_proj" for leaf in value.split(",")]
        elif value[0].isdigit():
            options[key] = json.loads(value)
    return name, options


def build(method: str, base: nn.Module, init_batches: list[tuple[dict, Tensor]], seed: int) -> nn.Module:
    """A fresh model with the method's adapters; routers start from the batches (inputs and labels)."""
    name, options = parse(method)
    torch.manual_seed(seed)
    model = copy.deepcopy(base).requires_grad_(False)
    if name == "mj":
        assign, _ = options.pop("assign", ""), options.pop("target_rank", None)
        mj.apply_monkeyjump(model, **{"rank": RANK, "alpha": ALPHA, **options})
        mj.init_router_centers(model, [inputs for inputs, _ in init_batches], subset_size=4000, seed=seed)
        if assign == "m":
            from assign import assign_centers

            assign_centers(model, init_batches)
        return model
    if name == "lora":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=options["linears"]))
    import cost  # the mixtures of which it measures the costs

    wrapper = {"moe_lora": cost.MoELoRA, "hydra_lora": cost.HydraLoRA}[name]
    for module in list(model.modules()):
        for leaf, child in list(module.named_children()):
            if leaf in options["linears"]:
                setattr(module, leaf, wrapper(child).to(child.weight.device))
    return model


def watch_clusters(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor], list]:
    """By block: its centers [E, D]; which of them each token of the latest forward is nearest to [B, T]; the hooks."""
    nearest: dict[str, Tensor] = {}
    buffers = dict(model.named_buffers())
    centers = {
        block: next(buffers[name] for name in buffers if name.startswith(f"{block}.") and name.endswith("centers"))
        for block in mj.router_statistics(model)
    }

    def watch(block: str):
        def hook(_, args: tuple) -> None:
            nearest[block] = (mj.unit(args[0]) @ centers[block].T).argmax(dim=-1)

        return model.get_submodule(block).register_forward_pre_hook(hook)

    return centers, nearest, [watch(block) for block in centers]


# -------------------------------------------------------------------------------------------- training and testing


@torch.no_grad()
def evaluate(model: nn.Module, rows: list[dict], pad: int, device, routed: bool) -> dict:
    """By row: is the likeliest of its choices the right one, and the negative log likelihood among the choices.

    For routed models also the share of tokens by task, block and expert, in thousandths.
    """
    model.eval()
    centers, nearest, hooks = watch_clusters(model) if routed else ({}, {}, [])
    correct, nll, counts = [0] * len(rows), [0.0] * len(rows), {}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["ids"]))
    for start in range(0, len(order), 8):
        chunk = order[start : start + 8]
        all_logits = model(**collate([rows[i] for i in chunk], pad, device)).logits[:, -1].float()
        for b, i in enumerate(chunk):
            row, log_p = rows[i], all_logits[b][rows[i]["choices"]].log_softmax(-1)
            correct[i] = int(log_p.argmax().item() == row["gold"])
            nll[i] = -log_p[row["gold"]].item()
            if nearest:
                tokens = [F.one_hot(n[b, -len(row["ids"]) :], len(centers[block])) for block, n in nearest.items()]
                counts[row["task"]] = counts.get(row["task"], 0) + torch.stack(tokens).sum(1)  # [blocks, E]
    for hook in hooks:
        hook.remove()
    shares = {task: (1000 * c / c.sum(dim=1, keepdim=True)).round().int().tolist() for task, c in counts.items()}
    return {"correct": correct, "nll": nll, "shares": shares}


def run(method: str, seed: int, lr: float, models: tuple, train: list, test: list, size: dict, cache: dict) -> dict:
    """Train one method from one seed and evaluate it: a line of the results."""
    base, lower, pad = models
    steps, batch = size["steps"], size["batch"]
    device = next(base.parameters()).device
    batches = training_batches(train, steps, batch, seed)
    drawn = training_batches(train, 16, batch, seed + 1000)
    if lower is not None:
        precompute(lower, [row for rows in (*batches, *drawn, test) for row in rows], pad, cache)

    def inputs_and_labels(rows: list[dict]) -> tuple[dict, Tensor]:
        return collate(rows, pad, device), torch.tensor([row["choices"][row["gold"]] for row in rows], device=device)

    model = build(method, base, [inputs_and_labels(rows) for rows in drawn], seed)
    routed = method.startswith("mj ")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, (steps - s) / max(1, steps - warm))
    )
    target_rank = parse(method)[1].get("target_rank")
    model.train()
    for step, rows in enumerate(batches):
        if routed and step == steps // 2:  # to report the second half
            router_shares(model)
        inputs, gold = inputs_and_labels(rows)
        loss = F.cross_entropy(model(**inputs).logits[:, -1].float(), gold)
        (loss + 0.1 * mj.orthogonal_regularization(model) if target_rank else loss).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if target_rank:
            mj.allocate_ranks(
                model, step + 1, steps, target_rank=target_rank, initial_steps=steps // 10, final_steps=3 * steps // 10
            )
        optimizer.zero_grad()
        schedule.step()
    shares = router_shares(model) if routed else {}
    tested = evaluate(model, test, pad, device, routed)
    hits = by_task([{"task": row["task"], "hit": hit} for row, hit in zip(test, tested["correct"], strict=True)])
    accuracy = {task: 100 * statistics.mean(row["hit"] for row in rows) for task, rows in hits.items()}
    return {
        "method": method, "seed": seed, "lr": lr, "steps": steps, "parameters": sum(p.numel() for p in trained),
        "mean": round(100 * statistics.mean(tested["correct"]), 3), "nll": round(statistics.mean(tested["nll"]), 5),
        "accuracy": {task: round(value, 2) for task, value in accuracy.items()},
        "correct": "".join(map(str, tested["correct"])), "row_nll": [round(100 * n) for n in tested["nll"]],
        "shares": shares, "shares_by_task": tested["shares"],
    }  # fmt: skip


def router_shares(model: nn.Module) -> dict[str, list[int]]:
    """By block, the share of training tokens of each expert since the last call, in thousandths."""
    found = mj.router_statistics(model, reset=True)
    return {block: [round(1000 * share) for share in s["share"].tolist()] for block, s in found.items()}


# -------------------------------------------------------------------------------------------------------- report


def read_results(path: str) -> list[dict]:
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def projections(method: str) -> frozenset[str]:
    _, options = parse(method)
    return frozenset(options["linears"] + options.get("shared_expert", []))


def group(results: list[dict]) -> dict[str, dict[int, dict]]:
    """By method, in the table's order, the runs by seed."""
    runs: dict[str, dict[int, dict]] = {method: {} for method in METHODS.values()}
    for result in results:
        runs.setdefault(result["method"], {})[result["seed"]] = result
    return {method: by_seed for method, by_seed in runs.items() if by_seed}


def difference(runs: dict[int, dict], base: dict[int, dict], figure: str, rows: str, scale: float, digits: int) -> str:
    """Mean over the common seeds of a method's figure less LoRA's, and its standard error, over seeds and over rows."""
    seeds = sorted(runs.keys() & base.keys())
    if not seeds:
        return "–"
    by_seed = [runs[seed][figure] - base[seed][figure] for seed in seeds]
    pairs = [zip(map(int, runs[seed][rows]), map(int, base[seed][rows]), strict=True) for seed in seeds]
    by_row = [scale * statistics.mean(a - b for a, b in row) for row in zip(*pairs, strict=True)]
    errors = [f"{statistics.stdev(d) / math.sqrt(len(d)):.{digits}f}" if len(d) > 1 else "–" for d in (by_seed, by_row)]
    return f"{statistics.mean(by_seed):+.{digits}f} (± {errors[0]}, ± {errors[1]})"


def report(results: list[dict]) -> str:
    """The markdown table, by the projections that carry an adapter."""
    names = {method: name for name, method in METHODS.items()}
    runs = group(results)
    lines = [
        "| method | parameters | seeds | accuracy | nll | accuracy to LoRA | nll to LoRA |",
        "|---|---|---|---|---|---|---|",
    ]
    for kinds in dict.fromkeys(projections(method) for method in runs):
        order = [leaf for leaf in ("q", "k", "v", "o", "gate", "up", "down") if f"{leaf}_proj" in kinds]
        lines.append(f"| **adapters on {', '.join(order)}** | | | | | | |")
        members = {method: by_seed for method, by_seed in runs.items() if projections(method) == kinds}
        base = next((by_seed for method, by_seed in members.items() if method.startswith("lora ")), {})
        for method, by_seed in members.items():
            accuracy, nll = "–", "–"
            if by_seed is not base:
                accuracy = difference(by_seed, base, "mean", "correct", 100, 1)
                nll = difference(by_seed, base, "nll", "row_nll", 0.01, 3)
            cells = [names.get(method, f"`{method}`"), f"{next(iter(by_seed.values()))['parameters']:,}"]
            cells += [", ".join(map(str, sorted(by_seed)))]
            cells += [spread([r["mean"] for r in by_seed.values()], 1), spread([r["nll"] for r in by_seed.values()], 3)]
            lines.append(f"| {' | '.join([*cells, accuracy, nll])} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


# ---------------------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, hub id or .gguf file of a causal language model")
    parser.add_argument("--data", help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".jsonl")), help="results, a line a run")
    parser.add_argument("--report", action="store_true", help="print the table of --out and stop")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="rows of the table, or methods as above")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, help="optimizer steps (the size's)")
    parser.add_argument("--cache", help="file that keeps the precomputed inputs of the upper blocks")
    args = parser.parse_args()
    if args.report:
        print(report(read_results(args.out)))
        return
    if not args.model or not args.data:
        parser.error("--model and --data are needed")
    size = SIZES[args.size] | ({"steps": args.steps} if args.steps else {})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, tokenizer = load_model(args.model, device, torch.bfloat16)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    lower = split_model(base, size["upper"]) if size["upper"] else None
    train = read_rows(args.data, "train", tokenizer, size["max_tokens"])
    test = take_per_task(read_rows(args.data, "test", tokenizer, size["max_tokens"]), size["test_rows"])
    print(f"{len(train)} training and {len(test)} test rows on {device}", flush=True)

    cache = torch.load(args.cache) if args.cache and os.path.exists(args.cache) else {}
    for seed in args.seeds:
        for name in args.methods:
            method, known = METHODS.get(name, name), len(cache)
            done = {(r["method"], r["seed"], r["lr"], r["steps"]) for r in read_results(args.out)}
            if (method, seed, args.lr, size["steps"]) in done:
                continue
            start = time.perf_counter()
            result = run(method, seed, args.lr, (base, lower, pad), train, test, size, cache)
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(result, separators=(",", ":")) + "\n")
            seconds = time.perf_counter() - start
            print(f"{method} seed {seed}: {result['mean']:.1f} nll {result['nll']:.3f}, {seconds:.0f} s", flush=True)
            if args.cache and len(cache) > known:
                torch.save(cache, args.cache)


if __name__ == "__main__":
    main()
