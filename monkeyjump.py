"""Monkey Jump: a mixture of experts made of the adapters that a Transformer block already has.

A block usually carries one adapter on each of several projections (q, k, v, o, ...). Monkey Jump
calls them experts and lets each token use only the top-k. The router is not trained: it compares
the block's input with one k-means center an expert, and the centers follow the data by an
exponential moving average.

    model(input_ids, attention_mask)
      RoutedModel        notes which tokens are real and where prompts end
        RoutedBlock      hidden h -> directions -> gates [B, N, E]; N = T (tokens) or 1 (sequences)
          RoutedLinear   y = W x + gate_e * delta_e(x)
    optimizer.step()     moves each center toward the mean of the directions nearest to it

    model = apply_monkeyjump(model, linears=["q_proj", "k_proj", "v_proj", "o_proj"], top_k=2)
    init_router_centers(model, dataloader)  # k-means on the data; then train as always
    save_adapter(model, "adapter");  model = load_adapter(base_model, "adapter")

    B, T, D     batch, tokens, width of h           centers     [E, D], unit vectors, one per expert
    E           experts of a block                  directions  [B, N, D], what is routed, length 1
    real        [B, T], False: padding; None: all   gates       [B, N, E], top_k are not 0, sum 1
    prompt_end  [B]; None: the last real token      gate        [B, N, 1], that of one expert
    Call        what a call of the model tells its blocks (real, prompt_end); defined below
    HERE        of this thread: the Call of the running model, the gates of the running block
    Wiring      what an adapted model carries: the options, its Routers and Adapters by path

Papers: Monkey Jump (arXiv 2601.06356), LoRA (2106.09685), LoRA-FA (2308.03303), AdaLoRA
(2303.10512), Propulsion (2409.10927). "Departure:" marks what differs from the authors' code
(github.com/Nusrat-Prottasha/MonkeyJump); "by f" beside a field says who sets it. MIT licence.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import itertools
import json
import math
import operator
import re
import threading
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


# The options
def option(default: Any, explanation: str) -> Any:
    """A field of MonkeyJumpConfig; HfArgumentParser shows the explanation."""
    return dataclasses.field(default=default, metadata={"help": explanation})


@dataclasses.dataclass
class MonkeyJumpConfig:
    """The options of `apply_monkeyjump`; a ValueError names the one that is not as said here."""

    blocks: dict[str, list[int]] | str | None = option(
        None, 'indices by class, {"LlamaDecoderLayer": [0, 1]}, or JSON; None: the text\'s blocks'
    )
    linears: list[str] | None = option(
        None, 'names or suffixes ("attn.c_proj"), each match an expert; None: the attention\'s'
    )
    shared_expert: list[str] | None = option(None, "projections whose adapter is always on")
    adapter: str = option("lora", "a name in ADAPTERS, a subclass of Adapter, or peft: PEFT's own")
    rank: int = option(2, "r of the LoRA family, at least 1")
    alpha: float = option(16.0, "above 0; the LoRA family is scaled by alpha / rank")
    dropout: float = option(0.0, "in [0, 1), in training, on the input of the LoRA family")
    degree: int = option(15, "the power of propulsion, at least 1")
    top_k: int = option(2, "experts that a token or sequence uses, at least 1")
    temperature: float = option(1.0, "above 0, of the softmax over cosines to the centers")
    ema_momentum: float = option(0.9, "in [0, 1], weight of the old center in a move")
    rep_mode: str = option(
        "token",
        "what is routed: each token, or each sequence as a whole, by its last real token, the mean "
        "of its real tokens, or at prompt_end: a keyword [B] of the model, else before the labels",
    )
    jitter_noise: float = option(0.0, "in [0, 1), in training, logits are times uniform 1 -/+ it")
    update_every: int = option(1, "optimizer steps from one move of the centers to the next")
    update_until: int | None = option(None, "the last step that may move them; None: no last")
    modules_to_save: list[str] | None = option(
        None, "modules trained whole and saved as well; None: the heads that a task adds"
    )

    def __post_init__(self) -> None:
        check_options(self)


# Mathematics
REP_MODES = ("token", "last", "mean", "prompt_end")


def unit(x: Tensor) -> Tensor:
    """x [..., D] -> x / |x|, at least float32; 0, which is not counted, if x is 0 or not finite."""
    at_least = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=at_least)
    return (x / norm).nan_to_num_(0.0, 0.0, 0.0)


def represent(
    hidden: Tensor, mode: str, real: Tensor | None = None, prompt_end: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """What the router looks at (Monkey Jump, section 3).

    hidden [B, T, D], real [B, T], prompt_end [B] -> representations [B, N, D] and which of them
    are real [B, N]; N = T for mode "token", else 1.
    """
    if mode == "token":
        return hidden, real
    if real is None:
        real = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
    anything = real.any(dim=1, keepdim=True)  # [B, 1]
    if mode == "mean":
        weights = real / real.sum(dim=1, keepdim=True).clamp(min=1)
        hidden = hidden.float().masked_fill(~real[..., None], 0.0)
        return einsum(hidden, weights, "b t d, b t -> b d")[:, None], anything
    # Departure: the last *real* token; the authors' code supposes that padding is on the right.
    position = real.int().cumsum(dim=1).argmax(dim=1)  # [B], where their count is first full
    if mode == "prompt_end" and prompt_end is not None:
        position = prompt_end.clamp(0, hidden.shape[1] - 1)
    index = repeat(position, "b -> b 1 d", d=hidden.shape[-1])
    return hidden.gather(1, index), anything


def route(
    directions: Tensor, centers: Tensor, top_k: int, temperature: float = 1.0, jitter_noise=0.0
) -> tuple[Tensor, Tensor]:
    """Softmax over the top_k nearest centers (Monkey Jump, section 3).

    directions [..., D], centers [E, D] -> gates [..., E] and the best expert's index [...].
    """
    logits = F.linear(directions, centers.to(directions.dtype))  # cosines [..., E]
    if temperature != 1.0:
        logits = logits / temperature
    if jitter_noise:
        noise = torch.empty_like(logits).uniform_(1.0 - jitter_noise, 1.0 + jitter_noise)
        logits = logits * noise
    top, chosen = logits.topk(min(top_k, len(centers)), dim=-1)  # [..., k]
    share = top.softmax(dim=-1)  # equals p_e / sum of the top-k p
    return torch.zeros_like(logits).scatter_(-1, chosen, share), chosen[..., 0]


def cluster_statistics(
    directions: Tensor, best: Tensor, experts: int, real: Tensor | None = None
) -> Tensor:
    """Directions [..., D], best [...], real [...] -> an expert's sum and count [E, D + 1]."""
    counts = torch.linalg.vector_norm(directions, dim=-1)  # [...]: 1, or 0 as by `unit`
    if real is not None:
        counts = counts * real
    nobody = directions.new_zeros(*counts.shape, experts)
    assigned = nobody.scatter_(-1, best[..., None], counts[..., None])  # [..., E]
    each = torch.cat([directions, counts[..., None]], dim=-1)  # [..., D + 1]
    return einsum(assigned, each, "... e, ... d -> e d")


def ema_update(centers: Tensor, statistics: Tensor, momentum: float) -> Tensor:
    """c_e <- normalize(m c_e + (1 - m) mean_e) where anything was assigned to e.

    centers [..., E, D], statistics [..., E, D + 1] -> centers [..., E, D].
    """
    # Departure: the mean is of unit vectors, since raw activations would swamp a unit center.
    sums, counts = statistics[..., :-1], statistics[..., -1:]
    means = sums / counts.clamp(min=1.0)
    return torch.where(counts > 0, unit(torch.lerp(means, centers, momentum)), centers)


def kmeans(points: Tensor, clusters: int, iterations: int, generator: torch.Generator) -> Tensor:
    """The first centers: spherical k-means after k-means++, points [P, D] -> [E, D], E <= P."""
    first = torch.randint(len(points), (1,), generator=generator, device="cpu")
    centers = points[first.to(points.device)]  # [1, D]
    tries = 2 + int(math.log(clusters))
    while len(centers) < clusters:
        nearest = (1.0 - (points @ centers.T).amax(dim=1)).clamp(min=0.0)  # [P], half a distance^2
        chances = nearest.double().cpu() + 1e-12  # points may all be the same
        drawn = torch.multinomial(chances, tries, replacement=True, generator=generator)
        candidates = points[drawn.to(points.device)]  # [M, D]
        to_each = torch.minimum(nearest[:, None], 1.0 - points @ candidates.T)  # [P, M]
        centers = torch.cat([centers, candidates[to_each.sum(dim=0).argmin()][None]])
    for _ in range(iterations):
        cosine, cluster = (points @ centers.T).max(dim=1)  # [P]
        statistics = cluster_statistics(points, cluster, clusters)  # [E, D + 1]
        farthest = points[cosine.topk(clusters, largest=False).indices]  # for empty clusters
        is_used = statistics[:, -1:] > 0
        centers = torch.where(is_used, unit(statistics[:, :-1]), farthest)
    return centers


# Adapters
class Float32Module(nn.Module):
    """Follows the model to any device, but stays float32 when it is cast: small steps need it."""

    def _apply(self, fn: Callable, recurse: bool = True) -> Float32Module:
        return super()._apply(keeping_dtype(fn), recurse)


