"""Tests of monkeyjump.py, in its order; each promise is checked against an independent, naive computation.

pytest test_monkeyjump.py
"""

import ast
import copy
import csv
import functools
import gc
import inspect
import json
import math
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    StaticCache,
    Trainer,
    TrainingArguments,
)

import monkeyjump
import monkeyjump as mj
import train_example
from monkeyjump import (
    ADAPTERS,
    Adapter,
    allocate_ranks,
    apply_monkeyjump,
    disable_adapters,
    init_router_centers,
    load_adapter,
    orthogonal_regularization,
    print_trainable_parameters,
    remove_monkeyjump,
    router_statistics,
    save_adapter,
)

HERE = Path(__file__).parent
OWN_ADAPTERS = ("lora", "lorafa", "adalora", "propulsion")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
torch.set_num_threads(1)
# There the base model itself does neither: its forward does not compile to one graph, and FSDP2 needs a GPU.
OLD_TORCH = pytest.mark.skipif(torch.__version__.startswith("2.6"), reason="torch 2.6: not even without adapters")


def tiny_llama(layers=2, seed=0, **settings):
    torch.manual_seed(seed)
    settings = {"attn_implementation": "sdpa", "max_position_embeddings": 64, **settings}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            eos_token_id=None,
            bos_token_id=1,
            **settings,
        )
    ).eval()


def adapted(adapter="lora", base=None, seed=1, **settings):
    """A model with Monkey Jump whose adapters do something (they start as the identity)."""
    model = tiny_llama() if base is None else base
    torch.manual_seed(seed)
    model = apply_monkeyjump(model, adapter=adapter, **settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02 if adapter == "propulsion" else 0.3)
    return model


def batch(rows=2, tokens=9, seed=3):
    return torch.randint(2, 50, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def centers(model):
    return {name: b.clone() for name, b in model.named_buffers() if name.endswith("centers")}


def train(model, batches, forward=None, mask=None, lr=0.05, also=None):
    """Plain SGD; returns the gradients of the last step and the centers."""
    model.train()
    optimizer = torch.optim.SGD(trained(model).values(), lr=lr)
    for ids in batches:
        loss = (model if forward is None else forward)(input_ids=ids, attention_mask=mask, labels=ids).loss
        if also is not None:
            loss = loss + also(ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: p.grad.clone() for name, p in trained(model).items()}, centers(model)


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys() and first
    for name in first:
        torch.testing.assert_close(first[name], second[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


# -------------------------------------------------------------------------------------------- the slow reference


def naive_unit(vector):
    norm = vector.double().pow(2).sum().sqrt()
    return vector.double() / norm if norm > 0 else vector.double()


def naive_representation(hidden, mode, real, prompt_end):
    """hidden [T, D] of one sequence, real: list of bool -> a vector for each token."""
    positions = [t for t, is_real in enumerate(real) if is_real]
    if mode == "token":
        return list(hidden)
    if mode == "mean":
        return [sum(hidden[t].double() for t in positions) / len(positions)] * len(hidden)
    return [hidden[positions[-1] if mode == "last" or prompt_end is None else prompt_end]] * len(hidden)


def naive_gates(vector, expert_centers, top_k, temperature):
    cosines = [float(naive_unit(vector) @ naive_unit(c)) for c in expert_centers]
    exponentials = [math.exp(c / temperature) for c in cosines]
    p = [e / sum(exponentials) for e in exponentials]
    best = sorted(range(len(p)), key=lambda e: -p[e])[:top_k]
    return [p[e] / sum(p[i] for i in best) if e in best else 0.0 for e in range(len(p))]


def naive_delta(tensors, adapter, x, base, config):
    scale = config["alpha"] / config["rank"]
    if adapter == "propulsion":
        return base * ((1 + tensors["propulsion"]) ** config["degree"] - 1)
    inner = tensors["lora_A"] @ x
    inner = inner * tensors["lora_E"] if adapter == "adalora" else inner
    return scale * (tensors["lora_B"] @ inner)


def naive_logits(base, model, ids, mode, adapter, mask=None, prompt_end=None, shared=(), gates_of=None, **settings):
    """The published equations in float64, token by token, on the base model with the adapted model's tensors."""
    config = {"alpha": 16.0, "rank": 2, "degree": 15, "top_k": 2, "temperature": 1.0, **settings}
    reference = copy.deepcopy(base).double()
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    real = torch.ones_like(ids) if mask is None else mask
    for index, block in enumerate(reference.model.layers):
        prefix, found = f"model.layers.{index}.", {}

        def look(module, args, prefix=prefix, found=found):
            for row, hidden in enumerate(args[0]):
                end = None if prompt_end is None else int(prompt_end[row])
                vectors = naive_representation(hidden, mode, real[row].bool().tolist(), end)
                for t, vector in enumerate(vectors):
                    c = state[prefix + "monkeyjump.centers"]
                    found[row, t] = naive_gates(vector, c, config["top_k"], config["temperature"])

        block.register_forward_pre_hook(look)
        for expert, name in enumerate([*PROJECTIONS, *shared]):
            path = ("mlp." if name in shared else "self_attn.") + name
            own = f"{prefix}{path}.monkeyjump."
            tensors = {n[len(own) :]: t for n, t in state.items() if n.startswith(own)}

            def add(layer, args, output, expert=expert, found=found, tensors=tensors, always=name in shared):
                output = output.clone()
                for row in range(output.shape[0]):
                    for t in range(output.shape[1]):
                        gate = 1.0 if always else found[row, t][expert]
                        delta = naive_delta(tensors, adapter, args[0][row, t], output[row, t].clone(), config)
                        output[row, t] += gate * delta
                return output

            block.get_submodule(path).register_forward_hook(add)
    with torch.no_grad():
        return reference(input_ids=ids, attention_mask=mask).logits


# ------------------------------------------------------------------------------------------------------ mathematics


@pytest.mark.parametrize("top_k", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_route_is_softmax_over_all_experts_cut_to_the_top_k_and_renormalised(top_k, temperature):
    torch.manual_seed(0)
    points, c = mj.unit(torch.randn(7, 16)), mj.unit(torch.randn(5, 16))
    gates, best = mj.route(points, c, top_k, temperature)
    expected = torch.tensor([naive_gates(point, c, min(top_k, 5), temperature) for point in points])
    torch.testing.assert_close(gates, expected, atol=1e-6, rtol=1e-5)
    assert best.tolist() == expected.argmax(dim=1).tolist()


def test_route_never_uses_more_than_top_k_experts_even_when_all_are_equally_near():
    gates, _ = mj.route(torch.zeros(3, 8), mj.unit(torch.randn(4, 8)), 2)
    assert ((gates > 0).sum(dim=-1) == 2).all() and torch.allclose(gates.sum(dim=-1), torch.ones(3))


def test_jitter_noise_multiplies_the_logits_within_its_range():
    torch.manual_seed(0)
    points, c = mj.unit(torch.randn(500, 16)), mj.unit(torch.randn(2, 16))
    noisy = mj.route(points, c, 2, 1.0, 0.5)[0]
    logits = points @ c.T
    low = torch.where(logits > 0, logits * 0.5, logits * 1.5)
    high = torch.where(logits > 0, logits * 1.5, logits * 0.5)
    difference = torch.logit(noisy[:, 0].double())  # of the two noisy logits
    assert (difference >= (low[:, 0] - high[:, 1]) - 1e-5).all() and (
        difference <= (high[:, 0] - low[:, 1]) + 1e-5
    ).all()
    assert (difference - (logits[:, 0] - logits[:, 1])).abs().mean() > 0.01


@pytest.mark.parametrize("mode", mj.REP_MODES)
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_represent_looks_at_what_its_mode_says_and_never_at_padding(mode, side):
    torch.manual_seed(0)
    hidden, lengths, ends = torch.randn(3, 6, 8), [6, 4, 1], [2, 1, 0]
    start = [6 - n if side == "left" else 0 for n in lengths]
    real = torch.tensor(
        [[side == "none" or s <= t < s + n for t in range(6)] for s, n in zip(start, lengths, strict=True)]
    )
    ends = torch.tensor([s + e for s, e in zip(start, ends, strict=True)])
    hidden = torch.where(real[..., None], hidden, torch.tensor(float("nan")))
    found, valid = mj.represent(hidden, mode, None if side == "none" else real, ends)
    for row in range(3):
        expected = torch.stack(naive_representation(hidden[row], mode, real[row].tolist(), int(ends[row]))).float()
        shown = found[row] if mode == "token" else found[row].expand(6, -1)
        torch.testing.assert_close(shown[real[row]], expected[real[row]])
    assert valid is None if mode == "token" and side == "none" else valid.any()


def test_a_sequence_without_a_real_token_is_not_counted():
    real = torch.tensor([[True, True], [False, False]])
    for mode in ("last", "mean", "prompt_end"):
        assert mj.represent(torch.randn(2, 2, 4), mode, real)[1].tolist() == [[True], [False]]


def test_statistics_count_finite_real_vectors_only():
    torch.manual_seed(0)
    raw = torch.randn(10, 6) * 100
    raw[3, 2], raw[4, 0], raw[5] = float("nan"), float("inf"), 0.0
    real = torch.tensor([True] * 8 + [False] * 2)
    points, c = mj.unit(raw), mj.unit(torch.randn(3, 6))
    gates, best = mj.route(points, c, 2)
    statistics = mj.cluster_statistics(points, best, gates, real)
    expected = torch.zeros(3, 9, dtype=torch.double)
    for n in (0, 1, 2, 6, 7):
        expected[best[n], :6] += naive_unit(raw[n])
        expected[best[n], 6:] += gates[n].double()
    torch.testing.assert_close(statistics.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_direction_too_small_for_a_norm_counts_as_none():
    x = torch.tensor([[1e-30, -2e-30], [3.0, 4.0], [float("inf"), 1.0], [float("nan"), 1.0], [0.0, 0.0]])
    expected = torch.tensor([[0.0, 0.0], [0.6, 0.8], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(mj.unit(x), expected)


@pytest.mark.parametrize("momentum", [0.0, 0.2, 0.9, 1.0])
def test_ema_moves_each_center_toward_the_mean_and_keeps_the_unused(momentum):
    torch.manual_seed(0)
    c, sums, counts = (
        mj.unit(torch.randn(2, 3, 5)),
        torch.randn(2, 3, 5),
        torch.tensor([[4.0, 0.0, 1.0], [2.0, 3.0, 0.0]]),
    )
    moved = mj.ema_update(c, sums * (counts > 0)[..., None], counts, momentum)
    for block in range(2):
        for e in range(3):
            n = counts[block, e]
            mean = sums[block, e].double() / n if n else None
            expected = (
                naive_unit(momentum * c[block, e].double() + (1 - momentum) * mean) if n else c[block, e].double()
            )
            torch.testing.assert_close(moved[block, e].double(), expected, atol=1e-6, rtol=1e-5)


def test_kmeans_finds_planted_clusters_in_every_set_and_is_the_same_for_the_same_seed():
    torch.manual_seed(0)
    planted = mj.unit(torch.randn(3, 4, 24))
    points = mj.unit(planted.repeat_interleave(50, dim=1) + 0.05 * torch.randn(3, 200, 24))
    found = mj.kmeans(points, 4, 10, torch.Generator().manual_seed(5))
    cosines = torch.einsum("led,lfd->lef", planted, found)
    assert (cosines.max(dim=2).values > 0.99).all() and (cosines.max(dim=1).values > 0.99).all()
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3, 4))
    assert torch.equal(found, mj.kmeans(points, 4, 10, torch.Generator().manual_seed(5)))


def test_each_lloyd_iteration_brings_the_centers_nearer_to_their_points():
    torch.manual_seed(0)
    points = mj.unit(torch.randn(2, 300, 8))
    inertia = [
        (1 - torch.einsum("lnd,led->lne", points, mj.kmeans(points, 5, n, torch.Generator().manual_seed(1))))
        .min(dim=2)
        .values.sum()
        for n in range(6)
    ]
    assert all(later <= earlier + 1e-4 for earlier, later in zip(inertia, inertia[1:], strict=False))
    assert inertia[-1] < 0.97 * inertia[0]


def test_kmeans_survives_points_that_are_all_the_same():
    found = mj.kmeans(mj.unit(torch.ones(1, 6, 4)), 3, 4, torch.Generator().manual_seed(0))
    assert torch.isfinite(found).all()


# --------------------------------------------------------------------------------- promise 1, and the published sizes


@pytest.mark.parametrize("adapter", OWN_ADAPTERS)
@pytest.mark.parametrize("mode", mj.REP_MODES)
def test_at_init_the_model_is_the_base_model_bit_for_bit_and_only_adapters_train(adapter, mode):
    base, ids = tiny_llama(), batch()
    expected = base(ids).logits
    model = apply_monkeyjump(base, adapter=adapter, rep_mode=mode, shared_expert="up_proj")
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model.train()(ids).logits, expected)
    endings = {"lora": ("lora_A", "lora_B"), "lorafa": ("lora_B",), "adalora": ("lora_A", "lora_B", "lora_E")}
    for name, parameter in model.named_parameters():
        wanted = ".monkeyjump." in name and name.endswith(endings.get(adapter, ("propulsion",)))
        assert parameter.requires_grad == wanted, name
    assert len(trained(model)) == 2 * 5 * len(endings.get(adapter, ("propulsion",)))


QWEN = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}


@pytest.mark.parametrize(
    ("shape", "kv_heads", "settings", "published"),
    [
        (QWEN, 2, {"adapter": "lora"}, 270_336),
        (QWEN, 2, {"adapter": "adalora"}, 270_528),
        (QWEN, 2, {"adapter": "lorafa"}, 98_304),
        (QWEN, 2, {"adapter": "propulsion"}, 49_152),
        (LLAMA, 8, {"linears": ["q_proj", "k_proj", "v_proj"], "shared_expert": ["o_proj", "gate_proj"]}, 2_883_584),
    ],
)
def test_trainable_parameters_are_the_published_numbers(shape, kv_heads, settings, published, capsys):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, num_key_value_heads=kv_heads, **shape))
    model = apply_monkeyjump(model, rank=2, **settings)
    assert sum(p.numel() for p in trained(model).values()) == published
    line = print_trainable_parameters(model)
    assert f"{published:,}" in line and line in capsys.readouterr().out


def test_adapters_take_the_mode_of_the_model_they_come_to(tmp_path):
    """A model in eval mode stays without dropout and jitter; in training mode both are at work."""
    model, ids = adapted("lora", dropout=0.5, jitter_noise=0.5), batch()
    assert torch.equal(model(ids).logits, model(ids).logits)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(tiny_llama(), tmp_path)(ids).logits, model(ids).logits)
    with torch.no_grad():
        assert not torch.allclose(model.train()(ids).logits, model(ids).logits, atol=1e-3)


# ------------------------------------------------------------------------------------------- the published equations


@pytest.mark.parametrize("adapter", OWN_ADAPTERS)
@pytest.mark.parametrize("mode", mj.REP_MODES)
def test_logits_are_those_of_the_published_equations(adapter, mode):
    base, ids = tiny_llama(), batch()
    model = adapted(adapter, copy.deepcopy(base), rep_mode=mode, shared_expert="up_proj", temperature=0.3)
    model(ids)
    end = torch.tensor([3, 6]) if mode == "prompt_end" else None
    with torch.no_grad():
        logits = model(input_ids=ids, prompt_end=end).logits
    expected = naive_logits(base, model, ids, mode, adapter, prompt_end=end, shared=["up_proj"], temperature=0.3)
    torch.testing.assert_close(logits.double(), expected, atol=2e-4, rtol=1e-4)
    assert (logits - base(ids).logits).abs().max() > 1e-2


def test_every_match_of_a_name_is_an_expert_in_the_order_of_the_names_and_conv1d_serves():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=32)).eval()
    expected = base(batch()).logits
    model = apply_monkeyjump(copy.deepcopy(base), linears=["c_proj", "attn.c_attn"])
    assert model._monkeyjump.routers["transformer.h.0"].experts == ["attn.c_proj", "mlp.c_proj", "attn.c_attn"]
    assert model.transformer.h[0].monkeyjump.centers.shape == (3, 32)
    assert model.transformer.h[0].mlp.c_proj.monkeyjump.lora_A.shape == (2, 128)
    assert torch.equal(model(batch()).logits, expected)
    model = adapted("lora", copy.deepcopy(base), linears=["c_proj"])
    assert (model(batch()).logits - expected).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------ promise 2: names, copies


