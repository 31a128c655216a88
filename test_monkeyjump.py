"""Tests of monkeyjump.py, in its order; each promise is checked against an independent, naive computation.

pytest test_monkeyjump.py
"""

import ast
import contextlib
import copy
import functools
import gc
import inspect
import itertools
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
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import datasets
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto import modeling_auto

import monkeyjump as mj
import train_example

HERE = Path(__file__).parent
OWN_ADAPTERS = ("lora", "lorafa", "adalora", "propulsion")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
BLOCKS, EXACT = r"layers\.\d+$", {"atol": 0, "rtol": 0}
# What the cache is called, as a keyword and in the output: from transformers 5.24 by the short name.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
# There the base model itself does neither: its forward does not compile to one graph, and FSDP2 needs a GPU.
OLD_TORCH = pytest.mark.skipif(torch.__version__.startswith("2.6"), reason="torch 2.6: not even without adapters")
torch.set_num_threads(1)


def grid(**axes):
    return pytest.mark.parametrize(tuple(axes), list(itertools.product(*axes.values())))


def tiny_llama(layers=2, seed=0, **settings):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    settings = {"max_position_embeddings": 64, "attn_implementation": "sdpa", **sizes, **tokens, **settings}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **settings)).eval()


def adapted(adapter="lora", base=None, seed=1, **settings):
    """A model with Monkey Jump whose adapters do something (they start as the identity)."""
    model = tiny_llama() if base is None else base
    torch.manual_seed(seed)
    model = mj.apply_monkeyjump(model, adapter=adapter, **settings)
    for parameter in trained(model).values():
        nn.init.normal_(parameter, std=0.02 if adapter == "propulsion" else 0.3)
    return model


def batch(rows=2, tokens=9, seed=3):
    return torch.randint(2, 50, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(seed=3):
    """Padded by token 1: the embedding of the padding token itself is zero, and would hide what looks at it."""
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    return {"input_ids": torch.where(mask == 1, batch(2, 7, seed), 1), "attention_mask": mask}


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def centers(model):
    return {name: b.clone() for name, b in model.named_buffers() if name.endswith("centers")}


@contextlib.contextmanager
def unchanged(model):
    """Nothing in the model is another one at the end."""

    def look():
        values = {name: t.clone() for name, t in model.state_dict().items() if not t.is_meta}
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        kinds = [(type(m), m.training, sorted(vars(m))) for m in model.modules()]
        return values, (hooks, kinds, list(model.state_dict()), [p.requires_grad for p in model.parameters()])

    values, rest = look()
    yield
    assert look()[1] == rest
    assert_same(look()[0], values, **EXACT)


def train(model, batches, forward=None, mask=None, lr=0.05, also=None, parts=1):
    """Plain SGD, each batch in so many parts; the gradients of the last step and the centers after it."""
    model.train()
    optimizer = torch.optim.SGD(trained(model).values(), lr=lr)
    for ids in batches:
        optimizer.zero_grad()
        for part in ids.chunk(parts):
            loss = (model if forward is None else forward)(input_ids=part, attention_mask=mask, labels=part).loss
            if also is not None:
                loss = loss + also(part)
            (loss / parts).backward()
        optimizer.step()
    return {name: p.grad.clone() for name, p in trained(model).items()}, centers(model)


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys() and first
    for name in first:
        torch.testing.assert_close(first[name], second[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


def all_differ(first, second):
    return all(not torch.equal(first[name], second[name]) for name in first)


@contextlib.contextmanager
def noted_gates(given=None):
    """The gates of every routed call within, in order; those given are handed out in their place."""
    noted, route, instead = [], mj.route, iter(given or ())

    def noting(*args, **kwargs):
        gates, best = route(*args, **kwargs)
        noted.append(gates.detach().clone() if given is None else next(instead))
        return gates if given is None else noted[-1], best

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mj, "route", noting)
        yield noted


@contextlib.contextmanager
def noted_calls(model, pattern):
    """By path, arguments and output of every call within of the modules whose path matches."""
    seen, handles = {}, []
    for path, module in model.named_modules():
        if re.search(pattern, path):
            note = seen.setdefault(path, []).append
            handles.append(module.register_forward_hook(lambda m, args, output, note=note: note((args, output))))
    yield seen
    for handle in handles:
        handle.remove()


# --------------------------------------------------------------------------------------------------- the slow reference
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


def naive_delta(tensors, adapter, x, base, alpha=16.0, rank=2, degree=15):
    if adapter == "propulsion":
        return base * ((1 + tensors["propulsion"]) ** degree - 1)
    inner = tensors["lora_A"] @ x
    inner = inner * tensors["lora_E"] if adapter == "adalora" else inner
    return alpha / rank * (tensors["lora_B"] @ inner)


def naive_move(old, calls, momentum):
    """Centers [E, D] by their block's path, after the inputs of its calls were assigned, each to the nearest."""
    new = {}
    for path, noted in calls.items():
        name = f"{path}.monkeyjump.centers"
        current, assigned = [naive_unit(c) for c in old[name]], [[] for _ in old[name]]
        for vector in (naive_unit(v) for (hidden, *_), _ in noted for v in hidden.detach().flatten(0, 1)):
            assigned[max(range(len(current)), key=lambda e: float(current[e] @ vector))].append(vector)
        for e, own in enumerate(assigned):
            current[e] = naive_unit(momentum * current[e] + (1 - momentum) * sum(own) / len(own)) if own else current[e]
        new[name] = torch.stack(current).float()
    return new


# ---------------------------------------------------------------------------------------------------------- mathematics
@grid(top_k=[1, 2, 3, 5, 9], temperature=[0.1, 1.0])
def test_route_is_softmax_over_all_experts_cut_to_the_top_k_and_renormalised(top_k, temperature):
    torch.manual_seed(0)
    points, c = mj.unit(torch.randn(7, 16)), mj.unit(torch.randn(5, 16))
    gates, best = mj.route(points, c, top_k, temperature)
    expected = torch.tensor([naive_gates(point, c, min(top_k, 5), temperature) for point in points])
    torch.testing.assert_close(gates, expected, atol=1e-6, rtol=1e-5)
    assert best.tolist() == expected.argmax(dim=1).tolist()
    equal, _ = mj.route(torch.zeros(3, 16), c, top_k)  # to nothing all are equally near
    assert ((equal > 0).sum(dim=-1) == min(top_k, 5)).all() and torch.allclose(equal.sum(dim=-1), torch.ones(3))


def test_jitter_noise_multiplies_the_logits_within_its_range():
    torch.manual_seed(0)
    points, c = mj.unit(torch.randn(500, 16)), mj.unit(torch.randn(2, 16))
    found, logits = torch.logit(mj.route(points, c, 2, 1.0, 0.5)[0][:, 0].double()), points @ c.T
    off = (found - (logits[:, 0] - logits[:, 1])).abs()  # found: the difference of the noisy logits
    assert (off <= 0.5 * logits.abs().sum(dim=1) + 1e-5).all() and off.mean() > 0.01


def test_statistics_count_finite_real_vectors_only():
    torch.manual_seed(0)
    raw, real = torch.randn(10, 6) * 100, torch.arange(10) < 8
    raw[2], raw[3, 2], raw[4, 0], raw[5] = torch.full((6,), 1e-30), math.nan, math.inf, 0.0
    points, c = mj.unit(raw), mj.unit(torch.randn(3, 6))
    best = mj.route(points, c, 2)[1]
    found, expected = mj.cluster_statistics(points, best, 3, real), torch.zeros(3, 7, dtype=torch.double)
    for n in (0, 1, 6, 7):
        torch.testing.assert_close(points[n].double(), naive_unit(raw[n]))
        expected[best[n], :6] += naive_unit(raw[n])
        expected[best[n], 6] += 1
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_kmeans_finds_planted_clusters_and_is_the_same_for_the_same_seed():
    torch.manual_seed(0)
    planted = mj.unit(torch.randn(4, 24))
    points = mj.unit(planted.repeat_interleave(50, dim=0) + 0.05 * torch.randn(200, 24))
    found, again = (mj.kmeans(points, 4, 10, torch.Generator().manual_seed(5)) for _ in range(2))
    assert ((planted @ found.T).amax(dim=1) > 0.99).all() and torch.equal(found, again)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(4))
    same = mj.kmeans(mj.unit(torch.ones(6, 4)), 3, 4, torch.Generator().manual_seed(0))
    assert torch.isfinite(same).all()  # of points that are all the same


# ---------------------------------------------------------------------------- promise 1: the identity, at what it costs
@grid(mode=mj.REP_MODES, adapter=OWN_ADAPTERS)
def test_at_init_every_projection_is_the_bases_bit_for_bit_and_only_adapters_train(adapter, mode):
    model, ids = tiny_llama(), batch()
    with noted_calls(model, "_proj$|lm_head$") as seen:
        model(ids)
        mj.apply_monkeyjump(model, adapter=adapter, rep_mode=mode, shared_expert="up_proj")
        model(ids)
        model.train()(input_ids=ids, labels=ids)
    for (_, plain), *others in seen.values():
        assert len(others) == 2 and all(torch.equal(plain, output) for _, output in others)
    blocks = [f"model.layers.{index}." for index in range(2)]
    paths = [b + p for b in blocks for p in [*(f"self_attn.{p}" for p in PROJECTIONS), "mlp.up_proj"]]
    endings = {"lora": ["lora_A", "lora_B"], "lorafa": ["lora_B"], "adalora": ["lora_A", "lora_B", "lora_E"]}
    endings = endings.get(adapter, ["propulsion"])
    assert set(trained(model)) == {f"{path}.monkeyjump.{ending}" for path in paths for ending in endings}


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
QWEN, LLAMA = (896, 4864, 24, 14, 2), (4096, 14336, 32, 32, 8)
PUBLISHED = [(QWEN, {"adapter": "lora"}, 270_336), (QWEN, {"adapter": "adalora"}, 270_528)]
PUBLISHED += [(QWEN, {"adapter": "lorafa"}, 98_304), (QWEN, {"adapter": "propulsion"}, 49_152)]
PUBLISHED += [(LLAMA, {"linears": PROJECTIONS[:3], "shared_expert": ["o_proj", "gate_proj"]}, 2_883_584)]


@pytest.mark.parametrize(("shape", "settings", "published"), PUBLISHED)
def test_trainable_parameters_are_the_published_numbers(shape, settings, published, capsys):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, **dict(zip(SIZES, shape, strict=True))))
    model = mj.apply_monkeyjump(model, rank=2, **settings)
    assert sum(p.numel() for p in trained(model).values()) == published
    line = mj.print_trainable_parameters(model)
    assert f"{published:,}" in line and line in capsys.readouterr().out


def test_packed_four_bit_weights_are_counted_as_the_parameters_that_they_hold():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_llama()
    total = sum(p.numel() for p in model.parameters())
    for block in model.model.layers:
        block.self_attn.q_proj = bitsandbytes.nn.Linear4bit(32, 32, bias=False).to("cpu")
    model = mj.apply_monkeyjump(model, rank=2)
    new = sum(p.numel() for p in trained(model).values())
    assert f"trainable params: {new:,} || all params: {total + new:,} ||" in mj.print_trainable_parameters(model)


# ---------------------------------------------------------------------------------------------- the published equations
@grid(mode=mj.REP_MODES, adapter=OWN_ADAPTERS)
def test_projections_follow_the_published_equations_and_the_base_while_disabled(adapter, mode):
    """In float64, token by token, from what came to the block and to the projection."""
    base, ids, settings = tiny_llama(), batch(), {"alpha": 12.0, "rank": 3, "degree": 9}
    model = adapted(adapter, copy.deepcopy(base), rep_mode=mode, shared_expert="up_proj", temperature=0.3, **settings)
    with torch.no_grad(), noted_calls(model, f"_proj$|monkeyjump$|{BLOCKS}") as seen:
        model(input_ids=ids, prompt_end=torch.tensor([3, 6]))
    with pytest.raises(KeyError), mj.disable_adapters(model):
        assert torch.equal(model(ids).logits, base(ids).logits)
        raise KeyError
    assert (model(ids).logits - base(ids).logits).abs().max() > 1e-2
    for index, row, t in itertools.product(range(2), range(2), range(9)):
        block = f"model.layers.{index}"
        vectors = naive_representation(seen[block][0][0][0][row], mode, [True] * 9, (3, 6)[row])
        gates = naive_gates(vectors[t], model.get_buffer(f"{block}.monkeyjump.centers"), 2, 0.3)
        for gate, path in zip([*gates, 1.0], [*(f"self_attn.{p}" for p in PROJECTIONS), "mlp.up_proj"], strict=True):
            (((x, *_), y),), layer = seen[f"{block}.{path}"], model.get_submodule(f"{block}.{path}")
            given = torch.as_tensor(seen[f"{block}.{path}.monkeyjump"][0][0][2]).expand(2, 9, 1)[row, t, 0]
            assert float(given) == pytest.approx(gate, abs=1e-5)  # of sum 1, whatever alpha and rank are
            plain, own = layer.weight.double() @ x[row, t].double(), layer.monkeyjump.state_dict()
            delta = naive_delta({n: v.double() for n, v in own.items()}, adapter, x[row, t].double(), plain, **settings)
            torch.testing.assert_close(y[row, t].double(), plain + gate * delta, atol=1e-4, rtol=1e-4)


