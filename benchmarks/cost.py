"""What Monkey Jump costs beside a frozen model, plain LoRA and mixtures of LoRA experts.

    python benchmarks/cost.py                       # the table: kept bytes, aten calls, step times (float32, bf16)
    python benchmarks/cost.py --compile             # step times under torch.compile
    python benchmarks/cost.py --inference           # prefill and cached decoding against the base model; --compile too
    python benchmarks/cost.py --scaling             # cost of routing against E, T, k and blocks; time of k-means
    python benchmarks/cost.py --device cuda         # times, peak memory and inference at Qwen2-0.5B's shape
    (--systems lora "PEFT LoRA" picks systems, --json FILE writes the figures as well; needs `pip install peft`)

The systems, all on q, k, v and o of every block, rank 2, over one and the same frozen base model:

    floor          the base model trained through one scalar: forward, backward through the activations, no adapter
    base           the base model alone (inference only)
    lora, lorafa, adalora, propulsion       Monkey Jump: token routing, top-2, centers moved at every step
    PEFT LoRA      one adapter a projection, no routing
    MoE-LoRA       four adapters a projection, mixed by a learned router a projection
    HydraLoRA      one A and four B a projection, mixed by a learned router a projection

Kept bytes and aten calls are deterministic: they depend on the versions of torch and transformers, not on the machine.

    kept bytes     distinct storages saved for backward (saved_tensors_hooks), parameters and buffers left out
    aten calls     operators dispatched in one forward and backward that are not views; the optimizer is not counted
    step time      forward, backward and the centers' move. All take turns in one run; a ratio is the median over
                   the turns of the ratio within the turn, so that whatever else the machine does hits both alike
"""

from __future__ import annotations

import argparse
import gc
import json
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
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config, StaticCache

sys.path.append(str(Path(__file__).resolve().parents[1]))  # monkeyjump.py lies beside this folder
from monkeyjump import (  # noqa: E402
    apply_monkeyjump,
    cluster_statistics,
    ema_update,
    kmeans,
    route,
    unit,
    update_router_centers,
)

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANK, ALPHA, EXPERTS = 2, 16.0, 4
VARIANTS = ["lora", "lorafa", "adalora", "propulsion"]
BASELINES = ["PEFT LoRA", "MoE-LoRA", "HydraLoRA"]
SYSTEMS = ["floor", *VARIANTS, *BASELINES]


# --------------------------------------------------------------------------------------------------- base models


def small_config() -> PretrainedConfig:
    return LlamaConfig(
        hidden_size=576, num_hidden_layers=8, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
        vocab_size=1024,
    )  # fmt: skip