def test_names_of_the_base_stay_and_its_checkpoint_loads_in_plain_transformers(tmp_path):
    base = tiny_llama()
    names = set(base.state_dict())
    model = adapted("adalora", base, shared_expert="up_proj")
    new = set(model.state_dict()) - names
    assert names <= set(model.state_dict())
    allowed = r"\.monkeyjump\.((sensitivity_|uncertainty_)?lora_[ABE]|centers)$|monkeyjump_forwards$"
    assert all(re.search(allowed, name) for name in new)
    assert model.model.layers[0].self_attn.k_proj.monkeyjump.lora_B.shape == (16, 2)
    assert model.model.layers[1].monkeyjump.centers.shape == (4, 32)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(batch()).logits, tiny_llama()(batch()).logits)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_independent_also_after_a_training_step(clone):
    model, ids = adapted("lora"), batch()
    train(model, [ids, ids])
    other = clone(model)
    before = model.eval()(ids).logits
    assert torch.equal(other.eval()(ids).logits, before)
    kept = centers(model)
    train(other, [batch(seed=9)] * 3)
    assert torch.equal(model.eval()(ids).logits, before)
    assert_same(centers(model), kept)
    assert (other.eval()(ids).logits - before).abs().max() > 1e-3
    with disable_adapters(other):
        assert torch.equal(model(ids).logits, before)


def test_removing_gives_the_base_model_back_bit_for_bit():
    base, ids = tiny_llama(), batch()
    base.lm_head.weight.requires_grad_(False)
    names, logits, flags = set(base.state_dict()), base(ids).logits, [p.requires_grad for p in base.parameters()]
    model = adapted("propulsion", base)
    model.gradient_checkpointing_enable()
    train(model, [ids])
    assert remove_monkeyjump(model) is model
    assert set(model.state_dict()) == names and torch.equal(model.eval()(ids).logits, logits)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.layers.modules())
    apply_monkeyjump(model)


def test_disabled_adapters_give_the_base_models_own_output_and_come_back():
    base, ids = tiny_llama(), batch()
    model = adapted("lora", copy.deepcopy(base), shared_expert="up_proj")
    logits = model(ids).logits
    with pytest.raises(RuntimeError), disable_adapters(model):
        assert torch.equal(model(ids).logits, base(ids).logits)
        raise RuntimeError
    assert torch.equal(model(ids).logits, logits)


# --------------------------------------------------------------------------------------- promise 3: no gradient through


def test_nothing_between_the_blocks_input_and_the_gates_is_on_the_tape():
    """The gradient with respect to the input is exactly the one with the gates as given constants."""
    model, ids = adapted("lora", tiny_llama(layers=1)), batch(1, 5)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    gradients = []
    stack, block = model._monkeyjump.stacks[0], model.model.layers[0]
    for constant in (False, True):
        if constant:  # no router any more, only the numbers that it gave
            for handle in block.monkeyjump.handles:
                handle.remove()
            stack.call = stack.call._replace(gates=torch.tensor(stack.call.gates.tolist()))
        loss = model(inputs_embeds=embeddings).logits.pow(2).sum()
        gradients.append(torch.autograd.grad(loss, [embeddings, *trained(model).values()]))
        assert not stack.call.gates.requires_grad and not stack.call.centers.requires_grad
    for routed, constant in zip(*gradients, strict=True):
        torch.testing.assert_close(routed, constant, atol=0, rtol=0)


# ------------------------------------------------------------------------------------------------ promise 4: padding


@pytest.mark.parametrize("mode", mj.REP_MODES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("positional", [False, True])
def test_padding_is_invisible(mode, side, attention, positional):
    model = adapted("lora", tiny_llama(attn_implementation=attention), rep_mode=mode)
    short, padded = batch(1, 5), torch.zeros(1, 4, dtype=torch.long)
    ids = torch.cat([padded, short] if side == "left" else [short, padded], dim=1)
    mask = (ids != 0).long()
    labels = torch.where(torch.arange(5) >= 3, short, -100)
    both_ids, both_mask = torch.cat([ids, batch(1, 9, seed=7)]), torch.cat([mask, torch.ones(1, 9, dtype=torch.long)])
    both_labels = torch.full_like(both_ids, -100)
    start = 4 if side == "left" else 0
    both_labels[0, start : start + 5], both_labels[1, 6:] = labels[0], 5
    position_ids = both_mask.cumsum(1).sub(1).clamp(min=0)
    alone = model(input_ids=short, labels=labels).logits
    args = (both_ids, both_mask) if positional else ()
    keywords = {} if positional else {"input_ids": both_ids, "attention_mask": both_mask}
    logits = model(*args, **keywords, labels=both_labels, position_ids=position_ids).logits
    torch.testing.assert_close(logits[0, start : start + 5], alone[0], atol=1e-4, rtol=1e-4)

    model.train()
    model(*args, **keywords, labels=both_labels, position_ids=position_ids)
    statistics = model._monkeyjump.routers["model.layers.1"].statistics.clone()
    other = copy.deepcopy(model)
    for router in other._monkeyjump.routers.values():
        router.reset()
    other.model.monkeyjump_forwards.zero_()
    other(input_ids=short, labels=labels)
    first = other._monkeyjump.routers["model.layers.1"].statistics.clone()
    other.model.monkeyjump_forwards.zero_()
    other(input_ids=both_ids[1:], labels=both_labels[1:])
    expected = other._monkeyjump.routers["model.layers.1"].statistics
    torch.testing.assert_close(statistics, expected, atol=1e-3, rtol=1e-4)
    assert first[:, 32:].sum().round() == (5 if mode == "token" else 1)


def test_a_mask_that_fits_no_token_axis_is_refused():
    with pytest.raises(ValueError, match=r"attention_mask of shape \[3, 9\] does not fit hidden states \[2, 9, 4\]"):
        mj.real_tokens(torch.ones(3, 9), torch.zeros(2, 9, 4))


@pytest.mark.parametrize("kind", ["bool", "additive", "additive -1e9", "static", "static past", "dict"])
def test_padding_is_read_from_four_dimensional_masks(kind):
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]).bool()
    past = 3 if kind == "static past" else 0
    keys = torch.cat([torch.ones(3, past).bool(), real], dim=1)
    allowed = torch.stack([[*range(5)][q] + past >= torch.arange(past + 5) for q in range(5)])[None] & keys[:, None]
    if "static" in kind:
        allowed = F.pad(allowed, (0, 6))
    mask = allowed[:, None]
    if "additive" in kind:
        mask = torch.where(mask, 0.0, -1e9 if "1e9" in kind else torch.finfo(torch.float32).min)
    if kind == "dict":
        mask = {"sliding_attention": None, "full_attention": mask}
    assert torch.equal(mj.real_tokens(mask, torch.zeros(3, 5, 4)), real)


def test_a_mask_that_is_no_tensor_says_nothing_of_padding():
    assert mj.real_tokens(object(), torch.zeros(3, 5, 4)) is None  # flex attention's BlockMask


def test_an_encoder_adapted_alone_knows_nothing_of_the_decoders_mask():
    model = tiny_model("t5")
    blocks = [name for name, module in model.named_modules() if type(module).__name__ == "T5Block"]
    encoder = [index for index, name in enumerate(blocks) if name.startswith("encoder")]
    apply_monkeyjump(model, blocks={"T5Block": encoder}).train()
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])
    model(input_ids=batch(), decoder_input_ids=batch(2, 6), decoder_attention_mask=mask)
    assert {seen["count"] for seen in router_statistics(model).values()} == {18}


def test_prompt_end_is_given_or_before_the_first_label_or_the_last_real_token():
    model, ids = adapted("lora", rep_mode="prompt_end"), batch()
    labels = torch.full_like(ids, -100)
    labels[0, 4:], labels[1, 7:] = ids[0, 4:], ids[1, 7:]
    with torch.no_grad():
        by_labels = model(input_ids=ids, labels=labels).logits
        assert torch.equal(by_labels, model(input_ids=ids, prompt_end=torch.tensor([3, 6])).logits)
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids, prompt_end=torch.tensor([8, 8])).logits)
        nothing = torch.full_like(ids, -100)
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids, labels=nothing).logits)
        assert not torch.allclose(by_labels, model(input_ids=ids).logits, atol=1e-4)


# -------------------------------------------------------------------------------- promise 5: statistics between steps


def naive_centers(model, base_state, batches, momentum, every=1, until=None, min_share=0.0):
    """Replays training with a router whose centers are moved by a loop in float64."""
    state = {name: c.double() for name, c in base_state.items()}
    shares = {name: [1 / len(c)] * len(c) for name, c in base_state.items()}
    pending, history = {}, []
    inputs = {}
    handles = [
        model.get_submodule(name.removesuffix(".monkeyjump.centers")).register_forward_pre_hook(
            lambda module, args, name=name: inputs.__setitem__(name, args[0].detach()), prepend=True
        )
        for name in state
    ]
    for step, ids in enumerate(batches):
        if step and step % every == 0 and (until is None or step <= until):
            for name in state:
                for e in range(len(state[name])):
                    vectors = [v for expert, v, _ in pending.get(name, []) if expert == e]
                    if vectors:
                        mean = sum(vectors) / len(vectors)
                        state[name][e] = naive_unit(momentum * state[name][e] + (1 - momentum) * mean)
                seen, share = pending[name], shares[name]
                for e in range(len(share)):
                    now = sum(expert == e for expert, *_ in seen) / len(seen)
                    share[e] = momentum * share[e] + (1 - momentum) * now
                dead = share.index(min(share))
                if share[dead] < min_share:
                    state[name][dead] = min(seen, key=lambda found: found[2])[1]
                    share[dead] = 1 / len(share)
            pending = {}
        model(input_ids=ids, labels=ids).loss.backward()
        for name, hidden in inputs.items():
            for vector in hidden.flatten(0, 1):
                cosines = state[name] @ naive_unit(vector)
                pending.setdefault(name, []).append((int(cosines.argmax()), naive_unit(vector), float(cosines.max())))
        history.append({name: c.clone() for name, c in state.items()})
    for handle in handles:
        handle.remove()
    return history


@pytest.mark.parametrize(("every", "until"), [(1, None), (2, None), (1, 2), (3, 4), (1, 0)])
def test_statistics_become_centers_at_the_start_of_a_later_training_forward(every, until):
    model = adapted("lora", ema_momentum=0.6, update_every=every, update_until=until).train()
    start, batches = centers(model), [batch(seed=s) for s in range(6)]
    history = naive_centers(copy.deepcopy(model), start, batches, 0.6, every, until)
    for step, ids in enumerate(batches):
        model(input_ids=ids, labels=ids).loss.backward()
        expected = {name: c.float() for name, c in history[step].items()}
        assert_same(centers(model), expected, atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            model(batch(seed=50))  # neither without gradients,
        model.eval()(batch(seed=51))  # nor in eval mode,
        with disable_adapters(model.train()):
            model(batch(seed=52))  # nor the reference pass of DPO
    moved = any(not torch.equal(c, start[name]) for name, c in centers(model).items())
    assert moved == (until != 0)


@pytest.mark.parametrize("every", [1, 2])
def test_an_expert_that_serves_too_little_is_reseeded_where_representations_are_served_worst(every):
    settings = {"ema_momentum": 0.6, "update_every": every}
    batches = [batch(seed=s) for s in range(8)]
    histories = {}
    for min_share in (0.0, 0.2):
        model = adapted("lora", min_share=min_share, **settings).train()
        for router in centers(model):  # one expert of four starts where no token is
            model.get_buffer(router)[0] = -model.get_buffer(router)[1:].sum(dim=0)
            model.get_buffer(router)[0] /= model.get_buffer(router)[0].norm()
        start = centers(model)
        model.model.embed_tokens.weight[1] = torch.linalg.svd(torch.cat([*start.values()])).Vh[-1]  # padding: like none
        histories[min_share] = naive_centers(copy.deepcopy(model), start, batches, 0.6, every, None, min_share)
        for step, ids in enumerate(batches):
            padded = torch.cat([ids, torch.ones_like(ids)], dim=1)
            mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], dim=1)
            model(input_ids=padded, attention_mask=mask, labels=padded).loss.backward()
            expected = {name: c.float() for name, c in histories[min_share][step].items()}
            assert_same(centers(model), expected, atol=1e-5, rtol=1e-4)
    last, kept = (torch.stack(list(histories[share][-1].values())) for share in (0.2, 0.0))
    assert (last - kept).norm(dim=-1).max() > 0.5  # some expert did move
    assert adapted("lora").model.layers[0].monkeyjump.share is None  # nothing is measured unless asked


def test_a_resumed_run_goes_on_with_the_schedule_of_the_first():
    model = adapted("lora", update_every=3).train()
    for seed in range(4):
        model(input_ids=batch(seed=seed), labels=batch(seed=seed))
    resumed = adapted("lora", update_every=3).train()
    resumed.load_state_dict(model.state_dict())
    assert resumed.model.monkeyjump_forwards == 4
    before = centers(resumed)
    resumed(batch(seed=5))
    assert_same(centers(resumed), before)  # forward number 5: nothing is due
    resumed(batch(seed=6))
    resumed(batch(seed=7))
    assert any(not torch.equal(c, before[name]) for name, c in centers(resumed).items())


def test_the_plain_trainer_moves_the_centers_and_resumes(tmp_path):
    data = [{"input_ids": row, "labels": row, "attention_mask": torch.ones(9)} for row in batch(16)]
    arguments = {"per_device_train_batch_size": 4, "report_to": [], "save_steps": 2, "logging_steps": 1, "seed": 0}
    losses = {}
    for name, resume in (("whole", False), ("resumed", True)):
        torch.manual_seed(0)
        model = adapted("lora", ema_momentum=0.5)
        folder = tmp_path / "run"
        args = TrainingArguments(str(folder), max_steps=4, disable_tqdm=True, **arguments)
        trainer = Trainer(model=model, args=args, train_dataset=data)
        before = centers(model)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][2:4]
        assert model.model.monkeyjump_forwards == 4
        assert all(not torch.equal(c, before[n]) for n, c in centers(model).items())
    # without the statistics of the last step before the checkpoint
    assert losses["whole"] == pytest.approx(losses["resumed"], rel=1e-2)


def test_router_statistics_count_what_the_experts_received():
    model, ids = adapted("lora").train(), batch()
    seen = []
    block = model.model.layers[1]
    block.register_forward_pre_hook(lambda m, args: seen.append((args[0].detach(), block.monkeyjump.centers.clone())))
    for seed in range(3):
        model(input_ids=batch(seed=seed), labels=ids)
    counts, mass, cosines = torch.zeros(4), torch.zeros(4), torch.zeros(4)
    for hidden, c in seen:
        for vector in hidden.flatten(0, 1):
            gates, best = naive_gates(vector, c, 2, 1.0), int((c.double() @ naive_unit(vector)).argmax())
            counts[best] += 1
            mass += torch.tensor(gates)
            cosines[best] += float(c[best].double() @ naive_unit(vector))
    found = router_statistics(model, reset=True)["model.layers.1"]
    assert found["count"] == 3 * 18 and found["experts"] == [f"self_attn.{p}" for p in PROJECTIONS]
    torch.testing.assert_close(found["share"], counts / 54)
    torch.testing.assert_close(found["gate_mass"], mass / 54, atol=1e-4, rtol=1e-4)
    used = counts > 0
    torch.testing.assert_close(found["cosine"][used], (cosines / counts)[used], atol=0.02, rtol=0.05)
    shares = [s for s in (counts / 54).tolist() if s]
    assert found["entropy"] == pytest.approx(-sum(s * math.log(s) for s in shares), abs=1e-4)
    torch.testing.assert_close(found["center_cosine"], block.monkeyjump.centers @ block.monkeyjump.centers.T)
    assert router_statistics(model)["model.layers.1"]["count"] == 0
    model(ids)
    assert router_statistics(model)["model.layers.1"]["count"] == 18


