"""Monkey Jump: a mixture of experts made of the adapters that a Transformer block already has.

A block adapted the usual way carries one adapter on each of several projections (q, k, v, o, ...). Monkey Jump calls
them the experts and lets each token use only the top-k of them. The router has no trained parameter: it compares the
block's input with one k-means center an expert, and the centers follow the data by an exponential moving average.

    model(input_ids, attention_mask)
      stack   Stack.enter:   note mask, labels and cache; fold the last forward's statistics into the centers
        block   Router.enter:  h -> representations -> gates [B, N, E], N = T (a token each) or 1 (a sequence each)
          projection  Adapter.hook:  y = W x + gate_e * delta_e(x)
        block   Router.enter:  in training also  sums_e += unit(h), counts_e += 1  for the top-1 expert e of each h
      stack   Stack.leave:   a sequence's gates stay with its cache, for the tokens to be decoded

    model = apply_monkeyjump(model, linears=["q_proj", "k_proj", "v_proj", "o_proj"], rank=2, top_k=2)
    init_router_centers(model, dataloader)          # k-means on the data; then train as always
    save_adapter(model, "adapter");  model = load_adapter(base_model, "adapter")

    B, T, D  batch, tokens, width of the block's input h     c_e  center of expert e, a unit vector [D]
    E, k     experts of a block, experts used a token        r    rank of an adapter; alpha/r scales it
    gate     softmax of cos(h, c_e) / temperature over the k most similar experts, 0 for the others

Papers: Monkey Jump (Prottasha et al. 2026, arXiv 2601.06356), LoRA (Hu et al. 2021, 2106.09685), LoRA-FA (Zhang et al.
2023, 2308.03303), AdaLoRA (Zhang et al. 2023, 2303.10512), Propulsion (Kowsher et al. 2024, 2409.10927). "Departure:"
marks each place that differs on purpose from the authors' code (github.com/Nusrat-Prottasha/MonkeyJump).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import einsum, rearrange, reduce, repeat
from torch import Tensor, nn

logger = logging.getLogger(__name__)

REP_MODES = ("token", "last", "mean", "prompt_end")
CACHE_NAMES = ("past_key_values", "cache_params")  # the cache's keyword, and its field in the output
FORMAT_VERSION = 1
WEIGHTS_NAME, CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"


# ---------------------------------------------------------------------------------------------------- configuration


def _is_int(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_real(value: Any, accept: Callable[[float], bool]) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and accept(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "blocks": (
        lambda v: isinstance(v, dict) and all(isinstance(k, str) and all(_is_int(i, 0) for i in v[k]) for k in v),
        "a mapping of block class names to lists of indices",
    ),
    "linears": (_is_names, "a list of names"),
    "shared_expert": (_is_names, "a list of names"),
    "adapter": (lambda v: v in ADAPTERS, "one of {adapters}"),
    "rank": (lambda v: _is_int(v, 1), "an integer >= 1"),
    "alpha": (lambda v: _is_real(v, lambda x: x > 0), "a number > 0"),
    "dropout": (lambda v: _is_real(v, lambda x: 0 <= x < 1), "a number in [0, 1)"),
    "degree": (lambda v: _is_int(v, 1), "an integer >= 1"),
    "top_k": (lambda v: _is_int(v, 1), "an integer >= 1"),
    "temperature": (lambda v: _is_real(v, lambda x: x > 0), "a number > 0"),
    "ema_momentum": (lambda v: _is_real(v, lambda x: 0 <= x <= 1), "a number in [0, 1]"),
    "rep_mode": (lambda v: v in REP_MODES, f"one of {', '.join(REP_MODES)}"),
    "jitter_noise": (lambda v: _is_real(v, lambda x: 0 <= x < 1), "a number in [0, 1)"),
    "update_every": (lambda v: _is_int(v, 1), "an integer >= 1"),
    "update_until": (lambda v: v is None or _is_int(v, 0), "None or an integer >= 0"),
}


@dataclasses.dataclass(frozen=True)
class MonkeyJumpConfig:
    """The keywords of `apply_monkeyjump`, resolved: what `adapter_config.json` holds. Raises ValueError."""

    blocks: dict[str, list[int]]
    linears: list[str]
    shared_expert: list[str]
    adapter: str
    rank: int
    alpha: float
    dropout: float
    degree: int
    top_k: int
    temperature: float
    ema_momentum: float
    rep_mode: str
    jitter_noise: float
    update_every: int
    update_until: int | None

    def __post_init__(self) -> None:
        for name, (accept, allowed) in RULES.items():
            value = getattr(self, name)
            if not accept(value):
                raise ValueError(f"{name}={value!r}: must be {allowed.format(adapters=', '.join(ADAPTERS))}")


# ------------------------------------------------------------------------------------------------------ mathematics


def unit(x: Tensor) -> Tensor:
    """x [..., D] of any float type as float32 vectors of length 1 (zero stays zero)."""
    return F.normalize(x.float(), dim=-1)


def represent(
    hidden: Tensor, mode: str, real: Tensor | None = None, prompt_end: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """What the router looks at.

    Args:
        hidden: the block's input [B, T, D].
        mode: "token", "last", "mean" or "prompt_end" (Monkey Jump, section 3).
        real: bool [B, T], False for padding; None if there is none.
        prompt_end: int [B], position of the last prompt token within these T; None: the last real token.

    Returns:
        representations [B, N, D], N = T for "token" and 1 otherwise, and which of them are real, [B, N] or None (all).
    """
    if mode == "token":
        return hidden, real
    if real is None and mode == "mean":
        return reduce(hidden.float(), "b t d -> b 1 d", "mean"), None
    if real is None:
        real = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
    any_real = reduce(real.float(), "b t -> b 1", "max").bool()
    if mode == "mean":
        total = reduce(hidden.float().masked_fill(~real[..., None], 0.0), "b t d -> b 1 d", "sum")
        return total / reduce(real.float(), "b t -> b 1 1", "sum").clamp(min=1.0), any_real
    # Departure: the last *real* token also with padding on the left; the authors count real tokens.
    steps = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
    position = (real * steps).argmax(dim=1)  # [B]
    if mode == "prompt_end" and prompt_end is not None:
        position = prompt_end.to(position).clamp(0, hidden.shape[1] - 1)
    index = repeat(position, "b -> b 1 d", d=hidden.shape[-1])
    return hidden.gather(1, index), any_real


def route(
    representations: Tensor, centers: Tensor, top_k: int, temperature: float = 1.0, jitter_noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Gates by cosine similarity: softmax over the top-k experts, zero elsewhere (Monkey Jump, section 3).

    Equal to softmax over all experts, cut to the top k and divided by their sum.

    Args:
        representations: unit vectors [..., D], float32.
        centers: unit vectors [E, D], float32.
        top_k: experts a representation uses; all E if there are fewer.
        temperature: > 0; lower is sharper.
        jitter_noise: logits are multiplied by noise uniform in [1 - jitter_noise, 1 + jitter_noise].

    Returns:
        gates [..., E], each row sums to 1, and the best expert [...] of each representation.
    """
    logits = einsum(representations, centers, "... d, e d -> ... e") / temperature
    if jitter_noise:
        logits = logits * torch.empty_like(logits).uniform_(1.0 - jitter_noise, 1.0 + jitter_noise)
    top, experts = logits.topk(min(top_k, centers.shape[0]), dim=-1)  # [..., k]
    gates = torch.zeros_like(logits).scatter(-1, experts, top.softmax(dim=-1))
    return gates, experts[..., 0]


