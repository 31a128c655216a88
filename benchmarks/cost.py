"""What Monkey Jump costs beside a frozen model, plain LoRA and mixtures of LoRA experts, on a CPU.

    python benchmarks/cost.py               # a training step: time, kept bytes, launches
    python benchmarks/cost.py --inference   # prefill and cached decoding against the base model
    python benchmarks/cost.py --grow        # a step as tokens, experts and blocks grow; k-means
    (--compile: the first two compiled; --systems lora "PEFT LoRA" picks systems;
    --json FILE writes the figures as well; needs `pip install peft`; a GPU: benchmarks/gpu.py)

The systems, on q, k, v and o of every block, rank 2, over the very same frozen weights:

    floor               the model trained through one scalar: no adapter, yet a whole backward pass
    base                the model alone (inference only)
    lora, lorafa, adalora, propulsion    Monkey Jump: token routing, top-2
    PEFT LoRA           one adapter a projection, no routing; float32 adapters, PEFT's default
    PEFT LoRA bf16      the same with adapters in the base's dtype
    MoE-LoRA            four adapters a projection, mixed by a learned router; a loop over experts
    MoE-LoRA stacked    the same function in three products a projection
    HydraLoRA           one A and four B a projection, mixed by a learned router; a loop

    step time           forward, backward and AdamW's step (which moves our centers). All systems
                        take turns in one run; a ratio is the median over the turns of the ratio
                        within a turn, so that whatever else the machine does hits both alike
    kept bytes          distinct storages saved for backward, parameters and buffers left out
    launches            operators that start a kernel in forward, backward and the centers' move;
                        AdamW's, the same for all, are left out. A GPU's time in small steps

Kept bytes and launches do not depend on the machine, only on the versions of the libraries.
"""

from __future__ import annotations

import argparse
import collections
import copy
import functools
import gc
import importlib.metadata
import inspect
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache
from transformers.cache_utils import DynamicCache

sys.path.append(str(Path(__file__).resolve().parents[1]))  # monkeyjump.py lies beside this folder
from monkeyjump import apply_monkeyjump, init_router_centers, update_router_centers  # noqa: E402

RANK = 2
ALPHA = 16.0
EXPERTS = 4
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
VARIANTS = ["lora", "lorafa", "adalora", "propulsion"]
PEFT = ["PEFT LoRA", "PEFT LoRA bf16"]
SYSTEMS = ["floor", *VARIANTS, *PEFT, "MoE-LoRA", "MoE-LoRA stacked", "HydraLoRA"]
Times = dict[str, list[float]]  # milliseconds of each turn, by system


# ------------------------------------------------------------------------------ the systems


def small_config(blocks: int = 8) -> LlamaConfig:
    """A Llama of width 576 (SmolLM2-135M's)."""
    return LlamaConfig(
        hidden_size=576,
        num_hidden_layers=blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=1024,
    )


class MoELoRA(nn.Module):
    """y = W x + sum_e g_e(x) (alpha/r) B_e A_e x, g = softmax(router(x)), expert by expert."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.router = nn.Linear(base.in_features, EXPERTS, bias=False)
        down = [torch.randn(RANK, base.in_features) * 0.02 for _ in range(EXPERTS)]
        up = [torch.zeros(base.out_features, RANK) for _ in range(EXPERTS)]
        self.A = nn.ParameterList(down)  # [r, in] each
        self.B = nn.ParameterList(up)  # [out, r] each

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]; weights are cast to x's dtype."""
        y = self.base(x)
        gates = F.linear(x, self.router.weight.to(x.dtype)).softmax(-1)
        for e, (A, B) in enumerate(zip(self.A, self.B, strict=True)):
            delta = F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)) * (ALPHA / RANK)
            y = y + gates[..., e : e + 1] * delta
        return y