@pytest.mark.parametrize("how", ["loaded", "by k-means"])
def test_new_centers_are_not_moved_by_what_was_seen_before_them(tmp_path, how):
    model = adapted("lora", ema_momentum=0.3).train()
    save_adapter(model, tmp_path)
    model(input_ids=batch(seed=1), labels=batch(seed=1))
    if how == "loaded":
        load_adapter(model, tmp_path)
        model.model.monkeyjump_forwards.add_(1)  # as if saved later: the next forward moves the centers
    else:
        init_router_centers(model, [batch(seed=2), batch(seed=3)])
    before = centers(model)
    model(input_ids=batch(seed=4), labels=batch(seed=4))
    assert_same(centers(model), before, atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------------ promise 6: checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", ["token", "prompt_end"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_checkpointing_changes_neither_gradients_nor_centers(reentrant, mode, interleaved):
    results, mask = [], torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    for checkpointing in (False, True):
        model = adapted("lora", rep_mode=mode, ema_momentum=0.3, jitter_noise=0.0, shared_expert="up_proj")
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})

        def others(ids, model=model):  # a second batch, a reference pass and an evaluation before the backward pass
            if not interleaved:
                return 0.0
            second = model(input_ids=ids.flip(0), labels=ids.flip(0)).loss
            with disable_adapters(model):
                model(input_ids=ids)
            model.eval()
            with torch.no_grad():
                model(input_ids=ids.flip(1))
            model.train()
            return second

        results.append(train(model, [batch(seed=s) for s in range(4)], mask=mask, also=others))
    for plain, checkpointed in zip(*results, strict=True):
        assert_same(plain, checkpointed, atol=0, rtol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_drops_what_the_first_pass_dropped_whatever_noise_the_router_drew(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = adapted("lora", jitter_noise=0.3, dropout=0.5).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        model(input_ids=batch(), labels=batch()).loss.backward()
        gradients.append({name: p.grad for name, p in trained(model).items()})
    assert_same(*gradients, atol=1e-6, rtol=1e-5)


def test_a_recomputation_by_torchs_own_wrapper_is_not_counted_again():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    gradients, counts = [], []
    for checkpointing in (False, True):
        model = adapted("lora", tiny_llama(use_cache=False)).train()
        layers, parameters = model.model.layers, trained(model)
        for index in range(len(layers)) if checkpointing else ():
            layers[index] = checkpoint_wrapper(layers[index])
        model(input_ids=batch(), labels=batch()).loss.backward()
        gradients.append({name: p.grad for name, p in parameters.items()})
        counts.append([seen["count"] for seen in router_statistics(model).values()])
    assert_same(*gradients, atol=1e-6, rtol=1e-5)
    assert counts == [[18, 18], [18, 18]]


def test_a_backward_pass_inside_disabled_adapters_recomputes_with_them():
    gradients = []
    for checkpointing in (False, True):
        model = adapted("lora").train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = model(input_ids=batch(), labels=batch()).loss
        with disable_adapters(model):
            loss.backward()
        gradients.append({name: p.grad for name, p in trained(model).items()})
    assert_same(*gradients, atol=0, rtol=0)


# --------------------------------------------------------------------------------------- promise 7: several processes


DISTRIBUTED = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {here!r})
import test_monkeyjump as t
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[3]), world_size=2)
rank, model = dist.get_rank(), t.adapted("lora", ema_momentum=0.4, min_share=0.2)
batches = [t.batch(4, seed=s) for s in range(4)]
half = [ids[2 * rank : 2 * rank + 2] for ids in batches]
t.init_router_centers(model, half, subset_size=32, seed=1)
clustered = t.centers(model)
model.load_state_dict({{n: c for n, c in torch.load(sys.argv[4]).items()}}, strict=False)
if sys.argv[1] == "ddp":
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
else:
    from torch.distributed.fsdp import fully_shard
    for block in model.model.layers:
        fully_shard(block)
    wrapped = fully_shard(model)
gradients, _ = t.train(model, half, forward=wrapped)
gradients = {{n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients.items()}}
state = t.mj.monkeyjump_state_dict(model)
t.save_adapter(model, sys.argv[5])
torch.save([clustered, gradients, state], f"{{sys.argv[5]}}/rank{{rank}}.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=OLD_TORCH)])
def test_two_processes_have_the_centers_and_gradients_of_one_on_the_whole_batch(kind, tmp_path):
    script, out = tmp_path / "worker.py", tmp_path / "out"
    out.mkdir()
    script.write_text(DISTRIBUTED.format(here=str(HERE)))
    model = adapted("lora", ema_momentum=0.4, min_share=0.2)
    torch.save(centers(model), tmp_path / "centers.pt")
    command = [sys.executable, str(script), kind, str(tmp_path / "store")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "centers.pt"), str(out)], env=environment)
        for rank in (0, 1)
    ]
    assert [worker.wait(timeout=240) for worker in workers] == [0, 0]
    first, second = (torch.load(out / f"rank{rank}.pt") for rank in (0, 1))
    for one, other in zip(first, second, strict=True):
        assert_same(one, other, atol=0, rtol=0)
    gradients, expected = train(model, [batch(4, seed=s) for s in range(4)])
    assert_same({n: c for n, c in first[2].items() if n.endswith("centers")}, expected, atol=1e-5, rtol=1e-4)
    assert_same(first[1], gradients, atol=1e-5, rtol=1e-3)
    assert_same(mj.monkeyjump_state_dict(load_adapter(tiny_llama(), out)), first[2])


# ---------------------------------------------------------------------------------------------- promise 8: generation


def left_padded():
    ids = batch(2, 7)
    ids[0, :3] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"num_beams": 2, "cache_implementation": "static"}],
    ids=["greedy", "beams", "static", "static beams"],
)
def test_cached_generation_equals_uncached_in_token_mode(settings):
    model = adapted("lora")
    common = {**left_padded(), "max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    plain = {name: value for name, value in settings.items() if name != "cache_implementation"}
    assert torch.equal(model.generate(**common, **settings), model.generate(**common, **plain, use_cache=False))


@pytest.mark.parametrize("mode", ["last", "mean", "prompt_end"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoded_tokens_keep_the_prompts_routing_until_the_generation_ends(mode, cache):
    base = tiny_llama()
    model = adapted("lora", copy.deepcopy(base), rep_mode=mode)
    inputs = left_padded()
    settings = {"cache_implementation": "static"} if cache == "static" else {}
    settings |= {"max_new_tokens": 5, "do_sample": False, "disable_compile": True}
    for round_ in range(2):  # the second generation starts from its own prompt
        prompt = inputs["input_ids"] if round_ == 0 else inputs["input_ids"].roll(1, 1) * inputs["attention_mask"]
        mask = inputs["attention_mask"]
        found = model.generate(input_ids=prompt, attention_mask=mask, **settings)
        ids, whole = prompt, mask
        for _ in range(
            5
        ):  # every token routed by the prompt: the whole sequence again, its routing read from the prompt
            gates = prompt_gates(model, prompt, mask)
            position_ids = whole.cumsum(1).sub(1).clamp(min=0)
            logits = with_gates(model, gates, ids, whole, position_ids)
            ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
            whole = F.pad(whole, (0, 1), value=1)
        assert torch.equal(found, ids)


def prompt_gates(model, prompt, mask):
    gates = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, args, name=name: gates.__setitem__(name, model._monkeyjump.stacks[0].call.gates)
        )
        for name in model._monkeyjump.routers
    ]
    with torch.no_grad():
        model(input_ids=prompt, attention_mask=mask, position_ids=mask.cumsum(1).sub(1).clamp(min=0))
    for handle in handles:
        handle.remove()
    return gates


def with_gates(model, gates, ids, mask, position_ids):
    stack = model._monkeyjump.stacks[0]
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, args, name=name: setattr(stack, "call", stack.call._replace(gates=gates[name]))
        )
        for name in gates
    ]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


def test_two_interleaved_decodings_keep_their_own_routing():
    model = adapted("lora", rep_mode="mean")
    prompts, token = [batch(1, 6, seed=s) for s in (1, 2)], torch.tensor([[7]])
    with torch.no_grad():
        alone = []
        for prompt in prompts:
            cache = model(prompt, use_cache=True).past_key_values
            alone.append(model(token, past_key_values=cache).logits)
        caches = [model(prompt, use_cache=True).past_key_values for prompt in prompts]
        together = [model(token, past_key_values=cache).logits for cache in caches]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert not torch.allclose(*alone)


def test_a_new_turn_on_an_old_cache_is_routed_by_itself():
    model = adapted("lora", rep_mode="last")
    with torch.no_grad():
        cache = model(batch(1, 6), use_cache=True).past_key_values
        model(batch(1, 4, seed=8), past_key_values=cache, attention_mask=torch.ones(1, 10, dtype=torch.long))
    turn = cache.monkeyjump_gates["model.layers.0"]
    with torch.no_grad():
        first = model(batch(1, 4, seed=8), use_cache=True).past_key_values.monkeyjump_gates["model.layers.0"]
    torch.testing.assert_close(turn, first)  # block 0 sees embeddings: the turn's own last token


@pytest.mark.parametrize("mode", ["last", "mean"])
def test_generating_in_training_mode_keeps_the_prompts_routing_too(mode):
    model = adapted("lora", rep_mode=mode)
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.eval().generate(batch(), **settings).logits
    torch.testing.assert_close(model.train().generate(batch(), **settings).logits, expected)


def test_a_static_cache_that_starts_anew_keeps_no_routing_of_the_generation_before():
    model = adapted("lora", rep_mode="last")

    @torch.no_grad()
    def second_token(cache, first):  # a prompt of one token looks like a token that is decoded
        for position, token in enumerate([first, 7]):
            where = {"cache_position": torch.tensor([position])}
            output = model(torch.tensor([[token]]), past_key_values=cache, **where)
        return output.logits

    cache = StaticCache(config=model.config, max_cache_len=16)
    before = second_token(cache, 33)
    cache.reset()
    after = second_token(cache, 5)
    torch.testing.assert_close(after, second_token(StaticCache(config=model.config, max_cache_len=16), 5))
    assert not torch.allclose(before, after)


def test_a_cache_is_not_kept_alive_nor_copied_with_the_model():
    model, cache = adapted("lora"), DynamicCache()
    model(batch(), past_key_values=cache)
    copy.deepcopy(model)  # tensors with a graph cannot be copied
    alive = weakref.ref(cache)
    del cache
    gc.collect()
    assert alive() is None


# ------------------------------------------------------------------------------------------------- promise 9: compile


@OLD_TORCH
@pytest.mark.parametrize(("checkpointing", "mode"), [(False, "token"), (True, "prompt_end")])
def test_compiles_to_one_graph_once_and_trains_like_eager(checkpointing, mode):
    import torch._dynamo.testing

    torch._dynamo.reset()
    batches, mask = [batch(seed=s) for s in range(4)], torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = 0
    settings = {"rep_mode": mode, "update_every": 2, "ema_momentum": 0.5, "min_share": 0.2}
    expected = train(adapted("lora", tiny_llama(layers=2, use_cache=False), **settings), batches, mask=mask)
    model = adapted("lora", tiny_llama(layers=2, use_cache=False), **settings)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if hasattr(model, "_require_grads_hook") or hasattr(model, "_require_grads_hooks"):
            model.disable_input_require_grads()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    found = train(model, batches, forward=torch.compile(model, backend=counter, fullgraph=True), mask=mask)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other, atol=1e-5, rtol=1e-4)
    hooks_inside = "__call__" in transformers.modeling_layers.GradientCheckpointingLayer.__dict__
    assert counter.frame_count == (2 if checkpointing and hooks_inside else 1)


@pytest.mark.parametrize("applied", ["before the base is compiled", "after", "to the compiled base itself"])
def test_an_adapted_model_never_runs_in_a_graph_that_was_compiled_for_a_frozen_base(applied):
    torch._dynamo.reset()
    torch._dynamo.config.skip_nnmodule_hook_guards = True  # torch's default: graphs do not notice new hooks
    base = tiny_llama().requires_grad_(False).eval()
    first = None if "base itself" in applied else copy.deepcopy(base)
    model = adapted(base=first) if "before" in applied else None
    with torch.no_grad():
        compiled = torch.compile(base, backend="eager")
        plain = compiled(batch()).logits
        model = model or adapted(base=first or base)
        found = torch.compile(model.eval(), backend="eager")(batch()).logits
        torch.testing.assert_close(found, model(batch()).logits)
    assert (found - plain).abs().max() > 1e-3


