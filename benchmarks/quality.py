"""Does routing pay? Plain LoRA, mixtures of LoRA experts and Monkey Jump, under one protocol.

    python benchmarks/quality.py --report                                 # the tables of quality.md
    python benchmarks/quality.py --model FOLDER_OR_FILE.gguf --data FOLDER    # runs what is missing

FOLDER holds train.jsonl and test.jsonl with rows {"task", "prompt", "answer", "choices"}; each
label is one token after a space. All tasks are mixed. For one seed every method sees the same
batches in the same order, with the same optimizer, rate and schedule. Adapters sit in the upper 15
blocks: what enters those is the same in all runs, so it is computed once a row.

**All seeds of a method train at once**: a seed is a slice of the batch, its adapters and centers a
slice of stacked tensors. Seeds share the frozen base and nothing else; each has its own batches,
initial weights, k-means, centers and gradient clipping. A test compares this, step by step, with
the product's own training, PEFT's and the mixtures of cost.py, one model a seed.

A method is a name and options; `linears` and `shared_expert` are q, k, v, o, gate, up, down.

    lora linears=q,k,v,o          what every other method on the same projections is compared with
    moe_lora linears=q,k,v,o      four LoRA adapters a projection, mixed by a learned router
    hydra_lora linears=q,k,v,o    one A and four B a projection, mixed by a learned router
    mj linears=q,k,v,o top_k=2    Monkey Jump, with options of apply_monkeyjump
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from einops import einsum
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.append(str(Path(__file__).resolve().parents[1]))  # monkeyjump.py lies beside this folder
import monkeyjump as mj  # noqa: E402

FOLDER = Path(__file__).resolve().parent
STEPS = 720
BATCH = 8
RATE = 3e-3
MAX_TOKENS = 60  # of a prompt
TEST_ROWS = 100  # of a task
UPPER = 15  # blocks that carry adapters
EXPERTS = 4  # of a mixture, as in cost.py

# The rows of the tables: their names and what they are.
METHODS = {
    "LoRA": "lora linears=q,k,v,o",
    "MoE-LoRA": "moe_lora linears=q,k,v,o",
    "HydraLoRA": "hydra_lora linears=q,k,v,o",
    "attention routed, top-2": "mj linears=q,k,v,o top_k=2",
    "attention routed, top-2, alpha 64": "mj linears=q,k,v,o top_k=2 alpha=64",
    "attention, all four on": "mj linears=q,k,v,o top_k=4 alpha=64",
    "attention, all four on, sharper": "mj linears=q,k,v,o top_k=4 alpha=64 temperature=0.2",
    "attention, equal gates": "mj linears=q,k,v,o top_k=4 alpha=64 temperature=1000",
    "LoRA with feed-forward": "lora linears=q,k,v,o,up,down",
    "MoE-LoRA with feed-forward": "moe_lora linears=q,k,v,o,up,down",
    "HydraLoRA with feed-forward": "hydra_lora linears=q,k,v,o,up,down",
    "feed-forward routed": "mj linears=up,down shared_expert=q,k,v,o top_k=1",
    "feed-forward routed by sequence": "mj linears=up,down shared_expert=q,k,v,o top_k=1 "
    "rep_mode=mean",
    "feed-forward, all gates a half": "mj linears=up,down shared_expert=q,k,v,o top_k=2 "
    "temperature=1000",
    "published quick start": "mj linears=q,k,v,o shared_expert=up,down top_k=2 ema_momentum=0.2",
    "LoRA with gate, up, down": "lora linears=q,k,v,o,gate,up,down",
    "gate, up, down routed": "mj linears=gate,up,down shared_expert=q,k,v,o top_k=1",
    "LoRA with gate": "lora linears=q,k,v,o,gate",
    "authors' notebooks": "mj linears=q,k,v shared_expert=o,gate top_k=1 "
    "ema_momentum=0.5 jitter_noise=0.1",
}


# -------------------------------------------------------------------------------------- data


def read_rows(folder: str, split: str, tokenizer) -> list[dict]:
    """Rows of one split as token ids: the prompt, the choices, which of them is right."""
    rows = []
    with open(os.path.join(folder, f"{split}.jsonl"), encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            ids = tokenizer(row["prompt"])["input_ids"]
            if len(ids) > MAX_TOKENS:
                continue
            choices = [tokenizer(" " + choice)["input_ids"] for choice in row["choices"]]
            if any(len(choice) != 1 for choice in choices):
                raise ValueError(f"a label of more than one token: {row['choices']}")
            gold = row["choices"].index(row["answer"])
            first = [choice[0] for choice in choices]
            rows.append({"task": row["task"], "ids": ids, "choices": first, "gold": gold})
    return rows


def by_task(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of each task."""
    tasks: dict[str, list[dict]] = {}
    for row in rows:
        tasks.setdefault(row["task"], []).append(row)
    return tasks


