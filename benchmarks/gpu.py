"""Everything that only a GPU can decide, in one command: what is promised, and what it costs.

    python benchmarks/gpu.py                    # under four minutes on a card of the H100's class
    python benchmarks/gpu.py --part costs       # some parts: promises, costs, compiled, example
    python benchmarks/gpu.py --tiny             # everything small, also on a CPU

Writes one JSON and one markdown table (gpu.json, gpu.md; --out names others) and prints the table.
Models are made at random: no network, no hub. Needs `pip install peft`. What fails, or does not
fit into the time, is a row that says so; the rest goes on, and the exit status is 1.

    promises    what a GPU can break: each adapter in each mode as on the CPU in float32, bf16,
                checkpointing, torch.compile, FSDP2, a model over two devices, offloaded blocks,
                a static cache, a decoded token that waits for the card as often as the base's
    costs       Qwen2-0.5B's shape, adapters on q, k, v, o, rank 2, 8 x 1,024 tokens, bf16:
                cost.py's systems in turns over the same frozen weights. MiB: the peak of a
                training step above the floor's; launches: operators that start a kernel, above
                the floor's; decode: a token after a prompt of 256, batch 1 and 8, greedy
    targets     what the costs should be, for lora
    compiled    the same step of six blocks under torch.compile
    example     train_example.py's demonstration, where trl is installed
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import cost  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config  # noqa: E402
from transformers.cache_utils import DynamicCache  # noqa: E402

import monkeyjump as mj  # noqa: E402

BEGIN = time.perf_counter()
SECONDS = 200  # nothing begins later than this
MODES = ("token", "last", "mean", "prompt_end")
ROOT = Path(__file__).resolve().parents[1]


class Setting:
    """Where everything runs, and how small."""

    def __init__(self, tiny: bool):
        self.tiny = tiny
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        # Whether a graph breaks, or is made anew, shows without inductor's minute.
        self.backend = "eager" if tiny else "inductor"
        if self.device == "cpu":
            torch.set_num_threads(1)  # nothing here is large enough for two


# ---------------------------------------------------------------------------------- report


class Skipped(Exception):
    """Cannot be tried here; its text says why."""


class Report:
    """The rows of the table, written to both files whenever a part ends."""

    def __init__(self, out: Path, setting: Setting):
        self.out = out
        self.rows: list[dict] = []
        self.errors: dict[str, str] = {}  # tracebacks, by what failed
        card = torch.cuda.get_device_name() if setting.device == "cuda" else "no GPU"
        self.header = {
            "card": card,
            "versions": cost.versions(),
            "date": datetime.date.today().isoformat(),
            "size": "tiny" if setting.tiny else "full",
        }

    def add(self, part: str, what: str, outcome: str, **figures) -> None:
        """A row of the table."""
        self.rows.append({"part": part, "what": what, "outcome": outcome, **figures})
        print(f"[{time.perf_counter() - BEGIN:4.0f} s] {part}: {what}: {outcome}", flush=True)

    def attempt(self, part: str, what: str, function: Callable, quiet: bool = False):
        """What the function returns, which is a row's outcome unless quiet; None: it failed."""
        if time.perf_counter() - BEGIN > SECONDS:
            return self.add(part, what, f"FAILED: left out after {SECONDS} s")
        try:
            result = function()
        except Skipped as reason:
            return self.add(part, what, f"skipped: {reason}")
        except Exception as error:
            self.errors[f"{part}: {what}"] = traceback.format_exc()
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            return self.add(part, what, f"FAILED: {reason[:90]}")
        if not quiet:
            self.add(part, what, "ok" if result is None else f"ok: {result}")
        return result

    def failed(self) -> list[str]:
        """The names of the rows that failed."""
        return [row["what"] for row in self.rows if row["outcome"].startswith("FAILED")]

    def write(self) -> None:
        """Both files, with what there is so far."""
        text = json.dumps({**self.header, "rows": self.rows, "errors": self.errors}, indent=1)
        self.out.with_suffix(".json").write_text(text)
        title = ", ".join(self.header.values())
        self.out.with_suffix(".md").write_text(f"{title}\n\n{cost.markdown(self.rows)}\n")