def test_no_step_asks_the_device_for_a_value():
    """Fake tensors have no values: any host synchronisation (.item(), a branch on a tensor) is an error."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for mode in mj.REP_MODES:
        with FakeTensorMode():
            config = copy.deepcopy(tiny_llama().config)
            model = LlamaForCausalLM(config)
            settings = {"update_every": 2, "update_until": 5, "jitter_noise": 0.1, "min_share": 0.1}
            model = apply_monkeyjump(model, rep_mode=mode, **settings).train()
            hidden = torch.zeros(2, 8, 32, requires_grad=True)
            stack, block = model._monkeyjump.stacks[0], model.model.layers[0]
            for _ in range(2):
                stack.root = {"labels": torch.zeros(2, 8, dtype=torch.long)}
                stack.enter(model.model, (), {"attention_mask": torch.ones(2, 8)})
                block.monkeyjump.enter(block, (hidden,), {})
                block.self_attn.q_proj(hidden).sum().backward()


# ----------------------------------------------------------------------------------------------- promise 10: precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_is_cast_trains_on_and_its_centers_stay_float32(dtype):
    model = adapted("lora", centered=True, min_share=0.1).to(dtype).train()
    before = centers(model)
    for seed in range(3):
        model(batch(seed=seed), labels=batch(seed=seed)).loss.backward()
    after = centers(model)
    assert all(p.grad is not None and p.dtype == dtype for p in trained(model).values())
    for name, moved in after.items():
        assert moved.dtype == torch.float32 and not torch.equal(moved, before[name])
        torch.testing.assert_close(moved.norm(dim=-1), torch.ones(len(moved)))


@pytest.mark.parametrize("adapter", OWN_ADAPTERS)
def test_adapters_stay_float32_over_a_bf16_base_and_kept_activations_stay_bf16(adapter):
    model = adapted(adapter, tiny_llama().to(torch.bfloat16), dropout=0.0).train()
    assert all(p.dtype == torch.float32 for p in trained(model).values())
    projection, x = model.model.layers[0].self_attn.q_proj, torch.randn(2, 9, 32, dtype=torch.bfloat16)
    kept = []
    model._monkeyjump.stacks[0].enter(model.model, (), {})
    model.model.layers[0].monkeyjump.enter(None, (x,), {})
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = projection(x.requires_grad_())
    assert y.dtype == torch.bfloat16 and all(
        t.dtype == torch.bfloat16 for t in kept if t.shape[:2] == (2, 9) or t.shape[0] == 18
    )
    model(input_ids=batch(), labels=batch()).loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in trained(model).values())


def test_routing_is_float32_under_autocast():
    model, ids = adapted("lora"), batch()
    with torch.no_grad():
        plain = model(ids) and model._monkeyjump.stacks[0].gates["model.layers.0"]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids).logits
        assert torch.equal(model._monkeyjump.stacks[0].gates["model.layers.0"], plain)
        assert torch.isfinite(logits.float()).all()


# ------------------------------------------------------------------------------------------------- promise 11: saving


def test_an_adapter_is_two_files_that_give_the_same_model_again(tmp_path):
    for adapter in OWN_ADAPTERS:
        folder, ids = tmp_path / adapter, batch()
        model = adapted(adapter, rep_mode="mean", shared_expert=["up_proj"], temperature=0.5, centered=True)
        init_router_centers(model, [ids] * 3, subset_size=6)
        train(model, [ids, ids])
        save_adapter(model, folder)
        assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        fields = json.loads((folder / "adapter_config.json").read_text())
        assert fields["format_version"] == 1 and fields["rep_mode"] == "mean" and fields["temperature"] == 0.5
        assert fields["blocks"] == {"LlamaDecoderLayer": [0, 1]}
        assert fields["linears"] == [f"self_attn.{p}" for p in PROJECTIONS]
        fresh = load_adapter(tiny_llama(), folder)
        assert torch.equal(fresh(ids).logits, model.eval()(ids).logits)
        again = load_adapter(
            adapted(adapter, **{k: v for k, v in fields.items() if k not in ("format_version", "adapter")}), folder
        )
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("moment", range(5))
def test_a_kill_at_any_moment_of_saving_leaves_the_old_adapter_or_the_new(tmp_path, monkeypatch, moment):
    old, new, ids = adapted("lora"), adapted("lora", seed=5, temperature=0.2), batch()
    save_adapter(old, tmp_path)
    calls = []

    def die_at(function):
        def wrapped(*args, **kwargs):
            calls.append(function)
            if len(calls) > moment:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(mj.os, "replace", die_at(os.replace))
    monkeypatch.setattr(mj.os, "fsync", die_at(os.fsync))
    try:
        save_adapter(new, tmp_path)
        assert moment == 4
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    logits = load_adapter(tiny_llama(), tmp_path)(ids).logits
    expected = new if moment >= 2 else old
    assert torch.equal(logits, expected(ids).logits)


def corrupt(folder, what):
    weights, fields = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    from safetensors.torch import load_file, save_file

    tensors, config = load_file(weights), json.loads(fields.read_text())
    name = "model.layers.1.self_attn.q_proj.monkeyjump.lora_A"
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif what == "garbage":
        weights.write_bytes(b"not an adapter")
    elif what in ("missing tensor", "extra tensor", "misshapen tensor"):
        if what == "missing tensor":
            del tensors[name]
        elif what == "extra tensor":
            tensors["model.layers.7.monkeyjump.centers"] = torch.zeros(4, 32)
        else:
            tensors[name] = torch.zeros(3, 32)
        save_file(tensors, weights)
    elif what == "no weights":
        weights.unlink()
    elif what == "no config":
        fields.unlink()
    elif what == "not json":
        fields.write_text("{")
    else:
        changes = {
            "unknown field": {"rnak": 2},
            "bad value": {"rank": -1},
            "other rank": {"rank": 3},
            "version": {"format_version": 99},
            "unknown block": {"blocks": {"NoLayer": [0]}},
        }[what]
        fields.write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", "not a whole safetensors file"),
        ("garbage", "not a whole safetensors file"),
        ("missing tensor", r"layers.1.self_attn.q_proj.monkeyjump.lora_A is missing"),
        ("extra tensor", r"layers.7.monkeyjump.centers is \[4, 32\], the model has none"),
        ("misshapen tensor", r"lora_A is \[3, 32\], the model has \[2, 32\]"),
        ("no weights", "adapter_model.safetensors: no such file"),
        ("no config", "adapter_config.json: no such file"),
        ("not json", "adapter_config.json: Expecting"),
        ("unknown field", "rnak"),
        ("bad value", "rank=-1: must be an integer >= 1"),
        ("other rank", r"lora_A is \[2, 32\], the model has \[3, 32\]"),
        ("version", "format_version 1"),
        ("unknown block", "LlamaDecoderLayer"),
    ],
)
def test_a_broken_adapter_is_refused_and_leaves_the_model_as_it_was(tmp_path, what, message):
    save_adapter(adapted("lora"), tmp_path)
    corrupt(tmp_path, what)
    base, ids = tiny_llama(), batch()
    names, flags = set(base.state_dict()), [p.requires_grad for p in base.parameters()]
    with pytest.raises(ValueError, match=message):
        load_adapter(base, tmp_path)
    assert set(base.state_dict()) == names and [p.requires_grad for p in base.parameters()] == flags
    assert torch.equal(base(ids).logits, tiny_llama()(ids).logits)
    model = adapted("lora", seed=7)
    logits = model(ids).logits
    with pytest.raises(ValueError):
        load_adapter(model, tmp_path)
    assert torch.equal(model(ids).logits, logits)


def test_another_config_than_the_applied_one_is_refused(tmp_path):
    save_adapter(adapted("lora", top_k=1), tmp_path)
    with pytest.raises(ValueError, match="saved with top_k=1, the model has 2"):
        load_adapter(adapted("lora"), tmp_path)


# ---------------------------------------------------------------------------------------------- promise 12: bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": "dora"}, "adapter='dora': must be one of lora, lorafa, adalora, propulsion"),
        ({"adapter": "peft"}, "'peft' is for models that carry PEFT adapters"),
        ({"rank": 0}, "rank=0: must be an integer >= 1"),
        ({"rank": True}, "rank=True"),
        ({"rank": 2.0}, "rank=2.0"),
        ({"alpha": 0}, "alpha=0: must be a number > 0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"dropout": 1.0}, r"dropout=1.0: must be a number in \[0, 1\)"),
        ({"degree": 0}, "degree=0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 5}, "top_k=5: at most 4"),
        ({"temperature": 0.0}, "temperature=0.0: must be a number > 0"),
        ({"ema_momentum": 1.1}, "ema_momentum=1.1"),
        ({"rep_mode": "first"}, "rep_mode='first': must be one of token, last, mean, prompt_end"),
        ({"jitter_noise": -0.1}, "jitter_noise=-0.1"),
        ({"centered": 1}, "centered=1"),
        ({"min_share": 1.0}, "min_share=1.0"),
        ({"update_every": 0}, "update_every=0"),
        ({"update_until": -1}, "update_until=-1"),
        ({"blocks": {"GPT2Block": [0]}}, "'GPT2Block' not in this model; there are LlamaDecoderLayer"),
        (
            {"blocks": {"LlamaDecoderLayer": [0, 2]}},
            r"\[2\] not in this model; indices of LlamaDecoderLayer are 0 to 1",
        ),
        ({"blocks": {"LlamaDecoderLayer": [-1]}}, "indices of LlamaDecoderLayer are 0 to 1"),
        ({"blocks": {}}, "names no block of this model"),
        ({"blocks": ["LlamaDecoderLayer"]}, "must map class names to indices"),
        ({"blocks": {"LlamaDecoderLayer": 2}}, "must map class names to indices"),
        ({"blocks": {"LlamaModel": [0]}}, "LlamaModel 'model' is a model, not a block"),
        ({"linears": 5}, r"linears=\[5\]: \[5\] not in these blocks"),
        ({"adapter": mj.PeftAdapter}, "'peft' is for models that carry PEFT adapters"),
        ({"linears": ["q_proj", "qkv"]}, r"linears.*\['qkv'\] not in these blocks; there are mlp.down_proj"),
        ({"linears": []}, "top_k=2: at most 0"),
        ({"shared_expert": "gate"}, r"shared_expert.*\['gate'\] not in these blocks"),
    ],
)
def test_bad_input_is_refused_before_anything_is_touched(settings, message):
    base, ids = tiny_llama(), batch()
    names, flags = set(base.state_dict()), [p.requires_grad for p in base.parameters()]
    with pytest.raises(ValueError, match=message):
        apply_monkeyjump(base, **settings)
    assert set(base.state_dict()) == names and [p.requires_grad for p in base.parameters()] == flags
    assert torch.equal(base(ids).logits, tiny_llama()(ids).logits)


def test_an_adapter_that_cannot_be_made_leaves_the_model_as_it_was(tmp_path):
    class OnlySquare(mj.LoRA):
        def __init__(self, in_features, out_features, config, device):
            super().__init__(in_features, out_features, config, device)
            if in_features != out_features:
                raise RuntimeError("not square")

    base = tiny_llama()
    names, flags = list(base.state_dict()), [p.requires_grad for p in base.parameters()]
    with pytest.raises(RuntimeError, match="not square"):
        apply_monkeyjump(base, adapter=OnlySquare)  # q_proj is square and comes first, k_proj is not
    del mj.ADAPTERS["OnlySquare"]
    assert list(base.state_dict()) == names and [p.requires_grad for p in base.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


@pytest.mark.parametrize("wrong", [{"interval": 0}, {"beta1": 1.0}, {"beta2": float("nan")}, {"target_rank": 3}])
def test_a_wrong_schedule_is_refused_before_any_importance_moves(wrong):
    model = adapted("adalora")
    model(batch(), labels=batch()).loss.backward()
    with pytest.raises(ValueError, match=next(iter(wrong))):
        allocate_ranks(model, 10, 10, **{"target_rank": 1, **wrong})
    assert not any(b.any() for n, b in model.named_buffers() if "sensitivity" in n)


def test_what_needs_an_adapted_model_says_so():
    base = tiny_llama()
    for call in (
        router_statistics,
        remove_monkeyjump,
        lambda m: save_adapter(m, "x"),
        lambda m: init_router_centers(m, []),
    ):
        with pytest.raises(ValueError, match="LlamaForCausalLM carries no Monkey Jump: call apply_monkeyjump first"):
            call(base)
    with pytest.raises(ValueError, match="carries Monkey Jump already"):
        apply_monkeyjump(apply_monkeyjump(base))
    with pytest.raises(ValueError, match="rank allocation is for adapter='adalora'"):
        allocate_ranks(base, 1, 10, target_rank=1)
    with pytest.raises(ValueError, match="no list of repeated blocks|names no block"):
        apply_monkeyjump(nn.Linear(3, 3))


# -------------------------------------------------------------------------------------------------------- k-means init


def test_a_stream_without_a_length_serves_kmeans_too():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from batch(24)

    found = []
    for data in (Stream(), list(batch(24))):
        model = adapted("lora")
        init_router_centers(model, torch.utils.data.DataLoader(data, batch_size=3), subset_size=32, kmeans_iters=3)
        found.append(centers(model))
    assert_same(*found, atol=0, rtol=0)


def test_the_published_quick_start_runs_as_it_stands(tmp_path):
    model = tiny_llama(layers=32)
    model = apply_monkeyjump(
        model,
        blocks={"LlamaDecoderLayer": list(range(32))},
        linears=["q_proj", "k_proj", "v_proj", "o_proj"],
        shared_expert=["up_proj", "down_proj"],
        rank=2,
        alpha=16.0,
        temperature=1.0,
        ema_momentum=0.2,
        top_k=2,
        rep_mode="token",
    )
    data = [{"input_ids": row, "labels": row} for row in batch(12)]
    trainer = Trainer(model=model, args=TrainingArguments(str(tmp_path), report_to=[]), train_dataset=data)
    before, state = centers(model), torch.get_rng_state()
    init_router_centers(trainer, subset_size=4000, kmeans_iters=15, rep_mode="token")
    assert torch.equal(torch.get_rng_state(), state)
    assert len(before) == 32 and all(not torch.equal(c, before[n]) for n, c in centers(model).items())


@pytest.mark.parametrize("mode", mj.REP_MODES)
def test_centers_start_as_the_kmeans_of_the_real_representations(mode):
    model = adapted("lora", rep_mode=mode).train()
    rows = [torch.where(left_padded()["attention_mask"].bool(), batch(2, 7, seed=s), 0) for s in range(4)]
    loader = [{"input_ids": ids, "attention_mask": (ids != 0).long()} for ids in rows]
    seen = []
    router = model._monkeyjump.routers["model.layers.1"]
    handle = model.model.layers[1].register_forward_pre_hook(
        lambda m, args, kwargs: seen.extend(
            naive_unit(vector)
            for hidden, ids in zip(args[0], rows[len(seen) // (11 if mode == "token" else 2)], strict=True)
            for t, vector in enumerate(naive_representation(hidden, mode, (ids != 0).tolist(), None))
            if (ids[t] != 0 if mode == "token" else t == 0)
        ),
        with_kwargs=True,
    )
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    init_router_centers(model, loader, subset_size=1000, kmeans_iters=20)
    handle.remove()
    points = torch.stack(seen)
    assert len(points) == (44 if mode == "token" else 8)
    assert model.training and hooks[:1] == [len(next(model.modules())._forward_pre_hooks)]
    nearest = (points @ router.centers.double().T).argmax(dim=1)
    for e in range(4):  # a fixed point of Lloyd: each center is the mean direction of its points
        assert (nearest == e).any()
        torch.testing.assert_close(
            naive_unit(points[nearest == e].sum(0)), router.centers[e].double(), atol=1e-4, rtol=1e-3
        )


def test_the_same_seed_gives_the_same_centers_and_just_enough_batches_are_read():
    loader, read = [{"input_ids": batch(4, 10, seed=s)} for s in range(40)], []

    def counted():
        for item in loader:
            read.append(item)
            yield item

    found = []
    for seed in (0, 0, 1):
        model = adapted("lora")
        init_router_centers(model, counted(), subset_size=80, seed=seed)
        found.append(centers(model))
    assert len(read) == 3 * 8  # an eighth, 10 of 40 tokens, from each batch
    assert_same(found[0], found[1], atol=0, rtol=0)
    assert any(not torch.allclose(found[0][name], found[2][name]) for name in found[0])


@pytest.mark.parametrize(
    ("loader", "settings", "message"),
    [
        ([], {}, "0 representations for 4 experts"),
        ([{"input_ids": torch.tensor([[5, 6, 7]])}], {}, "3 representations for 4 experts"),
        (None, {}, "dataloader=None"),
        ([{"input_ids": batch()}], {"rep_mode": "mean"}, "adapted with rep_mode='token'"),
        ([{"input_ids": batch()}], {"subset_size": 0}, "subset_size=0"),
        ([{"input_ids": batch()}, {"nonsense": 1}], {}, None),
    ],
)
def test_centers_stay_when_they_cannot_be_set(loader, settings, message):
    model = adapted("lora").train()
    before = centers(model)
    with pytest.raises(ValueError if message else Exception, match=message):
        init_router_centers(model, loader, **settings)
    assert_same(centers(model), before, atol=0, rtol=0)
    assert model.training and all(len(block._forward_pre_hooks) == 1 for block in model.model.layers)


def test_centered_routing_compares_directions_seen_from_their_mean():
    model = adapted("lora", centered=True, top_k=4)
    init_router_centers(model, [{"input_ids": batch(8, seed=s)} for s in range(4)], subset_size=200)
    router, hidden = model._monkeyjump.routers["model.layers.1"], torch.randn(1, 5, 32) + 3
    stack = model._monkeyjump.stacks[0]
    stack.enter(model.model, (), {})
    with torch.no_grad():
        router.enter(None, (hidden,), {})
    for t in range(5):
        vector = naive_unit(naive_unit(hidden[0, t]) - router.mean.double())
        expected = torch.tensor(naive_gates(vector, router.centers, 4, 1.0)) * 8.0
        torch.testing.assert_close(stack.call.gates[0, t], expected.float(), atol=1e-4, rtol=1e-4)
    assert 0.01 < router.mean.norm() < 1


# -------------------------------------------------------------------------------------------------------------- AdaLoRA


def test_rank_allocation_is_that_of_peft_step_by_step():
    peft = pytest.importorskip("peft")
    from peft.tuners.adalora.layer import RankAllocator

    schedule = {
        "target_r": 2,
        "init_r": 4,
        "tinit": 2,
        "tfinal": 3,
        "deltaT": 2,
        "total_step": 14,
        "beta1": 0.85,
        "beta2": 0.9,
    }
    model = adapted("adalora", rank=4)
    other = peft.get_peft_model(tiny_llama(), peft.AdaLoraConfig(target_modules=PROJECTIONS, **schedule))
    allocator: RankAllocator = other.base_model.rankallocator
    pairs = []
    for path, adapter in model._monkeyjump.adapters.items():
        layer = other.base_model.model.get_submodule(path)
        for name in ("A", "B", "E"):
            theirs = getattr(layer, f"lora_{name}")["default"]
            theirs.data.copy_(getattr(adapter, f"lora_{name}").data.view_as(theirs))
            pairs.append((getattr(adapter, f"lora_{name}"), theirs))
    pruned = []
    for step in range(1, 15):
        torch.manual_seed(step)
        for ours, theirs in pairs:
            ours.grad = torch.randn_like(ours)
            theirs.grad = ours.grad.view_as(theirs).clone()
            ours.data.sub_(0.1 * ours.grad)
            theirs.data.sub_(0.1 * theirs.grad)
        allocate_ranks(
            model, step, 14, target_rank=2, initial_steps=2, final_steps=3, interval=2, beta1=0.85, beta2=0.9
        )
        if step < 11:
            allocator.update_and_allocate(other.base_model.model, step)
        else:  # the first of the final phase, and the ones after it, which keep its choice
            allocator.update_and_allocate(other.base_model.model, step, force_mask=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs.view_as(ours))
        pruned.append(sum(int((ours == 0).sum()) for ours, _ in pairs if ours.dim() == 1))
    assert pruned[:3] == [0, 0, 0] and 0 < pruned[3] < 8 * 2 and pruned[10:] == [8 * 2] * 4


def test_allocation_state_is_checkpointed_and_its_arguments_are_checked():
    def step(model, number):
        torch.manual_seed(number)
        for parameter in trained(model).values():
            parameter.grad = torch.randn_like(parameter)
            parameter.data.sub_(0.1 * parameter.grad)
        allocate_ranks(model, number, 8, target_rank=1, interval=1)

    whole, first, second = adapted("adalora"), adapted("adalora"), adapted("adalora", seed=9)
    for number in range(1, 9):
        step(whole, number)
        step(first if number <= 4 else second, number)
        if number == 4:
            second.load_state_dict(first.state_dict())
    assert_same(trained(whole), trained(second), atol=0, rtol=0)
    with pytest.raises(ValueError, match="target_rank=3"):
        allocate_ranks(whole, 1, 8, target_rank=3)
    with pytest.raises(ValueError, match="final_steps=8"):
        allocate_ranks(whole, 1, 8, target_rank=1, final_steps=8)


def test_orthogonal_regularization_is_zero_for_orthonormal_factors_and_has_a_gradient():
    model = apply_monkeyjump(tiny_llama(), adapter="adalora")
    assert orthogonal_regularization(model) < 1e-5
    model = adapted("adalora")
    total = []
    for adapter in model._monkeyjump.adapters.values():
        for matrix in (adapter.lora_A.T, adapter.lora_B):
            columns = matrix.detach().double().unbind(dim=1)
            gram = [[float(a @ b) - float(i == j) for j, b in enumerate(columns)] for i, a in enumerate(columns)]
            total.append(math.sqrt(sum(entry**2 for row in gram for entry in row)))
    loss = orthogonal_regularization(model)
    assert float(loss) == pytest.approx(sum(total) / len(total), rel=1e-5)
    loss.backward()
    assert all((p.grad is not None) == (p.dim() == 2) for p in trained(model).values())


# -------------------------------------------------------------------------------------------- the theory, as it runs


def test_a_routed_update_reaches_a_rank_that_the_summed_adapters_cannot():
    """Two experts whose updates cancel in a sum: plain LoRA changes nothing, the routed update has rank 2."""
    u, v = torch.eye(4)[0], torch.eye(4)[1]
    update = torch.outer(u, v)
    deltas = [update + torch.outer(v, u), -update - torch.outer(v, u)]
    assert torch.linalg.matrix_rank(sum(deltas)) == 0
    c = mj.unit(torch.tensor([[1.0, 0, 0.2, 0], [0, 1.0, 0, 0.2]]))
    points = mj.unit(torch.eye(4))
    gates, _ = mj.route(points, c, 1)
    plain = points @ sum(deltas).T
    routed = sum(gates[:, e, None] * (points @ deltas[e].T) for e in range(2))
    assert plain.abs().max() == 0 and torch.linalg.matrix_rank(routed) == 2


def test_only_the_last_tokens_representation_depends_on_every_token():
    model = tiny_llama().double()
    embeddings = model.get_input_embeddings()(batch(1, 6)).detach().requires_grad_()
    hidden = model(inputs_embeds=embeddings, output_hidden_states=True).hidden_states[-1][0]
    for t in range(6):
        (gradient,) = torch.autograd.grad(hidden[t].sum(), embeddings, retain_graph=True)
        assert (gradient[0].abs().sum(dim=1) > 0).tolist() == [s <= t for s in range(6)]


# --------------------------------------------------------------------------------------------------- every architecture

# ------------------------------------------------------------------------------------------- tiny models of every type

# A field of a config class that is named here gets this value wherever it occurs.
SMALL: dict[str, object] = {}
for value, names in {
    32: """hidden_size d_model n_embd dim_model embed_dim embedding_size embedding_dim emb_dim word_embed_proj_dim
        hidden_size_global encoder_hidden_size out_hidden_size text_hidden_size projection_dim input_embedding_size
        output_embedding_size adapter_in_dim adapter_out_dim attention_hidden_size lru_width projector_hidden_size
        output_dim image_text_hidden_size adapter_input_size decoder_hidden_size mm_embed_dim output_proj_dims
        vision_hidden_size backbone_hidden_size patch_embed_hidden_size projection_hidden_size embedding_dimension
        d_inner merged_hidden_size image_token_embed_dim""",
    48: """intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff dim_ff dff mlp_dim n_inner
        moe_intermediate_size
        ffn_hidden_size feed_forward_size shared_expert_intermediate_size moe_shared_expert_intermediate_size
        shared_intermediate_size intermediate_size_mlp expert_ffn_hidden_size dense_intermediate_size moe_hidden_size
        shared_experts_intermediate_size experts_intermediate_size share_expert_dim alignment_intermediate_size
        projection_intermediate_size projector_intermediate_size""",
    2: """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers layers depth
        num_encoder_layers num_blocks num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts
        num_key_value_heads num_kv_heads swa_num_key_value_heads
        max_window_layers resampler_depth index_topk_blocks num_global_layers
        moe_top_k""",
    4: """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads
        num_encoder_attention_heads num_decoder_attention_heads linear_num_value_heads linear_num_heads
        swa_num_attention_heads num_experts n_routed_experts num_local_experts moe_num_experts index_n_heads
        resampler_n_heads resampler_heads num_sliding_attention_heads patch_size resampler_n_latents
        resampler_num_latents num_query_tokens latent_query_num mamba_chunk_size chunk_size
        conf_num_attention_heads""",
    8: """head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim dim_head d_head d_kv attention_head_size
        linear_head_dim linear_key_head_dim linear_value_head_dim swa_head_dim attention_head_dim kv_channels
        mamba_d_head mamba_headdim mamba_head_dim index_head_dim index_topk global_head_dim resampler_head_dim
        resampler_dim_head mamba_d_state state_size ssm_state_size hidden_size_per_layer_input
        query_pre_attn_scalar laurel_rank""",
    16: "kv_lora_rank q_lora_rank d_rel o_lora_rank crop_size image_size",
    100: "vocab_size num_embeddings codebook_size",
    128: """max_position_embeddings n_positions n_ctx max_seq_len model_max_length num_position_embeddings
        max_source_positions max_target_positions context_length position_embedding_size sliding_window
        sliding_window_size attention_window_size rel_extent original_max_position_embeddings""",
    0: "pad_token_id",
    1: "bos_token_id n_group topk_group num_expert_group n_groups mamba_n_groups o_groups decoder_start_token_id",
}.items():
    SMALL |= dict.fromkeys(names.split(), value)
SMALL |= {"eos_token_id": 2, "linear_num_key_heads": 2, "image_token_id": 90, "image_token_index": 90}
SMALL |= {"use_mamba_kernels": False, "mm_tokens_per_image": 4}


def fields_of(config_class: type) -> dict:
    """The fields of a config class with their defaults."""
    try:
        return config_class().to_dict()
    except Exception:  # a class without defaults for some of its parts
        return dict.fromkeys(inspect.signature(config_class.__init__).parameters)


def one_of_each_layer(default: dict) -> dict:
    """Lists with an entry a layer, cut to one layer of each kind (two at least), and the number of layers to match."""
    depths = {
        name: default[name] for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if default.get(name)
    }
    lists = {
        name: list(dict.fromkeys(values))
        for name, values in default.items()
        if isinstance(values, list) and len(values) in depths.values() and isinstance(values[0], (str, int, float))
    }
    kinds = [values for values in lists.values() if isinstance(values[0], str)]
    layers = max([2, *map(len, kinds)])
    cut = {name: [values[i % len(values)] for i in range(layers)] for name, values in lists.items()}
    return cut | dict.fromkeys(depths, layers) if lists else {}


def tiny_config(config_class: type, changes: dict | None = None) -> PretrainedConfig:
    """A config of this class, and of its parts, with small sizes; `changes` win, {"text_config": {...}} for a part."""
    default, changes = fields_of(config_class), dict(changes or {})
    fields = {name: SMALL[name] for name in default if name in SMALL} | one_of_each_layer(default)
    fields |= {name: 0.0 for name, value in default.items() if "drop" in name and isinstance(value, float)}
    if "kv_lora_rank" in default and "num_key_value_heads" in fields:  # latent attention: as many as heads
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    special = [n for n in default if n.endswith(("_token_id", "_token_index")) and n not in SMALL]
    fields |= {name: 99 - i for i, name in enumerate(special)}  # distinct, from the top of the vocabulary
    for name, part in getattr(config_class, "sub_configs", {}).items():
        kind = (default.get(name) or {}).get("model_type")
        part = CONFIG_MAPPING[kind] if part.__name__ == "AutoConfig" and kind in CONFIG_MAPPING else part
        if part.__name__ != "AutoConfig":
            fields[name] = tiny_config(part, changes.pop(name, None)).to_dict()
    return config_class(**fields | changes)


# True exceptions: sizes that must divide, multiply or exclude one another.
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
TWO_KINDS = ["sliding_attention", "full_attention"]
ZAMBA = {
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "num_hidden_layers": 4,
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
}
CHANGES: dict[str, dict] = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "blip": {"vision_config": {"hidden_size": 24}},  # narrower than the text's
    "chameleon": {"vocabulary_map": {"<image>": 90}},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": TWO_KINDS,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in TWO_KINDS},
    },
    "cpmant": {"prompt_length": 3},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,  # 5.0 keeps keys and values that shared layers never call
        "layer_types": TWO_KINDS,
        "intermediate_size": [48] * 2,
        "activation_sparsity_pattern": [0.0] * 2,
        "vocab_size_per_layer_input": 100,
    },
    "gemma4": {"text_config": {"vocab_size_per_layer_input": 100}},
    "gemma4_text": {"vocab_size_per_layer_input": 100},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["linear_attention", "full_attention"]},
    "instructblip": {"qformer_config": {"vocab_size": 101}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "llama4": {
        "vision_config": dict.fromkeys(["vision_output_dim", "projector_input_dim", "projector_output_dim"], 32)
    },
    "mamba2": {"num_heads": 8},
    "mllama": {
        "text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
        "vision_config": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 96},
    },
    "moshi": {"audio_encoder_config": {"codebook_size": 64}},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 100,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "roc_bert": dict.fromkeys(["pronunciation_vocab_size", "shape_vocab_size"], 100)
    | dict.fromkeys(["pronunciation_embed_dim", "shape_embed_dim"], 8),
    "xmod": {"default_language": "en_XX"},
    "zamba": ZAMBA,
    "zamba2": ZAMBA | {"num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
}
for name in ("qwen2_vl", "qwen2_5_vl", "paddleocr_vl"):
    CHANGES[name] = {"text_config": {"rope_parameters": MROPE}}
for name in ("glm4v", "glm46v", "glm4v_moe", "glm_ocr", "glmga"):
    CHANGES[name] = {"text_config": {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}}}

CAUSAL = """
    llama mistral qwen2 qwen3 gemma2 gemma3_text gemma3n_text gpt2 gpt_neo gpt_neox gptj gpt_bigcode opt bloom falcon
    mpt phi phi3 codegen stablelm olmo2 cohere2 glm4 starcoder2 smollm3 nanochat bert xglm marian openai-gpt
    mixtral qwen2_moe qwen3_moe gpt_oss granitemoe llama4_text deepseek_v3 deepseek_v4 longcat_flash minicpm3
    mamba mamba2 falcon_mamba rwkv jamba bamba falcon_h1 granitemoehybrid lfm2_moe qwen3_next qwen3_5_text nemotron_h
    recurrent_gemma zamba zamba2 kimi_linear hrm_text
