"""Tests of monkeyjump.py, in its order; each promise is checked against an independent, naive computation.

pytest test_monkeyjump.py
"""

import ast
import copy
import json
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import monkeyjump as mj
from monkeyjump import (
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


@pytest.mark.parametrize("kind", ["bool", "additive", "static", "static past", "dict"])
def test_padding_is_read_from_four_dimensional_masks(kind):
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]).bool()
    past = 3 if kind == "static past" else 0
    keys = torch.cat([torch.ones(3, past).bool(), real], dim=1)
    allowed = torch.stack([[*range(5)][q] + past >= torch.arange(past + 5) for q in range(5)])[None] & keys[:, None]
    if "static" in kind:
        allowed = F.pad(allowed, (0, 6))
    mask = allowed[:, None]
    if kind == "additive":
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    if kind == "dict":
        mask = {"sliding_attention": None, "full_attention": mask}
    assert torch.equal(mj.real_tokens(mask, torch.zeros(3, 5, 4)), real)


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


def naive_centers(model, base_state, batches, momentum, every=1, until=None):
    """Replays training with a router whose centers are moved by a loop in float64."""
    state = {name: c.double() for name, c in base_state.items()}
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
                    vectors = [v for expert, v in pending.get(name, []) if expert == e]
                    if vectors:
                        mean = sum(vectors) / len(vectors)
                        state[name][e] = naive_unit(momentum * state[name][e] + (1 - momentum) * mean)
            pending = {}
        model(input_ids=ids, labels=ids).loss.backward()
        for name, hidden in inputs.items():
            for vector in hidden.flatten(0, 1):
                cosines = state[name] @ naive_unit(vector)
                pending.setdefault(name, []).append((int(cosines.argmax()), naive_unit(vector)))
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
rank, model = dist.get_rank(), t.adapted("lora", ema_momentum=0.4, jitter_noise=0.0)
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


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_have_the_centers_and_gradients_of_one_on_the_whole_batch(kind, tmp_path):
    script, out = tmp_path / "worker.py", tmp_path / "out"
    out.mkdir()
    script.write_text(DISTRIBUTED.format(here=str(HERE)))
    model = adapted("lora", ema_momentum=0.4)
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


# ------------------------------------------------------------------------------------------------- promise 9: compile


@pytest.mark.parametrize(("checkpointing", "mode"), [(False, "token"), (True, "prompt_end")])
def test_compiles_to_one_graph_once_and_trains_like_eager(checkpointing, mode):
    import torch._dynamo.testing

    torch._dynamo.reset()
    batches, mask = [batch(seed=s) for s in range(4)], torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = 0
    settings = {"rep_mode": mode, "update_every": 2, "ema_momentum": 0.5}
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


def test_no_step_asks_the_device_for_a_value():
    """Fake tensors have no values: any host synchronisation (.item(), a branch on a tensor) is an error."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for mode in mj.REP_MODES:
        with FakeTensorMode():
            config = copy.deepcopy(tiny_llama().config)
            model = LlamaForCausalLM(config)
            model = apply_monkeyjump(model, rep_mode=mode, update_every=2, update_until=5, jitter_noise=0.1).train()
            hidden = torch.zeros(2, 8, 32, requires_grad=True)
            stack, block = model._monkeyjump.stacks[0], model.model.layers[0]
            for _ in range(2):
                stack.root = {"labels": torch.zeros(2, 8, dtype=torch.long)}
                stack.enter(model.model, (), {"attention_mask": torch.ones(2, 8)})
                block.monkeyjump.enter(block, (hidden,), {})
                block.self_attn.q_proj(hidden).sum().backward()


# ----------------------------------------------------------------------------------------------- promise 10: precision


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
    assert y.dtype == torch.bfloat16 and all(t.dtype == torch.bfloat16 for t in kept if t.shape[:2] == (2, 9) or t.shape[0] == 18)
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


# ------------------------------------------------------------------------------------------------------ custom adapters


class Bottleneck(mj.Adapter):
    """delta(x) = U gelu(V x), a small network beside each projection."""

    def __init__(self, in_features, out_features, config, device):
        super().__init__(in_features, out_features, config, device)
        self.down = nn.Linear(in_features, config.rank, device=device)
        self.up = nn.Linear(config.rank, out_features, device=device)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def delta(self, x, base):
        return self.up(F.gelu(self.down(x)))


def test_a_users_adapter_routes_trains_saves_and_loads(tmp_path):
    base, ids = tiny_llama(), batch()
    model = apply_monkeyjump(copy.deepcopy(base), adapter=Bottleneck)
    assert torch.equal(model(ids).logits, base(ids).logits)
    train(model, [ids] * 3)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(tiny_llama(), tmp_path)(ids).logits, model.eval()(ids).logits)
    assert (model(ids).logits - base(ids).logits).abs().max() > 1e-4
    del mj.ADAPTERS["Bottleneck"]
    with pytest.raises(ValueError, match="adapter='Bottleneck': must be one of lora"):
        load_adapter(tiny_llama(), tmp_path)


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