def joined(lists: Iterable[list]) -> list:
    """One list after another."""
    return list(itertools.chain.from_iterable(lists))


def length(row: dict) -> int:
    """Tokens of a row's prompt."""
    return len(row["ids"])


def training_batches(rows: list[dict], steps: int, batch: int, seed: int) -> list[list[dict]]:
    """Batches with every task equally often; within eight, rows of like length are together."""
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
        count = min(8, steps - len(batches)) * batch
        window = [next(streams[i % len(streams)]) for i in range(count)]
        window.sort(key=length)
        drawn = [window[i : i + batch] for i in range(0, len(window), batch)]
        batches += rng.sample(drawn, len(drawn))
    return batches


def collate(rows: list[dict], device) -> dict[str, Tensor]:
    """Left padding puts every row's answer last, where `logits_to_keep=1` finds it."""
    width = max(map(length, rows))
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for row, real in zip(rows, mask, strict=True):
        real[width - length(row) :] = 1
    inputs = {"attention_mask": mask.to(device)}
    if "hidden" in rows[0]:
        pads = [(0, 0, width - length(row), 0) for row in rows]
        hidden = [F.pad(row["hidden"], pad) for row, pad in zip(rows, pads, strict=True)]
        return inputs | {"inputs_embeds": torch.stack(hidden)}
    ids = [[0] * (width - length(row)) + row["ids"] for row in rows]
    return inputs | {"input_ids": torch.tensor(ids, device=device)}


# --------------------------------------------------------------------------------- the model


def load_model(path: str, device: str):
    """A folder, hub id or GGUF file, in bf16, with its tokenizer."""
    # On a CPU, sdpa's backward takes as long as all products of the model; eager's does not.
    form = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    source = {"pretrained_model_name_or_path": path}
    if path.endswith(".gguf"):
        folder, file = os.path.split(path)
        source = {"pretrained_model_name_or_path": folder, "gguf_file": file}
        if hasattr(transformers, "GgufConfig"):  # which otherwise leaves the weights packed
            form["quantization_config"] = transformers.GgufConfig(dequantize=True)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, **form).to(device)
    model.get_output_embeddings().register_forward_pre_hook(contiguous)
    return model, tokenizer


def contiguous(_: nn.Module, args: tuple) -> tuple:
    """The last position is a strided view, for which the head's backward copies its matrix."""
    return (args[0].contiguous(),)


def split_model(model: nn.Module, upper: int) -> nn.Module:
    """Cut the model down to its last blocks, and return the rest for `precompute`."""
    lower = copy.deepcopy(model.model)
    lower.layers = lower.layers[:-upper]
    lower.norm = nn.Identity()
    model.model.layers = model.model.layers[-upper:]
    return lower


@torch.no_grad()
def precompute(lower: nn.Module, rows: list[dict]) -> None:
    """Give each row that lacks it the input of the upper blocks, "hidden" [T, D]."""
    device = next(lower.parameters()).device
    todo = [row for row in rows if "hidden" not in row]
    todo.sort(key=length)
    for start in range(0, len(todo), BATCH):
        batch = todo[start : start + BATCH]
        hidden = lower(**collate(batch, device), use_cache=False).last_hidden_state
        for row, states in zip(batch, hidden, strict=True):
            row["hidden"] = states[-length(row) :].clone()


# ------------------------------------------------------------------------ all seeds at once


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