""".split()
VISION_LANGUAGE = """
    llava qwen2_vl qwen2_5_vl qwen3_vl gemma3 paligemma idefics idefics2 idefics3 smolvlm internvl mllama blip llama4
""".split()
ENCODER_DECODER = ["t5", "bart"]
AUTO = dict.fromkeys(VISION_LANGUAGE, AutoModelForImageTextToText) | dict.fromkeys(
    ENCODER_DECODER, AutoModelForSeq2SeqLM
)
EVERY = pytest.mark.parametrize("model_type", [*CAUSAL, *VISION_LANGUAGE, *ENCODER_DECODER])


@functools.cache
def base_model(model_type: str) -> nn.Module:
    config = tiny_config(CONFIG_MAPPING[model_type], CHANGES.get(model_type))
    for part in (config, config.get_text_config(decoder=True)):
        if getattr(part, "pad_token_id", None) is None:  # some older configs have no such field
            part.pad_token_id = 0
    torch.manual_seed(0)
    model = AUTO.get(model_type, AutoModelForCausalLM).from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.any() and not name.endswith("bias"):  # a closed gate: nothing behind it would train
                parameter.normal_(std=0.1)
    return model


def tiny_model(model_type: str) -> nn.Module:
    """A tiny float32 model of this type in eval mode, always the same; skips the test if this transformers has none."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    return copy.deepcopy(unless_base_fails(lambda: base_model(model_type)))


def unless_base_fails(run: Callable):
    """What `run` gives; if it fails on the model without adapters, the test is skipped: that is not ours to test."""
    try:
        return run()
    except Exception as error:
        pytest.skip(f"fails without adapters: {error!r}"[:200])


def text_inputs(model: nn.Module, tokens: int = 9) -> dict[str, Tensor]:
    """Two sequences of random tokens as the model's keywords, and images if it does not work without."""
    generator, parameters = torch.Generator().manual_seed(1), inspect.signature(model.forward).parameters
    ids = torch.randint(3, 80, (2, tokens), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    needs_image = "pixel_values" in parameters and parameters["pixel_values"].default is inspect.Parameter.empty
    if needs_image or model.config.model_type in ("idefics", "mllama"):  # mllama skips its cross-attention without
        inputs |= image_inputs(model, tokens)
    if model.config.model_type in ("gemma3", "paligemma"):  # needed in training: text, not image
        inputs["token_type_ids"] = torch.full_like(ids, model.config.model_type == "paligemma")
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, 2:] + 1
    return inputs


def image_inputs(model: nn.Module, tokens: int) -> dict[str, Tensor]:
    """Two random images of 16 x 16 pixels, cut into 4 x 4 patches, as this model's processor would give them."""
    generator, kind = torch.Generator().manual_seed(3), model.config.model_type
    if kind.startswith("qwen"):  # patches in a row, two frames each; 2 x 2 of them become one token
        patches = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=generator)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    if kind == "mllama":  # one image of one tile; the other tiles are padding
        return {
            "pixel_values": nn.functional.pad(pixels[:, None, None], (0,) * 6 + (0, 3)),
            "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]] * 2),
            "cross_attention_mask": torch.tensor([[[[1, 0, 0, 0]]] * tokens] * 2),
        }
    if kind == "idefics":
        return {"pixel_values": pixels[:, None], "image_attention_mask": torch.ones(2, tokens, 1, dtype=torch.long)}
    return {"pixel_values": pixels[:, None] if kind in ("idefics3", "smolvlm") else pixels}


def image_and_text_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Twenty tokens, some of them an image's, for each of two sequences."""
    inputs, kind = text_inputs(model, tokens=20), model.config.model_type
    inputs["input_ids"][:, 2 : 2 + {"llava": 16, "paligemma": 16, "mllama": 1, "idefics": 0}.get(kind, 4)] = 90
    is_image = (inputs["input_ids"] == 90).long()
    inputs |= image_inputs(model, 20) | {"mm_token_type_ids": is_image, "token_type_ids": is_image}
    if kind == "paligemma":
        inputs["token_type_ids"] = torch.ones_like(is_image)  # all of it an answer, and causal
    if not kind.startswith("qwen"):
        del inputs["mm_token_type_ids"]
    return {name: value for name, value in inputs.items() if name in inspect.signature(model.forward).parameters}


def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**copy.deepcopy(inputs)).logits  # a copy: xglm up to 5.0 adds to its position_ids in place


def generated_logits(model: nn.Module, inputs: dict[str, Tensor], **options) -> Tensor:
    """Logits of four tokens decoded greedily."""
    prompt = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    options |= {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    if model.config.is_encoder_decoder:
        options["decoder_start_token_id"] = 0
    return torch.stack(model.generate(**prompt, **options, output_logits=True, return_dict_in_generate=True).logits)


def adapted_tiny(model_type: str, **options) -> nn.Module:
    """A tiny model whose adapters are away from the identity, as after training; all experts are used by default."""
    model, generator = tiny_model(model_type), torch.Generator().manual_seed(2)
    if "top_k" not in options:
        apply_monkeyjump(model, **options, top_k=1)
        options["top_k"] = max(len(t) for name, t in model.named_buffers() if name.endswith("monkeyjump.centers"))
        remove_monkeyjump(model)
    torch.manual_seed(0)
    apply_monkeyjump(model, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def zoo_gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)  # routers of some models draw noise in training
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs = inputs | {"use_cache": False}  # recurrent_gemma's keeps keys off the tape, up to 5.0
    model(**inputs).logits.float().square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# ------------------------------------------------------------------------------------------------- every architecture


@EVERY
def test_on_every_architecture_all_blocks_of_the_language_model_are_found_and_no_others(model_type):
    model = apply_monkeyjump(tiny_model(model_type), top_k=1)
    found, config = router_statistics(model), model.config.get_text_config(decoder=True)
    assert not [
        name for name in found if any(part in name for part in ("vision", "visual", "audio", "qformer", "perceiver"))
    ]
    stacks = {"t5": 2, "bart": 2, "idefics": 2, "longcat_flash": 0.5}  # longcat counts the two attentions of a block
    depth = 4 if model_type == "hrm_text" else config.num_hidden_layers * stacks.get(model_type, 1)
    without_mixer = sum(kind in ("mlp", "moe") for kind in getattr(config, "layers_block_type", []))  # nemotron_h
    assert len(found) == depth - without_mixer, sorted(found)


@EVERY
def test_on_every_architecture_new_adapters_change_nothing_and_go_without_a_trace(model_type):
    model = tiny_model(model_type)
    inputs, names = text_inputs(model), list(model.state_dict())
    expected = unless_base_fails(lambda: logits_of(model, inputs))
    apply_monkeyjump(model, top_k=1)
    assert torch.equal(logits_of(model, inputs), expected)
    remove_monkeyjump(model)
    assert torch.equal(logits_of(model, inputs), expected)
    assert list(model.state_dict()) == names


@EVERY
def test_on_every_architecture_all_adapters_train_and_nothing_else_does(model_type):
    model = adapted_tiny(model_type).train()
    inputs = text_inputs(model, tokens=16)
    with disable_adapters(model):
        unless_base_fails(lambda: model(**inputs))
    found = zoo_gradients(model, inputs)
    assert found.keys() == {name for name, _ in model.named_parameters() if "monkeyjump" in name}
    for name, gradient in found.items():
        assert gradient.isfinite().all() and gradient.any(), name
    assert all(seen["count"] > 0 for seen in router_statistics(model).values())


@EVERY
@pytest.mark.parametrize("rep_mode", ["token", "last", "mean"])
def test_on_every_architecture_padding_is_invisible(model_type, rep_mode):
    model = adapted_tiny(model_type, rep_mode=rep_mode, top_k=1)
    inputs = text_inputs(model)
    side = (0, 3) if model.config.is_encoder_decoder else (3, 0)  # an encoder's on the right, a decoder's on the left
    padded = {
        name: nn.functional.pad(inputs[name], side)
        for name in ("input_ids", "attention_mask", "token_type_ids")
        if name in inputs
    }
    for name in {"cross_attention_mask", "image_attention_mask"} & inputs.keys():
        padded[name] = nn.functional.pad(inputs[name], (0,) * 2 * (inputs[name].dim() - 2) + (3, 0))
    if "position_ids" in inspect.signature(model.forward).parameters:
        padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    padded, real = inputs | padded, slice(None if model.config.is_encoder_decoder else 3, None)
    plain = tiny_model(model_type)
    base = unless_base_fails(lambda: logits_of(plain, padded))[:, real]
    if not torch.allclose(base, logits_of(plain, inputs), atol=1e-5):
        pytest.skip("sees padding without adapters, too")
    torch.testing.assert_close(logits_of(model, padded)[:, real], logits_of(model, inputs), atol=1e-4, rtol=1e-4)


@EVERY
def test_on_every_architecture_decoding_with_a_cache_gives_what_decoding_without_it_gives(model_type):
    model = adapted_tiny(model_type, top_k=1 if model_type == "jetmoe" else 2)  # which has one expert a block
    inputs = text_inputs(model)
    inputs["attention_mask"][0, :3] = 0
    base = tiny_model(model_type)
    cached = unless_base_fails(lambda: generated_logits(base, inputs, use_cache=True))
    uncached = unless_base_fails(lambda: generated_logits(base, inputs, use_cache=False))
    if not torch.allclose(cached, uncached, atol=1e-4):
        pytest.skip("its cache changes its logits without adapters, too")
    cached, uncached = (generated_logits(model, inputs, use_cache=use_cache) for use_cache in (True, False))
    torch.testing.assert_close(cached, uncached, atol=1e-3, rtol=1e-3)


@EVERY
@pytest.mark.parametrize("rep_mode", ["last", "mean", "prompt_end"])
def test_on_every_architecture_the_sequence_modes_generate_and_train(model_type, rep_mode):
    model = adapted_tiny(model_type, rep_mode=rep_mode, top_k=1)
    inputs = text_inputs(model)
    base = tiny_model(model_type)
    unless_base_fails(lambda: generated_logits(base, inputs))
    assert generated_logits(model, inputs).isfinite().all()
    found = zoo_gradients(model.train(), inputs)
    assert found and all(gradient.isfinite().all() for gradient in found.values())


@EVERY
def test_on_every_architecture_a_saved_adapter_loads_into_a_fresh_model(model_type, tmp_path):
    model = adapted_tiny(model_type)
    inputs = text_inputs(model)
    expected = unless_base_fails(lambda: logits_of(model, inputs))
    save_adapter(model, tmp_path)
    assert torch.equal(logits_of(load_adapter(tiny_model(model_type), tmp_path), inputs), expected)


@EVERY
def test_on_every_architecture_checkpointing_does_not_change_the_gradients(model_type, use_reentrant=False):
    model = adapted_tiny(model_type, top_k=1).train()
    if not model.supports_gradient_checkpointing:
        pytest.skip("does not support gradient checkpointing")
    inputs = text_inputs(model)
    with disable_adapters(model):
        unless_base_fails(lambda: model(**inputs))
    expected = zoo_gradients(model, inputs)
    model = adapted_tiny(model_type, top_k=1).train()  # a fresh one: the first forward has left statistics
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    with disable_adapters(model):
        unless_base_fails(lambda: model(**inputs))
    for name, gradient in zoo_gradients(model, inputs).items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda message, name=name: f"{name}: {message}")