def test_every_match_of_a_name_is_an_expert_in_the_order_of_the_names_and_conv1d_serves():
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=32)
    model = adapted("lora", transformers.GPT2LMHeadModel(config).eval(), linears=["c_proj", "attn.c_attn"])
    experts = ["attn.c_proj", "mlp.c_proj", "attn.c_attn"]
    assert mj.router_statistics(model)["transformer.h.0"]["experts"] == experts
    assert model.transformer.h[0].mlp.c_proj.monkeyjump.lora_A.shape == (2, 128)
    assert torch.isfinite(model(batch()).logits).all()


# -------------------------------------------------------------------------------------- promise 2: names, types, copies
def test_names_and_types_of_the_base_stay_and_removing_gives_it_back_bit_for_bit(tmp_path):
    plain, model = tiny_llama(), tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    with unchanged(model):
        adapted("adalora", model, shared_expert="up_proj")
        names, modules = list(model.state_dict()), dict(model.named_modules())
        for kind, now in ((type(module), type(modules[path])) for path, module in plain.named_modules()):
            assert issubclass(now, kind) and str(now) == str(kind) and now.__name__ == kind.__name__
        allowed = r"\.monkeyjump\.((sensitivity_|uncertainty_)?lora_[ABE]|centers|steps|pending)$"
        assert [name for name in names if not re.search(allowed, name)] == list(plain.state_dict())
        train(model, [batch()])
        assert list(model.state_dict()) == names
        model.save_pretrained(tmp_path)
        assert mj.remove_monkeyjump(model.eval()) is model
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(batch()).logits, plain(batch()).logits)