class Pass:
    """What the routers and adapters of all seeds share while the model runs."""

    def __init__(self, seeds: list[int], device) -> None:
        self.seeds = seeds
        self.device = device
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.real: Tensor | None = None  # [S * B, T], set by SeededModel.logits
        self.gates: Tensor | None = None  # of the running block [S, B, N, E]; N = T, or 1
        self.listener: Callable | None = None  # hears (router, directions, best, real)

    def split(self, x: Tensor) -> Tensor:
        """[S * B, ...] -> [S, B, ...]."""
        return x.unflatten(0, (len(self.seeds), -1))

    def uniform(self, *shape: int) -> nn.Parameter:
        """[S, *shape] as nn.Linear's weight and LoRA's A start, from each seed's own generator."""
        bound = shape[-1] ** -0.5
        drawn = [torch.empty(shape).uniform_(-bound, bound, generator=g) for g in self.generators]
        return nn.Parameter(torch.stack(drawn).to(self.device))

    def normal(self, *shape: int) -> nn.Parameter:
        """[S, *shape] as a mixture's A starts."""
        drawn = [0.02 * torch.randn(shape, generator=g) for g in self.generators]
        return nn.Parameter(torch.stack(drawn).to(self.device))

    def zeros(self, *shape: int) -> nn.Parameter:
        """[S, *shape] as every B starts."""
        return nn.Parameter(torch.zeros(len(self.seeds), *shape, device=self.device))


class SeedLoRA(nn.Module):
    """A frozen linear with a LoRA adapter for each seed; routed, if it is an expert."""

    def __init__(self, base: nn.Linear, run: Pass, config, expert: int | None):
        super().__init__()
        self.base = base
        self.run = run
        self.expert = expert
        self.scale = config.alpha / config.rank
        self.A = run.uniform(config.rank, base.in_features)
        self.B = run.zeros(base.out_features, config.rank)

    def forward(self, x: Tensor) -> Tensor:
        """x [S * B, T, in] -> [S * B, T, out]."""
        low = einsum(self.run.split(x), self.A.to(x.dtype), "s b t i, s r i -> s b t r")
        if self.expert is not None:
            low = low * self.run.gates[..., self.expert, None]
        up = (self.scale * self.B).to(x.dtype)
        delta = einsum(low, up, "s b t r, s o r -> s b t o")
        return self.base(x) + delta.flatten(0, 1)


class SeedMixture(nn.Module):
    """A frozen linear with cost.py's MoELoRA for each seed, or its HydraLoRA (downs = 1)."""

    def __init__(self, base: nn.Linear, run: Pass, config, downs: int):
        super().__init__()
        self.base = base
        self.run = run
        self.scale = config.alpha / config.rank
        self.router = run.uniform(EXPERTS, base.in_features)
        self.A = run.normal(downs, config.rank, base.in_features)
        self.B = run.zeros(EXPERTS, base.out_features, config.rank)

    def forward(self, x: Tensor) -> Tensor:
        """x [S * B, T, in] -> [S * B, T, out]."""
        by_seed = self.run.split(x)
        logits = einsum(by_seed, self.router.to(x.dtype), "s b t i, s e i -> s b t e")
        low = einsum(by_seed, self.A.to(x.dtype), "s b t i, s e r i -> s b t e r")
        gated = logits.softmax(-1)[..., None] * low  # HydraLoRA's low has e = 1
        up = (self.scale * self.B).to(x.dtype)
        delta = einsum(gated, up, "s b t e r, s e o r -> s b t o")
        return self.base(x) + delta.flatten(0, 1)


