"""Monkey Jump: a mixture of experts made of the adapters that a Transformer block already has.

A block usually carries one adapter on each of several projections (q, k, v, o, ...). Monkey Jump calls them experts
and lets each token use only the top-k. The router is not trained: it compares the block's input with one k-means center
an expert, and the centers follow the data by an exponential moving average.

    model(input_ids, attention_mask)
      RoutedModel         notes which tokens are real and where prompts end
        RoutedBlock       hidden h -> directions -> gates [B, N, E]; N = T (a token each) or 1 (a sequence each)
          RoutedLinear    y = W x + gate_e * delta_e(x)
    optimizer.step()      moves each center toward the mean of the directions that were nearest to it

    model = apply_monkeyjump(model, linears=["q_proj", "k_proj", "v_proj", "o_proj"], rank=2, top_k=2)
    init_router_centers(model, dataloader)  # k-means on the data; then train as always
    save_adapter(model, "adapter");  model = load_adapter(base_model, "adapter")

    B, T, D     batch, tokens, width of h           centers     [E, D], unit vectors, one an expert
    E           experts of a block                  directions  [B, N, D], what is routed, of length 1
    real        [B, T], False: padding; None: all   gates       [B, N, E], top_k of them not 0, of sum 1
    prompt_end  [B]; None: the last real token      gate        [B, N, 1], that of one expert

Papers: Monkey Jump (arXiv 2601.06356), LoRA (2106.09685), LoRA-FA (2308.03303), AdaLoRA (2303.10512), Propulsion
(2409.10927). "Departure:" marks what differs from the authors' code (github.com/Nusrat-Prottasha/MonkeyJump).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import math
import operator
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

# ---------- mathematics
REP_MODES = ("token", "last", "mean", "prompt_end")
Maybe = Tensor | None


def unit(x: Tensor) -> Tensor:
    """x [..., D] -> its direction, of length 1, at least float32; zero where x is zero, tiny or not finite."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return (x / norm).nan_to_num_(0.0, 0.0, 0.0)


def last_of_prompt(labels: Tensor, real: Tensor) -> Tensor:
    """The position before the first label: labels [B, T] (-100: nothing to learn), real [B, T] -> int [B]."""
    answer = (labels != -100) & real
    end = (answer.int().argmax(dim=1) - 1).clamp(min=real.int().argmax(dim=1))  # no prompt: the first real token
    return torch.where(answer.any(dim=1), end, real.int().cumsum(dim=1).argmax(dim=1))  # or the last True


def represent(hidden: Tensor, mode: str, real: Maybe = None, prompt_end: Maybe = None) -> tuple[Tensor, Maybe]:
    """What the router looks at (section 3): hidden [B, T, D] -> [B, N, D], N = T or 1, and which are real [B, N]."""
    if mode == "token":
        return hidden, real
    real = hidden.new_ones(hidden.shape[:2], dtype=torch.bool) if real is None else real
    if mode == "mean":
        weights = real / real.sum(dim=1, keepdim=True).clamp(min=1)
        hidden = hidden.float().masked_fill(~real[..., None], 0.0)
        return einsum(hidden, weights, "b t d, b t -> b d")[:, None], real.any(dim=1, keepdim=True)
    # Departure: the last *real* token; the authors' code supposes that padding is on the right.
    position = real.int().cumsum(dim=1).argmax(dim=1) if mode == "last" or prompt_end is None else prompt_end
    index = repeat(position.clamp(0, hidden.shape[1] - 1), "b -> b 1 d", d=hidden.shape[-1])
    return hidden.gather(1, index), real.any(dim=1, keepdim=True)