class StackedMoELoRA(nn.Module):
    """MoELoRA's function with its experts' factors stacked: three products, no loop."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.router = nn.Linear(base.in_features, EXPERTS, bias=False)
        self.A = nn.Parameter(torch.randn(EXPERTS * RANK, base.in_features) * 0.02)
        self.B = nn.Parameter(torch.zeros(base.out_features, EXPERTS * RANK))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]: sum_e g_e B_e A_e x = [B_1 .. B_E] [g_1 A_1 x, ..]."""
        gates = F.linear(x, self.router.weight.to(x.dtype)).softmax(-1)
        low = F.linear(x, self.A.to(x.dtype)).unflatten(-1, (EXPERTS, RANK))
        gated = (gates[..., None] * low).flatten(-2) * (ALPHA / RANK)
        return self.base(x) + F.linear(gated, self.B.to(x.dtype))

    def take(self, loop: MoELoRA) -> StackedMoELoRA:
        """Become the same function as `loop`."""
        with torch.no_grad():
            self.router.weight.copy_(loop.router.weight)
            self.A.copy_(torch.cat(list(loop.A)))
            self.B.copy_(torch.cat(list(loop.B), dim=1))
        return self


class HydraLoRA(nn.Module):
    """y = W x + sum_e g_e(x) (alpha/r) B_e A x: one A, several B_e, g = softmax(router(x))."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.router = nn.Linear(base.in_features, EXPERTS, bias=False)
        self.A = nn.Parameter(torch.randn(RANK, base.in_features) * 0.02)
        up = [torch.zeros(base.out_features, RANK) for _ in range(EXPERTS)]
        self.B = nn.ParameterList(up)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]; weights are cast to x's dtype."""
        y = self.base(x)
        gates = F.linear(x, self.router.weight.to(x.dtype)).softmax(-1)
        low = F.linear(x, self.A.to(x.dtype))
        for e, B in enumerate(self.B):
            y = y + gates[..., e : e + 1] * (F.linear(low, B.to(x.dtype)) * (ALPHA / RANK))
        return y


class Scalar(nn.Module):
    """Multiplies the embeddings by one trained number: the cheapest whole backward pass."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.embedding = embedding
        self.scalar = nn.Parameter(torch.ones((), dtype=embedding.weight.dtype))

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> [B, T, D]."""
        return self.embedding(ids) * self.scalar


MIXTURES = {"MoE-LoRA": MoELoRA, "MoE-LoRA stacked": StackedMoELoRA, "HydraLoRA": HydraLoRA}


def wrap(model: nn.Module, leaves: list[str], wrapper: type[nn.Module]) -> None:
    """Put a mixture in the place of every linear of one of these names."""
    for module in list(model.modules()):
        for leaf, child in list(module.named_children()):
            if leaf in leaves:
                setattr(module, leaf, wrapper(child))


def base_model(config, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """A frozen model with random weights, always the same."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)


def build(system: str, base: nn.Module, projections: list[str] = ATTENTION, **options) -> nn.Module:
    """A system over the weights of `base` themselves: only modules are copied."""
    torch.manual_seed(0)
    model = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    with torch.device(base.device):
        if system == "floor":
            model.set_input_embeddings(Scalar(model.get_input_embeddings()))
        elif system in VARIANTS:
            form = {"linears": projections, "top_k": 2, "rank": RANK, "alpha": ALPHA, **options}
            apply_monkeyjump(model, adapter=system, **form)
        elif system in PEFT:
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=projections)
            model = get_peft_model(model, lora, autocast_adapter_dtype=system == "PEFT LoRA")
        elif system in MIXTURES:
            wrap(model, projections, MIXTURES[system])
    return model.train()


class System:
    """A model with its optimizer."""

    def __init__(self, name: str, base: nn.Module, projections: list[str] = ATTENTION):
        self.name = name
        self.model = build(name, base, projections)
        self.run = self.model  # or its compiled form
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.0, fused=True)

    def compile(self, **options) -> System:
        """From now on `run` is the compiled model."""
        self.run = torch.compile(self.model, **options)
        return self

    def backward(self, batch: dict) -> None:
        """Forward and backward."""
        self.run(**batch).loss.backward()

    def step(self, batch: dict) -> None:
        """Forward, backward, AdamW; a hook on the optimizer moves our centers."""
        self.backward(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()


def random_batch(config, rows: int, tokens: int, device: str = "cpu") -> dict:
    """Arguments of a training forward over random ids [B, T], with a mask of ones."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, config.vocab_size, (rows, tokens), generator=generator).to(device)
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids, "use_cache": False}