@grid(clone=[copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_independent_also_after_a_training_step(clone):
    model, ids = adapted("lora"), batch()
    train(model, [ids, ids])
    other, before = clone(model).eval(), model.eval()(ids).logits
    assert torch.equal(other(ids).logits, before)
    with unchanged(model):
        moved = train(other, [batch(seed=9)] * 3)[1]
    assert all_differ(moved, centers(model))
    with mj.disable_adapters(other.eval()):
        assert torch.equal(model(ids).logits, before)
    assert (other(ids).logits - before).abs().max() > 1e-3


# --------------------------------------------------------------------------------------- promise 3: no gradient through
def test_gates_are_constants_for_the_gradient_and_computed_in_float32_under_autocast():
    """The gradient with respect to the input is exactly the one with the gates as given constants."""
    model, ids, gradients, gates = adapted("lora"), batch(1, 5), [], None
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    for _ in range(2):
        with noted_gates(gates) as noted:
            loss = model(inputs_embeds=embeddings).logits.pow(2).sum()
        gradients.append(torch.autograd.grad(loss, [embeddings, *trained(model).values()]))
        gates = [torch.tensor(g.tolist()) for g in noted]
    assert len(gates) == 2 and all(map(torch.equal, *gradients))
    with noted_gates() as noted, torch.autocast("cpu", torch.bfloat16):
        model(inputs_embeds=embeddings)
    assert torch.equal(noted[0], gates[0])  # block 0 sees embeddings, which autocast leaves alone


# --------------------------------------------------------------------------------------------------- promise 4: padding
@grid(entry=["keywords", "positions", "inner"], mode=mj.REP_MODES, side=["left", "right"], attention=["sdpa", "eager"])
def test_padding_is_invisible(entry, mode, side, attention):
    model = adapted("lora", tiny_llama(attn_implementation=attention), rep_mode=mode, ema_momentum=0.3)
    short, full, start, moved = batch(1, 5), batch(1, 9, seed=7), 4 if side == "left" else 0, []
    both = torch.cat([F.pad(short, (start, 4 - start), value=1), full, torch.ones_like(full)])  # the last row: nothing

    def run(model, ids, end):
        mask = (ids != 1).long()
        more = {"position_ids": mask.cumsum(1).sub(1).masked_fill(mask == 0, 1)}  # so transformers counts padding
        more |= {"prompt_end": torch.tensor(end)} if mode == "prompt_end" else {}
        if entry == "inner":
            return model.lm_head(model.model(ids, attention_mask=mask, **more)[0])
        return (
            model(ids, mask, **more)[0]
            if entry == "positions"
            else model(input_ids=ids, attention_mask=mask, **more)[0]
        )

    found = run(model, both, [start + 2, 5, 0])
    torch.testing.assert_close(found[:1, start : start + 5], run(model, short, [2]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1:2], run(model, full, [5]), atol=1e-4, rtol=1e-4)
    for inputs in ([(both, [start + 2, 5, 0])], [(short, [2]), (full, [5])]):
        other = copy.deepcopy(model).train()
        for ids, end in inputs:
            run(other, ids, end)
        mj.update_router_centers(other)
        assert mj.router_statistics(other)["model.layers.1"]["count"] == (14 if mode == "token" else 2)
        moved.append(centers(other))
    assert_same(*moved, atol=1e-4, rtol=1e-4)
    assert all_differ(moved[0], centers(model))


# --------------------------------------------------------------------------- promise 5: centers move with the optimizer
@grid(kind=["SGD", "AdamW", "two optimizers", "GradScaler", "by hand"])
@pytest.mark.parametrize(
    ("every", "until", "parts"), [(1, None, 1), (1, None, 3), (2, None, 2), (1, 2, 1), (3, 4, 2), (1, 0, 1)]
)
def test_centers_move_when_an_optimizer_steps_by_all_that_was_seen_since(kind, every, until, parts):
    model = adapted("lora", ema_momentum=0.6, update_every=every, update_until=until).train()
    weights, start, expected = list(trained(model).values()), centers(model), centers(model)
    optimizers = {"AdamW": [torch.optim.AdamW(weights)], "by hand": []}
    optimizers["two optimizers"] = [torch.optim.SGD(weights[::2], 0.05), torch.optim.AdamW(weights[1::2])]
    optimizers, scaler = optimizers.get(kind, [torch.optim.SGD(weights, 0.05)]), torch.amp.GradScaler("cpu")
    seen = {f"model.layers.{index}": [] for index in range(2)}
    for number in range(1, 7):
        with noted_calls(model, BLOCKS) as inputs:
            for ids in batch(2 * parts, seed=number).chunk(parts):
                model(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            model(batch(seed=50))  # neither without gradients,
        model.eval()(batch(seed=51))  # nor in eval mode,
        with mj.disable_adapters(model.train()):
            model(batch(seed=52))  # nor the reference pass of DPO
        if kind == "GradScaler":  # a step that it skips
            scaler.scale(torch.ones(1))
            right, weights[0].grad = weights[0].grad, torch.full_like(weights[0], math.inf)
            scaler.step(optimizers[0])
            scaler.update()
            weights[0].grad = right
            fused = torch.optim.SGD(weights[:1], fused=True)  # is called all the same, and skips it by itself
            fused.found_inf = fused.grad_scale = torch.ones(1)
            fused.step()
        assert_same(centers(model), expected, atol=1e-5, rtol=1e-4)
        for optimizer in optimizers:
            optimizer.step()
        if kind == "by hand":
            mj.update_router_centers(model)
        model.zero_grad()
        seen = {path: seen[path] + inputs[path] for path in seen}
        if number % every == 0:
            if until is None or number <= until:
                expected = naive_move(expected, seen, 0.6)
            seen = {path: [] for path in seen}
        assert_same(centers(model), expected, atol=1e-5, rtol=1e-4)
    assert all_differ(centers(model), start) == (until != 0)


def test_the_plain_trainer_accumulates_like_one_batch_and_resumes_exactly(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in batch(24)]
    settings = {"max_steps": 5, "save_steps": 3, "seed": 0, "report_to": [], "disable_tqdm": True, "use_cpu": True}

    def run(size, parts, resume=None):
        torch.manual_seed(0)
        model, sizes = adapted("lora", ema_momentum=0.5, update_every=2), {"per_device_train_batch_size": size}
        args = TrainingArguments(f"{tmp_path}/{size}", gradient_accumulation_steps=parts, **sizes, **settings)
        Trainer(model, args, train_dataset=data).train(resume_from_checkpoint=resume)
        return model

    whole, micro = run(8, 1), run(2, 4)
    assert all_differ(centers(whole), centers(adapted("lora")))
    assert_same(centers(micro), centers(whole), atol=1e-4, rtol=1e-3)
    resumed = run(2, 4, f"{tmp_path}/2/checkpoint-3")  # between two moves
    assert_same(resumed.state_dict(), micro.state_dict(), **EXACT)


def test_router_statistics_count_what_the_experts_received():
    model, block = adapted("lora").train(), "model.layers.1"
    router = model.get_submodule(block).monkeyjump
    counts = torch.zeros(4)
    for seed in range(3):
        c = router.centers.double()
        with noted_calls(model, BLOCKS) as seen:
            train(model, [batch(seed=seed)])
        for vector in map(naive_unit, seen[block][0][0][0].flatten(0, 1)):
            counts[(c @ vector).argmax()] += 1
    found = mj.router_statistics(model, reset=True)[block]
    assert found["count"] == 3 * 18 and found["experts"] == [f"self_attn.{p}" for p in PROJECTIONS]
    torch.testing.assert_close(found["share"], counts / 54)
    train(model, [batch()])
    assert mj.router_statistics(model)[block]["count"] == 18


# --------------------------------------------------------------------------------------------- promise 6: checkpointing
WAYS = ("reentrant", "non-reentrant", "wrapper")
NOISE = ({}, {"jitter_noise": 0.3, "dropout": 0.5})


@grid(how=WAYS, mode=["token", "prompt_end"], interleaved=[False, True], noise=NOISE)
def test_checkpointing_changes_neither_gradients_nor_centers_nor_counts(how, mode, interleaved, noise, monkeypatch):
    if (how, mode, interleaved) == ("wrapper", "prompt_end", True):
        pytest.skip("a documented limit")
    results, mask = [], torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    backward, engine = torch.Tensor.backward, ThreadPoolExecutor(1)  # as on a GPU, whose backward has its own thread
    if not noise:
        monkeypatch.setattr(torch.Tensor, "backward", lambda loss: engine.submit(backward, loss).result())
    for way in ("none", how):
        model = adapted("lora", tiny_llama(use_cache=False), rep_mode=mode, ema_momentum=0.3, **noise)
        if way == "wrapper":
            model.model.layers = nn.ModuleList(map(checkpoint_wrapper, model.model.layers))
        elif way != "none":
            model.gradient_checkpointing_enable({"use_reentrant": way == "reentrant"})
            model.enable_input_require_grads()

        def others(ids, model=model):  # a reference pass, an evaluation and a longer batch before the backward pass
            with mj.disable_adapters(model):
                model(input_ids=ids)
            with torch.no_grad():
                model.eval()(input_ids=ids.flip(1))
            longer = torch.cat([ids.flip(0), ids], dim=1)
            return model.train()(input_ids=longer, attention_mask=F.pad(mask, (9, 0)), labels=longer).loss

        torch.manual_seed(5)
        batches, also = [batch(seed=seed) for seed in range(3)], others if interleaved else None
        gradients, moved = train(model, batches, mask=mask, also=also)
        found = gradients | moved
        for index, seen in enumerate(mj.router_statistics(model).values()):
            found[f"count {index}"] = torch.tensor(float(seen["count"]))
        results.append({name.replace("_checkpoint_wrapped_module.", ""): value for name, value in found.items()})
    assert_same(*results, atol=1e-6, rtol=1e-5)


def test_a_checkpoint_inside_a_block_is_refused_and_projections_called_alone_are_the_bases():
    model, x = adapted("lora").train(), torch.randn(1, 3, 32)
    attention = model.model.layers[1].self_attn
    for _ in range(2):  # the second time inside a checkpoint
        loss = model(batch(), labels=batch()).loss
        assert torch.equal(attention.q_proj(x), F.linear(x, attention.q_proj.weight))
        model.model.layers[1].self_attn = checkpoint_wrapper(attention)
    with pytest.raises(RuntimeError, match="wrap whole blocks"):
        loss.backward()


# ----------------------------------------------------------------------------------------- promise 7: several processes
def work(rank, kind, folder):
    """One of two processes: from a pickled model, with its half of every batch, in two micro-batches."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = wrapped = torch.load(f"{folder}/model.pt", weights_only=False)
    half, start = [ids.chunk(2)[rank] for ids in torch.load(f"{folder}/batches.pt")], centers(model)
    mj.init_router_centers(model, half, subset_size=4 * 4 * 9, kmeans_iters=50)
    clustered, refused = centers(model), False
    with noted_calls(model, BLOCKS) as seen:  # one rank has enough, 5 times 2, and the other stops with it
        mj.init_router_centers(model, 8 * [batch(1, 1 + rank)], subset_size=18)
    assert {len(calls) for calls in seen.values()} == {5}
    model.load_state_dict(start, strict=False)
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    for module in (*model.model.layers, model) if kind == "fsdp" else ():
        torch.distributed.fsdp.fully_shard(module)

    def whole(tensors):
        return {n: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone() for n, v in tensors.items()}

    gradients = whole(train(model, half, forward=wrapped, parts=2)[0])
    mj.save_adapter(model, f"{folder}/out")
    before = whole(trained(model) | centers(model))
    model.eval()(half[0])  # which leaves FSDP2's root gathered
    try:
        mj.load_adapter(model, f"{folder}/other")
    except ValueError:
        refused = True
    after = whole(trained(model) | centers(model))
    torch.save([clustered, gradients, before, after, refused], f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=OLD_TORCH)])
def test_two_processes_have_the_centers_and_gradients_of_one_on_the_whole_batch(kind, tmp_path):
    model, other = adapted("lora", ema_momentum=0.4), adapted("lora", seed=5, ema_momentum=0.4)
    batches = [batch(4, seed=seed) for seed in range(4)]
    torch.save(model, tmp_path / "model.pt")
    torch.save(batches, tmp_path / "batches.pt")
    mj.save_adapter(other, tmp_path / "other")
    torch.multiprocessing.spawn(work, (kind, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    clustered, gradients, before, after, refused = first
    for one, same in zip(first[:4], second, strict=False):
        assert_same(one, same, **EXACT)
    with noted_calls(model, BLOCKS) as seen:
        model(torch.cat(batches))
    assert_same(naive_move(clustered, seen, 0.0), clustered, atol=1e-4, rtol=1e-3)  # all points' fixed point of Lloyd
    expected_gradients, expected = train(model, batches)
    assert_same({name: before[name] for name in expected}, expected, atol=1e-5, rtol=1e-4)
    assert_same(gradients, expected_gradients, atol=1e-5, rtol=1e-3)
    saved = mj.load_adapter(tiny_llama(), tmp_path / "out")
    assert_same(trained(saved) | centers(saved), before, **EXACT)
    assert_same(after, before if refused else trained(other) | centers(other), **EXACT)
    assert not refused or kind == "fsdp"


# ------------------------------------------------------------------------------------------------ promise 8: generation
@grid(mode=mj.REP_MODES, beams=[1, 3], static=[False, True], training=[False, True])
def test_cached_generation_equals_uncached_as_the_prompt_was_routed(mode, beams, static, training):
    model = adapted("lora", rep_mode=mode).train(training)
    settings = {"max_new_tokens": 5, "do_sample": False, "disable_compile": True, "length_penalty": 0.0}
    settings |= {"num_beams": beams, "return_dict_in_generate": True, "output_scores": True}
    cache = {CACHE: transformers.StaticCache(config=model.config, max_cache_len=12)} if static else {}
    one = {"input_ids": batch(2, 1), "attention_mask": torch.ones(2, 1, dtype=torch.long)}  # looks like a decoded token
    for inputs in (left_padded(3), left_padded(4), one):  # each generation starts from its own prompt
        for reused in cache.values():
            reused.reset()
        found = model.generate(**inputs, **settings, **cache)
        ids, mask = found.sequences, F.pad(inputs["attention_mask"], (0, 5), value=1)
        position_ids, length = mask.cumsum(1).sub(1).clamp(min=0), ids.shape[1] - 5
        with torch.no_grad(), noted_gates() as gates:
            model(ids[:, :-5], mask[:, :-5], position_ids=position_ids[:, :-5], use_cache=False)
        with torch.no_grad(), noted_gates(None if mode == "token" else gates):  # at once, as the prompt was routed
            logits = model(ids, mask, position_ids=position_ids, use_cache=False).logits
        scores = logits[:, length - 1 : -1].log_softmax(dim=-1)
        chosen = scores.gather(2, ids[:, length:, None])[..., 0]
        if beams > 1:
            torch.testing.assert_close(found.sequences_scores, chosen.sum(dim=1), atol=1e-4, rtol=1e-4)
        else:
            torch.testing.assert_close(chosen, scores.amax(dim=-1), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_each_cache_keeps_the_routing_of_its_last_turn_whatever_comes_between():
    model = adapted("lora", rep_mode="mean")

    def talk(turns, cache=None):
        for ids in turns:
            output = model(ids, use_cache=True, **{CACHE: cache})
            cache = output[CACHE]
            yield output.logits

    tokens = [batch(1, 1, seed=seed) for seed in (1, 2)]
    talks = [[batch(1, 6), batch(1, 4, seed=8), *tokens], [batch(1, 5, seed=9), batch(1, 2, seed=7), *tokens]]
    with noted_gates() as gates:
        alone = [list(talk(turns)) for turns in talks]
        together = [list(logits) for logits in zip(*zip(*map(talk, talks), strict=True), strict=True)]
        model(talks[0][1])
    torch.testing.assert_close(together, alone)
    assert len(gates) == 2 * 8 + 2  # two blocks, and no token that was decoded
    torch.testing.assert_close(gates[2], gates[-2])  # block 0 sees embeddings: those of the new turn


def test_neither_cache_nor_model_is_kept_alive_and_no_cache_is_copied_with_the_model():
    model, cache = adapted("lora"), transformers.DynamicCache()
    train(model, [batch()])
    model.eval()(batch(), **{CACHE: cache})
    copy.deepcopy(model)  # tensors with a graph cannot be copied
    the_model, the_cache = weakref.ref(model), weakref.ref(cache)
    del cache
    gc.collect()
    assert the_cache() is None
    del model
    gc.collect()
    assert the_model() is None


# --------------------------------------------------------------------------------------------------- promise 9: compile
@OLD_TORCH
@pytest.mark.parametrize(("checkpointing", "mode"), [(False, "token"), (True, "prompt_end")])
def test_compiles_to_one_graph_once_and_trains_like_eager(checkpointing, mode):
    torch._dynamo.reset()
    batches, mask = [batch(seed=s) for s in range(4)], torch.ones(1, 9, dtype=torch.long)
    mask[0, :2] = 0
    settings = {"rep_mode": mode, "update_every": 2, "ema_momentum": 0.5}
    eager, model = (adapted("lora", tiny_llama(use_cache=False), **settings) for _ in range(2))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if hasattr(model, "_require_grads_hook") or hasattr(model, "_require_grads_hooks"):
            model.disable_input_require_grads()  # with them not even the base model compiles
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    found = train(model, batches, forward=torch.compile(model, backend=counter, fullgraph=True), mask=mask, parts=2)
    for one, other in zip(found, train(eager, batches, mask=mask, parts=2), strict=True):
        assert_same(one, other, atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 1


@grid(mode=mj.REP_MODES, adapter=OWN_ADAPTERS)
def test_a_training_step_neither_asks_the_device_for_a_value_nor_mixes_devices(mode, adapter):
    """On meta tensors, which have no values, both are errors."""
    with torch.device("meta"):
        model = LlamaForCausalLM(copy.deepcopy(tiny_llama(attn_implementation="eager").config)).train()
        inputs = {name: torch.ones(2, 8, dtype=torch.long) for name in ("input_ids", "attention_mask", "labels")}
    try:
        model(**inputs)
    except RuntimeError as error:
        pytest.skip(f"not even the base model: {error}")
    settings = {"update_every": 2, "update_until": 5, "jitter_noise": 0.1, "dropout": 0.1, "shared_expert": "up_proj"}
    mj.apply_monkeyjump(model, adapter=adapter, rep_mode=mode, **settings).train()
    optimizer = torch.optim.AdamW(trained(model).values())
    for _ in range(2):
        model(**inputs).loss.backward()
        optimizer.step()


# ------------------------------------------------------------------------------------------------ promise 10: precision
@grid(adapter=OWN_ADAPTERS, dtype=[torch.bfloat16, torch.float16])
def test_adapters_and_centers_stay_float32_when_the_model_is_cast_and_train_on(adapter, dtype):
    model = adapted(adapter)
    before = {name: p.detach().clone() for name, p in trained(model).items()} | centers(model)
    model.to(dtype) if dtype is torch.bfloat16 else model.half()
    assert_same(trained(model) | centers(model), before, **EXACT)
    assert all(p.dtype == (torch.float32 if ".monkeyjump." in n else dtype) for n, p in model.named_parameters())
    gradients, moved = train(model, [batch(seed=s) for s in range(2)])
    assert all(g.dtype == torch.float32 and g.abs().sum() > 0 for g in gradients.values())
    assert all(c.dtype == torch.float32 for c in moved.values()) and all_differ(moved, before)
    torch.testing.assert_close(torch.stack([*moved.values()]).norm(dim=-1), torch.ones(2, 4))


@torch.no_grad()
def test_a_write_through_data_shows_in_the_next_prompt_and_a_float32_residual_stream_above_bf16_serves():
    model, other = adapted("lora").bfloat16(), adapted("lora", seed=5).bfloat16()
    model(batch(2, 1))  # a decoded token: casts are kept
    for name, parameter in trained(model).items():
        parameter.data.copy_(trained(other)[name])
    model.load_state_dict(centers(other), strict=False)
    torch.testing.assert_close(model(batch()).logits, other(batch()).logits, atol=0, rtol=0)
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=50, residual_in_fp32=True)
    mamba = transformers.MambaForCausalLM(config).bfloat16().eval()
    right = mamba(batch()).logits
    assert torch.equal(mj.apply_monkeyjump(mamba, top_k=1)(batch()).logits, right)


@grid(adapter=OWN_ADAPTERS)
def test_what_is_kept_for_the_backward_pass_of_a_bf16_base_is_bf16(adapter):
    def kept_in_float32(model):
        kept, embeddings = [], model.get_input_embeddings()(batch()).detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            model(inputs_embeds=embeddings)
        return [list(t.shape) for t in kept if t.dtype == torch.float32 and (t.shape[:2] == (2, 9) or len(t) == 18)]

    base = tiny_llama().to(torch.bfloat16).requires_grad_(False).train()
    expected = kept_in_float32(base)  # by its norms
    assert kept_in_float32(adapted(adapter, base, shared_expert="up_proj")) == expected


# --------------------------------------------------------------------------------------------------- promise 11: saving
WEIGHTS, COPY = "adapter_model.safetensors", "adapter_config.json"
A, CENTERS = "model.layers.1.self_attn.q_proj.monkeyjump.lora_A", "model.layers.0.monkeyjump.centers"


@grid(adapter=OWN_ADAPTERS)
def test_an_adapter_is_two_files_of_which_the_weights_alone_give_the_same_model_again(tmp_path, adapter):
    settings = {"rep_mode": "mean", "shared_expert": ["up_proj"], "dropout": 0.5, "jitter_noise": 0.5, "top_k": 2}
    model, ids = adapted(adapter, **settings), batch()
    train(model, [ids, ids])
    mj.save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [COPY, WEIGHTS]
    assert json.loads((tmp_path / COPY).read_text()).items() >= {**settings, "adapter": adapter}.items()
    logits, again = model.eval()(ids).logits, adapted(adapter, seed=5, **settings).train()
    fresh = mj.load_adapter(tiny_llama(), tmp_path)
    assert torch.equal(fresh(ids).logits, logits)  # in eval mode as the base model was: without dropout and jitter
    assert not torch.equal(fresh.train()(ids).logits, fresh(ids).logits)
    (tmp_path / COPY).unlink()
    again(ids)
    mj.load_adapter(again, tmp_path)
    mj.update_router_centers(again)  # the centers loaded are not moved by what was seen before
    assert torch.equal(again.eval()(ids).logits, logits)
    with pytest.raises(ValueError, match="saved with.+top_k=2.+the model has.+1"):
        mj.load_adapter(adapted(adapter, **{**settings, "top_k": 1}), tmp_path)


def test_a_kill_at_any_moment_of_saving_leaves_the_old_adapter_or_the_new(tmp_path):
    old, new, ids = adapted("lora"), adapted("lora", seed=5, temperature=0.2), batch()
    folder, killed, states, loaded = tmp_path / "adapter", tmp_path / "killed", [], []
    mj.save_adapter(old, folder)
    killed.mkdir()

    def look(frame, event, arg):  # at every line that runs: the files as a kill would leave them
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        if not states or files != states[-1]:
            states.append(files)
        return look

    before = sys.gettrace()
    sys.settrace(look)
    mj.save_adapter(new, folder)
    sys.settrace(before)
    assert len(states) >= 4
    for files in states:
        for path in killed.iterdir():
            path.unlink()
        for name, content in files.items():
            (killed / name).write_bytes(content)
        logits = mj.load_adapter(tiny_llama(), killed)(ids).logits
        loaded.append([torch.equal(logits, model(ids).logits) for model in (old, new)].index(True))
        mj.save_adapter(old, killed)  # what is left behind does not disturb the next, and goes
        assert sorted(path.name for path in killed.iterdir()) == [COPY, WEIGHTS]
    assert loaded[0] == 0 and loaded[-1] == 1 and loaded == sorted(loaded)


def rewrite(folder, tensors=None, text=None, **config):
    """Both files anew with other tensors (None: without), another config, or a text in its place."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    key = next(key for key, value in metadata.items() if "rank" in value)
    text = text or json.dumps({n: v for n, v in (json.loads(metadata[key]) | config).items() if v != "gone"})
    tensors = {n: t for n, t in (load_file(folder / WEIGHTS) | (tensors or {})).items() if t is not None}
    save_file(tensors, folder / WEIGHTS, {**metadata, key: text})
    (folder / COPY).write_text(text)


DEEP = "[" * 100_000 + "]" * 100_000
BROKEN = [
    ("lora_A is", lambda f: rewrite(f, {A: None})),
    ("layers.7.+the model has", lambda f: rewrite(f, {A.replace("1", "7"): torch.zeros(2, 32)})),
    (r"lora_A.+\[3, 32\].+\[2, 32\]", lambda f: rewrite(f, {A: torch.zeros(3, 32)})),
    ("lora_A.+finite", lambda f: rewrite(f, {A: torch.full((2, 32), math.nan)})),
    ("centers.+finite", lambda f: rewrite(f, {CENTERS: torch.full((4, 32), math.inf)})),
    ("rnak", lambda f: rewrite(f, rnak=2)),
    ("top_k", lambda f: rewrite(f, top_k="gone")),
    ("rank=-1: must be an integer >= 1", lambda f: rewrite(f, rank=-1)),
    (r"\[3, 32\]|rank=3", lambda f: rewrite(f, rank=3)),
    ("1000000000000000", lambda f: rewrite(f, rank=10**15)),
    (WEIGHTS, lambda f: rewrite(f, rank=2**62)),
    (WEIGHTS, lambda f: rewrite(f, alpha=10**400)),
    ("lora_A is not finite", lambda f: rewrite(f, {A: torch.full((2, 32), 1e300, dtype=torch.double)})),
    ("NoLayer", lambda f: rewrite(f, blocks={"NoLayer": [0]})),
    ("JSON|config", lambda f: rewrite(f, text=DEEP)),
    (COPY, lambda f: (f / COPY).write_text((f / COPY).read_text().replace('"token"', '"mean"'))),
    (COPY, lambda f: (f / COPY).write_text(DEEP)),
    (WEIGHTS, lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-10])),
    (WEIGHTS, lambda f: (f / WEIGHTS).write_bytes(b"cos\nabort\n(tR.")),  # a pickle
    (WEIGHTS, lambda f: save_file(load_file(f / WEIGHTS), f / WEIGHTS)),  # without a config
    (f"{WEIGHTS}: [Nn]o such file", lambda f: (f / WEIGHTS).unlink()),
]


@pytest.mark.parametrize(("message", "corrupt"), BROKEN)
def test_a_broken_adapter_is_refused_and_leaves_the_model_as_it_was(tmp_path, message, corrupt):
    mj.save_adapter(adapted("lora"), tmp_path)
    corrupt(tmp_path)
    for model in (tiny_llama(), adapted("lora", seed=7)):
        with unchanged(model), pytest.raises(ValueError, match=message) as error:
            mj.load_adapter(model, tmp_path)
        assert str(tmp_path) in str(error.value)


# ------------------------------------------------------------------------------------------------ promise 12: bad input
class OnlySquare(mj.ADAPTERS["lora"]):
    def __init__(self, in_features, out_features, *args, **kwargs):
        super().__init__(in_features, out_features, *args, **kwargs)
        if in_features != out_features:
            raise ValueError("not square")


WRONG = {"rank": [0, True, 2.0], "alpha": [0, math.nan, "1"], "dropout": [1.0, -0.1], "degree": [0], "top_k": [0]}
WRONG |= {"temperature": [0.0], "ema_momentum": [1.1, None], "rep_mode": ["first", 1], "jitter_noise": [-0.1, 1.0]}
WRONG |= {"update_every": [0], "update_until": [-1, 1.5], "adapter": ["dora"], "blocks": [["LlamaDecoderLayer"]]}
WRONG = [({name: value}, f"{name}=.*must be") for name, values in WRONG.items() for value in values]
WRONG += [
    ({"adapter": "dora"}, "adapter='dora': must be one of lora, lorafa, adalora, propulsion"),
    ({"adapter": OnlySquare}, "not square"),  # q_proj is square and comes first, k_proj is not
    ({"top_k": 5}, "top_k=5: must be at most 4"),
    ({"blocks": {"GPT2Block": [0]}}, "GPT2Block.+LlamaDecoderLayer"),
    ({"blocks": {"LlamaDecoderLayer": [0, 2]}}, r"\[0, 2\].+LlamaDecoderLayer"),
    ({"blocks": {"LlamaDecoderLayer": [-1]}}, r"\[-1\].+LlamaDecoderLayer"),
    ({"blocks": {"LlamaModel": [0]}}, "LlamaModel.+LlamaDecoderLayer"),
    ({"blocks": {}}, "blocks=.+LlamaDecoderLayer"),
    ({"linears": ["q_proj", "qkv"]}, "'qkv'.+there are mlp.down_proj"),
    ({"linears": []}, "linears"),
    ({"shared_expert": "gate"}, "'gate'.+there are mlp.down_proj"),
]


REFUSED = [(tiny_llama, *row) for row in WRONG]
REFUSED += [
    (lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(d_model=8)), {}, "encoder-decoder"),
    (lambda: tiny_llama().apply(lambda m: m.to("meta") if getattr(m, "layer_idx", 0) else m), {}, "meta"),
    (adapted, {}, "carries Monkey Jump already"),
    (lambda: nn.Linear(3, 3), {}, "blocks"),
]


