"""Tests of monkeyjump.py, in its order; each promise is checked against a naive computation.

pytest -n 2 test_monkeyjump.py

All helpers stand first: models and batches, training, comparing, looking inside, and the slow
reference, which computes in float64, one token at a time, what the module does at once.
"""

import ast
import contextlib
import copy
import dataclasses
import functools
import gc
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import sys
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import datasets
import huggingface_hub
import monkeyjump as mj
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
import transformers
from benchmarks.architectures import (
    TYPES,
    UNROUTABLE,
    image_inputs,
    text_inputs,
    tiny_model,
    video_inputs,
)
from monkeyjump import (
    apply_monkeyjump,
    disable_adapters,
    init_router_centers,
    load_adapter,
    record_routing,
    remove_monkeyjump,
    save_adapter,
    update_router_centers,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

HERE = Path(__file__).parent
OWN_ADAPTERS = ("lora", "lorafa", "adalora", "propulsion")
SEQUENCE_MODES = mj.REP_MODES[1:]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = [f"self_attn.{name}" for name in PROJECTIONS]
BLOCKS = r"layers\.\d+$"
WEIGHTS, COPY = "monkeyjump.safetensors", "monkeyjump.json"
EXACT = {"atol": 0, "rtol": 0}
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
NEAR = {"atol": 1e-4, "rtol": 1e-4}
LOOSE = {"atol": 1e-4, "rtol": 1e-3}
# What the cache is called, as a keyword and in the output: from transformers 5.24 on "cache".
FORWARD = inspect.signature(LlamaForCausalLM.forward).parameters
CACHE = "cache" if "cache" in FORWARD else "past_key_values"
# There the base model itself does neither: compile to one graph, or FSDP2 without a GPU.
OLD_TORCH = pytest.mark.skipif(
    torch.__version__.startswith("2.6"), reason="torch 2.6: not even without adapters"
)
torch.set_num_threads(1)  # a worker of pytest-xdist has one core


def grid(**axes):
    """Parametrise by every combination; of a dict the keys are the ids, the values are given."""

    def parametrised(test):
        for name, values in reversed(axes.items()):
            ids = list(values) if isinstance(values, dict) else None
            given = list(values.values()) if isinstance(values, dict) else values
            test = pytest.mark.parametrize(name, given, ids=ids)(test)
        return test

    return parametrised


# ---------------------------------------------------------------------- helpers: models and batches
def tiny_llama(layers=2, seed=0, **settings):
    """Two blocks of width 32, four heads; in eval mode, always the same."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "sdpa"}
    tokens = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    fields = {"max_position_embeddings": 64, **sizes, **heads, **tokens, **settings}
    return LlamaForCausalLM(LlamaConfig(**fields)).eval()


def adapted(adapter="lora", base=None, seed=1, **settings):
    """A model with Monkey Jump whose adapters do something: they start as the identity."""
    model = tiny_llama() if base is None else base
    torch.manual_seed(seed)
    model = apply_monkeyjump(model, adapter=adapter, **settings)
    for parameter in trained(model).values():
        nn.init.normal_(parameter, std=0.02 if adapter == "propulsion" else 0.3)
    return model


def gently_adapted(model, **settings):
    """The same with a small alpha, and all experts in use, unless settings say otherwise."""
    if "top_k" not in settings:
        apply_monkeyjump(model, top_k=1, **settings)
        settings["top_k"] = max(len(names) for names in experts_of(model).values())
        remove_monkeyjump(model)
    return adapted(base=model, alpha=1.0, **settings)


class QuantisedLinear(nn.Module):
    """What a quantised layer looks like: packed 8-bit weights, and no float matrix to read."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        rounded = (linear.weight * 1000).round().clamp(-127, 127).to(torch.int8)
        packed = rounded.view(torch.uint8).reshape(-1, 1)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x):
        weight = self.weight.view(torch.int8).view(self.out_features, -1)
        return F.linear(x, weight.to(x.dtype) / 1000)


def by_bitsandbytes(linear, bits):
    """The same layer in so many bits."""
    layers = pytest.importorskip("bitsandbytes").nn
    shape = (linear.in_features, linear.out_features, False)
    if bits == 4:
        layer = layers.Linear4bit(*shape)
    else:
        layer = layers.Linear8bitLt(*shape, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def quantised_llama(bits=None):
    """Attention of packed layers; or of bitsandbytes', which want bfloat16 and 64 columns."""
    dtype = torch.float32 if bits is None else torch.bfloat16
    model = tiny_llama(hidden_size=64, head_dim=16).to(dtype).requires_grad_(False)
    for block in model.model.layers:
        for name, linear in list(block.self_attn.named_children()):
            layer = QuantisedLinear(linear) if bits is None else by_bitsandbytes(linear, bits)
            setattr(block.self_attn, name, layer)
    model.is_loaded_in_8bit = bits == 8
    model.is_loaded_in_4bit = bits == 4
    return model


def batch(rows=2, tokens=9, seed=3):
    """Token ids [rows, tokens], none of them a pad."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 50, (rows, tokens), generator=generator)


TEXT = {"input_ids": batch()}


def left_padded(seed=3):
    """Padded by token 1: the pad's own embedding is zero, and would hide what looks at it."""
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    return {"input_ids": torch.where(mask == 1, batch(2, 7, seed), 1), "attention_mask": mask}


# -------------------------------------------------------------------------------- helpers: training
def trained(model):
    """By name, the parameters that require gradients."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def buffers(model, pattern=r"\.(centers|pending|steps)$"):
    """By name, copies of the routers' state."""
    return {n: b.detach().clone() for n, b in model.named_buffers() if re.search(pattern, n)}


def centers(model):
    """By name, copies of all centers."""
    return buffers(model, r"\.centers$")


def train(model, batches, forward=None, mask=None, lr=0.05, also=None, parts=1):
    """Plain SGD, each batch in so many parts; the last step's gradients, the centers after it."""
    model.train()
    forward = model if forward is None else forward
    optimizer = torch.optim.SGD(trained(model).values(), lr=lr)
    for ids in batches:
        optimizer.zero_grad()
        for part in ids.chunk(parts):
            loss = forward(input_ids=part, attention_mask=mask, labels=part).loss
            if also is not None:
                loss = loss + also(part)
            (loss / parts).backward()
        optimizer.step()
    return {name: p.grad.clone() for name, p in trained(model).items()}, centers(model)


def checkpointed(model, how):
    """The same model, which computes its blocks again in the backward pass."""
    if how == "wrapper":
        model.model.layers = nn.ModuleList(map(checkpoint_wrapper, model.model.layers))
    elif how != "none":
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        model.enable_input_require_grads()
    return model


def plain_names(tensors):
    """By the names that they have without checkpoint_wrapper."""
    return {name.replace("_checkpoint_wrapped_module.", ""): t for name, t in tensors.items()}


def trainer_arguments(folder, **settings):
    """Of a quiet Trainer on the CPU."""
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 0}
    return transformers.TrainingArguments(str(folder), **quiet, **settings)


def rows_of(ids):
    """A data set for a Trainer: each row of ids is its own labels."""
    return [{"input_ids": row, "labels": row} for row in ids]


# ------------------------------------------------------------------------- helpers: running a model
def logits(model, inputs=TEXT):
    """Without gradients."""
    with torch.no_grad():  # a copy: xglm up to 5.0 adds to its position_ids in place
        return model(**copy.deepcopy(inputs)).logits


def gradients(model, inputs=TEXT):
    """By name, of the sum of the squared logits."""
    model.zero_grad()
    torch.manual_seed(0)  # routers of some models draw noise in training
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs = {**inputs, "use_cache": False}  # up to 5.0 recurrent_gemma's has no gradient
    model(**inputs).logits.float().square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def generated_logits(model, inputs, **options):
    """Of four decoded tokens, which are given: the likeliest may be too close to call."""

    def next_token(row, ids):
        return [3 + (int(ids[-1]) + 7) % 40]

    options |= {"max_new_tokens": 4, "do_sample": False, "prefix_allowed_tokens_fn": next_token}
    output = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    return torch.stack(output.logits)


def unless_base_fails(run):
    """What `run` gives; where the model fails without adapters there is nothing to test."""
    try:
        return run()
    except Exception as error:
        pytest.skip(f"fails without adapters: {error!r}"[:200])


# ------------------------------------------------------------------------------- helpers: comparing
def named(name, text):
    """An error that says of which tensor it is."""
    return f"{name}: {text}"


def assert_same(first, second, **tolerance):
    """Two dicts of tensors have the same names and values, at least one."""
    assert first.keys() == second.keys()
    assert first
    for name, tensor in first.items():
        assert_close(tensor, second[name], msg=functools.partial(named, name), **tolerance)


def assert_near(found, expected, tolerance=1e-4):
    """The same names, and values as vectors: for gradients of very different sizes."""
    assert found.keys() == expected.keys()
    assert found
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= tolerance * tensor.norm() + 1e-6, name


def same_logits(first, second):
    """Bit for bit, for the same text."""
    return torch.equal(logits(first), logits(second))


def all_differ(first, second):
    """No tensor is the same in both."""
    return all(not torch.equal(first[name], second[name]) for name in first)


def assert_all_train(model, inputs=TEXT):
    """Every adapter parameter gets a finite gradient, not all zero; nothing else gets one."""
    found = gradients(model.train(), inputs)
    assert found.keys() == trained(model).keys()
    assert [name for name in found if "monkeyjump" not in name] == []
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
        assert gradient.any(), name


def assert_saved_and_loaded(model, fresh, inputs, folder):
    """Through the folder the fresh base becomes the same model."""
    save_adapter(model.eval(), folder)
    load_adapter(fresh, folder)
    assert_same(fresh.state_dict(), model.state_dict(), **EXACT)
    assert_close(logits(fresh, inputs), logits(model, inputs), **CLOSE)


def shape_of(model):
    """What is neither a parameter's nor a buffer's value: hooks, classes, attributes, names."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    kinds = [(type(m), m.training, sorted(vars(m))) for m in model.modules()]
    return hooks, kinds, list(model.state_dict()), [p.requires_grad for p in model.parameters()]


def values_of(model):
    """By name, copies of the values; of tensors on meta, which have none, their names alone."""
    state = model.state_dict().items()
    return {name: torch.empty(0) if t.is_meta else t.clone() for name, t in state}


@contextlib.contextmanager
def unchanged(model):
    """Nothing in the model is another one at the end."""
    shape, values = shape_of(model), values_of(model)
    yield
    assert shape_of(model) == shape
    assert_same(values_of(model), values, **EXACT)


@contextlib.contextmanager
def refused(model, message):
    """A ValueError that says so, after which nothing in the model is another one."""
    with unchanged(model), pytest.raises(ValueError, match=message) as error:
        yield error


# -------------------------------------------------------------------------- helpers: looking inside
def experts_of(model):
    """By block, the names of its experts, where it has any."""
    found = {}
    for path, module in model.named_modules():
        router = getattr(module, "monkeyjump", None)
        if isinstance(router, mj.Router) and router.experts:
            found[path] = list(router.experts)
    return found


@contextlib.contextmanager
def noted_gates(given=None):
    """The gates of every routed call within, in order; those given are handed out instead."""
    noted, route, instead = [], mj.route, iter(given or ())

    def noting(*args, **kwargs):
        gates, best = route(*args, **kwargs)
        if given is not None:
            gates = next(instead)
        noted.append(gates.detach().clone())
        return gates, best

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mj, "route", noting)
        yield noted


@contextlib.contextmanager
def noted_calls(model, pattern):
    """By path, arguments and output of every call within of the modules whose path matches."""
    seen, handles = {}, []
    for path, module in model.named_modules():
        if re.search(pattern, path):
            calls = seen.setdefault(path, [])

            def note(module, args, output, calls=calls):
                # A copy: some models write into what a projection gives.
                calls.append((args, output.clone() if torch.is_tensor(output) else output))

            handles.append(module.register_forward_hook(note))
    yield seen
    for handle in handles:
        handle.remove()


def inputs_of(seen):
    """By path, the first arguments of the calls that noted_calls saw."""
    return {path: [args[0].detach() for args, _ in calls] for path, calls in seen.items()}


# ---------------------------------------------------------------------- helpers: copies and threads
def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_a_file(model):
    """A copy by torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": through_pickle, "torch.save": through_a_file}


@contextlib.contextmanager
def threads_change_often():
    """Within, so that what they share is seen."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


# -------------------------------------------------------------------------------- helpers: decoding
def talk(model, turns, cache=None):
    """A conversation: the logits of each turn, one at a time."""
    for ids in turns:
        with torch.no_grad():
            output = model(ids, use_cache=True, **{CACHE: cache})
        cache = output[CACHE]
        yield output.logits


# ----------------------------------------------------------------------------- helpers: saved files
@contextlib.contextmanager
def noted_states(folder):
    """At every line that runs within: the folder's files, as a kill would leave them."""
    states, outside = [], sys.gettrace()

    def look(frame, event, arg):
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        if not states or files != states[-1]:
            states.append(files)
        return look

    sys.settrace(look)
    try:
        yield states
    finally:
        sys.settrace(outside)