ALWAYS_ON = -1  # index of a block's last gate, 1.0, for its shared adapters


class Adapter(Float32Module):
    """One expert, y = base + gate * delta(x).

    A subclass makes float32 parameters on `device`, and defines `delta`, which casts them to x's
    dtype, or `forward` where that spares memory. in_features, out_features: of the projection.
    """

    def __init__(self, in_features, out_features, config, device) -> None:
        super().__init__()
        self.expert = ALWAYS_ON  # index of its gate among those of the block; by build_parts
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def delta(self, x: Tensor, base: Tensor) -> Tensor:
        """x [..., in], base output W x [..., out] -> [..., out]."""
        raise NotImplementedError

    def forward(self, x: Tensor, base: Tensor, gate: Tensor | float) -> Tensor:
        """x [..., in], base [..., out], gate [..., 1] or 1.0, all of one dtype -> y [..., out]."""
        return base + gate * self.delta(x, base)


class LoRA(Adapter):
    """delta(x) = (alpha/r) B A x (Hu et al. 2021)."""

    def __init__(self, in_features, out_features, config, device) -> None:
        super().__init__(in_features, out_features, config, device)
        self.scale = config.alpha / config.rank
        self.lora_A = nn.Parameter(torch.empty(config.rank, in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, config.rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def down(self) -> Tensor:
        """What x meets first, A [r, in]."""
        return self.lora_A

    def forward(self, x: Tensor, base: Tensor, gate: Tensor | float) -> Tensor:
        """base + (alpha/r) B (gate * A x): gating r numbers instead of `out` spares memory."""
        # Departure: dropout on the input, as in LoRA, not on the output.
        narrow = gate * F.linear(self.dropout(x), self.down().to(x.dtype))  # [..., r]
        return add_product(base, narrow, self.lora_B, self.scale)


class LoRAFA(LoRA):
    """LoRA with A frozen at random (Zhang et al. 2023): no x is kept for the backward pass."""

    def __init__(self, in_features, out_features, config, device) -> None:
        super().__init__(in_features, out_features, config, device)
        self.lora_A.requires_grad_(False)


class AdaLoRA(LoRA):
    """delta(x) = (alpha/r) P diag(L) Q x (Zhang et al. 2023), P = lora_B, L = lora_E, Q = lora_A.

    `allocate_ranks` fills the buffers and prunes L by them.
    """

    def __init__(self, in_features, out_features, config, device) -> None:
        super().__init__(in_features, out_features, config, device)
        nn.init.orthogonal_(self.lora_A)
        nn.init.orthogonal_(self.lora_B)
        # Departure: zero, to start as the base model; the authors: 0.01.
        self.lora_E = nn.Parameter(self.lora_A.new_zeros(config.rank))
        for name, parameter in list(self.named_parameters()):
            self.register_buffer(f"sensitivity_{name}", torch.zeros_like(parameter.data))
            self.register_buffer(f"uncertainty_{name}", torch.zeros_like(parameter.data))

    def down(self) -> Tensor:
        """diag(L) Q [r, in]."""
        return self.lora_E[:, None] * self.lora_A


class Propulsion(Adapter):
    """delta(x) = W x * ((1 + z)^degree - 1) (Kowsher et al. 2024), one z an output."""

    def __init__(self, in_features, out_features, config, device) -> None:
        super().__init__(in_features, out_features, config, device)
        self.degree = config.degree
        # Departure: z is the deviation from 1, so that weight decay leads back to the identity.
        self.propulsion = nn.Parameter(torch.zeros(out_features, device=device))

    def delta(self, x: Tensor, base: Tensor) -> Tensor:
        """base [..., out] -> [..., out]; x is not looked at."""
        push = (1.0 + self.propulsion) ** self.degree - 1.0
        return base * push.to(base.dtype)


ADAPTERS: dict[str, type[Adapter]] = {"lora": LoRA, "lorafa": LoRAFA, "adalora": AdaLoRA}
ADAPTERS |= {"propulsion": Propulsion, "peft": Adapter}  # it only holds an index: RoutedPeft


# The router
class Router(Float32Module):
    """The gradient-free router of one block: its centers, and statistics that will move them."""

    def __init__(self, name, experts, width, config, device, reads_text) -> None:
        super().__init__()
        self.name = name  # the block's path in the model
        self.experts = experts  # the routed projections' paths in the block, in the gates' order
        self.config = config  # of the model
        self.reads_text = reads_text  # a vision block does not: no mask, no prompt_end
        nothing = torch.zeros(len(experts), width + 1, dtype=torch.float32, device=device)
        self.register_buffer("centers", random_directions(nothing[:, :-1], seed=name))
        self.register_buffer("pending", nothing)  # statistics of all ranks since the centers moved
        self.register_buffer("steps", nothing.new_zeros((), dtype=torch.long))  # of the optimizer
        # This rank's since the last step, by count_once; no buffer: DDP would overwrite it.
        self.gathered = torch.zeros_like(nothing)
        self.register_load_state_dict_pre_hook(before_loading)

    def forward(self, hidden: Tensor, call: Call) -> Tensor:
        """The block's input [B, T, D] -> gates [B, N, E] in its dtype."""
        hidden = hidden.detach()  # no gradient goes through the router
        real, prompt_end = rows_of(call, self, hidden)
        config = self.config
        noise = config.jitter_noise if self.training else 0.0
        with full_precision(hidden):
            seen, real = represent(hidden, config.rep_mode, real, prompt_end)
            directions = unit(seen)  # [B, N, D]
            gates, best = route(directions, self.centers, config.top_k, config.temperature, noise)
            count_once(call, self, directions, best, real)  # not again in a recomputation
        return gates.to(hidden.dtype)


# Each module that takes part becomes an instance of a class (mixin, its own class), as with FSDP2:
# names stay, and `super()` is the original.
class Routed:
    """Marks a module that takes part; what all such classes share is in `routed_class`."""


class RoutedModel(Routed):
    """The model and each module above its blocks; the outermost one called begins the Call."""

    monkeyjump_wiring: Wiring  # of the model; by install
    monkeyjump_arguments: tuple[str, ...]  # names in the original forward; by routed_class

    def __call__(self, *args, **kwargs):
        if HERE.call.wiring is self.monkeyjump_wiring:  # within its own call
            return super().__call__(*args, **kwargs)
        call = begin_call(self, args, kwargs)  # takes prompt_end out
        outside = HERE.call
        HERE.call = call
        try:
            output = super().__call__(*args, **kwargs)
        finally:
            HERE.call = outside
        keep_for_decoding(call, output)
        return output


class RoutedBlock(Routed):
    """A block: routes its input in `forward`, which a checkpoint runs again, with the same Call."""

    monkeyjump: Router  # by install
    monkeyjump_wiring: Wiring  # of the model; by install

    def __call__(self, *args, **kwargs):
        call = call_of_block(self)
        if torch.compiler.is_compiling():
            return routed_before_a_checkpoint(self, super().__call__, call, args, kwargs)
        return super().__call__(*args, monkeyjump_call=call, **kwargs)

    def forward(self, *args, monkeyjump_call: Call | None = None, **kwargs):
        if torch.compiler.is_compiling() and monkeyjump_call is None:  # routed already
            return super().forward(*args, **kwargs)
        outside = HERE.gates
        call = monkeyjump_call or call_of_block(self)
        HERE.gates = gates_of(self.monkeyjump, args, kwargs, call)
        try:
            return super().forward(*args, **kwargs)
        finally:
            HERE.gates = outside


def gates_of(router: Router, args: tuple, kwargs: dict, call: Call) -> tuple[Tensor | float, ...]:
    """A block's gates by expert, each [B, N, 1], and 1.0, that of shared adapters; (): off."""
    if call.disabled:
        return ()
    if not router.experts:
        return (1.0,)
    if call.kept:  # of its prompt, for a decoded token, where sequences are routed
        gates = call.kept[router.name]
    else:
        gates = router(hidden_states(args, kwargs), call)  # [B, N, E]
        if router.config.rep_mode != "token":
            call.routed[router.name] = gates
    return (*gates.split(1, dim=-1), 1.0)


class RoutedLinear(Routed):
    """A projection: its adapter adds to its output, weighted by its expert's gate."""

    monkeyjump: Adapter  # by install

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        adapter = self.monkeyjump
        base = super().forward(x, *args, **kwargs)
        gate = gate_for(adapter, base)
        if gate is None:  # adapters are off, or no block is running
            return base
        return adapter(x.to(base.dtype), base, gate)


# Moving the centers, applying
@torch.no_grad()
def update_router_centers(model: nn.Module) -> None:
    """Move the centers, if due; after a torch optimizer's step `after_any_step` does so."""
    # Departure: not in a forward, so recomputations, micro-batches and ranks see the same.
    move_centers(adapted(model).monkeyjump_wiring)


def move_centers(wiring: Wiring, stepped: bool = True) -> None:
    """The L blocks of one shape move together; stepped: this rank ran a training forward."""
    config = wiring.config
    last = math.inf if config.update_until is None else config.update_until
    wiring.collected = wiring.step_noted = False
    for routers in alike(wiring.routers):
        centers = stacked(routers, "centers")  # [L, E, D]
        gathered, count = of_all_ranks(stacked(routers, "gathered"), stepped)  # [L, E, D + 1], []
        pending = stacked(routers, "pending") + gathered
        steps = stacked(routers, "steps") + count  # [L]
        due = rearrange((steps % config.update_every == 0) & (steps <= last), "l -> l 1 1")
        moved = ema_update(centers, pending, config.ema_momentum)
        write_back(routers, "centers", torch.where(due, moved, centers))
        write_back(routers, "pending", pending.masked_fill(due, 0.0))
        write_back(routers, "steps", steps)
        torch._foreach_zero_([router.gathered for router in routers])


@torch.inference_mode(False)
def apply_monkeyjump(
    model: nn.Module, config: MonkeyJumpConfig | None = None, **options: Any
) -> nn.Module:
    """Make adapters on its blocks' projections the experts of a gradient-free router, in place.

    model: a language or vision-language model, or one that PEFT adapted (adapter="peft").
    config or options: a MonkeyJumpConfig, or its fields; `adapter` may be a subclass of Adapter.

    Returns the model; only adapters and `modules_to_save`, all float32, require gradients.
    A ValueError says what cannot be routed, and leaves the model as it was.
    """
    if config is not None and options:
        raise ValueError(f"a config and {', '.join(options)}: give a config or its fields")
    refuse_unknown(options)
    config = MonkeyJumpConfig(**options) if config is None else dataclasses.replace(config)
    refuse_unsuitable(model, config)
    parts = build_parts(model, config)  # Routers and Adapters by path
    whole = whole_modules(model, config, parts)  # modules_to_save by path
    install(model, config, parts, whole)
    return model


def remove_monkeyjump(model: nn.Module) -> nn.Module:
    """Give the base model back, bit for bit, requiring gradients as it did; returns the model."""
    uninstall(adapted(model))
    return model


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within, in this thread, outputs are the base model's, bit for bit: for a reference pass."""
    disabled = (*HERE.disabled, adapted(model).monkeyjump_wiring)
    with setting([HERE], "disabled", disabled), peft_switched_off(model):
        yield


# ---------- You have read the method. What follows makes it hold.


# State: what a call tells its blocks, what a thread is doing, what is left on a model
@dataclasses.dataclass(eq=False)
class Call:
    """One call of a model. Its blocks get it as a keyword, so that a recomputation has its own."""

    wiring: Wiring | None = None  # of the model
    cache: Any = None  # that the model was given
    disabled: bool = False  # by disable_adapters
    gathers: bool = False  # statistics, as a training forward does
    observers: list[Callable] = dataclasses.field(default_factory=list)  # see observing
    real: Tensor | None = None  # [B, T], False: padding; by note_rows, as the next two
    prompt_end: Tensor | None = None  # [B]
    kept: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # a prompt's gates, by block
    routed: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # to keep; by gates_of


class Here(threading.local):
    """What this thread is doing. Whoever sets a field puts it back."""

    def __init__(self) -> None:  # in each thread; a graph's guards do not see class attributes
        self.call = Call()  # of the model that is running; by RoutedModel
        self.gates: tuple | None = None  # of the running block, (): all are off; by RoutedBlock
        self.disabled: tuple[Wiring, ...] = ()  # models without adapters; by disable_adapters
        self.observers: tuple[tuple[Wiring, Callable], ...] = ()  # by observing


@dataclasses.dataclass(eq=False)
class Wiring:
    """What `install` leaves on a model: the options, who takes part, and what happened to it."""

    config: MonkeyJumpConfig
    parts: dict[str, Router | Adapter]  # by the path of the block or projection that they serve
    routers: dict[str, Router]  # those with experts
    whole: dict[str, nn.Module]  # modules that are trained whole, by path
    trained_before: list[str]  # names of the parameters that required gradients
    collected: bool = False  # a training forward ran since the last step; by begin_call
    graded_in_eval: bool = False  # a forward with gradients ran in eval mode; by begin_call
    step_noted: bool = False  # an optimizer stepped inside a backward pass; by after_a_step
    looked_at: bool = False  # at the first step; by warn_of_idle


HERE = Here()
LIVE_MODELS: list[weakref.ref[nn.Module]] = []  # in the same order on all ranks; by change_class


def adapted(model: nn.Module, needed: bool = True) -> nn.Module | None:
    """The adapted model inside whatever wraps it now: DDP, torch.compile, PEFT, ..."""
    found = {}
    for module in model.modules():
        if isinstance(module, RoutedModel):
            found.setdefault(module.monkeyjump_wiring, module)
    if needed and not found:
        kind = type(model).__name__
        raise ValueError(f"{kind} carries no Monkey Jump: call apply_monkeyjump first")
    if len(found) > 1:
        raise ValueError(f"{len(found)} adapted models in one: give one of them")
    return next(iter(found.values()), None)


def present(given):
    """Arguments that are not None."""
    return {name: value for name, value in given.items() if value is not None}


def begin_call(model, args, kwargs):
    """The Call for these arguments, ours taken out; ValueError for what cannot be routed."""
    wiring = model.monkeyjump_wiring
    given = present(dict(zip(model.monkeyjump_arguments, args, strict=False), **kwargs))
    for name in ("prompt_end", "monkeyjump_mask"):  # which the original forward does not know
        kwargs.pop(name, None)
    call = Call(wiring, cache_of(given), disabled=wiring in HERE.disabled)
    if call.disabled:
        return call
    call.observers = [observer for other, observer in HERE.observers if other is wiring]
    if call.observers and torch.compiler.is_compiling():
        raise ValueError("routing is not observed under torch.compile: call the model without it")
    if torch.is_grad_enabled():
        call.gathers = model.training
        if call.gathers:
            if not torch.compiler.is_compiling() and wiring.step_noted:
                move_centers(wiring)
            wiring.collected = True  # never read in a graph, which would be compiled anew
        else:
            wiring.graded_in_eval = True
    note_rows(call, given)
    return call


def call_of_block(block):
    """A block's call; torch's checkpoint_wrapper recomputes outside of it."""
    wiring = block.monkeyjump_wiring
    mode = wiring.config.rep_mode
    if HERE.call.wiring is wiring:
        return HERE.call
    if mode != "token" and block.monkeyjump.reads_text and in_backward():
        wrong = f"rep_mode={mode!r}: recomputed by checkpoint_wrapper a block lacks its rows"
        raise RuntimeError(f"{wrong}: use gradient_checkpointing_enable")
    return Call(wiring, disabled=wiring in HERE.disabled)


def routed_before_a_checkpoint(block, run, call, args, kwargs):
    """A block that is compiled: in a graph no object may change inside a checkpoint."""
    HERE.gates = gates_of(block.monkeyjump, args, kwargs, call)
    output = run(*args, **kwargs)
    HERE.gates = None
    return output


def in_backward():
    """In a backward pass, where a checkpoint runs a forward again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


# Rows: which tokens are real, where prompts end
def mask_of(given):
    """The 2-D mask, even if a static cache made it 4-D, or None."""
    return given.get("monkeyjump_mask", given.get("attention_mask"))


def note_rows(call, given):
    """Note what routing needs of the arguments."""
    tokens = given.get("input_ids", given.get("inputs_embeds"))  # [B, T] or [B, T, D]
    if tokens is None:
        return
    if call.wiring.config.rep_mode != "token":
        note_sequences(call, given, tokens, call.wiring.config.rep_mode)
    elif call.gathers or call.observers:  # statistics need the mask, routing a token does not
        call.real, _ = real_tokens(given, tokens)


def note_sequences(call, given, tokens, mode):
    """What a sequence mode needs; ValueError for rows that are not one sequence each."""
    if tokens.shape[1] == 1:
        # Departure: a decoded token keeps its sequence's routing; the authors route it by itself.
        call.kept = gates_on(call.cache)
        if call.kept:
            return
    call.real, cached = real_tokens(given, tokens)
    if call.real is None:
        if mask_of(given) is not None:
            raise ValueError(f"rep_mode={mode!r}: attention_mask must be [batch, tokens] or None")
        call.real = all_real(tokens)
    signs = signs_of_packing(given, call.real)
    if signs:
        wrong = f"{', '.join(signs)}: packed sequences would be routed as one"
        raise ValueError(f"rep_mode={mode!r}: {wrong}; token mode is right")
    if mode == "prompt_end":
        call.prompt_end = prompt_ends(given, call, cached)


def real_tokens(given, tokens):
    """Which tokens [B, T] are no padding (None: all), and how many are cached before."""
    # Departure: padding by the 2-D mask at the model's entry; blocks see a 4-D mask or none.
    mask = mask_of(given)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None, 0
    cached = mask.shape[1] - tokens.shape[1]  # the mask [B, cached + T] covers both
    return F.pad(mask != 0, (-cached, 0), value=True), cached  # a negative pad cuts off


def all_real(tokens):
    """True [B, T] for all tokens."""
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def signs_of_packing(given, real):
    """Arguments that tell several sequences in a row; reads one value from the device."""
    signs = [name for name in given if name.startswith(("cu_seq", "seq_idx"))]
    if torch.compiler.is_compiling() or real.is_meta:
        return signs
    values = {}
    if mask_of(given) is not None:
        values["attention_mask"] = mask_of(given) > 1  # it numbers them
    positions = given.get("position_ids")
    if isinstance(positions, Tensor) and positions.shape[-1] == real.shape[1]:
        both_real = (real[:, 1:] & real[:, :-1]).to(positions.device)
        move = positions.diff()  # [B, T - 1], or Qwen-VL's [3 or 4, B, T - 1]
        anew = move <= 0 if move.dim() == 2 else move[0] < 0  # an image's tokens share a time
        values["position_ids"] = anew & both_real
    found = [value.any().to(real.device) for value in values.values()]
    if found and torch.stack(found).any():
        signs += [name for name in values if values[name].any()]
    return signs


def prompt_ends(given, call, cached):
    """Ends [B]: as given, else before the first label, else None, not in training."""
    end, labels = given.get("prompt_end"), given.get("labels")
    if end is not None:
        end = torch.as_tensor(end)
        if end.shape != call.real.shape[:1] or end.is_floating_point():
            raise ValueError(f"prompt_end={end}: must be an integer for each of {len(call.real)}")
        return end.long() - cached
    if labels is not None and labels.shape == call.real.shape:
        return last_of_prompt(labels, call.real.to(labels.device))
    if call.gathers:
        missing = "prompt_end or labels (label smoothing takes them from the model)"
        raise ValueError(f"rep_mode='prompt_end': training needs {missing}")
    return None


def last_of_prompt(labels, real):
    """The position [B] before the first label [B, T] that is not -100."""
    answer = (labels != -100) & real
    first = real.int().argmax(dim=1)
    last = real.int().cumsum(dim=1).argmax(dim=1)
    end = torch.maximum(answer.int().argmax(dim=1) - 1, first)  # no prompt: the first real token
    return torch.where(answer.any(dim=1), end, last)


def rows_of(call, router, hidden):
    """real [B, T] and prompt_end [B] for a block's input; ValueError if they do not fit."""
    real = prompt_end = None
    wanted = [*hidden.shape[:2], router.centers.shape[1]]
    if router.reads_text and call.real is not None:
        real = call.real.to(hidden.device)
        wanted = [*real.shape, router.centers.shape[1]]
    if router.reads_text and call.prompt_end is not None:
        prompt_end = call.prompt_end.to(hidden.device)
    if list(hidden.shape) != wanted:
        given = list(hidden.shape)
        raise ValueError(f"block {router.name!r} routes hidden states {wanted}, not {given}")
    return real, prompt_end


def hidden_states(args, kwargs):
    """A block's input [B, T, D]; patches [T, D] of a vision block are one sequence."""
    hidden = args[0] if args else kwargs.get("hidden_states", kwargs.get("hidden_state"))
    return hidden[None] if hidden.dim() == 2 else hidden


def full_precision(hidden):
    """Routing is float32 under autocast, too."""
    device = "cpu" if hidden.is_meta else hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def gate_for(adapter, y):
    """The gate [..., 1] for y, [B, T, out] or [B * T, out]; None: none is on."""
    gates = HERE.gates
    if gates is None and in_backward():
        raise RuntimeError("a checkpoint inside a block has no gates: wrap whole blocks")
    if not gates:
        return None
    gate = gates[adapter.expert]
    if isinstance(gate, float):
        return gate
    seen = list(y.shape[:-1])
    batch, count, _ = gate.shape
    tokens = math.prod(seen) // batch
    if seen not in ([batch, tokens], [batch * tokens]) or count not in (1, tokens):
        raise ValueError(f"a routed projection sees {seen} tokens, its gates are {[batch, count]}")
    if len(seen) == 1:
        gate = rearrange(gate.expand(batch, tokens, 1), "b t 1 -> (b t) 1")
    return gate.to(y.dtype)  # a residual stream may be float32 above a bf16 base


def add_product(base, narrow, up, scale):
    """base [..., out] + scale * narrow [..., r] @ up^T, up [out, r], by one kernel."""
    # A CPU is slow with a transposed matrix, which is what its gradient wants.
    layout = torch.preserve_format if torch.is_grad_enabled() else torch.contiguous_format
    up = up.t().to(narrow.dtype, memory_format=layout)
    if narrow.dtype != base.dtype:  # autocast beside a projection that it leaves in float32
        return base + scale * (narrow @ up)
    flat = torch.addmm(base.flatten(0, -2), narrow.flatten(0, -2), up, alpha=scale)
    return flat.view_as(base)


# Decoding: the prompt's routing lies on the cache
def cache_of(given):
    """The cache among arguments or fields of an output, or None."""
    for name in ("cache", "past_key_values", "cache_params"):
        if name in given:
            return given[name]
    return None


def cache_in(output):
    """The cache in an output, a dict or a tuple, or None."""
    if isinstance(output, dict):
        return cache_of(present(output))
    values = output if isinstance(output, tuple) else ()
    return next((value for value in values if "Cache" in type(value).__name__), None)


def gates_on(cache):
    """Gates [B, 1, E] by block that lie on a cache."""
    return getattr(cache, "monkeyjump_gates", {})


def keep_for_decoding(call, output):
    """Tokens decoded later use the sequence's gates, as long as its cache lives."""
    cache = cache_in(output) if call.cache is None else call.cache
    if call.routed and cache is not None:
        cache.monkeyjump_gates = call.routed


def preparing_generation(prepare):
    """`prepare_inputs_for_generation` that hands on the 2-D mask, known only there."""

    @functools.wraps(prepare)  # generate() reads its signature
    def prepare_inputs_for_generation(self, *args, **kwargs):
        prepared = prepare(self, *args, **kwargs)
        note_generation(self.monkeyjump_wiring.config.rep_mode, present(kwargs), prepared)
        return prepared

    return prepare_inputs_for_generation


def note_generation(mode, given, prepared):
    """Hand on the mask; ValueError where a sequence mode cannot keep its routing."""
    inputs = present(prepared)
    tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
    needs_mask = tokens.shape[1] > 1
    is_first = given.get("is_first_iteration")
    cache = cache_of(given)
    if is_first and cache is not None:
        cache.monkeyjump_gates = {}  # those of an earlier generation
    if mode != "token":
        if given.get("use_cache") is False:
            raise ValueError(f"rep_mode={mode!r} keeps its routing on the cache: use_cache=True")
        if needs_mask and is_first is False:
            raise ValueError(f"rep_mode={mode!r} decodes token by token: no assisted generation")
        needs_mask = needs_mask or not gates_on(cache)
    if needs_mask:  # a decoded token does not: one that grows would make each step a new graph
        prepared["monkeyjump_mask"] = given.get("attention_mask", all_real(tokens))


# Classes, copies, types
def keeping_dtype(fn):
    """Moves a tensor as `fn` does, and casts nothing."""

    def move(tensor):
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move


def random_directions(like, seed):
    """The same on all ranks, whatever their seeds."""
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(seed.encode()))
    drawn = torch.randn(like.shape, generator=generator, dtype=torch.float32, device="cpu")
    return unit(drawn).to(like.device)


@functools.cache
def routed_class(mixin, kind):
    """A class for a module that takes part, under the original's name."""
    members = {name: getattr(kind, name) for name in ("__module__", "__qualname__")}
    members |= {"__new__": new_plain, "__reduce_ex__": reduce_routed}
    members |= {"_replicate_for_data_parallel": refuse_data_parallel}
    if mixin is RoutedModel:
        members |= methods_of_a_model(kind)
    return type(kind)(kind.__name__, (mixin, kind), members)


def methods_of_a_model(kind):
    """What a model does otherwise, beside being called."""
    signature = inspect.signature(kind.forward)
    members = {"monkeyjump_arguments": tuple(signature.parameters)[1:]}
    members["forward"] = knowing_prompt_end(kind.forward, signature)
    members["load_state_dict"] = load_state_dict
    if hasattr(kind, "prepare_inputs_for_generation"):
        prepare = kind.prepare_inputs_for_generation
        members["prepare_inputs_for_generation"] = preparing_generation(prepare)
    if hasattr(kind, "get_base_model"):  # PEFT's
        members["save_pretrained"] = with_the_router(kind.save_pretrained, save_adapter)
        members["load_adapter"] = with_the_router(kind.load_adapter, load_adapter)
    for name in {"merge_adapter", "merge_and_unload", "unload"}.intersection(dir(kind)):
        members[name] = RoutedPeft.merge  # PEFT's tuners have them
    return members


def knowing_prompt_end(forward, signature):
    """A forward with `prompt_end` in its signature, where the Trainer looks for columns."""

    @functools.wraps(forward)
    def forward_of_a_model(self, *args, prompt_end=None, **kwargs):
        if prompt_end is not None:  # RoutedModel.__call__ takes it
            raise ValueError("prompt_end: call the model, not its forward")
        return forward(self, *args, **kwargs)

    new = inspect.Parameter("prompt_end", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = sorted([*signature.parameters.values(), new], key=operator.attrgetter("kind"))
    forward_of_a_model.__signature__ = signature.replace(parameters=parameters)
    return forward_of_a_model


def new_plain(cls, *args, **kwargs):
    """`type(model)(config)` means the original class; without arguments an empty shell is made."""
    if args or kwargs:
        return cls.__bases__[1](*args, **kwargs)
    return object.__new__(cls)


def reduce_routed(module, protocol):
    """Copy and pickle cannot find a made class by its name."""
    _, _, *state = super(Routed, module).__reduce_ex__(protocol)
    return new_routed, type(module).__bases__, *state


def new_routed(mixin, kind):
    """An empty module, which copy and pickle fill."""
    module = object.__new__(kind)
    change_class(module, routed_class(mixin, kind))
    return module


def refuse_data_parallel(module):
    """nn.DataParallel asks each module for copies."""
    raise ValueError("nn.DataParallel cannot route: start processes by torchrun instead")


def change_class(module, kind):
    """Another class for a module; accelerate and transformers keep the forward they found."""
    for name in {"forward", "_old_forward"}.intersection(vars(module)):
        if getattr(vars(module)[name], "__func__", None) is type(module).forward:
            setattr(module, name, kind.forward.__get__(module))
    module.__class__ = kind
    if issubclass(kind, RoutedModel):
        LIVE_MODELS.append(weakref.ref(module, LIVE_MODELS.remove))


# Optimizer steps and ranks
@register_optimizer_step_post_hook
def after_any_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Every torch optimizer of the process comes here."""
    if getattr(optimizer, "found_inf", None):  # a fused optimizer skips a step by itself
        return
    models = {}  # one of each wiring, the outermost
    for reference in list(LIVE_MODELS):
        wiring = getattr(reference(), "monkeyjump_wiring", None)  # None: it was removed
        models.setdefault(wiring, reference())
    models.pop(None, None)
    for model in models.values():
        if is_its_own(optimizer, model):
            after_a_step(model)


def is_its_own(optimizer, model):
    """Whether it steps the model's parameters, or flat copies of them."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    parts = model.monkeyjump_wiring.parts.values()
    adapters = [parameter for part in parts for parameter in part.parameters()]
    for parameter in itertools.chain(adapters, model.parameters()):  # most often the first
        if id(parameter) in held:
            return True
    if not adapters:  # FSDP1 takes parameters off their modules, PEFT has its own
        return model.monkeyjump_wiring.config.adapter != "peft"
    return is_zeros(adapters[0])


def is_zeros(parameter):
    """DeepSpeed's ZeRO steps flat copies of its own."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def after_a_step(model):
    """The centers move, or will when the backward pass is over."""
    wiring = model.monkeyjump_wiring
    if in_backward():  # one optimizer a parameter; recomputations to come need the old centers
        wiring.step_noted = True
        return
    if not wiring.looked_at and (wiring.collected or wiring.graded_in_eval):
        warn_of_idle(model, wiring)
    if wiring.collected or ranks() > 1:  # ranks decide alike
        move_centers(wiring, stepped=wiring.collected)


def warn_of_idle(model, wiring):
    """At the first step: a model in eval mode, or adapters that no forward reached."""
    wiring.looked_at = True
    kind = type(model).__name__
    if not wiring.collected:
        warnings.warn(f"{kind} trains in eval mode: its centers do not move", stacklevel=3)
        return
    idle = [path for path, part in wiring.parts.items() if has_no_gradient(part)]
    if idle:
        warnings.warn(f"{kind}: no forward reached the adapters of {', '.join(idle)}", stacklevel=3)


def has_no_gradient(part):
    """An adapter is trained, and was not in this step."""
    gradients = []
    for parameter in part.parameters():
        if parameter.requires_grad and not is_zeros(parameter):
            gradients.append(parameter.grad)
    return bool(gradients) and all(gradient is None for gradient in gradients)


def alike(routers):
    """Routers of one shape and device, which move together."""
    groups = {}
    for router in routers.values():
        groups.setdefault((router.centers.shape, router.centers.device), []).append(router)
    return list(groups.values())


def stacked(routers, name):
    """One tensor of each, [L, ...], on the centers' device."""
    return torch.stack([getattr(router, name).to(router.centers.device) for router in routers])


def write_back(routers, name, values):
    """values [L, ...] into each router's tensor."""
    torch._foreach_copy_([getattr(router, name) for router in routers], list(values.unbind()))


def ranks():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def of_all_ranks(gathered, stepped):
    """Their summed statistics, and 1 if any has trained since the last step."""
    if ranks() == 1:
        return gathered, int(stepped)
    flag = torch.full((1,), float(stepped), device=gathered.device)
    both = torch.cat([gathered.flatten(), flag])
    dist.all_reduce(both)
    return both[:-1].view_as(gathered), (both[-1] > 0).long()


def count_once(call, router, directions, best, real):
    """What a forward saw, for observers and, in training, for this rank's statistics."""
    if in_backward():
        return
    for observer in call.observers:
        observer(router, directions, real)
    if call.gathers:
        if router.gathered.device != directions.device:  # the module has been moved
            router.gathered = torch.zeros_like(router.gathered, device=directions.device)
        router.gathered += cluster_statistics(directions, best, len(router.centers), real)


def before_loading(router, state_dict, prefix, local_metadata, *_):
    """What was seen belongs to the old centers; a caller's tensors are not ours to write."""
    if f"{prefix}centers" in state_dict:
        forget_statistics(router)
    if local_metadata.get("assign_to_params_buffers"):
        for name in [name for name in state_dict if name.startswith(prefix)]:
            state_dict[name] = state_dict[name].clone()


def forget_statistics(router):
    """New centers come, for which nothing has been gathered."""
    router.pending.zero_()
    router.gathered = torch.zeros_like(router.pending)


# Options
BUILT_IN = tuple(ADAPTERS)


def check_options(config):
    """Bring the options into one form; ValueError for what is not allowed."""
    for name in ("blocks", "linears", "shared_expert", "modules_to_save"):
        try:
            setattr(config, name, in_form(name, getattr(config, name)))
        except (AttributeError, TypeError, ValueError):
            check(config, name, False, "names, or for blocks indices by class, or None")
    for name in ("rank", "degree", "top_k", "update_every"):
        check(config, name, is_count(getattr(config, name), 1), "an integer >= 1")
    for name in ("alpha", "temperature"):
        check(config, name, 0 < number(config, name) < math.inf, "a number > 0")
    for name in ("dropout", "jitter_noise"):
        check(config, name, 0 <= number(config, name) < 1, "a number in [0, 1)")
    check(config, "ema_momentum", 0 <= number(config, "ema_momentum") <= 1, "a number in [0, 1]")
    if config.update_until is not None:
        is_step = is_count(config.update_until, 0)
        check(config, "update_until", is_step, "an integer >= 0, or None")
    check(config, "rep_mode", config.rep_mode in REP_MODES, f"one of {', '.join(REP_MODES)}")
    config.adapter = name_of_adapter(config.adapter)
    check(config, "adapter", config.adapter in list(ADAPTERS), f"one of {', '.join(ADAPTERS)}")
    if config.adapter == "peft":
        for name in ("rank", "alpha", "dropout", "degree"):
            is_default = getattr(config, name) == getattr(MonkeyJumpConfig, name)
            check(config, name, is_default, "left out: PEFT's adapters have their own")


def refuse_unknown(options):
    """ValueError for what is no field of MonkeyJumpConfig."""
    known = [field.name for field in dataclasses.fields(MonkeyJumpConfig)]
    for name in options:
        if name not in known:
            raise ValueError(f"{name}={options[name]!r}: no such option; there are {known}")


def check(config, name, is_right, allowed):
    """ValueError for an option that is not right."""
    if not is_right:
        raise ValueError(f"{name}={getattr(config, name)!r}: must be {allowed}")


def is_count(value, least):
    """An integer, which True is not."""
    return type(value) is int and value >= least


def number(config, name):
    """A number, which True is not; else nan, which is in no range."""
    value = getattr(config, name)
    return value if type(value) in (int, float) else math.nan


def in_form(name, given):
    """A list of names, or lists of indices by class, also from JSON; None as it is."""
    if given is None:
        return None
    if isinstance(given, str):
        given = json.loads(given) if name == "blocks" else [given]
    if name == "blocks":
        return {kind: list(map(operator.index, indices)) for kind, indices in given.items()}
    return list(map(str.strip, given))  # a TypeError for what is no name


def name_of_adapter(given):
    """A user's own class enters ADAPTERS, not under the name of a built-in one."""
    for name, kind in ADAPTERS.items():
        if kind is given:
            return name
    if isinstance(given, type) and issubclass(given, Adapter) and given.__name__ not in BUILT_IN:
        ADAPTERS[given.__name__] = given
        return given.__name__
    return given


# Blocks and projections
# A token mixer asks who else is there, as no feed-forward does, or hands **kwargs to a kernel.
MIXER = r"mask|cache|past|rotary|position_emb|seqlens|attentions|\b(state|kwargs)\b"
# Routers and indexers get no gradient; mamba never calls dt_proj; kv_b_proj sees cached latents
# again, zaya's v_proj_delayed a blank token, cross-attention other tokens.
NO_EXPERT = r"(?i)mlp|ffn|feed_forward|router|indexer|dt_proj|kv_b_proj|v_proj_delayed"
NO_EXPERT += r"|(cross|encoder)_?att"


def takes(module, argument):
    """Whether its forward has such an argument, a pattern."""
    return re.search(argument, " ".join(inspect.signature(type(module).forward).parameters))


def features(layer):
    """(in, out) of a dense linear of any kind, also quantised; else None."""
    if is_peft(layer):
        layer = layer.get_base_layer()
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):  # GPT-2: [in, out]
        return tuple(layer.weight.shape)
    sizes = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    if None in sizes or "Grouped" in type(layer).__name__:  # grouped: many matrices
        return None
    return sizes


def projections(block, peft=False):
    """Paths of a block's dense linears, or PEFT's, and which are experts by default."""
    found = {}
    mixers = ()  # attention or the like: SSM, convolution
    for path, module in block.named_modules():
        if takes(module, MIXER):
            mixers += (f"{path}.",)  # of the block itself ".", with which no path begins
        if peft and not is_peft(module):
            continue
        if features(module) and not path.endswith("base_layer"):
            is_mixing = path.startswith(mixers) and not re.search(NO_EXPERT, path)
            found[path] = peft or is_mixing
    return found


def language_blocks(model):
    """Paths of the language model's blocks, no vision or audio tower's."""
    tokens = embedding_of(model, "get_input_embeddings")
    owner = ""
    lists = []
    for path, module in model.named_modules():
        if module is tokens:
            owner = path
        if isinstance(module, nn.ModuleList):
            lists += [path for block in module if any(projections(block).values())]
    # Climb from the token embedding until there are lists of blocks below; take the nearest.
    while owner and not below(owner, lists):
        owner = owner.rpartition(".")[0]
    depth = operator.methodcaller("count", ".")
    lists = sorted(below(owner, lists), key=depth)
    nearest = [path for path in lists if depth(path) == depth(lists[0])]
    return [path for path, _ in model.named_modules() if path.rpartition(".")[0] in nearest]


def below(owner, paths):
    """Paths of what is in a module; "" is the whole model."""
    prefix = f"{owner}.".lstrip(".")
    return [path for path in paths if path.startswith(prefix)]


def embedding_of(model, getter):
    """What turns tokens into vectors or back, if there is any."""
    with contextlib.suppress(NotImplementedError, AttributeError):
        return getattr(model, getter)()


def find_blocks(model, wanted, text):
    """The blocks to adapt by path: at indices by class, or those of the text if None."""
    modules = dict(model.named_modules())
    there = {}
    for path, module in modules.items():
        there.setdefault(type(module).__name__, []).append(path)
    chosen = text
    if wanted is not None:
        chosen = []
        for kind, indices in wanted.items():
            paths = dict(enumerate(there.get(kind, [])))
            chosen += map(paths.get, indices)
    blocks = {path: modules.get(path, model) for path in chosen}
    takes_tokens = [takes(block, r"\binput_ids\b") for block in blocks.values()]
    if not blocks or model in blocks.values() or any(takes_tokens):  # a model is no block
        raise ValueError(f"blocks={wanted!r}: must map names in {sorted(there)} to indices")
    return blocks


def matching(paths, config, option, needed=False):
    """Paths that are or end in an option's names, in their order, then as found."""
    names = getattr(config, option) or []
    found = {}
    for name in names:
        ours = {path: None for path in paths if f".{path}".endswith(f".{name}")}
        if needed and not ours:
            raise ValueError(f"{option}={names}: no {name!r}; there are {', '.join(paths)}")
        found |= ours
    return list(found)


def experts_and_shared(found, config):
    """Which of a block's projections are routed, and which always on."""
    shared = matching(found, config, "shared_expert")
    experts = matching(found, config, "linears")
    if config.linears is None:
        experts = filter(found.get, found)
    return [path for path in experts if path not in shared], shared


def width_of(block, model):
    """D of a block's input: of its norms, else of the language model."""
    for name, weight in block.named_parameters():
        if re.fullmatch(r"\w+\.weight", name) and weight.dim() == 1:
            return len(weight)
    return model.config.get_text_config(decoder=True).hidden_size


# Applying
def refuse_unsuitable(model, config):
    """ValueError for a model that cannot be adapted as it is."""
    parameters = list(model.parameters())
    layers = list(filter(is_peft, model.modules()))
    needs_peft = config.adapter == "peft"
    faults = {
        "cannot route: start processes by torchrun instead": isinstance(model, nn.DataParallel),
        "carries Monkey Jump already: call remove_monkeyjump first": adapted(model, needed=False),
        "is an encoder-decoder":
            getattr(getattr(model, "config", None), "is_encoder_decoder", False),
        "is tensor-parallel: no tp_plan": getattr(model, "_tp_size", None) not in (None, 1),
        "is sharded: adapt it before fully_shard, without tp_plan":
            any(hasattr(parameter, "device_mesh") for parameter in parameters),
        "has layers on 'meta': adapt it before offloading":
            len(set(map(operator.attrgetter("is_meta"), parameters))) > 1,
        "must carry PEFT's adapters for adapter='peft', else none": needs_peft != bool(layers),
        "has merged PEFT adapters": any(map(operator.attrgetter("merged"), layers)),
    }
    for reason, is_so in faults.items():
        if is_so:
            raise ValueError(f"{type(model).__name__} {reason}")


def build_parts(model, config, device=None):
    """Routers and adapters by path, where the blocks are or on a device."""
    text = language_blocks(model)
    blocks = find_blocks(model, config.blocks, text)
    peft = config.adapter == "peft"
    found = {name: projections(block, peft) for name, block in blocks.items()}
    there = sorted(set(itertools.chain(*found.values())))
    for option in ("linears", "shared_expert"):
        matching(there, config, option, needed=True)
    parts = {}
    served = set()
    most = 0
    for name, block in blocks.items():
        experts, shared = experts_and_shared(found[name], config)
        most = max(most, len(experts))
        place = device or next(block.parameters()).device
        for path in experts + shared:
            layer = block.get_submodule(path)
            if layer not in served:  # zamba's blocks share their attention
                served.add(layer)
                parts[f"{name}.{path}"] = adapter = new_adapter(layer, config, place)
                if path in experts:
                    adapter.expert = experts.index(path)
        if experts + shared:
            width = width_of(block, model)
            parts[name] = Router(name, experts, width, config, place, name in text)
    check(config, "top_k", config.top_k <= most, f"at most {most}, what linears match")
    return parts


def new_adapter(layer, config, device):
    """An adapter in float32, whatever the ambient default is."""
    ambient = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        return ADAPTERS[config.adapter](*features(layer), config, device)
    finally:
        torch.set_default_dtype(ambient)


def install(model, config, parts, whole):
    """Put everything in its place; nothing is refused any more."""
    of_projections = RoutedPeft
    trained = []  # with "peft" nothing is frozen, and PEFT may have switched when we go
    if config.adapter != "peft":
        of_projections = RoutedLinear
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        model.requires_grad_(False)
    mixins = dict.fromkeys(whole, TrainedWhole) | dict.fromkeys(parts, of_projections)
    routers = {}
    for path, part in parts.items():
        if isinstance(part, Router):
            mixins[path] = RoutedBlock
            if part.experts:
                routers[path] = part
    for path, module in model.named_modules():
        if below(path, routers) and not hasattr(module, "__getitem__"):  # a list is not called
            mixins.setdefault(path, RoutedModel)
    wiring = Wiring(config, parts, routers, whole, trained)
    for path, mixin in mixins.items():
        module = model.get_submodule(path)
        if path in whole:
            train_whole(module)
        if path in parts:
            module.monkeyjump = parts[path].train(model.training)  # new dropout is off in eval
        if mixin is not of_projections:
            module.monkeyjump_wiring = wiring
        change_class(module, routed_class(mixin, type(module)))


def uninstall(model):
    """Take what `install` gave."""
    members = []
    for module in model.modules():
        if isinstance(module, Routed):
            members.append(module)
            if type(module).__bases__[0].__module__ != __name__:  # FSDP2's class is on ours
                raise ValueError(f"{type(model).__name__} is sharded: save, load on a new base")
    trained = model.monkeyjump_wiring.trained_before
    for module in members:
        if isinstance(module, TrainedWhole):
            restore_original(module)
        for name in ("monkeyjump", "monkeyjump_wiring"):
            if hasattr(module, name):
                delattr(module, name)
        change_class(module, type(module).__bases__[1])
    for name, parameter in model.named_parameters():
        if name.replace("_checkpoint_wrapped_module.", "") in trained:
            parameter.requires_grad_(True)


# Modules that are trained whole
class TrainedWhole(Routed, Float32Module):
    """A module of `modules_to_save`: float32 over any base; as it was while adapters are off."""

    monkeyjump: nn.Module  # a copy as of apply, outside the module tree; by train_whole
    monkeyjump_wiring: Wiring  # of the model; by install

    def _apply(self, fn: Callable, recurse: bool = True) -> TrainedWhole:
        probe = fn(torch.tensor([1.5, -2.25]))
        if not probe.is_meta and probe.tolist() == [1.5, -2.25]:  # else values would be lost
            self.monkeyjump._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, *args, **kwargs):
        is_off = HERE.gates == ()  # a block, which may be recomputed, knows best
        if is_off or (HERE.gates is None and self.monkeyjump_wiring in HERE.disabled):
            return self.monkeyjump.to(next(self.parameters()).device)(*args, **kwargs)
        args, kwargs = cast((args, kwargs), torch.float32)
        return cast(super().forward(*args, **kwargs), next(self.monkeyjump.parameters()).dtype)