# ------------------------------------------------------------------------------------------- particular architectures


@pytest.mark.parametrize("model_type", "llama gpt2 gemma2 bert t5 qwen3_moe deepseek_v4 jamba zamba2 mllama".split())
def test_reentrant_checkpointing_does_not_change_the_gradients_either(model_type):
    test_on_every_architecture_checkpointing_does_not_change_the_gradients(model_type, use_reentrant=True)


VISION_BLOCKS = {
    "llava": "CLIPEncoderLayer",
    "gemma3": "SiglipEncoderLayer",
    "qwen2_vl": "Qwen2VLVisionBlock",
    "qwen2_5_vl": "Qwen2_5_VLVisionBlock",
    "qwen3_vl": "Qwen3VLVisionBlock",
    "mllama": "MllamaVisionEncoderLayer",
    "idefics3": "Idefics3EncoderLayer",
    "internvl": "InternVLVisionLayer",
}


@pytest.mark.parametrize("rep_mode", ["token", "mean"])
@pytest.mark.parametrize("part", ["language", "vision"])
@pytest.mark.parametrize("model_type", VISION_BLOCKS)
def test_vision_language_models_train_on_images_in_whichever_part_is_named(model_type, part, rep_mode, tmp_path):
    model = tiny_model(model_type)
    inputs = image_and_text_inputs(model)
    expected = unless_base_fails(lambda: logits_of(model, inputs))
    count = sum(type(module).__name__ == VISION_BLOCKS[model_type] for module in model.modules())
    blocks = (
        {VISION_BLOCKS[model_type]: range(count - 1)} if part == "vision" else None
    )  # llava leaves out the last one
    apply_monkeyjump(model, blocks=blocks, top_k=1, rep_mode=rep_mode)
    assert torch.equal(logits_of(model, inputs), expected)
    model = adapted_tiny(model_type, blocks=blocks, rep_mode=rep_mode).train()
    found = zoo_gradients(model, inputs)
    assert found.keys() == {name for name, _ in model.named_parameters() if "monkeyjump" in name}
    for name, gradient in found.items():
        assert gradient.isfinite().all() and gradient.any(), name
    expected = logits_of(model.eval(), inputs)
    save_adapter(model, tmp_path)
    assert torch.equal(logits_of(load_adapter(tiny_model(model_type), tmp_path), inputs), expected)


@pytest.mark.parametrize("rep_mode", ["last", "mean", "prompt_end"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2", "gemma3_text", "gemma3", "mistral", "bart"])
def test_a_static_cache_routes_a_padded_prompt_as_a_dynamic_cache_does(model_type, rep_mode):
    model = adapted_tiny(model_type, rep_mode=rep_mode, top_k=1)
    inputs = text_inputs(model)
    inputs["attention_mask"][0, :4] = 0
    dynamic = generated_logits(model, inputs)
    plain = tiny_model(model_type)
    base = unless_base_fails(lambda: generated_logits(plain, inputs, cache_implementation="static"))
    static = generated_logits(model, inputs, cache_implementation="static")
    torch.testing.assert_close(static, dynamic, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(static, base)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe"])
def test_of_a_mixture_of_experts_base_the_attention_is_adapted(model_type):
    model = apply_monkeyjump(tiny_model(model_type))
    for seen in router_statistics(model).values():
        assert sorted(name.rpartition(".")[2] for name in seen["experts"]) == ["k_proj", "o_proj", "q_proj", "v_proj"]


def test_a_hybrid_adapts_each_kind_of_block_by_its_own_mixer():
    found = router_statistics(apply_monkeyjump(tiny_model("jamba"))).values()
    assert [sorted(name.partition(".")[0] for name in seen["experts"])[0] for seen in found] == ["mamba", "self_attn"]


@pytest.mark.parametrize("min_share", [0.0, 0.2])
def test_blocks_of_shared_adapters_alone_are_adapted_and_not_routed(min_share):
    model = tiny_llama()
    attention = model.model.layers[1].self_attn
    attention.query = attention.q_proj  # by another name: no expert in block 1
    del attention.q_proj
    attention.forward = lambda hidden_states, **_: (attention.o_proj(attention.query(hidden_states)), None)
    settings = {"linears": "q_proj", "shared_expert": "o_proj", "top_k": 1, "min_share": min_share}
    model = adapted("lora", model, **settings).train()
    layer, seen = attention.o_proj, []
    layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    for seed in range(3):
        model(input_ids=batch(seed=seed), labels=batch(seed=seed)).loss.backward()
    (x, found), own = seen[-1], layer.monkeyjump
    expected = x @ layer.weight.T + 8.0 * x @ own.lora_A.T @ own.lora_B.T  # alpha / r
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert own.lora_A.grad.any() and list(router_statistics(model)) == ["model.layers.0"]
    with disable_adapters(model):
        model(batch())
    torch.testing.assert_close(seen[-1][1], seen[-1][0] @ layer.weight.T)


def test_blocks_with_fewer_experts_than_top_k_use_them_all_and_no_block_with_enough_is_an_error():
    model = apply_monkeyjump(tiny_model("jamba"), top_k=4)  # attention: q, k, v, o; mamba: in_proj, x_proj, out_proj
    assert logits_of(model, text_inputs(model)).isfinite().all()
    with pytest.raises(ValueError, match="top_k=5"):
        apply_monkeyjump(tiny_model("jamba"), top_k=5)


class QuantisedLinear(nn.Module):
    """What a quantised base layer looks like: packed 8-bit weights, and no float matrix to read."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.abs().max() / 127
        packed = (linear.weight / self.scale).round().to(torch.int8).view(torch.uint8).reshape(-1, 1)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(torch.int8).reshape(self.out_features, self.in_features)
        return nn.functional.linear(x, weight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("adapter", ["lora", "lorafa", "adalora", "propulsion"])
def test_a_quantised_base_is_adapted_trained_and_saved(adapter, tmp_path):
    def quantised() -> nn.Module:
        model = tiny_model("llama").requires_grad_(False)
        for block in model.model.layers:
            for part in (block.self_attn, block.mlp):
                for name, linear in list(part.named_children()):
                    if isinstance(linear, nn.Linear):
                        setattr(part, name, QuantisedLinear(linear))
        return model

    model = quantised()
    inputs, expected = text_inputs(model), logits_of(model, text_inputs(model))
    apply_monkeyjump(model, adapter=adapter, linears=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"], top_k=5)
    assert torch.equal(logits_of(model, inputs), expected)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        found = zoo_gradients(model.train(), inputs)
        optimizer.step()
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.uint8 for name, p in model.named_parameters() if name.endswith("q_proj.weight"))
    trained = logits_of(model.eval(), inputs)
    assert not torch.equal(trained, expected)
    save_adapter(model, tmp_path)
    assert torch.equal(logits_of(load_adapter(quantised(), tmp_path), inputs), trained)


@pytest.mark.parametrize("model_type", ["xlnet", "prophetnet"])
def test_families_whose_projections_cannot_be_matched_with_tokens_are_refused(model_type):
    with pytest.raises(ValueError, match=model_type):
        apply_monkeyjump(tiny_model(model_type))


# ---------------------------------------------------------------------------------------- PEFT, TRL and custom adapters

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
IDS = torch.randint(3, 63, (2, 7), generator=torch.Generator().manual_seed(0))
ROUTING = {"top_k": 2, "temperature": 0.1}


def plain_llama(dtype=torch.float32, width=32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype)


def peft_llama(config=None, model=None, shaken=True):
    peft = pytest.importorskip("peft")
    config = config or peft.LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION)
    model = peft.get_peft_model(model or plain_llama(), config)
    return shake(model).eval() if shaken else model.eval()


def shake(model, seed=1):
    """Away from the initial identity: noise on all that is trained."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def routed(model, **settings):
    return apply_monkeyjump(copy.deepcopy(model), adapter="peft", **{**ROUTING, **settings})


def logits(model, ids=IDS, **kwargs):
    return model(input_ids=ids, **kwargs).logits


def gradients(model, ids=IDS, **kwargs):
    model.zero_grad()
    logits(model, ids, **kwargs).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def routed_slowly(model, like):
    """The same model, routed by the definition: a second base product, softmax over all, then the top k of it."""
    model, state = copy.deepcopy(model), monkeyjump._state(like)[1]
    for path, router in state.routers.items():
        gates = {}

        def enter(block, args, kwargs, router=router, gates=gates):
            hidden = (args[0] if args else kwargs["hidden_states"]).detach()
            cosines = F.cosine_similarity(hidden[:, :, None], router.centers[None, None], dim=-1)
            p = (cosines / state.config.temperature).softmax(dim=-1)
            p = p * (p >= p.topk(state.config.top_k).values[..., -1:])
            gates["now"] = p / p.sum(dim=-1, keepdim=True)

        block = model.get_submodule(path)
        block.register_forward_pre_hook(enter, with_kwargs=True)
        for expert, name in enumerate(router.experts):
            layer = block.get_submodule(name)

            def forward(x, *args, layer=layer, expert=expert, gates=gates, **kwargs):
                base, adapted = layer.get_base_layer()(x), type(layer).forward(layer, x, *args, **kwargs)
                return base + gates["now"][..., expert, None].to(base) * (adapted - base)

            layer.forward = forward
    return model


METHODS = {
    "LoRA": ("LoraConfig", {"r": 4}),
    "LoRA with bias": ("LoraConfig", {"r": 4, "lora_bias": True}),
    "rsLoRA": ("LoraConfig", {"r": 4, "use_rslora": True}),
    "DoRA": ("LoraConfig", {"r": 4, "use_dora": True}),
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 4, "total_step": 10}),
    "VeRA": ("VeraConfig", {"r": 8}),
    "IA3 attention": ("IA3Config", {"feedforward_modules": []}),
    "IA3 feed-forward": (
        "IA3Config",
        {"target_modules": [*ATTENTION, "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "LoHa": ("LoHaConfig", {"r": 4}),
    "LoKr": ("LoKrConfig", {"r": 4}),
    "OFT": ("OFTConfig", {"r": 0, "oft_block_size": 4}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4}),
    "HRA": ("HRAConfig", {"r": 4}),
    "DeLoRA": ("DeloraConfig", {"r": 4}),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 50}),
    "MiSS": ("MissConfig", {"r": 4}),
    "RoAd": ("RoadConfig", {"group_size": 8}),
    "C3A": ("C3AConfig", {"block_size": 8}),
}


def method(name):
    peft = pytest.importorskip("peft")
    config, settings = METHODS[name]
    if not hasattr(peft, config):
        pytest.skip(f"this PEFT has no {config}")
    return getattr(peft, config)(**{"target_modules": ATTENTION, **settings})


def test_routed_peft_lora_equals_our_own_lora():
    ours = shake(apply_monkeyjump(plain_llama(), linears=ATTENTION, rank=4, alpha=8.0, **ROUTING)).eval()
    theirs = apply_monkeyjump(peft_llama(), adapter="peft", linears=ATTENTION, **ROUTING)
    state, weights = dict(ours.named_parameters()), {}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                weights[name] = name.removeprefix("base_model.model.").replace(".lora_", ".monkeyjump.lora_")
                weights[name] = weights[name].removesuffix(".default.weight")
                parameter.copy_(state[weights[name]])
        for path, router in monkeyjump._state(ours)[1].routers.items():
            theirs.get_submodule(f"base_model.model.{path}").monkeyjump.centers.copy_(router.centers)
    assert len(weights) == 16
    torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-6, rtol=1e-5)
    got, wanted = gradients(theirs), gradients(ours)
    for name, own in weights.items():
        torch.testing.assert_close(got[name], wanted[own], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_any_peft_method_is_base_plus_gate_times_difference(name):
    model = peft_llama(method(name))
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    fast = routed(model)
    assert {n: p.requires_grad for n, p in fast.named_parameters()} == flags  # none made, none frozen
    slow = routed_slowly(model, fast)
    assert (logits(fast) - logits(model)).abs().max() > 1e-3  # routing does something
    assert_close(logits(fast), logits(slow))
    got, wanted = gradients(fast), gradients(slow)
    assert got.keys() == wanted.keys() and got
    for n in got:
        assert (got[n] - wanted[n]).norm() <= 1e-3 * wanted[n].norm() + 1e-6, n
    with model.disable_adapter(), disable_adapters(fast):
        assert torch.equal(logits(fast), logits(model))
    with fast.disable_adapter(), model.disable_adapter():
        assert torch.equal(logits(fast), logits(model))


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "IA3 feed-forward", "OFT"])
def test_a_peft_adapter_that_is_an_identity_stays_one(name):
    model = peft_llama(method(name), shaken=False)
    with model.disable_adapter():
        base = logits(model)
    assert_close(logits(routed(model)), base)


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "IA3 feed-forward"])
def test_shared_experts_of_peft_are_always_on(name):
    model = peft_llama(method(name))
    fast = routed(model, linears=["q_proj", "v_proj"], shared_expert="o_proj")
    assert_close(logits(fast), logits(routed_slowly(model, fast)))


def test_blocks_and_projections_without_peft_layers_are_left_alone():
    peft = pytest.importorskip("peft")
    model = peft_llama(peft.LoraConfig(r=4, target_modules=ATTENTION, layers_to_transform=[1]))
    fast = routed(model)
    assert [path[-1] for path in monkeyjump._state(fast)[1].routers] == ["1"]
    assert_close(logits(fast), logits(routed_slowly(model, fast)))
    with pytest.raises(ValueError, match="up_proj.*not in these blocks"):
        routed(model, linears=["q_proj", "up_proj"])


def test_adapter_peft_needs_unmerged_peft_layers():
    with pytest.raises(ValueError, match="carry PEFT"):
        apply_monkeyjump(plain_llama(), adapter="peft")
    model = peft_llama()
    with pytest.raises(ValueError, match="carry PEFT"):
        apply_monkeyjump(model, adapter="lora")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        apply_monkeyjump(model, adapter="peft")


def test_named_adapters_are_switched_as_in_peft():
    peft = pytest.importorskip("peft")
    model = peft_llama()
    fast = routed(model)
    first = logits(fast)
    fast.add_adapter("second", peft.LoraConfig(r=2, target_modules=ATTENTION, use_rslora=True))  # after apply
    assert torch.equal(logits(fast), first)
    fast.set_adapter("second")
    with torch.no_grad():
        for name, parameter in fast.named_parameters():
            if ".second." in name:
                parameter.normal_(std=0.3)
    plain = copy.deepcopy(fast)
    remove_monkeyjump(plain)
    assert_close(logits(fast), logits(routed_slowly(plain, fast)))
    trained = {name for name, parameter in fast.named_parameters() if parameter.requires_grad}
    assert trained and all(".second." in name for name in trained)
    assert trained == {name for name, parameter in plain.named_parameters() if parameter.requires_grad}
    with fast.disable_adapter(), plain.disable_adapter():
        assert torch.equal(logits(fast), logits(plain))
    second = logits(fast)
    mixed = logits(fast, adapter_names=["default", "second"])
    assert_close(mixed, torch.cat([first[:1], second[1:]]))
    fast.base_model.set_adapter(["default", "second"])  # both at once
    plain.base_model.set_adapter(["default", "second"])
    assert_close(logits(fast), logits(routed_slowly(plain, fast)))
    fast.set_adapter("default")
    assert torch.equal(logits(fast), first)
    fast.delete_adapter("second")
    fast.add_adapter("second", peft.LoraConfig(r=2, target_modules=ATTENTION, use_dora=True))
    fast.set_adapter("second")
    shake(fast)
    plain = remove_monkeyjump(copy.deepcopy(fast))
    assert_close(logits(fast), logits(routed_slowly(plain, fast)))