def rewrite(folder, tensors=None, text=None, **options):
    """The file anew with other tensors (None: without), other options, or a text for a config."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["config"])
    metadata["config"] = text or json.dumps({**config, **options})
    content = {**load_file(folder / WEIGHTS), **(tensors or {})}
    content = {name: tensor for name, tensor in content.items() if tensor is not None}
    save_file(content, folder / WEIGHTS, metadata)


def assert_refused(folder, message):
    """By a plain model and by an adapted one, which stay as they were; the error says where."""
    for model in (tiny_llama(), adapted(seed=7)):
        with refused(model, message) as error:
            load_adapter(model, folder)
        assert str(folder) in str(error.value)


# ----------------------------------------------------------------------- helpers: several processes
def whole(tensors):
    """By name, copies of the tensors that are parts on each rank put together."""
    full = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in tensors.items()}
    return {name: tensor.detach().clone() for name, tensor in full.items()}


def sharded(model, kind):
    """What its training calls: the model in DDP, or itself, in parts by FSDP2 on the CPU."""
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for module in (*model.model.layers, model):
        torch.distributed.fsdp.fully_shard(module, mesh=mesh)
    return model


def to_distribute():
    return adapted(ema_momentum=0.4)


def work_by_zero(rank, stage, folder):
    """One of two processes of DeepSpeed, with its half of every batch."""
    import deepspeed

    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    here |= {"MASTER_PORT": 29517 + stage, "DS_ACCELERATOR": "cpu"}
    os.environ.update({name: str(value) for name, value in here.items()})
    deepspeed.init_distributed(dist_backend="gloo")
    model = torch.load(f"{folder}/model.pt", weights_only=False)
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.05)
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
    settings |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    engine.train()
    for ids in torch.load(f"{folder}/batches.pt"):
        half = ids.chunk(2)[rank]
        engine.backward(engine(input_ids=half, labels=half).loss)
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        torch.save(whole(trained(model) | centers(model)), f"{folder}/rank{rank}.pt")
        save_adapter(model, f"{folder}/saved")
    torch.distributed.destroy_process_group()


BATCHES = [batch(4, seed=seed) for seed in range(4)]


def work(rank, kind, folder):
    """One of two processes: from a pickled model, with its half of every batch, in two parts."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = torch.load(f"{folder}/model.pt", weights_only=False)
    halves = [ids.chunk(2)[rank] for ids in torch.load(f"{folder}/batches.pt")]
    start = centers(model)
    init_router_centers(model, halves, subset_size=4 * 4 * 9, kmeans_iters=50)
    found = {"clustered": centers(model)}
    with noted_calls(model, BLOCKS) as seen:  # one has enough after nine batches of two tokens
        init_router_centers(model, 9 * [batch(1, 1 + rank)], subset_size=18)
    found["calls"] = {len(calls) for calls in seen.values()}
    model.load_state_dict(start, strict=False)
    found["gradients"] = whole(train(model, halves, forward=sharded(model, kind), parts=2)[0])
    save_adapter(model, f"{folder}/saved")
    found["trained"] = whole(trained(model) | centers(model))
    model.eval()(halves[0])  # which leaves FSDP2's root gathered
    try:
        load_adapter(model, f"{folder}/other")
        found["refused"] = False
    except ValueError:
        found["refused"] = True
    found["loaded"] = whole(trained(model) | centers(model))
    torch.save(found, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------- helpers: every architecture
def base_of(model_type):
    """A tiny model; where even its builder fails, the test is skipped."""
    return unless_base_fails(lambda: tiny_model(model_type))


# ---------------------------------------------------------------------------- helpers: PEFT and TRL
# It scales down_proj's input, not its output.
IA3 = {"target_modules": [*PROJECTIONS, "down_proj"], "feedforward_modules": ["down_proj"]}
PEFT_METHODS = {
    "LoRA": ("LoraConfig", {"r": 4}),
    "DoRA": ("LoraConfig", {"r": 4, "use_dora": True}),
    "LoRA with bias": ("LoraConfig", {"r": 4, "lora_bias": True}),
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 4, "total_step": 10}),
    "LoHa": ("LoHaConfig", {"r": 4}),
    "LoKr": ("LoKrConfig", {"r": 4}),
    "HRA": ("HRAConfig", {"r": 4}),
    "MiSS": ("MissConfig", {"r": 4}),
    "VeRA": ("VeraConfig", {"r": 8}),
    "OFT": ("OFTConfig", {"r": 0, "oft_block_size": 4}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4}),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 50}),
    "IA3": ("IA3Config", IA3),
}


def shaken(model):
    """Away from the initial identity: noise on all that is trained."""
    torch.manual_seed(1)
    for parameter in trained(model).values():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def peft_config(method="LoRA", **settings):
    """PEFT's config of this method for the attention."""
    peft, (name, of_method) = pytest.importorskip("peft"), PEFT_METHODS[method]
    kind = getattr(peft, name, None) or pytest.skip(f"this PEFT has no {name}")
    return kind(**{"target_modules": PROJECTIONS, **of_method, **settings})


def peft_llama(method="LoRA", base=None, **settings):
    """A model with PEFT's adapters, which do something."""
    peft, base = pytest.importorskip("peft"), tiny_llama() if base is None else base
    return shaken(peft.get_peft_model(base, peft_config(method, **settings)))


def routed(model, **settings):
    """A copy of a PEFT model whose adapters are routed."""
    settings = {"top_k": 2, "temperature": 0.1, **settings}
    return apply_monkeyjump(copy.deepcopy(model), adapter="peft", **settings)


def slow_gate(block, router, expert):
    """Gates [B, T, 1] of one expert: softmax over all, then the top 2 of it, made to sum to 1."""
    cosines = F.cosine_similarity(block.hidden[:, :, None], router.centers, dim=-1)
    p = (cosines / 0.1).softmax(dim=-1)
    p = p * (p >= p.topk(2).values[..., -1:])
    return (p / p.sum(dim=-1, keepdim=True))[..., expert, None]


def routed_slowly(model, like):
    """The same model, routed by the definition y = base + gate (adapted - base)."""
    model = copy.deepcopy(model)

    def keep_hidden(block, args):
        block.hidden = args[0].detach().float()

    for path, experts in experts_of(like).items():
        block, router = model.get_submodule(path), like.get_submodule(path).monkeyjump
        block.register_forward_pre_hook(keep_hidden)
        for expert, name in enumerate(experts):
            layer = block.get_submodule(name)

            def forward(x, layer=layer, block=block, router=router, expert=expert, **kwargs):
                base, y = layer.get_base_layer()(x), type(layer).forward(layer, x, **kwargs)
                return base + slow_gate(block, router, expert).to(base) * (y - base)

            layer.forward = forward
    return model


def assert_routed(fast, model, tolerance=1e-5):
    """As by the definition; and routing does something."""
    found, expected = logits(fast), logits(routed_slowly(model, fast))
    assert_close(found, expected, atol=tolerance, rtol=100 * tolerance)
    assert not torch.allclose(found, logits(model), atol=1e-3)


CHAT = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}</s>{% endfor %}"


def byte_tokenizer():
    """A token a byte, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>", "<image>"]
    words = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def byte_llama():
    """A tiny model with room for every byte."""
    return tiny_llama(vocab_size=260, max_position_embeddings=512)


def dpo_trainer(adapter, folder):
    """TRL's trainer, over a model routed by sequence."""
    rows = []
    for number in range(8):
        rows.append({"prompt": f"{number} and 1:", "chosen": f"{number + 1}", "rejected": "none"})
    model = byte_llama()
    if adapter == "peft":
        model = pytest.importorskip("peft").get_peft_model(model, peft_config())
    settings = {"max_steps": 3, "learning_rate": 1e-2, "max_length": 32, "logging_steps": 1}
    settings |= {"per_device_train_batch_size": 2, "save_strategy": "no", "report_to": []}
    settings |= {"gradient_checkpointing": True, "bf16": False, "use_cpu": True}
    # Now, while the model is its own reference; PEFT's adapters TRL can switch off.
    settings["precompute_ref_log_probs"] = adapter != "peft"
    return pytest.importorskip("trl").DPOTrainer(
        model=apply_monkeyjump(model, adapter=adapter, rep_mode="prompt_end"),
        args=pytest.importorskip("trl").DPOConfig(output_dir=str(folder), **settings),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
    )


# ---------------------------------------------------------------------- helpers: the slow reference
def naive_unit(vector):
    """The vector in float64, of length 1; zero stays zero."""
    vector = vector.double()
    norm = vector.pow(2).sum().sqrt()
    return vector / norm if norm > 0 else vector


def naive_representation(hidden, mode, real, prompt_end):
    """Hidden [T, D] of one sequence, real: a bool a token -> a vector for each token."""
    positions = [t for t, is_real in enumerate(real) if is_real]
    if mode == "token":
        return list(hidden)
    if mode == "mean":
        vector = sum(hidden[t].double() for t in positions) / len(positions)
    elif mode == "last" or prompt_end is None:
        vector = hidden[positions[-1]]
    else:
        vector = hidden[prompt_end]
    return [vector] * len(hidden)


def naive_gates(vector, expert_centers, top_k, temperature):
    """The softmax over all experts, cut to the top-k and made to sum to 1."""
    cosines = [float(naive_unit(vector) @ naive_unit(center)) for center in expert_centers]
    exponentials = [math.exp(cosine / temperature) for cosine in cosines]
    p = [exponential / sum(exponentials) for exponential in exponentials]
    best = sorted(range(len(p)), key=lambda e: -p[e])[:top_k]
    total = sum(p[e] for e in best)
    return [p[e] / total if e in best else 0.0 for e in range(len(p))]


def naive_delta(tensors, adapter, x, base, alpha=16.0, rank=2, degree=15):
    """What an adapter adds for one token: x [in], base = W x [out] -> [out]."""
    if adapter == "propulsion":
        return base * ((1 + tensors["propulsion"]) ** degree - 1)
    inner = tensors["lora_A"] @ x
    if adapter == "adalora":
        inner = inner * tensors["lora_E"]
    return alpha / rank * (tensors["lora_B"] @ inner)


def naive_move(old, calls, momentum):
    """Centers [E, D] by name, after the inputs of their blocks' calls went to the nearest."""
    new = {}
    for path, noted in calls.items():
        name = f"{path}.monkeyjump.centers"
        current = [naive_unit(center) for center in old[name]]
        assigned = [[] for _ in current]
        for (hidden, *_), _ in noted:
            for vector in map(naive_unit, hidden.detach().flatten(0, 1)):
                cosines = [float(center @ vector) for center in current]
                assigned[cosines.index(max(cosines))].append(vector)
        for e, own in enumerate(assigned):
            if own:
                mean = sum(own) / len(own)
                current[e] = naive_unit(momentum * current[e] + (1 - momentum) * mean)
        new[name] = torch.stack(current).float()
    return new


# -------------------------------------------------------------------------------------- the options
WRONG_VALUES = {
    "rank": [0, True, 2.0],
    "alpha": [0, math.nan, "1"],
    "dropout": [1.0, -0.1],
    "degree": [0],
    "top_k": [0],
    "temperature": [0.0],
    "ema_momentum": [1.1, None],
    "rep_mode": ["first", 1],
    "jitter_noise": [-0.1, 1.0],
    "update_every": [0],
    "update_until": [-1, 1.5],
    "adapter": ["dora"],
    "blocks": [["LlamaDecoderLayer"], "not JSON"],
}
WRONG_VALUES = [(name, value) for name, values in WRONG_VALUES.items() for value in values]


class OnlySquare(mj.ADAPTERS["lora"]):
    """An adapter that cannot be made for every projection: q_proj comes first, k_proj fails."""

    def __init__(self, in_features, out_features, *args, **kwargs):
        super().__init__(in_features, out_features, *args, **kwargs)
        if in_features != out_features:
            raise ValueError("not square")


UNFIT = {
    "an unknown adapter": ({"adapter": "dora"}, "'dora'.+lora, lorafa, adalora, propulsion"),
    "an adapter that fails": ({"adapter": OnlySquare}, "not square"),
    "a built-in adapter's name": ({"adapter": type("lora", (mj.Adapter,), {})}, "lora"),
    "too many experts a token": ({"top_k": 5}, "top_k=5: must be at most 4"),
    "another model's block": ({"blocks": {"GPT2Block": [0]}}, "GPT2Block.+LlamaDecoderLayer"),
    "too large an index": ({"blocks": {"LlamaDecoderLayer": [0, 2]}}, r"\[0, 2\].+LlamaDecoder"),
    "a negative index": ({"blocks": {"LlamaDecoderLayer": [-1]}}, r"\[-1\].+LlamaDecoder"),
    "the whole model as a block": ({"blocks": {"LlamaModel": [0]}}, "LlamaModel.+LlamaDecoder"),
    "no blocks": ({"blocks": {}}, "blocks=.+LlamaDecoderLayer"),
    "an unknown linear": ({"linears": ["q_proj", "qkv"]}, "'qkv'.+there are mlp.down_proj"),
    "no linears": ({"linears": []}, "linears"),
    "an unknown shared expert": ({"shared_expert": "gate"}, "'gate'.+there are mlp.down_proj"),
}


@pytest.mark.parametrize(("name", "value"), WRONG_VALUES, ids=lambda part: str(part))
def test_a_wrong_value_is_refused_in_words_that_name_it(name, value):
    model = tiny_llama()
    with refused(model, f"{name}=.*must (be|map)"):
        apply_monkeyjump(model, **{name: value})


@grid(case=UNFIT)
def test_options_that_do_not_fit_the_model_are_refused_with_what_there_is(case, monkeypatch):
    settings, message = case
    monkeypatch.setattr(mj, "ADAPTERS", dict(mj.ADAPTERS))
    model = tiny_llama()
    with refused(model, message):
        apply_monkeyjump(model, **settings)


