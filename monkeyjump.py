"""Monkey Jump: a mixture of experts made of the adapters that a Transformer block already has.

A block adapted the usual way carries one adapter on each of several projections (q, k, v, o, ...). Monkey Jump calls
them the experts and lets each token use only the top-k of them. The router has no trained parameter: it compares the
block's input with one k-means center an expert, and the centers follow the data by an exponential moving average.

    model(input_ids, attention_mask)
      RoutedModel         notes which tokens are real and where prompts end
        RoutedBlock       hidden h -> directions -> gates [B, N, E]; N = T (a token each) or 1 (a sequence each)
          RoutedLinear    y = W x + gate_e * delta_e(x)
    optimizer.step()      moves each center toward the mean of the directions that were nearest to it

    model = apply_monkeyjump(model, linears=["q_proj", "k_proj", "v_proj", "o_proj"], rank=2, top_k=2)
    init_router_centers(model, dataloader)          # k-means on the data; then train as always
    save_adapter(model, "adapter");  model = load_adapter(base_model, "adapter")

    B, T, D    batch, tokens, width of the block's input h     centers     [E, D], unit vectors, one an expert
    E, top_k   experts of a block, experts used by a token     directions  [B, N, D], what is routed, of length 1
    r          rank of an adapter                              gates       [B, N, E], top_k of them not 0, of sum 1
    real       [B, T], False for padding                       gate        [B, N, 1], that of one expert

Papers: Monkey Jump (Prottasha et al. 2026, arXiv 2601.06356), LoRA (Hu 2021, 2106.09685), LoRA-FA (Zhang 2023,
2308.03303), AdaLoRA (Zhang 2023, 2303.10512), Propulsion (Kowsher 2024, 2409.10927). "Departure:" marks what differs
on purpose from the authors' code (github.com/Nusrat-Prottasha/MonkeyJump).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import math
import operator
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import einsum, rearrange, reduce, repeat
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

# -------------------------------------------------- mathematics

REP_MODES = ("token", "last", "mean", "prompt_end")
Maybe = Tensor | None


def unit(x: Tensor) -> Tensor:
    """x [..., D] -> its direction, of length 1, at least float32; zero where x is zero, too small or not finite."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)).nan_to_num_(0.0, 0.0, 0.0)


def last_true(real: Tensor) -> Tensor:
    """Index of the last True of each row: bool [B, T] -> int [B]; 0 if there is none."""
    return real.int().cumsum(dim=1).argmax(dim=1)


def last_of_prompt(labels: Tensor, real: Tensor) -> Tensor:
    """The position before the first label: labels [B, T] (-100: nothing to learn), real [B, T] -> int [B]."""
    answer = (labels != -100) & real
    end = (answer.int().argmax(dim=1) - 1).clamp(min=real.int().argmax(dim=1))  # no prompt: the first real token
    return torch.where(answer.any(dim=1), end, last_true(real))


def represent(hidden: Tensor, mode: str, real: Maybe = None, prompt_end: Maybe = None) -> tuple[Tensor, Maybe]:
    """What the router looks at (Monkey Jump, section 3): hidden [B, T, D] -> [B, N, D], and which are real [B, N].
    N = T or 1. real: bool [B, T], None: all; prompt_end: int [B], None: the last real token."""
    if mode == "token":
        return hidden, real
    real = hidden.new_ones(hidden.shape[:2], dtype=torch.bool) if real is None else real
    some = real.any(dim=1, keepdim=True)
    if mode == "mean":
        weights = real / real.sum(dim=1, keepdim=True).clamp(min=1)
        return einsum(hidden.float().masked_fill(~real[..., None], 0.0), weights, "b t d, b t -> b d")[:, None], some
    # Departure: the last *real* token, wherever the padding is; the authors' code supposes it on the right.
    position = prompt_end if mode == "prompt_end" and prompt_end is not None else last_true(real)
    index = repeat(position.clamp(0, hidden.shape[1] - 1), "b -> b 1 d", d=hidden.shape[-1])
    return hidden.gather(1, index), some