class SeedRouter:
    """One block's centers for each seed, compared and moved by monkeyjump's own functions."""

    def __init__(self, width: int, run: Pass, config):
        self.run = run
        self.config = config
        self.experts = len(config.linears)
        shape = len(run.seeds), self.experts, width
        self.centers = mj.unit(torch.randn(shape, device=run.device))  # [S, E, D]
        self.pending = torch.zeros(*shape[:2], width + 1, device=run.device)

    @torch.no_grad()
    def __call__(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the block runs: set its gates; in training, gather statistics."""
        hidden = args[0] if args else kwargs["hidden_states"]
        run = self.run
        config = self.config
        points, real = mj.represent(hidden, config.rep_mode, run.real, None)
        points = run.split(mj.unit(points))  # [S, B, N, D]
        real = run.split(real)  # [S, B, N]
        noise = config.jitter_noise if block.training else 0.0
        gates = []
        best = []
        for x, centers in zip(points, self.centers, strict=True):
            routed = mj.route(x, centers, config.top_k, config.temperature, noise)
            gates.append(routed[0])
            best.append(routed[1])
        run.gates = torch.stack(gates).to(hidden.dtype)
        if block.training:
            for seed, (x, b, r) in enumerate(zip(points, best, real, strict=True)):
                self.pending[seed] += mj.cluster_statistics(x, b, self.experts, r)
        if run.listener:
            run.listener(self, points, best, real)

    @torch.no_grad()
    def move(self) -> None:
        """What an optimizer step does."""
        self.centers = mj.ema_update(self.centers, self.pending, self.config.ema_momentum)
        self.pending.zero_()


class SeededModel:
    """A base model with a method's adapters for several seeds: a seed is a slice of the batch."""

    def __init__(self, method: str, base: nn.Module, seeds: list[int], steps: int, rate: float):
        self.name, options = parse(method)
        self.config = mj.MonkeyJumpConfig(**options)
        self.run = Pass(seeds, base.device)
        self.model = copy.deepcopy(base).requires_grad_(False)
        self.routers: list[SeedRouter] = []
        for block in self.model.model.layers:
            self.adapt(block)
        self.model.train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=rate, weight_decay=0.0)
        warm = max(1, steps // 20)

        def schedule(step: int) -> float:
            """Warms up, then falls to zero."""
            return min((step + 1) / warm, (steps - step) / max(1, steps - warm))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule)

    def adapt(self, block: nn.Module) -> None:
        """Put adapters around a block's projections, and a router before it."""
        wanted = [*self.config.linears, *(self.config.shared_expert or [])]
        for module in list(block.modules()):
            for leaf, child in list(module.named_children()):
                if leaf in wanted:
                    setattr(module, leaf, self.adapter(leaf, child))
        if self.name == "mj":
            router = SeedRouter(self.model.config.hidden_size, self.run, self.config)
            block.register_forward_pre_hook(router, with_kwargs=True)
            self.routers.append(router)

    def adapter(self, leaf: str, base: nn.Linear) -> nn.Module:
        """The method's adapters for one projection."""
        if self.name == "moe_lora":
            return SeedMixture(base, self.run, self.config, downs=EXPERTS)
        if self.name == "hydra_lora":
            return SeedMixture(base, self.run, self.config, downs=1)
        expert = None
        if self.name == "mj" and leaf in self.config.linears:
            expert = self.config.linears.index(leaf)
        return SeedLoRA(base, self.run, self.config, expert)

    def logits(self, rows: list[dict]) -> Tensor:
        """Of the last position: S * B rows, a seed's after another's -> [S, B, vocabulary]."""
        batch = collate(rows, self.run.device)
        self.run.real = batch["attention_mask"].bool()
        logits = self.model(**batch, logits_to_keep=1, use_cache=False).logits[:, -1]
        return self.run.split(logits.float())

    @torch.no_grad()
    def init_centers(self, batches: list[list[list[dict]]], subset_size: int = 4000) -> None:
        """As init_router_centers does, each seed from its own batches and generator."""
        quota = math.ceil(subset_size / min(8, len(batches[0])))  # from one batch
        generators = [torch.Generator().manual_seed(seed) for seed in self.run.seeds]
        seen = {}
        for router in self.routers:
            seen[router] = [[] for _ in generators]

        def listen(router: SeedRouter, points: Tensor, best: list, real: Tensor) -> None:
            """Keep some of each seed's directions."""
            for seed, generator in enumerate(generators):
                mine = points[seed][real[seed]]  # [n, D]
                chosen = torch.randperm(len(mine), generator=generator)[:quota]
                seen[router][seed].append(mine[chosen.to(mine.device)])

        self.model.eval()
        self.run.listener = listen
        for rows_by_seed in zip(*batches, strict=True):
            self.logits(joined(rows_by_seed))
        self.run.listener = None
        self.model.train()
        for router, by_seed in seen.items():
            for index, (seed, found) in enumerate(zip(self.run.seeds, by_seed, strict=True)):
                points = torch.cat(found)[:subset_size]
                generator = torch.Generator().manual_seed(seed)
                router.centers[index] = mj.kmeans(points, router.experts, 15, generator)

    def step(self, rows: list[dict]) -> Tensor:
        """One training step on S * B rows; each seed's loss [S]."""
        gold = torch.tensor([row["choices"][row["gold"]] for row in rows], device=self.run.device)
        logits = self.logits(rows).flatten(0, 1)
        losses = F.cross_entropy(logits, gold, reduction="none")
        losses = self.run.split(losses).mean(dim=1)
        losses.sum().backward()  # each seed's gradient is of its own loss alone
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        for router in self.routers:
            router.move()
        return losses.detach()

    def clip(self, largest: float = 1.0) -> None:
        """clip_grad_norm_ for each seed's gradient."""
        squares = [p.grad.flatten(1).square().sum(dim=1) for p in self.trained]
        norms = torch.stack(squares).sum(dim=0).sqrt()  # [S]
        factors = (largest / (norms + 1e-6)).clamp(max=1.0)
        for p in self.trained:
            p.grad *= factors.view(-1, *[1] * (p.dim() - 1))