def cast(values, dtype):
    """All floating tensors in there of this type."""

    def cast_one(tensor):
        if tensor.is_floating_point():
            return tensor.to(dtype)
        return tensor

    return torch.utils._pytree.tree_map_only(Tensor, cast_one, values)


def train_whole(module):
    """Make parameters float32 and trained, and keep what was."""
    vars(module)["monkeyjump"] = copy.deepcopy(module).requires_grad_(False)
    for parameter in module.parameters():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def restore_original(module):
    """Undo `train_whole`."""
    tensors = [*module.parameters(), *module.buffers()]
    originals = [*module.monkeyjump.parameters(), *module.monkeyjump.buffers()]
    for tensor, original in zip(tensors, originals, strict=True):
        tensor.data = original.data.to(tensor.device)
        tensor.requires_grad_(False)


def whole_modules(model, config, parts):
    """What `modules_to_save` names, by path; ValueError for what cannot be trained."""
    if config.adapter == "peft":
        check(config, "modules_to_save", not config.modules_to_save, "None: PEFT saves its own")
        return {}
    modules = dict(model.named_modules())
    found = matching(list(modules)[1:], config, "modules_to_save", needed=True)
    if config.modules_to_save is None:
        found = task_heads(model)
    whole = {}
    inner = []
    for path in sorted(found):  # a module stands before those in it
        if path not in inner:
            refuse_whole_training(path, model, parts)
            whole[path] = modules[path]
            inner += below(path, found)
    return whole