@pytest.mark.parametrize(("make", "settings", "message"), REFUSED)
def test_what_cannot_be_routed_is_refused_before_anything_is_touched(make, settings, message):
    model = make()
    with unchanged(model), pytest.raises(ValueError, match=message):
        mj.apply_monkeyjump(model, **settings)


def test_what_needs_an_adapted_model_says_so():
    calls = [mj.router_statistics, mj.remove_monkeyjump, mj.update_router_centers]
    calls += [lambda m: mj.save_adapter(m, "x"), lambda m: mj.init_router_centers(m, [])]
    for call in calls:
        with pytest.raises(ValueError, match="LlamaForCausalLM carries no Monkey Jump: call apply_monkeyjump first"):
            call(tiny_llama())


@grid(sign=["position_ids", "attention_mask", "cu_seq_lens_q", "cu_seqlens", "seq_idx"])
def test_packed_rows_are_right_in_token_mode_and_refused_in_the_sequence_modes(sign):
    rows, ends = [batch(1, 5, seed=1), batch(1, 4, seed=2)], torch.tensor([0, 5, 9], dtype=torch.int32)
    signs = {"position_ids": torch.tensor([[*range(5), *range(4)]]), "cu_seq_lens_q": ends, "cu_seqlens": ends}
    signs |= {"seq_idx": torch.tensor([[0] * 5 + [1] * 4])}
    signs["attention_mask"] = (signs["seq_idx"] == signs["seq_idx"].T).tril()[None, None]
    ids, model = torch.cat(rows, dim=1), adapted("lora")
    with torch.no_grad():
        inputs = {"position_ids": signs["position_ids"], sign: signs[sign], "use_cache": False}
        expected = torch.cat([model(row).logits for row in rows], dim=1)
        torch.testing.assert_close(model(ids, **inputs).logits, expected, atol=1e-5, rtol=1e-4)
    for mode, training in itertools.product(mj.REP_MODES[1:], (False, True)):
        model = adapted("lora", rep_mode=mode).train(training)
        with unchanged(model), pytest.raises(ValueError, match=f"{sign}|packed"):
            model(input_ids=ids, labels=ids, use_cache=False, **{sign: signs[sign]})