# -------------------------------------------------------------------- small models, compared


def plain_model() -> nn.Module:
    """A Llama of two narrow blocks on the CPU, in float32, with random weights."""
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=256,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def awake(model: nn.Module) -> nn.Module:
    """Give the adapters random weights, so that they change the output; always the same."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.05 * noise)
    return model


def adapted(adapter: str = "lora", mode: str = "token", model: nn.Module | None = None):
    """A small adapted model on the CPU, or this one adapted."""
    model = plain_model() if model is None else model
    torch.manual_seed(2)
    form = {"linears": cost.ATTENTION, "rank": 2, "top_k": 2, "ema_momentum": 0.5}
    form["update_every"] = 2  # then three steps leave a move behind, and pending statistics
    return awake(mj.apply_monkeyjump(model, adapter=adapter, rep_mode=mode, **form))


def small_batches(device: str, count: int = 3) -> list[dict]:
    """Batches of three rows, padded on the left, with a prompt that is not learnt."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(count):
        ids = torch.randint(1, 256, (3, 17), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        labels = ids.clone()
        labels[:, :9] = -100
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        moved = {name: tensor.to(device) for name, tensor in batch.items()}
        batches.append({**moved, "use_cache": False})
    return batches


def train(model: nn.Module, device: str, run: Callable | None = None) -> dict[str, Tensor]:
    """Three training steps; the losses, and what was trained or moved, on the CPU."""
    run = model if run is None else run
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    model.train()
    losses = []
    for batch in small_batches(device):
        loss = run(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().cpu())
    return {"losses": torch.stack(losses)} | adapter_state(model)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters, centers and pending statistics by name, whole and on the CPU."""
    state = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.requires_grad or name.endswith(("centers", "pending")):
            name = name.replace("_checkpoint_wrapped_module.", "")
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            state[name] = whole.detach().float().cpu().clone()
    return state


@functools.cache
def on_the_cpu(adapter: str = "lora", mode: str = "token") -> dict[str, Tensor]:
    """What three steps give on the CPU: the right values."""
    return train(adapted(adapter, mode), "cpu")


def difference(got: dict[str, Tensor], right: dict[str, Tensor], limit: float) -> float:
    """The largest relative difference of any tensor; an error where it is above the limit."""
    if got.keys() != right.keys():
        raise ValueError(f"other tensors: {sorted(got.keys() ^ right.keys())[:3]}")
    worst = 0.0
    for name, tensor in right.items():
        relative = ((got[name] - tensor).norm() / tensor.norm().clamp(min=1e-12)).item()
        if not relative <= limit:  # nor where it is not a number
            raise ValueError(f"{name} differs by {relative:.1e}, more than {limit:.0e}")
        worst = max(worst, relative)
    return worst


def said(worst: float) -> str:
    """A difference for the table."""
    return f"differs by {worst:.0e}" if worst else "equal"


# -------------------------------------------------------------------------------- promises


def equals_cpu(setting: Setting, adapter: str) -> str:
    """Three steps in every mode, in float32, as on the CPU."""
    worst = 0.0
    for mode in MODES:
        got = train(adapted(adapter, mode).to(setting.device), setting.device)
        worst = max(worst, difference(got, on_the_cpu(adapter, mode), 1e-4))
    return said(worst)


def in_bf16(setting: Setting) -> str:
    """Three steps over a bf16 base: adapters stay float32, centers move, the loss is near."""
    model = adapted().to(setting.device, torch.bfloat16)
    before = adapter_state(model)
    got = train(model, setting.device)
    right = on_the_cpu()
    dtypes = {tensor.dtype for tensor in model.parameters() if tensor.requires_grad}
    if dtypes != {torch.float32}:
        raise ValueError(f"adapters are {dtypes}")
    for name, tensor in before.items():
        if torch.equal(tensor, got[name]):
            raise ValueError(f"{name} did not move")
    difference({"losses": got["losses"]}, {"losses": right["losses"]}, 0.05)
    return "adapters float32, centers moved"


def checkpointed(setting: Setting, how: str) -> str:
    """Three steps with checkpoints as without; on a GPU the engine's own thread recomputes."""
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as torchs

    right = train(adapted().to(setting.device), setting.device)
    model = adapted().to(setting.device)
    if how == "checkpoint_wrapper":
        for index, block in enumerate(model.model.layers):
            kind = torchs.CheckpointImpl.NO_REENTRANT
            model.model.layers[index] = torchs.checkpoint_wrapper(block, checkpoint_impl=kind)
    else:
        options = {"use_reentrant": how == "reentrant"}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
    return said(difference(train(model, setting.device), right, 1e-5))


def graphs() -> int:
    """How many graphs have been compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compiled_once(setting: Setting) -> str:
    """Three compiled steps: one graph, no break, no recompilation, the values of eager."""
    torch._dynamo.reset()
    before = graphs()
    model = adapted().to(setting.device)
    run = torch.compile(model, fullgraph=True, backend=setting.backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = train(model, setting.device, run)
    if graphs() != before + 1:
        raise ValueError(f"{graphs() - before} graphs")
    return f"one graph, {said(difference(got, on_the_cpu(), 1e-3))}"


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """A group of this process alone."""
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "nccl" if device == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        place = f"file://{folder}/group"
        patience = datetime.timedelta(seconds=30)
        dist.init_process_group(backend, place, timeout=patience, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def sharded(setting: Setting) -> str:
    """FSDP2 of a model that was adapted on the CPU, and moves while it is sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with process_group(setting.device):
        mesh = init_device_mesh(setting.device, (1,))
        model = adapted()
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        got = train(model, setting.device)
    return said(difference(got, on_the_cpu(), 1e-4))


def over_two_devices(setting: Setting, when: str) -> str:
    """Trained with one block on the card and one on the CPU, adapted before or after."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    if setting.device == "cpu":
        raise Skipped("needs CUDA")
    model = adapted() if when == "after apply" else plain_model()
    model.to(setting.device)
    last = model.model.layers[-1].to("cpu")
    cpu = torch.device("cpu")
    hook = AlignDevicesHook(execution_device=cpu, io_same_device=True, place_submodules=True)
    add_hook_to_module(last, hook)
    if when == "before apply":
        adapted(model=model)
    return said(difference(train(model, setting.device), on_the_cpu(), 1e-4))


def offloaded(setting: Setting) -> str:
    """accelerate's device_map: the upper block lies on the CPU (without a GPU: on disk)."""
    from accelerate import dispatch_model

    model = adapted().eval()
    batch = small_batches(setting.device)[0]
    with torch.no_grad():
        right = model(**small_batches("cpu")[0]).logits
    main, away = (0, "cpu") if setting.device == "cuda" else ("cpu", "disk")
    places = {"model.embed_tokens": main, "model.norm": main, "model.rotary_emb": main}
    places |= {"lm_head": main, "model.layers.0": main, "model.layers.1": away}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model = dispatch_model(model, places, main_device=main, offload_dir=folder)
        got = model(**batch).logits.cpu()
    real = batch["attention_mask"].bool().cpu()
    return said(difference({"logits": got[real]}, {"logits": right[real]}, 1e-4))


def saved(setting: Setting) -> str:
    """A saved adapter, loaded into a plain model on the card, gives the same logits."""
    model = adapted().to(setting.device)
    batch = small_batches(setting.device)[0]
    train(model, setting.device)
    with tempfile.TemporaryDirectory() as folder:
        mj.save_adapter(model, folder)
        loaded = mj.load_adapter(plain_model().to(setting.device), folder)
    with torch.no_grad():
        right = model.eval()(**batch).logits
        got = loaded.eval()(**batch).logits
    return said(difference({"logits": got.cpu()}, {"logits": right.cpu()}, 1e-6))


def generation(setting: Setting, model: nn.Module, static: bool) -> tuple:
    """Twelve tokens after padded prompts; the graphs compiled for them; in a second call the
    graphs compiled and the inputs of CUDA graphs recorded, which should be none."""
    batch = small_batches(setting.device)[0]
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    given |= {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    if static:
        given["cache_implementation"] = "static"
    if static and setting.tiny:
        how = transformers.CompileConfig(backend=setting.backend, mode="default")
        how._compile_all_devices = True  # on a GPU generate() compiles a static cache by itself
        given["compile_config"] = how
    counters = torch._dynamo.utils.counters
    made = []
    counters.clear()
    torch._dynamo.reset()
    for _ in range(2):
        tokens = model.eval().generate(**given)
        made.append((graphs(), counters["inductor"]["cudagraph_recorded_non_static_inputs"]))
    first, second = made
    return tokens.tolist(), first[0], second[0] - first[0], second[1] - first[1]


def static_cache(setting: Setting, mode: str) -> str:
    """Decoding with a static cache: the dynamic cache's tokens, the base model's graphs."""
    base = plain_model().to(setting.device)
    _, *of_base = generation(setting, base, static=True)
    model = adapted(mode=mode).to(setting.device)
    tokens, *of_ours = generation(setting, model, static=True)
    right, *_ = generation(setting, model, static=False)
    if tokens != right:
        raise ValueError(f"static cache: {tokens}, dynamic: {right}")
    if of_ours != of_base:
        raise ValueError(f"graphs, then new graphs, recordings: {of_ours}, the base's {of_base}")
    return f"same tokens, {of_ours[0]} graph, as the base model"


def waits(step: Callable) -> int:
    """How often a step makes the host wait for the card."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchroniz" in str(warning.message) for warning in heard)


@torch.no_grad()
def token_waits(setting: Setting, model: nn.Module, name: str) -> int:
    """How often a decoded token does, with the positions that generate() gives."""
    batch = small_batches(setting.device)[0]
    mask = batch["attention_mask"]
    cache = DynamicCache()
    model.eval()(batch["input_ids"], attention_mask=mask, use_cache=True, **{name: cache})
    one = mask[:, -1:]

    def token() -> None:
        """Decode one."""
        nonlocal mask
        mask = torch.cat([mask, one], dim=1)
        positions = mask.sum(dim=1, keepdim=True) - 1
        given = {"attention_mask": mask, "position_ids": positions, name: cache}
        model(input_ids=one, use_cache=True, **given)

    token()
    token()
    return waits(token)


def reads_no_more(setting: Setting) -> str:
    """A decoded token makes the host wait as often as the base model's, in every mode."""
    if setting.device == "cpu":
        raise Skipped("needs CUDA")
    base = plain_model().to(setting.device)
    name = cost.cache_argument(base)
    right = token_waits(setting, base, name)
    for mode in MODES:
        count = token_waits(setting, adapted(mode=mode).to(setting.device), name)
        if count > right:
            raise ValueError(f"{mode}: waits {count} times, the base model {right}")
    return f"waits {right} times, as the base model"


def promises(setting: Setting, report: Report) -> None:
    """A row for each promise that a GPU can break."""
    checks = {}
    for adapter in cost.VARIANTS:
        checks[f"{adapter}, four modes"] = functools.partial(equals_cpu, setting, adapter)
    checks["bf16"] = functools.partial(in_bf16, setting)
    for how in ("reentrant", "non-reentrant", "checkpoint_wrapper"):
        checks[f"checkpoints, {how}"] = functools.partial(checkpointed, setting, how)
    checks["torch.compile"] = functools.partial(compiled_once, setting)
    checks["fully_shard of a CPU model"] = functools.partial(sharded, setting)
    for when in ("after apply", "before apply"):
        checks[f"two devices, {when}"] = functools.partial(over_two_devices, setting, when)
    checks["device_map, offloaded block"] = functools.partial(offloaded, setting)
    checks["save, load"] = functools.partial(saved, setting)
    checks["a decoded token's waits"] = functools.partial(reads_no_more, setting)
    for mode in ("token", "last"):
        checks[f"static cache, {mode}"] = functools.partial(static_cache, setting, mode)
    for what, check in checks.items():
        report.attempt("promises", what, check)


# ----------------------------------------------------------------------------------- costs


def paper_config(setting: Setting, blocks: int = 24) -> Qwen2Config:
    """Qwen2-0.5B, which is also the language model of LLaVA-OneVision-Qwen2-0.5B."""
    if setting.tiny:
        return Qwen2Config(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=128,
            vocab_size=512,
        )
    return Qwen2Config(
        hidden_size=896,
        num_hidden_layers=blocks,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        vocab_size=151936,
        tie_word_embeddings=True,
    )


def peak_mib(setting: Setting, step: Callable) -> float | None:
    """The most memory that a step takes above what lies on the card before it."""
    step()  # warms up
    if setting.device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def count_system(setting: Setting, name: str, base: nn.Module, batch: dict) -> tuple:
    """A system, with its peak memory and launches in a training step."""
    system = cost.System(name, base)
    memory = peak_mib(setting, functools.partial(system.step, batch))
    return system, memory, cost.step_launches(system, batch).total()


def costs(setting: Setting, report: Report) -> None:
    """A row a system, then the targets."""
    config = paper_config(setting)
    shape, rounds = ((2, 16), 2) if setting.tiny else ((8, 1024), 8)
    batch = cost.random_batch(config, *shape, setting.device)
    base = cost.base_model(config, torch.bfloat16, setting.device)
    systems = {}
    rows = {"base": {}}
    for name in cost.SYSTEMS:
        count = functools.partial(count_system, setting, name, base, batch)
        found = report.attempt("costs", name, count, quiet=True)
        if found:
            systems[name], memory, launches = found
            rows[name] = {"MiB above floor": memory, "launches above floor": launches}
    above_floor(rows)
    times = cost.step_times(systems, batch, rounds, setting.device)
    for name in systems:
        rows[name]["step ms"] = statistics.median(times[name])
        rows[name]["step / PEFT LoRA"] = cost.ratio(times, name, "PEFT LoRA")
    for rows_at_once in (1, 8):
        decoding(setting, report, rows, base, rows_at_once)
    for name, row in rows.items():
        report.add("costs", name, "measured", **row)
    judge = functools.partial(targets, setting, report, rows)
    report.attempt("targets", "all", judge, quiet=True)


def above_floor(rows: dict[str, dict]) -> None:
    """Leave of memory and launches what is above the floor's."""
    floor = dict(rows.get("floor", {}))
    for row in rows.values():
        for column, value in row.items():
            row[column] = None if None in (value, floor.get(column)) else value - floor[column]


@torch.no_grad()
def decoding(setting: Setting, report: Report, rows: dict, base: nn.Module, batch: int) -> None:
    """Add a decoded token's time to the rows of all systems and of the base model."""
    prompt_length, tokens, rounds = (8, 1, 2) if setting.tiny else (256, 4, 8)
    prompt = cost.random_batch(base.config, batch, prompt_length, setting.device)["input_ids"]
    argument = cost.cache_argument(base)
    tasks = {}

    def decoder_of(name: str) -> cost.Decoder:
        """A system's, after some tokens."""
        model = cost.build(name, base).eval()
        cache = DynamicCache(config=base.config)
        decoder = cost.Decoder(model, model, cache, argument, prompt)
        decoder(tokens)
        return decoder

    for name in [*rows]:
        if name != "floor":
            make = functools.partial(decoder_of, name)
            decoder = report.attempt("costs", f"{name}, decoding {batch}", make, quiet=True)
            if decoder:
                tasks[name] = functools.partial(decoder, tokens)
    times = cost.take_turns(tasks, rounds, setting.device)
    for name in tasks:
        rows[name][f"decode {batch} ms"] = statistics.median(times[name]) / tokens
        rows[name][f"decode {batch} / PEFT LoRA"] = cost.ratio(times, name, "PEFT LoRA")


def targets(setting: Setting, report: Report, rows: dict[str, dict]) -> None:
    """Say of each target whether lora meets it."""
    ours = rows["lora"]
    loop = rows["MoE-LoRA"]
    stacked = rows["MoE-LoRA stacked"]
    found = {
        "step <= 1.03 x PEFT LoRA": (ours["step / PEFT LoRA"], 1.03),
        "step <= 0.5 x MoE-LoRA": (ours["step ms"] / loop["step ms"], 0.5),
        "step <= MoE-LoRA stacked": (ours["step ms"] / stacked["step ms"], 1.0),
        "decode 1 <= 1.15 x PEFT LoRA": (ours["decode 1 / PEFT LoRA"], 1.15),
    }
    if setting.device == "cuda":
        memory = ours["MiB above floor"] / loop["MiB above floor"]
        found["memory above the floor <= 0.1 x MoE-LoRA"] = (memory, 0.1)
    else:
        report.add("targets", "memory above the floor", "skipped: needs CUDA")
    for what, (value, limit) in found.items():
        outcome = "met" if value <= limit else "missed"
        if setting.tiny:
            outcome = "tiny"  # says nothing
        report.add("targets", what, f"{outcome}: {value:.2f}")


def compiled(setting: Setting, report: Report) -> None:
    """A row a system: the compiled step of six blocks."""
    config = paper_config(setting, blocks=6)
    shape, rounds = ((2, 16), 2) if setting.tiny else ((8, 1024), 8)
    batch = cost.random_batch(config, *shape, setting.device)
    base = cost.base_model(config, torch.bfloat16, setting.device)
    torch._dynamo.reset()
    systems = {}
    rows = {}

    def first_steps(name: str) -> tuple:
        """A compiled system, the seconds of its first steps and the graphs made in them."""
        system = cost.System(name, base).compile(backend=setting.backend)
        start = time.perf_counter()
        before = graphs()
        for _ in range(3):
            system.step(batch)
        return system, time.perf_counter() - start, graphs() - before

    for name in ("floor", "PEFT LoRA", "lora"):
        make = functools.partial(first_steps, name)
        found = report.attempt("compiled", name, make, quiet=True)
        if found:
            systems[name], seconds, count = found
            rows[name] = {"compile s": seconds, "graphs": count}
    times = cost.step_times(systems, batch, rounds, setting.device)
    for name, row in rows.items():
        row["step ms"] = statistics.median(times[name])
        row["step / PEFT LoRA"] = cost.ratio(times, name, "PEFT LoRA")
        report.add("compiled", name, "measured", **row)


# --------------------------------------------------------------------------------- example


def demonstration(setting: Setting) -> str:
    """Run train_example.py as a user would who gives no data."""
    if not importlib.util.find_spec("trl"):
        raise Skipped("needs trl")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train_example.py"), "--output_dir", folder]
        if setting.tiny:
            command += ["--max_steps", "2"]
        start = time.perf_counter()
        left = max(20, SECONDS + 35 - (start - BEGIN))
        done = subprocess.run(command, capture_output=True, text=True, timeout=left)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout)[-300:])
    return f"{time.perf_counter() - start:.0f} s"


def example(setting: Setting, report: Report) -> None:
    """One row."""
    report.attempt("example", "train_example.py", functools.partial(demonstration, setting))


# ------------------------------------------------------------------------------------ main


PARTS = {"promises": promises, "costs": costs, "compiled": compiled, "example": example}


def main() -> int:
    """Run the parts, write the table, say what failed."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="everything small, also on a CPU")
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="name of both files")
    args = parser.parse_args()
    setting = Setting(args.tiny)
    if setting.device == "cpu" and not args.tiny:
        parser.error("no GPU is seen here: --tiny runs everything small on the CPU")
    transformers.utils.logging.set_verbosity_error()
    torch._dynamo.config.cache_size_limit = 64
    report = Report(args.out, setting)
    for name in args.part:
        run = functools.partial(PARTS[name], setting, report)
        report.attempt(name, "the whole part", run, quiet=True)
        report.write()
    print(f"\n{args.out.with_suffix('.md').read_text()}")
    for name, error in report.errors.items():
        print(f"FAILED: {name}\n{error[-1500:]}")
    if report.failed():
        print("FAILED:", "; ".join(report.failed()))
    return int(bool(report.failed()))


if __name__ == "__main__":
    sys.exit(main())