# ----------------------------------------------------------------------------- measurements


def kept_bytes(model: nn.Module, batch: dict) -> int:
    """Bytes that a forward keeps for backward, each storage once, parameters left out."""
    persistent = set()
    for tensor in (*model.parameters(), *model.buffers()):
        persistent.add(tensor.untyped_storage().data_ptr())
    kept = {}  # the storages themselves, so that none is freed and its address counted twice

    def pack(tensor: Tensor) -> Tensor:
        """Note what is kept."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in persistent:
            kept[storage.data_ptr()] = storage
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        """Give it back."""
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        model(**batch)
    return sum(storage.nbytes() for storage in kept.values())


class CountLaunches(TorchDispatchMode):
    """Counts, by name, the operators that start a kernel on a GPU."""

    NO_KERNEL = ("detach", "empty", "new_empty", "_unsafe_view", "lift_fresh", "promote_types")

    def __init__(self) -> None:
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Counts and goes on."""
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and not name.startswith(self.NO_KERNEL):
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def step_launches(system: System, batch: dict) -> collections.Counter:
    """Launches of forward, backward and the centers' move; the gradients start as None."""
    system.optimizer.zero_grad()
    with CountLaunches() as counter:
        system.backward(batch)
        if system.name in VARIANTS:
            update_router_centers(system.model)
    system.optimizer.zero_grad()
    return counter.calls


def cache_argument(base: nn.Module) -> str:
    """The forward's name for the cache of keys and values: `cache` from transformers 5.24 on."""
    names = inspect.signature(type(base).forward).parameters
    return "cache" if "cache" in names else "past_key_values"


class Decoder:
    """Decodes token after token, greedily; a static cache gets no mask, since no size may grow."""

    def __init__(self, model: nn.Module, run: Callable, cache, name: str, prompt: Tensor):
        self.run = run
        self.cache = {name: cache, "use_cache": True}
        self.mask = None if isinstance(cache, StaticCache) else torch.ones_like(prompt)  # [B, T]
        output = model(prompt, attention_mask=self.mask, logits_to_keep=1, **self.cache)
        self.token = output.logits[:, -1:].argmax(-1)  # [B, 1]

    def __call__(self, tokens: int = 1) -> None:
        """Decode so many tokens."""
        for _ in range(tokens):
            if self.mask is not None:
                self.mask = F.pad(self.mask, (0, 1), value=1)
            output = self.run(self.token, attention_mask=self.mask, **self.cache)
            self.token = output.logits[:, -1:].argmax(-1)


@torch.no_grad()
def token_launches(model: nn.Module, base: nn.Module, prompt: Tensor) -> collections.Counter:
    """Launches of the third decoded token."""
    cache = DynamicCache(config=base.config)
    decoder = Decoder(model, model, cache, cache_argument(base), prompt)
    decoder(2)
    with CountLaunches() as counter:
        decoder()
    return counter.calls


def take_turns(tasks: dict[str, Callable[[], None]], rounds: int, device: str = "cpu") -> Times:
    """Milliseconds of every task, one after the other in each round: noise falls on all alike."""

    def wait() -> None:
        """Until the card is done."""
        if device == "cuda":
            torch.cuda.synchronize()

    clock = time.perf_counter
    if device == "cpu" and torch.get_num_threads() == 1:
        clock = time.process_time  # the processor's own, which other processes do not lengthen
    times = {name: [] for name in tasks}
    gc.collect()
    for name in [*tasks] * rounds:
        wait()
        start = clock()
        tasks[name]()
        wait()
        times[name].append(1e3 * (clock() - start))
    return times