def task_heads(model):
    """Paths of what a task has put beside the base model."""
    base = getattr(model, "base_model", model)
    if base is model or embedding_of(model, "get_output_embeddings") is not None:
        return []  # what stands beside a language model's output embedding is pretrained
    heads = []
    for name, child in model.named_children():
        if child is not base and list(child.parameters()):
            heads.append(name)
    return heads


def refuse_whole_training(path, model, parts):
    """ValueError for a module with adapters, and for weights that are none, tied or packed."""
    parameters = list(model.get_submodule(path).parameters())
    if path in parts or below(path, parts) or not parameters:
        raise ValueError(f"modules_to_save: {path!r} has adapters, or no parameters")
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for parameter in parameters:
        used = names[parameter]
        if below(path, used) != used or not parameter.is_floating_point():
            raise ValueError(f"modules_to_save: {used} is tied or quantised, {parameter.dtype}")


# Centers from data
def init_router_centers(
    model_or_trainer: Any,
    dataloader: Iterable[Any] | None = None,
    *,
    subset_size: int = 4000,
    kmeans_iters: int = 15,
    rep_mode: str | None = None,
    seed: int = 0,
) -> None:
    """Set every block's centers by k-means on data (section 3); after an error the old ones stay.

    model_or_trainer, dataloader: a model and its batches, or a Trainer, which has its own.
    subset_size: tokens or sequences of all ranks; rep_mode: the model's. A ValueError for others.
    """
    model = model_or_trainer
    if not isinstance(model_or_trainer, nn.Module):
        model = model_or_trainer.model
        if dataloader is None:
            dataloader = model_or_trainer.get_train_dataloader()
    wiring = adapted(model).monkeyjump_wiring
    mode = wiring.config.rep_mode
    are_right = all(map(is_count, (subset_size, kmeans_iters, seed), (1, 0, 0)))
    if dataloader is None or rep_mode not in (None, mode) or not are_right:
        given = f"{subset_size=}, {kmeans_iters=}, {seed=}, {rep_mode=}"
        raise ValueError(f"{given}: need >= 1, 0, 0, {mode!r} and a dataloader")
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng():
        points = sample(model, wiring, dataloader, math.ceil(subset_size / ranks()), seed)
        fitted = {router: fit(router, points[router], kmeans_iters, seed) for router in points}
        for router, centers in fitted.items():
            forget_statistics(router)
            router.centers.copy_(centers)