def route(
    directions: Tensor, centers: Tensor, top_k: int, temperature: float = 1.0, jitter_noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Directions [..., D], centers [E, D] -> gates [..., E], each row of sum 1, and the best expert [...] of each:
    softmax over the cosines to all centers, cut to the top_k largest and divided by their sum (section 3)."""
    logits = F.linear(directions, centers.to(directions.dtype)) / temperature
    if jitter_noise:
        logits = logits * torch.empty_like(logits).uniform_(1.0 - jitter_noise, 1.0 + jitter_noise)
    top, experts = logits.topk(min(top_k, centers.shape[0]), dim=-1)  # [..., k]; their softmax is p_e / sum of the k
    return torch.zeros_like(logits).scatter(-1, experts, top.softmax(dim=-1)), experts[..., 0]


def cluster_statistics(directions: Tensor, best: Tensor, gates: Tensor, real: Maybe) -> Tensor:
    """What moves the centers: directions [N, D], best [N], gates [N, E], real [N] or None -> [E, D + E], for each
    expert the sums of the directions assigned to it and of their gates, without padding and zero directions."""
    counts = torch.linalg.vector_norm(directions, dim=-1)  # 1, or 0 where there is no direction
    counts = counts if real is None else counts * real
    assigned = torch.zeros_like(gates).scatter(-1, best[:, None], counts[:, None])  # [N, E]
    return assigned.t() @ torch.cat([directions, gates], dim=-1)


def ema_update(centers: Tensor, sums: Tensor, counts: Tensor, momentum: float) -> Tensor:
    """c_e <- normalize(m c_e + (1 - m) mean_e), if anything was assigned to e: [..., E, D], [..., E, D], [..., E]."""
    # Departure: the mean is of unit vectors; raw activations of norm 100 would replace a unit center at once.
    means = sums / counts.clamp(min=1.0)[..., None]
    return torch.where(counts[..., None] > 0, unit(momentum * centers + (1.0 - momentum) * means), centers)


def kmeans(points: Tensor, clusters: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Spherical k-means: unit vectors [N, D] -> centers [E, D] of length 1, E = clusters <= N.
    Greedy k-means++ seeding (Arthur and Vassilvitskii 2007), of 2 + log E candidates the best; then Lloyd's iterations,
    in which a cluster that runs empty moves to the worst-served point. The generator is the CPU's, on every device."""

    def distances(to: Tensor) -> Tensor:  # [M, D] -> [N, M]; of unit vectors, half the squared Euclidean ones
        return (1.0 - points @ to.T).clamp(min=0.0)

    centers = points[torch.randint(len(points), (1,), generator=generator).to(points.device)]  # [1, D]
    while len(centers) < clusters:
        nearest = distances(centers).amin(dim=1)  # [N]
        cumulated = nearest.double().cumsum(dim=0)
        drawn = torch.rand(2 + int(math.log(clusters)), generator=generator).to(cumulated) * cumulated[-1]
        candidates = points[torch.searchsorted(cumulated, drawn).clamp(max=len(points) - 1)]  # [M, D]
        left = torch.minimum(nearest[:, None], distances(candidates))  # [N, M]
        centers = torch.cat([centers, candidates[left.sum(dim=0).argmin()][None]])
    for _ in range(iterations):
        distance, cluster = distances(centers).min(dim=1)  # [N]
        assigned = F.one_hot(cluster, clusters).to(points)  # [N, E]
        worst = points[distance.topk(clusters).indices]
        used = reduce(assigned, "n e -> e 1", "sum") > 0
        centers = torch.where(used, unit(einsum(assigned, points, "n e, n d -> e d")), worst)
    return centers


# -------------------------------------------------- adapters
class Float32Module(nn.Module):
    """Follows the model to any device, but stays float32 when it is cast: small steps are lost in less."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Module:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class Adapter(Float32Module):
    """One expert: what it adds to its projection's output, y = base + gate * delta(x).

    A subclass makes its float32 parameters in `__init__` and defines `delta`, or `forward` where there is something
    cheaper. It serves as `apply_monkeyjump(adapter=MyAdapter)`; before loading, put it into `ADAPTERS` by its name.
    """

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

    def __init__(self, in_features: int, out_features: int, config: MonkeyJumpConfig, device: torch.device) -> None:
        super().__init__(in_features, out_features, config, device)
        self.scale = config.alpha / config.rank
        self.lora_A = nn.Parameter(torch.empty(config.rank, in_features, device=device), requires_grad=self.trains_A)
        self.lora_B = nn.Parameter(torch.zeros(out_features, config.rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def down(self) -> Tensor:
        return self.lora_A

    def forward(self, x: Tensor, base: Tensor, gate: Tensor | float) -> Tensor:
        # Departure: dropout on the adapter's input, as in LoRA, not on its output. Gating r-wide spares memory.
        inner = F.linear(self.dropout(x), self.down().to(x.dtype)) * (self.scale * gate)  # [..., r]
        return base + F.linear(inner, self.lora_B.to(x.dtype))


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
        for name, parameter in list(self.named_parameters()):
            self.register_buffer(f"sensitivity_{name}", torch.zeros_like(parameter.data))
            self.register_buffer(f"uncertainty_{name}", torch.zeros_like(parameter.data))

    def down(self) -> Tensor:
        return self.lora_E[:, None] * self.lora_A


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


ADAPTERS: dict[str, type[Adapter]] = {"lora": LoRA, "lorafa": LoRAFA, "adalora": AdaLoRA, "propulsion": Propulsion}
ADAPTERS["peft"] = Adapter  # stands for what PEFT has put there: RoutedPeft


# -------------------------------------------------- router
class Pass(threading.local):
    """What one call of the model shares with its blocks and projections; each thread has its own."""

    def __init__(self, latest: list[Maybe]) -> None:
        self.disabled = False  # by disable_adapters
        self.sampled = False  # by init_router_centers
        self.running = False  # inside a RoutedModel, which notes what follows up to `kept`
        self.collecting = False  # a training forward, whose directions will move the centers
        self.real: Maybe = None  # bool [B, T]; None: no padding, or none that matters
        self.prompt_end: Maybe = None  # int [B]; None: the last real token
        self.latest = latest  # real and prompt_end of any thread, for recomputations in the backward pass's own
        self.kept: dict[str, Tensor] = {}  # by block, the prompt's gates [B, 1, E], for a decoded token
        self.routed: dict[str, Tensor] = {}  # by block, gates [B, 1, E] for the tokens to be decoded
        self.gates: Maybe = None  # of the block that is running; None: the base model alone

    def __reduce__(self) -> Any:  # a copy of the model is in no pass
        return Pass, ([None, None],)


def recomputing() -> bool:
    """In a backward pass: a checkpoint around the whole block, which calls it again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Router(Float32Module):
    """The gradient-free router of one block: it owns the centers, and the cluster_statistics that are to move them:
    `gathered`, what this rank's forwards saw since the optimizer last stepped; `pending`, what all ranks saw since the
    centers last moved; `served`, all since the last report."""

    def __init__(self, name: str, experts: list[str], width: int, config: MonkeyJumpConfig, device: Any) -> None:
        super().__init__()
        self.name, self.experts, self.config = name, experts, config
        self.register_buffer("centers", unit(torch.randn(len(experts), width, device=device)))
        self.register_buffer("pending", torch.zeros(len(experts), width + len(experts), device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long, device=device))  # of the optimizer
        self.forget()

    def forget(self) -> None:
        # Plain tensors: DDP would overwrite buffers with those of rank 0 at each forward pass.
        self.gathered, self.served = torch.zeros_like(self.pending), torch.zeros_like(self.pending)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        super()._apply(fn, recurse)
        if self.gathered.device != self.centers.device:
            self.forget()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:  # what was seen belongs to the centers that are gone
        self.pending.zero_()
        self.forget()
        super()._load_from_state_dict(*args)

    def directions(self, hidden: Tensor) -> tuple[Tensor, Maybe]:
        """The block's input [B, T, D] -> unit vectors [B, N, D], and which are real, bool [B, N] or None (all)."""
        real, prompt_end = self.current.latest if recomputing() else (self.current.real, self.current.prompt_end)
        real, prompt_end = (real, prompt_end) if self.reads_text else (None, None)
        hidden = hidden[None] if hidden.dim() == 2 else hidden  # vision blocks may see packed patches [T, D]
        wanted = [*(hidden.shape[:2] if real is None else real.shape), self.centers.shape[1]]
        if list(hidden.shape) != wanted:
            raise ValueError(f"block {self.name!r} sees hidden states {list(hidden.shape)}, not {wanted}: no routing")
        real = None if real is None else real.to(hidden.device)
        representations, real = represent(hidden, self.config.rep_mode, real, prompt_end)
        return unit(representations), real

    @torch.no_grad()
    def forward(self, hidden: Tensor) -> Tensor:
        """The block's input [B, T, D] -> gates [B, N, E] in its dtype; in training, statistics are gathered."""
        config, current = self.config, self.current
        if (kept := current.kept.get(self.name)) is not None and len(kept) == len(hidden):
            return kept
        if not self.experts:  # shared adapters alone
            return hidden.new_ones(1)
        with torch.autocast("cpu" if hidden.is_meta else hidden.device.type, enabled=False):  # route in float32
            directions, real = self.directions(hidden)
            noise = config.jitter_noise if self.training else 0.0
            gates, best = route(directions, self.centers, config.top_k, config.temperature, noise)
            if current.collecting and not recomputing():
                flat = [None if t is None else t.flatten(0, 1) for t in (directions, best, gates, real)]
                self.gathered.add_(cluster_statistics(*flat))
        gates = gates.to(hidden.dtype)
        if config.rep_mode != "token":
            current.routed[self.name] = gates
        return gates


@torch.no_grad()
def update_router_centers(model: nn.Module) -> None:
    """Move the centers, if due, by what all ranks gathered: every optimizer step does it, without one it is to call."""
    # Departure: between steps, not inside a forward, so that checkpoints, micro-batches and ranks see the same centers.
    wiring = adapted(model).monkeyjump
    config, wiring.collected = wiring.config, False
    for router in wiring.routers().values():
        if world_size() > 1:
            dist.all_reduce(router.gathered)
        router.steps += 1
        router.served += router.gathered
        router.pending += router.gathered  # [E, D + E]
        router.gathered.zero_()
        due = router.steps % config.update_every == 0
        due = due if config.update_until is None else due & (router.steps <= config.update_until)
        sums, gates = router.pending.tensor_split([router.centers.shape[1]], dim=1)
        moved = ema_update(router.centers, sums, reduce(gates, "e g -> e", "sum"), config.ema_momentum)
        router.centers.copy_(torch.where(due, moved, router.centers))
        router.pending *= ~due


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


# -------------------------------------------------- routed classes
#
# A module that takes part is given a subclass of its own class, made on the fly, as FSDP2 does. Nothing else about it
# changes: not its name, not the names of its parameters, not what isinstance says. A call meets these mixins in turn.

CACHES = ("cache", "past_key_values", "cache_params")  # the cache, as a keyword and as a field of the output


class Routed:
    """What the mixins share: copies and pickles are made from the mixin and the original class."""

    def __reduce_ex__(self, protocol: int) -> Any:
        _, _, *state = super().__reduce_ex__(protocol)
        return new_routed, type(self).__bases__, *state


class RoutedModel(Routed):
    """The model, and each module between it and its blocks: the one that is called notes what the blocks must know."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.argument_names = list(inspect.signature(cls.forward).parameters)[1:]
        if prepare := getattr(cls, "prepare_inputs_for_generation", None):
            # generate() reads its signature. Here the 2-D mask is still known, which a static cache turns into a 4-D
            # one, and whether a generation starts: gates that an older one left with the cache must go.
            @functools.wraps(prepare)
            def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
                inputs = prepare(self, *args, **kwargs)
                if (cache := cache_of(kwargs)) is not None and kwargs.get("is_first_iteration"):
                    vars(cache).pop("monkeyjump_gates", None)
                return inputs | {"monkeyjump_mask": kwargs.get("attention_mask")}

            cls.prepare_inputs_for_generation = prepare_inputs_for_generation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        wiring, current = self.monkeyjump, self.monkeyjump.current
        if current.running:
            return super().__call__(*args, **kwargs)
        given = dict(zip(self.argument_names, args, strict=False), **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("prompt_end", "monkeyjump_mask")}
        current.collecting = self.training and torch.is_grad_enabled() and not current.disabled
        note_rows(current, given, wiring.config.rep_mode)
        if current.collecting:
            wiring.collected = True
        current.running = True
        try:
            output = super().__call__(*args, **kwargs)
        finally:
            current.running = False
        if (
            current.routed
            and (cache := cache_of(given | dict(output) if isinstance(output, dict) else given)) is not None
        ):
            cache.monkeyjump_gates = current.routed
        return output


class RoutedBlock(Routed):
    """A block: its input is routed outside of any checkpoint, and each checkpointed forward takes its gates along."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        router, current = self.monkeyjump, self.monkeyjump.current
        hidden = args[0] if args else kwargs.get("hidden_states", kwargs.get("hidden_state"))
        gates = None if current.disabled else router(hidden)
        if torch.compiler.is_compiling():  # the graph carries the gates; no object may change inside a checkpoint
            current.gates = gates
        else:
            kwargs["monkeyjump_gates"] = gates
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if "monkeyjump_gates" in kwargs:
            self.monkeyjump.current.gates = kwargs.pop("monkeyjump_gates")
        return super().forward(*args, **kwargs)


class RoutedLinear(Routed):
    """A projection: its adapter adds to its output, weighted by its expert's gate."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter, gates = self.monkeyjump, self.monkeyjump.current.gates
        base = super().forward(x, *args, **kwargs)
        return base if gates is None else adapter(x.to(base.dtype), base, gate_of(adapter.expert, gates, x))


class RoutedPeft(Routed):
    """A projection that PEFT adapted, by whichever method: y = base + gate * (adapted - base)."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter, gates = self.monkeyjump, self.monkeyjump.current.gates
        if adapter.expert is None and gates is not None:
            return super().forward(x, *args, **kwargs)
        base = self.get_base_layer()(x, *args, **kwargs)
        if gates is None:
            return base
        y = super().forward(x, *args, **kwargs)
        return torch.lerp(base.to(y.dtype), y, gate_of(adapter.expert, gates, x).to(y.dtype))

    def merge(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("routed adapters cannot be merged: gates differ by token. Call remove_monkeyjump first")


def gate_of(expert: int | None, gates: Tensor, x: Tensor) -> Tensor | float:
    """The gate [..., 1] of an expert out of [B, N, E], for its projection's input x [B, T, in] or [B * T, in]."""
    if expert is None:  # shared: always on
        return 1.0
    gate, (batch, count) = gates[..., expert, None], gates.shape[:2]
    if x.dim() == 3 and x.shape[0] == batch and count in (1, x.shape[1]):
        return gate
    if x.dim() == 2 and len(x) % batch == 0 and count in (1, len(x) // batch):
        return rearrange(gate.expand(batch, len(x) // batch, 1), "b t 1 -> (b t) 1")
    seen = f"a projection sees {list(x.shape[:-1])} tokens, its block has gates for {[batch, count]}"
    raise ValueError(f"{seen}: leave this projection out of linears")


def cache_of(given: dict[str, Any]) -> Any:
    return next((given[name] for name in CACHES if name in given and given[name] is not None), None)


def note_rows(current: Pass, given: dict[str, Any], mode: str) -> None:
    """Notes of a model's arguments, by name, what routing must know. Raises ValueError for what it would get wrong."""
    current.real, current.prompt_end, current.kept, current.routed = None, None, {}, {}
    tokens = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
    if tokens is None or mode == "token" and not (current.collecting or current.sampled):
        return  # in inference a padded token's routing harms nobody
    # Departure: padding by the 2-D mask at the model's entry; blocks see a 4-D mask or none.
    mask, past = given.get("monkeyjump_mask", given.get("attention_mask")), 0
    if isinstance(mask, Tensor) and mask.dim() == 2:  # [B, past + T]
        past = mask.shape[1] - tokens.shape[1]
        current.real = F.pad(mask != 0, (-past, 0), value=True)
    if mode == "token":
        return
    labels, end, position = (given.get(name) for name in ("labels", "prompt_end", "position_ids"))
    real = tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if current.real is None else current.real
    packed = [name for name in given if re.match("cu_seq|seq_idx", name) and given[name] is not None]
    if isinstance(position, Tensor) and position.shape == real.shape and not torch.compiler.is_compiling():
        anew = (position[:, 1:] <= position[:, :-1]) & real[:, 1:] & real[:, :-1]
        packed += ["position_ids that start anew"] if anew.any() else []
    if mode == "prompt_end" and end is not None:
        current.prompt_end = torch.as_tensor(end).long() - past
    elif mode == "prompt_end" and labels is not None and labels.shape == real.shape:
        current.prompt_end = last_of_prompt(labels, real)
    blind = mode == "prompt_end" and current.collecting and current.prompt_end is None
    for wrong, message in (
        (packed, f"{packed}: packed sequences would be routed as one"),
        (mask is not None and current.real is None, "attention_mask must be [batch, tokens]"),
        (end is not None and torch.as_tensor(end).shape != real.shape[:1], "prompt_end must be [batch]"),
        (blind, "training needs labels [batch, tokens] (label smoothing takes them away) or prompt_end"),
    ):
        if wrong:
            raise ValueError(f"rep_mode={mode!r}: {message}")
    if not torch.compiler.is_compiling():
        current.latest[:] = current.real, current.prompt_end
    if tokens.shape[1] == 1:
        # Departure: in the sequence modes a decoded token keeps the prompt's routing; the authors route it by itself.
        current.kept = getattr(cache_of(given), "monkeyjump_gates", {})


@functools.cache
def routed_class(mixin: type, kind: type) -> type:
    # With the original's names, by which transformers looks classes up.
    return type(kind)(kind.__name__, (mixin, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


def new_routed(mixin: type, kind: type) -> nn.Module:
    made = routed_class(mixin, kind)
    module = made.__new__(made)
    if mixin is RoutedModel:
        MODELS.append(weakref.ref(module, MODELS.remove))
    return module


def change_class(module: nn.Module, kind: type) -> None:
    module.__class__ = kind
    if "_old_forward" in vars(module):  # accelerate's hooks call what forward was when they came
        module._old_forward = kind.forward.__get__(module)


@dataclasses.dataclass
class Wiring:
    """What `apply_monkeyjump` leaves on a model: the options, and who takes part."""

    config: MonkeyJumpConfig
    current: Pass
    parts: dict[str, Router | Adapter]  # by the path of the block or projection that they serve
    trained_before: list[nn.Parameter]
    collected: bool = False  # a training forward ran since the optimizer last stepped

    def routers(self) -> dict[str, Router]:
        return {path: part for path, part in self.parts.items() if isinstance(part, Router) and part.experts}


def adapted(model: nn.Module, needed: bool = True) -> nn.Module | None:
    """The adapted model inside whatever wraps it now: DDP, torch.compile, PEFT, ..."""
    root = next((module for module in model.modules() if isinstance(module, RoutedModel)), None)
    if root is None and needed:
        raise ValueError(f"this {type(model).__name__} carries no Monkey Jump: call apply_monkeyjump first")
    return root


MODELS: list[weakref.ref[nn.Module]] = []  # in the order in which all ranks adapt them


def after_optimizer_step(*_: Any) -> None:
    # Whose parameters the optimizer holds is not asked: FSDP1 and ZeRO step flattened ones.
    for model in [reference() for reference in MODELS]:
        if isinstance(model, RoutedModel) and model.monkeyjump.collected:
            update_router_centers(model)


register_optimizer_step_post_hook(after_optimizer_step)


# -------------------------------------------------- blocks and projections

# A token mixer asks who else is there, as no feed-forward does, or hands **kwargs on to the attention kernel.
MIXER_ARGUMENTS = re.compile(r"mask|cache|past|rotary|position_emb|seqlens|attentions|^(state|kwargs)$")
# Routers and indexers choose by top-k, which has no gradient; mamba's dt_proj is never called; kv_b_proj sees cached
# latents at each decoded token, zaya's v_proj_delayed a blank one, cross-attention an image's tokens.
NOT_A_PROJECTION = re.compile(r"mlp|ffn|feed_forward|router|indexer|dt_proj|kv_b_proj|v_proj_delayed|cross_?att", re.I)


def features(layer: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a dense linear layer of any kind, quantised ones included; None for anything else."""
    layer = layer.get_base_layer() if is_peft(layer) else layer
    kind = type(layer).__name__  # a grouped linear is block-diagonal: no single matrix to add a low-rank one to
    if hasattr(layer, "in_features") and hasattr(layer, "out_features") and "Grouped" not in kind:
        return layer.in_features, layer.out_features
    return tuple(layer.weight.shape) if kind == "Conv1D" and hasattr(layer, "nf") else None  # GPT-2: [in, out]


def is_peft(module: nn.Module) -> bool:
    """A layer that PEFT adapted; but with `target_parameters` its base layer runs with the adapted weight."""
    return hasattr(module, "get_base_layer") and hasattr(module, "merged") and not hasattr(module, "parameter_name")


def projections(block: nn.Module, peft: bool = False) -> list[str]:
    """Paths of the dense linears of a block, or of those that PEFT has adapted, as found."""
    found = [path for path, module in block.named_modules() if features(module) and (is_peft(module) or not peft)]
    return [path for path in found if not (peft and path.endswith("base_layer"))]  # one PEFT layer in another


def attention_projections(block: nn.Module) -> list[str]:
    """Those of the block's attention or of its counterpart (mixer, SSM, convolution)."""
    arguments = {
        f"{p}.": " ".join(inspect.signature(type(m).forward).parameters) for p, m in block.named_modules() if p
    }
    mixers = tuple(path for path, names in arguments.items() if any(map(MIXER_ARGUMENTS.search, names.split())))
    return [path for path in projections(block) if path.startswith(mixers) and not NOT_A_PROJECTION.search(path)]


def language_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of the language model by path, without those of vision or audio towers: it is what reads tokens, so
    climb from their embedding until there are lists of blocks below, and take the nearest."""
    modules, tokens = dict(model.named_modules()), None
    with contextlib.suppress(NotImplementedError, AttributeError):  # no embeddings, or no model of transformers
        tokens = model.get_input_embeddings()
    lists = [p for p, m in modules.items() if isinstance(m, nn.ModuleList) and any(map(attention_projections, m))]
    owner = next((path for path, module in modules.items() if module is tokens), "")
    while owner and not any(path.startswith(f"{owner}.") for path in lists):
        owner = owner.rpartition(".")[0]
    below = [path for path in lists if not owner or path.startswith(f"{owner}.")]
    nearest = [path for path in below if path.count(".") == min(other.count(".") for other in below)]
    return {path: module for path, module in modules.items() if path.rpartition(".")[0] in nearest}


def find_blocks(model: nn.Module, blocks: dict[str, list[int]] | None) -> dict[str, nn.Module]:
    """The blocks to adapt, by path, in the model's order; all of the language model for None."""
    modules = dict(model.named_modules())
    classes = {type(block).__name__ for m in modules.values() if isinstance(m, nn.ModuleList) for block in m}
    chosen = [*language_blocks(model)] if blocks is None else []
    for name, indices in (blocks or {}).items():
        paths = dict(enumerate(path for path, module in modules.items() if type(module).__name__ == name))
        chosen += [paths.get(index) for index in indices] if paths else [None]
    whole = [p for p in chosen if p in modules and "input_ids" in inspect.signature(modules[p].forward).parameters]
    if None in chosen or whole or not chosen:
        raise ValueError(f"blocks={blocks!r}: must map names of {', '.join(sorted(classes)) or 'no class'} to indices")
    return {path: module for path, module in modules.items() if path in chosen}


def block_width(model: nn.Module, block: nn.Module) -> int:
    """D of the block's input: as wide as the block's norm; without one, as the language model."""
    weights = [getattr(child, "weight", None) for child in block.children()]
    widths = [len(weight) for weight in weights if isinstance(weight, Tensor) and weight.dim() == 1]
    return widths[0] if widths else model.config.get_text_config(decoder=True).hidden_size


# -------------------------------------------------- applying, removing
@dataclasses.dataclass(frozen=True)
class MonkeyJumpConfig:
    """The options of `apply_monkeyjump`. Raises ValueError for one that is not as said here."""

    blocks: dict[str, list[int]] | None  # indices by class name, {"LlamaDecoderLayer": [0, 1]}; None: the text model's
    linears: list[str] | None  # leaf names or suffixes ("attn.c_proj"), each match an expert; None: the attention's
    shared_expert: list[str] | None  # projections whose adapter is always on
    adapter: str  # a name in ADAPTERS; "peft": route the adapters that PEFT has put there
    rank: int  # r of the LoRA family, >= 1
    alpha: float  # > 0: the LoRA family is scaled by alpha / rank
    dropout: float  # in [0, 1): in training, on the input of the LoRA family
    degree: int  # the power of propulsion, >= 1
    top_k: int  # experts that a token or sequence uses, >= 1
    temperature: float  # of the softmax over cosines, > 0
    ema_momentum: float  # weight of the old center in each move, in [0, 1]
    # What is routed: each "token"; or each sequence, by its "last" real token, the "mean" of its real tokens, or the
    # last token of its prompt: "prompt_end", a keyword [B] of the model's forward, else the position before the first
    # label that is not -100, else (never in training) the last real token.
    rep_mode: str
    jitter_noise: float  # in [0, 1): in training, logits are multiplied by uniform noise in 1 -/+ jitter_noise
    update_every: int  # the centers move at every so-manieth step of the optimizer, >= 1
    update_until: int | None  # and not after this step

    def __post_init__(self) -> None:
        for names, kinds, right, allowed in (
            ("adapter", {str}, lambda v: v in ADAPTERS, f"one of {', '.join(ADAPTERS)}"),
            ("rep_mode", {str}, lambda v: v in REP_MODES, f"one of {', '.join(REP_MODES)}"),
            ("blocks", {dict}, lambda v: {*map(type, v.values())} <= {list}, "indices by class name, or None"),
            ("linears shared_expert", {list}, lambda v: {*map(type, v)} <= {str}, "names, or None"),
            ("rank degree top_k update_every", {int}, lambda v: v >= 1, "an integer >= 1"),
            ("update_until", {int}, lambda v: v >= 0, "an integer >= 0, or None"),
            ("alpha temperature", {int, float}, lambda v: 0 < v < math.inf, "a number > 0"),
            ("dropout jitter_noise", {int, float}, lambda v: 0 <= v < 1, "a number in [0, 1)"),
            ("ema_momentum", {int, float}, lambda v: 0 <= v <= 1, "a number in [0, 1]"),
        ):
            for name in names.split():
                value = getattr(self, name)
                if not (value is None and "None" in allowed) and not (type(value) in kinds and right(value)):
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

    The model is any causal or vision-language one, adapter also a subclass of Adapter; MonkeyJumpConfig explains the
    options. Returns the same model, of which only adapter parameters (float32) require gradients. Raises ValueError,
    before anything is changed, that says what was given, what is allowed, and what there is.
    """
    if isinstance(adapter, type) and issubclass(adapter, Adapter):
        name = next((name for name, kind in ADAPTERS.items() if kind is adapter), adapter.__name__)
        ADAPTERS[name], adapter = adapter, name
    if isinstance(blocks, dict):
        blocks = {name: list(v) if isinstance(v, Iterable) else v for name, v in blocks.items()}
    names = [[v] if isinstance(v, str) else list(v) if isinstance(v, Iterable) else v for v in (linears, shared_expert)]
    adapters = {"adapter": adapter, "rank": rank, "alpha": alpha, "dropout": dropout, "degree": degree}
    routing = {"top_k": top_k, "temperature": temperature, "rep_mode": rep_mode, "jitter_noise": jitter_noise}
    moving = {"ema_momentum": ema_momentum, "update_every": update_every, "update_until": update_until}
    config = MonkeyJumpConfig(blocks, *names, **adapters, **routing, **moving)
    install(model, make_parts(model, config), config)
    return model


def make_parts(model: nn.Module, config: MonkeyJumpConfig, device: Any = None) -> dict[str, Router | Adapter]:
    """Routers and adapters by the path of what they serve, on its device unless another is given. The model stays as it
    is. Raises ValueError for whatever cannot be routed rightly."""
    peft, layers, parameters = config.adapter == "peft", list(filter(is_peft, model.modules())), [*model.parameters()]
    for wrong, message in (
        (adapted(model, needed=False), "carries Monkey Jump already: call remove_monkeyjump first"),
        (getattr(getattr(model, "config", None), "is_encoder_decoder", False), "is an encoder-decoder: not supported"),
        (len({p.is_meta for p in parameters}) > 1, "has layers on 'meta' (offloaded): adapt it before dispatch"),
        (any(hasattr(p, "device_mesh") for p in parameters), "is sharded: adapt it before fully_shard"),
        (peft != bool(layers), "must carry adapters of PEFT for adapter='peft', and none for the others"),
        (any(layer.merged for layer in layers), "has its PEFT adapters merged: unmerge them first"),
    ):
        if wrong:
            raise ValueError(f"this {type(model).__name__} {message}")

    def match(paths: list[str], names: list[str] | None) -> list[str]:  # in the order of the names, then as found
        return list(dict.fromkeys(p for name in names or [] for p in paths if f".{p}".endswith(f".{name}")))

    blocks, current, text = find_blocks(model, config.blocks), Pass([None, None]), language_blocks(model)
    there = {path: projections(block, peft) for path, block in blocks.items()}
    available = sorted({name for names in there.values() for name in names})
    if missing := [n for n in (config.linears or []) + (config.shared_expert or []) if not match(available, [n])]:
        raise ValueError(f"{missing}: no projections of these blocks; there are {', '.join(available)}")
    parts, made = {}, {}
    for path, block in blocks.items():
        default = there[path] if peft else attention_projections(block)
        shared = match(there[path], config.shared_expert)
        experts = default if config.linears is None else match(there[path], config.linears)
        experts = [name for name in experts if name not in shared]
        if experts or shared:
            at = device or next(block.parameters()).device
            parts[path] = Router(path, experts, block_width(model, block), config, at)
            parts[path].current, parts[path].reads_text = current, path in text
        for name in experts + shared:
            if (layer := block.get_submodule(name)) not in made:  # zamba's blocks share their attention
                made[layer] = parts[f"{path}.{name}"] = ADAPTERS[config.adapter](*features(layer), config, at)
                made[layer].current, made[layer].expert = current, experts.index(name) if name in experts else None
    most = max((len(part.experts) for part in parts.values() if isinstance(part, Router)), default=0)
    if config.top_k > most:
        raise ValueError(
            f"top_k={config.top_k}: must be at most {most}, the experts that linears={config.linears} gives a block"
        )
    return parts


def install(model: nn.Module, parts: dict[str, Any], config: MonkeyJumpConfig) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wiring = Wiring(config, next(iter(parts.values())).current, parts, trained)
    if config.adapter != "peft":
        model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        above = not path or any(block.startswith(f"{path}.") for block in wiring.routers())
        if path in parts:
            module.monkeyjump = parts[path].train(model.training)  # in eval mode new dropout must not drop
            mixin = RoutedBlock if isinstance(parts[path], Router) else RoutedPeft if is_peft(module) else RoutedLinear
        elif above and not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            module.monkeyjump, mixin = wiring, RoutedModel
        else:
            continue
        change_class(module, routed_class(mixin, type(module)))
    MODELS.append(weakref.ref(model, MODELS.remove))


def remove_monkeyjump(model: nn.Module) -> nn.Module:
    """Take everything off again: the base model, bit for bit, with the gradients that it required."""
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
    """Within it, in this thread, the model gives the base model's own output, exactly: a reference pass, as in DPO."""
    switches = [(adapted(model).monkeyjump.current, "disabled")]
    # PEFT's own switch serves also what is not routed: embeddings, heads, modules to save.
    switches += [(module, "_disable_adapters") for module in model.modules() if hasattr(module, "_disable_adapters")]
    before = [(part, name, getattr(part, name)) for part, name in switches]
    try:
        for part, name in switches:
            setattr(part, name, True)
        yield
    finally:
        for part, name, value in before:
            setattr(part, name, value)


# -------------------------------------------------- centers from data
def init_router_centers(
    model_or_trainer: Any,
    dataloader: Iterable[Any] | None = None,
    *,
    subset_size: int = 4000,
    kmeans_iters: int = 15,
    rep_mode: str | None = None,
    seed: int = 0,
) -> None:
    """Set the centers of every block by k-means on the data (Monkey Jump, section 3), in just enough forward passes.

    Args:
        model_or_trainer: an adapted model, or a transformers Trainer of one.
        dataloader: batches that the model takes; None with a Trainer: its training batches.
        subset_size: representations (real tokens or sequences) a block, over all ranks, at most an eighth of them from
            one batch; they take 4 * subset_size * width * blocks bytes.
        kmeans_iters: Lloyd's iterations.
        rep_mode: None, or the applied one.
        seed: of the choice of tokens and of k-means.

    Raises:
        ValueError: for wrong arguments, batches that the model does not take, too few of them; the centers stay.
    """
    from tqdm.auto import tqdm

    if hasattr(model_or_trainer, "get_train_dataloader"):
        dataloader = model_or_trainer.get_train_dataloader() if dataloader is None else dataloader
        model_or_trainer = model_or_trainer.model
    model, root = model_or_trainer, adapted(model_or_trainer)
    if rep_mode not in (None, applied := root.monkeyjump.config.rep_mode):
        raise ValueError(f"{rep_mode=}: the model was adapted with rep_mode={applied!r}")
    if dataloader is None or any(type(n) is not int or n < 0 for n in (subset_size - 1, kmeans_iters, seed)):
        given = f"{dataloader=}, {subset_size=}, {kmeans_iters=}, {seed=}"
        raise ValueError(f"{given}: need batches (only a Trainer brings its own) and integers >= 1, >= 0 and >= 0")
    wanted = -(-subset_size // world_size())
    quota = -(-wanted // min(8, max(1, operator.length_hint(dataloader, 8))))
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    seen = {router: router.centers[:0] for router in root.monkeyjump.routers().values()}  # directions [n, D]

    def collect(router: Router, args: tuple[Any, ...]) -> None:
        directions, real = router.directions(args[0])
        counts = directions.any(dim=-1)
        directions = directions[counts if real is None else counts & real]
        chosen = torch.randperm(len(directions), generator=generator)[:quota].to(directions.device)
        seen[router] = torch.cat([seen[router], directions[chosen]])[:wanted]

    training = [module for module in model.modules() if module.training]
    handles = [router.register_forward_pre_hook(collect) for router in seen]
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng():
        try:
            model.eval()
            root.monkeyjump.current.sampled = True
            with tqdm(total=wanted, desc="k-means: representations", leave=False) as bar:
                for batch in dataloader:
                    batch = [batch] if torch.is_tensor(batch) else batch
                    given = batch if hasattr(batch, "items") else dict(zip(root.argument_names, batch, strict=False))
                    if not any(torch.is_tensor(value) and value.dim() > 1 for value in given.values()):
                        raise ValueError(
                            f"a batch of the dataloader is {batch!r:.200}, not tensors that the model takes"
                        )
                    model(**{n: v.to(device) if torch.is_tensor(v) else v for n, v in given.items()})
                    bar.update(max(map(len, seen.values())) - bar.n)
                    if bar.n >= wanted:
                        break
        finally:
            root.monkeyjump.current.sampled = False
            for handle in handles:
                handle.remove()
            for module in training:
                module.training = True
        for router, points in seen.items():
            if world_size() > 1:
                of_all: list[Any] = [None] * world_size()
                dist.all_gather_object(of_all, points.cpu())
                points = torch.cat(of_all).to(points.device)
            if len(points) < (experts := len(router.experts)):
                raise ValueError(f"{len(points)} representations in these batches for {experts} experts: give more")
            seen[router] = kmeans(points, experts, kmeans_iters, torch.Generator().manual_seed(seed))
        for router, centers in seen.items():
            if world_size() > 1:
                dist.broadcast(centers, 0)
            router.load_state_dict({"centers": centers}, strict=False)


# -------------------------------------------------- saving, loading
def saved_tensors(parts: dict[str, Router | Adapter]) -> dict[str, Tensor]:
    """What an adapter file holds, by name: all but what only going on with training needs."""
    states = {f"{path}.monkeyjump.": part.state_dict(keep_vars=True).items() for path, part in parts.items()}
    tensors = {path + name: tensor for path, state in states.items() for name, tensor in state}
    return {name: t for name, t in tensors.items() if not re.search(r"\.(pending|sensitivity_|uncertainty_)\w*$", name)}


def adapter_files(directory: str | os.PathLike[str], peft: bool) -> list[Path]:
    prefix = "router" if peft else "adapter"
    return [Path(directory, f"{prefix}_model.safetensors"), Path(directory, f"{prefix}_config.json")]


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write `adapter_model.safetensors`, which carries the config, and `adapter_config.json`, a copy to read.

    Named `router_...` for adapter="peft", whose weights PEFT's own `save_pretrained` writes. A kill at any moment
    leaves the old adapter or the new one. In a distributed run call it on every rank; rank 0 writes.
    """
    from safetensors.torch import save_file

    wiring = adapted(model).monkeyjump
    tensors = saved_tensors(wiring.parts).items()
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors}  # of all shards (FSDP2)
    if world_size() > 1 and dist.get_rank() != 0:
        return
    weights, copy = adapter_files(directory, wiring.config.adapter == "peft")
    text, temporary = json.dumps(dataclasses.asdict(wiring.config), indent=2), weights.with_name(f".{weights.name}.tmp")
    os.makedirs(directory, exist_ok=True)
    save_file({name: t.detach().cpu().contiguous() for name, t in whole.items()}, temporary, {"config": text})
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    copy.unlink(missing_ok=True)  # first, so that it is never that of other weights
    os.replace(temporary, weights)
    temporary.write_text(text)
    os.replace(temporary, copy)


def load_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> nn.Module:
    """Load what `save_adapter` wrote, into a plain base model (which is adapted) or one adapted with the same config.

    Raises ValueError for whatever is missing, cut short, unknown, invalid, of another shape or not finite, and for
    another config than the model's. The model stays as it was.
    """
    from safetensors import SafetensorError, safe_open
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    root = adapted(model, needed=False)
    weights, copy = adapter_files(directory, any(map(is_peft, model.modules())))
    try:
        with safe_open(weights, framework="pt") as file:
            text = (file.metadata() or {}).get("config", "")
            if copy.is_file() and copy.read_text() != text:
                raise ValueError(f"{copy.name} differs from the config in the weights' file, which counts: delete it")
            config = MonkeyJumpConfig(**json.loads(text))
            if root is not None and config != root.monkeyjump.config:
                raise ValueError(f"saved with {config}, but the model has {root.monkeyjump.config}")
            # On "meta" the parts cost nothing, whatever rank the file asks for.
            parts = root.monkeyjump.parts if root is not None else make_parts(model, config, torch.device("meta"))
            needed = {name: list(tensor.shape) for name, tensor in saved_tensors(parts).items()}
            given = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            for name in sorted(given.keys() | needed.keys()):
                if given.get(name) != needed.get(name):
                    raise ValueError(f"{name} is {given.get(name)}, the model has {needed.get(name)}")
            tensors = {name: file.get_tensor(name) for name in given}
            if poisoned := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
                raise ValueError(f"{poisoned[0]} is not finite")
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{weights}: {error}") from error
    if root is None:
        install(model, make_parts(model, config), config)
    set_model_state_dict(adapted(model), tensors, options=StateDictOptions(full_state_dict=True, strict=False))
    return model


def print_trainable_parameters(model: nn.Module) -> str:
    """Print, and return, how many parameters are trained, of how many; packed 4-bit weights count singly."""
    packed = {p: 2 * p.element_size() for p in model.parameters() if type(p).__name__ == "Params4bit"}
    total = sum(p.numel() * packed.get(p, 1) for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    line = f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"
    print(line)
    return line


@torch.no_grad()
def router_statistics(model: nn.Module, reset: bool = False) -> dict[str, dict[str, Any]]:
    """What each block's experts received in training forwards since the last reset (of all ranks, up to the last step).

    By block: experts (names); count of representations; share [E] of them (top-1) and gate_mass [E], each of sum 1;
    entropy of the shares in nats (log E: balanced); cosine [E], mean of an expert's directions to its center;
    center_cosine [E, E].
    """
    result = {}
    for path, router in adapted(model).monkeyjump.routers().items():
        centers, served = router.centers.cpu(), (router.served + router.gathered).cpu()
        sums, gates = served.tensor_split([centers.shape[1]], dim=1)  # [E, D], [E, E]
        counts, total = gates.sum(dim=1), gates.sum().clamp(min=1.0)
        result[path] = {
            "experts": list(router.experts),
            "count": round(counts.sum().item()),
            "share": counts / total,
            "gate_mass": gates.sum(dim=0) / total,
            "entropy": torch.special.entr(counts / total).sum().item(),
            "center_cosine": centers @ centers.T,
            "cosine": einsum(sums, centers, "e d, e d -> e") / counts.clamp(min=1.0),
        }
        if reset:
            router.served.copy_(-router.gathered)  # the next step adds what is gathered again
    return result


# -------------------------------------------------- AdaLoRA's schedule
def adalora(model: nn.Module) -> list[AdaLoRA]:
    adapters = [part for part in adapted(model).monkeyjump.parts.values() if isinstance(part, AdaLoRA)]
    if not adapters:
        raise ValueError(f"adapter={adapted(model).monkeyjump.config.adapter!r}: this is for adapter='adalora'")
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
    """AdaLoRA's pruning (Zhang et al. 2023, section 3): once a step, between optimizer.step() and zero_grad().

    A triplet (column of P, entry of L, row of Q) is as important as its sensitivity |w dL/dw|, smoothed by beta1, times
    its uncertainty, smoothed by beta2. The budget of triplets over all projections falls from rank to target_rank,
    cubically; every interval the L of the least important become zero, and may recover, but in the final steps. Steps
    count from 1.
    """
    adapters = adalora(model)
    start = sum(adapter.lora_E.numel() for adapter in adapters)
    rank, last = start / len(adapters), total_steps - final_steps
    right = 0 < target_rank <= rank and 0 <= initial_steps < last <= total_steps and interval >= 1
    if not (right and 0 <= beta1 < 1 and 0 <= beta2 < 1):
        given = f"{target_rank=}, {initial_steps=}, {final_steps=}, {total_steps=}, {interval=}, {beta1=}, {beta2=}"
        raise ValueError(f"{given}: need 0 < target_rank <= {rank}, steps in between, interval >= 1, betas in [0, 1)")
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
        scores.append(score["lora_E"] + score["lora_A"].mean(dim=1) + score["lora_B"].mean(dim=0))
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
    grams = [gram for a in adalora(model) for gram in (a.lora_B.T @ a.lora_B, a.lora_A @ a.lora_A.T)]
    return torch.stack([torch.linalg.matrix_norm(gram - torch.eye(len(gram)).to(gram)) for gram in grams]).mean()