# ------------------------------------------------------------------------ training, testing


@torch.no_grad()
def evaluate(model: SeededModel, test: list[dict]) -> list[dict]:
    """Of each seed: accuracy and nll of the right choice among the choices, over all rows;
    accuracy by task; by task and block, which experts serve its tokens, in thousandths."""
    model.model.eval()
    seeds = model.run.seeds
    hits = {}
    nll = []
    shares = {}
    counts = {router: torch.zeros(len(seeds), router.experts) for router in model.routers}

    def listen(router: SeedRouter, points: Tensor, best: list, real: Tensor) -> None:
        """Count the tokens that each expert serves."""
        for seed, (b, r) in enumerate(zip(best, real, strict=True)):
            counts[router][seed] += b[r].bincount(minlength=router.experts).cpu()

    model.run.listener = listen
    for task, rows in by_task(test).items():
        rows = sorted(rows, key=length)
        found = []
        for start in range(0, len(rows), BATCH):
            chunk = rows[start : start + BATCH]
            logits = model.logits(chunk * len(seeds))
            for index, row in enumerate(chunk):
                log_p = logits[:, index, row["choices"]].log_softmax(-1)  # [S, choices]
                found.append(log_p.argmax(-1) == row["gold"])
                nll.append(-log_p[:, row["gold"]])
        hits[task] = torch.stack(found).float()  # [rows, S]
        shares[task] = torch.stack([*counts.values()], 1) if counts else None  # [S, blocks, E]
        for count in counts.values():
            count.zero_()
    model.run.listener = None
    return [summary(hits, torch.stack(nll), shares, index) for index in range(len(seeds))]


def summary(hits: dict, nll: Tensor, shares: dict, seed: int) -> dict:
    """One seed's figures for its line of the results."""
    accuracy = {task: round(100 * h[:, seed].mean().item(), 2) for task, h in hits.items()}
    every = torch.cat([*hits.values()])[:, seed]
    line = {"mean": round(100 * every.mean().item(), 3)}
    line |= {"nll": round(nll[:, seed].mean().item(), 5), "accuracy": accuracy}
    by_block = {}
    for task, counts in shares.items():
        if counts is not None:
            share = counts[seed] / counts[seed].sum(dim=-1, keepdim=True)
            by_block[task] = (1000 * share).round().int().tolist()
    return line | {"shares_by_task": by_block} if by_block else line