def test_a_config_and_its_fields_say_the_same_and_short_forms_are_taken():
    blocks = {"LlamaDecoderLayer": [1]}
    names = {"linears": ["q_proj"], "shared_expert": ["o_proj"]}
    config = mj.MonkeyJumpConfig(blocks=blocks, **names, top_k=1)
    model = apply_monkeyjump(tiny_llama(), config)
    short = {"blocks": json.dumps(blocks), "linears": "q_proj", "shared_expert": "o_proj"}
    other = apply_monkeyjump(tiny_llama(), **short, top_k=1)
    assert other.monkeyjump_wiring.config == model.monkeyjump_wiring.config


def test_every_option_is_explained_and_has_a_default():
    fields = dataclasses.fields(mj.MonkeyJumpConfig)
    assert [field.name for field in fields if not field.metadata.get("help")] == []
    mj.MonkeyJumpConfig()


# -------------------------------------------------------------------------------------- mathematics
@grid(top_k=[1, 2, 3, 5, 9], temperature=[0.1, 1.0])
def test_route_is_softmax_over_all_experts_cut_to_the_top_k_and_renormalised(top_k, temperature):
    torch.manual_seed(0)
    points, c = mj.unit(torch.randn(7, 16)), mj.unit(torch.randn(5, 16))
    gates, best = mj.route(points, c, top_k, temperature)
    expected = [naive_gates(point, c, min(top_k, 5), temperature) for point in points]
    assert_close(gates, torch.tensor(expected), atol=1e-6, rtol=1e-5)
    assert best.tolist() == torch.tensor(expected).argmax(dim=1).tolist()


def test_what_is_equally_near_to_all_experts_is_shared_by_the_top_k():
    centers = mj.unit(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)))
    gates, _ = mj.route(torch.zeros(3, 16), centers, top_k=2)
    assert gates.sort(dim=-1).values.tolist() == [[0, 0, 0, 0.5, 0.5]] * 3


def test_jitter_noise_multiplies_the_logits_within_its_range():
    torch.manual_seed(0)
    points, c = mj.unit(torch.randn(500, 16)), mj.unit(torch.randn(2, 16))
    gates, _ = mj.route(points, c, 2, temperature=1.0, jitter_noise=0.5)
    logits = points @ c.T
    found = torch.logit(gates[:, 0].double())  # the difference of the noisy logits
    off = (found - (logits[:, 0] - logits[:, 1])).abs()
    within = off <= 0.5 * logits.abs().sum(dim=1) + 1e-5
    assert within.all()
    assert off.mean() > 0.01


def test_statistics_count_finite_real_vectors_only():
    torch.manual_seed(0)
    raw, real = torch.randn(10, 6) * 100, torch.arange(10) < 8
    raw[2], raw[3, 2], raw[4, 0], raw[5] = torch.full((6,), 1e-30), math.nan, math.inf, 0.0
    points, c = mj.unit(raw), mj.unit(torch.randn(3, 6))
    best = mj.route(points, c, 2)[1]
    expected = torch.zeros(3, 7, dtype=torch.double)
    for n in (0, 1, 6, 7):
        expected[best[n], :6] += naive_unit(raw[n])
        expected[best[n], 6] += 1
    found = mj.cluster_statistics(points, best, 3, real)
    assert_close(found.double(), expected, **CLOSE)


def test_kmeans_finds_planted_clusters():
    torch.manual_seed(0)
    planted = mj.unit(torch.randn(4, 24))
    points = mj.unit(planted.repeat_interleave(50, dim=0) + 0.05 * torch.randn(200, 24))
    found = mj.kmeans(points, 4, 10, torch.Generator().manual_seed(5))
    assert (planted @ found.T).amax(dim=1).min() > 0.99
    assert_close(found.norm(dim=-1), torch.ones(4))


def test_kmeans_of_points_that_are_all_the_same_is_finite():
    points = mj.unit(torch.ones(6, 4))
    assert mj.kmeans(points, 3, 4, torch.Generator().manual_seed(0)).isfinite().all()


# ---------------------------------------------- adapters, promise 1: the identity, at what it costs
@grid(mode=mj.REP_MODES, adapter=OWN_ADAPTERS)
def test_at_init_every_projection_is_the_bases_bit_for_bit(adapter, mode):
    model, ids = tiny_llama(), batch()
    with noted_calls(model, "_proj$|lm_head$") as seen:
        model(ids)
        apply_monkeyjump(model, adapter=adapter, rep_mode=mode, shared_expert="up_proj")
        model(ids)
        model.train()(input_ids=ids, labels=ids)
    for (_, plain), (_, evaluated), (_, in_training) in seen.values():
        assert torch.equal(evaluated, plain)
        assert torch.equal(in_training, plain)


TRAINED = {
    "lora": ["lora_A", "lora_B"],
    "lorafa": ["lora_B"],
    "adalora": ["lora_A", "lora_B", "lora_E"],
    "propulsion": ["propulsion"],
}


@grid(adapter=OWN_ADAPTERS)
def test_only_the_adapters_own_parameters_are_trained(adapter):
    model = apply_monkeyjump(tiny_llama(), adapter=adapter, shared_expert="up_proj")
    expected = set()
    for index, path in itertools.product(range(2), [*EXPERTS, "mlp.up_proj"]):
        for ending in TRAINED[adapter]:
            expected.add(f"model.layers.{index}.{path}.monkeyjump.{ending}")
    assert set(trained(model)) == expected


QWEN = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
QWEN |= {"num_attention_heads": 14, "num_key_value_heads": 2}
LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
LLAMA |= {"num_attention_heads": 32, "num_key_value_heads": 8}
FOUR_ROUTED = {"linears": PROJECTIONS}
THREE_ROUTED = {"linears": PROJECTIONS[:3], "shared_expert": ["o_proj", "gate_proj"]}
PUBLISHED = {
    "Qwen2-0.5B, lora": (QWEN, {"adapter": "lora", **FOUR_ROUTED}, 270_336),
    "Qwen2-0.5B, adalora": (QWEN, {"adapter": "adalora", **FOUR_ROUTED}, 270_528),
    "Qwen2-0.5B, lorafa": (QWEN, {"adapter": "lorafa", **FOUR_ROUTED}, 98_304),
    "Qwen2-0.5B, propulsion": (QWEN, {"adapter": "propulsion", **FOUR_ROUTED}, 49_152),
    "Llama-3-8B, lora": (LLAMA, THREE_ROUTED, 2_883_584),
}


@grid(case=PUBLISHED)
def test_trainable_parameters_are_the_published_numbers(case, capsys):
    shape, settings, published = case
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, **shape))
    apply_monkeyjump(model, rank=2, **settings)
    line = mj.print_trainable_parameters(model)
    assert f"trainable params: {published:,} " in line
    assert line in capsys.readouterr().out


def test_packed_four_bit_weights_are_counted_as_the_parameters_that_they_hold():
    model = tiny_llama()
    total = sum(p.numel() for p in model.parameters())
    for block in model.model.layers:
        block.self_attn.q_proj = by_bitsandbytes(block.self_attn.q_proj, bits=4)
    model = apply_monkeyjump(model, rank=2)
    new = sum(p.numel() for p in trained(model).values())
    line = mj.print_trainable_parameters(model)
    assert line.startswith(f"trainable params: {new:,} || all params: {total + new:,} ||")


# ---------------------------------------------------------------- adapters: the published equations
def assert_token_follows_equations(model, seen, block, row, t, vectors, adapter, settings):
    """One token of one row, in float64: the gates it was given, and each projection's output."""
    gates = naive_gates(vectors[t], model.get_buffer(f"{block}.monkeyjump.centers"), 2, 0.3)
    paths = [*EXPERTS, "mlp.up_proj"]  # the last one is shared
    for gate, path in zip([*gates, 1.0], paths, strict=True):
        layer = model.get_submodule(f"{block}.{path}")
        [((x, *_), y)] = seen[f"{block}.{path}"]
        [((_, _, given), _)] = seen[f"{block}.{path}.monkeyjump"]
        given = torch.as_tensor(given).expand(2, 9, 1)[row, t, 0]
        assert float(given) == pytest.approx(gate, abs=1e-5)  # whatever alpha and rank are
        x, y = x[row, t].double(), y[row, t].double()
        base = layer.weight.double() @ x
        own = {name: tensor.double() for name, tensor in layer.monkeyjump.state_dict().items()}
        delta = naive_delta(own, adapter, x, base, **settings)
        assert_close(y, base + gate * delta, **NEAR)


@torch.no_grad()
@grid(mode=mj.REP_MODES, adapter=OWN_ADAPTERS)
def test_every_projection_of_every_token_follows_the_published_equations(adapter, mode):
    settings = {"alpha": 12.0, "rank": 3, "degree": 9}
    model = adapted(adapter, rep_mode=mode, shared_expert="up_proj", temperature=0.3, **settings)
    ends = (3, 6)
    with noted_calls(model, f"_proj$|monkeyjump$|{BLOCKS}") as seen:
        model(input_ids=batch(), prompt_end=torch.tensor(ends))
    for index, row in itertools.product(range(2), range(2)):
        block = f"model.layers.{index}"
        hidden = seen[block][0][0][0][row]
        vectors = naive_representation(hidden, mode, [True] * 9, ends[row])
        for t in range(9):
            assert_token_follows_equations(model, seen, block, row, t, vectors, adapter, settings)


@grid(adapter=OWN_ADAPTERS)
def test_adapters_change_the_output_but_while_they_are_disabled_also_after_an_error(adapter):
    model, expected = adapted(adapter, shared_expert="up_proj"), logits(tiny_llama())
    with pytest.raises(KeyError), disable_adapters(model):
        assert torch.equal(logits(model), expected)
        raise KeyError
    assert (logits(model) - expected).abs().max() > 1e-2


def test_every_match_of_a_name_is_an_expert_in_the_order_of_the_names():
    model = apply_monkeyjump(tiny_model("gpt2"), linears=["c_proj", "attn.c_attn"])
    assert experts_of(model)["transformer.h.0"] == ["attn.c_proj", "mlp.c_proj", "attn.c_attn"]


# ----------------------------------------------- the router, promise 3: no gradient goes through it
def test_gates_are_constants_for_the_gradient():
    """The gradient with respect to the input is exactly the one with the gates as given numbers."""
    model = adapted()
    embeddings = model.get_input_embeddings()(batch(1, 5)).detach().requires_grad_()
    found, gates = [], None
    for _ in range(2):
        with noted_gates(gates) as noted:
            loss = model(inputs_embeds=embeddings).logits.pow(2).sum()
        found.append(torch.autograd.grad(loss, [embeddings, *trained(model).values()]))
        gates = [torch.tensor(g.tolist()) for g in noted]
    assert len(gates) == 2
    assert_close(*found, **EXACT)


def test_gates_are_computed_in_float32_under_autocast():
    model = adapted()
    embeddings = model.get_input_embeddings()(batch())  # what block 0 sees in both
    with noted_gates() as expected:
        model(inputs_embeds=embeddings)
    with noted_gates() as found, torch.autocast("cpu", torch.bfloat16):
        model(inputs_embeds=embeddings)
    assert torch.equal(found[0], expected[0])


# ------------------------------------------------------------------------- the paper's two theorems
def update_rank(points, gates):
    """The rank of what all experts together add to the tokens' outputs [T, E * out]."""
    torch.manual_seed(0)
    config = mj.MonkeyJumpConfig(rank=2)
    added = []
    for expert in range(gates.shape[-1]):
        adapter = mj.ADAPTERS["lora"](8, 8, config, torch.device("cpu"))
        nn.init.normal_(adapter.lora_B)
        gate = gates[None, :, expert, None]  # [1, T, 1]
        added.append(adapter(points[None], torch.zeros(1, len(points), 8), gate)[0])
    return int(torch.linalg.matrix_rank(torch.cat(added, dim=1), rtol=1e-4))


def test_a_routed_update_has_a_higher_rank_than_the_shared_one_on_tokens_of_low_rank():
    """Tokens of four clusters in a plane: shared adapters add a plane, routed ones four lines."""
    plane = torch.linalg.qr(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)))[0]
    angles = torch.arange(12.0) // 3 * (math.pi / 2)  # three tokens in each direction
    points = torch.stack([angles.cos(), angles.sin()], dim=1) @ plane.T
    four_centers = points[::3]
    routed, _ = mj.route(points, four_centers, top_k=1)
    shared = torch.ones(12, 4)
    assert (update_rank(points, shared), update_rank(points, routed)) == (2, 4)


@pytest.mark.parametrize(("position", "first_changes"), [(0, True), (4, False)])
def test_the_last_position_tells_any_two_sequences_apart_the_first_one_does_not(
    position, first_changes
):
    """Why `last` is what a causal model's sequence is routed by."""
    ids = batch(1, 5).repeat(2, 1)
    ids[1, position] = 2 + ids[0, position] % 48
    model = adapted()
    with noted_calls(model, r"model\.norm$") as seen:
        logits(model, {"input_ids": ids})
    [hidden] = inputs_of(seen)["model.norm"]
    differs = (hidden[0] - hidden[1]).abs().amax(dim=-1) > 1e-4
    assert bool(differs[-1])
    assert bool(differs[0]) == first_changes