def sample(model, wiring, dataloader, wanted, seed):
    """This rank's directions [n, D] by router, a part of every batch until it has enough."""
    from tqdm.auto import tqdm

    points = {router: router.centers[:0] for router in wiring.routers.values()}
    nothing = next(iter(points.values()))
    quota = math.ceil(wanted / min(8, max(1, operator.length_hint(dataloader, 8))))
    generator = torch.Generator().manual_seed(seed)

    def take(router, directions, real):
        """Some of a block's directions [B, N, D] join its points."""
        usable = directions.any(dim=-1)
        if real is not None:
            usable &= real
        found = directions[usable].to(router.centers)
        order = torch.randperm(len(found), generator=generator, device="cpu")
        points[router] = torch.cat([points[router], found[order[:quota]]])[:wanted]

    batches = iter(tqdm(dataloader, desc="k-means", leave=False))
    evaluating = setting(model.modules(), "training", False)
    with observing(wiring, take), torch.compiler.set_stance("force_eager"), evaluating:
        while True:
            has_enough = max(map(len, points.values())) >= wanted
            batch = None if has_enough else next(batches, None)
            # Under FSDP ranks run in step: one that has enough, or no more, stops all.
            _, is_over = of_all_ranks(nothing, batch is None)
            if is_over:
                return points
            call_with(model, batch)


