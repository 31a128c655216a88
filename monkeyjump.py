"""Monkey Jump: a mixture of experts made of the adapters that a Transformer block already has.

A block adapted the usual way carries one adapter on each of several projections (q, k, v, o, ...). Monkey Jump calls
them the experts and lets each token use only the top-k of them. The router has no trained parameter: it compares the
block's input with one k-means center an expert, and the centers follow the data by an exponential moving average.

    model(input_ids, attention_mask)
      stack         Stack.enter    note mask, labels, cache; fold the last forward's statistics into the centers
        block       Router.enter   h -> representations -> gates [B, N, E]; N = T (a token each) or 1 (a sequence each)
          linear    Adapter.hook   y = W x + gate_e * delta_e(x)
        block       ...            in training also: sums_e += unit(h), counts_e += 1 for the best expert e of each h
      stack         Stack.leave    a sequence's gates stay with its cache, for the tokens to be decoded

    model = apply_monkeyjump(model, linears=["q_proj", "k_proj", "v_proj", "o_proj"], rank=2, top_k=2)
    init_router_centers(model, dataloader)          # k-means on the data; then train as always
    save_adapter(model, "adapter");  model = load_adapter(base_model, "adapter")

    B, T, D  batch, tokens, width of the block's input h     c_e   center of expert e, a unit vector [D]
    E, k     experts of a block, experts used by a token     r     rank of an adapter; alpha / r scales it
    gate     softmax of cos(h, c_e) / temperature over the k most similar experts; 0 for the others

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
import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import einsum, reduce, repeat
from torch import Tensor, nn

REP_MODES = ("token", "last", "mean", "prompt_end")
CACHE_NAMES = ("past_key_values", "cache_params")  # the cache as a keyword, and as a field of the output
FORMAT_VERSION = 1


# ---------------------------------------------------------------------------------------------------- configuration


def _int_from(low: int) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= low


def _number(accept: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) and accept(v)


def _list_of(accept: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, list) and all(map(accept, v))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_blocks(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_list_of(_int_from(0)), value.values()))


def _option(accept: Callable[[Any], bool], allowed: str) -> Any:
    return dataclasses.field(metadata={"accept": accept, "allowed": allowed})


@dataclasses.dataclass(frozen=True)
class MonkeyJumpConfig:
    """The keywords of `apply_monkeyjump`, resolved and checked: what `adapter_config.json` holds. Raises ValueError."""

    blocks: dict[str, list[int]] = _option(_is_blocks, "a mapping of block class names to lists of indices")
    linears: list[str] = _option(_list_of(_is_name), "a list of names")
    shared_expert: list[str] = _option(_list_of(_is_name), "a list of names")
    adapter: str = _option(lambda v: _is_name(v) and v in ADAPTERS, "one of {adapters}")
    rank: int = _option(_int_from(1), "an integer >= 1")
    alpha: float = _option(_number(lambda v: v > 0), "a number > 0")
    dropout: float = _option(_number(lambda v: 0 <= v < 1), "a number in [0, 1)")
    degree: int = _option(_int_from(1), "an integer >= 1")
    top_k: int = _option(_int_from(1), "an integer >= 1")
    temperature: float = _option(_number(lambda v: v > 0), "a number > 0")
    ema_momentum: float = _option(_number(lambda v: 0 <= v <= 1), "a number in [0, 1]")
    rep_mode: str = _option(lambda v: v in REP_MODES, f"one of {', '.join(REP_MODES)}")
    jitter_noise: float = _option(_number(lambda v: 0 <= v < 1), "a number in [0, 1)")
    centered: bool = _option(lambda v: isinstance(v, bool), "True or False")
    min_share: float = _option(_number(lambda v: 0 <= v < 1), "a number in [0, 1)")
    update_every: int = _option(_int_from(1), "an integer >= 1")
    update_until: int | None = _option(lambda v: v is None or _int_from(0)(v), "None or an integer >= 0")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not field.metadata["accept"](value := getattr(self, field.name)):
                allowed = field.metadata["allowed"].format(adapters=", ".join(ADAPTERS))
                raise ValueError(f"{field.name}={value!r}: must be {allowed}")


# ------------------------------------------------------------------------------------------------------ mathematics


def unit(x: Tensor, mean: Tensor | None = None) -> Tensor:
    """x [..., D] -> its direction, of length 1 and at least float32; zero where x is zero (or too small) or not finite.

    With mean [D], the direction as seen from there: unit(unit(x) - mean), still zero where x has none.
    """
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    direction = (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)).nan_to_num_(0.0, 0.0, 0.0)
    return direction if mean is None else unit((direction - mean) * direction.any(dim=-1, keepdim=True))


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] @ weight [out, in]^T -> [..., out], in x's dtype."""
    return torch.mm(x.flatten(0, -2), weight.to(x.dtype).t()).view(*x.shape[:-1], -1)  # a fifth of einsum's overhead