def test_prompt_end_is_given_or_before_the_first_label_and_in_training_never_guessed(tmp_path):
    model, ids, end = adapted("lora", rep_mode="prompt_end"), batch(), torch.tensor([3, 6])
    labels, nothing = torch.where(torch.arange(9) > end[:, None], ids, -100), torch.full_like(ids, -100)
    with torch.no_grad():
        given, last = model(input_ids=ids, prompt_end=end).logits, model(input_ids=ids).logits
        assert torch.equal(given, model(input_ids=ids, labels=labels).logits)
        assert torch.equal(last, model(input_ids=ids, prompt_end=torch.tensor([8, 8])).logits)
        assert torch.equal(last, model(input_ids=ids, labels=nothing).logits)
        assert not torch.allclose(given, last, atol=1e-4)
    torch.testing.assert_close(model.train()(input_ids=ids, prompt_end=end).logits, given)
    with mj.disable_adapters(model):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="prompt_end.+labels|labels.+prompt_end"):
        model(input_ids=ids)
    settings = {"label_smoothing_factor": 0.1, "max_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model, TrainingArguments(str(tmp_path), **settings), train_dataset=data)
    with pytest.raises(ValueError, match="prompt_end"):  # label smoothing takes the labels away
        trainer.train()


# -------------------------------------------------------------------------------------------------- promise 13: threads
@grid(mode=["token", "mean"])
def test_threads_that_call_one_model_at_the_same_time_do_not_mix(mode):
    model, prompts = adapted("lora", rep_mode=mode), [batch(1, 4 + seed % 5, seed=seed) for seed in range(8)]

    @torch.no_grad()
    def run(prompt):
        output = model(prompt, use_cache=True)
        return torch.cat([output.logits, model(prompt[:, :1], **{CACHE: output[CACHE]}).logits], dim=1)

    alone, interval = [run(prompt) for prompt in prompts], sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run, prompts * 10))
    sys.setswitchinterval(interval)
    torch.testing.assert_close(together, alone * 10, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------- centers from data
@grid(mode=mj.REP_MODES)
def test_centers_start_as_the_kmeans_of_the_real_representations(mode):
    model, points, loader = adapted("lora", rep_mode=mode).train(), [], [left_padded(seed) for seed in range(4)]
    model(batch(), prompt_end=torch.tensor([3, 6]))  # seen before: no part of the new centers
    with noted_calls(model, BLOCKS) as seen:
        mj.init_router_centers(model, loader, subset_size=1000, kmeans_iters=20)
    assert all(module.training for module in model.modules())
    mj.update_router_centers(model)
    for index, hidden in enumerate(torch.cat([x for (x, *_), _ in seen["model.layers.1"]])):
        real = loader[0]["attention_mask"][index % 2].bool().tolist()
        found = naive_representation(hidden, mode, real, None)
        points += [naive_unit(found[t]) for t in range(7) if (real[t] if mode == "token" else t == 0)]
    points, moved = torch.stack(points), model.model.layers[1].monkeyjump.centers.double()
    assert len(points) == (44 if mode == "token" else 8)
    nearest = (points @ moved.T).argmax(dim=1)
    for e in range(4):  # a fixed point of Lloyd: each center is the mean direction of its points
        torch.testing.assert_close(naive_unit(points[nearest == e].sum(dim=0)), moved[e], atol=1e-4, rtol=1e-3)


def test_the_same_seed_gives_the_same_centers_and_just_enough_batches_are_read():
    read, found = [], []

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            for seed in range(40):
                read.append(seed)
                yield {"input_ids": batch(4, 10, seed=seed)}

    for seed in (0, 0, 1):
        model, generator = adapted("lora"), torch.get_rng_state()
        with torch.inference_mode(seed == 1):
            mj.init_router_centers(model, torch.utils.data.DataLoader(Stream(), None), subset_size=80, seed=seed)
        assert torch.equal(torch.get_rng_state(), generator)
        found.append(centers(model))
    assert len(read) == 3 * 8  # an eighth, 10 of 40 tokens, from each batch
    assert_same(found[0], found[1], **EXACT)
    assert all_differ(found[0], found[2])
    assert all_differ(train(model, [batch()])[1], found[2])  # also centers set under inference_mode can move


UNUSABLE = [
    ([], {}, "0 representations.+4 experts"),
    ([{"input_ids": torch.tensor([[5, 6, 7]])}], {}, "3 representations.+4 experts"),
    ([{"input_ids": batch()}], {"rep_mode": "mean"}, "rep_mode='mean'.+'token'"),
    ([{"input_ids": batch()}], {"subset_size": 0}, "subset_size=0"),
    ([[{"input_ids": batch()[0]}, {"input_ids": batch()[1]}]], {}, "batch.+is.+tensors"),  # rows, as a GRPO trainer's
    ([{"input_ids": row} for row in batch(8)], {}, "batch.+is.+tensors"),  # a Dataset
    ([{"input_ids": batch()}, {"nonsense": 1}], {}, None),
]


@pytest.mark.parametrize(("loader", "settings", "message"), UNUSABLE)
def test_centers_stay_when_they_cannot_be_set(loader, settings, message):
    model = adapted("lora").train()
    trainer = types.SimpleNamespace(model=model, get_train_dataloader=lambda: loader)
    with unchanged(model), pytest.raises(ValueError if message else Exception, match=message):
        mj.init_router_centers(trainer, **settings)
    with pytest.raises(ValueError, match="and a dataloader"):
        mj.init_router_centers(model)
    before, trainer.get_train_dataloader = centers(model), lambda: [batch()]
    mj.init_router_centers(trainer)
    assert all_differ(centers(model), before)


# -------------------------------------------------------------------------------------------------------------- AdaLoRA
def test_rank_allocation_is_that_of_peft_step_by_step_also_of_a_resumed_run():
    peft = pytest.importorskip("peft")
    schedule = {"tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": 14, "beta1": 0.8, "beta2": 0.8}
    config = peft.AdaLoraConfig(target_modules=PROJECTIONS, target_r=2, init_r=4, **schedule)
    model, theirs, pruned = adapted("adalora", rank=4), {}, []
    other = peft.get_peft_model(tiny_llama(), config).base_model
    for path, name in (name.split(".monkeyjump.") for name in trained(model)):
        theirs[f"{path}.monkeyjump.{name}"] = getattr(other.model.get_submodule(path), name)["default"]
    for name, ours in trained(model).items():
        theirs[name].data.copy_(ours.data.view_as(theirs[name]))
    settings = {"target_rank": 2, "initial_steps": 2, "final_steps": 3, "interval": 2, "beta": 0.8}
    for step in range(1, 15):
        if step == 6:
            before, model = model.state_dict(), adapted("adalora", rank=4, seed=9)
            model.load_state_dict(before)
        torch.manual_seed(step)
        for name, ours in trained(model).items():
            ours.grad = torch.randn_like(ours)
            theirs[name].grad = ours.grad.view_as(theirs[name])
            ours.data.sub_(0.1 * ours.grad)
            theirs[name].data.sub_(0.1 * theirs[name].grad)
        mj.allocate_ranks(model, step, 14, **settings)
        last = {"force_mask": True} if step >= 11 else {}  # the final phase keeps the choice of its first step
        other.rankallocator.update_and_allocate(other.model, step, **last)
        assert_same(trained(model), {name: theirs[name].view_as(p) for name, p in trained(model).items()})
        pruned.append(sum(int((p == 0).sum()) for p in trained(model).values()))
    assert pruned[:3] == [0, 0, 0] and 0 < pruned[3] < 8 * 2 and pruned[10:] == [8 * 2] * 4
    for wrong in ({"interval": 0}, {"beta": 1.0}, {"beta": math.nan}, {"target_rank": 5}, {"final_steps": 14}):
        with unchanged(model), pytest.raises(ValueError, match=next(iter(wrong))):
            mj.allocate_ranks(model, 10, 14, **{**settings, **wrong})
    with pytest.raises(ValueError, match="for adapter='adalora'"):
        mj.allocate_ranks(adapted("lora"), 1, 10, target_rank=1)


def test_orthogonal_regularization_is_zero_for_orthonormal_factors_and_has_a_gradient():
    assert mj.orthogonal_regularization(mj.apply_monkeyjump(tiny_llama(), adapter="adalora")) < 1e-5
    model = adapted("adalora")
    matrices = [p.T if name.endswith("A") else p for name, p in trained(model).items() if p.dim() == 2]
    norms = [float((m.T.double() @ m.double() - torch.eye(2)).pow(2).sum().sqrt()) for m in matrices]
    loss = mj.orthogonal_regularization(model)
    assert float(loss) == pytest.approx(sum(norms) / len(norms), rel=1e-5)
    loss.backward()
    assert all((p.grad is not None) == (p.dim() == 2) for p in trained(model).values())


# ------------------------------------------------------------------------------------------------- every architecture

# All causal and vision-language types that this transformers registers; what is both is asked for text alone.
TYPES = dict.fromkeys(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, AutoModelForImageTextToText)
TYPES |= dict.fromkeys(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM)
TYPES = {name: auto for name, auto in TYPES.items() if name not in ("blt", "evolla")}  # of bytes' patches, of proteins
UNROUTABLE = dict.fromkeys("deepseek_v4 gemma3n_text hy_v4 hy_v4_vl".split(), "hidden states have four dimensions")
UNROUTABLE |= dict.fromkeys("prophetnet qwen4_exp qwen4_exp_text".split(), "several streams in one hidden state")
UNROUTABLE |= {"cpmant": "puts tokens in front", "xlm": "no class of blocks", "xlnet": "attention without linears"}
UNROUTABLE |= dict.fromkeys("florence2 pix2struct pp_formulanet t5gemma2 udop".split(), "encoder-decoder")

# An integer in a config is at most as large as the first pattern that its name contains says; None: as it is.
LIMITS = {
    r"_token_i|_offset$|factor|conv|kernel|period|every|temporal|interval|per_second|deepstack|mtp|compress": None,
    r"^((n|topk|num_expert)_group|(mamba_)?n_?groups|o_groups)$": 1,
    r"layers$|n_layer$|depth$|num_blocks|per_tok|[^x]_topk$|top_k|_k$|topk_blocks|loops|passes": 2,
    r"(kv|key|[^r]_key_value)_heads$": 2,
    r"mamba_(n_|num_)?heads$|(?<!qk_)head_?dim$|dim_head|d_head|d_kv|head_size|kv_channels|index_topk|d_state": 8,
    r"state_size|hidden_size_per_layer_input|attn_scalar|laurel|rotary_dim": 8,
    r"heads$|n_head$|experts$|patch_size|latents|query_tokens|query_num|chunk_size|per_image": 4,
    r"lora_rank|d_rel|crop_size|image_size": 16,
    r"intermediate_size|ffn|d_ff|dim_ff|dff|mlp_dim|n_inner|feed_forward_size|moe_hidden_size|expert_dim": 48,
    r"vocab_size|num_embeddings|codebook_size|position|n_ctx|seq_len|max_length|context_length|window|rel_extent": 128,
    r"hidden_size|d_model|n_embd|dim_model|emb(ed|edding)?_(dim|size)|embed_proj|projection_dim|adapter_(in|out)": 32,
    r"lru_width|output_dim|proj_dims|d_inner|projector_": 32,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "image_token_id": 90, "image_token_index": 90}

# Sizes that must divide, multiply or exclude one another: fields of the config, or of a part of it.
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
ZAMBA = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "num_mem_blocks": 1}
ZAMBA |= {"attention_hidden_size": 64, "attention_head_dim": 16}
CHANGES = {"bamba": {"attn_layer_indices": [1]}, "mamba2": {"num_heads": 8}, "falcon_h1": {"mamba_d_ssm": 64}}
CHANGES |= {"jamba": {"attn_layer_period": 2, "attn_layer_offset": 1}, "recurrent_gemma": {"num_hidden_layers": 3}}
CHANGES |= {"mllama": {"text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]}}}
CHANGES |= {"chameleon": {"vocabulary_map": {"<image>": 90}}, "xmod": {"default_language": "en_XX"}}
CHANGES |= {"granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]}}
CHANGES |= dict.fromkeys(["zamba", "zamba2"], ZAMBA)
for name in "cosmos3_edge glm46v glm4v glm4v_moe glm_ocr glmga hy_v4_vl paddleocr_vl qwen2_5_vl qwen2_vl".split():
    CHANGES[name] = {"text_config": {"rope_parameters": MROPE}}


def tiny_config(kind, changes=None):
    """A config of this class, and of its parts, with small sizes; `changes` win, {"text_config": {...}} for a part."""
    fields, special, default, changes = {}, 0, kind().to_dict(), dict(changes or {})
    for name, value in default.items():
        size = next((size for pattern, size in LIMITS.items() if re.search(pattern, name)), None)
        if re.search(r"_token_(id|index)$", name):  # distinct, from the top of the vocabulary
            fields[name], special = TOKENS.get(name, 99 - special), special + 1
        elif size and type(value) is int:
            fields[name] = min(size, value)
        elif value is None and (size in (1, 2, 4, 8) or name == "sliding_window"):
            fields[name] = size
        elif name == "use_mamba_kernels" or type(value) is float and "drop" in name:
            fields[name] = type(value)(0)
    if "kv_lora_rank" in default and "num_key_value_heads" in fields:  # latent attention: as many as heads
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    depth = next((n for n in default if re.fullmatch("num_(hidden_)?layers|n_layers?", n) and default[n]), None)
    lists = {name: v for name, v in default.items() if isinstance(v, list) and len(v) == default.get(depth, -1)}
    lists = {name: list(dict.fromkeys(v)) for name, v in lists.items() if not isinstance(v[0], list)}
    if lists:  # an entry a layer: one layer of each kind, two at least
        fields[depth] = max([2, *(len(v) for v in lists.values() if isinstance(v[0], str))])
        fields |= {name: [v[i % len(v)] for i in range(fields[depth])] for name, v in lists.items()}
    for name, part in getattr(kind, "sub_configs", {}).items():
        model_type = (default.get(name) or {}).get("model_type")
        part = CONFIG_MAPPING[model_type] if part.__name__ == "AutoConfig" and model_type in CONFIG_MAPPING else part
        if part.__name__ != "AutoConfig":
            fields[name] = tiny_config(part, changes.pop(name, None)).to_dict()
    return kind(**fields | changes)


@functools.lru_cache(maxsize=4)
def base_model(model_type):
    torch.manual_seed(0)
    config = tiny_config(CONFIG_MAPPING[model_type], CHANGES.get(model_type))
    model = TYPES[model_type].from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        if not parameter.any() and not name.endswith("bias"):  # a closed gate: nothing behind it would train
            parameter.data.normal_(std=0.1)
    return model


def unless_base_fails(run):
    """What `run` gives; if it fails on the model without adapters, the test is skipped: that is not ours to test."""
    try:
        return run()
    except Exception as error:
        pytest.skip(f"fails without adapters: {error!r}"[:200])


def tiny_model(model_type):
    """A tiny float32 model of this type in eval mode, always the same."""
    return copy.deepcopy(unless_base_fails(lambda: base_model(model_type)))


def adapt(model, **settings):
    """Adapters away from the identity, as after training; all experts are used unless top_k is given."""
    if "top_k" not in settings:
        mj.apply_monkeyjump(model, **settings, top_k=1)
        settings["top_k"] = max(len(seen["experts"]) for seen in mj.router_statistics(model).values())
        mj.remove_monkeyjump(model)
    return adapted(base=model, alpha=1.0, **settings)


def text_inputs(model, tokens=9):
    ids = torch.randint(3, 80, (2, tokens), generator=torch.Generator().manual_seed(1))
    needed = {"gemma3": 0, "paligemma": 1}.get(model.config.model_type)  # in training: text, not image
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs if needed is None else inputs | {"token_type_ids": torch.full_like(ids, needed)}


TEXT = {"input_ids": batch()}


def logits(model, inputs=TEXT):
    with torch.no_grad():
        return model(**copy.deepcopy(inputs)).logits  # a copy: xglm up to 5.0 adds to its position_ids in place


def gradients(model, inputs=TEXT):
    model.zero_grad()
    torch.manual_seed(0)  # routers of some models draw noise in training
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs = inputs | {"use_cache": False}  # recurrent_gemma's keeps keys off the tape, up to 5.0
    model(**inputs).logits.float().square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def generated_logits(model, inputs, **options):
    """Logits of four decoded tokens, which are given: the most likely ones may be too close to call."""
    options |= {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    options["prefix_allowed_tokens_fn"] = lambda row, ids: [3 + (int(ids[-1]) + 7) % 40]
    return torch.stack(model.generate(**inputs, **options).logits)


def assert_near(found, expected, tolerance=1e-4):
    assert found.keys() == expected.keys() and found
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= tolerance * tensor.norm() + 1e-6, name


def assert_all_train(model, inputs=TEXT):
    found = gradients(model.train(), inputs)
    assert found.keys() == trained(model).keys() and all("monkeyjump" in name for name in found)
    assert not [name for name, gradient in found.items() if not gradient.isfinite().all() or not gradient.any()]


def assert_saved_and_loaded(model, fresh, inputs, directory):
    mj.save_adapter(model.eval(), directory)
    mj.load_adapter(fresh, directory)
    assert_same(fresh.state_dict(), model.state_dict(), atol=0, rtol=0)
    torch.testing.assert_close(logits(fresh, inputs), logits(model, inputs), atol=1e-5, rtol=1e-5)


EVERY = pytest.mark.parametrize("model_type", sorted(TYPES.keys() - UNROUTABLE), scope="module")
DEPTH = {"hrm_text": 4, "longcat_flash": 2, "mllama": 2}  # blocks, where the config counts something else
PASSED = set()


@EVERY
def test_on_every_architecture_new_adapters_change_nothing_and_go_without_a_trace(model_type):
    model, calls = tiny_model(model_type), []
    inputs, names = text_inputs(model), list(model.state_dict())
    expected = unless_base_fails(lambda: logits(model, inputs))
    mj.apply_monkeyjump(model, top_k=1)
    found, modules = mj.router_statistics(model), list(model.modules())
    layers = {module for module in modules if isinstance(getattr(module, "monkeyjump", None), mj.Adapter)}
    for layer in layers:
        layer.register_forward_hook(lambda layer, args, output: calls.append((layer, args[0], output.clone())))
    # No stricter than the base model is with itself: falcon_mamba's scan differs by 2e-7 between runs.
    torch.testing.assert_close(logits(model, inputs), expected, atol=1e-5, rtol=0)
    mj.remove_monkeyjump(model)
    assert {layer for layer, *_ in calls} == layers and not any(hasattr(m, "monkeyjump") for m in modules)
    assert all(torch.equal(layer.forward(x), output) for layer, x, output in calls)  # each projection bit for bit
    torch.testing.assert_close(logits(model, inputs), expected, atol=1e-5, rtol=0)
    assert list(model.state_dict()) == names
    assert not re.search("vision|visual|audio|qformer|perceiver", " ".join(found))
    config = model.config.get_text_config(decoder=True)
    without_mixer = sum(kind in ("mlp", "moe") for kind in getattr(config, "layers_block_type", []))  # nemotron_h
    assert len(found) == DEPTH.get(model_type, config.num_hidden_layers) - without_mixer, sorted(found)
    PASSED.add(model_type)


@EVERY
def test_on_every_architecture_all_adapters_train_and_nothing_else_does_and_are_saved(model_type, tmp_path):
    model = tiny_model(model_type)
    inputs = text_inputs(model, tokens=16)
    unless_base_fails(lambda: model.train()(**inputs))
    assert_all_train(adapt(model), inputs)
    mj.update_router_centers(model)
    assert all(seen["count"] > 0 for seen in mj.router_statistics(model).values())
    assert_saved_and_loaded(model, tiny_model(model_type), inputs, tmp_path)


@EVERY
def test_on_every_architecture_padding_is_invisible(model_type):
    model = tiny_model(model_type)
    inputs = text_inputs(model)
    padded = {name: F.pad(tensor, (3, 0), value=5 * (name == "input_ids")) for name, tensor in inputs.items()}
    if "position_ids" in inspect.signature(model.forward).parameters:
        padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected, base = unless_base_fails(lambda: (logits(model, inputs), logits(model, padded)))
    if not torch.allclose(base[:, 3:], expected, atol=1e-5):
        pytest.skip("sees padding without adapters, too")
    for rep_mode in ("token", "last", "mean"):
        adapt(model, rep_mode=rep_mode, temperature=0.1)
        torch.testing.assert_close(logits(model, padded)[:, 3:], logits(model, inputs), atol=1e-4, rtol=1e-4)
        mj.remove_monkeyjump(model)


@EVERY
def test_on_every_architecture_all_modes_generate_and_the_cache_does_not_matter(model_type):
    model = tiny_model(model_type)
    inputs = text_inputs(model)
    inputs["attention_mask"][0, :3] = 0
    base, uncached = unless_base_fails(lambda: [generated_logits(model, inputs, use_cache=on) for on in (True, False)])
    if not torch.allclose(base, uncached, atol=2e-6):  # those that see all tokens, by little
        pytest.skip("its cache changes its logits without adapters, too")
    for rep_mode in ("token", "last", "mean"):
        adapt(model, rep_mode=rep_mode, top_k=1)
        found = generated_logits(model, inputs)
        assert found.isfinite().all() and not torch.equal(found, base)
        if rep_mode == "token" or model_type in ("qwen2", "gemma2", "gemma3", "mistral"):
            other = {"use_cache": False} if rep_mode == "token" else {"cache_implementation": "static"}
            torch.testing.assert_close(found, generated_logits(model, inputs, **other), atol=1e-3, rtol=1e-3)
        mj.remove_monkeyjump(model)


@EVERY
def test_on_every_architecture_checkpointing_does_not_change_the_gradients(model_type):
    model, other = tiny_model(model_type).train(), tiny_model(model_type).train().requires_grad_(False)
    inputs = text_inputs(model)
    if not model.supports_gradient_checkpointing or "zamba" in model_type:
        pytest.skip("does not support gradient checkpointing, or has checkpoints inside its blocks, which are refused")
    other.enable_input_require_grads()
    for rep_mode, use_reentrant in (("token", False), ("mean", True)):
        other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        unless_base_fails(lambda: gradients(other, inputs))
        settings = {"rep_mode": rep_mode, "top_k": 1}
        assert_near(gradients(adapt(other, **settings), inputs), gradients(adapt(model, **settings), inputs))
        mj.remove_monkeyjump(model), mj.remove_monkeyjump(other)


def test_nearly_all_architectures_were_tried(request):
    """Skipping is for what the base model cannot do: it must not hide a builder or a search for blocks that fails."""
    if sum("new_adapters_change" in item.name for item in request.session.items) < len(TYPES.keys() - UNROUTABLE):
        pytest.skip("not all were asked for")
    assert len(PASSED) > 0.75 * len(TYPES), sorted(TYPES.keys() - PASSED)


@pytest.mark.parametrize("model_type", UNROUTABLE)
def test_what_cannot_be_routed_is_refused_and_never_routed_wrongly(model_type):
    model = tiny_model(model_type).train()
    with pytest.raises(ValueError, match="block|projection|encoder-decoder"):
        gradients(mj.apply_monkeyjump(model), text_inputs(model))


# ------------------------------------------------------------------------------------------- particular architectures

VISION_BLOCKS = {"llava": "CLIPEncoderLayer", "gemma3": "SiglipEncoderLayer", "idefics3": "Idefics3EncoderLayer"}
VISION_BLOCKS |= {"qwen2_vl": "Qwen2VLVisionBlock", "qwen3_vl": "Qwen3VLVisionBlock"}


@pytest.mark.parametrize("rep_mode", ["token", "mean"])
@pytest.mark.parametrize("part", ["language", "vision"])
@pytest.mark.parametrize("model_type", VISION_BLOCKS)
def test_vision_language_models_train_on_images_in_whichever_part_is_named(model_type, part, rep_mode, tmp_path):
    model, name, is_qwen = tiny_model(model_type), VISION_BLOCKS[model_type], model_type.startswith("qwen")
    # Two images of 16 x 16 pixels, in patches of 4 x 4, as the model's processor gives them; 90 marks their places.
    inputs, pixels = text_inputs(model, tokens=20), torch.arange(1536.0).sin().view(2, 3, 16, 16)
    inputs["input_ids"][:, 2 : 18 if model_type == "llava" else 6] = 90
    inputs["pixel_values"] = pixels[:, None] if model_type == "idefics3" else pixels
    if is_qwen:  # patches in a row, two frames each
        inputs |= {
            "pixel_values": pixels.repeat(2, 1, 1, 1).view(32, 96),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        }
    if is_qwen or model_type == "gemma3":
        inputs["mm_token_type_ids" if is_qwen else "token_type_ids"] = (inputs["input_ids"] == 90).long()
    unless_base_fails(lambda: gradients(model, inputs))
    count = sum(type(module).__name__ == name for module in model.modules()) - 1  # llava leaves out the last one
    adapt(model, blocks={name: range(count)} if part == "vision" else None, rep_mode=rep_mode)
    assert all((".vis" in path) == (part == "vision") for path in mj.router_statistics(model))
    assert_all_train(model, inputs)
    assert_saved_and_loaded(model, tiny_model(model_type), inputs, tmp_path)


def test_a_block_is_routed_although_its_forward_lies_on_the_instance():
    model = tiny_llama()  # where transformers 5.0 leaves it, once it has been asked for hidden states
    expected, blocks = logits(model), model.model.layers
    for change in (lambda: assert_all_train(adapt(model)), lambda: mj.remove_monkeyjump(model.eval())):
        for block in blocks:
            block.forward = type(block).forward.__get__(block)
        change()
    assert torch.equal(logits(model), expected)


def test_blocks_of_shared_adapters_alone_are_adapted_and_not_routed():
    model, seen = tiny_model("jamba"), []
    adapted(base=model, linears="q_proj", shared_expert=["mamba.out_proj", "o_proj"], top_k=1)
    assert [found["experts"] for found in mj.router_statistics(model).values()] == [["self_attn.q_proj"]]
    layer = model.get_submodule("model.layers.0.mamba.out_proj")
    layer.register_forward_hook(lambda layer, args, output: seen.append((args[0], output)))
    assert_all_train(model, text_inputs(model))
    (x, found), own = seen[-1], layer.monkeyjump
    torch.testing.assert_close(found, x @ layer.weight.T + 8.0 * x @ own.lora_A.T @ own.lora_B.T)  # alpha / r


class QuantisedLinear(nn.Module):
    """What a quantised base layer looks like: packed 8-bit weights, and no float matrix to read."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = (linear.weight * 1000).round().clamp(-127, 127).to(torch.int8).view(torch.uint8).reshape(-1, 1)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.view(torch.int8).view(self.out_features, -1).to(x.dtype) / 1000)


def quantised_llama(bits=None):
    """Attention of packed layers, or of those of bitsandbytes with so many bits, which want bfloat16 and 64 columns."""
    config = tiny_llama().config
    config.update({"hidden_size": 64, "head_dim": 16})
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16 if bits else torch.float32).requires_grad_(False).eval()
    for block in model.model.layers:
        for name, linear in list(block.self_attn.named_children()):
            layer, shape = QuantisedLinear(linear), (linear.in_features, linear.out_features, False)
            if bits:
                bnb = pytest.importorskip("bitsandbytes").nn
                layer = bnb.Linear4bit(*shape) if bits == 4 else bnb.Linear8bitLt(*shape, has_fp16_weights=False)
                layer.load_state_dict(linear.state_dict())
            setattr(block.self_attn, name, layer.to("cpu"))
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = bits == 8, bits == 4
    return model


@pytest.mark.parametrize("adapter", OWN_ADAPTERS)
def test_a_quantised_base_is_adapted_trained_and_saved(adapter, tmp_path):
    assert torch.equal(logits(mj.apply_monkeyjump(quantised_llama(), adapter=adapter)), logits(quantised_llama()))
    model = adapted(adapter, quantised_llama(), top_k=4)
    assert_all_train(model)
    assert all(p.dtype == torch.uint8 for name, p in model.named_parameters() if name.endswith("q_proj.weight"))
    assert_saved_and_loaded(model, quantised_llama(), TEXT, tmp_path)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_base_of_bitsandbytes_is_adapted_and_its_peft_adapters_routed(bits):
    assert torch.equal(logits(mj.apply_monkeyjump(quantised_llama(bits))), logits(quantised_llama(bits)))
    assert_all_train(adapted(base=quantised_llama(bits), top_k=4))
    model = peft_llama(base=quantised_llama(bits))
    fast = routed(model)
    assert "bnb" in type(model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")).__module__
    slow = routed_slowly(model, fast)
    assert_near(gradients(fast), gradients(slow), tolerance=0.1)
    torch.testing.assert_close(logits(fast), logits(slow), atol=0.03, rtol=0.03)


# ------------------------------------------------------------------------------------------ PEFT, custom adapters, TRL

METHODS = {name: (f"{name}Config", {"r": 4}) for name in ("Lora", "LoHa", "LoKr", "HRA", "Miss")}
METHODS |= {"DoRA": ("LoraConfig", {"r": 4, "use_dora": True}), "bias": ("LoraConfig", {"r": 4, "lora_bias": True})}
METHODS |= {"AdaLora": ("AdaLoraConfig", {"init_r": 4, "total_step": 10}), "Vera": ("VeraConfig", {"r": 8})}
METHODS |= {"OFT": ("OFTConfig", {"r": 0, "oft_block_size": 4}), "BOFT": ("BOFTConfig", {"boft_block_size": 4})}
IA3 = {"target_modules": [*PROJECTIONS, "down_proj"], "feedforward_modules": ["down_proj"]}  # down_proj's input
METHODS |= {"IA3": ("IA3Config", IA3), "FourierFT": ("FourierFTConfig", {"n_frequency": 50})}


def shake(model):
    """Away from the initial identity: noise on all that is trained."""
    torch.manual_seed(1)
    for parameter in trained(model).values():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def peft_config(method="Lora", **settings):
    peft, (config, of_method) = pytest.importorskip("peft"), METHODS[method]
    kind = getattr(peft, config, None) or pytest.skip(f"this PEFT has no {config}")
    return kind(**{"target_modules": PROJECTIONS, **of_method, **settings})


def peft_llama(method="Lora", base=None, **settings):
    return shake(pytest.importorskip("peft").get_peft_model(base or tiny_llama(), peft_config(method, **settings)))


def routed(model, **settings):
    return mj.apply_monkeyjump(copy.deepcopy(model), adapter="peft", **{"top_k": 2, "temperature": 0.1, **settings})


def routed_slowly(model, like):
    """The same model, routed by the definition: a second base product, softmax over all, then the top 2 of it."""
    model = copy.deepcopy(model)
    for path, seen in mj.router_statistics(like).items():
        block, router = model.get_submodule(path), like.get_submodule(path).monkeyjump
        block.register_forward_pre_hook(lambda block, args: setattr(block, "hidden", args[0].detach().float()))
        for expert, name in enumerate(seen["experts"]):
            layer = block.get_submodule(name)

            def forward(x, layer=layer, block=block, expert=expert, router=router, **kwargs):
                p = (F.cosine_similarity(block.hidden[:, :, None], router.centers, dim=-1) / 0.1).softmax(dim=-1)
                p = p * (p >= p.topk(2).values[..., -1:])
                gate = (p / p.sum(dim=-1, keepdim=True))[..., expert, None]
                base, y = layer.get_base_layer()(x), type(layer).forward(layer, x, **kwargs)
                return base + gate.to(base) * (y - base)

            layer.forward = forward
    return model


def assert_routed(fast, model, tolerance=1e-5):
    found = logits(fast)
    torch.testing.assert_close(found, logits(routed_slowly(model, fast)), atol=tolerance, rtol=100 * tolerance)
    assert not torch.allclose(found, logits(model), atol=1e-3)  # routing does something


@pytest.mark.parametrize("method", METHODS)
def test_any_peft_method_is_base_plus_gate_times_difference(method):
    model = peft_llama(method)
    fast = routed(model)
    assert trained(fast).keys() == trained(model).keys()  # none made, none frozen
    assert_routed(fast, model)
    assert_near(gradients(fast), gradients(routed_slowly(model, fast)), tolerance=1e-3)
    for disabled in (mj.disable_adapters(fast), fast.disable_adapter()):
        with disabled:
            assert torch.equal(logits(fast), logits(tiny_llama()))
    assert_routed(routed(model, linears=["q_proj", "v_proj"], shared_expert="o_proj"), model)


def test_routed_peft_adapters_are_disabled_outside_the_blocks_too_and_never_merged():
    for model, adapter in ((tiny_llama(), "peft"), (peft_llama(), "lora")):
        with pytest.raises(ValueError, match="PEFT"):
            mj.apply_monkeyjump(model, adapter=adapter)
    model = peft_llama(target_modules=r".*embed_tokens|.*1\.self_attn\.[qkvo]_proj", modules_to_save=["lm_head"])
    fast = routed(model)
    before, state = logits(fast), {name: tensor.clone() for name, tensor in fast.state_dict().items()}
    assert list(mj.router_statistics(fast)) == ["base_model.model.model.layers.1"]  # PEFT left the other block alone
    with mj.disable_adapters(fast):
        assert torch.equal(logits(fast), logits(tiny_llama()))
    for merge in (fast.merge_adapter, fast.base_model.merge_adapter, fast.merge_and_unload, fast.unload):
        with pytest.raises(ValueError, match="merged"):
            merge()
    assert torch.equal(logits(fast), before)
    assert_same(fast.state_dict(), state, atol=0, rtol=0)
    mj.remove_monkeyjump(fast)
    assert torch.equal(logits(fast), logits(model)) and trained(fast).keys() == trained(model).keys()
    torch.testing.assert_close(logits(fast.merge_and_unload()), logits(model), atol=1e-4, rtol=1e-4)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merge"):
        mj.apply_monkeyjump(model, adapter="peft")


def test_named_adapters_are_switched_as_in_peft():
    fast = routed(peft_llama())
    first = logits(fast)
    fast.add_adapter("second", peft_config(r=2, use_rslora=True))  # after apply
    fast.set_adapter("second")
    plain, second = mj.remove_monkeyjump(copy.deepcopy(shake(fast))), logits(fast)
    assert_routed(fast, plain)
    assert all(".second." in name for name in trained(fast)) and trained(fast).keys() == trained(plain).keys()
    mixed = logits(fast, TEXT | {"adapter_names": ["default", "second"]})
    torch.testing.assert_close(mixed, torch.cat([first[:1], second[1:]]), atol=1e-5, rtol=1e-4)
    for model in (fast, plain):
        model.base_model.set_adapter(["default", "second"])  # both at once
    assert_routed(fast, plain)
    fast.set_adapter("default")
    assert torch.equal(logits(fast), first)


@pytest.mark.parametrize("method", ["Lora", "DoRA", "AdaLora", "IA3"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_a_routed_peft_model_changes_nothing(method, reentrant):
    plain = routed(peft_llama(method)).train()
    checkpointed, other = copy.deepcopy(plain), {"input_ids": batch(seed=5)}
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    loss = checkpointed(**TEXT, use_cache=False).logits.float().square().sum()
    with mj.disable_adapters(checkpointed):
        logits(checkpointed, other)
    logits(checkpointed, other)
    loss.backward()
    assert_near({name: p.grad for name, p in trained(checkpointed).items()}, gradients(plain))
    for model in (plain, checkpointed):
        mj.update_router_centers(model)
    assert_same(centers(checkpointed), centers(plain))


@pytest.mark.parametrize("rep_mode", ["token", "last"])
def test_a_routed_peft_model_generates_with_a_cache_what_it_does_without(rep_mode):
    fast, inputs = routed(peft_llama(), rep_mode=rep_mode), TEXT | {"attention_mask": torch.ones_like(batch())}
    inputs["attention_mask"][0, :3] = 0
    cached, alone = generated_logits(fast, inputs), generated_logits(fast, {"input_ids": batch()[:1, 3:]})
    torch.testing.assert_close(cached[:, :1], alone, atol=1e-4, rtol=1e-4)
    if rep_mode == "token":
        torch.testing.assert_close(cached, generated_logits(fast, inputs, use_cache=False), atol=1e-4, rtol=1e-4)


def test_two_threads_on_one_routed_peft_model_give_what_one_gives():
    fast = routed(peft_llama())
    inputs = [{"input_ids": batch(rows=rows, seed=rows)} for rows in (1, 2, 3, 4)] * 20
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda own: logits(fast, own), inputs))
        with mj.disable_adapters(fast):  # in this thread
            found[0], without = pool.submit(logits, fast, inputs[0]).result(), logits(fast, inputs[0])
    torch.testing.assert_close(without, logits(tiny_llama(), inputs[0]), atol=0, rtol=0)
    assert all(torch.equal(own, logits(fast, given)) for own, given in zip(found, inputs, strict=True))


def test_copies_of_a_routed_peft_model_are_independent():
    fast = routed(peft_llama())
    before = logits(fast)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(logits(twin), before)
        for tensor in twin.state_dict().values():
            tensor.neg_()
        assert torch.equal(logits(fast), before)
        mj.remove_monkeyjump(twin).merge_adapter()


@pytest.mark.parametrize("by_transformers", [False, True])
@pytest.mark.parametrize("method", ["Lora", "IA3"])
def test_a_routed_peft_model_is_saved_and_loaded_beside_peft(method, by_transformers, tmp_path):
    model, again = tiny_llama() if by_transformers else peft_llama(method), tiny_llama()
    if by_transformers:
        unless_base_fails(lambda: (model.add_adapter(peft_config(method)), shake(model)))
    fast = routed(model, shared_expert="o_proj")
    assert_routed(fast, model)
    mj.init_router_centers(fast, [TEXT], kmeans_iters=2)
    fast.save_pretrained(tmp_path)
    mj.save_adapter(fast, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]  # PEFT's own, and
    assert json.loads((tmp_path / "router_config.json").read_text())["adapter"] == "peft"
    if by_transformers:  # some versions of PEFT are too old for it
        unless_base_fails(lambda: again.load_adapter(str(tmp_path)))
    else:
        again = pytest.importorskip("peft").PeftModel.from_pretrained(again, tmp_path)
    names = trained(again).keys()
    assert torch.equal(logits(mj.load_adapter(again, tmp_path).eval()), logits(fast)) and trained(again).keys() == names


@pytest.mark.parametrize("method", ["Lora", "DoRA", "Vera", "IA3"])
def test_a_bf16_base_and_autocast_serve_routed_peft(method):
    model = peft_llama(method, tiny_llama().to(torch.bfloat16))
    fast = routed(model)
    assert_routed(fast, model, tolerance=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # over a float32 base, as Trainer(bf16=True) does
        found = gradients(routed(peft_llama(method)).train()) | gradients(fast.train())
    assert logits(fast).dtype == torch.bfloat16 and all(gradient.isfinite().all() for gradient in found.values())


class Bottleneck(mj.Adapter):
    """Houlsby et al. 2019, beside the projection: delta(x) = U relu(D x)."""

    def __init__(self, in_features, out_features, config, device):
        super().__init__(in_features, out_features, config, device)
        self.down = nn.Parameter(torch.randn(config.rank, in_features, device=device))
        self.up = nn.Parameter(torch.zeros(out_features, config.rank, device=device))

    def delta(self, x, base):
        return F.linear(F.relu(F.linear(self.dropout(x), self.down.to(x.dtype))), self.up.to(x.dtype))


def test_a_users_own_adapter_is_routed_saved_and_loaded(tmp_path):
    base, model = logits(tiny_llama()), mj.apply_monkeyjump(tiny_llama(), adapter=Bottleneck, top_k=4, alpha=99.0)
    assert torch.equal(logits(model), base)
    layer, seen = model.model.layers[0].self_attn.o_proj, []
    layer.register_forward_hook(lambda layer, args, output: seen.append((args[0], output)))
    assert_all_train(shake(model))
    x, y = seen[-1]
    delta, added = layer.monkeyjump.delta(x, y), y - x @ layer.weight.T
    gate = (added * delta).sum(dim=-1) / delta.square().sum(dim=-1)
    torch.testing.assert_close(added, gate[..., None] * delta, atol=1e-5, rtol=1e-4)
    assert gate.min() > -1e-3 and gate.max() < 1.001  # alpha / r is the adapter's own business
    assert_saved_and_loaded(model, tiny_llama(), TEXT, tmp_path)
    del mj.ADAPTERS["Bottleneck"]  # another process
    with pytest.raises(ValueError, match="Bottleneck"):
        mj.load_adapter(tiny_llama(), tmp_path)
    mj.ADAPTERS["Bottleneck"] = Bottleneck
    assert_all_train(shake(mj.apply_monkeyjump(tiny_llama().to(torch.bfloat16), adapter="Bottleneck", top_k=4)))
    assert torch.equal(logits(mj.remove_monkeyjump(model)), base)


@pytest.mark.parametrize("adapter", ["lora", "peft"])
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trl_trains_it_with_checkpointing_and_takes_a_reference_from_the_base_model(kind, adapter, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    columns = ["prompt", "completion"] if kind == "SFT" else ["prompt", "chosen", "rejected"]
    text = [[" ".join(f"w{i}" for i in row) for row in batch(len(columns), 5, seed)] for seed in range(8)]
    arguments = {"max_steps": 3, "learning_rate": 1e-2, "max_length": 16, "logging_steps": 1, "save_strategy": "no"}
    arguments |= {"per_device_train_batch_size": 2, "gradient_checkpointing": True, "bf16": False, "use_cpu": True}
    if (kind, adapter) == ("DPO", "lora"):  # now, by identities: later, TRL would make a second copy with new ones
        arguments["precompute_ref_log_probs"] = True
    model = tiny_llama()
    if adapter == "peft":
        model = pytest.importorskip("peft").get_peft_model(model, peft_config())
    trainer = getattr(trl, f"{kind}Trainer")(
        # By sequence, so that the halves of a batch that DPO puts together must not mix.
        model=mj.apply_monkeyjump(model, adapter=adapter, rep_mode="prompt_end"),
        args=getattr(trl, f"{kind}Config")(output_dir=str(tmp_path), report_to=[], **arguments),
        train_dataset=datasets.Dataset.from_list([dict(zip(columns, row, strict=True)) for row in text]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w2"),
    )
    if kind == "DPO":
        rows = next(iter(trainer.get_train_dataloader()))
        base = logits(tiny_llama(), {name: rows[name] for name in ("input_ids", "attention_mask")}).log_softmax(-1)
        base = base[:, :-1].gather(2, rows["input_ids"][:, 1:, None])[..., 0]
        expected = (base * (rows["completion_mask"][:, 1:] != 0)).sum(dim=1)
        found = torch.cat(trainer.compute_ref_log_probs(trainer.model, rows))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer.train()
    after, losses = model.state_dict(), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert any("lora_B" in name for name in changed) and any(name.endswith("centers") for name in changed)
    assert all("lora_" in name or "monkeyjump" in name for name in changed)  # the base has not moved
    assert {int(steps) for name, steps in after.items() if name.endswith("monkeyjump.steps")} == {3}
    assert kind == "SFT" or losses[-1] != losses[0] == pytest.approx(0.6931, abs=1e-4)  # log 2: policy = reference


# ------------------------------------------------------------------------------------------------- train_example.py

EXAMPLE = Path(train_example.__file__)
EXAMPLE_FLAGS = """--use_cpu --per_device_train_batch_size 4 --learning_rate 0.01 --kmeans_samples 64 --logging_steps 5
--disable_tqdm yes --held_back 0.2 --gradient_checkpointing no"""
EXAMPLE_SHAPE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
EXAMPLE_CHAT = """{% for m in messages %}{% for part in m.content %}{{ part.text or '<image>' }}{% endfor %}\
{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"""


def example_run(flags):
    train_example.main(shlex.split(f"{EXAMPLE_FLAGS} {flags}"))


def example_start(flags, log, program=EXAMPLE, processes=1):
    """The same as a process, which writes to the file log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    line = [sys.executable, *torchrun, str(program), *shlex.split(f"{EXAMPLE_FLAGS} {flags}")]
    with open(log, "w") as file:
        return subprocess.Popen(line, env=environment, stdout=file, stderr=file)


def example_history(folder, name="loss"):
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[name] for entry in history if name in entry}


def example_losses(printed):
    """Of the first and the last evaluation."""
    words = next(line for line in printed.splitlines() if line.startswith("eval_loss:")).split()
    return float(words[1]), float(words[-1])


def example_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def example_tokenizer():
    """A token a byte."""
    special = ["<s>", "</s>", "<pad>", "<image>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="session")
def example_folder(tmp_path_factory):
    """A tiny Llama in text/ and conversations in text.jsonl, a tiny LLaVA in vision/ and rows in images.jsonl."""
    folder, tokenizer = tmp_path_factory.mktemp("example"), example_tokenizer()
    torch.manual_seed(0)
    llama = LlamaConfig(vocab_size=260, initializer_range=0.2, eos_token_id=1, pad_token_id=2, **EXAMPLE_SHAPE)
    LlamaForCausalLM(llama).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    pairs = [(f"up {c}{d}:", c.upper()) for c in "abcdefgh" for d in "abcd"] + [(f"is {c}:", "yes") for c in "abcdefgh"]
    turns = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
    example_rows(folder / "text.jsonl", [{"messages": messages} for messages in turns])

    without_torchvision = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    pictures = without_torchvision(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    settings = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = transformers.LlavaProcessor(pictures, tokenizer, chat_template=EXAMPLE_CHAT, **settings)
    processor.save_pretrained(folder / "vision")
    eyes = CLIPVisionConfig(**EXAMPLE_SHAPE, image_size=16, patch_size=8)
    config = LlavaConfig(vision_config=eyes, text_config=llama, image_token_index=3, image_token_id=3)
    LlavaForConditionalGeneration(config).save_pretrained(folder / "vision")
    for color in ("red", "blue"):
        Image.new("RGB", (20, 20), color).save(folder / f"{color}.png")
    rows = [{"prompt": "color?", "answer": color, "image": f"{color}.png"} for color in ("red", "blue")]
    example_rows(folder / "images.jsonl", 24 * rows)
    return folder


@pytest.fixture
def example_text(example_folder):
    return f"--model {example_folder}/text --dataset {example_folder}/text.jsonl"


def test_example_trains_text_logs_routing_and_checkpoints_adapters_only(example_text, tmp_path, capsys):
    out = tmp_path / "out"
    routing = "--linears q_proj k_proj v_proj --shared_expert up_proj --temperature 0.5 --rep_mode prompt_end --top_k 1"
    steps = "--max_steps 40 --save_steps 20 --gradient_accumulation_steps 2"
    example_run(f"{example_text} --output_dir {out} {steps} {routing} --jitter_noise 0.1")
    printed = capsys.readouterr().out
    before, after = example_losses(printed)
    assert after < before / 2 and printed.count(" -> ") == 4 and printed.splitlines()[-1] == str(out)
    shares = next(line for line in printed.splitlines() if line.startswith("model.layers.1")).split()
    assert shares[1::2] == ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    assert sum(int(share.rstrip("%")) for share in shares[2::2]) == pytest.approx(100, abs=2)
    logged = example_history(out, "router_largest_share")
    assert len(logged) == 8 and all(1 / 3 <= share <= 1 for share in logged.values())
    assert all("monkeyjump" in name for name in load_file(out / "checkpoint-40" / "model.safetensors"))
    assert sum(path.stat().st_size for path in (out / "checkpoint-40").iterdir()) < 250_000
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["rep_mode"], config["temperature"], config["shared_expert"]) == ("prompt_end", 0.5, ["up_proj"])


def test_example_goes_on_after_a_kill_with_the_losses_of_an_uninterrupted_run(example_text, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = (
        f"{example_text} --adapter adalora --rank 4 --target_rank 2 --update_every 2 --jitter_noise 0.1 --max_steps 40"
    )
    flags += " --save_steps 5 --gradient_accumulation_steps 2"
    example_run(f"{flags} --output_dir {whole}")
    process = example_start(f"{flags} --output_dir {killed}", tmp_path / "log")
    while not (killed / "checkpoint-20" / "adapter_model.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "checkpoint-40").exists()
    example_run(f"{flags} --output_dir {killed} --resume_from_checkpoint last")
    assert example_history(killed) == pytest.approx(example_history(whole), abs=1e-6)
    tensors, found = load_file(whole / "adapter_model.safetensors"), load_file(killed / "adapter_model.safetensors")
    torch.testing.assert_close(found, tensors)
    ranks = [int(tensor.count_nonzero()) for name, tensor in tensors.items() if name.endswith("lora_E")]
    assert sum(ranks) == 2 * len(ranks) and len(set(ranks)) > 1  # one budget for all
    (killed / "checkpoint-40" / "trainer_state.json").write_text("")  # as if killed while writing it
    example_run(f"{flags} --output_dir {killed} --resume_from_checkpoint last --max_steps 36 --save_strategy no")


def test_example_continues_a_saved_adapter_and_answers_with_it(example_text, tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("question,reply\n" + "".join(f"is {letter} it:,12\n" for letter in "abcdefgh"))
    flags = f"{example_text} --dataset {tmp_path}/rows.csv --prompt_column question --answer_column reply"
    example_run(f"{flags} --output_dir {tmp_path}/first --max_steps 30 --top_k 1 --save_strategy no")
    saved = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == saved
    reached = example_losses(capsys.readouterr().out)[1]
    example_run(f"{flags} --adapter_path {tmp_path}/first --output_dir {tmp_path}/second --max_steps 1")
    assert example_losses(capsys.readouterr().out)[0] == pytest.approx(reached, abs=1e-3)
    assert json.loads((tmp_path / "second" / "adapter_config.json").read_text())["top_k"] == 1
    example_run(f"{example_text} --adapter_path {tmp_path}/first --generate 'is c it:'")
    assert capsys.readouterr().out.strip() == "12"


def test_example_reads_messages_beside_pairs_and_rows_with_and_without_images(tmp_path, monkeypatch):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    Image.new("RGB", (4, 4)).save(tmp_path / "red.png")
    pairs = [{"prompt": "c", "answer": "d", "images": ["red.png"]}, {"prompt": "e", "answer": "f", "images": []}]
    example_rows(tmp_path / "rows.jsonl", [{"messages": chat, "images": None}, *pairs])
    monkeypatch.chdir(tmp_path)  # the file lies in the current folder, which has no name
    rows = list(train_example.load_rows(train_example.Options(dataset="rows.jsonl"), "train"))
    assert [row["prompt"][0]["content"] + row["completion"][0]["content"] for row in rows] == ["ab", "cd", "ef"]
    assert [[image.size for image in row["images"]] for row in rows] == [[], [(4, 4)], []]


def test_example_trains_a_vision_language_model_on_paths_and_image_columns(example_folder, tmp_path, capsys):
    flags = f"--model {example_folder}/vision --output_dir {tmp_path}/out --save_strategy no"
    example_run(f"{flags} --dataset {example_folder}/images.jsonl --max_steps 60 --per_device_train_batch_size 8")
    printed = capsys.readouterr().out
    before, after = example_losses(printed)
    assert after < before / 10 and "-> 'red', right is 'red'" in printed and "-> 'blue', right is 'blue'" in printed
    columns = {"image": 8 * [str(example_folder / "red.png")], "prompt": 8 * ["color?"], "answer": 8 * ["red"]}
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    flags += f" --dataset {tmp_path}/data --adapter_path {tmp_path}/out --output_dir {tmp_path}/more --max_steps 1"
    example_run(f"{flags} --bf16 yes --gradient_checkpointing yes")
    assert example_losses(capsys.readouterr().out)[0] < before / 5


EXAMPLE_ERRORS = {
    "no data": ("--dataset ''", "--model and --dataset are needed"),
    "unknown flag": ("--lerning_rate 1", "--lerning_rate"),
    "unknown adapter": ("--adapter dora", "dora"),
    "too many experts": ("--top_k 9", "top_k=9"),
    "missing file": ("--dataset {tmp}/none.jsonl", "none.jsonl"),
    "missing model": ("--model {tmp}/none", "none"),
    "missing adapter": ("--adapter_path {tmp}/none", "none"),
    "no such column": ("--dataset {tmp}/rows.csv", "rows.csv: no 'prompt' and 'answer' among ['prompt', 'reply']"),
    "no such split": ("--eval_split test", 'Unknown split "test"'),
    "no rows": ("--dataset {tmp}/empty.jsonl", "empty.jsonl: no rows"),
    "broken rows": ("--dataset {tmp}/broken.jsonl", "JSON"),
    "ranks of another adapter": ("--target_rank 1", "adapter='lora'"),
    "too high a rank": ("--adapter adalora --target_rank 3", "target_rank=3.0"),
    "another run's folder": ("--output_dir {tmp}/taken", "taken holds another run's adapter"),
    "nothing to resume": ("--resume_from_checkpoint last", "no complete checkpoint"),
    "another adapter's checkpoint": ("--resume_from_checkpoint {tmp}/taken", "top_k=1"),
}


@pytest.mark.parametrize("case", EXAMPLE_ERRORS)
def test_example_refuses_wrong_use_in_one_line_and_writes_nothing(case, example_folder, example_text, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a",')
    (tmp_path / "rows.csv").write_text("prompt,reply\na,b\n")
    model = LlamaForCausalLM.from_pretrained(example_folder / "text")
    mj.save_adapter(mj.apply_monkeyjump(model, top_k=1), tmp_path / "taken")
    before, (flags, expected) = sorted(tmp_path.rglob("*")), EXAMPLE_ERRORS[case]
    with pytest.raises(SystemExit) as stop:
        example_run(f"{example_text} --output_dir {tmp_path}/out {flags.format(tmp=tmp_path)}")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("train_example.py: error: ") and expected in error, error
    assert sorted(tmp_path.rglob("*")) == before


# Accelerate shards on accelerators only, though gloo can; this makes it take two CPU processes for such.
EXAMPLE_FSDP_ON_CPU = """
import accelerate.state as state, train_example
initialise, kinds = state.PartialState.__init__, state.DistributedType
def pretend(self, *arguments, **keywords):
    initialise(self, *arguments, **keywords)
    self.distributed_type = kinds.MULTI_GPU if self.distributed_type == kinds.MULTI_CPU else self.distributed_type
state.PartialState.__init__ = pretend
train_example.main()
"""


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_example_runs_on_two_processes_as_on_one(sharded, example_text, tmp_path):
    log, launch = tmp_path / "log", {"processes": 2}
    flags = f"{example_text} --max_steps 10 --save_steps 5 --kmeans_samples 0"  # they would take other samples
    example_run(f"{flags} --output_dir {tmp_path}/one --per_device_train_batch_size 8")
    flags += f" --output_dir {tmp_path}/two --ddp_backend gloo"
    if sharded:
        launch["program"], config = tmp_path / "fsdp_on_cpu.py", tmp_path / "fsdp.json"
        launch["program"].write_text(EXAMPLE_FSDP_ON_CPU)
        config.write_text(json.dumps({"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}))
        flags += f" --fsdp 'full_shard auto_wrap' --fsdp_config {config}"
    assert example_start(flags, log, **launch).wait(300) == 0, log.read_text()[-3000:]
    assert log.read_text().count("eval_loss:") == 1
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(two, one, atol=1e-3, rtol=1e-3)
    if sharded:  # from accelerate's own checkpoint
        flags += f" --resume_from_checkpoint {tmp_path}/two/checkpoint-5"
        assert example_start(flags, log, **launch).wait(300) == 0, log.read_text()[-3000:]
        torch.testing.assert_close(load_file(tmp_path / "two" / "adapter_model.safetensors"), two)


def test_example_trains_float32_adapters_over_a_four_bit_base(example_text, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    seen = {}
    spy = lambda trainer, **keywords: seen.update(trainer.model.named_parameters())  # noqa: E731
    monkeypatch.setattr(mj, "init_router_centers", spy)
    example_run(f"{example_text} --load_in_4bit --output_dir {tmp_path}/out --max_steps 2 --save_steps 2")
    assert {parameter.dtype for parameter in seen.values() if parameter.requires_grad} == {torch.float32}
    assert type(seen["model.layers.0.self_attn.q_proj.weight"]).__name__ == "Params4bit"
    assert (tmp_path / "out" / "checkpoint-2" / "model.safetensors").stat().st_size < 50_000


def test_example_demonstration_makes_its_own_model_and_rows(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(train_example, "STEPS", 12)
    monkeypatch.setattr(train_example.tempfile, "tempdir", str(tmp_path))
    train_example.main([*train_example.demonstration(), "--use_cpu"])
    printed = capsys.readouterr().out
    before, after = example_losses(printed)
    assert after < before and printed.count(" -> ") == 4
    assert Path(printed.splitlines()[-1], "adapter_model.safetensors").exists()


def test_example_takes_every_keyword_of_apply_monkeyjump_and_names_the_form_to_use(capsys):
    keywords = list(inspect.signature(mj.apply_monkeyjump).parameters.values())[1:]
    assert train_example.parse([])[2] == {keyword.name: keyword.default for keyword in keywords}
    given = """--blocks '{"LlamaDecoderLayer": [0]}' --update_until 5 --linears a b --alpha 8"""
    routing = {"blocks": {"LlamaDecoderLayer": [0]}, "update_until": 5, "linears": ["a", "b"], "alpha": 8.0}
    assert routing.items() <= train_example.parse(shlex.split(given))[2].items()
    with pytest.raises(SystemExit):
        train_example.parse(["--help"])
    printed = capsys.readouterr().out
    assert "feed-forward routed" in printed and "update_until: int | None  # the last step" in printed


# ------------------------------------------------------------------------------------------------------- the repository
def test_the_module_is_self_contained_as_short_as_promised_and_prints_nothing_but_what_its_name_says():
    tree = ast.parse((HERE / "monkeyjump.py").read_text())
    imported = {name.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) == {"torch", "einops"}
    functions = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)]
    calls = [(f.name, call) for f in functions for call in ast.walk(f) if isinstance(call, ast.Call)]
    assert [name for name, call in calls if getattr(call.func, "id", "") == "print"] == ["print_trainable_parameters"]
    limits = {"monkeyjump.py": 1000, "train_example.py": 260, "test_monkeyjump.py": 2000, "README.md": 180}
    lines = {file: (HERE / file).read_text().count("\n") for file in limits}
    assert {file: count for file, count in lines.items() if count > limits[file]} == {}
    assert (HERE / "monkeyjump.py").stat().st_size <= 54_000


def test_the_readmes_python_blocks_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = tiny_llama()
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        monkeypatch.setattr(kind, "from_pretrained", lambda *a, **k: copy.deepcopy(base))
    tokenizer = mock.Mock(decode=str, **{"apply_chat_template.return_value": {"input_ids": batch(1)}})
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: tokenizer)
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 2
    names = {"train_dataset": [{"input_ids": row, "labels": row} for row in batch(8)]}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