def fit(router, points, iterations, seed):
    """k-means of all ranks' points [n, D] -> centers [E, D], the same on each."""
    experts = len(router.experts)
    if ranks() > 1:
        of_all = [None] * ranks()
        dist.all_gather_object(of_all, points.cpu())
        points = torch.cat(of_all).to(points.device)
    if len(points) < experts:
        found = f"{len(points)} representations for {experts} experts"
        raise ValueError(f"{found}: give more batches")
    centers = kmeans(points, experts, iterations, torch.Generator().manual_seed(seed))
    if ranks() > 1:
        dist.broadcast(centers, 0)
    return centers


def call_with(model, batch):
    """Run a model on a batch: a dict, a tuple of arguments, or a tensor."""
    root = adapted(model)
    given = batch
    if not hasattr(batch, "items"):
        values = [batch] if torch.is_tensor(batch) else batch
        given = dict(zip(root.monkeyjump_arguments, values, strict=False))
    device = next(root.parameters()).device
    tensors = {name: x.to(device) for name, x in given.items() if torch.is_tensor(x)}
    if max(map(torch.Tensor.dim, tensors.values()), default=0) < 2:
        raise ValueError(f"a batch is {batch!r:.200}, not tensors [batch, ...]")
    model(**{**given, **tensors})