# -------------------------------------------------- promise 5: centers move when an optimizer steps
def by_sgd(model):
    return torch.optim.SGD(trained(model).values(), lr=0.05).step


def by_adamw(model):
    return torch.optim.AdamW(trained(model).values(), lr=1e-3).step


def by_two_optimizers(model):
    weights = list(trained(model).values())
    first = torch.optim.SGD(weights[::2], lr=0.05)
    second = torch.optim.AdamW(weights[1::2], lr=1e-3)

    def step():
        first.step()
        second.step()

    return step


def by_hand(model):
    return functools.partial(update_router_centers, model)


STEPS = {"SGD": by_sgd, "AdamW": by_adamw, "two optimizers": by_two_optimizers, "by hand": by_hand}
# update_every, update_until, and in how many micro-batches a step accumulates.
SCHEDULES = {
    "every step": (1, None, 1),
    "every step, accumulated": (1, None, 3),
    "every second": (2, None, 2),
    "up to the second": (1, 2, 1),
    "every third, up to the fourth": (3, 4, 2),
    "never": (1, 0, 1),
}
MOVES = {f"{name}, every step": (kind, SCHEDULES["every step"]) for name, kind in STEPS.items()}
MOVES |= {f"SGD, {name}": (by_sgd, schedule) for name, schedule in SCHEDULES.items()}


def assert_step_moves_as_the_naive_loop(model, step, expected, seen, number):
    """Before the step the centers are the old ones; after it, if due, those of all calls seen."""
    config = model.monkeyjump_wiring.config
    assert_same(centers(model), expected, **CLOSE)
    step()
    if number % config.update_every == 0:
        if config.update_until is None or number <= config.update_until:
            expected = naive_move(expected, seen, config.ema_momentum)
        seen = {path: [] for path in seen}
    assert_same(centers(model), expected, **CLOSE)
    return expected, seen


@grid(case=MOVES)
def test_centers_move_when_an_optimizer_steps_by_all_that_was_seen_since(case):
    kind, (every, until, parts) = case
    model = adapted(ema_momentum=0.6, update_every=every, update_until=until).train()
    step, start = kind(model), centers(model)
    expected, seen = start, {f"model.layers.{index}": [] for index in range(2)}
    for number in range(1, 7):
        with noted_calls(model, BLOCKS) as calls:
            for ids in batch(2 * parts, seed=number).chunk(parts):
                model(input_ids=ids, labels=ids).loss.backward()
        seen = {path: seen[path] + calls[path] for path in seen}
        expected, seen = assert_step_moves_as_the_naive_loop(model, step, expected, seen, number)
        model.zero_grad()
    assert all_differ(centers(model), start) == (until != 0)


def test_centers_learn_nothing_from_forwards_that_do_not_train():
    model, plain = adapted().train(), adapted().train()
    for each in (model, plain):
        each(input_ids=batch(), labels=batch())
    with torch.no_grad():
        model(batch(seed=50))
    model.eval()(batch(seed=51))
    with disable_adapters(model.train()):
        model(batch(seed=52))  # the reference pass of DPO
    for each in (model, plain):
        update_router_centers(each)
    assert_same(centers(model), centers(plain), **EXACT)


def skipped_by_a_scaler(model):
    """GradScaler does not call an optimizer whose gradients are infinite."""
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.05)
    next(iter(trained(model).values())).grad.fill_(math.inf)
    scaler.step(optimizer)
    scaler.update()


def skipped_by_itself(model):
    """A fused optimizer is called all the same, and skips the step by itself."""
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.05, fused=True)
    optimizer.found_inf = optimizer.grad_scale = torch.ones(1)
    optimizer.step()


@grid(skip=[skipped_by_a_scaler, skipped_by_itself])
def test_a_skipped_step_moves_nothing_and_loses_nothing(skip):
    model = adapted(ema_momentum=0.6).train()
    start = centers(model)
    with noted_calls(model, BLOCKS) as seen:
        model(input_ids=batch(), labels=batch()).loss.backward()
    skip(model)
    assert_same(centers(model), start, **EXACT)
    model.zero_grad()
    by_sgd(model)()
    assert_same(centers(model), naive_move(start, seen, 0.6), **CLOSE)


# ------------------------------------------- applying and removing, promise 2: names, types, copies
OUR_TENSORS = r"\.monkeyjump\.(\w*(lora_[ABE]|propulsion)|centers|pending|steps)$"


@grid(adapter=OWN_ADAPTERS)
def test_parameter_names_of_the_base_stay_and_ours_exist_before_the_first_forward(adapter):
    model = apply_monkeyjump(tiny_llama(), adapter=adapter, shared_expert="up_proj")
    names = list(model.state_dict())
    kept = [name for name in names if not re.search(OUR_TENSORS, name)]
    assert kept == list(tiny_llama().state_dict())
    train(model, [batch()])
    assert list(model.state_dict()) == names


def test_types_of_all_modules_stay():
    modules = dict(adapted(shared_expert="up_proj").named_modules())
    for path, module in tiny_llama().named_modules():
        before, now = type(module), type(modules[path])
        assert issubclass(now, before), path
        assert (now.__name__, str(now)) == (before.__name__, str(before))


def test_removing_gives_the_base_back_bit_for_bit():
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    with unchanged(model):
        adapted("adalora", model, shared_expert="up_proj")
        train(model, [batch()])
        assert remove_monkeyjump(model.eval()) is model


def test_plain_transformers_loads_what_an_adapted_model_saves(tmp_path):
    adapted().save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert same_logits(again, tiny_llama())


def encoder_decoder():
    config = transformers.T5Config(d_model=8, d_kv=4, num_heads=2, num_layers=1, vocab_size=50)
    return transformers.T5ForConditionalGeneration(config)


def half_on_meta():
    model = tiny_llama()
    model.model.layers[1].to("meta")
    return model


def a_linear():
    return nn.Linear(3, 3)


UNROUTABLE_MODELS = {
    "an encoder-decoder": (encoder_decoder, "encoder-decoder"),
    "offloaded layers": (half_on_meta, "meta"),
    "adapted already": (adapted, "carries Monkey Jump already"),
    "no blocks": (a_linear, "blocks"),
}


@grid(case=UNROUTABLE_MODELS)
def test_a_model_that_cannot_be_routed_is_refused_before_anything_is_touched(case):
    make, message = case
    model = make()
    with refused(model, message):
        apply_monkeyjump(model)


def save(model):
    save_adapter(model, "never made")


def init_centers(model):
    init_router_centers(model, [])


def record(model):
    with record_routing(model):
        pass


NEED_ADAPTERS = [remove_monkeyjump, update_router_centers, save, init_centers, record]


@grid(call=NEED_ADAPTERS)
def test_what_needs_an_adapted_model_says_so(call):
    with pytest.raises(ValueError, match="LlamaForCausalLM carries no Monkey Jump"):
        call(tiny_llama())


# ============================================= what makes it hold: the file's second half, in order
# -------------------------------------------------------------------------------- centers from data
@grid(mode=mj.REP_MODES)
def test_centers_start_as_the_kmeans_of_the_real_representations(mode):
    model, loader = adapted(rep_mode=mode).train(), [left_padded(seed) for seed in range(4)]
    model(batch(), prompt_end=torch.tensor([3, 6]))  # seen before: no part of the new centers
    with noted_calls(model, BLOCKS) as seen:
        init_router_centers(model, loader, subset_size=1000, kmeans_iters=20)
    assert all(module.training for module in model.modules())
    update_router_centers(model)
    points = []
    for index, hidden in enumerate(torch.cat(inputs_of(seen)["model.layers.1"])):
        real = loader[0]["attention_mask"][index % 2].bool().tolist()
        vectors = naive_representation(hidden, mode, real, None)
        wanted = [t for t in range(7) if real[t]] if mode == "token" else [0]
        points += [naive_unit(vectors[t]) for t in wanted]
    points = torch.stack(points)
    found = model.model.layers[1].monkeyjump.centers.double()
    nearest = (points @ found.T).argmax(dim=1)
    assert len(points) == (44 if mode == "token" else 8)
    for e in range(4):  # a fixed point of Lloyd: each center is the mean direction of its points
        assert_close(naive_unit(points[nearest == e].sum(dim=0)), found[e], **LOOSE)


class Stream(torch.utils.data.IterableDataset):
    """Forty batches of unknown number; notes which are read."""

    def __init__(self):
        self.read = []

    def __iter__(self):
        for seed in range(40):
            self.read.append(seed)
            yield {"input_ids": batch(4, 10, seed=seed)}


def clustered(model, seed=0, stream=None):
    """The model with centers from eighty tokens of the stream."""
    loader = torch.utils.data.DataLoader(stream or Stream(), batch_size=None)
    init_router_centers(model, loader, subset_size=80, seed=seed)
    return model


def test_the_same_seed_gives_the_same_centers_and_another_one_others():
    found = [centers(clustered(adapted(), seed)) for seed in (0, 0, 1)]
    assert_same(found[0], found[1], **EXACT)
    assert all_differ(found[0], found[2])


def test_setting_centers_reads_just_enough_batches():
    stream = Stream()
    clustered(adapted(), stream=stream)
    assert len(stream.read) == 8  # an eighth, 10 of 40 tokens, from each batch


def test_setting_centers_draws_nothing_from_the_global_generator():
    model, state = adapted(), torch.get_rng_state()
    init_router_centers(model, [TEXT])
    assert torch.equal(torch.get_rng_state(), state)


def test_centers_set_in_inference_mode_can_move():
    model = adapted()
    with torch.inference_mode():
        clustered(model)
    start = centers(model)
    assert all_differ(train(model, [batch()])[1], start)


UNUSABLE = {
    "no batches": ([], {}, "0 representations.+4 experts"),
    "too few tokens": ([{"input_ids": torch.tensor([[5, 6, 7]])}], {}, "3 representations.+4"),
    "another mode": ([TEXT], {"rep_mode": "mean"}, "rep_mode='mean'.+'token'"),
    "no size": ([TEXT], {"subset_size": 0}, "subset_size=0"),
    "lists of rows, as GRPO's": ([[{"input_ids": row} for row in batch()]], {}, "batch.+tensors"),
    "a data set": ([{"input_ids": row} for row in batch(8)], {}, "batch.+tensors"),
    "an error on the way": ([TEXT, {"nonsense": 1}], {}, None),
}


@grid(case=UNUSABLE)
def test_centers_stay_when_they_cannot_be_set(case):
    loader, settings, message = case
    model = adapted().train()
    with unchanged(model), pytest.raises(ValueError if message else Exception, match=message):
        init_router_centers(model, loader, **settings)


def test_centers_are_set_from_the_data_of_a_trainer():
    model = adapted()
    trainer = types.SimpleNamespace(model=model, get_train_dataloader=lambda: [batch()])
    start = centers(model)
    init_router_centers(trainer)
    assert all_differ(centers(model), start)


def test_a_model_without_a_dataloader_is_refused():
    with pytest.raises(ValueError, match="dataloader"):
        init_router_centers(adapted())


# --------------------------------------------- which rows are real, promise 4: padding is invisible
def by_keywords(model, ids, mask, **more):
    return model(input_ids=ids, attention_mask=mask, **more)[0]


def by_positions(model, ids, mask, **more):
    return model(ids, mask, **more)[0]


def by_the_inner_model(model, ids, mask, **more):
    return model.lm_head(model.model(ids, attention_mask=mask, **more)[0])


# Each entry on one side: what they differ in is where the mask is found.
PADDED = {}
for side, attention in itertools.product(("left", "right"), ("sdpa", "eager")):
    PADDED[f"{side}, {attention}"] = (by_keywords, side, attention)
PADDED["left, mask by position"] = (by_positions, "left", "sdpa")
PADDED["left, inner model called"] = (by_the_inner_model, "left", "sdpa")


def run_padded(model, entry, ids, ends):
    """The logits for ids padded with token 1, in the positions that transformers counts."""
    mask = (ids != 1).long()
    more = {"position_ids": mask.cumsum(1).sub(1).masked_fill(mask == 0, 1)}
    if model.monkeyjump_wiring.config.rep_mode == "prompt_end":
        more["prompt_end"] = torch.tensor(ends)
    return entry(model, ids, mask, **more)


def padded_rows(side):
    """A short row and a full one alone; both and a row of pads together; where the first starts."""
    short, full = batch(1, 5), batch(1, 9, seed=7)
    start = 4 if side == "left" else 0
    padded = F.pad(short, (start, 4 - start), value=1)
    return short, full, torch.cat([padded, full, torch.ones_like(full)]), start


@grid(case=PADDED, mode=mj.REP_MODES)
def test_padding_does_not_show_in_the_logits_of_real_tokens(case, mode):
    entry, side, attention = case
    model = adapted(base=tiny_llama(attn_implementation=attention), rep_mode=mode)
    short, full, together, start = padded_rows(side)
    found = run_padded(model, entry, together, [start + 2, 5, 0])
    alone = [run_padded(model, entry, ids, [end]) for ids, end in ((short, 2), (full, 5))]
    assert_close(found[:1, start : start + 5], alone[0], **NEAR)
    assert_close(found[1:2], alone[1], **NEAR)