def step_times(systems: dict[str, System], batch: dict, rounds: int, device: str = "cpu") -> Times:
    """Milliseconds of a training step."""
    tasks = {}
    for name, system in systems.items():
        tasks[name] = functools.partial(system.step, batch)
    take_turns(tasks, 2, device)  # warm up, and let the centers move once
    return take_turns(tasks, rounds, device)


def ratio(times: Times, name: str, reference: str) -> float | None:
    """The median of the turns' ratios."""
    if reference not in times:
        return None
    return statistics.median(a / b for a, b in zip(times[name], times[reference], strict=True))


# ----------------------------------------------------------------------------------- tables


def show(value) -> str:
    """A cell: two decimals for a number below a hundred, a dash for what is missing."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"


def markdown(rows: list[dict]) -> str:
    """A table of rows, each a mapping by column."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns]
    for row in rows:
        cells.append([show(row.get(column)) for column in columns])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = []
    for row in cells:
        padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        padded[0] = row[0].ljust(widths[0])
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join(lines)


def training_table(args: argparse.Namespace) -> list[dict]:
    """A row a system: kept bytes and launches in bf16, times in bf16 and float32."""
    config = small_config()
    batch = random_batch(config, 2, 128)
    rows = {name: {"system": name} for name in args.systems}
    for label, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        base = base_model(config, dtype)
        systems = {name: System(name, base) for name in args.systems}
        if label == "bf16" and not args.compile:
            add_counts(rows, systems, batch)
        if args.compile:
            systems = {name: system.compile() for name, system in systems.items()}
        times = step_times(systems, batch, args.rounds)
        for name, row in rows.items():
            row[f"{label} ms"] = statistics.median(times[name])
            for other in ("floor", "PEFT LoRA", "MoE-LoRA"):
                row[f"{label} / {other}"] = ratio(times, name, other)
    return list(rows.values())


def add_counts(rows: dict[str, dict], systems: dict[str, System], batch: dict) -> None:
    """Kept MiB and launches, above the floor's where there is one."""
    for name, system in systems.items():
        system.step(batch)  # the first step fills caches
        rows[name]["kept MiB"] = kept_bytes(system.model, batch) / 2**20
        rows[name]["launches"] = step_launches(system, batch).total()
    if "floor" in rows:
        floor = dict(rows["floor"])
        for row in rows.values():
            for column in ("kept MiB", "launches"):
                row[column] -= floor[column]


@torch.no_grad()
def inference_table(args: argparse.Namespace) -> list[dict]:
    """Prefill of a prompt, then decoding with its cache, against the base model, in bf16."""
    config = small_config()
    tokens = 16
    prompt = random_batch(config, 2, 128)["input_ids"]
    base = base_model(config, torch.bfloat16)
    prefill = {}
    decode = {}
    rows = {}
    for name in ("base", *args.systems):
        if name == "floor":
            continue
        model = build(name, base).eval()
        run = torch.compile(model) if args.compile else model
        room = prompt.shape[1] + tokens * (args.rounds + 3)
        cache = DynamicCache(config=config)
        if args.compile:
            cache = StaticCache(config=config, max_cache_len=room)  # its graph stays the same
        decoder = Decoder(model, run, cache, cache_argument(base), prompt)
        prefill[name] = functools.partial(run, prompt, use_cache=False, logits_to_keep=1)
        decode[name] = functools.partial(decoder, tokens)
        rows[name] = {"system": name}
        if not args.compile:
            rows[name]["launches a token"] = token_launches(model, base, prompt).total()
    for label, tasks in (("prefill", prefill), ("decode 16", decode)):
        take_turns(tasks, 3)
        times = take_turns(tasks, args.rounds)
        for name, row in rows.items():
            row[f"{label} ms"] = statistics.median(times[name])
            row[f"{label} / base"] = ratio(times, name, "base")
    if not args.compile:
        of_base = rows["base"]["launches a token"]
        for row in rows.values():
            row["launches a token"] -= of_base
    return list(rows.values())