def qwen_config(blocks: int = 24) -> PretrainedConfig:
    """Qwen2-0.5B, which is also the language model of LLaVA-OneVision-Qwen2-0.5B."""
    return Qwen2Config(
        hidden_size=896, num_hidden_layers=blocks, num_attention_heads=14, num_key_value_heads=2,
        intermediate_size=4864, vocab_size=151936, tie_word_embeddings=True,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------- baselines


class MoELoRA(nn.Module):
    """y = W x + sum_e g_e(x) (alpha/r) B_e A_e x with g = softmax(router(x)); the weights are cast to x's dtype."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.router = base, nn.Linear(base.in_features, EXPERTS, bias=False)
        self.A = nn.ParameterList([torch.randn(RANK, base.in_features) * 0.02 for _ in range(EXPERTS)])
        self.B = nn.ParameterList([torch.zeros(base.out_features, RANK) for _ in range(EXPERTS)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        gates = F.linear(x, self.router.weight.to(x.dtype)).softmax(-1)
        for e, (A, B) in enumerate(zip(self.A, self.B, strict=True)):
            delta = F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)) * (ALPHA / RANK)
            y = y + gates[..., e : e + 1] * delta
        return y


class HydraLoRA(nn.Module):
    """y = W x + sum_e g_e(x) (alpha/r) B_e A x: one A, several heads B_e, g = softmax(router(x))."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.router = base, nn.Linear(base.in_features, EXPERTS, bias=False)
        self.A = nn.Parameter(torch.randn(RANK, base.in_features) * 0.02)
        self.B = nn.ParameterList([torch.zeros(base.out_features, RANK) for _ in range(EXPERTS)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        gates = F.linear(x, self.router.weight.to(x.dtype)).softmax(-1)
        a = F.linear(x, self.A.to(x.dtype))
        for e, B in enumerate(self.B):
            y = y + gates[..., e : e + 1] * (F.linear(a, B.to(x.dtype)) * (ALPHA / RANK))
        return y


class Scalar(nn.Module):
    """Multiplies the embeddings by one trainable number: the cheapest way to make the whole model differentiable."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.embedding, self.scalar = embedding, nn.Parameter(torch.ones((), dtype=embedding.weight.dtype))

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids) * self.scalar


def build(system: str, config: PretrainedConfig, dtype: torch.dtype, device: str) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
        if system == "floor":
            model.set_input_embeddings(Scalar(model.get_input_embeddings()))
        elif system in VARIANTS:
            apply_monkeyjump(model, linears=PROJECTIONS, adapter=system, rank=RANK, alpha=ALPHA, top_k=2)
        elif system == "PEFT LoRA":
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=PROJECTIONS))
        elif system != "base":
            wrapper = {"MoE-LoRA": MoELoRA, "HydraLoRA": HydraLoRA}[system]
            for block in model.get_decoder().layers:
                for name in PROJECTIONS:
                    setattr(block.self_attn, name, wrapper(getattr(block.self_attn, name)))
    return model


# -------------------------------------------------------------------------------------------------- measurements


def training_step(model: nn.Module, ids: Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    if hasattr(model, "monkeyjump"):  # what the optimizer's step does, which is not timed otherwise
        update_router_centers(model)


def clear_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def kept_bytes(model: nn.Module, ids: Tensor) -> int:
    """Bytes that a forward keeps for backward, each storage once, parameters and buffers left out."""
    persistent = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}  # the storages themselves, so that none is freed and its address counted twice

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in persistent:
            kept[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(input_ids=ids, labels=ids)
    return sum(storage.nbytes() for storage in kept.values())


class CountCalls(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += not func.is_view
        return func(*args, **(kwargs or {}))


def aten_calls(model: nn.Module, ids: Tensor) -> int:
    """Operators dispatched by one forward and backward, views not counted; the gradients start as None."""
    clear_gradients(model)
    with CountCalls() as counter:
        training_step(model, ids)
    return counter.calls


def take_turns(tasks: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of every task, run one after the other in each round, so that noise falls on all alike."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    # On one CPU thread the processor's own time, which other processes do not lengthen.
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    times = {name: [] for name in tasks}
    for name in [*tasks] * rounds:
        wait()
        start = clock()
        tasks[name]()
        wait()
        times[name].append(1e3 * (clock() - start))
    return times


def step_times(models: dict[str, nn.Module], ids: Tensor, rounds: int, device: str) -> dict[str, list[float]]:
    def task(model: nn.Module) -> Callable[[], None]:
        def step() -> None:
            training_step(model, ids)
            clear_gradients(model)

        return step

    tasks = {name: task(model) for name, model in models.items()}
    take_turns(tasks, 3, device)  # warm up, and let the router's centers move once
    return take_turns(tasks, rounds, device)


def peak_bytes(model: nn.Module, ids: Tensor) -> int:
    """Peak of one training step on the GPU above what lies there before it (weights of all systems included)."""
    clear_gradients(model)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    training_step(model, ids)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    clear_gradients(model)
    return peak


def ratio(times: dict[str, list[float]], system: str, reference: str) -> float:
    return statistics.median(a / b for a, b in zip(times[system], times[reference], strict=True))


# -------------------------------------------------------------------------------------------------------- tables


def print_table(rows: list[dict]) -> None:
    """Rows of one mapping each; a missing figure is a dash."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[show(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in [columns, ["-" * width for width in widths], *cells]:
        first, *rest = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print("| " + " | ".join([first.strip().ljust(widths[0]), *rest]) + " |")
    print(flush=True)


def show(value: str | float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def time_columns(times: dict[str, list[float]], system: str, label: str) -> dict[str, float]:
    row = {f"{label} ms": statistics.median(times[system])}
    for reference in ("PEFT LoRA", "MoE-LoRA"):
        if reference in times:
            row[f"{label} / {reference}"] = ratio(times, system, reference)
    return row


def training_table(args: argparse.Namespace, config: PretrainedConfig, batch: int, length: int) -> list[dict]:
    ids = torch.randint(0, config.vocab_size, (batch, length), device=args.device)
    rows = {system: {"system": system} for system in args.systems}
    for dtype in (torch.bfloat16,) if args.device == "cuda" else (torch.bfloat16, torch.float32):
        label = "compiled " * args.compile + {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        models = {system: build(system, config, dtype, args.device) for system in args.systems}
        if dtype == torch.bfloat16 and not args.compile:
            for system, model in models.items():
                training_step(model, ids)  # the first step moves no centers, and fills caches
                rows[system]["kept MB"] = kept_bytes(model, ids) / 2**20
                rows[system]["aten calls"] = aten_calls(model, ids)
                if args.device == "cuda":
                    rows[system]["peak MB"] = peak_bytes(model, ids) / 2**20
            for row in rows.values() if "floor" in rows else ():
                for column in {"kept MB", "peak MB"} & row.keys():
                    row[f"{column} above floor"] = row[column] - rows["floor"][column]
        if args.compile:
            models = {system: torch.compile(model) for system, model in models.items()}
        times = step_times(models, ids, args.rounds, args.device)
        for system in models:
            rows[system] |= time_columns(times, system, label)
        del models
        gc.collect()
    return list(rows.values())


@torch.no_grad()
def inference_table(args: argparse.Namespace, config: PretrainedConfig, batch: int, length: int) -> list[dict]:
    """Prefill of the whole prompt, then decoding with its cache, against the base model."""
    ids = torch.randint(0, config.vocab_size, (batch, length), device=args.device)
    systems = ["base", *(s for s in args.systems if s != "floor")]
    models = {s: build(s, config, torch.bfloat16, args.device).eval() for s in systems}

    def prefill(model: nn.Module) -> Callable[[], None]:
        run = torch.compile(model) if args.compile else model
        return lambda: run(input_ids=ids, use_cache=not args.compile, logits_to_keep=1)

    def decode(model: nn.Module, tokens: int = 16) -> Callable[[], None]:
        step = torch.compile(model) if args.compile else model
        room = length + tokens * (args.rounds + 3)  # a static cache, which compiles once, has no crop: it goes on
        cache = StaticCache(config=config, max_cache_len=room) if args.compile else None
        cache = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

        def run() -> None:
            for _ in range(tokens):
                step(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
            if not args.compile:
                cache.crop(-tokens)

        return run

    rows = {system: {"system": system} for system in systems}
    for label, make in {"prefill": prefill, "decode 16": decode}.items():
        tasks = {system: make(model) for system, model in models.items()}
        take_turns(tasks, 3, args.device)
        times = take_turns(tasks, args.rounds, args.device)
        for system in systems:
            rows[system][f"{label} ms"] = statistics.median(times[system])
            rows[system][f"{label} / base"] = ratio(times, system, "base")
    return list(rows.values())


def scaling_table(rounds: int, device: str) -> list[dict]:
    """Routing, statistics and the moving average alone, from one setting outwards, and k-means as at initialisation."""

    width, setting = 896, {"blocks": 24, "T": 1024, "E": 4, "k": 2}

    def routing(blocks: int, T: int, E: int, k: int) -> Callable[[], None]:
        hidden = torch.randn(T, width, device=device, dtype=torch.bfloat16)
        centers = unit(torch.randn(blocks, E, width, device=device))

        def run() -> None:
            seen = []
            for block_centers in centers:
                representations = unit(hidden)
                _, experts = route(representations, block_centers, k)
                seen.append(cluster_statistics(representations, experts, E, None))
            ema_update(centers, torch.stack(seen), 0.9)

        return run

    outwards = {"T": (256, 4096), "E": (2, 8, 16), "k": (1, 4), "blocks": (6, 12)}
    settings = [setting, *({**setting, name: value} for name, values in outwards.items() for value in values)]
    tasks = {str(index): routing(**chosen) for index, chosen in enumerate(settings)}
    take_turns(tasks, 2, device)
    times = take_turns(tasks, rounds, device)
    rows = [
        {**chosen, "routing ms": statistics.median(times[task]), "/ first row": ratio(times, task, "0")}
        for task, chosen in zip(tasks, settings, strict=True)
    ]

    modes = torch.randn(24, 4, width, device=device).repeat(1, 1000, 1)
    points, generator = unit(modes + torch.randn(24, 4000, width, device=device)), torch.Generator().manual_seed(0)
    times = take_turns({"k-means": lambda: [kmeans(block, 4, 15, generator) for block in points]}, 1, device)
    return [*rows, {**setting, "T": 4000, "k-means s": times["k-means"][0] / 1e3}]


# ---------------------------------------------------------------------------------------------------------- main


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="time compiled models (inductor)")
    parser.add_argument("--inference", action="store_true", help="time prefill and decoding instead of training")
    parser.add_argument("--scaling", action="store_true", help="time the routing alone, and k-means")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS, metavar="SYSTEM")
    parser.add_argument("--rounds", type=int, default=15, help="turns of which the median is taken")
    parser.add_argument("--json", type=Path, help="write the tables to this file as well")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    transformers.utils.logging.set_verbosity_error()
    cuda = args.device == "cuda"
    config, (batch, length) = (qwen_config(), (8, 512)) if cuda else (small_config(), (2, 128))
    machine = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    header = f"torch {torch.__version__}, transformers {transformers.__version__}, {machine}"
    if not args.scaling:
        header += f", {config.model_type} of {config.num_hidden_layers} blocks, batch {batch} x {length}"
    print(header, end="\n\n")
    torch._dynamo.config.cache_size_limit = 64  # all systems share their code: past the limit they would run eagerly
    tables = {}
    if args.scaling:
        tables["scaling"] = scaling_table(args.rounds, args.device)
    elif args.inference:
        tables["inference"] = inference_table(args, config, batch, length)
    else:
        tables["training"] = training_table(args, config, batch, length)
        if cuda:
            tables["inference"] = inference_table(args, config, batch, length)
    for table in tables.values():
        print_table(table)
    if args.json:
        args.json.write_text(json.dumps({"setting": header, **tables}, indent=1))


if __name__ == "__main__":
    main()