def run(method: str, seeds: list[int], rate: float, steps: int, models: tuple, rows: tuple):
    """Train a method from several seeds at once and test it: their lines of the results."""
    base, lower = models
    train, test = rows
    batches = [training_batches(train, steps, BATCH, seed) for seed in seeds]
    drawn = [training_batches(train, 16, BATCH, seed + 1000) for seed in seeds]
    needed = {id(row): row for row in test}
    for batch in joined(batches + drawn):
        needed |= {id(row): row for row in batch}
    precompute(lower, list(needed.values()))
    model = SeededModel(method, base, seeds, steps, rate)
    if model.routers:
        model.init_centers(drawn)
    losses = []
    for rows_by_seed in zip(*batches, strict=True):
        losses.append(model.step(joined(rows_by_seed)))
    last = torch.stack(losses[-max(1, steps // 6) :]).mean(dim=0)
    count = sum(p.numel() for p in model.trained) // len(seeds)
    settings = {"lr": rate, "steps": steps, "parameters": count}
    for seed, loss, figures in zip(seeds, last.tolist(), evaluate(model, test), strict=True):
        line = {"method": method, "seed": seed, **settings, "train_loss": round(loss, 4)}
        yield line | figures


# ------------------------------------------------------------------------------------ report


def read_results(path: str | Path) -> list[dict]:
    """The lines of a file of results."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def projections(method: str) -> str:
    """What carries an adapter: "q, k, v, o"."""
    _, options = parse(method)
    leaves = options["linears"] + options.get("shared_expert", [])
    known = ("q", "k", "v", "o", "gate", "up", "down")
    return ", ".join(leaf for leaf in known if f"{leaf}_proj" in leaves)


def group(results: list[dict]) -> dict[tuple[str, float], dict[int, dict]]:
    """By method and rate, the rates downwards and methods in the table's order: runs by seed."""
    order = list(METHODS.values())
    results = sorted(results, key=lambda line: (-line["lr"], order.index(line["method"])))
    runs: dict[tuple[str, float], dict[int, dict]] = {}
    for line in results:
        runs.setdefault((line["method"], line["lr"]), {})[line["seed"]] = line
    return runs


def plain_lora(runs: dict, method: str, rate: float) -> dict[int, dict]:
    """The runs of LoRA on the same projections at the same rate, by seed."""
    for (other, its_rate), by_seed in runs.items():
        same = projections(other) == projections(method) and its_rate == rate
        if same and other.startswith("lora "):
            return by_seed
    return {}


def paired(runs: dict[int, dict], base: dict[int, dict], figure: str) -> list[float]:
    """A figure less LoRA's, for each seed that both have."""
    seeds = sorted(runs.keys() & base.keys())
    return [runs[seed][figure] - base[seed][figure] for seed in seeds]


def standard_error(values: list[float]) -> float:
    """Of the mean of two values or more."""
    return statistics.stdev(values) / math.sqrt(len(values))


def difference(pairs: list[float], digits: int) -> str:
    """The mean with its standard error over seeds."""
    mean = f"{statistics.mean(pairs):+.{digits}f}"
    if len(pairs) == 1:
        return f"{mean}, one seed"
    return f"{mean} ± {standard_error(pairs):.{digits}f}"


def table(results: list[dict]) -> str:
    """The markdown table: rows by what carries an adapter, each beside LoRA on the same."""
    names = {method: name for name, method in METHODS.items()}
    titles = ["method", "parameters", "seeds", "accuracy", "nll", "accuracy to LoRA", "nll to LoRA"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    runs = group(results)
    title = ""
    for (method, rate), by_seed in runs.items():
        if title != f"on {projections(method)}, rate {rate:g}":
            title = f"on {projections(method)}, rate {rate:g}"
            lines.append(f"| **{title}** {'| ' * (len(titles) - 1)}|")
        base = plain_lora(runs, method, rate)
        values = list(by_seed.values())
        cells = [names[method], f"{values[0]['parameters']:,}", str(len(values))]
        cells.append(f"{statistics.mean(line['mean'] for line in values):.1f}")
        cells.append(f"{statistics.mean(line['nll'] for line in values):.3f}")
        if method.startswith("lora "):
            cells += ["–", "–"]
        else:
            cells.append(difference(paired(by_seed, base, "mean"), 1))
            cells.append(difference(paired(by_seed, base, "nll"), 3))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------- main


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", help="folder, hub id or .gguf file of a causal language model")
    parser.add_argument("--data", help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--out", default=str(FOLDER / "quality.jsonl"), help="a line a run")
    parser.add_argument("--report", action="store_true", help="print the tables and stop")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="rows of the table")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=RATE)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    unknown = [name for name in args.methods if name not in METHODS]
    if unknown:
        parser.error(f"--methods {unknown}: one of {list(METHODS)}")
    if not args.report and not (args.model and args.data):
        parser.error("--model and --data are needed")
    return args


def main() -> None:
    """Print the tables, or run what is missing in --out."""
    args = parse_arguments()
    if args.report:
        print(table(read_results(FOLDER / "quality_h100.jsonl")), end="\n\n")
        print(table(read_results(args.out)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, tokenizer = load_model(args.model, device)
    lower = split_model(base, UPPER)
    train = read_rows(args.data, "train", tokenizer)
    test = []
    for rows in by_task(read_rows(args.data, "test", tokenizer)).values():
        test += rows[:TEST_ROWS]
    print(f"{len(train)} training and {len(test)} test rows on {device}", flush=True)
    for name in args.methods:
        method = METHODS[name]
        done = set()
        for line in read_results(args.out):
            if (line["method"], line["lr"], line["steps"]) == (method, args.lr, args.steps):
                done.add(line["seed"])
        seeds = [seed for seed in args.seeds if seed not in done]
        if not seeds:
            continue
        start = time.perf_counter()
        lines = list(run(method, seeds, args.lr, args.steps, (base, lower), (train, test)))
        with open(args.out, "a", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, separators=(",", ":")) + "\n")
        nll = ", ".join(f"{line['nll']:.3f}" for line in lines)
        seconds = time.perf_counter() - start
        print(f"{name}, seeds {seeds}: nll {nll}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