@grid(case=PADDED, mode=mj.REP_MODES)
def test_padding_does_not_show_in_the_statistics(case, mode):
    entry, side, attention = case
    base = tiny_llama(attn_implementation=attention)
    together = adapted(base=base, rep_mode=mode, update_every=2).train()
    alone = copy.deepcopy(together)
    short, full, padded, start = padded_rows(side)
    run_padded(together, entry, padded, [start + 2, 5, 0])
    for ids, end in ((short, 2), (full, 5)):
        run_padded(alone, entry, ids, [end])
    for model in (together, alone):
        update_router_centers(model)  # not due: what was seen stays pending
    found = buffers(together, "pending")
    assert_same(found, buffers(alone, "pending"), **NEAR)
    counts = found["model.layers.1.monkeyjump.pending"][:, -1]
    assert float(counts.sum()) == pytest.approx(14 if mode == "token" else 2)


# -------------------------------------------------- which rows are real: packed rows, prompts' ends
ENDS = torch.tensor([0, 5, 9], dtype=torch.int32)
NUMBERS = torch.tensor([[0] * 5 + [1] * 4])
SIGNS_OF_PACKING = {
    "position_ids": torch.tensor([[*range(5), *range(4)]]),
    "attention_mask": (NUMBERS == NUMBERS.T).tril()[None, None],
    "cu_seq_lens_q": ENDS,
    "cu_seqlens": ENDS,
    "seq_idx": NUMBERS,
}


@torch.no_grad()
@grid(sign=list(SIGNS_OF_PACKING))
def test_packed_rows_are_right_in_token_mode(sign):
    rows, model = [batch(1, 5, seed=1), batch(1, 4, seed=2)], adapted()
    given = {name: SIGNS_OF_PACKING[name] for name in ("position_ids", sign)}
    found = model(torch.cat(rows, dim=1), use_cache=False, **given).logits
    expected = torch.cat([model(row).logits for row in rows], dim=1)
    assert_close(found, expected, **CLOSE)


END = torch.tensor([3, 6])
ANSWERS = torch.where(torch.arange(9) > END[:, None], batch(), -100)


@torch.no_grad()
def test_prompt_end_is_before_the_first_label_unless_it_is_given():
    model = adapted(rep_mode="prompt_end")
    given = model(input_ids=batch(), prompt_end=END).logits
    assert torch.equal(given, model(input_ids=batch(), labels=ANSWERS).logits)
    assert torch.equal(given, model(input_ids=batch(), labels=batch(), prompt_end=END).logits)
    assert not torch.allclose(given, logits(model), atol=1e-4)


@grid(labels=[None, torch.full_like(batch(), -100)])
def test_a_prompt_without_an_answer_ends_at_its_last_token(labels):
    model = adapted(rep_mode="prompt_end")
    found = model(input_ids=batch(), labels=labels).logits
    assert torch.equal(found, model(input_ids=batch(), prompt_end=torch.tensor([8, 8])).logits)


def test_in_training_a_prompts_end_is_never_guessed():
    model = adapted(rep_mode="prompt_end").train()
    with disable_adapters(model):
        model(input_ids=batch())  # routes nothing
    with pytest.raises(ValueError, match="prompt_end.+labels|labels.+prompt_end"):
        model(input_ids=batch())


def test_label_smoothing_which_takes_the_labels_away_is_refused_without_prompt_end(tmp_path):
    args = trainer_arguments(tmp_path, label_smoothing_factor=0.1, max_steps=1)
    trainer = Trainer(adapted(rep_mode="prompt_end"), args, train_dataset=rows_of(batch()))
    with pytest.raises(ValueError, match="prompt_end"):
        trainer.train()


# ------------------------------------------------------------------------------ decoding, promise 8
GENERATIONS = {"plain": (1, False, False), "in training mode": (1, False, True)}
GENERATIONS |= {"beams": (3, False, False), "static cache": (1, True, False)}
GENERATIONS |= {"beams, static cache": (3, True, False)}


def assert_scores_are_those_of_one_forward(model, inputs, found, beams):
    """What was decoded with a cache has the scores that it has at once, routed as its prompt."""
    new = found.sequences.shape[1] - inputs["input_ids"].shape[1]
    ids, mask = found.sequences, F.pad(inputs["attention_mask"], (0, new), value=1)
    position_ids = mask.cumsum(1).sub(1).clamp(min=0)
    prompt = {"attention_mask": mask[:, :-new], "position_ids": position_ids[:, :-new]}
    with torch.no_grad(), noted_gates() as gates:
        model(ids[:, :-new], use_cache=False, **prompt)
    is_token = model.monkeyjump_wiring.config.rep_mode == "token"
    with torch.no_grad(), noted_gates(None if is_token else gates):
        logits = model(ids, mask, position_ids=position_ids, use_cache=False).logits
    scores = logits[:, -new - 1 : -1].log_softmax(dim=-1)
    chosen = scores.gather(2, ids[:, -new:, None])[..., 0]
    if beams > 1:
        assert_close(found.sequences_scores, chosen.sum(dim=1), **NEAR)
    else:
        assert_close(chosen, scores.amax(dim=-1), **NEAR)


@grid(mode=mj.REP_MODES, case=GENERATIONS)
def test_cached_generation_equals_uncached_as_the_prompt_was_routed(mode, case):
    beams, static, training = case
    model = adapted(rep_mode=mode).train(training)
    settings = {"max_new_tokens": 5, "do_sample": False, "disable_compile": True}
    settings |= {"num_beams": beams, "length_penalty": 0.0}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    if static:  # one cache for all, emptied in between
        settings[CACHE] = transformers.StaticCache(config=model.config, max_cache_len=12)
    looks_decoded = {"input_ids": batch(2, 1), "attention_mask": torch.ones(2, 1, dtype=torch.long)}
    for inputs in (left_padded(3), left_padded(4), looks_decoded):
        if static:
            settings[CACHE].reset()
        found = model.generate(**inputs, **settings)
        assert_scores_are_those_of_one_forward(model, inputs, found, beams)


TOKENS = [batch(1, 1, seed=1), batch(1, 1, seed=2)]
TALKS = [[batch(1, 6), batch(1, 4, seed=8), *TOKENS]]
TALKS.append([batch(1, 5, seed=9), batch(1, 2, seed=7), *TOKENS])


def test_two_conversations_in_turn_keep_a_routing_each():
    model = adapted(rep_mode="mean")
    alone = [list(talk(model, turns)) for turns in TALKS]
    one, other = [], []
    for first, second in zip(talk(model, TALKS[0]), talk(model, TALKS[1]), strict=True):
        one.append(first)
        other.append(second)
    assert_close([one, other], alone)


def test_each_turn_of_a_conversation_is_routed_anew_and_no_decoded_token_is():
    model, second_turn = adapted(rep_mode="mean"), TALKS[0][1]
    with noted_gates() as gates:
        list(talk(model, TALKS[0]))
        logits(model, {"input_ids": second_turn})
    assert len(gates) == 2 * 3  # two blocks; two turns, and the second one again, by itself
    assert_close(gates[2], gates[4])  # block 0 sees embeddings: of that turn alone


def is_alive(reference):
    gc.collect()
    return reference() is not None


def test_a_model_does_not_keep_a_cache_alive():
    model, cache = adapted(rep_mode="mean"), transformers.DynamicCache()
    model(batch(), **{CACHE: cache})
    reference = weakref.ref(cache)
    del cache
    assert not is_alive(reference)


def test_an_adapted_model_is_not_kept_alive():
    model = adapted()
    train(model, [batch()])
    reference = weakref.ref(model)
    del model
    assert not is_alive(reference)


# --------------------------------------------------------------------------- checkpoints, promise 6
@grid(how=["reentrant", "non-reentrant", "wrapper"], interleaved=[False, True], noisy=[False, True])
@grid(mode=["token", "prompt_end"])
def test_checkpointing_changes_neither_gradients_nor_statistics(
    how, mode, interleaved, noisy, monkeypatch
):
    if (how, mode) == ("wrapper", "prompt_end"):
        pytest.skip("refused, in words")
    if not noisy:  # random numbers are a thread's own
        backward_in_a_thread_of_its_own(monkeypatch)
    settings = {"jitter_noise": 0.3, "dropout": 0.5} if noisy else {}
    found = []
    for way in ("none", how):
        base = tiny_llama(use_cache=False)
        model = adapted(base=base, rep_mode=mode, ema_momentum=0.3, update_every=2, **settings)
        found.append(trained_with_others_between(checkpointed(model, way), interleaved))
    assert_same(*found, atol=1e-6, rtol=1e-5)


def backward_in_a_thread_of_its_own(monkeypatch):
    """As on a GPU, where the engine recomputes in its own thread."""
    backward, engine = torch.Tensor.backward, ThreadPoolExecutor(1)

    def elsewhere(loss):
        engine.submit(backward, loss).result()

    monkeypatch.setattr(torch.Tensor, "backward", elsewhere)


def trained_with_others_between(model, interleaved):
    """Gradients and routers' state after three steps; with other forwards before each backward."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0

    def others(ids):
        with disable_adapters(model):
            model(input_ids=ids)
        with torch.no_grad():
            model.eval()(input_ids=ids.flip(1))
        longer = torch.cat([ids.flip(0), ids], dim=1)
        padded = F.pad(mask, (9, 0))
        return model.train()(input_ids=longer, attention_mask=padded, labels=longer).loss

    torch.manual_seed(5)
    batches = [batch(seed=seed) for seed in range(3)]
    found, _ = train(model, batches, mask=mask, also=others if interleaved else None)
    return plain_names(found | buffers(model))


def test_a_checkpoint_inside_a_block_is_refused():
    model = adapted(base=tiny_llama(use_cache=False)).train()
    block = model.model.layers[1]
    block.self_attn = checkpoint_wrapper(block.self_attn)
    loss = model(batch(), labels=batch()).loss
    with pytest.raises(RuntimeError, match="checkpoint"):
        loss.backward()


def test_a_projection_called_alone_is_the_bases():
    model, x = adapted().train(), torch.randn(1, 3, 32)
    layer = model.model.layers[1].self_attn.q_proj
    model(batch(), labels=batch())
    assert torch.equal(layer(x), F.linear(x, layer.weight))


# --------------------------------------------------------------------------- compilation, promise 9
COMPILED = {"token": ("token", False), "prompt_end, checkpointed": ("prompt_end", True)}


@OLD_TORCH
@grid(case=COMPILED)
def test_compiles_to_one_graph_once_and_trains_like_eager(case):
    mode, checkpointing = case
    torch._dynamo.reset()
    mask = torch.ones(1, 9, dtype=torch.long)
    mask[0, :2] = 0
    settings = {"rep_mode": mode, "update_every": 2, "ema_momentum": 0.5}
    eager, model = (adapted(base=tiny_llama(use_cache=False), **settings) for _ in range(2))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if hasattr(model, "_require_grads_hook") or hasattr(model, "_require_grads_hooks"):
            model.disable_input_require_grads()  # with it not even the base model compiles
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    batches = [batch(seed=seed) for seed in range(4)]
    found = train(model, batches, forward=compiled, mask=mask, parts=2)
    expected = train(eager, batches, mask=mask, parts=2)
    assert_same(found[0] | found[1], expected[0] | expected[1], **CLOSE)
    assert counter.frame_count == 1


@grid(mode=mj.REP_MODES, adapter=OWN_ADAPTERS)
def test_a_training_step_reads_no_value_on_the_host_and_stays_on_its_device(mode, adapter):
    """On meta tensors, which have no values, both are errors."""
    with torch.device("meta"):
        config = copy.deepcopy(tiny_llama(attn_implementation="eager").config)
        model = LlamaForCausalLM(config).train()
        ids = torch.ones(2, 8, dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": ids, "labels": ids}
    unless_base_fails(lambda: model(**inputs))
    settings = {"update_every": 2, "update_until": 5, "jitter_noise": 0.1, "dropout": 0.1}
    apply_monkeyjump(
        model, adapter=adapter, rep_mode=mode, shared_expert="up_proj", **settings
    ).train()
    optimizer = torch.optim.AdamW(trained(model).values())
    for _ in range(2):
        model(**inputs).loss.backward()
        optimizer.step()


# ---------------------------------------------------------------------------- promise 10: precision
@grid(adapter=OWN_ADAPTERS, dtype=[torch.bfloat16, torch.float16])
def test_adapters_and_centers_stay_float32_when_the_model_is_cast(adapter, dtype):
    model = adapted(adapter)
    before = {name: p.detach().clone() for name, p in trained(model).items()} | centers(model)
    model.to(dtype) if dtype is torch.bfloat16 else model.half()
    assert_same(trained(model) | centers(model), before, **EXACT)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    ours = {name for name in dtypes if ".monkeyjump." in name}
    assert {dtypes[name] for name in ours} == {torch.float32}
    assert {dtypes[name] for name in dtypes.keys() - ours} == {dtype}


@grid(adapter=OWN_ADAPTERS, dtype=[torch.bfloat16, torch.float16])
def test_a_cast_model_trains_in_float32(adapter, dtype):
    model = adapted(adapter).to(dtype)
    start = centers(model)
    found, moved = train(model, [batch(seed=seed) for seed in range(2)])
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert [name for name, gradient in found.items() if not gradient.any()] == []
    assert all_differ(moved, start)
    norms = torch.stack(list(moved.values())).norm(dim=-1)  # of float32 centers
    assert_close(norms, torch.ones(2, 4))


def test_a_float32_residual_stream_above_bf16_serves():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 50}
    config = transformers.MambaConfig(**sizes, residual_in_fp32=True)
    model = transformers.MambaForCausalLM(config).bfloat16().eval()
    expected = logits(model)
    assert torch.equal(logits(apply_monkeyjump(model, top_k=1)), expected)


def kept_in_float32(model):
    """Shapes of the activations that a forward keeps in float32 for the backward pass."""
    kept = []

    def note(tensor):
        kept.append(tensor)
        return tensor

    embeddings = model.get_input_embeddings()(batch()).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(inputs_embeds=embeddings)
    floats = [list(tensor.shape) for tensor in kept if tensor.dtype == torch.float32]
    return [shape for shape in floats if shape[:2] == [2, 9] or shape[:1] == [18]]


@grid(adapter=OWN_ADAPTERS)
def test_what_is_kept_for_the_backward_pass_of_a_bf16_base_is_bf16(adapter):
    base = tiny_llama().to(torch.bfloat16).requires_grad_(False).train()
    expected = kept_in_float32(base)  # by its norms
    assert kept_in_float32(adapted(adapter, base, shared_expert="up_proj")) == expected


# ----------------------------------------------------------- copies, promise 2; threads, promise 13
@grid(way=COPIES)
def test_a_copy_gives_the_same_also_after_a_training_step(way):
    model = adapted()
    train(model, [batch(), batch()])
    assert same_logits(way(model).eval(), model.eval())


@grid(way=COPIES)
def test_training_a_copy_leaves_the_original_alone(way):
    model = adapted()
    other = way(model)
    with unchanged(model):
        _, moved = train(other, [batch(seed=9)] * 3)
    assert all_differ(moved, centers(model))
    assert (logits(other.eval()) - logits(model)).abs().max() > 1e-3


@grid(way=COPIES)
def test_disabling_a_copy_leaves_the_original_enabled(way):
    model = adapted()
    expected = logits(model)
    with disable_adapters(way(model)):
        assert torch.equal(logits(model), expected)


@grid(mode=["token", "mean"])
def test_threads_that_call_one_model_at_the_same_time_do_not_mix(mode):
    model = adapted(rep_mode=mode)
    prompts = [batch(1, 4 + seed % 5, seed=seed) for seed in range(8)]

    def run(prompt):
        return torch.cat(list(talk(model, [prompt, prompt[:, :1]])), dim=1)

    alone = [run(prompt) for prompt in prompts]
    with threads_change_often(), ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run, prompts * 10))
    assert_close(together, alone * 10, **CLOSE)


# -------------------------------------------------- optimizer steps by the plain Trainer, promise 5
def test_the_plain_trainer_accumulates_like_one_batch(tmp_path):
    def centers_after(size, parts):
        torch.manual_seed(0)
        model = adapted(ema_momentum=0.5, update_every=2)
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        args = trainer_arguments(tmp_path, max_steps=5, save_strategy="no", **sizes)
        Trainer(model, args, train_dataset=rows_of(batch(24))).train()
        return centers(model)

    whole = centers_after(size=8, parts=1)
    assert all_differ(whole, centers(adapted()))
    assert_same(centers_after(size=2, parts=4), whole, **LOOSE)


# --------------------------------------------------------------------- several processes, promise 7
KINDS = ["ddp", pytest.param("fsdp2", marks=OLD_TORCH)]


@pytest.fixture(scope="module", params=KINDS)
def two_processes(request, tmp_path_factory):
    """What each rank found, and where both worked."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.save(to_distribute(), folder / "model.pt")
    torch.save(BATCHES, folder / "batches.pt")
    save_adapter(adapted(seed=5, ema_momentum=0.4), folder / "other")
    torch.multiprocessing.spawn(work, (request.param, str(folder)), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)], folder