# ------------------------------------------------------------------------- as work grows


GROWTH = [{"tokens": tokens} for tokens in (128, 512, 2048)]
GROWTH += [{"experts": experts} for experts in (2, 7)]  # 4 is the default
GROWTH += [{"blocks": 16}]  # 8 is the default
EXPERT_SETS = {2: ["q_proj", "v_proj"], 4: ATTENTION, 7: ATTENTION + FEED_FORWARD}


def grow_table(rounds: int) -> list[dict]:
    """Step time of our lora over PEFT LoRA's and over the floor's, from one setting outwards."""
    rows = []
    for changed in GROWTH:
        row = {"tokens": 512, "experts": 4, "blocks": 8} | changed
        config = small_config(row["blocks"])
        batch = random_batch(config, 1, row["tokens"])
        for label, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            base = base_model(config, dtype)
            systems = {}
            for name in ("floor", "PEFT LoRA", "lora"):
                systems[name] = System(name, base, EXPERT_SETS[row["experts"]])
            times = step_times(systems, batch, rounds)
            row[f"{label} ms"] = statistics.median(times["lora"])
            row[f"{label} / PEFT LoRA"] = ratio(times, "lora", "PEFT LoRA")
            row[f"{label} / floor"] = ratio(times, "lora", "floor")
        rows.append(row)
    return rows


def peak_mib() -> float:
    """The most memory that this process has had so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def kmeans_table(sizes: tuple[int, ...] = (1000, 4000, 16000)) -> list[dict]:
    """Seconds and memory of init_router_centers by number of representations a block.

    The sizes grow, so that each one's peak is its own; memory is above that of the first forward.
    """
    config = small_config()
    model = build("lora", base_model(config, torch.bfloat16))
    batch = random_batch(config, 8, 256)
    inputs = {"input_ids": batch["input_ids"], "use_cache": False}
    init_router_centers(model, [inputs], subset_size=EXPERTS)
    before = peak_mib()
    rows = []
    for size in sizes:
        start = time.process_time()
        init_router_centers(model, [inputs] * 8, subset_size=size)
        row = {"representations": size, "seconds": time.process_time() - start}
        rows.append(row | {"MiB": peak_mib() - before})
    return rows


# ------------------------------------------------------------------------------------- main


def versions() -> str:
    """What a figure depends on, besides the machine."""
    names = ("torch", "transformers", "peft")
    found = importlib.metadata.packages_distributions()
    here = [name for name in names if name in found]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in here)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--inference", action="store_true", help="prefill and decoding instead")
    parser.add_argument("--grow", action="store_true", help="a step as work grows, k-means")
    parser.add_argument("--compile", action="store_true", help="time compiled models")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS, metavar="SYSTEM")
    parser.add_argument("--rounds", type=int, default=15, help="turns that are timed")
    parser.add_argument("--json", type=Path, help="write the tables to this file as well")
    return parser.parse_args()


def main() -> None:
    """Print the tables that were asked for."""
    args = parse_arguments()
    transformers.utils.logging.set_verbosity_error()
    torch._dynamo.config.cache_size_limit = 64  # systems share code: else some run eagerly
    threads = torch.get_num_threads()
    setting = f"{versions()}, {threads} CPU threads, Llama of width 576"
    if args.grow:
        tables = {"k-means": kmeans_table(), "grow": grow_table(args.rounds)}
    elif args.inference:
        setting += ", 8 blocks, batch 2 x 128"
        tables = {"inference": inference_table(args)}
    else:
        setting += ", 8 blocks, batch 2 x 128; kept MiB and launches above the floor"
        tables = {"training": training_table(args)}
    print(setting)
    for rows in tables.values():
        print(f"\n{markdown(rows)}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"setting": setting, **tables}, indent=1))


if __name__ == "__main__":
    main()