def test_disabling_covers_what_peft_adapted_outside_the_blocks():
    peft = pytest.importorskip("peft")
    base = plain_llama()
    wanted = logits(base)
    config = peft.LoraConfig(r=2, target_modules=[*ATTENTION, "embed_tokens"], modules_to_save=["lm_head"])
    fast = routed(peft_llama(config, base))
    assert (logits(fast) - wanted).abs().max() > 1e-3
    flags = {name: p.requires_grad for name, p in fast.named_parameters()}
    with disable_adapters(fast):
        assert torch.equal(logits(fast), wanted)
    assert {name: p.requires_grad for name, p in fast.named_parameters()} == flags
    assert (logits(fast) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "AdaLoRA", "IA3 feed-forward"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_a_routed_peft_model_changes_nothing(name, reentrant):
    plain = routed(peft_llama(method(name))).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    for step in range(3):
        ids, other = IDS.roll(step, 1), IDS.roll(3 + step, 1)
        wanted = gradients(plain, ids, use_cache=False)
        checkpointed.zero_grad()
        loss = logits(checkpointed, ids, use_cache=False).square().sum()
        with torch.no_grad(), disable_adapters(checkpointed):
            logits(checkpointed, other)
        with torch.no_grad():
            logits(checkpointed, other)
        loss.backward()
        got = {n: p.grad for n, p in checkpointed.named_parameters() if p.grad is not None}
        for n in wanted:
            torch.testing.assert_close(got[n], wanted[n])
        for block in range(2):
            path = f"base_model.model.model.layers.{block}"
            a, b = (m.get_submodule(path).monkeyjump.centers for m in (plain, checkpointed))
            torch.testing.assert_close(a, b)
    layer = checkpointed.get_submodule("base_model.model.model.layers.1.self_attn.o_proj")
    assert all(isinstance(scale, (int, float)) for scale in getattr(layer, "scaling", {}).values())


@pytest.mark.parametrize("rep_mode", ["token", "last"])
def test_a_routed_peft_model_generates_with_a_cache_what_it_does_without(rep_mode):
    fast = routed(peft_llama(), rep_mode=rep_mode)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    kwargs = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = fast.generate(input_ids=IDS, use_cache=True, **kwargs)
    if rep_mode == "token":
        assert torch.equal(cached, fast.generate(input_ids=IDS, use_cache=False, **kwargs))
    alone = fast.generate(input_ids=IDS[:1, 3:], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(cached[0, 3:], alone[0])


def test_copies_of_a_routed_peft_model_are_independent():
    fast = routed(peft_llama()).train()
    gradients(fast)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        twin.eval(), fast.eval()
        before = logits(fast)
        assert torch.equal(logits(twin), before)
        shake(twin)
        with torch.no_grad():
            for router in monkeyjump._state(twin)[1].routers.values():
                router.centers.neg_()
        assert torch.equal(logits(fast), before)
        with pytest.raises(ValueError, match="cannot be merged"):
            twin.merge_adapter()
        remove_monkeyjump(twin)
        twin.merge_adapter()


@pytest.mark.parametrize("name", ["LoRA", "IA3 feed-forward"])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_peft_checkpoint_holds_its_router(tmp_path, name, is_trainable):
    peft = pytest.importorskip("peft")
    fast = routed(peft_llama(method(name)), shared_expert="o_proj", rep_mode="mean")
    init_router_centers(fast, [IDS, IDS + 1], subset_size=4, kmeans_iters=2)
    fast.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()} - {"README.md"}
    files = {"adapter_model.safetensors", "adapter_config.json", "router_model.safetensors", "router_config.json"}
    assert names == files
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]
    again = peft.PeftModel.from_pretrained(plain_llama(), tmp_path, is_trainable=is_trainable)
    flags = {n: p.requires_grad for n, p in again.named_parameters()}
    again = load_adapter(again, tmp_path).eval()
    assert torch.equal(logits(again), logits(fast))
    assert {n: p.requires_grad for n, p in again.named_parameters()} == flags
    assert any(flags.values()) == is_trainable
    with torch.no_grad():
        for router in monkeyjump._state(again)[1].routers.values():
            router.centers.neg_()
    assert not torch.equal(logits(again), logits(fast))
    again.load_adapter(model_id=tmp_path, adapter_name="default")  # as a Trainer resumes
    assert torch.equal(logits(again), logits(fast))
    again.save_pretrained(save_directory=tmp_path / "by keyword")
    assert (tmp_path / "by keyword" / "router_model.safetensors").is_file()
    centers = monkeyjump.monkeyjump_state_dict(again)
    again.load_adapter(tmp_path, "other")  # one more adapter: the router stays
    assert all(torch.equal(value, centers[n]) for n, value in monkeyjump.monkeyjump_state_dict(again).items())


def test_the_router_of_an_adapter_with_a_name_of_its_own_comes_back_with_it(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(plain_llama(), peft.LoraConfig(r=4, target_modules=ATTENTION), adapter_name="mine")
    model = routed(shake(model))
    expected = monkeyjump.monkeyjump_state_dict(model)
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    model.save_pretrained(tmp_path)
    for router in monkeyjump._state(model)[1].routers.values():
        router.centers.neg_()
    model.load_adapter(tmp_path / "mine", "mine", is_trainable=True)  # as a Trainer resumes
    found = monkeyjump.monkeyjump_state_dict(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], t) for name, t in expected.items())


def test_a_trainer_resumes_a_routed_peft_model_with_its_router(tmp_path):
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in torch.randint(3, 64, (16, 8))]

    def train(directory, resume=None, steps=4):
        args = TrainingArguments(
            directory,
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_steps=100,
        )
        trainer = Trainer(routed(peft_llama(shaken=False)), args, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    whole = train(tmp_path / "whole")
    assert (tmp_path / "whole" / "checkpoint-2" / "router_model.safetensors").is_file()
    resumed = train(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2"))
    state = monkeyjump._state(whole)[1]
    for path, router in state.routers.items():
        drawn = monkeyjump._state(resumed)[1].routers[path].centers
        assert F.cosine_similarity(drawn, router.centers).min() > 0.9  # of other seeds they would be anywhere
    assert int(monkeyjump.monkeyjump_state_dict(resumed)["base_model.model.model.monkeyjump_forwards"]) == 4


def test_merging_routed_adapters_is_refused_and_works_again_after_removal():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=[*ATTENTION, "embed_tokens"], modules_to_save=["lm_head"])
    model = peft_llama(config)
    wanted, fast = logits(model), routed(model, linears=["q_proj", "v_proj"], blocks={"LlamaDecoderLayer": [1]})
    before, modules = logits(fast), list(fast.modules())
    weights = {name: tensor.clone() for name, tensor in fast.state_dict().items()}
    for merge in (fast.merge_and_unload, fast.merge_adapter, fast.unload, fast.base_model.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged: gates differ from token to token"):
            merge()
    assert list(fast.modules()) == modules and torch.equal(logits(fast), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in fast.state_dict().items())
    remove_monkeyjump(fast)
    assert fast.state_dict().keys() == model.state_dict().keys() and torch.equal(logits(fast), wanted)
    assert {n: p.requires_grad for n, p in fast.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert "save_pretrained" not in fast.__dict__ and "merge_adapter" not in fast.base_model.__dict__
    assert_close(logits(fast.merge_and_unload().eval()), wanted)


def test_adapters_added_by_transformers_are_routed_too(tmp_path):
    peft = pytest.importorskip("peft")
    model = plain_llama()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=ATTENTION))
    model = shake(model).eval()
    fast = routed(model)
    assert_close(logits(fast), logits(routed_slowly(model, fast)))
    fast.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file() and (tmp_path / "router_config.json").is_file()
    again = plain_llama()
    again.load_adapter(str(tmp_path))
    assert_close(logits(load_adapter(again, tmp_path).eval()), logits(fast))


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "VeRA", "IA3 feed-forward"])
def test_a_bf16_base_and_autocast_serve_routed_peft(name):
    model = peft_llama(method(name), plain_llama(torch.bfloat16))
    fast = routed(model).train()
    assert logits(fast).dtype == torch.bfloat16 and all(g.isfinite().all() for g in gradients(fast).values())
    slow = routed_slowly(model, fast)
    torch.testing.assert_close(logits(fast.eval()), logits(slow), atol=0.05, rtol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # over a float32 base, as Trainer(bf16=True) does
        fast = routed(peft_llama(method(name))).train()
        assert all(g.isfinite().all() for g in gradients(fast).values())


@pytest.mark.parametrize("bits", [8, 4])
def test_lora_over_a_quantised_base_is_routed(bits):
    bnb = pytest.importorskip("bitsandbytes")
    model = plain_llama(torch.bfloat16, width=64)
    for block in model.model.layers:
        for name in ATTENTION:
            old = getattr(block.self_attn, name)
            kind = bnb.nn.Linear8bitLt if bits == 8 else bnb.nn.Linear4bit
            kwargs = {"has_fp16_weights": False} if bits == 8 else {"compute_dtype": torch.bfloat16}
            new = kind(old.in_features, old.out_features, bias=False, **kwargs)
            new.load_state_dict(old.state_dict())
            setattr(block.self_attn, name, new.to("cpu"))
    setattr(model, "is_loaded_in_8bit" if bits == 8 else "is_loaded_in_4bit", True)
    model = peft_llama(model=model)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert type(layer).__name__ in ("Linear8bitLt", "Linear4bit") and "bnb" in type(layer).__module__
    fast = routed(model)
    slow = routed_slowly(model, fast)
    torch.testing.assert_close(logits(fast), logits(slow), atol=0.03, rtol=0.03)
    got, wanted = gradients(fast), gradients(slow)
    for name in wanted:
        assert (got[name] - wanted[name]).norm() <= 0.1 * wanted[name].norm(), name


class Bottleneck(Adapter):
    """Houlsby et al. 2019, beside the projection: delta(x) = U relu(D x)."""

    def __init__(self, in_features, out_features, config, device):
        super().__init__(in_features, out_features, config, device)
        self.down = nn.Parameter(torch.randn(config.rank, in_features, device=device) / in_features**0.5)
        self.up = nn.Parameter(torch.zeros(out_features, config.rank, device=device))

    def delta(self, x, base):
        return F.linear(F.relu(F.linear(self.dropout(x), self.down.to(x.dtype))), self.up.to(x.dtype))


class OneDown(Bottleneck):
    """All projections share one matrix, and one parameter has a name that AdaLoRA's buffers have too."""

    shared = {}

    def __init__(self, in_features, out_features, config, device):
        super().__init__(in_features, out_features, config, device)
        self.down = self.shared.setdefault(in_features, self.down)
        self.sensitivity_gain = nn.Parameter(torch.ones(()))

    def delta(self, x, base):
        return self.sensitivity_gain * super().delta(x, base)


def test_an_adapter_with_shared_and_oddly_named_parameters_is_saved_whole(tmp_path):
    model = shake(apply_monkeyjump(plain_llama(), adapter=OneDown, rank=3, **ROUTING)).eval()
    save_adapter(model, tmp_path)
    OneDown.shared.clear()
    assert torch.equal(logits(load_adapter(plain_llama().eval(), tmp_path)), logits(model))


def test_a_users_own_adapter_is_routed_saved_and_loaded(tmp_path):
    base = plain_llama().eval()
    model = apply_monkeyjump(plain_llama(), adapter=Bottleneck, rank=3, **ROUTING)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 16 and all(name.endswith((".monkeyjump.down", ".monkeyjump.up")) for name in trained)
    assert torch.equal(logits(model.eval()), logits(base))
    shake(model)
    gradients(model.train())
    save_adapter(model.eval(), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["adapter"] == "Bottleneck"
    assert torch.equal(logits(load_adapter(plain_llama().eval(), tmp_path)), logits(model))
    del ADAPTERS["Bottleneck"]  # another process
    with pytest.raises(ValueError, match="Bottleneck"):
        load_adapter(plain_llama(), tmp_path)
    ADAPTERS["Bottleneck"] = Bottleneck
    load_adapter(plain_llama(), tmp_path)
    half = shake(apply_monkeyjump(plain_llama(torch.bfloat16), adapter="Bottleneck", rank=3, **ROUTING)).train()
    assert logits(half).dtype == torch.bfloat16 and all(g.isfinite().all() for g in gradients(half).values())
    with disable_adapters(model):
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(remove_monkeyjump(model)), logits(base))


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def text(count, length, seed):
    words = torch.randint(0, 60, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return [" ".join(f"w{i}" for i in row) for row in words]


def adapted_for_trl(kind):
    """Our own adapters, or PEFT's, routed by sequence so that the concatenated halves of a batch must not mix."""
    settings = {**ROUTING, "rep_mode": "prompt_end"}
    if kind == "peft":
        return routed(peft_llama(shaken=False), **settings).train()
    return apply_monkeyjump(plain_llama(), adapter=kind, **settings).train()


def trl_arguments(config, directory, **settings):
    return config(
        output_dir=str(directory),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        max_length=16,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        **settings,
    )


def assert_trained(model, before):
    state, after = monkeyjump._state(model)[1], model.state_dict()
    changed = {name for name, tensor in after.items() if name in before and not torch.equal(tensor, before[name])}
    assert any("lora_B" in name for name in changed) and any(name.endswith("centers") for name in changed)
    assert all("lora_" in name or "monkeyjump" in name for name in changed)  # the base has not moved
    assert all(int(stack.owner.monkeyjump_forwards) == 3 for stack in state.stacks)  # a reference pass does not count


@pytest.mark.parametrize("kind", ["lora", "peft"])
def test_trl_sft_trains_it_with_checkpointing(tmp_path, kind):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = adapted_for_trl(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pairs = zip(text(8, 4, 0), text(8, 5, 1), strict=True)
    data = datasets.Dataset.from_list([{"prompt": p, "completion": f" {c}"} for p, c in pairs])
    args = trl_arguments(trl.SFTConfig, tmp_path)
    trainer = trl.SFTTrainer(model, args, train_dataset=data, processing_class=tiny_tokenizer())
    trainer.train()
    assert_trained(model, before)
    trainer.save_model()
    assert (tmp_path / "router_model.safetensors").is_file() == (kind == "peft")


@pytest.mark.parametrize("kind", ["lora", "peft", "peft, made by TRL"])
def test_trl_dpo_takes_its_reference_from_the_base_model(tmp_path, kind):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = zip(text(8, 4, 0), text(8, 5, 1), text(8, 6, 2), strict=True)
    data = datasets.Dataset.from_list([{"prompt": p, "chosen": f" {c}", "rejected": f" {r}"} for p, c, r in rows])
    # TRL takes the reference of a PeftModel from its disabled or initial adapters, and of any other model from a
    # second copy, unless the reference is computed before training: by our model, whose adapters are identities then.
    args = trl_arguments(trl.DPOConfig, tmp_path, precompute_ref_log_probs=kind == "lora")
    if kind == "peft, made by TRL":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules=ATTENTION)
        trainer = trl.DPOTrainer(
            plain_llama(), args=args, train_dataset=data, processing_class=tiny_tokenizer(), peft_config=config
        )
        apply_monkeyjump(trainer.model, adapter="peft", rep_mode="prompt_end", **ROUTING)
    else:
        trainer = trl.DPOTrainer(
            adapted_for_trl(kind), args=args, train_dataset=data, processing_class=tiny_tokenizer()
        )
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    batch = next(iter(trainer.get_train_dataloader()))
    chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
    base = plain_llama()
    with torch.no_grad():
        wanted = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    wanted = wanted[:, :-1].gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    wanted = (wanted * (batch["completion_mask"][:, 1:] != 0)).sum(dim=1)
    torch.testing.assert_close(torch.cat([chosen, rejected]), wanted, atol=1e-4, rtol=1e-4)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4) != losses[-1]  # log 2 at first: policy = reference
    assert_trained(trainer.model, before)


# ----------------------------------------------------------------------------------------------------- train_example.py

# ------------------------------------------------------------------------------------------------ train_example.py

QUICK = "--use_cpu --per_device_train_batch_size 4 --learning_rate 0.01 --kmeans_samples 64"
LETTERS = "abcdefgh"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer in base/, and rows of two tasks in rows.jsonl."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = train_example.byte_level_tokenizer()
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    rows = [{"task": "up", "prompt": f"up {c}{d}:", "answer": c.upper()} for c in LETTERS for d in LETTERS[:4]]
    rows += [{"task": "yes", "prompt": f"is {c} it:", "answer": "yes", "choices": ["yes", "no"]} for c in LETTERS]
    write_rows(folder / "rows.jsonl", rows)
    return folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(flags: str, program: Path = HERE / "train_example.py", processes: int = 1) -> tuple[list[str], dict]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *torchrun, str(program), *shlex.split(flags)], environment