# Observing the routing
@contextlib.contextmanager
def setting(owners, name, value):
    """Within, an attribute of each has this value."""
    before = [(owner, getattr(owner, name)) for owner in owners]
    for owner, _ in before:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, old in before:
            setattr(owner, name, old)


def observing(wiring, observer):
    """Each router shows `observer` what it routes in this thread, once a forward."""
    return setting([HERE], "observers", (*HERE.observers, (wiring, observer)))


@contextlib.contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """A dict {block: counts [E]} that fills as forwards run within: which expert serves what.

    Counts this thread's real tokens or sequences by nearest center, without jitter, in training
    or evaluation. The experts' names: `block.monkeyjump.experts`.
    """
    wiring = adapted(model).monkeyjump_wiring
    counts = {}
    for path, router in wiring.routers.items():
        counts[path] = router.steps.new_zeros(len(router.experts))

    def count(router, directions, real):
        """Add a block's directions [B, N, D]."""
        _, best = route(directions, router.centers, top_k=1)
        found = cluster_statistics(directions, best, len(router.experts), real)[:, -1]
        counts[router.name] += found.round().to(counts[router.name])

    with observing(wiring, count):
        yield counts


# Saving, loading
WEIGHTS = "monkeyjump.safetensors"


def saved_tensors(parts, whole):
    """What a file holds, by name: all that a resumed run needs."""
    tensors = {}
    for path, module in (parts | whole).items():
        prefix = f"{path}." if path in whole else f"{path}.monkeyjump."
        module.state_dict(destination=tensors, prefix=prefix, keep_vars=True)
    return tensors


def save_adapter(model: nn.Module, directory: str | Path) -> None:
    """Write `monkeyjump.safetensors`, which carries the config, and `monkeyjump.json`, to read.

    They hold what a resumed run needs, but PEFT's own weights. Call it on all ranks. A kill leaves
    the old or the new. A ValueError if FSDP1 or ZeRO-3 hold the parameters.
    """
    from safetensors.torch import save_file

    wiring = adapted(model).monkeyjump_wiring
    saved = saved_tensors(wiring.parts, wiring.whole)
    check_saving(model, wiring, saved)
    tensors = {}
    for name, tensor in saved.items():
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        tensors[name] = tensor.detach().cpu().contiguous()
    if ranks() > 1 and dist.get_rank() > 0:
        return
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / "monkeyjump.new"
    to_read = folder / "monkeyjump.json"
    text = json.dumps(dataclasses.asdict(wiring.config), indent=2)
    save_file(tensors, new, {"config": text})
    to_read.unlink(missing_ok=True)  # first: it is never that of other weights
    new.replace(folder / WEIGHTS)
    to_read.write_text(text)