def cluster_statistics(representations: Tensor, experts: Tensor, gates: Tensor, real: Tensor | None) -> Tensor:
    """What the moving average needs of one forward pass.

    Args:
        representations: unit vectors [N, D]; rows that are not finite count for nothing.
        experts: best expert of each [N].
        gates: [N, E].
        real: bool [N] or None; padding counts for nothing.

    Returns:
        [E, D + 2]: for each expert the sum of the vectors assigned to it, their number, and the mass of its gates.
    """
    counted = reduce(representations, "n d -> n", "sum").isfinite()
    if real is not None:
        counted = counted & real
    weight = counted.float()
    assigned = torch.zeros_like(gates).scatter(-1, experts[:, None], weight[:, None])  # [N, E]
    sums = einsum(assigned, representations.nan_to_num(0.0), "n e, n d -> e d")
    mass = einsum(weight, gates.nan_to_num(0.0), "n, n e -> e")
    return torch.cat([sums, torch.stack([reduce(assigned, "n e -> e", "sum"), mass], dim=1)], dim=1)


def ema_update(centers: Tensor, sums: Tensor, counts: Tensor, momentum: float) -> Tensor:
    """c_e <- normalize(m c_e + (1 - m) mean_e); an expert without representations keeps its center.

    Args:
        centers: [..., E, D].
        sums: of unit vectors [..., E, D].
        counts: [..., E].
        momentum: m in [0, 1].

    Returns:
        new centers [..., E, D], of length 1.
    """
    # Departure: the mean is of unit vectors; raw activations of norm 100 would replace a unit center at once.
    means = sums / counts.clamp(min=1.0)[..., None]
    moved = F.normalize(momentum * centers + (1.0 - momentum) * means, dim=-1)
    return torch.where(counts[..., None] > 0, moved, centers)