def test_two_processes_end_with_the_same_on_both(two_processes):
    (first, second), _ = two_processes
    for name in ("clustered", "gradients", "trained", "loaded"):
        assert_same(first[name], second[name], **EXACT)


def test_two_processes_cluster_the_points_of_both(two_processes):
    clustered, model = two_processes[0][0]["clustered"], to_distribute()
    with noted_calls(model, BLOCKS) as seen:
        model(torch.cat(BATCHES))
    again = naive_move(clustered, seen, momentum=0.0)
    assert_same(again, clustered, **LOOSE)  # a fixed point of Lloyd


def test_two_processes_stop_clustering_together_when_one_has_enough(two_processes):
    assert [found["calls"] for found in two_processes[0]] == [{5}, {5}]


def test_two_processes_have_the_gradients_and_centers_of_one_on_the_whole_batch(two_processes):
    found = two_processes[0][0]
    expected, moved = train(to_distribute(), BATCHES)
    assert_same(found["gradients"], expected, atol=1e-5, rtol=1e-3)
    assert_same({name: found["trained"][name] for name in moved}, moved, **CLOSE)


def test_two_processes_save_one_whole_adapter(two_processes):
    (first, _), folder = two_processes
    model = load_adapter(tiny_llama(), folder / "saved")
    assert_same(trained(model) | centers(model), first["trained"], **EXACT)


def test_an_adapter_loads_into_a_sharded_model_or_is_refused_before_anything_changes(two_processes):
    (first, _), folder = two_processes
    other = load_adapter(tiny_llama(), folder / "other")
    expected = first["trained"] if first["refused"] else trained(other) | centers(other)
    assert_same(first["loaded"], expected, **EXACT)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