def check_saving(model, wiring, saved):
    """ValueError where values are elsewhere; a warning of what is trained beside."""
    if wiring.config.adapter == "peft":
        return  # PEFT saves what is trained
    for path, part in (wiring.parts | wiring.whole).items():
        sizes = [0 if p.is_meta else p.numel() for p in part.parameters()]
        if not min(sizes, default=isinstance(part, Router)):
            within = "FSDP.summon_full_params or deepspeed.zero.GatheredParameters"
            raise ValueError(f"{path}: its parameters are elsewhere: save within {within}")
    trained = {p: name for name, p in model.named_parameters() if p.requires_grad}
    others = [trained[p] for p in trained.keys() - saved.values()]
    if others:
        warnings.warn(f"trained and not saved: {others}; see modules_to_save", stacklevel=3)


def load_adapter(model: nn.Module, directory: str | Path) -> nn.Module:
    """Load what `save_adapter` wrote, in place; returns the model.

    model: a plain base model (the saved config is applied) or one adapted with the same config.

    A ValueError says what is missing, does not fit or is not finite, and changes nothing.
    """
    root = adapted(model, needed=False)
    path = Path(directory) / WEIGHTS
    if not path.is_file():
        hint = "adapter_model.safetensors is of an older format; from a hub: snapshot_download"
        raise ValueError(f"{path}: no such file ({hint})")
    try:
        config, tensors = read_adapter(path, model, root)
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error
    if root is None:
        root = adapted(apply_monkeyjump(model, config))
    wiring = root.monkeyjump_wiring
    for module in model.modules():
        if hasattr(module, "reshard"):  # after a forward FSDP2's root is whole
            module.reshard()
    for router in wiring.routers.values():
        forget_statistics(router)
    with torch.inference_mode(False), torch.no_grad():
        for name, target in saved_tensors(wiring.parts, wiring.whole).items():
            target.copy_(sharded_like(target, tensors[name]))
    return model


def read_adapter(path, model, root):
    """A file's config, and tensors that fit the model; else an error."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        config = MonkeyJumpConfig(**json.loads((file.metadata() or {}).get("config", "")))
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    needed = needed_tensors(model, root, config)
    for name in sorted(tensors.keys() | needed.keys()):
        shape = getattr(tensors.get(name), "shape", None)
        wanted = getattr(needed.get(name), "shape", None)
        if shape != wanted:
            raise ValueError(f"{name} is {shape}, the model has {wanted}")
        if not tensors[name].float().isfinite().all():
            raise ValueError(f"{name} is not finite")
    return config, tensors


def needed_tensors(model, root, config):
    """What the file must hold, by name; nothing of that size is allocated."""
    if root is None:
        refuse_unsuitable(model, config)
        parts = build_parts(model, config, device="meta")
        return saved_tensors(parts, whole_modules(model, config, parts))
    wiring = root.monkeyjump_wiring
    if config != wiring.config:
        raise ValueError(f"saved with {config}, the model has {wiring.config}")
    return saved_tensors(wiring.parts, wiring.whole)


def sharded_like(target, tensor):
    """A whole tensor, or this rank's part, where the target is."""
    tensor = tensor.to(target.device, target.dtype)
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor, target.device_mesh, target.placements)
    return tensor


def load_state_dict(model, state_dict, *args, **kwargs):
    """A model's, which finds our tensors under the names of transformers as well."""
    state_dict = under_our_names(model, state_dict)
    return super(Routed, model).load_state_dict(state_dict, *args, **kwargs)


def under_our_names(model, state_dict):
    """A state dict with our tensors under their own names; ValueError for one without a place."""
    foreign = state_dict.keys() - model.state_dict().keys()
    if not any(".monkeyjump." in name for name in foreign):
        return state_dict
    from transformers.core_model_loading import revert_weight_conversion

    wiring = model.monkeyjump_wiring
    ours = list(saved_tensors(wiring.parts, wiring.whole))
    # What transformers does to names when it saves is done to numbers, which tell whose it is.
    numbers = {name: torch.tensor([float(index)]) for index, name in enumerate(ours)}
    names = {}
    for name, number in revert_weight_conversion(model, numbers).items():
        if number.numel() == 1:  # else it joins several in one
            names[name] = ours[int(number)]
    placed = {names.get(name, name): tensor for name, tensor in state_dict.items()}
    lost = [name for name in foreign & placed.keys() if ".monkeyjump." in name]
    if lost:
        raise ValueError(f"{min(lost)}: has no place in the model")
    return placed


def print_trainable_parameters(model: nn.Module) -> str:
    """Print and return how many parameters are trained, of how many; 4-bit weights unpacked."""
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        is_packed = type(parameter).__name__ == "Params4bit"
        each = 2 * parameter.element_size() if is_packed else 1
        counts[parameter.requires_grad] += parameter.numel() * each
    total = sum(counts.values())
    line = f"trainable params: {counts[True]:,} || all params: {total:,}"
    line += f" || trainable%: {100 * counts[True] / total:.4f}"
    print(line)
    return line


# PEFT
class RoutedPeft(Routed):
    """A projection that PEFT adapted, by whichever method: y = base + gate * (adapted - base)."""

    monkeyjump: Adapter  # has no parameters, knows the gate; by install

    def forward(self, x, *args, **kwargs):
        """x [..., in] -> y [..., out]."""
        y = super().forward(x, *args, **kwargs)
        gate = gate_for(self.monkeyjump, y)
        base = self.get_base_layer()(x).to(y.dtype)
        return base if gate is None else torch.lerp(base, y, gate)

    def merge(self, *args, **kwargs):
        """Refuse."""
        raise ValueError("routed adapters cannot be merged: gates differ by token")


def with_the_router(method, ours):
    """PEFT's way to save or to load, which the Trainer takes, and ours beside it."""

    @functools.wraps(method)
    def both(self, directory, *args, **kwargs):
        """PEFT's files and `monkeyjump.safetensors`."""
        result = method(self, directory, *args, **kwargs)
        if ours is save_adapter or Path(directory, WEIGHTS).is_file():
            ours(self, directory)
        return result

    return both


def is_peft(module):
    """A layer that PEFT adapted; `target_parameters` changes the base layer's own weight."""
    is_layer = hasattr(module, "get_base_layer") and hasattr(module, "merged")
    return is_layer and not hasattr(module, "parameter_name")


def peft_switched_off(model):
    """PEFT's own switch, of all threads, for what is not routed: embeddings, heads."""
    others = []
    for module in model.modules():
        if hasattr(module, "_disable_adapters") and not isinstance(module, RoutedPeft):
            others.append(module)
    return setting(others, "_disable_adapters", True)


# AdaLoRA's schedule
def adalora(model):
    """A model's AdaLoRA adapters, or ValueError."""
    wiring = adapted(model).monkeyjump_wiring
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
    """AdaLoRA's pruning (Zhang et al. 2023, section 3), between optimizer.step() and zero_grad().

    A triplet (column of P, entry of L, row of Q) is as important as its sensitivity |w dL/dw| times
    its uncertainty, both smoothed by beta. The budget falls cubically from rank to target_rank a
    projection, a mean: every `interval` steps the L of the least important become zero.

    step: from 1, once each; the initial ones do not prune, the final ones keep the choice.
    """
    adapters = adalora(model)
    rank = len(adapters[0].lora_E)
    last = total_steps - final_steps
    in_order = 0 < target_rank <= rank and 0 <= initial_steps < last <= total_steps
    if not (in_order and interval >= 1 > beta >= 0):
        given = f"{target_rank=}, {initial_steps=}, {final_steps=}, {interval=}, {beta=}"
        rule = f"ranks <= {rank}, steps in order, interval >= 1, 0 <= beta < 1"
        raise ValueError(f"{given}: need {rule}")
    scores = torch.cat([importance(adapter, beta, step < last) for adapter in adapters])
    target = target_rank * len(adapters)
    left = max(0.0, (last - step) / (last - initial_steps))
    budget = max(1, int(target + (len(scores) - target) * left**3))
    is_due = step >= last or step % interval == 0
    if initial_steps < step and is_due and budget < len(scores):
        threshold = scores.kthvalue(len(scores) - budget + 1).values
        for adapter, score in zip(adapters, scores.split(rank), strict=True):
            adapter.lora_E.masked_fill_(score < threshold, 0.0)


def importance(adapter, beta, still_learns):
    """How much each triplet matters [r], with this step's gradients."""
    score = {}
    for name, weight in adapter.named_parameters():
        sensitivity = adapter.get_buffer(f"sensitivity_{name}")
        uncertainty = adapter.get_buffer(f"uncertainty_{name}")
        if still_learns and weight.grad is not None:
            now = (weight * weight.grad).abs()
            sensitivity.lerp_(now, 1.0 - beta)
            uncertainty.lerp_((now - sensitivity).abs(), 1.0 - beta)
        score[name] = sensitivity * uncertainty
    return score["lora_E"] + score["lora_A"].mean(dim=1) + score["lora_B"].mean(dim=0)


def orthogonal_regularization(model: nn.Module) -> Tensor:
    """Mean of ||P^T P - I|| and ||Q Q^T - I|| (Frobenius): a part of AdaLoRA's loss, if scaled."""
    distances = []
    for adapter in adalora(model):
        for factor in (adapter.lora_B.T, adapter.lora_A):
            gram = factor @ factor.T  # [r, r]
            distances.append(torch.dist(gram, gram.new_ones(len(gram)).diag()))
    return torch.stack(distances).mean()