def kmeans(points: Tensor, clusters: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Spherical k-means of several sets at once: greedy k-means++ seeding, then Lloyd iterations.

    Greedy seeding (Arthur and Vassilvitskii 2007) tries 2 + log(clusters) candidates a step and keeps the best.

    Args:
        points: unit vectors [L, N, D], float32; L independent sets.
        clusters: centers wanted a set, <= N.
        iterations: of Lloyd's algorithm, >= 0; a cluster that runs empty moves to the worst-served point.
        generator: on the CPU, so that a seed gives the same draws on every device.

    Returns:
        centers of length 1 [L, clusters, D].
    """
    sets, count, _ = points.shape
    rows = torch.arange(sets, device=points.device)
    tries = 2 + int(math.log(clusters))

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(points.device)

    def pick(index: Tensor) -> Tensor:  # [L, M] -> [L, M, D]
        return points.gather(1, repeat(index, "l m -> l m d", d=points.shape[-1]))

    def distances(to: Tensor) -> Tensor:  # [L, M, D] -> [L, N, M], of unit vectors: half the squared Euclidean one
        return (1.0 - einsum(points, to, "l n d, l m d -> l n m")).clamp(min=0.0)

    seeds = [(uniform(sets, 1) * count).long().clamp(max=count - 1)]
    nearest = distances(pick(seeds[0]))  # [L, N, 1], distance to the nearest seed so far
    for _ in range(clusters - 1):
        cumulated = nearest[..., 0].double().cumsum(dim=1)
        drawn = torch.searchsorted(cumulated, uniform(sets, tries).double() * cumulated[:, -1:]).clamp(max=count - 1)
        candidates = torch.minimum(nearest, distances(pick(drawn)))  # [L, N, tries]
        best = reduce(candidates, "l n m -> l m", "sum").argmin(dim=1)  # [L]
        seeds.append(drawn[rows, best][:, None])
        nearest = candidates[rows, :, best][..., None]
    centers = pick(torch.cat(seeds, dim=1))
    for _ in range(iterations):
        distance, nearest_center = distances(centers).min(dim=2)  # [L, N]
        assigned = F.one_hot(nearest_center, clusters).to(points)  # [L, N, E]
        means = unit(einsum(assigned, points, "l n e, l n d -> l e d"))
        empty = reduce(assigned, "l n e -> l e", "sum") == 0
        centers = torch.where(empty[..., None], pick(distance.topk(clusters, dim=1).indices), means)
    return centers


# ---------------------------------------------------------------------------------------------------------- adapters


class Adapter(nn.Module):
    """One expert: what it adds to the output of its projection, y = base + gate * delta(x).

    A subclass creates its parameters (float32, on `device`) in `__init__` and defines `delta`, or overrides `forward`
    where the formula allows something cheaper. It serves as `apply_monkeyjump(adapter=MyAdapter)`; to save and load it
    by name, put it into `ADAPTERS`.

    Args:
        in_features, out_features: of the projection.
        config: the resolved `MonkeyJumpConfig`.
        device: of the projection's weight.
    """

    def __init__(self, in_features: int, out_features: int, config: MonkeyJumpConfig, device: torch.device) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    @staticmethod
    def scale(config: MonkeyJumpConfig) -> float:
        """A constant factor that is folded into the gates."""
        return 1.0

    def delta(self, x: Tensor, base: Tensor) -> Tensor:
        """x [..., in], base output [..., out] -> [..., out]."""
        raise NotImplementedError

    def forward(self, x: Tensor, base: Tensor, gate: Tensor | float) -> Tensor:
        """x [..., in], base [..., out], gate [..., 1] (or a number), all of base's dtype -> y [..., out]."""
        return base + gate * self.delta(self.dropout(x), base)

    def attach(self, layer: nn.Module, routing: Routing, expert: int | None, foreign: bool) -> None:
        """Become part of projection `layer` as expert number `expert` (None: shared, always on)."""
        self.routing, self.expert, self.foreign = routing, expert, foreign
        layer.monkeyjump = self
        self.handles = [layer.register_forward_hook(self.hook)]

    def hook(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook of the projection. A hook and not a wrapper: names, types and code that reads weights stay."""
        call = self.routing.call
        if call is None:  # adapters are disabled
            return None
        x = args[0].to(output.dtype)
        gate = self.routing.scale if self.expert is None else self.routing.gate(call, x, self.expert, self.foreign)
        return self(x, output, gate)


class LoRA(Adapter):
    """delta(x) = (alpha/r) B A x (Hu et al. 2021). Gating the r-wide activation spares a tensor of output size."""

    trains_A = True

    def __init__(self, in_features: int, out_features: int, config: MonkeyJumpConfig, device: torch.device) -> None:
        super().__init__(in_features, out_features, config, device)
        self.lora_A = nn.Parameter(torch.empty(config.rank, in_features, device=device), requires_grad=self.trains_A)
        self.lora_B = nn.Parameter(torch.zeros(out_features, config.rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @staticmethod
    def scale(config: MonkeyJumpConfig) -> float:
        return config.alpha / config.rank

    def forward(self, x: Tensor, base: Tensor, gate: Tensor | float) -> Tensor:
        # Departure: dropout on the adapter's input, as in LoRA and PEFT, not on its output.
        inner = F.linear(self.dropout(x), self.lora_A.to(x.dtype)) * gate  # [..., r]
        return add_product(base, inner, self.lora_B)


class LoRAFA(LoRA):
    """LoRA with A frozen at random (Zhang et al. 2023): x is not kept for the backward pass."""

    trains_A = False


class AdaLoRA(LoRA):
    """delta(x) = (alpha/r) P diag(L) Q x (Zhang et al. 2023): lora_B = P, lora_E = L, lora_A = Q; see allocate_ranks."""

    def __init__(self, in_features: int, out_features: int, config: MonkeyJumpConfig, device: torch.device) -> None:
        super().__init__(in_features, out_features, config, device)
        nn.init.orthogonal_(self.lora_A)
        nn.init.orthogonal_(self.lora_B)
        # Departure: zero, so that the adapted model starts as the base model; the authors start at 0.01.
        self.lora_E = nn.Parameter(torch.zeros(config.rank, device=device))
        for name in ("A", "B", "E"):  # kept with the model, so that a resumed run prunes as an uninterrupted one
            for statistic in ("sensitivity", "uncertainty"):
                self.register_buffer(f"{statistic}_{name}", torch.zeros_like(getattr(self, f"lora_{name}").data))

    def forward(self, x: Tensor, base: Tensor, gate: Tensor | float) -> Tensor:
        inner = F.linear(self.dropout(x), self.lora_A.to(x.dtype)) * (gate * self.lora_E.to(x.dtype))  # [..., r]
        return add_product(base, inner, self.lora_B)


class Propulsion(Adapter):
    """delta(x) = W x * ((1 + z)^degree - 1) (Kowsher et al. 2024), one z an output."""

    def __init__(self, in_features: int, out_features: int, config: MonkeyJumpConfig, device: torch.device) -> None:
        super().__init__(in_features, out_features, config, device)
        self.degree = config.degree
        # Departure: z is the deviation from 1, so that weight decay leads back to the identity.
        self.propulsion = nn.Parameter(torch.zeros(out_features, device=device))

    def forward(self, x: Tensor, base: Tensor, gate: Tensor | float) -> Tensor:
        pushed = base * ((1.0 + self.propulsion) ** self.degree).to(base.dtype)
        return torch.lerp(base, pushed, gate)  # (1 - gate) base + gate pushed: keeps base for backward, nothing else


def add_product(base: Tensor, inner: Tensor, weight: Tensor) -> Tensor:
    """base [..., out] + inner [..., r] weight^T, weight [out, r], as one operation without a temporary."""
    flat = torch.addmm(base.reshape(-1, base.shape[-1]), inner.reshape(-1, inner.shape[-1]), weight.to(base.dtype).t())
    return flat.view(base.shape)


ADAPTERS: dict[str, type[Adapter]] = {"lora": LoRA, "lorafa": LoRAFA, "adalora": AdaLoRA, "propulsion": Propulsion}


# ------------------------------------------------------------------------------------------------------------ router


class Call(NamedTuple):
    """One call of a block: all that its projections need, also when a checkpoint runs them again."""

    gates: Tensor  # [B, N, E] times the adapters' scale, in the dtype of the block's input
    tokens: int  # T
    centers: Tensor  # [E, D] at the time of the call


class Routing:
    """The object that a block's router and adapters share. It is no module: back-references stay off the tree."""

    def __init__(self, router: Router, scale: float) -> None:
        self.router, self.scale = router, scale
        self.call: Call | None = None

    def gate(self, call: Call, x: Tensor, expert: int, foreign: bool) -> Tensor:
        """Gates [..., 1] of `expert` for a projection's input x [..., in], whatever its shape."""
        gates, tokens = call.gates[..., expert], call.tokens  # [B, N]
        if foreign and gates.shape[1] != 1:  # cross-attention: encoder states are tokens of their own, by token
            return self.router.gates(x, call.centers)[..., expert, None].to(x.dtype)
        shape, block_shape = x.shape[:-1], (gates.shape[0], tokens)
        if foreign:
            return gates.reshape(-1, *[1] * (x.dim() - 1))
        if shape == block_shape:
            return gates[..., None]
        if shape == (gates.shape[0] * tokens,) or shape == (gates.shape[0], 1, tokens):
            return gates.expand(block_shape).reshape(*shape, 1)
        raise ValueError(
            f"a projection of block {self.router.name!r} sees tokens of shape {list(shape)}, its block {block_shape}; "
            "the gates cannot be matched: leave this projection out of linears"
        )


class Router(nn.Module):
    """The gradient-free router of one block: it owns the centers and what was seen since they last moved."""

    def __init__(
        self, name: str, experts: list[str], width: int, stack: Stack, config: MonkeyJumpConfig, device: torch.device
    ) -> None:
        super().__init__()
        self.name, self.experts, self.stack, self.config = name, experts, stack, config
        self.routing = Routing(self, ADAPTERS[config.adapter].scale(config))
        self.register_buffer("centers", unit(torch.randn(len(experts), width, device=device)))
        self._reset_statistics()

    def _reset_statistics(self) -> None:
        # Plain tensors: DDP would overwrite buffers with those of rank 0 at each forward pass.
        experts, width = self.centers.shape
        self.statistics = torch.zeros(experts, width + 2, device=self.centers.device)  # since the last fold
        self.report = torch.zeros(experts, 3, device=self.centers.device)  # count, gate mass, cosine; since reset

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        super()._apply(fn, recurse)
        if self.statistics.device != self.centers.device:
            self._reset_statistics()
        return self

    def attach(self, block: nn.Module) -> None:
        block.monkeyjump = self
        self.handles = [block.register_forward_pre_hook(self.enter, with_kwargs=True)]

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the block. In a checkpoint's recomputation the first pass's calls are replayed."""
        tape = self.stack.tape
        if tape is not None and tape.replaying:
            self.routing.call = next(tape.replaying)
            return
        self.routing.call = self.call(*self.observe(args, kwargs)) if self.stack.enabled else None
        if tape is not None:
            tape.calls.append(self.routing.call)

    @torch.no_grad()
    def observe(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        """The block's input -> hidden [B, T, D], unit representations [B, N, D], which of them are real [B, N]."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.dim() == 2:  # Qwen-VL's vision blocks: packed patches [N, D], one sequence
            hidden = hidden[None]
        elif hidden.dim() == 4:  # gemma3n: [4, B, T, D], of which stream 0 is the one that attention sees
            hidden = hidden[0]
        if hidden.dim() != 3 or hidden.shape[-1] != self.centers.shape[-1]:
            raise ValueError(
                f"block {self.name!r} got hidden states of shape {list(hidden.shape)}; its router was made for "
                f"[batch, tokens, {self.centers.shape[-1]}]"
            )
        real, prompt_end = self.stack.positions(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            representations, valid = represent(hidden, self.config.rep_mode, real, prompt_end)
            return hidden, unit(representations), valid

    @torch.no_grad()
    def gates(self, x: Tensor, centers: Tensor) -> Tensor:
        """Gates [..., E] of tokens that are not the block's own, x [..., D] (cross-attention keys and values)."""
        with torch.autocast(x.device.type, enabled=False):
            return route(unit(x), centers, self.config.top_k, self.config.temperature)[0] * self.routing.scale

    @torch.no_grad()
    def call(self, hidden: Tensor, representations: Tensor, valid: Tensor | None) -> Call:
        """Route one call of the block; in training, add what it saw to the statistics."""
        config, centers = self.config, unit(self.centers)
        kept = self.stack.kept(self.name, hidden)
        if kept is not None:
            return Call(kept, hidden.shape[1], centers)
        with torch.autocast(hidden.device.type, enabled=False):
            noise = config.jitter_noise if self.training else 0.0
            gates, experts = route(representations, centers, config.top_k, config.temperature, noise)
            if self.stack.collecting:
                flat = [None if t is None else t.flatten(0, 1) for t in (representations, experts, gates, valid)]
                self.statistics.add_(cluster_statistics(*flat))
            return Call((gates * self.routing.scale).to(hidden.dtype), hidden.shape[1], centers)


class Tape:
    """The calls of the blocks inside one checkpointed function: recorded the first time, replayed ever after."""

    def __init__(self) -> None:
        self.calls: list[Call | None] = []
        self.replaying: Iterator[Call | None] | None = None


class Checkpoint:
    """Stands in for a module's `_gradient_checkpointing_func`: each checkpointed call keeps the routing it began with.

    Hooks of a block run inside the checkpointed function up to transformers 5.22 and before it from 5.23; other
    forwards, or the next step's centers, may come between the forward pass and the recomputation.
    """

    def __init__(self, function: Callable[..., Any], stack: Stack) -> None:
        self.function, self.stack = function, stack

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a compiled graph carries the gates as tensors
            return self.function(function, *args, **kwargs)
        bound = getattr(function, "func", function)  # a partial of block.__call__, or of forward with the block first
        block = getattr(bound, "__self__", None) or function.args[0]
        routing = block.monkeyjump.routing if isinstance(getattr(block, "monkeyjump", None), Router) else Routing(None, 1)
        tape, before = Tape(), routing.call

        def run(*inputs: Any) -> Any:
            outer, self.stack.tape, current, routing.call = self.stack.tape, tape, routing.call, before
            try:
                return function(*inputs)
            finally:
                tape.replaying = iter(tape.calls)
                self.stack.tape, routing.call = outer, current

        return self.function(run, *args, **kwargs)


class Stack:
    """What one pass through a list of blocks shares: mask, prompt end, cache, and the step from pass to pass."""

    def __init__(self, owner: nn.Module, config: MonkeyJumpConfig) -> None:
        self.config = config
        self.routers: list[Router] = []
        self.blocks: list[nn.Module] = []
        self.mask_index = _argument_index(owner, "attention_mask")
        self.enabled, self.collecting = True, False
        self.tape: Tape | None = None
        self.cache: Any = None
        self.mask: Any = None
        self.root: dict[str, Any] = {}
        self.real: Tensor | None = None
        self.resolved = False
        self.owner = owner
        # Counts training forwards, as a tensor: a Python counter would recompile a compiled model at every step.
        owner.register_buffer("monkeyjump_forwards", torch.zeros((), dtype=torch.long, device=_device(owner)))
        self.handles = [
            owner.register_forward_pre_hook(self.enter, with_kwargs=True),
            owner.register_forward_hook(self.leave, with_kwargs=True),
        ]

    def enter(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the module that runs the blocks."""
        self.collecting = owner.training and torch.is_grad_enabled() and self.enabled
        root, self.root = self.root, {}
        own_mask = kwargs.get("attention_mask", args[self.mask_index] if len(args) > self.mask_index else None)
        root_mask = root.get("attention_mask")
        self.mask = root_mask if not _is_2d(own_mask) and _is_2d(root_mask) else own_mask
        self.labels, self.prompt_end = root.get("labels"), root.get("prompt_end")
        self.cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        self.resolved = False
        if self.collecting:
            self.fold(owner.monkeyjump_forwards)
        if not torch.compiler.is_compiling():  # enabling checkpointing, at any time, sets the function anew
            for module in (owner, *self.blocks):
                function = module.__dict__.get("_gradient_checkpointing_func")
                if function is not None and not isinstance(function, Checkpoint):
                    module._gradient_checkpointing_func = Checkpoint(function, self)

    def positions(self, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """hidden [B, T, D] -> real tokens, bool [B, T] or None (all), and the prompt's end [B] or None."""
        if not self.resolved:
            self.real = real_tokens(self.mask, hidden)
            self.end = None
            if self.config.rep_mode == "prompt_end":
                self.end = prompt_end_positions(self.prompt_end, self.labels, self.mask, self.real, hidden)
            self.resolved = True
        return tuple(None if t is None else t.to(hidden.device) for t in (self.real, self.end))

    def kept(self, name: str, hidden: Tensor) -> Tensor | None:
        """Gates [B, 1, E] of the prompt, for a token decoded after it in a sequence mode.

        Departure: decoding reuses the prompt's routing; a single new token is no sequence to route by.
        """
        if self.config.rep_mode == "token" or hidden.shape[1] > 1 or self.cache is None:
            return None
        gates = getattr(self.cache, "monkeyjump_gates", {}).get(name)
        return gates if gates is not None and gates.shape[0] == hidden.shape[0] else None

    def leave(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of the module that runs the blocks: the gates live and die with the cache."""
        if self.config.rep_mode == "token" or owner.training or not self.enabled:
            return
        cache = self.cache
        for name in CACHE_NAMES:
            cache = cache if cache is not None else getattr(output, name, None)
        if isinstance(output, tuple) and cache is None:
            cache = next((item for item in output if hasattr(item, "get_seq_length")), None)
        if cache is not None:
            cache.monkeyjump_gates = {router.name: router.routing.call.gates for router in self.routers}

    @torch.no_grad()
    def fold(self, forwards: Tensor) -> None:
        """Statistics of the forwards so far become centers, if this forward is due; all decided by tensors."""
        # Departure: between steps and not inside a forward, so that checkpointing and DDP see the same centers.
        due = (forwards > 0) & (forwards % self.config.update_every == 0)
        if self.config.update_until is not None:
            due = due & (forwards <= self.config.update_until)
        groups: dict[Any, list[Router]] = {}
        for router in self.routers:
            groups.setdefault((router.centers.device, router.centers.shape), []).append(router)
        for (device, _), routers in groups.items():
            here = due.to(device)
            statistics = torch.stack([router.statistics for router in routers])  # [L, E, D + 2]
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(statistics)
            centers = torch.stack([router.centers for router in routers]).float()  # [L, E, D]
            sums, counts = statistics[..., :-2], statistics[..., -2]
            cosine = einsum(sums, centers, "l e d, l e d -> l e")
            report = torch.cat([statistics[..., -2:], cosine[..., None]], dim=-1) * here
            moved = torch.where(here, ema_update(centers, sums, counts, self.config.ema_momentum), centers)
            torch._foreach_copy_([router.centers for router in routers], list(moved.unbind()))
            torch._foreach_add_([router.report for router in routers], list(report.unbind()))
            torch._foreach_mul_([router.statistics for router in routers], (~here).float())
        forwards.add_(1)


def real_tokens(mask: Any, hidden: Tensor) -> Tensor | None:
    """Which of the T tokens of hidden [B, T, D] are real: bool [B, T], or None if no mask says otherwise.

    mask is what a model is called with: None; 2-D [B, S], of which the last T columns are these tokens; 4-D [B, 1, T, S]
    bool or additive; or a dict of those by kind of layer. Raises ValueError for any other shape.
    """
    if isinstance(mask, dict):
        masks = [m for m in mask.values() if m is not None]
        mask = next((m for m in masks if _is_2d(m)), masks[0] if masks else None)
    if mask is None:
        return None
    batch, tokens = hidden.shape[:2]
    if _is_2d(mask) and mask.shape[0] == batch and mask.shape[1] >= tokens:
        return mask[:, -tokens:] != 0
    if mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[2] == tokens:
        allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0  # [B, T, S]
        # A real token attends to itself, a padding token to nothing: read the diagonal that ends where the last
        # token's row ends (a static cache goes on behind it).
        columns = torch.arange(1, mask.shape[-1] + 1, device=mask.device)
        last = mask.shape[-1] - 1 if mask.shape[-1] == tokens else (allowed[:, -1] * columns).argmax(-1)[:, None]
        own = torch.arange(1 - tokens, 1, device=mask.device) + last  # [B, T] or [T]
        own = own.expand(allowed.shape[0], tokens)[..., None]
        return allowed.gather(2, own)[..., 0].expand(batch, tokens)
    raise ValueError(
        f"attention_mask of shape {list(mask.shape)} does not fit hidden states of batch {batch} and {tokens} tokens"
    )


def prompt_end_positions(
    prompt_end: Any, labels: Tensor | None, mask: Any, real: Tensor | None, hidden: Tensor
) -> Tensor | None:
    """Position [B] of the last prompt token: as given, else before the first label that is not -100, else None."""
    batch, tokens = hidden.shape[:2]
    if prompt_end is not None:
        past = mask.shape[1] - tokens if _is_2d(mask) else 0
        return torch.as_tensor(prompt_end, device=hidden.device) - past
    if labels is None or labels.shape != (batch, tokens):
        return None
    answer = labels != -100
    steps = torch.arange(1, tokens + 1, device=labels.device)
    real = torch.ones_like(answer) if real is None else real.to(labels.device)
    first, last = real.int().argmax(dim=1), (real * steps).argmax(dim=1)
    before = torch.maximum(answer.int().argmax(dim=1) - 1, first)  # an answer without a prompt: its first token
    return torch.where(answer.any(dim=1), before, last)


# -------------------------------------------------------------------------------------------- the parts of the model


def _is_2d(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _argument_index(module: nn.Module, name: str) -> int:
    """Position of `name` among the arguments of the module's forward; past every position if it has none."""
    names = list(inspect.signature(module.forward).parameters)
    return names.index(name) if name in names else 10**6


def features(layer: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a dense linear layer of any kind, quantised ones included; None for anything else."""
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return layer.in_features, layer.out_features
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):  # GPT-2: weight [in, out]
        return layer.weight.shape[0], layer.weight.shape[1]
    return None


def block_linears(block: nn.Module) -> dict[str, nn.Module]:
    """Every dense linear of a block by its path."""
    return {path: module for path, module in block.named_modules() if features(module)}


# What a token mixer asks for and a feed-forward does not: who else is there (masks, caches, positions of other tokens).
MIXER_ARGUMENTS = re.compile(r"mask|cache|past|rotary|position_emb|seqlens|attentions|^state$")
# Routers and indexers choose by top-k, so no gradient comes back; mamba's dt_proj is never called, its weight is read.
NOT_A_PROJECTION = re.compile(r"mlp|ffn|feed_forward|router|indexer|dt_proj")
# Keys and values of cross-attention see the tokens of another stack (encoder, images), not the block's.
FOREIGN = re.compile(r"(cross_?att|encoder_(decoder_)?att|EncDecAtt).*\.(k|v|key|value|kv)(_proj|_lin)?$")


def language_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of the language model: of both stacks of an encoder-decoder, without vision or audio towers.

    A language model is recognised by what it reads, tokens: from each embedding of the vocabulary's size climb until
    there are lists of blocks below, and take the nearest ones (a tower beside them lies deeper). Hybrid lists are kept
    whole; a block that serves at several depths is named once.
    """
    modules = dict(model.named_modules())
    tokens = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    vocabulary = getattr(getattr(tokens, "weight", None), "shape", [None])[0]
    lists = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.ModuleList) and any(attention_linears(block) for block in module)
    ]
    chosen = set()
    for name, module in modules.items():
        if module is tokens or isinstance(module, nn.Embedding) and len(module.weight) == vocabulary:
            below: list[str] = []
            while name and not below:
                name = name.rpartition(".")[0]
                below = [path for path in lists if not name or path.startswith(name + ".")]
            nearest = min((path.count(".") for path in below), default=0)
            chosen |= {path for path in below if path.count(".") == nearest}
    return {name: module for name, module in modules.items() if name.rpartition(".")[0] in chosen}


def attention_linears(block: nn.Module) -> list[str]:
    """Paths of the dense linears of the block's attention, or of its counterpart: mixer, SSM, convolution."""
    mixers = tuple(
        name + "."
        for name, module in block.named_modules()
        if name and any(MIXER_ARGUMENTS.search(p) for p in inspect.signature(type(module).forward).parameters)
    )
    return [name for name in block_linears(block) if name.startswith(mixers) and not NOT_A_PROJECTION.search(name)]


def block_width(model: nn.Module, block: nn.Module, is_text: bool) -> int:
    """D of the block's input: the language model's width, or that of the first linear of any other block."""
    if is_text and hasattr(model, "config"):
        return model.config.get_text_config(decoder=True).hidden_size
    return features(next(iter(block_linears(block).values())))[0]


# ---------------------------------------------------------------------------------------------------------- wiring


class State:
    """What apply_monkeyjump leaves on the model: the root hook, and the way back."""

    def __init__(self, model: nn.Module, config: MonkeyJumpConfig) -> None:
        self.config = config
        self.stacks: list[Stack] = []
        self.text_stack: Stack | None = None
        self.routers: dict[str, Router] = {}
        self.adapters: dict[str, Adapter] = {}
        self.trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self.mask_name = "decoder_attention_mask" if encoder_decoder else "attention_mask"
        self.mask_index = _argument_index(model, self.mask_name)
        self.labels_index = _argument_index(model, "labels")
        self.handles = [model.register_forward_pre_hook(self.enter, with_kwargs=True)]

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Forward pre-hook of the model: the 2-D mask, the labels and `prompt_end`, which only the model itself sees."""
        kwargs = dict(kwargs)
        prompt_end = kwargs.pop("prompt_end", None)
        if self.text_stack is not None:
            self.text_stack.root = {
                "attention_mask": _argument(args, kwargs, self.mask_name, self.mask_index),
                "labels": _argument(args, kwargs, "labels", self.labels_index),
                "prompt_end": prompt_end,
            }
        return args, kwargs


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], name: str, index: int) -> Any:
    return args[index] if index < len(args) else kwargs.get(name)


def _state(model: nn.Module) -> tuple[nn.Module, State]:
    """The adapted module inside whatever wraps it (DDP, torch.compile, ...), and its state."""
    for module in model.modules():
        if isinstance(module.__dict__.get("_monkeyjump"), State):
            return module, module._monkeyjump
    raise ValueError(f"this {type(model).__name__} carries no Monkey Jump: call apply_monkeyjump first")


def _names(value: str | Iterable[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _find_blocks(model: nn.Module, blocks: dict[str, Iterable[int]] | None) -> dict[str, nn.Module]:
    """Blocks to adapt by their path in the model, in the model's order."""
    if blocks is None:
        found = language_blocks(model)
        if not found:
            raise ValueError(f"no list of repeated blocks found in {type(model).__name__}: name their class in blocks")
        return found
    chosen = {}
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    existing = sorted({type(block).__name__ for blocks_ in lists for block in blocks_})
    for class_name, indices in blocks.items():
        matches = [(path, m) for path, m in model.named_modules() if type(m).__name__ == class_name]
        if not matches:
            raise ValueError(f"blocks: no {class_name!r} in this model; its block classes: {', '.join(existing)}")
        for index in indices:
            if not _is_int(index, 0) or index >= len(matches):
                raise ValueError(f"blocks: {class_name!r} index {index!r} must be an integer in [0, {len(matches)})")
            chosen[matches[index][0]] = matches[index][1]
    if not chosen:
        raise ValueError(f"blocks={blocks!r} names no block; this model's block classes: {', '.join(existing)}")
    return {path: module for path, module in model.named_modules() if path in chosen}


def _match(block_paths: Iterable[str], names: list[str]) -> list[str]:
    """Paths that end in one of the names, in the order of the names, then as found."""
    paths = list(block_paths)
    return list(dict.fromkeys(p for name in names for p in paths if f".{p}".endswith(f".{name}")))


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
    """Freeze the model and make adapters on its blocks' projections the experts of a gradient-free router, in place.

    Args:
        model: any causal, vision-language or encoder-decoder model.
        blocks: block class names and which of each to adapt, {"LlamaDecoderLayer": range(32)}; None: every block of
            the language model.
        linears: leaf names or dotted suffixes ("attn.c_proj"); each match in a block is an expert of its own. None:
            the linears of the attention, or of what stands in its place.
        shared_expert: names of projections whose adapter is always on.
        adapter: "lora", "lorafa", "adalora", "propulsion", a name in `ADAPTERS`, or a subclass of `Adapter`.
        rank: r >= 1.
        alpha: adapters of the LoRA family are scaled by alpha / rank.
        dropout: in [0, 1), on the input of adapters of the LoRA family, in training.
        degree: power of propulsion, >= 1.
        top_k: experts a token (or sequence) uses, >= 1.
        temperature: of the softmax over cosines, > 0.
        ema_momentum: weight of the old center in each update, in [0, 1].
        rep_mode: what is routed: "token" each token; "last", "mean", "prompt_end" each sequence, by its last real
            token, the mean of its real tokens, or its last prompt token.
        jitter_noise: in [0, 1), multiplies the logits by uniform noise in training.
        update_every: centers move every so many training forwards.
        update_until: centers stay from this many training forwards on; None: never.

    Returns:
        the same model; only adapter parameters (float32) require gradients.

    Raises:
        ValueError: before anything is changed; says what was given, what is allowed, and what there is.
    """
    if any("_monkeyjump" in module.__dict__ for module in model.modules()):
        raise ValueError("this model carries Monkey Jump already: call remove_monkeyjump first")
    if isinstance(adapter, type) and issubclass(adapter, Adapter):
        ADAPTERS.setdefault(adapter.__name__, adapter)
        adapter = adapter.__name__
    chosen = _find_blocks(model, blocks)
    shared_names = _names(shared_expert)
    plan: dict[str, tuple[list[str], list[str]]] = {}  # block path -> paths of experts, paths of shared projections
    for block_path, block in chosen.items():
        shared = _match(block_linears(block), shared_names)
        routed = attention_linears(block) if linears is None else _match(block_linears(block), _names(linears))
        plan[block_path] = [path for path in routed if path not in shared], shared
    available = sorted({path for block in chosen.values() for path in block_linears(block)})
    for option, names in (("linears", _names(linears)), ("shared_expert", shared_names)):
        for name in names:
            if not _match(available, [name]):
                raise ValueError(f"{option}: no linear {name!r} in these blocks; there are: {', '.join(available)}")
    indices: dict[str, list[int]] = {}
    seen: dict[str, int] = {}
    for path, module in model.named_modules():
        name = type(module).__name__
        if path in chosen:
            indices.setdefault(name, []).append(seen.get(name, 0))
        seen[name] = seen.get(name, 0) + 1
    config = MonkeyJumpConfig(
        blocks=indices,
        linears=list(dict.fromkeys(p for routed, _ in plan.values() for p in routed))
        if linears is None
        else _names(linears),
        shared_expert=shared_names,
        adapter=adapter,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        degree=degree,
        top_k=top_k,
        temperature=temperature,
        ema_momentum=ema_momentum,
        rep_mode=rep_mode,
        jitter_noise=jitter_noise,
        update_every=update_every,
        update_until=update_until,
    )
    most = max(len(routed) for routed, _ in plan.values())
    if top_k > most:
        raise ValueError(f"top_k={top_k}: no block has that many experts; the most is {most} of {', '.join(available)}")

    state = model._monkeyjump = State(model, config)
    model.requires_grad_(False)
    text_blocks = list(language_blocks(model).values())
    stacks: dict[str, Stack] = {}
    for block_path, (routed, shared) in plan.items():
        if not routed and not shared:
            continue
        block = chosen[block_path]
        owner_path = block_path
        while True:
            owner_path = owner_path.rpartition(".")[0]
            owner = model.get_submodule(owner_path)
            if not isinstance(owner, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
                break
        if owner_path not in stacks:
            stacks[owner_path] = Stack(owner, config)
        stack = stacks[owner_path]
        is_text = any(block is text for text in text_blocks)
        if is_text:
            state.text_stack = stack  # of an encoder-decoder model, the decoder comes last
        width = block_width(model, block, is_text)
        router = Router(block_path, routed, width, stack, config, _device(block))
        for path in routed + shared:
            layer = block.get_submodule(path)
            expert = routed.index(path) if path in routed else None
            module = ADAPTERS[config.adapter](*features(layer), config, _device(layer))
            module.attach(layer, router.routing, expert, bool(FOREIGN.search(path)))
            state.adapters[f"{block_path}.{path}"] = module
        router.attach(block)
        stack.routers.append(router)
        stack.blocks.append(block)
        state.routers[block_path] = router
    state.stacks = list(stacks.values())
    return model


# ------------------------------------------------------------------------------------------------------- life cycle


@torch.no_grad()
def init_router_centers(
    model_or_trainer: Any,
    dataloader: Iterable[Any] | None = None,
    *,
    subset_size: int = 4000,
    kmeans_iters: int = 15,
    rep_mode: str | None = None,
    seed: int = 0,
) -> None:
    """Set the centers of every block by k-means on the data (Monkey Jump, section 3).

    One pass over just enough batches collects `subset_size` representations a block: 4 * subset_size * width * blocks
    bytes, 344 MB for 4000 of width 896 in 24 blocks; the clustering takes about as much again.

    Args:
        model_or_trainer: an adapted model, or a transformers Trainer of one.
        dataloader: batches that the model takes; None with a Trainer: its training batches.
        subset_size: representations (real tokens or sequences) a block, over all ranks; at most an eighth from a batch.
        kmeans_iters: Lloyd iterations after greedy k-means++ seeding.
        rep_mode: None, or the applied one (checked).
        seed: of the choice of tokens and of k-means.

    Raises:
        ValueError: nothing to do it with (no Monkey Jump, no batches, fewer representations than experts), or another
            rep_mode than the applied one. The centers stay as they were.
    """
    from tqdm.auto import tqdm

    if hasattr(model_or_trainer, "get_train_dataloader"):
        dataloader = model_or_trainer.get_train_dataloader() if dataloader is None else dataloader
        model_or_trainer = model_or_trainer.model
    model, (_, state) = model_or_trainer, _state(model_or_trainer)
    if rep_mode not in (None, state.config.rep_mode):
        raise ValueError(f"rep_mode={rep_mode!r}: the model was adapted with rep_mode={state.config.rep_mode!r}")
    if not _is_int(subset_size, 1) or not _is_int(kmeans_iters, 0):
        raise ValueError(f"subset_size={subset_size!r} and kmeans_iters={kmeans_iters!r}: must be integers >= 1 and >= 0")
    if dataloader is None:
        raise ValueError("dataloader=None: pass the batches to look at (only a Trainer brings its own)")
    routers = [router for router in state.routers.values() if router.experts]
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    wanted = -(-subset_size // world)
    quota = -(-wanted // max(1, min(8, len(dataloader) if hasattr(dataloader, "__len__") else 8)))
    points: dict[str, list[Tensor]] = {router.name: [] for router in routers}

    def collect(router: Router) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _, found, valid = router.observe(args, kwargs)
            found = found.flatten(0, 1) if valid is None else found[valid]
            have = sum(map(len, points[router.name]))
            order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed + have))
            points[router.name].append(found[order[: min(quota, wanted - have)].to(found.device)])

        return hook

    blocks = [block for stack in state.stacks for block in stack.blocks]
    training = {module: module.training for module in model.modules()}
    handles = [
        block.register_forward_pre_hook(collect(block.monkeyjump), with_kwargs=True)
        for block in blocks
        if block.monkeyjump.experts
    ]
    try:
        model.eval()
        with torch.random.fork_rng(), tqdm(total=wanted, desc="k-means: representations", leave=False) as bar:
            for batch in dataloader:
                _run(model, batch)
                bar.update(min(sum(map(len, kept)) for kept in points.values()) - bar.n)
                if bar.n >= wanted:
                    break
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode

    groups: dict[Any, list[Router]] = {}
    for router in routers:
        groups.setdefault((router.centers.device, router.centers.shape, len(points[router.name])), []).append(router)
    new: list[tuple[list[Router], Tensor]] = []
    for (_, (experts, _), batches), members in groups.items():
        if not batches:
            raise ValueError("the dataloader gave no batches: there is nothing to cluster")
        sets = torch.stack([torch.cat(points[router.name]) for router in members])  # [L, N, D]
        sets = sets[:, reduce(sets, "l n d -> n", "sum").isfinite()]
        if world > 1:
            least = torch.tensor(sets.shape[1], device=sets.device)
            dist.all_reduce(least, dist.ReduceOp.MIN)
            gathered = [torch.empty_like(sets[:, : int(least)]) for _ in range(world)]
            dist.all_gather(gathered, sets[:, : int(least)].contiguous())
            sets = torch.cat(gathered, dim=1)
        if sets.shape[1] < experts:
            raise ValueError(f"{sets.shape[1]} representations for {experts} experts: give more data")
        centers = kmeans(sets, experts, kmeans_iters, torch.Generator().manual_seed(seed))
        if world > 1:
            dist.broadcast(centers, 0)
        new.append((members, centers))
    for members, centers in new:
        for router, router_centers in zip(members, centers, strict=True):
            router.centers.copy_(router_centers)


def _run(model: nn.Module, batch: Any) -> None:
    """One forward pass on a batch of any usual form, on the model's device."""
    device = _device(model)
    if isinstance(batch, Tensor):
        model(batch.to(device))
    elif hasattr(batch, "items"):
        model(**{name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()})
    else:
        model(*[value.to(device) if isinstance(value, Tensor) else value for value in batch])


def monkeyjump_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Adapter tensors, centers and step counts by name, and nothing of the base model (FSDP2: gathered, on all ranks)."""
    root, state = _state(model)
    tensors = {}
    for name, tensor in root.state_dict().items():
        if ".monkeyjump." in f".{name}" or name.endswith("monkeyjump_forwards"):
            tensors[name] = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensors


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` into directory, made if it does not exist.

    Each file is replaced as a whole, and the weights carry a copy of their config, so that a kill at any moment leaves
    an adapter that loads: the old one or the new one.
    """
    from safetensors.torch import save_file

    _, state = _state(model)
    tensors = {n: t.detach().cpu().contiguous() for n, t in monkeyjump_state_dict(model).items() if not _is_training(n)}
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(state.config)}, indent=2) + "\n"
    old = directory / CONFIG_NAME
    replaces = hashlib.sha256(old.read_bytes()).hexdigest() if old.exists() else ""
    weights = directory / f"{WEIGHTS_NAME}.tmp"
    save_file(tensors, weights, metadata={"format": "pt", "config": config, "replaces": replaces})
    _replace(weights, directory / WEIGHTS_NAME)
    temporary = directory / f"{CONFIG_NAME}.tmp"
    temporary.write_text(config)
    _replace(temporary, old)


def _is_training(name: str) -> bool:
    """Whether a tensor serves training alone (AdaLoRA's importance)."""
    return name.rpartition(".")[2].startswith(("sensitivity_", "uncertainty_"))


def _replace(temporary: Path, target: Path) -> None:
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)


def load_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> nn.Module:
    """Load what `save_adapter` wrote, into a plain base model (adapted here) or one adapted with the same config.

    Raises:
        ValueError: a file is missing, cut short or of another format; a config field is unknown, missing or invalid; a
            tensor is missing, too many or of another shape. The model stays as it was.
    """
    from safetensors import SafetensorError, safe_open

    directory = Path(directory)
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        if not (directory / name).is_file():
            raise ValueError(f"{directory}: no {name}")
    try:
        with safe_open(directory / WEIGHTS_NAME, framework="pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{directory / WEIGHTS_NAME}: not a complete safetensors file ({error})") from error
    text = (directory / CONFIG_NAME).read_bytes()
    if hashlib.sha256(text).hexdigest() == metadata.get("replaces"):  # killed between the two replacements
        text = metadata["config"].encode()
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG_NAME}: not JSON ({error})") from error
    config = _parse_config(fields, directory / CONFIG_NAME)
    applied = any("_monkeyjump" in module.__dict__ for module in model.modules())
    if applied:
        ours = dataclasses.asdict(_state(model)[1].config)
        for name, value in dataclasses.asdict(config).items():
            if ours[name] != value:
                raise ValueError(f"{directory}: saved with {name}={value!r}, the model has {name}={ours[name]!r}")
    else:
        apply_monkeyjump(model, **dataclasses.asdict(config))
    try:
        own = {name: t for name, t in monkeyjump_state_dict(model).items() if not _is_training(name)}
        for problem, names in (("lacks", own.keys() - tensors.keys()), ("has unknown", tensors.keys() - own.keys())):
            if names:
                raise ValueError(f"{directory / WEIGHTS_NAME} {problem} {len(names)} tensors: {sorted(names)[0]}, ...")
        for name, tensor in own.items():
            if tensors[name].shape != tensor.shape:
                given, needed = list(tensors[name].shape), list(tensor.shape)
                raise ValueError(f"{directory / WEIGHTS_NAME}: {name} has shape {given}, the model needs {needed}")
    except ValueError:
        if not applied:
            remove_monkeyjump(model)
        raise
    _state(model)[0].load_state_dict(tensors, strict=False)
    return model


def _parse_config(fields: Any, path: Path) -> MonkeyJumpConfig:
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: must hold a JSON object, holds a {type(fields).__name__}")
    version = fields.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version={version!r}, this monkeyjump.py reads {FORMAT_VERSION}")
    known = {field.name for field in dataclasses.fields(MonkeyJumpConfig)}
    for problem, names in (("unknown", fields.keys() - known), ("missing", known - fields.keys())):
        if names:
            raise ValueError(f"{path}: {problem} field {sorted(names)[0]!r}; the fields are {', '.join(sorted(known))}")
    try:
        return MonkeyJumpConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within it the model gives the base model's own output, exactly; for a reference pass, as in DPO."""
    stacks = _state(model)[1].stacks
    before = [stack.enabled for stack in stacks]
    for stack in stacks:
        stack.enabled = False
    try:
        yield
    finally:
        for stack, enabled in zip(stacks, before, strict=True):
            stack.enabled = enabled


def remove_monkeyjump(model: nn.Module) -> nn.Module:
    """Take everything off again: the base model, bit for bit, with the gradients it required."""
    root, state = _state(model)
    for part in (state, *state.stacks, *state.routers.values(), *state.adapters.values()):
        for handle in part.handles:
            handle.remove()
    for stack in state.stacks:
        del stack.owner.monkeyjump_forwards
        for module in (stack.owner, *stack.blocks):
            function = module.__dict__.get("_gradient_checkpointing_func")
            if isinstance(function, Checkpoint):
                module._gradient_checkpointing_func = function.function
    for name in (*state.routers, *state.adapters):
        del root.get_submodule(name).monkeyjump
    del root._monkeyjump
    for name, parameter in root.named_parameters():
        parameter.requires_grad_(name in state.trainable)
    return model


def print_trainable_parameters(model: nn.Module) -> str:
    """Print, and return, the numbers of trainable and of all parameters."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    line = f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"
    print(line)
    return line


def router_statistics(model: nn.Module, reset: bool = False) -> dict[str, dict[str, Any]]:
    """What each block's experts received in training forwards since the last reset (and over all ranks, once folded).

    Returns:
        by block: experts (names), count (representations), share [E] (top-1), gate_mass [E] (both sum to 1), entropy of the
        shares in nats (log E: balanced), cosine [E] (mean of representations to their own center), and
        center_cosine [E, E].
    """
    result = {}
    for name, router in _state(model)[1].routers.items():
        sums, tallies = router.statistics[:, :-2], router.statistics[:, -2:]
        cosine = einsum(sums, router.centers.float(), "e d, e d -> e")
        count, mass, cosines = (router.report + torch.cat([tallies, cosine[:, None]], dim=1)).cpu().unbind(dim=1)
        share = count / count.sum().clamp(min=1.0)
        result[name] = {
            "experts": list(router.experts),
            "count": int(count.sum()),
            "share": share,
            "gate_mass": mass / mass.sum().clamp(min=1e-12),
            "entropy": float(torch.special.entr(share).sum()),
            "cosine": cosines / count.clamp(min=1.0),
            "center_cosine": (unit(router.centers) @ unit(router.centers).T).cpu(),
        }
        if reset:
            router.report.copy_(torch.cat([-tallies, -cosine[:, None]], dim=1))  # the next fold brings these again
    return result


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
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> None:
    """AdaLoRA's pruning (Zhang et al. 2023, section 3.2-3.3): once a step, after optimizer.step(), before zero_grad().

    The importance of a triplet (column of P, entry of L, row of Q) is smoothed sensitivity |w dL/dw| times smoothed
    uncertainty. The budget of triplets over all projections falls from rank to target_rank by a cubic schedule; the L of
    the least important are set to zero, and may recover until the final phase.

    Args:
        step: of the optimizer, from 1.
        total_steps: of the training run.
        target_rank: mean rank at the end, in (0, rank].
        initial_steps: without pruning, at the start.
        final_steps: at the end, with the choice fixed.
        interval: steps between prunings.
        beta1, beta2: smoothing of sensitivity and of uncertainty, in [0, 1).
    """
    adapters = [a for a in _state(model)[1].adapters.values() if isinstance(a, AdaLoRA)]
    if not adapters:
        raise ValueError("no AdaLoRA adapters on this model: apply_monkeyjump(adapter='adalora')")
    rank = adapters[0].lora_E.numel()
    if not 0 < target_rank <= rank or initial_steps + final_steps >= total_steps:
        raise ValueError(
            f"target_rank={target_rank}, initial_steps={initial_steps}, final_steps={final_steps}: need 0 < target_rank <= "
            f"{rank} and initial_steps + final_steps < total_steps={total_steps}"
        )
    scores = []
    for adapter in adapters:
        parts = []
        for name in ("A", "B", "E"):
            weight = getattr(adapter, f"lora_{name}")
            sensitivity, uncertainty = getattr(adapter, f"sensitivity_{name}"), getattr(adapter, f"uncertainty_{name}")
            if step < total_steps - final_steps and weight.grad is not None:
                now = (weight * weight.grad).abs()
                sensitivity.lerp_(now, 1.0 - beta1)
                uncertainty.lerp_((now - sensitivity).abs(), 1.0 - beta2)
            parts.append(sensitivity * uncertainty)
        scores.append(parts[2] + reduce(parts[0], "r i -> r", "mean") + reduce(parts[1], "o r -> r", "mean"))
    final = step >= total_steps - final_steps
    if step <= initial_steps or (step % interval and not final):
        return
    remaining = 0.0 if final else 1.0 - (step - initial_steps) / (total_steps - final_steps - initial_steps)
    start, target = rank * len(adapters), round(target_rank * len(adapters))
    budget = int(target + (start - target) * remaining**3)
    if budget < start:
        threshold = torch.cat(scores).kthvalue(start - budget).values
        for adapter, score in zip(adapters, scores, strict=True):
            adapter.lora_E.masked_fill_(score <= threshold, 0.0)


def orthogonal_regularization(model: nn.Module) -> Tensor:
    """Mean of ||P^T P - I|| and ||Q Q^T - I|| (Frobenius) over the AdaLoRA adapters; to add to the loss, scaled."""
    adapters = [a for a in _state(model)[1].adapters.values() if isinstance(a, AdaLoRA)]
    if not adapters:
        raise ValueError("no AdaLoRA adapters on this model: apply_monkeyjump(adapter='adalora')")
    identity = torch.eye(adapters[0].lora_E.numel(), device=adapters[0].lora_E.device)
    grams = [g for a in adapters for g in (a.lora_A @ a.lora_A.T, a.lora_B.T @ a.lora_B)]
    return torch.stack([torch.linalg.matrix_norm(gram - identity) for gram in grams]).mean()