def represent(
    hidden: Tensor, mode: str, real: Tensor | None = None, prompt_end: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """What the router looks at (Monkey Jump, section 3).

    Args:
        hidden: the block's input [B, T, D].
        mode: "token", "last", "mean" or "prompt_end".
        real: bool [B, T], False for padding; None: no padding.
        prompt_end: int [B], position of the last prompt token among the T; None: the last real token.

    Returns:
        representations [B, N, D], N = T for "token" and 1 otherwise; which are real, bool [B, N], or None for all.
    """
    if mode == "token":
        return hidden, real
    real = hidden.new_ones(hidden.shape[:2], dtype=torch.bool) if real is None else real
    if mode == "mean":
        total = reduce(hidden.float().masked_fill(~real[..., None], 0.0), "b t d -> b 1 d", "sum")
        return total / reduce(real.float(), "b t -> b 1 1", "sum").clamp(min=1.0), real.any(dim=1, keepdim=True)
    # Departure: the last *real* token, wherever the padding is; the authors' code supposes it on the right.
    position = last_true(real)
    if mode == "prompt_end" and prompt_end is not None:
        position = prompt_end.long().clamp(0, hidden.shape[1] - 1)
    index = repeat(position, "b -> b 1 d", d=hidden.shape[-1])
    return hidden.gather(1, index), real.any(dim=1, keepdim=True)


def last_true(real: Tensor) -> Tensor:
    """Index of the last True of each row: bool [..., T] -> int [...] (0 if there is none)."""
    return (real * torch.arange(1, real.shape[-1] + 1, device=real.device)).argmax(dim=-1)


def route(
    representations: Tensor, centers: Tensor, top_k: int, temperature: float = 1.0, jitter_noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Gates by cosine similarity: softmax over all experts, cut to the top k and divided by their sum.

    Args:
        representations: unit vectors [..., D], float32.
        centers: unit vectors [E, D], float32.
        top_k: experts used by a representation; all E if there are fewer.
        temperature: > 0; lower is sharper.
        jitter_noise: the logits are multiplied by noise uniform in 1 -/+ jitter_noise.

    Returns:
        gates [..., E], each row sums to 1, and the best expert [...] of each representation.
    """
    logits = product(representations, centers) / temperature
    if jitter_noise:
        logits = logits * torch.empty_like(logits).uniform_(1.0 - jitter_noise, 1.0 + jitter_noise)
    top, experts = logits.topk(min(top_k, centers.shape[0]), dim=-1)  # [..., k]; their softmax is p_e / sum of the k
    return torch.zeros_like(logits).scatter(-1, experts, top.softmax(dim=-1)), experts[..., 0]


def counted(representations: Tensor, real: Tensor | None) -> Tensor:
    """How often each of the unit vectors [N, D] counts [N]: once, or not at all (padding, or no direction)."""
    length = torch.linalg.vector_norm(representations, dim=-1)
    return length if real is None else length * real


def cluster_statistics(representations: Tensor, experts: Tensor, gates: Tensor, real: Tensor | None) -> Tensor:
    """What the moving average needs of one forward pass, in one matrix product.

    Args:
        representations: unit vectors [N, D]; zero vectors count for nothing.
        experts: best expert of each [N].
        gates: [N, E], each row sums to 1.
        real: bool [N] or None; padding counts for nothing.

    Returns:
        [E, D + E]: for each expert the sums of the vectors assigned to it and of their gates (in all, their number).
    """
    assigned = torch.zeros_like(gates).scatter(-1, experts[:, None], counted(representations, real)[:, None])  # [N, E]
    return assigned.t() @ torch.cat([representations, gates], dim=-1)


def ema_update(centers: Tensor, sums: Tensor, counts: Tensor, momentum: float) -> Tensor:
    """c_e <- normalize(m c_e + (1 - m) mean_e); an expert without representations keeps its center.

    Args:
        centers: [..., E, D], of length 1.
        sums: of the unit vectors assigned to each expert [..., E, D].
        counts: [..., E].
        momentum: m in [0, 1].

    Returns:
        the new centers [..., E, D], of length 1.
    """
    # Departure: the mean is of unit vectors; raw activations of norm 100 would replace a unit center at once.
    means = sums / counts.clamp(min=1.0)[..., None]
    return torch.where(counts[..., None] > 0, unit(momentum * centers + (1.0 - momentum) * means), centers)


def worst_served(representations: Tensor, centers: Tensor, real: Tensor | None) -> Tensor:
    """The representation that is least like its nearest center: [N, D], [E, D] -> [D + 1], the last being 1 - cos."""
    distance = 1.0 - product(representations, centers).amax(dim=-1)
    found = torch.cat([representations, distance[:, None]], dim=-1) * counted(representations, real)[:, None]
    return found[found[:, -1].argmax(dim=0, keepdim=True)][0]


def reseed(centers: Tensor, share: Tensor, worst: Tensor, min_share: float) -> tuple[Tensor, Tensor]:
    """Move the least used expert, if its share is below min_share, to the worst-served representation.

    As codebooks of vector quantisation are kept alive (Jukebox, Dhariwal et al. 2020, section 3.1). One a call, since
    two experts in one place would share their tokens.

    Args:
        centers: [..., E, D], of length 1.
        share: smoothed share of the representations [..., E]; starts anew at 1 / E for an expert that moves.
        worst: [..., D], of length 1; zero if there is none.
        min_share: in [0, 1).

    Returns:
        centers and shares, of the same shapes.
    """
    least = F.one_hot(share.argmin(dim=-1), share.shape[-1]).bool()
    dead = least & (share < min_share) & worst.any(dim=-1, keepdim=True)  # [..., E]
    return torch.where(dead[..., None], worst[..., None, :], centers), share.masked_fill(dead, 1.0 / share.shape[-1])


def kmeans(points: Tensor, clusters: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Spherical k-means of several sets at once: greedy k-means++ seeding, then Lloyd's iterations.

    Greedy seeding (Arthur and Vassilvitskii 2007) tries 2 + log(clusters) candidates a step and keeps the best. A
    cluster that runs empty moves to the worst-served point.

    Args:
        points: unit vectors [L, N, D], float32; L independent sets.
        clusters: E, at most N.
        iterations: >= 0.
        generator: on the CPU, so that a seed draws the same on every device.

    Returns:
        centers [L, E, D], of length 1.
    """
    sets, count, width = points.shape
    rows, tries = torch.arange(sets, device=points.device), 2 + int(math.log(clusters))

    def pick(index: Tensor) -> Tensor:  # [L, M] -> [L, M, D]
        return points.gather(1, repeat(index, "l m -> l m d", d=width))

    def distances(to: Tensor) -> Tensor:  # [L, M, D] -> [L, N, M]; of unit vectors, half the squared Euclidean ones
        return (1.0 - einsum(points, to, "l n d, l m d -> l n m")).clamp(min=0.0)

    seeds = [torch.randint(count, (sets, 1), generator=generator).to(points.device)]
    nearest = distances(pick(seeds[0]))[..., 0]  # [L, N]
    while len(seeds) < clusters:
        cumulated = nearest.double().cumsum(dim=1)
        drawn = torch.rand(sets, tries, generator=generator).to(cumulated) * cumulated[:, -1:]
        candidates = torch.searchsorted(cumulated, drawn).clamp(max=count - 1)  # [L, tries]
        left = torch.minimum(nearest[..., None], distances(pick(candidates)))  # [L, N, tries]
        best = reduce(left, "l n m -> l m", "sum").argmin(dim=1)
        nearest = left[rows, :, best]
        seeds.append(candidates[rows, best][:, None])
    centers = pick(torch.cat(seeds, dim=1))
    for _ in range(iterations):
        distance, cluster = distances(centers).min(dim=2)  # [L, N]
        assigned = F.one_hot(cluster, clusters).to(points)  # [L, N, E]
        means = unit(einsum(assigned, points, "l n e, l n d -> l e d"))
        worst = pick(distance.topk(clusters, dim=1).indices)
        centers = torch.where(reduce(assigned, "l n e -> l e 1", "sum") > 0, means, worst)
    return centers


# ---------------------------------------------------------------------------------------------------------- adapters


class Adapter(nn.Module):
    """One expert: what it adds to its projection's output, y = base + gate * delta(x).

    A subclass makes its parameters (float32, on `device`) in `__init__` and defines `delta`, or `forward` where its
    formula allows something cheaper. It serves as `apply_monkeyjump(adapter=MyAdapter)`; to load it again in another
    process, put it into `ADAPTERS` under its name first.
    """

    def __init__(self, in_features: int, out_features: int, config: MonkeyJumpConfig, device: torch.device) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    @staticmethod
    def scale(config: MonkeyJumpConfig) -> float:
        """A constant factor of delta, which is folded into the gates."""
        return 1.0

    def delta(self, x: Tensor, base: Tensor) -> Tensor:
        """x [..., in], base output W x [..., out] -> [..., out]."""
        raise NotImplementedError

    def forward(self, x: Tensor, base: Tensor, gate: Tensor | float) -> Tensor:
        """x [..., in], base [..., out], gate [..., 1] or a number, all in base's dtype -> y [..., out]."""
        return base + gate * self.delta(x, base)

    def attach(self, layer: nn.Module, stack: Stack, expert: int | None, foreign: bool) -> None:
        """Become expert number `expert` (None: shared, always on) of projection `layer`."""
        self.stack, self.expert, self.foreign = stack, expert, foreign
        layer.monkeyjump = self
        self.handles = [layer.register_forward_hook(self.hook)]

    def hook(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook of the projection; a hook and not a wrapper, so that names, types and `.weight` stay."""
        if self.stack.call is None:  # adapters are disabled
            return None
        x = args[0].to(output.dtype)
        return self(x, output, self.stack.gate(x, self.expert, self.foreign))


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
        inner = gate * product(self.dropout(x), self.lora_A)  # [..., r]
        return add_product(base, inner, self.lora_B)


class LoRAFA(LoRA):
    """LoRA with A frozen at random (Zhang et al. 2023): x need not be kept for the backward pass."""

    trains_A = False


class AdaLoRA(LoRA):
    """delta(x) = (alpha/r) P diag(L) Q x (Zhang et al. 2023): lora_B is P, lora_E L, lora_A Q; see allocate_ranks."""

    def __init__(self, in_features: int, out_features: int, config: MonkeyJumpConfig, device: torch.device) -> None:
        super().__init__(in_features, out_features, config, device)
        nn.init.orthogonal_(self.lora_A)
        nn.init.orthogonal_(self.lora_B)
        # Departure: zero, so that the adapted model starts as the base model; the authors start at 0.01.
        self.lora_E = nn.Parameter(torch.zeros(config.rank, device=device))
        for name, parameter in list(self.named_parameters()):  # buffers, so that a resumed run prunes like a whole one
            self.register_buffer(f"sensitivity_{name}", torch.zeros_like(parameter.data))
            self.register_buffer(f"uncertainty_{name}", torch.zeros_like(parameter.data))

    def forward(self, x: Tensor, base: Tensor, gate: Tensor | float) -> Tensor:
        inner = gate * product(self.dropout(x), self.lora_E[:, None] * self.lora_A)  # [..., r]
        return add_product(base, inner, self.lora_B)


class Propulsion(Adapter):
    """delta(x) = W x * ((1 + z)^degree - 1) (Kowsher et al. 2024), one z an output."""

    def __init__(self, in_features: int, out_features: int, config: MonkeyJumpConfig, device: torch.device) -> None:
        super().__init__(in_features, out_features, config, device)
        self.degree = config.degree
        # Departure: z is the deviation from 1, so that weight decay leads back to the identity.
        self.propulsion = nn.Parameter(torch.zeros(out_features, device=device))

    def forward(self, x: Tensor, base: Tensor, gate: Tensor | float) -> Tensor:
        push = (1.0 + self.propulsion) ** self.degree - 1.0
        return base + gate * base * push.to(base.dtype)  # backward keeps gate * base and nothing else of that size


def add_product(base: Tensor, inner: Tensor, weight: Tensor) -> Tensor:
    """base [..., out] + inner [..., r] @ weight [out, r]^T, in one operation and without a temporary."""
    return torch.addmm(base.flatten(0, -2), inner.flatten(0, -2), weight.to(base.dtype).t()).view(base.shape)


ADAPTERS: dict[str, type[Adapter]] = {"lora": LoRA, "lorafa": LoRAFA, "adalora": AdaLoRA, "propulsion": Propulsion}


# ------------------------------------------------------------------------------------------------------------ router


class Call(NamedTuple):
    """The routing of one call of a block: what its projections need, also when a checkpoint runs them again."""

    block: str
    gates: Tensor  # [B, N, E] times the adapters' scale, in the dtype of the block's input
    tokens: int  # T
    centers: Tensor  # [E, D] as they were
    mean: Tensor | None  # [D]


class Router(nn.Module):
    """The gradient-free router of one block: it owns the centers, and what was seen since they last moved."""

    def __init__(
        self, name: str, experts: list[str], width: int, stack: Stack, config: MonkeyJumpConfig, device: torch.device
    ) -> None:
        super().__init__()
        self.name, self.experts, self.stack, self.config = name, experts, stack, config
        self.register_buffer("centers", unit(torch.randn(len(experts), width, device=device)))
        self.register_buffer("mean", torch.zeros(width, device=device) if config.centered else None)
        share = torch.full((len(experts),), 1.0 / max(1, len(experts)), device=device) if config.min_share else None
        self.register_buffer("share", share)  # of the representations, smoothed like the centers
        self.reset()

    def reset(self) -> None:
        # Plain tensors: DDP would overwrite buffers with those of rank 0 at each forward pass.
        (experts, width), device = self.centers.shape, self.centers.device
        self.statistics = torch.zeros(experts, width + experts, device=device)  # cluster_statistics since the last fold
        self.report = torch.zeros(experts, experts + 1, device=device)  # sums of gates and of cosines, since reset
        self.worst = torch.zeros(width + 1, device=device)  # worst_served since the last fold

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():  # float32 whatever the model is cast to: centers move by small steps
            setattr(self, name, buffer.float())
        if self.statistics.device != self.centers.device:
            self.reset()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.reset()  # what was seen belongs to the centers that are gone

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the block."""
        stack = self.stack
        if stack.routed_ahead:
            return
        if stack.tape is not None and stack.tape.replay is not None:  # a recomputation: the first pass's routing
            stack.call = next(stack.tape.replay)
            if stack.call is not None and self.config.jitter_noise and self.training:  # dropout comes after it
                torch.empty_like(stack.call.gates, dtype=torch.float32).uniform_()
            return
        if not stack.enabled:
            stack.call = None
        elif self.experts:
            stack.call = self.call(*self.observe(args, kwargs))
        else:  # shared adapters alone: there is nothing to route
            stack.call = Call(self.name, self.centers, 0, self.centers, None)
        if stack.tape is not None:
            stack.tape.calls.append(stack.call)

    @torch.no_grad()
    def observe(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], centered: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The block's arguments -> its input [B, T, D], unit representations [B, N, D], which are real [B, N]."""
        hidden = args[0] if args else kwargs.get("hidden_states", kwargs.get("hidden_state"))
        if hidden.dim() == 2:  # Qwen-VL's vision blocks: packed patches [N, D], one sequence
            hidden = hidden[None]
        elif hidden.dim() == 4:  # parallel streams: gemma3n [4, B, T, D], of which attention sees the first;
            hidden = hidden[0] if self.stack.streams_first else hidden.mean(dim=2)  # hyper-connections [B, T, 4, D]
        if hidden.dim() != 3 or hidden.shape[-1] != self.centers.shape[-1]:
            wanted = f"[batch, tokens, {self.centers.shape[-1]}]"
            raise ValueError(f"block {self.name!r}: hidden states of shape {list(hidden.shape)}, not {wanted}")
        with torch.autocast(hidden.device.type, enabled=False):
            found, valid = represent(hidden, self.config.rep_mode, *self.stack.positions(hidden))
            return hidden, unit(found, self.mean if centered else None), valid

    def call(self, hidden: Tensor, representations: Tensor, valid: Tensor | None) -> Call:
        """Route one call of the block; in training, add what it saw to the statistics."""
        stack, config = self.stack, self.config
        with torch.autocast(hidden.device.type, enabled=False):
            centers = stack.centers[self.name]
            gates = kept = stack.kept_gates(self.name, hidden)
            if kept is None or isinstance(stack.empty, Tensor):
                jitter = config.jitter_noise if self.training else 0.0
                gates, experts = route(representations, centers, config.top_k, config.temperature, jitter)
                if stack.collecting and (torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1):
                    flat = [None if t is None else t.flatten(0, 1) for t in (representations, experts, gates, valid)]
                    self.statistics.add_(cluster_statistics(*flat))
                    if config.min_share:
                        worst = worst_served(flat[0], centers, flat[3])
                        self.worst.copy_(torch.where(worst[-1] > self.worst[-1], worst, self.worst))
                gates = (gates * stack.scale).to(hidden.dtype)
                gates = gates if kept is None else torch.where(stack.empty, gates, kept)
            stack.gates[self.name] = gates
            return Call(self.name, gates, hidden.shape[1], centers, self.mean)


class Stack:
    """What one pass through a list of blocks shares. It is no module: adapters and routers may refer back to it."""

    def __init__(self, owner: nn.Module, config: MonkeyJumpConfig) -> None:
        self.owner, self.config, self.scale = owner, config, ADAPTERS[config.adapter].scale(config)
        self.blocks: list[nn.Module] = []
        self.checkpointed: list[nn.Module] = [owner]  # what may have a checkpoint: blocks, in zamba2 parts of them
        self.enabled, self.collecting, self.routed_ahead, self.streams_first = True, False, False, False
        self.empty: bool | Tensor = False  # whether the cache, a static one, is
        self.call: Call | None = None  # of the block that is running
        self.tape: Tape | None = None  # of the checkpointed function that is running
        self.gates: dict[str, Tensor] = {}  # of this pass, by block, as are the centers
        self.centers: dict[str, Tensor] = {}
        self.mask = self.labels = self.prompt_end = self.cache = self.real = None
        self.root: dict[str, Any] = {}  # what the model was called with, from State.enter
        self.mask_index = _argument_index(owner, "attention_mask")
        # Training forwards so far: a tensor, since a Python counter would recompile a compiled model at every step.
        owner.register_buffer("monkeyjump_forwards", torch.zeros((), dtype=torch.long, device=_device(owner)))
        self.handles = [
            owner.register_forward_pre_hook(self.enter, with_kwargs=True),
            owner.register_forward_hook(self.leave, with_kwargs=True),
        ]

    @property
    def routers(self) -> list[Router]:
        return [block.monkeyjump for block in self.blocks]

    def enter(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the module that runs the blocks."""
        root, self.root = self.root, {}
        self.labels, self.prompt_end = root.get("labels"), root.get("prompt_end")
        own, entry = _argument(args, kwargs, "attention_mask", self.mask_index), root.get("attention_mask")
        # Departure: padding by the 2-D mask at the model's entry; blocks see a 4-D mask or none.
        self.mask = entry if _is_2d(entry) and not _is_2d(own) else own
        self.cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        self.empty = self.config.rep_mode != "token" and _is_empty(self.cache)
        self.real, self.gates = None, {}
        self.collecting = self.enabled and owner.training and torch.is_grad_enabled()
        self.centers = self.current_centers(owner.monkeyjump_forwards if self.collecting else None)
        for module in self.checkpointed:  # enabling checkpointing, at any time, sets this function anew
            function = module.__dict__.get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, Checkpoint):
                checkpoint = Checkpoint(function, self, module)
                if checkpoint.around_hooks or not torch.compiler.is_compiling():
                    module._gradient_checkpointing_func = checkpoint

    def positions(self, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """hidden [B, T, D] -> which tokens are real, bool [B, T] or None (all); end of the prompt [B] or None."""
        if self.real is None and self.mask is not None:
            self.real = real_tokens(self.mask, hidden)
        real = None if self.real is None else self.real.to(hidden.device)
        if self.config.rep_mode != "prompt_end":
            return real, None
        if self.prompt_end is not None:
            past = self.mask.shape[1] - hidden.shape[1] if _is_2d(self.mask) else 0
            return real, torch.as_tensor(self.prompt_end, device=hidden.device) - past
        if self.labels is None or self.labels.shape != hidden.shape[:2]:
            return real, None
        answer = (self.labels != -100).to(hidden.device)
        first = 0 if real is None else real.int().argmax(dim=1)
        end = (answer.int().argmax(dim=1) - 1).clamp(min=first)  # an answer without a prompt: its first token
        last = hidden.shape[1] - 1 if real is None else last_true(real)
        return real, torch.where(answer.any(dim=1), end, last)

    def gate(self, x: Tensor, expert: int | None, foreign: bool) -> Tensor | float:
        """Gates [..., 1] of an expert for its projection's input x [..., in], whatever the shape of x."""
        if expert is None:
            return self.scale
        block, gates, tokens, centers, mean = self.call
        batch, shape, by_token = gates.shape[0], x.shape[:-1], self.config.rep_mode == "token"
        if foreign and by_token:  # an encoder's tokens are routed as what they are
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                gates, _ = route(unit(x, mean), centers, self.config.top_k, self.config.temperature)
            return (gates[..., expert, None] * self.scale).to(x.dtype)
        gates = gates[..., expert, None]  # [B, N, 1]
        if shape == (batch, tokens):
            return gates
        if not by_token and len(shape) > 1 and shape[0] % batch == 0:  # a sequence's gate fits however many tokens
            return gates.repeat_interleave(shape[0] // batch, dim=0).reshape(-1, *[1] * len(shape))
        if shape in ((batch * tokens,), (batch, 1, tokens)):
            return gates.expand(batch, tokens, 1).reshape(*shape, 1)
        raise ValueError(
            f"block {block!r} has tokens [{batch}, {tokens}], a projection in it sees {list(shape)}: the gates do not "
            "fit, so leave this projection out of linears"
        )

    def kept_gates(self, block: str, hidden: Tensor) -> Tensor | None:
        """The prompt's gates [B, 1, E] for a token that is decoded after it, in the sequence modes."""
        # Departure: decoding keeps the prompt's routing; the authors route each new token as a sequence of its own.
        if self.config.rep_mode == "token" or hidden.shape[1] > 1 or self.cache is None or self.empty is True:
            return None
        gates = getattr(self.cache, "monkeyjump_gates", {}).get(block)
        return gates if gates is not None and gates.shape[0] == hidden.shape[0] else None

    def leave(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of the module that runs the blocks: the gates live and die with the cache."""
        given, self.cache = self.cache, None  # not to be kept alive
        if self.config.rep_mode == "token" or self.collecting:
            return
        found = [given, *(getattr(output, name, None) for name in CACHE_NAMES)]
        if isinstance(output, tuple):
            found += [item for item in output if hasattr(item, "get_seq_length")]
        for cache in [cache for cache in found if cache is not None][:1]:
            cache.monkeyjump_gates = self.gates

    @torch.no_grad()
    def current_centers(self, forwards: Tensor | None) -> dict[str, Tensor]:
        """Centers [E, D] of all blocks, of length 1; in training (forwards given) moved by what was seen, if due."""
        # Departure: they move at the start of a forward, not inside, so that checkpoints and ranks see the same ones.
        current = {}
        for routers in _alike([router for router in self.routers if router.experts]):
            centers = torch.stack([router.centers for router in routers])  # [L, E, D]
            if forwards is not None:
                due = (forwards > 0) & (forwards % self.config.update_every == 0)
                if self.config.update_until is not None:
                    due = due & (forwards <= self.config.update_until)
                due = due.to(centers.device)
                statistics = torch.stack([router.statistics for router in routers]) * due  # [L, E, D + E]
                if dist.is_available() and dist.is_initialized():
                    dist.all_reduce(statistics)
                sums, gates = statistics.split([centers.shape[-1], centers.shape[-2]], dim=-1)
                cosines = reduce(sums * centers, "l e d -> l e", "sum")
                counts = reduce(gates, "l e g -> l e", "sum")
                centers = ema_update(centers, sums, counts, self.config.ema_momentum)
                if self.config.min_share:
                    centers = self.revive(routers, centers, counts, due)
                torch._foreach_copy_([router.centers for router in routers], list(centers))
                report = torch.cat([gates, cosines[..., None]], dim=-1)
                torch._foreach_add_([router.report for router in routers], list(report))
                torch._foreach_mul_([router.statistics for router in routers], (~due).float())
            current.update(zip([router.name for router in routers], unit(centers), strict=True))
        if forwards is not None:
            forwards.add_(1)
        return current

    def revive(self, routers: list[Router], centers: Tensor, counts: Tensor, due: Tensor) -> Tensor:
        """Centers [L, E, D], one re-seeded where an expert's smoothed share of the counts [L, E] became too small."""
        share, worst = (torch.stack([getattr(router, name) for router in routers]) for name in ("share", "worst"))
        total, momentum = reduce(counts, "l e -> l 1", "sum"), self.config.ema_momentum
        share = torch.where(total > 0, momentum * share + (1.0 - momentum) * counts / total, share)
        seed = worst * due
        if dist.is_available() and dist.is_initialized():
            distance = seed[:, -1:].clone()
            dist.all_reduce(distance, dist.ReduceOp.MAX)
            seed = seed * (seed[:, -1:] == distance)
            dist.all_reduce(seed)
        centers, share = reseed(centers, share, unit(seed[:, :-1]), self.config.min_share)
        torch._foreach_copy_([router.share for router in routers], list(share))
        torch._foreach_copy_([router.worst for router in routers], list(worst * ~due))
        return centers


class Tape:
    """Routing of the blocks inside one checkpointed call: recorded the first time, replayed ever after."""

    def __init__(self) -> None:
        self.calls: list[Call | None] = []
        self.replay: Iterator[Call | None] | None = None


class Checkpoint:
    """Stands in for a module's `_gradient_checkpointing_func`, so that a recomputation has its first pass's routing.

    Other forwards, or the next step's centers, may come between the two. A block's hooks run inside the checkpointed
    function (transformers up to 5.22: it is the block's __call__), or once and before it (from 5.23: its forward).
    """

    def __init__(self, function: Callable[..., Any], stack: Stack, module: nn.Module) -> None:
        self.function, self.stack, self.module = function, stack, module
        kinds = [kind for kind in type(module).__mro__ if kind is not nn.Module]
        self.around_hooks = module in stack.blocks and any("__call__" in kind.__dict__ for kind in kinds)

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        stack = self.stack
        if torch.compiler.is_compiling():  # the graph carries the gates; but no object may change in the checkpoint
            if self.around_hooks:
                self.module.monkeyjump.enter(self.module, args, kwargs)
            stack.routed_ahead = self.around_hooks
            output = self.function(function, *args, **kwargs)
            stack.routed_ahead = False
            return output
        tape, before = Tape(), stack.call

        def run(*args: Any, **kwargs: Any) -> Any:
            outside, stack.tape, stack.call = (stack.tape, stack.call), tape, before
            try:
                return function(*args, **kwargs)
            finally:
                tape.replay = iter(tape.calls)
                stack.tape, stack.call = outside

        return self.function(run, *args, **kwargs)


def real_tokens(mask: Any, hidden: Tensor) -> Tensor | None:
    """Which tokens are real, by any mask that a model is called with.

    Args:
        mask: [B, S], its last columns for these tokens; [B, 1, T, S], bool or additive; a dict of them by kind of
            layer; or None.
        hidden: [B, T, D].

    Returns:
        bool [B, T], or None if all are. Raises ValueError for a mask of another shape.
    """
    if isinstance(mask, dict):
        masks = [m for m in mask.values() if m is not None]
        mask = next((m for m in masks if _is_2d(m)), masks[0] if masks else None)
    if not isinstance(mask, Tensor):  # none, or flex attention's BlockMask
        return None
    mask = mask[:, None] if mask.dim() == 3 else mask  # CPM-Ant's own [B, T, T]
    batch, tokens = hidden.shape[:2]
    if _is_2d(mask) and mask.shape[0] == batch:  # a narrower mask: the model put tokens of its own in front (CPM-Ant)
        return F.pad(mask != 0, (max(0, tokens - mask.shape[1]), 0), value=True)[:, -tokens:]
    if mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[2] in (1, tokens):
        lowest = -5e3 if mask.is_floating_point() else 0  # additive (-1e4 or less hides), or 1 for allowed
        allowed = mask[:, 0] > lowest  # [B, T, S]
        # A real token may attend to itself, a padded one may not: read the diagonal. It ends with the last column, or,
        # with a static cache, which is wider, where the last token's row ends.
        last = tokens - 1 if allowed.shape[-1] == tokens else last_true(allowed[:, -1])[:, None]
        own = torch.arange(1 - tokens, 1, device=mask.device) + last  # [T] or [B, T]
        allowed, own = allowed.expand(batch, tokens, -1), own.expand(batch, tokens)
        return allowed.gather(2, own[..., None].clamp(min=0))[..., 0]
    raise ValueError(f"attention_mask of shape {list(mask.shape)} does not fit hidden states {list(hidden.shape)}")


# ---------------------------------------------------------------------------------------------- parts of the model

# A token mixer asks what a feed-forward does not: who else is there (masks, caches, positions of other tokens); or it
# hands **kwargs on to the attention kernel.
MIXER_ARGUMENTS = re.compile(r"mask|cache|past|rotary|position_emb|seqlens|attentions|^(state|kwargs)$")
# Routers and indexers choose by top-k, so no gradient comes back; mamba's dt_proj is never called, its weight is read;
# kv_b_proj sees the whole cache of latents again at each decoded token; zaya's v_proj_delayed sees a blank one.
NOT_A_PROJECTION = re.compile(r"mlp|ffn|feed_forward|router|indexer|dt_proj|kv_b_proj|v_proj_delayed")
# Keys and values of cross-attention are of other tokens than the block's own: an encoder's, or an image's.
CROSS_ATTENTION = re.compile(r"cross_?att|encoder_(decoder_)?att|EncDecAtt")
FOREIGN = re.compile(rf"({CROSS_ATTENTION.pattern}).*\b(k|v|key|value|c_attn)(_proj)?$")
# Families whose projections see other tokens than their block, in a way that no name or shape tells.
REFUSED = {
    "blt": "its blocks see bytes and patches of bytes in turn",
    "led": "its projections see [tokens, batch, width]",
    "longformer": "its projections see [tokens, batch, width]",
    "prophetnet": "its decoder predicts several streams of tokens at once",
    "reformer": "its blocks run inside an autograd function of their own",
    "t5gemma2": "its decoder's attention projects encoder and decoder tokens in turn",
    "xlnet": "its blocks see [tokens, batch, width]",
}


def features(layer: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a dense linear layer of any kind, quantised ones included; None for anything else."""
    layer = layer.get_base_layer() if _is_peft(layer) else layer
    kind = type(layer).__name__  # a grouped linear is block-diagonal: no single matrix to add a low-rank one to
    if hasattr(layer, "in_features") and hasattr(layer, "out_features") and "Grouped" not in kind:
        return layer.in_features, layer.out_features
    return tuple(layer.weight.shape) if kind == "Conv1D" and hasattr(layer, "nf") else None  # GPT-2: [in, out]


def block_linears(block: nn.Module, peft: bool = False) -> list[str]:
    """Paths of the dense linears of a block, or of those that PEFT has adapted, as found."""
    found = [path for path, module in block.named_modules() if features(module) and (_is_peft(module) or not peft)]
    return [path for path in found if not (peft and path.endswith("base_layer"))]  # one PEFT layer in another


def _is_peft(module: nn.Module) -> bool:
    """A layer that PEFT adapted; but with `target_parameters` its base layer runs with the adapted weight."""
    return hasattr(module, "get_base_layer") and hasattr(module, "merged") and not hasattr(module, "parameter_name")


def attention_linears(block: nn.Module, cross: bool = True) -> list[str]:
    """Those of the block's attention or of its counterpart (mixer, SSM, convolution), and of its cross-attention."""
    mixers = tuple(
        f"{path}."
        for path, module in block.named_modules()
        if path and any(MIXER_ARGUMENTS.search(name) for name in inspect.signature(type(module).forward).parameters)
    )
    found = [p for p in block_linears(block) if p.startswith(mixers) and not NOT_A_PROJECTION.search(p)]
    return [path for path in found if cross or not CROSS_ATTENTION.search(path)]


def block_lists(model: nn.Module) -> list[str]:
    """Paths of the lists of modules that mix tokens: the language model's blocks, and those of towers and encoders."""
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return [path for path, module in lists if any(attention_linears(block) for block in module)]


def language_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of the language model: of both stacks of an encoder-decoder, without vision or audio towers.

    A language model is recognised by what it reads, tokens: from each embedding of the vocabulary's size climb until
    there are lists of blocks below, and take the nearest ones (a tower beside them lies deeper). Hybrid lists are kept
    whole; a block that serves at several depths is named once.
    """
    tokens = None
    with contextlib.suppress(NotImplementedError, AttributeError):  # no embeddings, or no model of transformers
        tokens = model.get_input_embeddings()
    modules, lists, chosen = dict(model.named_modules()), block_lists(model), set()
    size = len(tokens.weight) if isinstance(tokens, nn.Module) and hasattr(tokens, "weight") else None
    for path, module in modules.items():
        if module is tokens or isinstance(module, nn.Embedding) and module.num_embeddings == size:
            below: list[str] = []
            while path and not below:
                path = path.rpartition(".")[0]
                below = [name for name in lists if not path or name.startswith(f"{path}.")]
            nearest = min((name.count(".") for name in below), default=0)
            chosen |= {name for name in below if name.count(".") == nearest}
    return {path: module for path, module in modules.items() if path.rpartition(".")[0] in chosen}


def block_width(model: nn.Module, block: nn.Module) -> int:
    """D of the block's input: as wide as the block's norm; without one, as the language model."""
    weights = [getattr(child, "weight", None) for child in block.children()]
    widths = [len(weight) for weight in weights if isinstance(weight, Tensor) and weight.dim() == 1]
    if widths or not hasattr(model, "config"):
        return widths[0] if widths else features(block.get_submodule(block_linears(block)[0]))[0]
    config = model.config.get_text_config(decoder=True)
    return config.hidden_size * getattr(config, "hc_count", 1)  # qwen4_exp: hyper-connection streams side by side


def _alike(routers: list[Router]) -> list[list[Router]]:
    """Routers grouped by the device and the shape of their centers, for one computation over all of a group."""
    groups: dict[Any, list[Router]] = {}
    for router in routers:
        groups.setdefault((router.centers.device, router.centers.shape), []).append(router)
    return list(groups.values())


def _device(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def _is_2d(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2


def _is_empty(cache: Any) -> bool | Tensor:
    """Of a static cache, which serves one generation after the other; only the device knows how far it is filled."""
    try:
        return getattr(cache, "is_compileable", False) and cache.get_seq_length() == 0
    except (AttributeError, ValueError):  # states alone have no length
        return False


def _argument_index(module: nn.Module, name: str) -> int | None:
    names = list(inspect.signature(module.forward).parameters)
    return names.index(name) if name in names else None


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], name: str, index: int | None) -> Any:
    return args[index] if index is not None and index < len(args) else kwargs.get(name)


def _names(value: Any) -> Any:
    """A name or names as a list; anything else in a list, for the config to refuse."""
    return list(value or []) if isinstance(value, Iterable | None) and not isinstance(value, str) else [value]


def _match(paths: Iterable[str], names: list[str]) -> list[str]:
    """Paths that end in one of the names, in the order of the names, then as found."""
    paths = list(paths)
    return list(dict.fromkeys(path for name in names for path in paths if f".{path}".endswith(f".{name}")))


# ---------------------------------------------------------------------------------------------------------- wiring


class State:
    """What `apply_monkeyjump` leaves on the model: who is where, the hook at the model's entry, the way back."""

    def __init__(self, model: nn.Module, config: MonkeyJumpConfig) -> None:
        self.model, self.config = model, config
        self.overridden: list[tuple[nn.Module, str]] = []  # methods of a PEFT model
        self.stacks: list[Stack] = []
        self.routers: dict[str, Router] = {}
        self.adapters: dict[str, Adapter] = {}
        self.text_stack: Stack | None = None
        self.trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        mask = "decoder_attention_mask" if encoder_decoder else "attention_mask"
        self.mask, self.labels = ((name, _argument_index(model, name)) for name in (mask, "labels"))
        self.handles = [model.register_forward_pre_hook(self.enter, with_kwargs=True)]

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Forward pre-hook of the model: what only its caller knows goes to the language model's (last) stack."""
        if self.text_stack is not None:
            self.text_stack.root = {
                "attention_mask": _argument(args, kwargs, *self.mask),
                "labels": _argument(args, kwargs, *self.labels),
                "prompt_end": kwargs.get("prompt_end"),
            }
        return args, {name: value for name, value in kwargs.items() if name != "prompt_end"}

    def override(self) -> None:
        """Methods of a PEFT model that must know of the routing."""
        for module in self.model.modules():
            if hasattr(type(module), "merge_and_unload"):
                module.merge_adapter = module.merge_and_unload = module.unload = _refuse_merge
                self.overridden += [(module, name) for name in ("merge_adapter", "merge_and_unload", "unload")]
        for name in ("save_pretrained", "load_adapter"):
            if hasattr(type(self.model), name):
                setattr(self.model, name, getattr(self, name))
                self.overridden.append((self.model, name))

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """PEFT's files, and the router's beside them: also what a Trainer's checkpoints hold."""
        type(self.model).save_pretrained(self.model, save_directory, *args, **kwargs)
        save_adapter(self.model, save_directory)

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's method, by which a Trainer resumes: weights for an adapter that is there bring their router."""
        method = type(self.model).load_adapter
        given = inspect.signature(method).bind(self.model, *args, **kwargs).arguments
        name = given.get("adapter_name") or "default"
        there, folder = name in self.model.peft_config, Path(given.get("model_id", given.get("peft_model_id")) or ".")
        if folder.name == name and not _files(folder, True)[0].is_file():
            folder = folder.parent  # PEFT keeps an adapter that is not called "default" in a folder of its own
        result = method(self.model, *args, **kwargs)
        if there and _files(folder, True)[0].is_file():
            load_adapter(self.model, folder)
        return result


def _refuse_merge(*args: Any, **kwargs: Any) -> None:
    raise ValueError("routed adapters cannot be merged: gates differ from token to token. Call remove_monkeyjump first")


def _adapted(model: nn.Module) -> tuple[nn.Module, State] | None:
    """The module that Monkey Jump was applied to, inside whatever wraps it now (DDP, torch.compile, ...)."""
    return next(((m, m._monkeyjump) for m in model.modules() if isinstance(m.__dict__.get("_monkeyjump"), State)), None)


def _state(model: nn.Module) -> tuple[nn.Module, State]:
    if (found := _adapted(model)) is None:
        raise ValueError(f"this {type(model).__name__} carries no Monkey Jump: call apply_monkeyjump first")
    return found


def _find_blocks(model: nn.Module, blocks: dict[str, Iterable[int]] | None) -> dict[str, nn.Module]:
    """The blocks to adapt, by path, in the model's order; all of the language model's for None."""
    modules = dict(model.named_modules())
    classes = sorted({type(block).__name__ for m in modules.values() if isinstance(m, nn.ModuleList) for block in m})
    if blocks is None:
        found = language_blocks(model)
    else:
        if not isinstance(blocks, dict) or not all(isinstance(indices, Iterable) for indices in blocks.values()):
            raise ValueError(f"blocks={blocks!r}: must map class names to indices; there are {', '.join(classes)}")
        chosen = set()
        for name, indices in blocks.items():
            paths, indices = [path for path, m in modules.items() if type(m).__name__ == name], list(indices)
            wrong = [index for index in indices if not _int_from(0)(index) or index >= len(paths)]
            if not paths or wrong:
                there = f"indices of {name} are 0 to {len(paths) - 1}" if paths else f"there are {', '.join(classes)}"
                raise ValueError(f"blocks: {wrong if paths else name!r} not in this model; {there}")
            chosen |= {paths[index] for index in indices}
        found = {path: module for path, module in modules.items() if path in chosen}
        for path, block in found.items():
            if {"input_ids", "pixel_values"} & {*list(inspect.signature(type(block).forward).parameters)[:2]}:
                raise ValueError(f"blocks: {type(block).__name__} {path!r} is a model, not a block of hidden states")
    if not found:
        raise ValueError(f"blocks={blocks!r} names no block of this model; there are {', '.join(classes) or 'none'}")
    return found


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
    centered: bool = False,
    min_share: float = 0.0,
    update_every: int = 1,
    update_until: int | None = None,
) -> nn.Module:
    """Freeze a model and make adapters on its blocks' projections the experts of a gradient-free router, in place.

    Args:
        model: any causal, vision-language or encoder-decoder model.
        blocks: class names of blocks, and which: {"LlamaDecoderLayer": range(32)}; None: all of the language model.
        linears: leaf names or dotted suffixes ("attn.c_proj"), each match in a block being an expert of its own; None:
            the linears of the attention, or of what stands in its place.
        shared_expert: names of projections whose adapter is always on.
        adapter: "lora", "lorafa", "adalora", "propulsion"; a subclass of `Adapter`, or its name in `ADAPTERS`; "peft":
            route the adapters that a PEFT model already has.
        rank: r >= 1, and alpha > 0: adapters of the LoRA family are scaled by alpha / rank.
        dropout: in [0, 1), in training, on the input of adapters of the LoRA family.
        degree: the power of propulsion, >= 1.
        top_k: experts that a token or sequence uses, >= 1.
        temperature: of the softmax over cosines, > 0.
        ema_momentum: weight of the old center in each move, in [0, 1].
        rep_mode: "token": each token is routed; "last", "mean", "prompt_end": each sequence is, by its last real token,
            the mean of its real tokens, or the last token of its prompt (forward's keyword `prompt_end` [B], else the
            one before the first label that is not -100, else the last real one).
        jitter_noise: in [0, 1): in training, logits are multiplied by uniform noise in 1 -/+ jitter_noise.
        centered: compare directions as seen from their mean, which init_router_centers sets; real hidden states share a
            large common part that makes all experts look alike. Not in the paper; see benchmarks/quality.md.
        min_share: in [0, 1): an expert that serves a smaller share of the representations than this, smoothed like the
            centers, is re-seeded where they are served worst; 0: never. Not in the paper.
        update_every: the centers move at every so-manieth training forward, >= 1.
        update_until: they see this many training forwards; None: all.

    Returns:
        the same model; only adapter parameters (float32) require gradients.

    Raises:
        ValueError: before anything is changed; says what was given, what is allowed, and what there is.
    """
    settings = {name: value for name, value in locals().items() if name != "model"}
    if _adapted(model):
        raise ValueError("this model carries Monkey Jump already: call remove_monkeyjump first")
    if isinstance(adapter, type) and issubclass(adapter, Adapter):
        settings["adapter"] = next((name for name, kind in ADAPTERS.items() if kind is adapter), adapter.__name__)
        ADAPTERS[settings["adapter"]] = adapter
    peft, layers = settings["adapter"] == "peft", list(filter(_is_peft, model.modules()))
    if peft != bool(layers):
        raise ValueError(f"adapter={adapter!r}: 'peft' is for models that carry PEFT adapters, and only it is for them")
    if any(layer.merged for layer in layers):
        raise ValueError("adapter='peft': adapters are merged into this model: call its unmerge_adapter first")
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in REFUSED:
        raise ValueError(f"{kind} models cannot be routed: {REFUSED[kind]}")
    plan, named = _plan(model, blocks, linears, shared_expert, rep_mode, peft)
    order: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        order.setdefault(type(module).__name__, []).append(path)
    indices = {kind: [i for i, path in enumerate(paths) if path in plan] for kind, paths in order.items()}
    settings |= {"blocks": {kind: there for kind, there in indices.items() if there}, "linears": named}
    config = MonkeyJumpConfig(**{**settings, "shared_expert": _names(shared_expert)})
    most = max(len(routed) for routed, *_ in plan.values())
    if top_k > most:
        raise ValueError(f"top_k={top_k}: at most {most}, the experts of a block; linears: {', '.join(named)}")
    _wire(model, plan, config)
    return model


Plan = dict[str, tuple[list[str], list[str], int]]  # block -> experts, shared projections, width


def _plan(
    model: nn.Module, blocks: Any, linears: Any, shared_expert: Any, rep_mode: str, peft: bool
) -> tuple[Plan, list[str]]:
    """What to adapt, all names checked; and the names of linears as resolved."""
    chosen, cross = _find_blocks(model, blocks), len(block_lists(model)) > 1
    named, shared_names, plan = _names(linears), _names(shared_expert), {}
    if linears is None:
        found = [block_linears(b, True) if peft else attention_linears(b, cross) for b in chosen.values()]
        named = list(dict.fromkeys(path for paths in found for path in paths))
    for path, block in chosen.items():
        there, width = block_linears(block, peft), block_width(model, block)
        shared = _match(there, shared_names)
        routed = [p for p in _match(there, named) if p not in shared]
        # by token, other tokens are compared with the block's centers: they must be as wide
        wide = [p for p in routed if FOREIGN.search(p) and features(block.get_submodule(p))[0] != width]
        if rep_mode == "token" and wide and linears is not None:
            raise ValueError(f"linears: {wide} of block {path!r} see other tokens, not {width} wide as the block's are")
        plan[path] = [p for p in routed if rep_mode != "token" or p not in wide], shared, width
    available = sorted({p for block in chosen.values() for p in block_linears(block, peft)})
    for option, names in (("linears", named), ("shared_expert", shared_names)):
        if missing := [name for name in names if not _match(available, [name])]:
            raise ValueError(f"{option}={names}: {missing} not in these blocks; there are {', '.join(available)}")
    return plan, list(dict.fromkeys(p for routed, *_ in plan.values() for p in routed)) if linears is None else named


def _wire(model: nn.Module, plan: Plan, config: MonkeyJumpConfig) -> None:
    """Put routers and adapters, and the hooks through which they meet, where the plan says."""
    made: dict[nn.Module, Adapter] = {}  # all of them before the model is touched, since making one may fail
    for path, (routed, shared, _) in plan.items():
        for layer in map(model.get_submodule(path).get_submodule, routed + shared):
            if layer not in made:  # zamba's blocks share their attention
                made[layer] = ADAPTERS[config.adapter](*features(layer), config, _device(layer))
    if torch._dynamo.config.skip_nnmodule_hook_guards:  # graphs compiled so far would not notice that hooks come
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()
    state, stacks = State(model, config), {}
    if config.adapter == "peft":
        state.override()
    else:
        model.requires_grad_(False)
    text = next(reversed(language_blocks(model)), "").rpartition(".")[0]  # of an encoder-decoder, the decoder's blocks
    for path, (routed, shared, width) in plan.items():
        if not routed and not shared:
            continue
        block, owner = model.get_submodule(path), path.rpartition(".")[0]
        while isinstance(model.get_submodule(owner), (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            owner = owner.rpartition(".")[0]
        if owner not in stacks:
            stacks[owner] = Stack(model.get_submodule(owner), config)
        stack = stacks[owner]
        stack.streams_first = hasattr(block, "altup")
        if path.rpartition(".")[0] == text:
            state.text_stack = stack
        for name in routed + shared:
            layer, expert = block.get_submodule(name), routed.index(name) if name in routed else None
            if layer in made:
                state.adapters[f"{path}.{name}"] = made[layer]
                made.pop(layer).attach(layer, stack, expert, bool(FOREIGN.search(name)))
        block.monkeyjump = state.routers[path] = Router(path, routed, width, stack, config, _device(block))
        block.monkeyjump.handles = [block.register_forward_pre_hook(block.monkeyjump.enter, with_kwargs=True)]
        stack.blocks.append(block)
        stack.checkpointed += [module for module in block.modules() if hasattr(module, "gradient_checkpointing")]
    for part in (*state.routers.values(), *state.adapters.values()):
        part.train(model.training)  # on a model in eval mode new dropout must not drop
    state.stacks, model._monkeyjump = list(stacks.values()), state


class PeftAdapter(Adapter):
    """An adapter that PEFT made: y = base + gate * (adapted - base). It has no parameters of its own."""

    def attach(self, layer: nn.Module, stack: Stack, expert: int | None, foreign: bool) -> None:
        layer.monkeyjump, self.stack, self.expert, self.foreign = self, stack, expert, foreign
        self.x = self.base = self.scaling = None
        self.handles = [
            layer.register_forward_pre_hook(self.before),
            layer.get_base_layer().register_forward_hook(self.keep_base),
            layer.register_forward_hook(self.hook, always_call=True),  # a recomputation may stop inside
        ]

    def before(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the PEFT layer. Plain LoRA multiplies by `scaling`: there the gate costs nothing."""
        variants = getattr(layer, "lora_variant", layer.active_adapters)  # DoRA and the like; a method that is not LoRA
        plain = layer.base_layer is layer.get_base_layer() and not set(variants) & set(layer.active_adapters)
        if self.stack.call is not None and plain and len(layer._forward_pre_hooks) == 1:  # PEFT has one of its own for
            # adapter_names, which chooses among adapters row by row
            gate = self.stack.gate(args[0], self.expert, self.foreign)
            self.scaling, layer.scaling = layer.scaling, {name: gate * scale for name, scale in layer.scaling.items()}

    def keep_base(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook of the base layer, for any other method."""
        if self.scaling is not None:
            return None
        self.x, self.base = args[0], output
        return output.clone()  # PEFT may add to it in place

    def hook(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor | None) -> Tensor | None:
        x, base, scaling = self.x, self.base, self.scaling
        self.x = self.base = self.scaling = None
        if scaling is not None:
            layer.scaling = scaling
        if scaling is not None or output is None:
            return None
        if x is not args[0]:  # IA3 and OFT change the base layer's input: then its plain output takes a second product
            base = layer.get_base_layer().forward(*args)
        gate = 0.0 if self.stack.call is None else self.stack.gate(args[0], self.expert, self.foreign)
        return torch.lerp(base.to(output.dtype), output, gate.to(output.dtype) if isinstance(gate, Tensor) else gate)


ADAPTERS["peft"] = PeftAdapter


# ------------------------------------------------------------------------------------------------------ life cycle


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

    One pass over just enough batches collects the representations of all blocks: 4 * subset_size * width * blocks bytes
    (344 MB for 4000 of width 896 in 24 blocks), and about as much again while they are clustered.

    Args:
        model_or_trainer: an adapted model, or a transformers Trainer of one.
        dataloader: batches that the model takes; None with a Trainer: its training batches.
        subset_size: representations (real tokens or sequences) a block, over all ranks; at most an eighth of them from
            one batch.
        kmeans_iters: Lloyd's iterations after greedy k-means++ seeding.
        rep_mode: None, or the applied one.
        seed: of the choice of tokens and of k-means.

    Raises:
        ValueError: no Monkey Jump, no batches, fewer representations than experts, or another rep_mode than the applied
            one; the centers stay as they were.
    """
    from tqdm.auto import tqdm

    if hasattr(model_or_trainer, "get_train_dataloader"):
        dataloader = model_or_trainer.get_train_dataloader() if dataloader is None else dataloader
        model_or_trainer = model_or_trainer.model
    model, (_, state) = model_or_trainer, _state(model_or_trainer)
    if rep_mode not in (None, state.config.rep_mode):
        raise ValueError(f"rep_mode={rep_mode!r}: the model was adapted with rep_mode={state.config.rep_mode!r}")
    if not (_int_from(1)(subset_size) and _int_from(0)(kmeans_iters) and _int_from(0)(seed)):
        given = f"subset_size={subset_size!r}, kmeans_iters={kmeans_iters!r}, seed={seed!r}"
        raise ValueError(f"{given}: must be integers >= 1, >= 0 and >= 0")
    if dataloader is None:
        raise ValueError("dataloader=None: only a Trainer brings its own batches")
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    wanted = -(-subset_size // world)
    quota = -(-wanted // min(8, max(1, operator.length_hint(dataloader, 8))))
    found_by: dict[str, list[Tensor]] = {name: [] for name, router in state.routers.items() if router.experts}

    def collect(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _, found, valid = block.monkeyjump.observe(args, kwargs, centered=False)
        found, kept = found.flatten(0, 1) if valid is None else found[valid], found_by[block.monkeyjump.name]
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed + len(kept)))
        kept.append(found[order[: min(quota, wanted - sum(map(len, kept)))].to(found.device)])

    training = {module: module.training for module in model.modules()}
    blocks = [block for stack in state.stacks for block in stack.blocks if block.monkeyjump.experts]
    handles = [block.register_forward_pre_hook(collect, with_kwargs=True) for block in blocks]
    try:
        model.eval()
        with torch.random.fork_rng(), tqdm(total=wanted, desc="k-means: representations", leave=False) as bar:
            for batch in dataloader:
                _run(model, batch)
                bar.update(max(sum(map(len, kept)) for kept in found_by.values()) - bar.n)
                if bar.n >= wanted:
                    break
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode

    new: list[tuple[Router, Tensor, Tensor]] = []
    for routers in _alike([state.routers[name] for name in found_by]):
        seen = [torch.cat([*found_by[r.name], r.centers.new_zeros(0, r.centers.shape[-1])]) for r in routers]
        least = min(map(len, seen))  # a block that an image-less batch skips has fewer
        sets = torch.stack([vectors[:least] for vectors in seen])  # [L, N, D]
        sets = sets[:, sets.any(dim=-1).all(dim=0)]  # representations that are finite in every block
        if world > 1:
            least = torch.tensor(sets.shape[1], device=sets.device)
            dist.all_reduce(least, dist.ReduceOp.MIN)
            gathered = [torch.empty_like(sets[:, :least]) for _ in range(world)]
            dist.all_gather(gathered, sets[:, :least].contiguous())
            sets = torch.cat(gathered, dim=1)
        experts = len(routers[0].experts)
        if sets.shape[1] < experts:
            raise ValueError(f"the batches gave {sets.shape[1]} representations for {experts} experts: give more data")
        means = reduce(sets, "l n d -> l d", "mean") * state.config.centered
        points = unit(sets - means[:, None]) if state.config.centered else sets
        centers = kmeans(points, experts, kmeans_iters, torch.Generator().manual_seed(seed))
        if world > 1:
            dist.broadcast(centers, 0)
        new += zip(routers, centers, means, strict=True)
    for router, centers, mean in new:
        router.centers.copy_(centers)
        if state.config.centered:
            router.mean.copy_(mean)
        router.reset()


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
    """Tensors of adapters, centers and step counts by name, none of the base model's; gathered on all ranks (FSDP2)."""
    own = {name: t for name, t in _state(model)[0].state_dict().items() if "monkeyjump" in name}
    return {name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for name, tensor in own.items()}


def _saved(model: nn.Module) -> dict[str, Tensor]:
    """What an adapter file holds: all but AdaLoRA's importance, which only goes on training."""
    tensors = monkeyjump_state_dict(model).items()
    return {name: t for name, t in tensors if not re.search(r"\.(sensitivity|uncertainty)_lora_[ABE]$", name)}


def _files(directory: str | os.PathLike[str], peft: bool) -> tuple[Path, Path]:
    """Of weights and config; those of a router alone lie beside PEFT's own."""
    kind = "router" if peft else "adapter"
    return Path(directory) / f"{kind}_model.safetensors", Path(directory) / f"{kind}_config.json"


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` (`router_...` beside PEFT's own files).

    Each file is replaced whole, and the weights carry their config, so that a kill at any moment leaves an adapter that
    loads, the old one or the new one. Under DDP and FSDP2 call it on every rank; rank 0 writes.
    """
    from safetensors.torch import save_file

    config = _state(model)[1].config
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in _saved(model).items()}
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return
    os.makedirs(directory, exist_ok=True)
    weights, fields = _files(directory, config.adapter == "peft")
    text = json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(config)}, indent=2) + "\n"
    replaces = hashlib.sha256(fields.read_bytes()).hexdigest() if fields.exists() else ""
    new_weights, new_fields = (path.with_name(f".{path.name}.tmp") for path in (weights, fields))
    save_file(tensors, new_weights, metadata={"format": "pt", "config": text, "replaces": replaces})
    new_fields.write_text(text)
    for temporary, path in ((new_weights, weights), (new_fields, fields)):
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


def load_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> nn.Module:
    """Load what `save_adapter` wrote, into a plain base model (which is adapted) or one adapted with the same config.

    Raises:
        ValueError: a file is missing, cut short or of another format; a field of the config is unknown, missing or
            invalid; a tensor is missing, too many or of another shape. The model stays as it was.
    """
    from safetensors import SafetensorError, safe_open

    found = _adapted(model)
    weights, fields = _files(directory, any(map(_is_peft, model.modules())))
    for path in (weights, fields):
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
    try:
        with safe_open(weights, framework="pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{weights}: not a whole safetensors file ({error})") from error
    text = fields.read_bytes()
    if hashlib.sha256(text).hexdigest() == metadata.get("replaces"):  # killed between the two replacements
        text = metadata["config"].encode()
    try:
        config = json.loads(text)
        known = {field.name for field in dataclasses.fields(MonkeyJumpConfig)}
        if not isinstance(config, dict) or config.pop("format_version", None) != FORMAT_VERSION:
            raise ValueError(f"not a JSON object of format_version {FORMAT_VERSION}")
        if wrong := sorted(config.keys() ^ known):
            raise ValueError(f"unknown or missing fields {wrong}; the fields are {', '.join(sorted(known))}")
        MonkeyJumpConfig(**config)
    except ValueError as error:
        raise ValueError(f"{fields}: {error}") from error
    if found is None:
        apply_monkeyjump(model, **config)
    try:
        ours = dataclasses.asdict(_state(model)[1].config)
        if other := sorted(name for name in config if config[name] != ours[name]):
            raise ValueError(f"{fields}: saved with {other[0]}={config[other[0]]!r}, the model has {ours[other[0]]!r}")
        shapes = {name: list(tensor.shape) for name, tensor in _saved(model).items()}
        given = {name: list(tensor.shape) for name, tensor in tensors.items()}
        for name in sorted(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name)):
            here, needed = given.get(name, "missing"), shapes.get(name, "none")
            raise ValueError(f"{weights}: {name} is {here}, the model has {needed}")
    except ValueError:
        if found is None:
            remove_monkeyjump(model)
        raise
    _state(model)[0].load_state_dict(tensors, strict=False)
    return model


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within it the model gives the base model's own output, exactly: a reference pass, as in DPO."""
    root, state = _state(model)
    switches: list[tuple[Any, str, bool]] = [(stack, "enabled", False) for stack in state.stacks]
    if state.config.adapter == "peft":  # also of what is not routed: embeddings, heads, modules to save
        switches += [(m, "_disable_adapters", True) for m in root.modules() if hasattr(m, "_disable_adapters")]
    before = [getattr(part, name) for part, name, _ in switches]
    try:
        for part, name, off in switches:
            setattr(part, name, off)
        yield
    finally:
        for (part, name, _), value in zip(switches, before, strict=True):
            setattr(part, name, value)


def remove_monkeyjump(model: nn.Module) -> nn.Module:
    """Take everything off again: the base model, bit for bit, with the gradients that it required."""
    root, state = _state(model)
    for part in (state, *state.stacks, *state.routers.values(), *state.adapters.values()):
        for handle in part.handles:
            handle.remove()
    for stack in state.stacks:
        del stack.owner.monkeyjump_forwards
        for module in stack.checkpointed:
            if isinstance(checkpoint := module.__dict__.get("_gradient_checkpointing_func"), Checkpoint):
                module._gradient_checkpointing_func = checkpoint.function
    for path in (*state.routers, *state.adapters):
        del root.get_submodule(path).monkeyjump
    del root._monkeyjump
    for module, name in state.overridden:
        delattr(module, name)
    if state.config.adapter != "peft":
        for name, parameter in root.named_parameters():
            parameter.requires_grad_(name in state.trained)
    return model


def print_trainable_parameters(model: nn.Module) -> str:
    """Print, and return, how many parameters are trained, of how many."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, trained = sum(n for n, _ in counts), sum(n for n, requires_grad in counts if requires_grad)
    line = f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"
    print(line)
    return line


@torch.no_grad()
def router_statistics(model: nn.Module, reset: bool = False) -> dict[str, dict[str, Any]]:
    """What each block's experts received in training forwards, since the last reset (of all ranks, once folded).

    Returns:
        by block: experts (names); count of representations; share [E] of them (top-1) and gate_mass [E], each of sum 1;
        entropy of the shares in nats (log E: balanced); cosine [E], mean over an expert's representations to its
        center; center_cosine [E, E].
    """
    result = {}
    for name, router in _state(model)[1].routers.items():
        if not router.experts:
            continue
        sums, pending = router.statistics.split([router.centers.shape[-1], len(router.experts)], dim=-1)
        pending = torch.cat([pending, einsum(sums, router.centers, "e d, e d -> e")[:, None]], dim=-1)
        gates, cosines = (router.report + pending).cpu().split([len(router.experts), 1], dim=-1)
        counts, centers = reduce(gates, "e g -> e", "sum"), unit(router.centers).cpu()
        share = counts / counts.sum().clamp(min=1.0)
        result[name] = {
            "experts": list(router.experts),
            "count": round(counts.sum().item()),
            "share": share,
            "gate_mass": reduce(gates, "e g -> g", "sum") / counts.sum().clamp(min=1.0),
            "entropy": torch.special.entr(share).sum().item(),
            "cosine": cosines[:, 0] / counts.clamp(min=1.0),
            "center_cosine": einsum(centers, centers, "e d, f d -> e f"),
        }
        if reset:
            router.report.copy_(-pending)  # the next fold adds what is pending again
    return result


def _adalora(model: nn.Module) -> list[AdaLoRA]:
    adapters = [adapter for adapter in _state(model)[1].adapters.values() if isinstance(adapter, AdaLoRA)]
    if not adapters:
        raise ValueError(f"adapter={_state(model)[1].config.adapter!r}: rank allocation is for adapter='adalora'")
    return adapters


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
    """AdaLoRA's pruning (Zhang et al. 2023, section 3): once a step, after optimizer.step() and before zero_grad().

    A triplet (column of P, entry of L, row of Q) is as important as its smoothed sensitivity |w dL/dw| times its
    smoothed uncertainty. The budget of triplets over all projections falls from rank to target_rank, cubically; the L
    of the least important become zero, and may recover until the final phase.

    Args:
        step: of the optimizer, counted from 1, of total_steps.
        target_rank: mean rank at the end, in (0, rank].
        initial_steps, final_steps: at the start without pruning, and at the end with the choice fixed.
        interval: steps from pruning to pruning.
        beta1, beta2: smoothing of sensitivity and of uncertainty, in [0, 1).
    """
    adapters = _adalora(model)
    start = sum(adapter.lora_E.numel() for adapter in adapters)
    rank, last = start / len(adapters), total_steps - final_steps
    if not 0 < target_rank <= rank or not 0 <= initial_steps < last <= total_steps:
        given = f"target_rank={target_rank}, initial_steps={initial_steps}, final_steps={final_steps}"
        raise ValueError(f"{given}: need 0 < target_rank <= {rank}, initial + final steps < total_steps={total_steps}")
    if not (interval >= 1 and 0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"interval={interval}, beta1={beta1}, beta2={beta2}: must be >= 1, in [0, 1) and in [0, 1)")
    scores = []
    for adapter in adapters:
        score = {}
        for name, weight in adapter.named_parameters():
            sensitivity, uncertainty = getattr(adapter, f"sensitivity_{name}"), getattr(adapter, f"uncertainty_{name}")
            if step < last and weight.grad is not None:
                now = (weight * weight.grad).abs()
                sensitivity.lerp_(now, 1.0 - beta1)
                uncertainty.lerp_((now - sensitivity).abs(), 1.0 - beta2)
            score[name] = sensitivity * uncertainty
        row, column = reduce(score["lora_A"], "r i -> r", "mean"), reduce(score["lora_B"], "o r -> r", "mean")
        scores.append(score["lora_E"] + row + column)
    if step <= initial_steps or step < last and step % interval:
        return
    left = max(0.0, 1.0 - (step - initial_steps) / (last - initial_steps))
    target = target_rank * len(adapters)
    budget = int(target + (start - target) * left**3)
    if budget < start:
        threshold = torch.cat(scores).kthvalue(start - budget).values
        for adapter, score in zip(adapters, scores, strict=True):
            adapter.lora_E.masked_fill_(score <= threshold, 0.0)


def orthogonal_regularization(model: nn.Module) -> Tensor:
    """Mean of ||P^T P - I|| and ||Q Q^T - I|| (Frobenius) over the AdaLoRA adapters; scaled, a part of the loss."""
    grams = [gram for a in _adalora(model) for gram in (a.lora_B.T @ a.lora_B, a.lora_A @ a.lora_A.T)]
    return torch.stack([torch.linalg.matrix_norm(gram - torch.eye(len(gram)).to(gram)) for gram in grams]).mean()