@grid(stage=[2, 3])
def test_zero_has_the_parameters_and_centers_of_one_process_on_the_whole_batch(stage, tmp_path):
    torch.save(to_distribute(), tmp_path / "model.pt")
    torch.save(BATCHES, tmp_path / "batches.pt")
    torch.multiprocessing.spawn(work_by_zero, (stage, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    model = to_distribute()
    train(model, BATCHES)
    assert_same(first, second, **EXACT)
    assert_same(first, trained(model) | centers(model), **CLOSE)
    saved = load_adapter(tiny_llama(), tmp_path / "saved")
    assert_same(first, trained(saved) | centers(saved), **EXACT)


# --------------------------------------------------------------- blocks and projections: every type
EVERY = pytest.mark.parametrize("model_type", sorted(TYPES.keys() - UNROUTABLE), scope="module")
# Blocks, where the config counts something else.
DEPTH = {"hrm_text": 4, "longcat_flash": 2, "mllama": 2}


def number_of_blocks(model, model_type):
    """By the config, without the blocks that have no token mixer (nemotron_h)."""
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layers_block_type", [])
    blocks = DEPTH.get(model_type, config.num_hidden_layers)
    return blocks - sum(kind in ("mlp", "moe") for kind in kinds)


@EVERY
def test_on_every_architecture_the_language_models_blocks_are_routed_and_no_others(model_type):
    model = base_of(model_type)
    unless_base_fails(lambda: logits(model, text_inputs(model)))
    found = experts_of(apply_monkeyjump(model, top_k=1))
    assert not re.search("vision|visual|audio|qformer|perceiver", " ".join(found))
    assert len(found) == number_of_blocks(model, model_type), sorted(found)


@EVERY
def test_on_every_architecture_new_adapters_change_nothing_and_go_without_a_trace(model_type):
    model = base_of(model_type)
    inputs, names = text_inputs(model), list(model.state_dict())
    expected = unless_base_fails(lambda: logits(model, inputs))
    apply_monkeyjump(model, top_k=1)
    with noted_calls(model, adapted_paths(model)) as seen:
        # No stricter than the base model is with itself: falcon_mamba's scan differs by 2e-7.
        assert_close(logits(model, inputs), expected, atol=1e-5, rtol=0)
    remove_monkeyjump(model)
    for path, calls in seen.items():
        assert calls, f"{path} was never called"
        for (x, *_), output in calls:  # each projection bit for bit
            assert torch.equal(model.get_submodule(path).forward(x), output), path
    assert_close(logits(model, inputs), expected, atol=1e-5, rtol=0)
    assert list(model.state_dict()) == names


def adapted_paths(model):
    """A pattern that matches the projections that carry an adapter."""
    paths = []
    for path, module in model.named_modules():
        if isinstance(getattr(module, "monkeyjump", None), mj.Adapter):
            paths.append(f"^{re.escape(path)}$")
    return "|".join(paths)


@EVERY
def test_on_every_architecture_all_adapters_train_and_nothing_else_does_and_are_saved(
    model_type, tmp_path
):
    model = base_of(model_type)
    inputs = text_inputs(model, tokens=16)
    unless_base_fails(lambda: model.train()(**inputs))
    with record_routing(gently_adapted(model)) as counts:
        assert_all_train(model, inputs)
    assert [path for path, count in counts.items() if count.sum() == 0] == []
    assert_saved_and_loaded(model, tiny_model(model_type), inputs, tmp_path)


@EVERY
def test_on_every_architecture_padding_is_invisible(model_type):
    model = base_of(model_type)
    inputs, padded = text_inputs(model), {}
    for name, tensor in inputs.items():
        padded[name] = F.pad(tensor, (3, 0), value=5 if name == "input_ids" else 0)
    if "position_ids" in inspect.signature(model.forward).parameters:
        padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = unless_base_fails(lambda: logits(model, inputs))
    base = unless_base_fails(lambda: logits(model, padded))
    if not torch.allclose(base[:, 3:], expected, atol=1e-5):
        pytest.skip("sees padding without adapters, too")
    for rep_mode in ("token", "last", "mean"):
        gently_adapted(model, rep_mode=rep_mode, temperature=0.1)
        found, expected = logits(model, padded)[:, 3:], logits(model, inputs)
        assert_close(found, expected, **NEAR)
        remove_monkeyjump(model)


@EVERY
def test_on_every_architecture_all_modes_generate_and_the_cache_does_not_matter(model_type):
    model = base_of(model_type)
    inputs = text_inputs(model)
    inputs["attention_mask"][0, :3] = 0
    base = unless_base_fails(lambda: generated_logits(model, inputs, use_cache=True))
    uncached = unless_base_fails(lambda: generated_logits(model, inputs, use_cache=False))
    if not torch.allclose(base, uncached, atol=2e-6):  # those that see all tokens, by little
        pytest.skip("its cache changes its logits without adapters, too")
    for rep_mode in ("token", "last", "mean"):
        gently_adapted(model, rep_mode=rep_mode, top_k=1)
        found = generated_logits(model, inputs, use_cache=True)
        assert found.isfinite().all()
        assert not torch.equal(found, base)
        other = None
        if rep_mode == "token":
            other = {"use_cache": False}
        elif model_type in ("qwen2", "gemma2", "gemma3", "mistral"):
            other = {"cache_implementation": "static"}
        if other is not None:
            expected = generated_logits(model, inputs, **{"use_cache": True, **other})
            assert_close(found, expected, atol=1e-3, rtol=1e-3)
        remove_monkeyjump(model)


@EVERY
def test_on_every_architecture_checkpointing_does_not_change_the_gradients(model_type):
    model, other = base_of(model_type).train(), base_of(model_type).train()
    inputs = text_inputs(model)
    if not model.supports_gradient_checkpointing:
        pytest.skip("does not support gradient checkpointing")
    if "zamba" in model_type:
        pytest.skip("has checkpoints inside its blocks, which are refused")
    other.requires_grad_(False).enable_input_require_grads()
    for rep_mode, reentrant in (("token", False), ("mean", True)):
        other.gradient_checkpointing_enable({"use_reentrant": reentrant})
        unless_base_fails(lambda: gradients(other, inputs))
        for each in (model, other):
            gently_adapted(each, rep_mode=rep_mode, top_k=1)
        assert_near(gradients(other, inputs), gradients(model, inputs))
        for each in (model, other):
            remove_monkeyjump(each)


def test_nearly_all_architectures_are_tried():
    """A test is skipped where the base model fails: that must not hide a builder that does."""
    tried = 0
    for model_type in sorted(TYPES.keys() - UNROUTABLE):
        with contextlib.suppress(Exception):
            model = tiny_model(model_type)
            logits(model, text_inputs(model))
            tried += 1
    assert tried > 0.75 * len(TYPES)


@pytest.mark.parametrize("model_type", sorted(UNROUTABLE))
def test_what_cannot_be_routed_is_refused_and_never_routed_wrongly(model_type):
    model = base_of(model_type).train()
    with pytest.raises(ValueError, match="block|projection|encoder-decoder"):
        gradients(apply_monkeyjump(model), text_inputs(model))


# --------------------------------------------------- blocks and projections: images, video, the odd
VISION_BLOCKS = {
    "llava": "CLIPEncoderLayer",
    "gemma3": "SiglipEncoderLayer",
    "idefics3": "Idefics3EncoderLayer",
    "qwen2_vl": "Qwen2VLVisionBlock",
    "qwen3_vl": "Qwen3VLVisionBlock",
}


@grid(model_type=list(VISION_BLOCKS), part=["language", "vision"], rep_mode=["token", "mean"])
def test_vision_language_models_train_on_images_in_whichever_part_is_named(
    model_type, part, rep_mode, tmp_path
):
    model, name = base_of(model_type), VISION_BLOCKS[model_type]
    inputs, blocks = image_inputs(model), None
    unless_base_fails(lambda: gradients(model, inputs))
    if part == "vision":  # without the last block, which llava leaves out
        count = sum(type(module).__name__ == name for module in model.modules()) - 1
        blocks = {name: list(range(count))}
    gently_adapted(model, blocks=blocks, rep_mode=rep_mode)
    assert {".vis" in path for path in experts_of(model)} == {part == "vision"}
    assert_all_train(model, inputs)
    assert_saved_and_loaded(model, tiny_model(model_type), inputs, tmp_path)


@grid(model_type=["qwen2_5_vl", "llava_onevision", "llava_next_video"], rep_mode=["token", "mean"])
def test_video_trains_a_step_decodes_and_reloads(model_type, rep_mode, tmp_path):
    model = base_of(model_type)
    inputs = video_inputs(model)
    unless_base_fails(lambda: gradients(model, inputs))
    gently_adapted(model, rep_mode=rep_mode)
    start = centers(model)
    assert_all_train(model, inputs)
    by_sgd(model)()
    assert all_differ(centers(model), start)
    model.zero_grad()
    decoded = generated_logits(model.eval(), inputs)
    assert_saved_and_loaded(model, tiny_model(model_type), inputs, tmp_path)
    again = load_adapter(tiny_model(model_type), tmp_path)
    assert_close(generated_logits(again, inputs), decoded, **CLOSE)


def keep_forward_on_the_instances(model):
    """As transformers 5.0 leaves it, once it has been asked for hidden states."""
    for block in model.model.layers:
        block.forward = type(block).forward.__get__(block)


def test_a_block_is_routed_although_its_forward_lies_on_the_instance():
    model = tiny_llama()
    keep_forward_on_the_instances(model)
    assert_all_train(gently_adapted(model))


def test_a_block_is_the_bases_again_although_its_forward_lies_on_the_instance():
    model = adapted()
    keep_forward_on_the_instances(model)
    assert same_logits(remove_monkeyjump(model), tiny_llama())


def test_blocks_of_shared_adapters_alone_are_adapted_and_not_routed():
    model, path = tiny_model("jamba"), "model.layers.0.mamba.out_proj"
    adapted(base=model, linears="q_proj", shared_expert=["mamba.out_proj", "o_proj"], top_k=1)
    assert experts_of(model) == {"model.layers.1": ["self_attn.q_proj"]}
    with noted_calls(model, f"{path}$") as seen:
        assert_all_train(model, text_inputs(model))
    (x, *_), found = seen[path][-1]
    layer = model.get_submodule(path)
    own = layer.monkeyjump
    expected = x @ layer.weight.T + 8.0 * x @ own.lora_A.T @ own.lora_B.T  # 8: alpha / r
    assert_close(found, expected)


@grid(adapter=OWN_ADAPTERS)
def test_on_a_quantised_base_new_adapters_change_nothing(adapter):
    model = apply_monkeyjump(quantised_llama(), adapter=adapter)
    assert same_logits(model, quantised_llama())


@grid(adapter=OWN_ADAPTERS)
def test_on_a_quantised_base_adapters_train_and_are_saved(adapter, tmp_path):
    model = adapted(adapter, quantised_llama(), top_k=4)
    assert_all_train(model)
    packed = {n: p for n, p in model.named_parameters() if n.endswith("q_proj.weight")}
    assert {p.dtype for p in packed.values()} == {torch.uint8}
    assert_saved_and_loaded(model, quantised_llama(), TEXT, tmp_path)


@grid(bits=[8, 4])
def test_a_base_of_bitsandbytes_is_adapted(bits):
    model = apply_monkeyjump(quantised_llama(bits))
    assert same_logits(model, quantised_llama(bits))
    assert_all_train(adapted(base=quantised_llama(bits), top_k=4))


# ------------------------------------------------------------------- saving and loading, promise 11
SAVED = {"rep_mode": "mean", "shared_expert": ["up_proj"], "dropout": 0.5, "jitter_noise": 0.5}


@grid(adapter=OWN_ADAPTERS)
def test_an_adapter_is_two_files_of_which_one_is_a_copy_to_read(adapter, tmp_path):
    save_adapter(adapted(adapter, **SAVED), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [COPY, WEIGHTS]
    config = json.loads((tmp_path / COPY).read_text())
    assert {name: config[name] for name in (*SAVED, "adapter")} == {**SAVED, "adapter": adapter}


@grid(adapter=OWN_ADAPTERS)
def test_a_loaded_adapter_gives_the_same_as_the_saved_one(adapter, tmp_path):
    model = adapted(adapter, **SAVED)
    train(model, [batch(), batch()])
    save_adapter(model, tmp_path)
    fresh = load_adapter(tiny_llama(), tmp_path)
    assert same_logits(fresh, model.eval())  # like its base in eval mode: no dropout
    assert not same_logits(fresh.train(), model)


@grid(copy_is=["gone", "nonsense", "another config"])
def test_nothing_reads_the_copy_back(copy_is, tmp_path):
    save_adapter(adapted(**SAVED), tmp_path)
    text = (tmp_path / COPY).read_text()
    if copy_is == "gone":
        (tmp_path / COPY).unlink()
    else:
        other = text.replace('"mean"', '"token"') if copy_is == "another config" else "{"
        (tmp_path / COPY).write_text(other)
    assert torch.equal(logits(load_adapter(tiny_llama(), tmp_path)), logits(adapted(**SAVED)))


def test_an_adapter_is_loaded_into_a_model_that_has_the_same_options(tmp_path):
    model, other = adapted(**SAVED), adapted(seed=5, **SAVED).train()
    save_adapter(model, tmp_path)
    other(batch())
    load_adapter(other, tmp_path)
    update_router_centers(other)  # what was seen before does not move the centers loaded
    assert same_logits(other.eval(), model)


def test_an_adapter_is_refused_by_a_model_that_has_other_options(tmp_path):
    save_adapter(adapted(top_k=2), tmp_path)
    model = adapted(top_k=1)
    with refused(model, "top_k=2.+1"):
        load_adapter(model, tmp_path)


def test_a_kill_at_any_moment_of_saving_leaves_the_old_adapter_or_the_new(tmp_path):
    models = [adapted(), adapted(seed=5, temperature=0.2)]
    expected = [logits(model) for model in models]
    folder, killed, loaded = tmp_path / "adapter", tmp_path / "killed", []
    save_adapter(models[0], folder)
    with noted_states(folder) as states:
        save_adapter(models[1], folder)
    for number, files in enumerate(states):
        left = killed / str(number)
        left.mkdir(parents=True)
        for name, content in files.items():
            (left / name).write_bytes(content)
        found = logits(load_adapter(tiny_llama(), left))
        loaded.append([torch.equal(found, each) for each in expected].index(True))
    assert len(states) >= 4
    assert loaded == sorted(loaded)
    assert set(loaded) == {0, 1}


def test_what_a_kill_left_behind_goes_with_the_next_saving(tmp_path):
    folder, killed = tmp_path / "adapter", tmp_path / "killed"
    for each in (folder, killed):
        each.mkdir()
    with noted_states(folder) as states:
        save_adapter(adapted(), folder)
    left = {name: content for files in states for name, content in files.items()}
    for name, content in left.items():
        (killed / name).write_bytes(content)
    save_adapter(adapted(), killed)
    assert len(left) > 2
    assert sorted(path.name for path in killed.iterdir()) == [COPY, WEIGHTS]


A = "model.layers.1.self_attn.q_proj.monkeyjump.lora_A"
CENTERS = "model.layers.0.monkeyjump.centers"
DEEP = "[" * 100_000 + "]" * 100_000
HUGE = torch.full((2, 32), 1e300, dtype=torch.double)
# By what is wrong: words of the error, and what rewrite() does.
WRONG_CONTENT = {
    "a tensor is missing": ("lora_A is", {"tensors": {A: None}}),
    "a tensor too many": ("layers.7", {"tensors": {A.replace("1", "7"): torch.zeros(2, 32)}}),
    "another shape": (r"lora_A.+\[3, 32\].+\[2, 32\]", {"tensors": {A: torch.zeros(3, 32)}}),
    "not a number": ("lora_A.+finite", {"tensors": {A: torch.full((2, 32), math.nan)}}),
    "infinite centers": ("centers.+finite", {"tensors": {CENTERS: torch.full((4, 32), math.inf)}}),
    "infinite in float32": ("lora_A.+finite", {"tensors": {A: HUGE}}),
    "an unknown option": ("rnak", {"rnak": 2}),
    "an invalid option": ("rank=-1: must be an integer >= 1", {"rank": -1}),
    "another rank": (r"\[3, 32\]|rank=3", {"rank": 3}),
    "a rank of ten terabytes": ("1000000000000000", {"rank": 10**15}),
    "a rank too large for a size": (WEIGHTS, {"rank": 2**62}),
    "a number too large for a float": (WEIGHTS, {"alpha": 10**400}),
    "blocks that are not there": ("NoLayer", {"blocks": {"NoLayer": [0]}}),
    "a config that is no JSON": (WEIGHTS, {"text": "{"}),
    "a config nested without end": (WEIGHTS, {"text": DEEP}),
}


def truncate(file):
    file.write_bytes(file.read_bytes()[:-10])


def pickle_instead(file):
    file.write_bytes(b"cos\nabort\n(tR.")


def without_a_config(file):
    save_file(load_file(file), file)


DAMAGE = [truncate, pickle_instead, without_a_config, Path.unlink]


@grid(case=WRONG_CONTENT)
def test_wrong_content_is_refused_and_leaves_the_model_as_it_was(case, tmp_path):
    message, changes = case
    save_adapter(adapted(), tmp_path)
    rewrite(tmp_path, **changes)
    assert_refused(tmp_path, message)


@grid(damage=DAMAGE)
def test_a_damaged_file_is_refused_and_leaves_the_model_as_it_was(damage, tmp_path):
    save_adapter(adapted(), tmp_path)
    damage(tmp_path / WEIGHTS)
    assert_refused(tmp_path, WEIGHTS)


# -------------------------------------------------------------------------- PEFT's adapters, routed
@grid(method=list(PEFT_METHODS))
def test_any_peft_method_is_base_plus_gate_times_difference(method):
    model = peft_llama(method)
    fast = routed(model)
    assert_routed(fast, model)
    assert_near(gradients(fast), gradients(routed_slowly(model, fast)), tolerance=1e-3)
    assert trained(fast).keys() == trained(model).keys()  # none made, none frozen


def test_pefts_adapters_may_be_routed_in_part_and_shared():
    model = peft_llama()
    assert_routed(routed(model, linears=["q_proj", "v_proj"], shared_expert="o_proj"), model)


@grid(method=list(PEFT_METHODS), by_peft=[False, True])
def test_any_routed_peft_method_disabled_is_the_base(method, by_peft):
    fast = routed(peft_llama(method))
    with fast.disable_adapter() if by_peft else disable_adapters(fast):
        assert same_logits(fast, tiny_llama())


@grid(bits=[8, 4])
def test_pefts_adapters_on_a_base_of_bitsandbytes_are_routed(bits):
    model = peft_llama(base=quantised_llama(bits))
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert "bnb" in type(layer).__module__
    fast = routed(model)
    slow = routed_slowly(model, fast)
    assert_near(gradients(fast), gradients(slow), tolerance=0.1)
    assert_close(logits(fast), logits(slow), atol=0.03, rtol=0.03)


def test_pefts_adapters_are_routed_as_such_or_not_at_all():
    for model, adapter in ((tiny_llama(), "peft"), (peft_llama(), "lora")):
        with pytest.raises(ValueError, match="PEFT"):
            apply_monkeyjump(model, adapter=adapter)


def partly_routed():
    """PEFT's adapters on one block alone, on the embedding and, whole, on the head."""
    targets = r".*embed_tokens|.*1\.self_attn\.[qkvo]_proj"
    return peft_llama(target_modules=targets, modules_to_save=["lm_head"])


def test_what_peft_left_alone_is_not_routed():
    assert list(experts_of(routed(partly_routed()))) == ["base_model.model.model.layers.1"]


def test_pefts_adapters_are_disabled_outside_the_blocks_too():
    fast = routed(partly_routed())
    with disable_adapters(fast):
        assert same_logits(fast, tiny_llama())


@grid(way=["merge_adapter", "base_model.merge_adapter", "merge_and_unload", "unload"])
def test_routed_adapters_are_never_merged(way):
    fast = routed(partly_routed())
    merge = functools.reduce(getattr, way.split("."), fast)
    with refused(fast, "merged"):
        merge()


def test_adapters_that_peft_merged_are_refused():
    model = peft_llama()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merge"):
        apply_monkeyjump(model, adapter="peft")


def test_removing_the_routing_gives_pefts_model_back_which_merges():
    model = partly_routed()
    plain = remove_monkeyjump(routed(model))
    assert same_logits(plain, model)
    assert trained(plain).keys() == trained(model).keys()
    assert_close(logits(plain.merge_and_unload()), logits(model), **NEAR)


def test_named_adapters_are_switched_as_in_peft():
    fast = routed(peft_llama())
    first = logits(fast)
    fast.add_adapter("second", peft_config(r=2, use_rslora=True))  # after apply
    fast.set_adapter("second")
    plain = remove_monkeyjump(copy.deepcopy(shaken(fast)))
    second = logits(fast)
    assert_routed(fast, plain)
    assert trained(fast).keys() == trained(plain).keys()
    mixed = logits(fast, {**TEXT, "adapter_names": ["default", "second"]})
    assert_close(mixed, torch.cat([first[:1], second[1:]]), **CLOSE)
    for model in (fast, plain):
        model.base_model.set_adapter(["default", "second"])  # both at once
    assert_routed(fast, plain)
    fast.set_adapter("default")
    assert torch.equal(logits(fast), first)


@grid(method=["LoRA", "DoRA", "AdaLoRA", "IA3"], reentrant=[False, True])
def test_checkpointing_a_routed_peft_model_changes_nothing(method, reentrant):
    plain = routed(peft_llama(method)).train()
    other = copy.deepcopy(plain)
    other.gradient_checkpointing_enable({"use_reentrant": reentrant})
    other.enable_input_require_grads()
    loss = other(**TEXT, use_cache=False).logits.float().square().sum()
    with disable_adapters(other):
        logits(other, {"input_ids": batch(seed=5)})
    logits(other, {"input_ids": batch(seed=5)})
    loss.backward()
    assert_near({name: p.grad for name, p in trained(other).items()}, gradients(plain))
    for model in (plain, other):
        update_router_centers(model)
    assert_same(centers(other), centers(plain))


def test_routed_adapters_disabled_in_one_thread_are_enabled_in_another():
    fast = routed(peft_llama())
    expected = logits(fast)
    with disable_adapters(fast), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(logits, fast).result(), expected)
        assert same_logits(fast, tiny_llama())


@grid(method=["LoRA", "IA3"])
def test_a_routed_peft_model_is_saved_and_loaded_beside_peft(method, tmp_path):
    peft, fast = pytest.importorskip("peft"), routed(peft_llama(method), shared_expert="o_proj")
    init_router_centers(fast, [TEXT], kmeans_iters=2)
    fast.save_pretrained(tmp_path)
    save_adapter(fast, tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    names = trained(again).keys()
    assert torch.equal(logits(load_adapter(again, tmp_path).eval()), logits(fast))
    assert trained(again).keys() == names


def test_an_adapter_that_transformers_added_is_routed_saved_and_loaded(tmp_path):
    model, again = tiny_llama(), tiny_llama()
    unless_base_fails(lambda: model.add_adapter(peft_config()))  # PEFT may be too old
    fast = routed(shaken(model), shared_expert="o_proj")
    assert_routed(fast, model)
    fast.save_pretrained(tmp_path)
    save_adapter(fast, tmp_path)
    unless_base_fails(lambda: again.load_adapter(str(tmp_path)))
    assert torch.equal(logits(load_adapter(again, tmp_path).eval()), logits(fast))


@grid(method=["LoRA", "DoRA", "VeRA", "IA3"])
def test_routed_peft_adapters_serve_a_bf16_base(method):
    model = peft_llama(method, tiny_llama().to(torch.bfloat16))
    fast = routed(model)
    assert_routed(fast, model, tolerance=0.05)
    assert logits(fast).dtype == torch.bfloat16


@grid(method=["LoRA", "DoRA", "VeRA", "IA3"], dtype=[torch.float32, torch.bfloat16])
def test_routed_peft_adapters_train_under_autocast(method, dtype):
    fast = routed(peft_llama(method, tiny_llama().to(dtype))).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as Trainer(bf16=True) does
        found = gradients(fast)
    assert [name for name, gradient in found.items() if not gradient.isfinite().all()] == []


# -------------------------------------------------------------------- adapters of your own, and TRL
class Bottleneck(mj.Adapter):
    """Houlsby et al. 2019, beside the projection: delta(x) = U relu(D x)."""

    def __init__(self, in_features, out_features, config, device):
        super().__init__(in_features, out_features, config, device)
        self.down = nn.Parameter(torch.randn(config.rank, in_features, device=device))
        self.up = nn.Parameter(torch.zeros(out_features, config.rank, device=device))

    def delta(self, x, base):
        inner = F.relu(F.linear(self.dropout(x), self.down.to(x.dtype)))
        return F.linear(inner, self.up.to(x.dtype))


@pytest.fixture
def own_adapters(monkeypatch):
    """A copy of the module's table of adapters, which a test may change."""
    monkeypatch.setattr(mj, "ADAPTERS", dict(mj.ADAPTERS))
    return mj.ADAPTERS


def test_a_users_own_adapter_starts_as_the_identity_and_goes_again(own_adapters):
    model, expected = apply_monkeyjump(tiny_llama(), adapter=Bottleneck), logits(tiny_llama())
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(remove_monkeyjump(shaken(model))), expected)


def test_a_users_own_adapter_is_weighted_by_its_gate_and_by_nothing_else(own_adapters):
    model = shaken(apply_monkeyjump(tiny_llama(), adapter=Bottleneck, top_k=4, alpha=99.0))
    with noted_gates() as gates, noted_calls(model, r"0\.self_attn\.o_proj$") as seen:
        logits(model)
    layer = model.model.layers[0].self_attn.o_proj
    [[((x, *_), y)]] = seen.values()
    base = F.linear(x, layer.weight)
    expected = base + gates[0][..., 3, None] * layer.monkeyjump.delta(x, base)
    assert_close(y, expected, **CLOSE)


@grid(dtype=[torch.float32, torch.bfloat16])
def test_a_users_own_adapter_trains(dtype, own_adapters):
    base = tiny_llama().to(dtype)
    assert_all_train(shaken(apply_monkeyjump(base, adapter=Bottleneck, top_k=4)))


def test_a_users_own_adapter_is_saved_and_loaded_where_it_is_known(tmp_path, own_adapters):
    model = shaken(apply_monkeyjump(tiny_llama(), adapter=Bottleneck, top_k=4))
    assert_saved_and_loaded(model, tiny_llama(), TEXT, tmp_path)
    del own_adapters["Bottleneck"]  # another process
    with pytest.raises(ValueError, match="Bottleneck"):
        load_adapter(tiny_llama(), tmp_path)


@grid(adapter=["lora", "peft"])
def test_trls_dpo_trains_adapters_and_centers_alone_with_checkpointing(adapter, tmp_path):
    trainer = dpo_trainer(adapter, tmp_path)
    before = values_of(trainer.model)
    trainer.train()
    after = trainer.model.state_dict()
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert [name for name in changed if not re.search("lora_|monkeyjump", name)] == []
    kinds = re.findall(r"lora_B|centers|steps", " ".join(changed))
    assert set(kinds) == {"lora_B", "centers", "steps"}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # the policy is the reference


@grid(adapter=["lora", "peft"])
def test_trls_dpo_takes_its_reference_from_the_base_model(adapter, tmp_path):
    trainer = dpo_trainer(adapter, tmp_path)
    rows = next(iter(trainer.get_train_dataloader()))
    inputs = {name: rows[name] for name in ("input_ids", "attention_mask")}
    base = logits(byte_llama(), inputs).log_softmax(dim=-1)[:, :-1]
    base = base.gather(2, rows["input_ids"][:, 1:, None])[..., 0]
    expected = (base * (rows["completion_mask"][:, 1:] != 0)).sum(dim=1)
    found = torch.cat(trainer.compute_ref_log_probs(trainer.model, rows))
    assert_close(found, expected, **NEAR)


# ------------------------------------------------------------------------------- AdaLoRA's schedule
PEFT_SCHEDULE = {"tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": 14, "beta1": 0.8, "beta2": 0.8}
OUR_SCHEDULE = {"total_steps": 14, "target_rank": 2, "initial_steps": 2, "final_steps": 3}
OUR_SCHEDULE |= {"interval": 2, "beta": 0.8}


def peft_twin(model):
    """PEFT's AdaLoRA with the same values, and its parameters by our names, as wide as ours."""
    peft = pytest.importorskip("peft")
    ranks = {"target_r": 2, "init_r": 4}
    config = peft.AdaLoraConfig(target_modules=PROJECTIONS, **ranks, **PEFT_SCHEDULE)
    other, theirs = peft.get_peft_model(tiny_llama(), config).base_model, {}
    for name, ours in trained(model).items():
        path, factor = name.split(".monkeyjump.")
        theirs[name] = getattr(other.model.get_submodule(path), factor)["default"]
        theirs[name].data.copy_(ours.data.view_as(theirs[name]))
    return other, theirs


def step_both(model, theirs, step):
    """The same random gradient, and the same step along it."""
    torch.manual_seed(step)
    for name, ours in trained(model).items():
        ours.grad = torch.randn_like(ours)
        theirs[name].grad = ours.grad.view_as(theirs[name])
        ours.data.sub_(0.1 * ours.grad)
        theirs[name].data.sub_(0.1 * theirs[name].grad)


@grid(resumed=[False, True])
def test_rank_allocation_is_that_of_peft_step_by_step(resumed):
    model, pruned = adapted("adalora", rank=4), []
    other, theirs = peft_twin(model)
    for step in range(1, 15):
        if resumed and step == 6:
            state, model = model.state_dict(), adapted("adalora", rank=4, seed=9)
            model.load_state_dict(state)
        step_both(model, theirs, step)
        mj.allocate_ranks(model, step, **OUR_SCHEDULE)
        last = {"force_mask": True} if step >= 11 else {}  # the final phase keeps its first choice
        other.rankallocator.update_and_allocate(other.model, step, **last)
        ours = trained(model)
        assert_same(ours, {name: theirs[name].view_as(p) for name, p in ours.items()})
        pruned.append(sum(int((p == 0).sum()) for p in ours.values()))
    assert pruned[:3] == [0, 0, 0]
    assert 0 < pruned[3] < 8 * 2
    assert pruned[10:] == [8 * 2] * 4


WRONG_SCHEDULES = [("interval", 0), ("beta", 1.0), ("beta", math.nan), ("target_rank", 5)]
WRONG_SCHEDULES.append(("final_steps", 14))


@pytest.mark.parametrize(("name", "value"), WRONG_SCHEDULES)
def test_a_schedule_that_cannot_be_is_refused(name, value):
    model = adapted("adalora", rank=4)
    with refused(model, name):
        mj.allocate_ranks(model, 10, **{**OUR_SCHEDULE, name: value})


def test_ranks_of_another_adapter_are_refused():
    with pytest.raises(ValueError, match="for adapter='adalora'"):
        mj.allocate_ranks(adapted("lora"), 1, 10, target_rank=1)


def test_the_penalty_is_zero_for_orthonormal_factors():
    assert mj.orthogonal_regularization(apply_monkeyjump(tiny_llama(), adapter="adalora")) < 1e-5


def test_the_penalty_is_the_mean_distance_from_orthonormal_and_trains_the_factors():
    model, norms = adapted("adalora"), []
    for name, p in trained(model).items():
        if p.dim() == 2:
            matrix = (p.T if name.endswith("A") else p).double()
            norms.append(float((matrix.T @ matrix - torch.eye(2)).pow(2).sum().sqrt()))
    loss = mj.orthogonal_regularization(model)
    loss.backward()
    assert float(loss) == pytest.approx(sum(norms) / len(norms), rel=1e-5)
    assert {p.dim() for p in trained(model).values() if p.grad is not None} == {2}


# ----------------------------------------------------------------------------------- the repository
MODULE = ast.parse(Path(mj.__file__).read_text())


def test_the_module_imports_nothing_but_the_standard_library_torch_and_einops():
    imported = set()
    for node in MODULE.body:
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    packages = {name.partition(".")[0] for name in imported}
    assert packages - set(sys.stdlib_module_names) == {"torch", "einops"}


def test_the_module_prints_nothing_but_what_a_name_says():
    printing = set()
    for function in ast.walk(MODULE):
        if isinstance(function, ast.FunctionDef):
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
            if any(getattr(call.func, "id", "") == "print" for call in calls):
                printing.add(function.name)
    assert printing == {"print_trainable_parameters"}


def test_module_and_readme_are_as_short_as_promised():
    assert Path(mj.__file__).stat().st_size <= 68_000
    assert (HERE / "README.md").read_text().count("\n") <= 230


class TinyHub:
    """What README asks a hub for, made small: models, tokenizers, data, an adapter's folder."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        small = {
            "AutoModelForCausalLM": byte_llama,
            "AutoModelForImageTextToText": functools.partial(tiny_model, "llava"),
            "AutoModelForSequenceClassification": self.classifier,
            "AutoTokenizer": byte_tokenizer,
            "AutoProcessor": self.processor,
        }
        for name, make in small.items():
            loads = functools.partial(self.load, make)
            monkeypatch.setattr(getattr(transformers, name), "from_pretrained", loads)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.adapter)
        monkeypatch.setattr(datasets, "load_dataset", self.rows)

    @staticmethod
    def load(make, *args, num_labels=None, **kwargs):
        return make() if num_labels is None else make(num_labels)

    @staticmethod
    def classifier(num_labels=2):
        config = byte_llama().config
        config.num_labels = num_labels
        return transformers.LlamaForSequenceClassification(config)

    @staticmethod
    def processor():
        inputs = transformers.BatchFeature(image_inputs(tiny_model("llava")))
        return mock.Mock(decode=str, **{"apply_chat_template.return_value": inputs})

    @staticmethod
    def rows(*args, **kwargs):
        turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
        row = {"messages": turns, "prompt": "one", "completion": "two", "task": "counting"}
        return datasets.Dataset.from_list(8 * [row])

    def adapter(self, *args, **kwargs):
        save_adapter(apply_monkeyjump(byte_llama()), self.folder)
        return str(self.folder)


def test_the_readmes_python_blocks_run_as_they_stand_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TinyHub(tmp_path / "hub", monkeypatch)
    Image.new("RGB", (16, 16)).save("photo.jpg")
    readme = (HERE / "README.md").read_text()
    names = {"train_dataset": rows_of(batch(8)), "dataloader": [TEXT]}
    found = list(re.finditer(r"```python\n(.*?)```", readme, flags=re.DOTALL))
    for block in found:
        above = readme.count("\n", 0, block.start(1))  # so that errors name README's lines
        exec(compile("\n" * above + block[1], "README.md", "exec"), names)
    assert len(found) >= 3