def route(
    directions: Tensor, centers: Tensor, top_k: int, temperature: float = 1.0, jitter_noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Directions [..., D], centers [E, D] -> gates [..., E], a softmax cut to top_k, and each best expert [...]."""
    logits = F.linear(directions, centers.to(directions.dtype))
    logits = logits if temperature == 1.0 else logits / temperature
    if jitter_noise:
        logits = logits * torch.empty_like(logits).uniform_(1.0 - jitter_noise, 1.0 + jitter_noise)
    top, experts = logits.topk(min(top_k, centers.shape[0]), dim=-1)  # [..., k]; their softmax is p_e / sum of top-k p
    return torch.zeros_like(logits).scatter(-1, experts, top.softmax(dim=-1)), experts[..., 0]


def cluster_statistics(directions: Tensor, best: Tensor, experts: int, real: Maybe) -> Tensor:
    """Directions [..., D], best expert [...], real [...] -> by expert their sums and counts [E, D + 1]."""
    counted = directions.any(dim=-1) if real is None else directions.any(dim=-1) & real
    assigned = (best[..., None] == torch.arange(experts, device=best.device)) & counted[..., None]  # [..., E]
    return einsum(assigned.to(directions.dtype), F.pad(directions, (0, 1), value=1.0), "... e, ... d -> e d")


def ema_update(centers: Tensor, statistics: Tensor, momentum: float) -> Tensor:
    """c_e <- normalize(m c_e + (1 - m) mean_e), if anything was assigned to e: centers [E, D], [E, D + 1] -> [E, D]."""
    # Departure: the mean is of unit vectors, since raw activations would swamp a unit center.
    sums, counts = statistics[..., :-1], statistics[..., -1:]
    means = sums / counts.clamp(min=1.0)
    return torch.where(counts > 0, unit(momentum * centers + (1.0 - momentum) * means), centers)


def kmeans(points: Tensor, clusters: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Spherical k-means, greedy k-means++ seeding first: unit vectors [N, D] -> centers [E, D], E = clusters <= N."""
    centers = points[torch.randint(len(points), (1,), generator=generator).to(points.device)]  # [1, D]
    while len(centers) < clusters:
        nearest = (1.0 - (points @ centers.T).amax(dim=1)).clamp(min=0.0)  # [N], half the squared distance
        chances = nearest.double().cpu() + 1e-12  # points may all be the same
        drawn = torch.multinomial(chances, 2 + int(math.log(clusters)), replacement=True, generator=generator)
        candidates = points[drawn.to(points.device)]  # [M, D]
        left = torch.minimum(nearest[:, None], 1.0 - points @ candidates.T).sum(dim=0)  # [M]
        centers = torch.cat([centers, candidates[left.argmin()][None]])
    for _ in range(iterations):
        cosine, cluster = (points @ centers.T).max(dim=1)  # [N]
        statistics = cluster_statistics(points, cluster, clusters, None)  # [E, D + 1]
        worst = points[cosine.topk(clusters, largest=False).indices]  # [E, D], for empty clusters
        centers = torch.where(statistics[:, -1:] > 0, unit(statistics[:, :-1]), worst)
    return centers


# ---------- adapters
class Float32Module(nn.Module):
    """Follows the model to any device, but stays float32 when it is cast: small steps are lost in less."""

    def _apply(self, fn: Callable, recurse: bool = True) -> Float32Module:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class Adapter(Float32Module):
    """One expert, y = base + gate * delta(x): a subclass makes float32 parameters and defines `delta` or `forward`."""

    def __init__(self, in_features: int, out_features: int, config: MonkeyJumpConfig, device: torch.device) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def delta(self, x: Tensor, base: Tensor) -> Tensor:
        """x [..., in], base output W x [..., out] -> [..., out]."""
        raise NotImplementedError

    def forward(self, x: Tensor, base: Tensor, gate: Tensor | float) -> Tensor:
        """x [..., in], base [..., out], gate [..., 1] or 1.0 (shared), all of base's dtype -> y [..., out]."""
        return base + gate * self.delta(x, base)


class LoRA(Adapter):
    """delta(x) = (alpha/r) B A x (Hu et al. 2021)."""

    trains_A = True

    def __init__(self, in_features, out_features, config, device) -> None:
        super().__init__(in_features, out_features, config, device)
        self.scale, self.cast = config.alpha / config.rank, None
        self.lora_A = nn.Parameter(torch.empty(config.rank, in_features, device=device), requires_grad=self.trains_A)
        self.lora_B = nn.Parameter(torch.zeros(out_features, config.rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def down(self) -> Tensor:
        return self.lora_A

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A [r, in], (alpha/r) B^T [r, out] in x's dtype; kept from one decoded token to the next."""
        dtype, compiling = x.dtype, torch.compiler.is_compiling()
        if compiling or torch.is_grad_enabled() or x.shape[-2] > 1:
            if not compiling:
                self.cast = None  # a write through .data leaves no trace
            return self.down().to(dtype), (self.scale * self.lora_B).to(dtype).t()
        state = dtype, [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self._parameters.values()]
        cast = self.cast  # another thread may drop it
        if cast is None or cast[0] != state:
            cast = self.cast = state, (self.down().to(dtype), (self.scale * self.lora_B).to(dtype).t().contiguous())
        return cast[1]

    def forward(self, x: Tensor, base: Tensor, gate: Tensor | float) -> Tensor:
        down, up = self.factors(x)
        # Departure: dropout on the input, as in LoRA, not on the output. Gating r-wide spares memory.
        return base + (gate * F.linear(self.dropout(x), down)) @ up


class LoRAFA(LoRA):
    """LoRA with A frozen at random (Zhang et al. 2023): x need not be kept for the backward pass."""

    trains_A = False


class AdaLoRA(LoRA):
    """delta(x) = (alpha/r) P diag(L) Q x (Zhang et al. 2023): lora_B is P, lora_E L, lora_A Q; see allocate_ranks."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        nn.init.orthogonal_(self.lora_A)
        nn.init.orthogonal_(self.lora_B)
        # Departure: zero, to start as the base model; the authors: 0.01.
        self.lora_E = nn.Parameter(self.lora_A.new_zeros(len(self.lora_A)))
        for name, parameter in list(self.named_parameters()):
            self.register_buffer(f"sensitivity_{name}", torch.zeros_like(parameter.data))
            self.register_buffer(f"uncertainty_{name}", torch.zeros_like(parameter.data))

    def down(self) -> Tensor:
        return self.lora_E[:, None] * self.lora_A


class Propulsion(Adapter):
    """delta(x) = W x * ((1 + z)^degree - 1) (Kowsher et al. 2024), one z an output."""

    def __init__(self, in_features, out_features, config, device) -> None:
        super().__init__(in_features, out_features, config, device)
        self.degree = config.degree
        # Departure: z is the deviation from 1, so that weight decay leads back to the identity.
        self.propulsion = nn.Parameter(torch.zeros(out_features, device=device))

    def forward(self, x: Tensor, base: Tensor, gate: Tensor | float) -> Tensor:
        push = (1.0 + self.propulsion) ** self.degree - 1.0
        return base + gate * base * push.to(base.dtype)


ADAPTERS: dict[str, type[Adapter]] = {"lora": LoRA, "lorafa": LoRAFA, "adalora": AdaLoRA, "propulsion": Propulsion}
ADAPTERS["peft"] = Adapter  # holds the place of PEFT's own adapter, see RoutedPeft


# ---------- router
class Pass(threading.local):
    """What a call of the model shares with its blocks and projections; each thread has its own."""

    def __init__(self, latest: list[Maybe]) -> None:
        self.disabled = False  # by disable_adapters
        self.sample: Callable | None = None  # takes directions for init_router_centers
        self.running = False  # inside a RoutedModel, which sets what follows
        self.collecting = False  # statistics, as a training forward does
        self.rows: tuple[Maybe, Maybe] | None = None  # real [B, T] and prompt_end [B]; see represent
        self.latest = latest  # the rows noted last, for all threads
        self.kept: dict[str, Tensor] = {}  # by block, the prompt's gates [B, 1, E] for a decoded token
        self.routed: dict[str, Tensor] = {}  # by block, gates [B, 1, E] to keep for decoding
        self.gates: Tensor | bool | None = None  # of the running block; False: the base model alone

    def __reduce__(self) -> Any:  # a copy of the model is in no pass
        return Pass, ([None, None],)


def recomputing() -> bool:
    """Inside a backward pass, where a checkpoint runs a forward again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Router(Float32Module):
    """The gradient-free router of one block: its centers, and the cluster_statistics that will move them."""

    def __init__(self, name: str, experts: list[str], width: int, config: MonkeyJumpConfig, device: Any) -> None:
        super().__init__()
        self.name, self.experts, self.config = name, experts, config
        self.register_buffer("centers", unit(torch.randn(len(experts), width, device=device)))
        # Statistics of all ranks since the centers moved.
        self.register_buffer("pending", torch.zeros(len(experts), width + 1, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long, device=device))  # of the optimizer
        self.forget()

    def forget(self) -> None:
        # No buffers: DDP would overwrite them with rank 0's.
        self.gathered = torch.zeros_like(self.pending)  # this rank's, since the last step
        self.served = torch.zeros_like(self.pending)  # of all ranks, since the last report

    def _apply(self, fn: Callable, recurse: bool = True) -> Router:
        super()._apply(fn, recurse)
        if self.gathered.device != self.centers.device:
            self.forget()
        return self

    def _load_from_state_dict(self, *args) -> None:  # what was seen belongs to the old centers
        self.pending.zero_()
        self.forget()
        super()._load_from_state_dict(*args)

    def forward(self, hidden: Tensor) -> Tensor:
        """The block's input [B, T, D] -> gates [B, N, E] in its dtype; in training, statistics are gathered."""
        config, current = self.config, self.current
        if (kept := current.kept.get(self.name)) is not None and len(kept) == len(hidden):
            return kept
        if not self.experts:  # shared adapters alone
            return hidden.new_ones(1)
        again = recomputing()
        rows = current.rows or current.latest
        if not self.reads_text or (again and config.rep_mode == "token"):
            rows = (None, None)
        real, prompt_end = [None if row is None else row.to(hidden.device) for row in rows]
        hidden = hidden.detach()  # no gradient goes through the router
        hidden = hidden[None] if hidden.dim() == 2 else hidden  # vision blocks may see patches [T, D]
        wanted = [*(hidden.shape[:2] if real is None else real.shape), self.centers.shape[1]]
        if list(hidden.shape) != wanted:
            raise ValueError(f"block {self.name!r} routes hidden states {wanted}, not {list(hidden.shape)}")
        device = "cpu" if hidden.is_meta else hidden.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext():
            representations, real = represent(hidden, config.rep_mode, real, prompt_end)
            directions = unit(representations)
            if current.sample is not None:
                current.sample(self, directions, real)
            noise = config.jitter_noise if self.training else 0.0
            gates, best = route(directions, self.centers, config.top_k, config.temperature, noise)
            if current.collecting and not again:
                self.gathered.add_(cluster_statistics(directions, best, len(self.centers), real))
        gates = gates.to(hidden.dtype)
        if config.rep_mode != "token":
            current.routed[self.name] = gates
        return gates


@torch.no_grad()
def update_router_centers(model: nn.Module) -> None:
    """Move the centers, if due, by what all ranks gathered; every optimizer step calls this."""
    # Departure: not in a forward, so that checkpoints, micro-batches and ranks see the same centers.
    wiring = adapted(model).monkeyjump
    config, wiring.collected = wiring.config, False
    until = math.inf if config.update_until is None else config.update_until
    for router in wiring.routers.values():
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(router.gathered)
        router.steps += 1
        router.served += router.gathered
        router.pending += router.gathered  # [E, D + 1]
        router.gathered.zero_()
        due = (router.steps % config.update_every == 0) & (router.steps <= until)
        moved = ema_update(router.centers, router.pending, config.ema_momentum)
        router.centers.copy_(torch.where(due, moved, router.centers))
        router.pending *= ~due


# ---------- routed classes
# Who takes part is given a subclass of its own class, as by FSDP2: no name changes. A call meets these mixins in turn.
MODELS: list[weakref.ref[nn.Module]] = []  # in the same order on all ranks


class Routed:
    """What the mixins share: copies and pickles are made from the mixin and the original class."""

    def __reduce_ex__(self, protocol: int) -> Any:
        _, _, *state = super().__reduce_ex__(protocol)
        return new_routed, type(self).__bases__, *state


class RoutedModel(Routed):
    """The model and each module above its blocks: the one that is called notes what they must know."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.argument_names = list(inspect.signature(cls.forward).parameters)[1:]
        for name in {"merge_adapter", "merge_and_unload", "unload"}.intersection(dir(cls)):  # of PEFT's tuners
            setattr(cls, name, RoutedPeft.merge)
        if prepare := getattr(cls, "prepare_inputs_for_generation", None):

            @functools.wraps(prepare)  # generate() reads its signature
            def prepare_inputs_for_generation(self, *args, **kwargs):
                if kwargs.get("is_first_iteration") and (cache := cache_of(kwargs)) is not None:
                    cache.monkeyjump_gates = {}  # an older one's
                return prepare(self, *args, **kwargs) | {"monkeyjump_mask": kwargs.get("attention_mask")}

            cls.prepare_inputs_for_generation = prepare_inputs_for_generation

    def __call__(self, *args, **kwargs):
        wiring, current = self.monkeyjump, self.monkeyjump.current
        if current.running:
            return super().__call__(*args, **kwargs)
        given = dict(zip(self.argument_names, args, strict=False), **kwargs)
        kwargs = {name: v for name, v in kwargs.items() if name not in ("prompt_end", "monkeyjump_mask")}
        current.collecting = self.training and torch.is_grad_enabled() and not current.disabled
        note_rows(current, given, wiring.config.rep_mode)
        if current.collecting:
            wiring.collected = True
        current.running = True
        try:
            output = super().__call__(*args, **kwargs)
        finally:
            current.running = False
        if current.routed:
            cache = cache_of(given | dict(output) if isinstance(output, dict) else given)
            if cache is not None:
                cache.monkeyjump_gates = current.routed
        return output


class RoutedBlock(Routed):
    """A block: it routes its input before it runs; its own checkpointed forward takes the gates along."""

    def __call__(self, *args, **kwargs):
        router, current = self.monkeyjump, self.monkeyjump.current
        hidden = args[0] if args else kwargs.get("hidden_states", kwargs.get("hidden_state"))
        gates = False if current.disabled else router(hidden)
        if torch.compiler.is_compiling():  # no object may change inside a checkpoint
            current.gates = gates
        else:
            kwargs["monkeyjump_gates"] = gates
        return super().__call__(*args, **kwargs)

    def forward(self, *args, **kwargs):
        if "monkeyjump_gates" not in kwargs:
            return super().forward(*args, **kwargs)
        current = self.monkeyjump.current
        outside, current.gates = current.gates, kwargs.pop("monkeyjump_gates")
        try:
            return super().forward(*args, **kwargs)
        finally:
            current.gates = outside


class RoutedLinear(Routed):
    """A projection: its adapter adds to its output, weighted by its expert's gate."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        adapter, base = self.monkeyjump, super().forward(x, *args, **kwargs)
        gate = gate_of(adapter, base)
        return base if gate is None else adapter(x.to(base.dtype), base, gate)


class RoutedPeft(Routed):
    """A projection that PEFT adapted, by whichever method: y = base + gate * (adapted - base)."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        adapter, y = self.monkeyjump, super().forward(x, *args, **kwargs)
        gate, base = gate_of(adapter, y), self.get_base_layer()(x).to(y.dtype)
        return base if gate is None else torch.lerp(base, y, gate)

    def merge(self, *args, **kwargs) -> None:
        raise ValueError("routed adapters cannot be merged: gates differ by token")


def gate_of(adapter: Adapter, y: Tensor) -> Tensor | float | None:
    """An adapter's gate [..., 1] for the output y [B, T, out] or [B * T, out] of its projection; None: none is on."""
    gates, expert = adapter.current.gates, adapter.expert
    if gates is None and recomputing():
        raise RuntimeError("a checkpoint inside a block has no gates: wrap whole blocks")
    if gates is None or gates is False:
        return None
    if expert is None:  # shared: always on
        return 1.0
    (batch, count), seen = gates.shape[:2], list(y.shape[:-1])
    tokens = y.shape[1] if y.dim() == 3 else len(y) // batch
    if seen not in ([batch, tokens], [batch * tokens]) or count not in (1, tokens):
        raise ValueError(f"a projection in linears sees {seen} tokens, its gates are for {[batch, count]}")
    gate = gates.narrow(2, expert, 1).to(y.dtype)  # residuals may be float32 above a bf16 base
    return gate if y.dim() == 3 else rearrange(gate.expand(batch, tokens, 1), "b t 1 -> (b t) 1")


def cache_of(given: dict[str, Any]) -> Any:
    names = ("cache", "past_key_values", "cache_params")  # as arguments and as fields of the output
    return next((given[name] for name in names if given.get(name) is not None), None)


def note_rows(current: Pass, given: dict[str, Any], mode: str) -> None:
    """Note what routing needs of a model's arguments; ValueError for what it gets wrong."""
    current.rows, current.kept, current.routed = (None, None), {}, {}
    tokens = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
    if tokens is None or mode == "token" and not (current.collecting or current.sample):
        return
    # Departure: padding by the 2-D mask at the model's entry; blocks see a 4-D mask or none.
    mask, real, past, wrong = given.get("monkeyjump_mask", given.get("attention_mask")), None, 0, []
    if isinstance(mask, Tensor) and mask.dim() == 2:  # [B, past + T]
        past = mask.shape[1] - tokens.shape[1]
        real = F.pad(mask != 0, (-past, 0), value=True)
    current.rows = (real, None)
    if mode == "token":
        return
    if mask is not None and real is None:
        wrong = ["attention_mask must be [batch, tokens]"]
    valid = tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if real is None else real
    end, labels, position = (given.get(name) for name in ("prompt_end", "labels", "position_ids"))
    if mode != "prompt_end":
        end = None
    elif end is not None:
        end = torch.as_tensor(end).long() - past
        wrong += [] if end.shape == valid.shape[:1] else ["prompt_end must be [batch]"]
    elif labels is not None and labels.shape == valid.shape:
        end = last_of_prompt(labels, valid)
    elif current.collecting:
        wrong += ["training needs prompt_end or labels (label smoothing takes them)"]
    packed = [name for name in given if re.match("cu_seq|seq_idx", name) and given[name] is not None]
    if isinstance(position, Tensor) and position.shape == valid.shape and not torch.compiler.is_compiling():
        starts_anew = (position[:, 1:] <= position[:, :-1]) & valid[:, 1:] & valid[:, :-1]
        packed += ["position_ids"] if starts_anew.any() else []
    wrong += [f"{name}: packed sequences would be routed as one" for name in packed]
    if wrong:
        raise ValueError(f"rep_mode={mode!r}: {'; '.join(wrong)}")
    current.rows = (real, end)
    if not torch.compiler.is_compiling():
        current.latest[:] = current.rows
    if tokens.shape[1] == 1:
        # Departure: a decoded token keeps its sequence's routing; the authors route it by itself.
        current.kept = getattr(cache_of(given), "monkeyjump_gates", {})


@functools.cache
def routed_class(mixin: type, kind: type) -> type:
    # With the original's names, for which transformers asks.
    return type(kind)(kind.__name__, (mixin, kind), {n: getattr(kind, n) for n in ("__module__", "__qualname__")})


def new_routed(mixin: type, kind: type) -> nn.Module:
    kind = routed_class(mixin, kind)
    module = kind.__new__(kind)
    if mixin is RoutedModel:
        MODELS.append(weakref.ref(module, MODELS.remove))
    return module


def change_class(module: nn.Module, kind: type) -> None:
    for name in ("forward", "_old_forward"):  # accelerate and transformers keep the forward they found
        if getattr(vars(module).get(name), "__func__", None) is type(module).forward:
            setattr(module, name, kind.forward.__get__(module))
    module.__class__ = kind


@dataclasses.dataclass
class Wiring:
    """What `apply_monkeyjump` leaves on a model: the options, and who takes part."""

    config: MonkeyJumpConfig
    current: Pass
    parts: dict[str, Router | Adapter]  # by the path of what they serve
    routers: dict[str, Router]  # those with experts
    trained_before: list[nn.Parameter]
    collected: bool = False  # a training forward ran since the last step


def adapted(model: nn.Module, needed: bool = True) -> nn.Module | None:
    """The adapted model inside whatever wraps it now: DDP, torch.compile, PEFT, ..."""
    root = next((module for module in model.modules() if isinstance(module, RoutedModel)), None)
    if root is None and needed:
        raise ValueError(f"{type(model).__name__} carries no Monkey Jump: call apply_monkeyjump first")
    return root


@register_optimizer_step_post_hook
def after_optimizer_step(optimizer: Any, *_) -> None:  # FSDP1 and ZeRO flatten parameters
    if getattr(optimizer, "found_inf", None):  # a fused optimizer skips a step by itself
        return
    for model in [reference() for reference in MODELS]:
        if isinstance(model, RoutedModel) and model.monkeyjump.collected:
            update_router_centers(model)


# ---------- blocks and projections
# A token mixer asks who else is there, as no feed-forward does, or hands **kwargs on to a kernel.
MIXER_ARGUMENTS = re.compile(r"mask|cache|past|rotary|position_emb|seqlens|attentions|^(state|kwargs)$")
# Routers and indexers get no gradient; mamba never calls dt_proj; kv_b_proj sees cached latents again, zaya's
# v_proj_delayed a blank token, cross-attention other tokens.
NOT_A_PROJECTION = re.compile(
    r"mlp|ffn|feed_forward|router|indexer|dt_proj|kv_b_proj|v_proj_delayed|(cross|encoder)_?att", re.I
)


def features(layer: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a dense linear layer of any kind, also quantised; None for anything else."""
    layer = layer.get_base_layer() if is_peft(layer) else layer
    kind = type(layer).__name__  # a grouped linear has many matrices
    if hasattr(layer, "in_features") and hasattr(layer, "out_features") and "Grouped" not in kind:
        return layer.in_features, layer.out_features
    return tuple(layer.weight.shape) if kind == "Conv1D" and hasattr(layer, "nf") else None  # GPT-2: [in, out]


def is_peft(module: nn.Module) -> bool:
    """A layer that PEFT adapted; but `target_parameters` changes the base layer's own weight."""
    return hasattr(module, "get_base_layer") and hasattr(module, "merged") and not hasattr(module, "parameter_name")


def projections(block: nn.Module, peft: bool = False) -> list[str]:
    """Paths of a block's dense linears, or of those that PEFT adapted, as found."""
    found = [(path, module) for path, module in block.named_modules() if features(module)]
    return [path for path, module in found if not peft or is_peft(module) and not path.endswith("base_layer")]


def attention_projections(block: nn.Module) -> list[str]:
    """Those of its attention or of the counterpart (mixer, SSM, convolution)."""
    signatures = {f"{p}.": inspect.signature(type(m).forward).parameters for p, m in block.named_modules() if p}
    mixers = tuple(path for path, names in signatures.items() if any(map(MIXER_ARGUMENTS.search, names)))
    return [path for path in projections(block) if path.startswith(mixers) and not NOT_A_PROJECTION.search(path)]


def language_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of the language model by path, without those of vision or audio towers."""
    modules, tokens = dict(model.named_modules()), None
    with contextlib.suppress(NotImplementedError, AttributeError):  # a model without embeddings
        tokens = model.get_input_embeddings()
    lists = [p for p, m in modules.items() if isinstance(m, nn.ModuleList) and any(map(attention_projections, m))]
    # Climb from the token embedding until there are lists of blocks below, and take the nearest.
    owner = next((path for path, module in modules.items() if module is tokens), "")
    while owner and not any(path.startswith(f"{owner}.") for path in lists):
        owner = owner.rpartition(".")[0]
    below = [path for path in lists if not owner or path.startswith(f"{owner}.")]
    nearest = [path for path in below if path.count(".") == min(other.count(".") for other in below)]
    return {path: module for path, module in modules.items() if path.rpartition(".")[0] in nearest}


def find_blocks(model: nn.Module, blocks: dict[str, list[int]] | None) -> dict[str, nn.Module]:
    """The blocks to adapt by path, in the model's order; None: all of the language model."""
    modules = dict(model.named_modules())
    whole = {p for p, m in modules.items() if "input_ids" in inspect.signature(type(m).forward).parameters}
    chosen = list(language_blocks(model)) if blocks is None else []
    for name, indices in (blocks or {}).items():
        paths = dict(enumerate(path for path, module in modules.items() if type(module).__name__ == name))
        chosen += [paths.get(index) for index in indices] if paths else [None]
    if None in chosen or not chosen or whole.intersection(chosen):
        classes = {type(block).__name__ for m in modules.values() if isinstance(m, nn.ModuleList) for block in m}
        raise ValueError(f"blocks={blocks!r}: must map names of {', '.join(sorted(classes)) or 'no class'} to indices")
    return {path: module for path, module in modules.items() if path in chosen}


# ---------- applying, removing
@dataclasses.dataclass(frozen=True)
class MonkeyJumpConfig:
    """The options of `apply_monkeyjump`. ValueError for one not as said here."""

    blocks: dict[str, list[int]] | None  # indices by class, {"LlamaDecoderLayer": [0, 1]}; None: the language model's
    linears: list[str] | None  # names or suffixes ("attn.c_proj"), each match an expert; None: the attention's
    shared_expert: list[str] | None  # projections whose adapter is always on
    adapter: str  # a name in ADAPTERS or a subclass of Adapter; "peft": what PEFT has put there
    rank: int  # r of the LoRA family, >= 1
    alpha: float  # > 0: the LoRA family is scaled by alpha / rank
    dropout: float  # in [0, 1): in training, on the input of the LoRA family
    degree: int  # the power of propulsion, >= 1
    top_k: int  # experts that a token or sequence uses, >= 1
    temperature: float  # of the softmax over cosines, > 0
    ema_momentum: float  # weight of the old center in a move, in [0, 1]
    # Route each "token", or each sequence by its "last" real token, their "mean", or "prompt_end": given to the model's
    # forward [B], else before the first label that is not -100, else (not in training) as "last".
    rep_mode: str
    jitter_noise: float  # in [0, 1): in training, logits are times uniform noise in 1 -/+ it
    update_every: int  # optimizer steps from one move of the centers to the next, >= 1
    update_until: int | None  # the last step that may move them

    def __post_init__(self) -> None:
        for names, kinds, right, allowed in (
            ("adapter", {str}, lambda v: v in ADAPTERS, f"one of {', '.join(ADAPTERS)}"),
            ("rep_mode", {str}, lambda v: v in REP_MODES, f"one of {', '.join(REP_MODES)}"),
            ("blocks", {dict}, lambda v: all(type(i) is int for ids in v.values() for i in ids), "indices, or None"),
            ("linears shared_expert", {list}, lambda v: {*map(type, v)} <= {str}, "names, or None"),
            ("rank degree top_k update_every", {int}, lambda v: v >= 1, "an integer >= 1"),
            ("update_until", {int}, lambda v: v >= 0, "an integer >= 0, or None"),
            ("alpha temperature", {int, float}, lambda v: 0 < v < math.inf, "a number > 0"),
            ("dropout jitter_noise", {int, float}, lambda v: 0 <= v < 1, "a number in [0, 1)"),
            ("ema_momentum", {int, float}, lambda v: 0 <= v <= 1, "a number in [0, 1]"),
        ):
            for name in names.split():
                value = getattr(self, name)
                if not (value is None and "None" in allowed or type(value) in kinds and right(value)):
                    raise ValueError(f"{name}={value!r}: must be {allowed}")


def apply_monkeyjump(
    model: nn.Module,
    *,
    blocks: dict[str, Iterable[int]] | None = None,
    linears: str | Iterable[str] | None = None,
    shared_expert: str | Iterable[str] | None = None,
    adapter: str | type[Adapter] = "lora",
    rank: int = 2,
    alpha: float = 16.0,
    dropout: float = 0.0,
    degree: int = 15,
    top_k: int = 2,
    temperature: float = 1.0,
    ema_momentum: float = 0.9,
    rep_mode: str = "token",
    jitter_noise: float = 0.0,
    update_every: int = 1,
    update_until: int | None = None,
) -> nn.Module:
    """Freeze a model and make adapters on its blocks' projections the experts of a gradient-free router, in place.

    MonkeyJumpConfig explains the options. Then only adapter parameters (float32) require gradients.
    """
    if isinstance(adapter, type) and issubclass(adapter, Adapter):
        name = next((name for name, kind in ADAPTERS.items() if kind is adapter), adapter.__name__)
        ADAPTERS[name], adapter = adapter, name
    if isinstance(blocks, dict):
        blocks = {name: list(v) if isinstance(v, Iterable) else [v] for name, v in blocks.items()}
    names = [[v] if isinstance(v, str) else list(v) if isinstance(v, Iterable) else v for v in (linears, shared_expert)]
    adapters = (adapter, rank, alpha, dropout, degree)
    routing = (top_k, temperature, ema_momentum, rep_mode, jitter_noise, update_every, update_until)
    config = MonkeyJumpConfig(blocks, *names, *adapters, *routing)
    install(model, make_parts(model, config), config)
    return model


def make_parts(model: nn.Module, config: MonkeyJumpConfig, device: Any = None) -> dict[str, Router | Adapter]:
    """Routers and adapters by the path of what they serve, on its device unless another is given."""
    peft, layers = config.adapter == "peft", [module for module in model.modules() if is_peft(module)]
    for wrong, message in (
        (adapted(model, needed=False), "carries Monkey Jump already: call remove_monkeyjump first"),
        (getattr(getattr(model, "config", None), "is_encoder_decoder", False), "is an encoder-decoder"),
        (len({p.is_meta for p in model.parameters()}) > 1, "has layers on 'meta': adapt it before offloading"),
        (any(hasattr(p, "device_mesh") for p in model.parameters()), "is sharded: adapt it before fully_shard"),
        (peft != bool(layers), "must carry PEFT's adapters for adapter='peft', else none"),
        (any(layer.merged for layer in layers), "has merged PEFT adapters"),
    ):
        if wrong:
            raise ValueError(f"{type(model).__name__} {message}")

    def match(paths: list[str], names: list[str]) -> list[str]:  # in the order of the names, then as found
        return list(dict.fromkeys(path for name in names for path in paths if f".{path}".endswith(f".{name}")))

    blocks, text = find_blocks(model, config.blocks), language_blocks(model)
    linears = {path: projections(block, peft) for path, block in blocks.items()}
    available = sorted({name for names in linears.values() for name in names})
    always_on, parts, served, most = config.shared_expert or [], {}, set(), 0
    if missing := [name for name in (config.linears or []) + always_on if not match(available, [name])]:
        raise ValueError(f"{missing}: not in these blocks; there are {', '.join(available)}")
    for path, block in blocks.items():
        shared = match(linears[path], always_on)
        default = linears[path] if peft else attention_projections(block)
        experts = default if config.linears is None else match(linears[path], config.linears)
        experts = [name for name in experts if name not in shared]
        most = max(most, len(experts))
        at = device or next(block.parameters()).device
        for name in experts + shared:
            if (layer := block.get_submodule(name)) not in served:  # zamba's blocks share their attention
                parts[f"{path}.{name}"] = adapter = ADAPTERS[config.adapter](*features(layer), config, at)
                adapter.expert = experts.index(name) if name in experts else None
                served.add(layer)
        if experts or shared:
            weights = [getattr(child, "weight", None) for child in block.children()]
            norms = [weight for weight in weights if torch.is_tensor(weight) and weight.dim() == 1]
            width = len(norms[0]) if norms else model.config.get_text_config(decoder=True).hidden_size
            parts[path] = router = Router(path, experts, width, config, at)
            router.reads_text = path in text
    if config.top_k > most:
        raise ValueError(f"top_k={config.top_k}: must be at most {most}, what linears={config.linears} match")
    return parts


def install(model: nn.Module, parts: dict[str, Any], config: MonkeyJumpConfig) -> None:
    routers = {path: part for path, part in parts.items() if isinstance(part, Router) and part.experts}
    trained = [p for p in model.parameters() if p.requires_grad and config.adapter != "peft"]
    wiring = Wiring(config, Pass([None, None]), parts, routers, trained)
    if config.adapter != "peft":
        model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        above = not path or any(block.startswith(f"{path}.") for block in routers)
        if path in parts:
            module.monkeyjump = parts[path].train(model.training)  # in eval mode new dropout must not drop
            module.monkeyjump.current = wiring.current
            mixin = RoutedBlock if isinstance(parts[path], Router) else RoutedPeft if is_peft(module) else RoutedLinear
        elif above and not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            module.monkeyjump, mixin = wiring, RoutedModel
        else:
            continue
        change_class(module, routed_class(mixin, type(module)))
    MODELS.append(weakref.ref(model, MODELS.remove))


def remove_monkeyjump(model: nn.Module) -> nn.Module:
    """Give the base model back, bit for bit, requiring gradients as it did."""
    trained = adapted(model).monkeyjump.trained_before
    for module in list(model.modules()):
        if isinstance(module, Routed):
            del module.monkeyjump
            change_class(module, type(module).__bases__[1])
    for parameter in trained:
        parameter.requires_grad_(True)
    return model


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """In this thread the output is exactly the base model's: for a reference pass, as in DPO."""
    # PEFT's own switch, of all threads, serves what is not routed: embeddings, heads.
    peft = [m for m in model.modules() if hasattr(m, "_disable_adapters") and not isinstance(m, RoutedPeft)]
    switches = [(adapted(model).monkeyjump.current, "disabled"), *((m, "_disable_adapters") for m in peft)]
    with contextlib.ExitStack() as stack:
        for part, name in switches:
            stack.callback(setattr, part, name, getattr(part, name))
            setattr(part, name, True)
        yield


# ---------- centers from data
def init_router_centers(
    model_or_trainer: Any,
    dataloader: Iterable[Any] | None = None,
    *,
    subset_size: int = 4000,
    kmeans_iters: int = 15,
    rep_mode: str | None = None,
    seed: int = 0,
) -> None:
    """Set the centers of every block by k-means on the data (section 3), in few forward passes.

    Takes a model and batches, or a Trainer, which has its own. subset_size counts representations (tokens or sequences)
    of all ranks. rep_mode must be the applied one. After an error the old centers stay.
    """
    from tqdm.auto import tqdm

    model = model_or_trainer
    if hasattr(model, "get_train_dataloader"):
        dataloader = model.get_train_dataloader() if dataloader is None else dataloader
        model = model.model
    root, numbers = adapted(model), (subset_size, kmeans_iters, seed)
    wiring = root.monkeyjump
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if rep_mode not in (None, wiring.config.rep_mode):
        raise ValueError(f"{rep_mode=}: the model was adapted with rep_mode={wiring.config.rep_mode!r}")
    if dataloader is None or {*map(type, numbers)} != {int} or subset_size < 1 or min(numbers) < 0:
        raise ValueError(f"{subset_size=}, {kmeans_iters=}, {seed=}: need >= 1, 0, 0 and a dataloader")
    wanted = math.ceil(subset_size / ranks)
    quota = math.ceil(wanted / min(8, max(1, operator.length_hint(dataloader, 8))))  # from one batch
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    seen = {router: router.centers[:0] for router in wiring.routers.values()}  # directions [n, D]

    def sample(router: Router, directions: Tensor, real: Maybe) -> None:
        usable = directions.any(dim=-1)
        directions = directions[usable if real is None else usable & real]
        chosen = torch.randperm(len(directions), generator=generator)[:quota].to(directions.device)
        seen[router] = torch.cat([seen[router], directions[chosen]])[:wanted]

    training = [module for module in model.modules() if module.training]
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng():
        model.eval()
        wiring.current.sample = sample
        try:
            for batch in tqdm(dataloader, desc="k-means", leave=False):
                batch = [batch] if torch.is_tensor(batch) else batch
                given = batch if hasattr(batch, "items") else dict(zip(root.argument_names, batch, strict=False))
                if not any(torch.is_tensor(v) and v.dim() > 1 for v in given.values()):
                    raise ValueError(f"a batch of the dataloader is {batch!r:.200}, not tensors [batch, ...]")
                model(**{name: v.to(device) if torch.is_tensor(v) else v for name, v in given.items()})
                enough = torch.tensor(max(map(len, seen.values())) >= wanted, dtype=torch.int, device=device)
                if ranks > 1:
                    dist.all_reduce(enough)  # under FSDP ranks run in step
                if enough:
                    break
        finally:
            wiring.current.sample = None
            for module in training:
                module.training = True
        for router, points in seen.items():
            experts, of_all = len(router.experts), [points.cpu()] * ranks
            if ranks > 1:
                dist.all_gather_object(of_all, points.cpu())
            points = torch.cat(of_all).to(points.device)
            if len(points) < experts:
                raise ValueError(f"only {len(points)} representations for {experts} experts: give more batches")
            seen[router] = kmeans(points, experts, kmeans_iters, torch.Generator().manual_seed(seed))
            if ranks > 1:
                dist.broadcast(seen[router], 0)
        for router, centers in seen.items():
            router.load_state_dict({"centers": centers}, strict=False)


# ---------- saving, loading
def saved_tensors(parts: dict[str, Any]) -> dict[str, Tensor]:
    """What an adapter file holds, by name: all but pending sums and AdaLoRA's importance."""
    states = {f"{path}.monkeyjump.": part.state_dict(keep_vars=True).items() for path, part in parts.items()}
    tensors = {path + name: tensor for path, state in states.items() for name, tensor in state}
    return {name: t for name, t in tensors.items() if not re.search(r"\.(pending|sensitivity_|uncertainty_)\w*$", name)}


def save_adapter(model: nn.Module, directory: str | Path) -> None:
    """Write `adapter_model.safetensors`, which carries the config, and `adapter_config.json`, a copy to read.

    Named `router_...` for adapter="peft", whose weights PEFT saves. A kill leaves old or new. Call it on all ranks.
    """
    from safetensors.torch import save_file

    wiring = adapted(model).monkeyjump
    tensors = saved_tensors(wiring.parts)
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        return
    prefix = Path(directory, "router" if wiring.config.adapter == "peft" else "adapter")
    weights, copy, temporary = Path(f"{prefix}_model.safetensors"), Path(f"{prefix}_config.json"), Path(f"{prefix}_new")
    text = json.dumps(dataclasses.asdict(wiring.config), indent=2)
    Path(directory).mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().cpu().contiguous() for name, t in whole.items()}, temporary, {"config": text})
    copy.unlink(missing_ok=True)  # first, so that it is never that of other weights
    temporary.replace(weights)
    temporary.write_text(text)
    temporary.replace(copy)


def load_adapter(model: nn.Module, directory: str | Path) -> nn.Module:
    """Load what `save_adapter` wrote, into a plain base model (which is adapted) or one adapted with the same config.

    What does not fit or is not finite is a ValueError that changes nothing. ADAPTERS must hold your own methods.
    """
    from safetensors import SafetensorError, safe_open
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    root = adapted(model, needed=False)
    prefix = Path(directory, "router" if any(map(is_peft, model.modules())) else "adapter")
    weights, copy = Path(f"{prefix}_model.safetensors"), Path(f"{prefix}_config.json")
    try:
        with safe_open(weights, framework="pt") as file:
            text = (file.metadata() or {}).get("config", "")
            if copy.is_file() and copy.read_text() != text:
                raise ValueError(f"{copy.name} differs from the weights' config: delete it")
            config = MonkeyJumpConfig(**json.loads(text))
            if root is not None and config != root.monkeyjump.config:
                raise ValueError(f"saved with {config}, but the model has {root.monkeyjump.config}")
            parts = make_parts(model, config, "meta") if root is None else root.monkeyjump.parts
            needed = {name: list(tensor.shape) for name, tensor in saved_tensors(parts).items()}
            given = {name: file.get_slice(name).get_shape() for name in file.keys()}
            for name in sorted(given.keys() | needed.keys()):
                if given.get(name) != needed.get(name):
                    raise ValueError(f"{name} is {given.get(name)}, the model has {needed.get(name)}")
            tensors = {name: file.get_tensor(name) for name in given}
            if poisoned := [name for name, tensor in tensors.items() if not tensor.float().isfinite().all()]:
                raise ValueError(f"{poisoned[0]} is not finite")
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{weights}: {error}") from error
    if root is None:
        install(model, make_parts(model, config), config)
    for module in model.modules():
        if hasattr(module, "reshard"):  # after a forward FSDP2's root is whole
            module.reshard()
    set_model_state_dict(adapted(model), tensors, options=StateDictOptions(full_state_dict=True, strict=False))
    return model


def print_trainable_parameters(model: nn.Module) -> str:
    """Print and return how many parameters are trained, of how many; 4-bit weights unpacked."""
    packed = {p: 2 * p.element_size() for p in model.parameters() if type(p).__name__ == "Params4bit"}
    total = sum(p.numel() * packed.get(p, 1) for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    line = f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"
    print(line)
    return line


def router_statistics(model: nn.Module, reset: bool = False) -> dict[str, dict[str, Any]]:
    """By block, in training up to the last step: count of representations, the share [E] nearest to each expert."""
    result = {}
    for path, router in adapted(model).monkeyjump.routers.items():
        counts = router.served[:, -1].cpu()  # [E]
        share = counts / counts.sum().clamp(min=1.0)
        result[path] = {"experts": list(router.experts), "count": round(counts.sum().item()), "share": share}
        if reset:
            router.served.zero_()
    return result


# ---------- AdaLoRA's schedule
def adalora(model: nn.Module) -> list[AdaLoRA]:
    wiring = adapted(model).monkeyjump
    if wiring.config.adapter != "adalora":
        raise ValueError(f"adapter={wiring.config.adapter!r}: this is for adapter='adalora'")
    return [part for part in wiring.parts.values() if isinstance(part, AdaLoRA)]


@torch.no_grad()
def allocate_ranks(
    model: nn.Module,
    step: int,
    total_steps: int,
    *,
    target_rank: float,
    initial_steps: int = 0,
    final_steps: int = 0,
    interval: int = 10,
    beta: float = 0.85,
) -> None:
    """AdaLoRA's pruning (Zhang et al. 2023, section 3): once a step, between optimizer.step() and zero_grad().

    A triplet (column of P, entry of L, row of Q) is as important as its sensitivity |w dL/dw| times its uncertainty,
    both smoothed by beta. The budget falls cubically from rank to target_rank a projection: every interval the L
    of the least important become zero, and may recover until the final steps. Steps count from 1.
    """
    adapters = adalora(model)
    start = sum(len(adapter.lora_E) for adapter in adapters)
    rank, last = start / len(adapters), total_steps - final_steps
    if not (0 < target_rank <= rank and 0 <= initial_steps < last <= total_steps and interval >= 1 > beta >= 0):
        given = f"{target_rank=}, {initial_steps=}, {final_steps=}, {total_steps=}, {interval=}, {beta=}"
        raise ValueError(f"{given}: need ranks <= {rank}, steps in order, interval >= 1, 0 <= beta < 1")
    scores = []
    for adapter in adapters:
        score = {}
        for name, weight in adapter.named_parameters():
            sensitivity, uncertainty = getattr(adapter, f"sensitivity_{name}"), getattr(adapter, f"uncertainty_{name}")
            if step < last and weight.grad is not None:
                now = (weight * weight.grad).abs()
                sensitivity.lerp_(now, 1.0 - beta)
                uncertainty.lerp_((now - sensitivity).abs(), 1.0 - beta)
            score[name] = sensitivity * uncertainty
        scores.append(score["lora_E"] + score["lora_A"].mean(dim=1) + score["lora_B"].mean(dim=0))
    target, left = target_rank * len(adapters), (last - step) / (last - initial_steps)
    budget = max(1, int(target + (start - target) * max(0.0, left) ** 3))
    if initial_steps < step and (step >= last or step % interval == 0) and budget < start:
        threshold = torch.cat(scores).kthvalue(start - budget + 1).values
        for adapter, score in zip(adapters, scores, strict=True):
            adapter.lora_E.masked_fill_(score < threshold, 0.0)


def orthogonal_regularization(model: nn.Module) -> Tensor:
    """Mean of ||P^T P - I|| and ||Q Q^T - I|| (Frobenius) over the adapters; scaled, a part of AdaLoRA's loss."""
    grams = [gram for a in adalora(model) for gram in (a.lora_B.T @ a.lora_B, a.lora_A @ a.lora_A.T)]
    return torch.stack([torch.linalg.matrix_norm(gram - torch.eye(len(gram)).to(gram)) for gram in grams]).mean()