def run_script(flags: str, **keywords: object) -> str:
    """What the script prints, run as a process."""
    line, environment = command(flags, **keywords)
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_main(flags: str) -> None:
    """The same in this process, without the seconds that importing takes."""
    train_example.main(shlex.split(flags))


def losses(folder: Path) -> dict[int, float]:
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def test_example_trains_text_logs_routing_and_checkpoints_adapters_only(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = run_script(
        f"--model {tiny}/base --dataset {tiny}/rows.jsonl --output_dir {out} {QUICK} --eval_accuracy --held_back 0.2 "
        "--max_steps 30 --logging_steps 10 --save_steps 15 --jitter_noise 0.1 --temperature 0.5 --ema_momentum 0.8 "
        "--top_k 2 --rep_mode prompt_end --update_every 2 --update_until 20 --linears q_proj k_proj v_proj "
        "--shared_expert up_proj --max_length 32 --max_new_tokens 4"
    )
    lines = printed.splitlines()
    assert lines[-1] == str(out)
    assert any(line.startswith("loss") and "before" in line and "after" in line for line in lines)
    assert {line.split()[0] for line in lines if "before" in line} == {"loss", "accuracy", "up", "yes"}
    before, after = next(line.split()[2::2] for line in lines if line.startswith("loss"))
    assert float(after) < float(before)
    assert "q_proj" in printed and "model.layers.1" in printed
    checkpoint = out / "checkpoint-30"
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 300_000
    assert all(".monkeyjump." in name or "monkeyjump" in name for name in load_file(checkpoint / "model.safetensors"))
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert all("router_entropy" in entry for entry in history if "loss" in entry)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["rep_mode"] == "prompt_end" and config["temperature"] == 0.5 and config["update_until"] == 20


def test_example_continues_after_a_kill_with_the_losses_of_an_uninterrupted_run(tiny: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = (
        f"--model {tiny}/base --dataset {tiny}/rows.jsonl {QUICK} --held_back 0 --max_steps 40 --logging_steps 5 "
        "--save_steps 5 --adapter adalora"
    )
    run_main(f"{flags} --output_dir {whole}")
    line, environment = command(f"{flags} --output_dir {killed}")
    process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (killed / "checkpoint-10" / "adapter_model.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "checkpoint-40").exists()
    run_main(f"{flags} --output_dir {killed} --resume_from_checkpoint last")
    expected, found = losses(whole), losses(killed)
    assert expected.keys() == found.keys()
    newest = tmp_path / "killed" / "checkpoint-40" / "trainer_state.json"
    newest.write_text(newest.read_text()[:100])  # as if killed while writing it
    assert train_example.last_checkpoint(str(killed)).endswith("checkpoint-35")
    assert all(abs(expected[step] - found[step]) < 1e-4 for step in expected), (expected, found)


def test_example_evaluates_and_generates_with_a_saved_adapter(tiny: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    rows = [json.loads(line) for line in (tiny / "rows.jsonl").read_text().splitlines()]
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        table = csv.DictWriter(file, ["question", "reply"])
        table.writeheader()
        table.writerows([{"question": row["prompt"], "reply": row["answer"]} for row in rows if row["task"] == "yes"])
    run_main(
        f"--model {tiny}/base --dataset {tmp_path}/rows.csv --prompt_column question --answer_column reply "
        f"--held_back 0 --output_dir {out} --max_steps 30 --save_strategy no --bf16 --gradient_checkpointing {QUICK}"
    )
    base = f"--model {tiny}/base --adapter_path {out} --use_cpu"
    capsys.readouterr()
    run_main(f"{base} --generate 'is c it:' --max_new_tokens 8")
    assert capsys.readouterr().out.strip() == "yes"
    run_main(f"{base} --dataset {tiny}/rows.jsonl --eval_only --eval_accuracy --eval_split train[-8:]")
    accuracy = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("accuracy"))
    assert accuracy.split()[-1] == "1.0000"
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_example_trains_compiled_on_plain_text_from_parquet(tiny: Path, tmp_path: Path) -> None:
    import pandas

    pandas.DataFrame({"body": ["one two three four", "", "five six seven"] * 8}).to_parquet(tmp_path / "rows.parquet")
    run_main(
        f"--model {tiny}/base --dataset {tmp_path}/rows.parquet --text_column body --output_dir {tmp_path}/out "
        f"--max_steps 4 --held_back 0 --torch_compile --torch_compile_backend aot_eager {QUICK}"
    )
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


WRONG = {
    "no data": (["--dataset", ""], "--dataset is missing"),
    "another adapter's checkpoint": (["--resume_from_checkpoint", "{tmp}/other"], "adapter_model.safetensors"),
    "unknown adapter": (["--adapter", "dora"], "invalid choice: 'dora'"),
    "unknown mode": (["--rep_mode", "first"], "invalid choice: 'first'"),
    "unknown flag": (["--lerning_rate", "1"], "--lerning_rate"),
    "missing file": (["--dataset", "{tmp}/none.jsonl"], "none.jsonl: no such file"),
    "missing model": (["--model", "{tmp}/none.gguf"], "none.gguf: no such file"),
    "no answer column": (["--answer_column", "reply"], "no column 'reply'"),
    "no answers": (["--dataset", "{tmp}/empty.jsonl"], "row 0 has no answer"),
    "images for a text model": (["--dataset", "{tmp}/images.jsonl"], "text-only model"),
    "too many experts": (["--top_k", "9"], "top_k=9"),
    "no such projection": (["--linears", "c_attn"], "c_attn"),
    "another run's folder": (["--output_dir", "{tmp}/taken"], "--overwrite_output_dir"),
    "too long everywhere": (["--max_length", "3"], "--max_length is 3"),
    "nothing to resume": (["--resume_from_checkpoint", "last"], "no complete checkpoint"),
    "broken JSON": (["--dataset", "{tmp}/broken.jsonl"], "JSON"),
    "an empty file": (["--dataset", "{tmp}/nothing.jsonl"], "nothing.jsonl: no rows"),
    "rows that are lists": (["--dataset", "{tmp}/lists.jsonl"], "no usable row"),
    "no such split": (["--dataset", "{tmp}/saved", "--eval_split", "test"], "no split 'test'; it has train"),
    "answers to plain text": (["--text_column", "prompt", "--eval_accuracy"], "--text_column has no answers"),
    "fewer samples than experts": (["--kmeans_samples", "2"], "2 representations for 4 experts"),
    "a rank above the rank": (["--adapter", "adalora", "--target_rank", "5"], "--target_rank 5.0"),
    "no tokens": (["--max_new_tokens", "0"], "--max_new_tokens 0"),
    "a file as the folder": (["--output_dir", "{tmp}/empty.jsonl/out"], "empty.jsonl is a file"),
    "a bad optimizer": (["--report_to", "nonsense"], "nonsense"),
    "a folder without a checkpoint": (["--resume_from_checkpoint", "{tmp}/saved"], "there is no checkpoint"),
}


@pytest.mark.parametrize("case", WRONG)
def test_example_refuses_wrong_use_in_one_line_and_writes_nothing(case: str, tiny: Path, tmp_path: Path, capfd) -> None:
    import datasets

    write_rows(tmp_path / "empty.jsonl", [{"prompt": "a", "answer": ""}, {"prompt": "b", "answer": None}])
    write_rows(tmp_path / "images.jsonl", [{"prompt": "a", "answer": "b", "image": "c.png"}])
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": \n')
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "adapter_config.json").write_text("{}")
    (tmp_path / "taken" / "checkpoint-best").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "trainer_state.json").write_text("{}")
    (tmp_path / "nothing.jsonl").write_text("")
    write_rows(tmp_path / "lists.jsonl", [{"prompt": "a", "answer": ["b", "c"]}])
    datasets.Dataset.from_list([{"prompt": "a", "answer": "b"}] * 4).save_to_disk(tmp_path / "saved")
    before = sorted(tmp_path.rglob("*"))
    flags, expected = WRONG[case]
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    base = ["--model", str(tiny / "base"), "--dataset", str(tiny / "rows.jsonl"), "--output_dir", str(tmp_path / "out")]
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        train_example.main([*base, *flags, "--use_cpu"])
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2
    assert error.startswith("train_example.py: error: ") and expected in error, error
    assert sorted(path for path in tmp_path.rglob("*") if path != tmp_path / "out") == before  # an empty folder at most


@pytest.fixture(scope="session")
def tiny_vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA with its processor in base/, and rows about pictures of one color in rows.jsonl."""
    import transformers
    from PIL import Image
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    folder = tmp_path_factory.mktemp("vision")
    tokenizer = train_example.byte_level_tokenizer("<image>")
    without_torchvision = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    pictures = without_torchvision(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder / "base")
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    eyes = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    LlavaForConditionalGeneration(
        LlavaConfig(vision_config=eyes, text_config=text, image_token_index=image_token, image_token_id=image_token)
    ).save_pretrained(folder / "base")
    rows = []
    for i in range(48):
        color = ("red", "blue")[i % 2]
        Image.new("RGB", (20, 20), color).save(folder / f"{i}.png")
        question = {"type": "text", "text": "color?"}
        rows.append({"prompt": "color?", "answer": color, "image": f"{i}.png", "messages": None})
        if i >= 24:
            asked = {"role": "user", "content": [{"type": "image", "image": f"{i}.png"}, question]}
            rows[-1]["messages"] = [asked, {"role": "assistant", "content": [{"type": "text", "text": color}]}]
    write_rows(folder / "rows.jsonl", [*rows, {"prompt": "color?", "answer": "red", "image": "gone.png"}])
    return folder


def test_example_trains_a_vision_language_model_on_images(tiny_vision: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    run_main(
        f"--model {tiny_vision}/base --dataset {tiny_vision}/rows.jsonl --output_dir {out} --max_steps 60 "
        f"--logging_steps 10 --held_back 12 --eval_accuracy --max_new_tokens 6 --save_strategy no {QUICK} "
        "--per_device_train_batch_size 8"
    )
    printed = capsys.readouterr().out
    assert "1 of 49 rows left out" in printed and "gone.png" in printed
    before, after = next(line.split()[2::2] for line in printed.splitlines() if line.startswith("loss"))
    assert float(after) < 0.5 * float(before)
    assert float(next(line.split()[-1] for line in printed.splitlines() if line.startswith("accuracy"))) == 1.0
    assert "'red', right is 'red'" in printed and (out / "adapter_model.safetensors").exists()


def test_example_compares_choices_as_text_and_never_takes_one_that_does_not_fit(tiny: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny / "base")
    model = LlamaForCausalLM.from_pretrained(tiny / "base").eval()
    chat = train_example.Chat(tokenizer, False, train_example.Options(max_length=40))
    row = {"prompt": "a", "answer": "2", "choices": [1, " 23 ", "4" * 60, ""]}
    assert train_example.predict(model, chat, [row])[0] in ("1", "23")
    assert train_example.predict(model, chat, [{**row, "choices": [7]}]) == ["7"]


def test_example_tells_where_the_prompt_ends_since_label_smoothing_takes_the_labels_away(tiny: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny / "base")
    chat = train_example.Chat(tokenizer, False, train_example.Options(rep_mode="prompt_end"))
    rows = [{"prompt": "a", "answer": "bcd"}, {"prompt": "efg", "answer": "h"}]
    found = chat([{**row, **chat.measure(row)} for row in rows])
    first = [next(i for i, label in enumerate(labels) if label != -100) for labels in found["labels"].tolist()]
    assert found["prompt_end"].tolist() == [i - 1 for i in first]


def test_example_never_trains_on_prompts_or_image_placeholders(tiny: Path, tiny_vision: Path) -> None:
    from transformers import AutoProcessor

    options = train_example.Options(model="tiny", dataset=str(tiny_vision / "rows.jsonl"))
    chat = train_example.Chat(AutoProcessor.from_pretrained(tiny_vision / "base"), True, options)
    rows = [{"prompt": "color?", "answer": answer, "image": "0.png"} for answer in ("red", "bluish")]
    batch = chat([{**row, **chat.measure(row)} for row in rows])
    for labels, row in zip(batch["labels"], rows, strict=True):
        assert chat.tokenizer.decode(labels[labels != -100]).strip() == f"{row['answer']}</s>"
    assert (batch["input_ids"] == chat.tokenizer.convert_tokens_to_ids("<image>")).sum() == 8

    chat = train_example.Chat(train_example.byte_level_tokenizer(), False, train_example.Options(max_length=8))
    rows = [{"messages": [{"role": "user", "content": "a long question"}, {"role": "assistant", "content": "yes"}]}]
    batch = chat([{**row, **chat.measure(row)} for row in rows])
    assert chat.tokenizer.decode(batch["input_ids"][0]) == "ion yes</s>"[-(8 + 3) :]
    assert chat.tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100]) == " yes</s>"


# Accelerate shards on accelerators only, though gloo can; this makes it take two CPU processes for such.
FSDP_ON_CPU = """
import accelerate.state as state
import train_example

initialise = state.PartialState.__init__
def pretend(self, *arguments, **keywords):
    initialise(self, *arguments, **keywords)
    if self.distributed_type == state.DistributedType.MULTI_CPU:
        self.distributed_type = state.DistributedType.MULTI_GPU
state.PartialState.__init__ = pretend
train_example.main()
"""


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=OLD_TORCH)], ids=["ddp", "fsdp2"])
def test_example_runs_on_two_processes(sharded: bool, tiny: Path, tmp_path: Path) -> None:
    out, program = tmp_path / "out", HERE / "train_example.py"
    flags = (
        f"--model {tiny}/base --dataset {tiny}/rows.jsonl --output_dir {out} {QUICK} --eval_accuracy --held_back 9 "
        "--max_steps 20 --logging_steps 10 --save_steps 10 --max_new_tokens 4 --ddp_backend gloo"
    )
    if sharded:
        program, config = tmp_path / "fsdp_on_cpu.py", tmp_path / "fsdp.json"
        program.write_text(FSDP_ON_CPU)
        config.write_text(json.dumps({"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}))
        flags += f" --fsdp 'full_shard auto_wrap' --fsdp_config {config}"
    printed = run_script(flags, program=program, processes=2)
    assert printed.splitlines()[-1] == str(out)
    assert bool(list((out / "checkpoint-20").glob("pytorch_model_fsdp*"))) == sharded  # accelerate's own copy
    history = losses(out)
    assert history[20] < history[10]
    model = LlamaForCausalLM.from_pretrained(tiny / "base")
    train_example.mj.load_adapter(model, out)
    assert all(t.abs().sum() > 0 for n, t in train_example.mj.monkeyjump_state_dict(model).items() if "lora_B" in n)


def test_example_demonstration_makes_its_own_base_model_and_data(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(train_example, "BASE_STEPS", 10)
    out = tmp_path / "demonstration"
    run_main(f"--output_dir {out} --max_steps 6 --held_back 8 --logging_steps 3 --max_new_tokens 4 --use_cpu")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(out) and sum(" -> " in line for line in lines) == 4
    assert {"loss", "accuracy", "first", "second", "head", "double"} <= {line.split()[0] for line in lines if line}
    assert {path.name for path in out.iterdir()} >= {"base", "rows.jsonl", "adapter_model.safetensors"}


def test_example_trains_over_a_four_bit_base(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    run_main(
        f"--model {tiny}/base --dataset {tiny}/rows.jsonl --held_back 0 --load_in_4bit --output_dir {tmp_path}/out "
        f"--max_steps 2 --save_strategy no {QUICK}"
    )
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_example_reads_a_data_set_from_disk_with_an_image_column(tiny_vision: Path, tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict(
        {
            "image": [str(tiny_vision / f"{i}.png") for i in range(8)],
            "prompt": ["color?"] * 8,
            "answer": ["red", "blue"] * 4,
        },
        features=datasets.Features(
            image=datasets.Image(), prompt=datasets.Value("string"), answer=datasets.Value("string")
        ),
    )
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "data")
    run_main(
        f"--model {tiny_vision}/base --dataset {tmp_path}/data --held_back 0 --output_dir {tmp_path}/out --max_steps 2 "
        f"--save_strategy no --bf16 --max_length 40 {QUICK}"
    )
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


# ----------------------------------------------------------------------------------------------------- the repository


def test_the_module_is_self_contained_and_prints_nothing_but_what_its_name_says():
    tree = ast.parse((HERE / "monkeyjump.py").read_text())
    imported = {name.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) == {"torch", "einops"}
    printing = [
        f.name
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef)
        for call in ast.walk(f)
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "print"
    ]
    assert printing == ["print_trainable_parameters"]


def test_the_readmes_python_blocks_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = tiny_llama()
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: copy.deepcopy(base))
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 2
    names = {"train_dataset": [{"input_ids": row, "labels": row} for row in batch(8)]}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
