"""Tests of monkeyjump.py, in its order; each promise is checked against a naive computation.

pytest -n 2                       # this file, and the tests in benchmarks/

All helpers stand first: models and batches, training, comparing, looking inside, and the slow
reference, which computes in float64, one token at a time, what the module does at once.
"""

import ast
import copy
import datetime
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
import shutil
import sys
import types
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import accelerate
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
import transformers
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import parallel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer

import monkeyjump as mj
from benchmarks.architectures import (
    tiny_model,
)
from monkeyjump import (
    REP_MODES,
    Adapter,
    MonkeyJumpConfig,
    allocate_ranks,
    apply_monkeyjump,
    disable_adapters,
    init_router_centers,
    kmeans,
    load_adapter,
    orthogonal_regularization,
    print_trainable_parameters,
    record_routing,
    remove_monkeyjump,
    save_adapter,
    unit,
    update_router_centers,
)

OWN_ADAPTERS = ("lora", "lorafa", "adalora", "propulsion")
SEQUENCE_MODES = REP_MODES[1:]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = [f"self_attn.{name}" for name in PROJECTIONS]
BLOCKS = r"layers\.\d+$"
WEIGHTS = "monkeyjump.safetensors"
COPY = "monkeyjump.json"
CHECKPOINTING = ["none", "reentrant", "non-reentrant"]
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


def sgd(model, lr=0.05):
    """An optimizer of all that is trained."""
    return torch.optim.SGD(trained(model).values(), lr=lr)


def train(model, batches, forward=None, mask=None, lr=0.05, also=None, parts=1):
    """Plain SGD, each batch in so many parts; the last step's gradients, the centers after it."""
    model.train()
    forward = model if forward is None else forward
    optimizer = sgd(model, lr)
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
def assert_same(first, second, **tolerance):
    """Two dicts of tensors have the same names, at least one, and the same bits, or near."""
    tolerance = tolerance or EXACT
    assert first.keys() == second.keys()
    assert first
    for name, tensor in first.items():
        assert_close(tensor, second[name], msg=partial("{}: {}".format, name), **tolerance)


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
    assert_same(fresh.state_dict(), model.state_dict())
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


@contextmanager
def unchanged(model):
    """Nothing in the model is another one at the end."""
    shape = shape_of(model)
    values = values_of(model)
    yield
    assert shape_of(model) == shape
    assert_same(values_of(model), values)


@contextmanager
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


@contextmanager
def noted_gates(given=None):
    """The gates of every routed call within, in order; those given are handed out instead."""
    noted = []
    route = mj.route
    instead = iter(given or ())

    def noting(*args, **kwargs):
        gates, best = route(*args, **kwargs)
        if given is not None:
            gates = next(instead)
        noted.append(gates.detach().clone())
        return gates, best

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mj, "route", noting)
        yield noted


@contextmanager
def noted_calls(model, pattern):
    """By path, arguments and output of every call within of the modules whose path matches."""
    seen = {}
    handles = []
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
    found = {}
    for path, calls in seen.items():
        found[path] = [args[0].detach() for args, _ in calls]
    return found


# --------------------------------------------------------- helpers: devices, heads, steps, warnings
class LikeAGpu(TorchDispatchMode):
    """Copies excepted, no operator takes tensors of two devices; values read are counted."""

    reads = 0

    def __torch_dispatch__(self, op, kinds, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors if t.dim()}
        assert len(devices) < 2 or "copy" in str(op), f"{op} takes {devices}"
        self.reads += "_local_scalar_dense" in str(op)
        return op(*args, **(kwargs or {}))


def spread(model, first, move=nn.Module.to):
    """The blocks from `first` on and what follows them on another device, as accelerate does."""
    for module in (*model.model.layers[first:], model.model.norm, model.lm_head):
        add_hook_to_module(module, AlignDevicesHook("meta"))
        move(module, "meta")
    return model


def assign(module, device):
    """Move a module as fully_shard and dispatch_model do, which is not by `_apply`."""
    replace_tensors(module, lambda name, tensor: tensor.to(device))


def replace_tensors(model, replacement):
    """Assign replacement(name, tensor) to every parameter and buffer."""
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = replacement(f"{path}.{name}", parameter.detach())
                module._parameters[name] = nn.Parameter(new, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = replacement(f"{path}.{name}", buffer)


def plain_names(tensors):
    """By the names that they have without a wrapper."""
    return {re.sub(r"_(checkpoint|fsdp)_wrapped_module\.", "", n): t for n, t in tensors.items()}


def steps(model, optimizer=None, labels=None):
    """Three optimizer steps, each on a batch of its own, in the mode that the model is in."""
    optimizer = optimizer or torch.optim.AdamW(trained(model).values(), lr=0.01)
    for seed in range(3):
        ids = batch(seed=seed)
        model(input_ids=ids, labels=ids if labels is None else labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def warnings_of(run, *args):
    """What of ours is said in warnings meanwhile."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(*args)
    messages = [str(warning.message) for warning in caught]
    return [text for text in messages if re.search("LlamaForCausalLM|adapter|center", text)]


def classifier(kind=transformers.LlamaForSequenceClassification, deep=False):
    """A tiny model with a head, of whatever task its class says; deep: of several layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    sizes |= {"vocab_size": 50, "num_hidden_layers": 2, "pad_token_id": 0}
    model = kind(kind.config_class(**sizes))
    if deep:
        model.score = nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(9), nn.Linear(8, 2))
    return model.eval()


def trained_classifier(deep=False):
    """Three steps away from its base in its adapters and in its head."""
    model = steps(adapted(base=classifier(deep=deep)).train(), labels=torch.tensor([0, 1]))
    assert all_differ(model.score.state_dict(), classifier(deep=deep).score.state_dict())
    return model.eval()


def join(folder, rank, of):
    """Start a process group, which gives up where ranks do not meet."""
    patience = {"timeout": datetime.timedelta(seconds=60), "init_method": f"file://{folder}/store"}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=of, **patience)


def leave():
    """End the process group, with no work under way that holds a tensor: torch may deadlock."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture
def lone_process(tmp_path):
    """A process group of this process alone."""
    join(tmp_path, 0, of=1)
    yield
    leave()


# ---------------------------------------------------------------------- helpers: copies and threads
def through_pickle(model):
    """A copy by pickle."""
    return pickle.loads(pickle.dumps(model))


def through_a_file(model):
    """A copy by torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": through_pickle, "torch.save": through_a_file}


@contextmanager
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
@contextmanager
def noted_states(folder):
    """At every line that runs within: the folder's files, as a kill would leave them."""
    states = []
    outside = sys.gettrace()

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
    """What all processes start from."""
    return adapted(ema_momentum=0.4)


def work_by_zero(rank, stage, folder):
    """One of two processes of DeepSpeed, with its half of every batch."""
    import deepspeed

    here = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2"}
    os.environ.update(here, DS_ACCELERATOR="cpu")
    join(folder, rank, of=2)
    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False)
    model = torch.load(f"{folder}/model.pt", weights_only=False)
    optimizer = sgd(model)
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
    leave()


BATCHES = [batch(4, seed=seed) for seed in range(4)]


def work(rank, kind, folder):
    """One of two processes: from a pickled model, with its half of every batch, in two parts."""
    join(folder, rank, of=2)
    model = torch.load(f"{folder}/model.pt", weights_only=False)
    halves = [ids.chunk(2)[rank] for ids in torch.load(f"{folder}/batches.pt")]
    start = centers(model)
    with noted_calls(model, BLOCKS) as seen:  # after five batches one has its nine tokens
        init_router_centers(model, 9 * [batch(1, 1 + rank)], subset_size=18)
    found = {"calls": {len(calls) for calls in seen.values()}}
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
    leave()


# ---------------------------------------------------------------------------- helpers: PEFT
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
    peft = pytest.importorskip("peft")
    (name, of_method) = PEFT_METHODS[method]
    kind = getattr(peft, name, None) or pytest.skip(f"this PEFT has no {name}")
    return kind(**{"target_modules": PROJECTIONS, **of_method, **settings})


def peft_llama(method="LoRA", base=None, **settings):
    """A model with PEFT's adapters, which do something."""
    peft = pytest.importorskip("peft")
    base = tiny_llama() if base is None else base
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
        block = model.get_submodule(path)
        router = like.get_submodule(path).monkeyjump
        block.register_forward_pre_hook(keep_hidden)
        for expert, name in enumerate(experts):
            layer = block.get_submodule(name)

            def forward(x, layer=layer, block=block, router=router, expert=expert, **kwargs):
                base = layer.get_base_layer()(x)
                y = type(layer).forward(layer, x, **kwargs)
                return base + slow_gate(block, router, expert).to(base) * (y - base)

            layer.forward = forward
    return model


def assert_routed(fast, model, tolerance=1e-5):
    """As by the definition; and routing does something."""
    found = logits(fast)
    expected = logits(routed_slowly(model, fast))
    assert_close(found, expected, atol=tolerance, rtol=100 * tolerance)
    assert not torch.allclose(found, logits(model), atol=1e-3)


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
    "too many experts a token": ({"top_k": 5}, "top_k=5: must be at most 4"),
    "another model's block": ({"blocks": {"GPT2Block": [0]}}, "GPT2Block.+LlamaDecoderLayer"),
    "too large an index": ({"blocks": {"LlamaDecoderLayer": [0, 2]}}, r"\[0, 2\].+LlamaDecoder"),
    "a negative index": ({"blocks": {"LlamaDecoderLayer": [-1]}}, r"\[-1\].+LlamaDecoder"),
    "the whole model as a block": ({"blocks": {"LlamaModel": [0]}}, "LlamaModel.+LlamaDecoder"),
    "no blocks": ({"blocks": {}}, "blocks=.+LlamaDecoderLayer"),
    "an unknown linear": ({"linears": ["q_proj", "qkv"]}, "'qkv'.+there are mlp.down_proj"),
    "an unknown option": ({"rnak": 3}, "rnak=3: no such option; there are .*'rank'"),
    "a rank beside PEFT's": ({"adapter": "peft", "rank": 64}, "rank=64: must be left out"),
    "no linears": ({"linears": []}, "linears"),
    "an unknown shared expert": ({"shared_expert": "gate"}, "'gate'.+there are mlp.down_proj"),
}


@pytest.mark.parametrize(("name", "value"), WRONG_VALUES, ids=str)
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
    config = MonkeyJumpConfig(blocks=blocks, **names, top_k=1)
    model = apply_monkeyjump(tiny_llama(), config)
    short = {"blocks": json.dumps(blocks), "linears": "q_proj", "shared_expert": "o_proj"}
    other = apply_monkeyjump(tiny_llama(), **short, top_k=1)
    assert other.monkeyjump_wiring.config == model.monkeyjump_wiring.config


@grid(name=OWN_ADAPTERS)
def test_an_adapter_class_with_the_name_of_a_built_in_one_is_refused(name):
    before = dict(mj.ADAPTERS)
    impostor = type(name, (Adapter,), {})
    with pytest.raises(ValueError, match=name):
        apply_monkeyjump(tiny_llama(), adapter=impostor)
    assert mj.ADAPTERS == before


# -------------------------------------------------------------------------------------- mathematics
@grid(top_k=[1, 2, 3, 5, 9], temperature=[0.1, 1.0])
def test_route_is_softmax_over_all_experts_cut_to_the_top_k_and_renormalised(top_k, temperature):
    torch.manual_seed(0)
    points = unit(torch.randn(7, 16))
    c = unit(torch.randn(5, 16))
    gates, best = mj.route(points, c, top_k, temperature)
    expected = [naive_gates(point, c, min(top_k, 5), temperature) for point in points]
    assert_close(gates, torch.tensor(expected), atol=1e-6, rtol=1e-5)
    assert best.tolist() == torch.tensor(expected).argmax(dim=1).tolist()


def test_what_is_equally_near_to_all_experts_is_shared_by_the_top_k():
    centers = unit(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)))
    gates, _ = mj.route(torch.zeros(3, 16), centers, top_k=2)
    assert gates.sort(dim=-1).values.tolist() == [[0, 0, 0, 0.5, 0.5]] * 3


def test_jitter_noise_multiplies_the_logits_within_its_range():
    torch.manual_seed(0)
    points = unit(torch.randn(500, 16))
    c = unit(torch.randn(2, 16))
    gates, _ = mj.route(points, c, 2, temperature=1.0, jitter_noise=0.5)
    logits = points @ c.T
    found = torch.logit(gates[:, 0].double())  # the difference of the noisy logits
    off = (found - (logits[:, 0] - logits[:, 1])).abs()
    within = off <= 0.5 * logits.abs().sum(dim=1) + 1e-5
    assert within.all()
    assert off.mean() > 0.01


def test_statistics_count_finite_real_vectors_only():
    torch.manual_seed(0)
    raw = torch.randn(10, 6) * 100
    real = torch.arange(10) < 8
    raw[2] = torch.full((6,), 1e-30)
    raw[3, 2] = math.nan
    raw[4, 0] = math.inf
    raw[5] = 0.0
    points = unit(raw)
    c = unit(torch.randn(3, 6))
    best = mj.route(points, c, 2)[1]
    expected = torch.zeros(3, 7, dtype=torch.double)
    for n in (0, 1, 6, 7):
        expected[best[n], :6] += naive_unit(raw[n])
        expected[best[n], 6] += 1
    found = mj.cluster_statistics(points, best, 3, real)
    assert_close(found.double(), expected, **CLOSE)


def test_kmeans_finds_planted_clusters_and_bears_points_that_are_all_the_same():
    torch.manual_seed(0)
    planted = unit(torch.randn(4, 24))
    points = unit(planted.repeat_interleave(50, dim=0) + 0.05 * torch.randn(200, 24))
    found = kmeans(points, 4, 10, torch.Generator().manual_seed(5))
    assert (planted @ found.T).amax(dim=1).min() > 0.99
    assert_close(found.norm(dim=-1), torch.ones(4))
    same = kmeans(unit(torch.ones(6, 4)), 3, 4, torch.Generator().manual_seed(0))
    assert same.isfinite().all()


# ---------------------------------------------- adapters, promise 1: the identity, at what it costs
@grid(mode=REP_MODES, adapter=OWN_ADAPTERS)
def test_at_init_every_projection_is_the_bases_bit_for_bit(adapter, mode):
    model = tiny_llama()
    ids = batch()
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
THREE_ROUTED = {"linears": PROJECTIONS[:3], "shared_expert": ["o_proj", "gate_proj"]}
PUBLISHED = {
    "Qwen2-0.5B, lora": (QWEN, {"adapter": "lora"}, 270_336),
    "Qwen2-0.5B, adalora": (QWEN, {"adapter": "adalora"}, 270_528),
    "Qwen2-0.5B, lorafa": (QWEN, {"adapter": "lorafa"}, 98_304),
    "Qwen2-0.5B, propulsion": (QWEN, {"adapter": "propulsion"}, 49_152),
    "Llama-3-8B, lora": (LLAMA, THREE_ROUTED, 2_883_584),
}


@grid(case=PUBLISHED)
def test_trainable_parameters_are_the_published_numbers(case, capsys):
    shape, settings, published = case
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, **shape))
    apply_monkeyjump(model, rank=2, **settings)
    line = print_trainable_parameters(model)
    assert f"trainable params: {published:,} " in line
    assert line in capsys.readouterr().out


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
        x = x[row, t].double()
        y = y[row, t].double()
        base = layer.weight.double() @ x
        own = {name: tensor.double() for name, tensor in layer.monkeyjump.state_dict().items()}
        delta = naive_delta(own, adapter, x, base, **settings)
        assert_close(y, base + gate * delta, **NEAR)


@torch.no_grad()
@grid(mode=REP_MODES, adapter=OWN_ADAPTERS)
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
    model = adapted(adapter, shared_expert="up_proj")
    expected = logits(tiny_llama())
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
    found = []
    gates = None
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
    config = MonkeyJumpConfig(rank=2)
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
    """The step of one optimizer of all."""
    return sgd(model).step


def by_adamw(model):
    """The step of another kind of optimizer."""
    return torch.optim.AdamW(trained(model).values(), lr=1e-3).step


def by_two_optimizers(model):
    """A step of two, each of half the parameters."""
    weights = list(trained(model).values())
    first = torch.optim.SGD(weights[::2], lr=0.05)
    second = torch.optim.AdamW(weights[1::2], lr=1e-3)

    def step():
        first.step()
        second.step()

    return step


def by_hand(model):
    """The call for loops without a torch optimizer."""
    return partial(update_router_centers, model)


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
    step = kind(model)
    start = centers(model)
    expected = start
    seen = {f"model.layers.{index}": [] for index in range(2)}
    for number in range(1, 7):
        with noted_calls(model, BLOCKS) as calls:
            for ids in batch(2 * parts, seed=number).chunk(parts):
                model(input_ids=ids, labels=ids).loss.backward()
        seen = {path: seen[path] + calls[path] for path in seen}
        expected, seen = assert_step_moves_as_the_naive_loop(model, step, expected, seen, number)
        model.zero_grad()
    assert all_differ(centers(model), start) == (until != 0)


def test_centers_learn_nothing_from_forwards_that_do_not_train():
    model = adapted().train()
    plain = adapted().train()
    for each in (model, plain):
        each(input_ids=batch(), labels=batch())
    with torch.no_grad():
        model(batch(seed=50))
    model.eval()(batch(seed=51))
    with disable_adapters(model.train()):
        model(batch(seed=52))  # the reference pass of DPO
    for each in (model, plain):
        update_router_centers(each)
    assert_same(centers(model), centers(plain))


def skipped_by_a_scaler(model):
    """GradScaler does not call an optimizer whose gradients are infinite."""
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    optimizer = sgd(model)
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
    assert_same(centers(model), start)
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
        before = type(module)
        now = type(modules[path])
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
    """A T5."""
    config = transformers.T5Config(d_model=8, d_kv=4, num_heads=2, num_layers=1, vocab_size=50)
    return transformers.T5ForConditionalGeneration(config)


def half_on_meta():
    """As after offloading."""
    model = tiny_llama()
    model.model.layers[1].to("meta")
    return model


UNROUTABLE_MODELS = {
    "an encoder-decoder": (encoder_decoder, "encoder-decoder"),
    "offloaded layers": (half_on_meta, "meta"),
    "adapted already": (adapted, "carries Monkey Jump already"),
    "no blocks": (partial(nn.Linear, 3, 3), "blocks"),
}


@grid(case=UNROUTABLE_MODELS)
def test_a_model_that_cannot_be_routed_is_refused_before_anything_is_touched(case):
    make, message = case
    model = make()
    with refused(model, message):
        apply_monkeyjump(model)


NEED_ADAPTERS = {
    "remove": remove_monkeyjump,
    "update": update_router_centers,
    "save": partial(save_adapter, directory="nowhere"),
    "init": partial(init_router_centers, dataloader=[]),
}


@grid(call=NEED_ADAPTERS)
def test_what_needs_an_adapted_model_says_so(call):
    with pytest.raises(ValueError, match="LlamaForCausalLM carries no Monkey Jump"):
        call(tiny_llama())


# ------------------------------------------------------- what trains and what is reached, promise 1
@grid(unreached=["k_proj", "q_proj, k_proj, v_proj, o_proj"])
def test_adapters_that_no_forward_reaches_are_named_in_one_warning(unreached):
    model = tiny_llama(use_cache=False)
    names = unreached.split(", ")
    for projection in map(model.model.layers[1].self_attn.get_submodule, names):
        forward = projection.forward
        projection.forward = lambda x, forward=forward: forward(x)  # compressed-tensors 0.14
    adapted(base=model, blocks={"LlamaDecoderLayer": [1]})
    messages = warnings_of(steps, checkpointed(model.train(), "reentrant"))
    found = [re.findall(r"layers\.1\.self_attn\.(\w+)", message) for message in messages]
    assert found == [names]


HEALTHY = {"all defaults": {}, "shared experts": {"shared_expert": ["up_proj", "down_proj"]}}
HEALTHY |= {"experts that nothing chooses": {"top_k": 1}, "a sequence mode": {"rep_mode": "mean"}}


@grid(setting=list(HEALTHY), checkpointing=CHECKPOINTING)
def test_a_healthy_model_trains_without_a_warning(setting, checkpointing):
    model = adapted(base=tiny_llama(use_cache=False), **HEALTHY[setting]).train()
    assert warnings_of(steps, checkpointed(model, checkpointing)) == []


def test_a_model_that_steps_but_never_was_in_training_mode_is_named_in_one_warning():
    messages = warnings_of(steps, adapted().eval())
    assert len(messages) == 1
    assert re.search(r"LlamaForCausalLM.*train", messages[0])


HEADS = dict.fromkeys(["BertForMaskedLM", "RobertaForCausalLM", "LlamaForCausalLM"])
HEADS |= {"LlamaForQuestionAnswering": "QUESTION_ANS", "BertForTokenClassification": "TOKEN_CLS"}
HEADS |= {f"{name}ForSequenceClassification": "SEQ_CLS" for name in ("Llama", "Roberta")}


@grid(name=list(HEADS))
def test_the_heads_that_a_task_adds_are_trained_by_default_as_by_peft(name):
    peft = pytest.importorskip("peft")
    kind = getattr(transformers, name)
    found = trained(apply_monkeyjump(classifier(kind), top_k=1))
    options = peft.LoraConfig(target_modules=["query", "q_proj"], task_type=HEADS[name])
    expected = trained(peft.get_peft_model(classifier(kind), options))
    expected = {re.sub(r"base_model\.model\.|modules_to_save\.default\.", "", n) for n in expected}
    assert {n for n in found if "monkeyjump" not in n} == {n for n in expected if "lora" not in n}


@grid(dtype=["float32", "bfloat16"])
def test_a_head_gets_in_float32_the_gradient_that_it_gets_in_peft(dtype):
    peft = pytest.importorskip("peft")
    ours, theirs = (classifier().to(getattr(torch, dtype)) for _ in range(2))
    options = peft.LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")
    for model in (apply_monkeyjump(ours), peft.get_peft_model(theirs, options)):
        model.train()(input_ids=batch(), labels=torch.tensor([0, 1])).loss.backward()
    assert ours.score.weight.grad.dtype == torch.float32
    expected = theirs.score.modules_to_save["default"].weight.grad
    assert_close(ours.score.weight.grad.to(expected.dtype), expected)


@grid(deep=[False, True])
def test_a_trained_head_is_saved_and_loaded_with_the_adapters(deep, tmp_path):
    model = trained_classifier(deep)
    save_adapter(model, tmp_path)
    again = load_adapter(classifier(deep=deep), tmp_path)
    assert same_logits(again, model)


@grid(deep=[False, True])
def test_a_trained_head_is_the_bases_while_disabled_and_after_removal(deep):
    model = trained_classifier(deep)
    base = classifier(deep=deep)
    with disable_adapters(model):
        assert same_logits(model, base)
    remove_monkeyjump(model)
    assert_same(model.state_dict(), base.state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())


@grid(name=["embed_tokens", "norm"])
def test_any_module_named_is_trained_saved_and_loaded(name, tmp_path):
    model = adapted(modules_to_save=[name])
    train(model, [batch()])
    save_adapter(model, tmp_path)
    again = load_adapter(tiny_llama(), tmp_path)
    assert f"{name}.weight" in [path.removeprefix("model.") for path in trained(again)]
    assert same_logits(again, model.eval())


@grid(name=["lm_head", "embed_tokens", "scorer", "rotary_emb"])
def test_a_module_that_is_tied_or_empty_or_not_there_is_refused(name):
    model = tiny_llama(tie_word_embeddings=True)
    message = {"scorer": "scorer.*lm_head", "rotary_emb": name}.get(name, f"{name}.*tied")
    with refused(model, message):
        apply_monkeyjump(model, modules_to_save=[name])


# ============================================= what makes it hold: the file's second half, in order
# -------------------------------------------------------------------------------- centers from data
@grid(mode=REP_MODES)
def test_centers_start_as_the_kmeans_of_the_real_representations(mode):
    model = adapted(rep_mode=mode).train()
    loader = [left_padded(seed) for seed in range(4)]
    model(batch(), prompt_end=torch.tensor([3, 6]))  # seen before: no part of the new centers
    with noted_calls(model, BLOCKS) as seen:
        init_router_centers(model, loader, subset_size=1000, kmeans_iters=20)
    assert all(module.training for module in model.modules())
    update_router_centers(model)
    points = []
    for index, hidden in enumerate(torch.cat(inputs_of(seen)["model.layers.1"])):
        real = loader[0]["attention_mask"][index % 2].bool().tolist()
        vectors = naive_representation(hidden, mode, real, None)
        wanted = real if mode == "token" else [True]  # all vectors of a sequence are the same
        points += [naive_unit(vector) for vector in itertools.compress(vectors, wanted)]
    points = torch.stack(points)
    found = model.model.layers[1].monkeyjump.centers.double()
    nearest = (points @ found.T).argmax(dim=1)
    assert len(points) == (44 if mode == "token" else 8)
    for e in range(4):  # a fixed point of Lloyd: each center is the mean direction of its points
        assert_close(naive_unit(points[nearest == e].sum(dim=0)), found[e], **LOOSE)


def stream(read):
    """Batches for as long as they are asked for; notes which were."""
    for seed in itertools.count():
        read.append(seed)
        yield {"input_ids": batch(4, 10, seed=seed)}


def clustered(model, seed=0):
    """Centers from eighty tokens; how many batches were read."""
    read = []
    init_router_centers(model, stream(read), subset_size=80, seed=seed)
    return len(read)


def test_the_same_seed_gives_the_same_centers_and_another_one_others():
    models = [adapted() for _ in range(3)]
    state = torch.get_rng_state()
    for model, seed in zip(models, (0, 0, 1), strict=True):
        clustered(model, seed)
    assert torch.equal(torch.get_rng_state(), state)  # drawn by a generator of their own
    first, same, other = map(centers, models)
    assert_same(first, same)
    assert all_differ(first, other)


def test_setting_centers_reads_just_enough_batches():
    assert clustered(adapted()) == 8  # an eighth, 10 of 40 tokens, from each batch


def test_centers_set_in_inference_mode_can_move():
    model = adapted()
    with torch.inference_mode():
        clustered(model)
    start = centers(model)
    assert all_differ(train(model, [batch()])[1], start)


UNUSABLE = {
    "no dataloader": (None, {}, "dataloader"),
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
    trainer = types.SimpleNamespace(model=model, get_train_dataloader=lambda: loader)
    with unchanged(model), pytest.raises(ValueError if message else Exception, match=message):
        init_router_centers(model if loader is None else trainer, **settings)


@OLD_TORCH
@grid(way=["torch.compile", "model.compile"])
def test_centers_of_a_compiled_model_start_as_those_of_the_model_itself(way):
    torch._dynamo.reset()
    expected = adapted(rep_mode="mean")
    model = adapted(rep_mode="mean")
    loader = [left_padded(seed) for seed in range(4)]
    init_router_centers(expected, loader)
    how = {"fullgraph": True, "backend": "aot_eager"}
    compiled = torch.compile(model, **how) if way == "torch.compile" else model
    if way == "model.compile":
        model.compile(**how)
    compiled(**left_padded())
    init_router_centers(compiled, loader)
    assert_same(centers(model), centers(expected), **CLOSE)


# --------------------------------------------- which rows are real, promise 4: padding is invisible
def by_keywords(model, ids, mask, **more):
    """As the Trainer calls a model."""
    return model(input_ids=ids, attention_mask=mask, **more)[0]


def by_positions(model, ids, mask, **more):
    """The mask is the second argument."""
    return model(ids, mask, **more)[0]


def by_the_inner_model(model, ids, mask, **more):
    """Around the model, as some trainers do."""
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
    short = batch(1, 5)
    full = batch(1, 9, seed=7)
    start = 4 if side == "left" else 0
    padded = F.pad(short, (start, 4 - start), value=1)
    return short, full, torch.cat([padded, full, torch.ones_like(full)]), start


@grid(case=PADDED, mode=REP_MODES)
def test_padding_does_not_show_in_the_logits_of_real_tokens(case, mode):
    entry, side, attention = case
    model = adapted(base=tiny_llama(attn_implementation=attention), rep_mode=mode)
    short, full, together, start = padded_rows(side)
    found = run_padded(model, entry, together, [start + 2, 5, 0])
    alone = [run_padded(model, entry, ids, [end]) for ids, end in ((short, 2), (full, 5))]
    assert_close(found[:1, start : start + 5], alone[0], **NEAR)
    assert_close(found[1:2], alone[1], **NEAR)


@grid(case=PADDED, mode=REP_MODES)
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
@torch.no_grad()
@grid(told_by=["positions", "mask"])
def test_packed_rows_are_right_in_token_mode(told_by):
    rows = [batch(1, 5, seed=1), batch(1, 4, seed=2)]
    model = adapted()
    given = {"position_ids": torch.tensor([[*range(5), *range(4)]]), "use_cache": False}
    numbers = torch.tensor([[0] * 5 + [1] * 4])
    if told_by == "mask":
        given["attention_mask"] = (numbers == numbers.T).tril()[None, None]
    expected = torch.cat([model(row).logits for row in rows], dim=1)
    assert_close(model(torch.cat(rows, dim=1), **given).logits, expected, **CLOSE)


END = torch.tensor([3, 6])
ANSWERS = torch.where(torch.arange(9) > END[:, None], batch(), -100)


@torch.no_grad()
def test_prompt_end_is_before_the_first_label_unless_it_is_given():
    model = adapted(rep_mode="prompt_end")
    given = model(input_ids=batch(), prompt_end=END).logits
    assert torch.equal(given, model(input_ids=batch(), labels=ANSWERS).logits)
    assert torch.equal(given, model(input_ids=batch(), labels=batch(), prompt_end=END).logits)
    assert not torch.allclose(given, logits(model), atol=1e-4)


@grid(labels={"none": None, "nothing to learn": torch.full_like(batch(), -100)})
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


ANEW = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])
IMAGE = [[0, 1, 2, 2, 2, 2, 4, 5, 6], [0, 1, 2, 2, 3, 3, 4, 5, 6], [0, 1, 2, 3, 2, 3, 4, 5, 6]]
IMAGE = torch.tensor(IMAGE)[:, None]  # time, height, width of an image of four tokens
ALONE = torch.arange(9).expand(1, 1, 9)
PACKED = {
    "positions": {"position_ids": ANEW[None]},
    "positions of the second row": {"position_ids": torch.stack([ALONE[0, 0], ANEW])},
    "positions that do not go back to zero": {"position_ids": (ANEW + 5)[None]},
    "time, height, width": {"position_ids": ANEW.expand(3, 1, 9)},
    "text, time, height, width": {"position_ids": ANEW.expand(4, 1, 9)},
    "a mask that numbers": {"attention_mask": torch.tensor([[1] * 4 + [2] * 5])},
    "a padded mask that numbers": {"attention_mask": torch.tensor([[0, 1, 1, 1, 2, 2, 3, 3, 3]])},
    "lengths": {"cu_seq_lens_q": torch.tensor([0, 4, 9], dtype=torch.int32)},
    "numbers": {"seq_idx": torch.tensor([[0] * 4 + [1] * 5])},
}
UNPACKED = {
    "an image": {"position_ids": IMAGE},
    "text above an image": {"position_ids": torch.cat([ALONE, IMAGE])},
    "a padded row": {
        "position_ids": torch.tensor([[1, 1, 1, 0, 1, 2, 3, 4, 5]]),
        "attention_mask": torch.tensor([[0] * 3 + [1] * 6]),
    },
    "a mask of floats": {"attention_mask": torch.ones(1, 9)},
    "a mask of truth": {"attention_mask": torch.ones(1, 9, dtype=torch.bool)},
}


def logits_given(given, mode):
    """Of a model that takes positions of such a shape, for as many rows."""
    position = given.get("position_ids", ALONE[0])
    base = tiny_llama() if position.dim() == 2 else tiny_model("qwen2_5_vl")
    model = adapted(base=base, rep_mode=mode)
    return model(input_ids=batch(position.shape[-2]), use_cache=False, **given).logits


@grid(mode=SEQUENCE_MODES, guise=list(PACKED))
def test_packed_rows_are_refused_in_the_sequence_modes_in_every_guise(mode, guise):
    with pytest.raises(ValueError, match="packed"):
        logits_given(PACKED[guise], mode)


@grid(mode=SEQUENCE_MODES, guise=list(UNPACKED))
def test_one_sequence_a_row_passes_in_every_guise(mode, guise):
    assert logits_given(UNPACKED[guise], mode).isfinite().all()


@grid(unused=["kept", "removed"])
def test_a_column_prompt_end_reaches_the_routing_through_the_plain_trainer(unused, tmp_path):
    ids = batch(8)
    ends = [2, 3, 4, 5, 6, 2, 3, 4]
    triples = zip(ids, ids, ends, strict=True)
    rows = [dict(zip(("input_ids", "labels", "prompt_end"), t, strict=True)) for t in triples]
    model = adapted(rep_mode="prompt_end", ema_momentum=0.0)
    expected = copy.deepcopy(model).train()
    expected(input_ids=ids, labels=ids, prompt_end=torch.tensor(ends))
    update_router_centers(expected)
    args = trainer_arguments(tmp_path, max_steps=1, remove_unused_columns=unused == "removed")
    Trainer(model, args, train_dataset=rows).train()
    assert_same(centers(model), centers(expected), **CLOSE)


# ------------------------------------------------------------------------------ decoding, promise 8
GENERATIONS = {"plain": (1, False, False), "in training mode": (1, False, True)}
GENERATIONS |= {"beams": (3, False, False), "static cache": (1, True, False)}
GENERATIONS |= {"beams, static cache": (3, True, False)}


def assert_scores_are_those_of_one_forward(model, inputs, found, beams):
    """What was decoded with a cache has the scores that it has at once, routed as its prompt."""
    new = found.sequences.shape[1] - inputs["input_ids"].shape[1]
    ids = found.sequences
    mask = F.pad(inputs["attention_mask"], (0, new), value=1)
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


@grid(mode=REP_MODES, case=GENERATIONS)
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
    one = []
    other = []
    for first, second in zip(talk(model, TALKS[0]), talk(model, TALKS[1]), strict=True):
        one.append(first)
        other.append(second)
    assert_close([one, other], alone)


def test_each_turn_of_a_conversation_is_routed_anew_and_no_decoded_token_is():
    model = adapted(rep_mode="mean")
    second_turn = TALKS[0][1]
    with noted_gates() as gates:
        list(talk(model, TALKS[0]))
        logits(model, {"input_ids": second_turn})
    assert len(gates) == 2 * 3  # two blocks; two turns, and the second one again, by itself
    assert_close(gates[2], gates[4])  # block 0 sees embeddings: of that turn alone


def test_neither_a_cache_nor_a_model_is_kept_alive():
    model = adapted(rep_mode="mean")
    cache = transformers.DynamicCache()
    train(model, [batch()])
    model(batch(), **{CACHE: cache})
    the_cache = weakref.ref(cache)
    the_model = weakref.ref(model)
    del cache
    gc.collect()
    assert the_cache() is None
    del model
    gc.collect()
    assert the_model() is None


@grid(mode=SEQUENCE_MODES, how=["a keyword", "a config", "the model's config"])
def test_generation_without_a_cache_is_refused_in_the_sequence_modes(mode, how):
    model = adapted(rep_mode=mode)
    given = {"a keyword": {"use_cache": False}}
    given["a config"] = {"generation_config": transformers.GenerationConfig(use_cache=False)}
    if how == "the model's config":
        model.generation_config.use_cache = False
    with pytest.raises(ValueError, match="use_cache"):
        model.generate(batch(), max_new_tokens=3, do_sample=False, **given.get(how, {}))


@torch.no_grad()
def decoded(model, return_dict):
    """The logits of a prompt and of three tokens after it."""
    given = {"use_cache": True, "return_dict": return_dict}
    output = model(batch(), **given)
    logits = [output[0]]
    for seed in range(3):
        output = model(batch(2, 1, seed), **given, **{CACHE: output[1]})
        logits.append(output[0])
    return torch.cat(logits, dim=1)


@grid(mode=REP_MODES)
def test_tuple_outputs_keep_the_prompts_routing(mode):
    model = adapted(rep_mode=mode)
    assert torch.equal(decoded(model, return_dict=False), decoded(model, return_dict=True))


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
    backward = torch.Tensor.backward
    engine = ThreadPoolExecutor(1)

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
    model = adapted().train()
    x = torch.randn(1, 3, 32)
    layer = model.model.layers[1].self_attn.q_proj
    model(batch(), labels=batch())
    assert torch.equal(layer(x), F.linear(x, layer.weight))


@grid(mode=SEQUENCE_MODES)
def test_a_sequence_mode_under_checkpoint_wrapper_is_refused_at_the_recomputation(mode):
    model = checkpointed(adapted(rep_mode=mode).train(), "wrapper")
    loss = model(input_ids=batch(), labels=batch(), use_cache=False).loss
    with pytest.raises((RuntimeError, ValueError), match="checkpoint_wrapper"):
        loss.backward()


@grid(how=CHECKPOINTING[1:])
def test_a_backward_pass_within_disable_adapters_recomputes_what_ran(how):
    results = []
    for checkpointing in ("none", how):
        base = tiny_llama(use_cache=False)
        model = adapted(base=base, modules_to_save=["input_layernorm"]).train()
        loss = checkpointed(model, checkpointing)(input_ids=batch(), labels=batch()).loss
        with disable_adapters(model):
            loss.backward()
        results.append(plain_names({name: p.grad for name, p in trained(model).items()}))
    assert_same(*results, atol=1e-6, rtol=1e-5)


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


@grid(mode=REP_MODES, adapter=OWN_ADAPTERS)
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


@OLD_TORCH
def test_a_thread_may_begin_with_a_compiled_call():
    torch._dynamo.reset()
    model = adapted().train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with ThreadPoolExecutor(1) as pool:
        first, again = (pool.submit(compiled, input_ids=batch()).result() for _ in range(2))
    assert_close(first.logits, model(batch()).logits)
    assert_close(again.logits, first.logits)


@OLD_TORCH
def test_layers_that_are_compiled_one_by_one_share_their_graph():
    torch._dynamo.reset()
    model = adapted(base=tiny_llama(layers=9, use_cache=False))
    expected = model(batch()).logits
    for block in model.model.layers:  # more than dynamo compiles one function for
        block.compile(backend="eager", fullgraph=True)
    assert_close(model(batch()).logits, expected)


@functools.cache
def compiled_graphs(mode):
    """By graph of a compiled generation with a static cache: how many sizes may grow in it."""
    torch._dynamo.reset()
    model = adapted(rep_mode=mode) if mode else tiny_llama()
    graphs = []

    def backend(graph, inputs):
        graphs.append(sum(isinstance(given, torch.SymInt) for given in inputs))
        return graph.forward

    how = transformers.CompileConfig(backend=backend, mode=None, fullgraph=True)
    how._compile_all_devices = True  # as transformers does by itself on a GPU
    given = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "compile_config": how}
    model.generate(**left_padded(), **given, cache_implementation="static")
    return graphs


@OLD_TORCH
@grid(mode=REP_MODES)
def test_compiled_decoding_makes_the_base_models_graphs(mode):
    assert compiled_graphs(mode) == compiled_graphs(None)


@torch.no_grad()
def reads_of_a_decoded_token(model, masked):
    """Values that are read on the host for the third of three tokens after a prompt."""
    ids, mask = left_padded().values()
    given = {"attention_mask": mask} if masked else {}
    cache = model(ids, use_cache=True, **given)[CACHE]
    for _ in range(3):
        mask = F.pad(mask, (0, 1), value=1)
        if masked:
            given = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
        with LikeAGpu() as device:
            model(batch(2, 1), use_cache=True, **given, **{CACHE: cache})
    return device.reads


@grid(mode=REP_MODES, masked=[False, True])
def test_a_decoded_token_reads_nothing_on_the_host_that_the_base_model_does_not(mode, masked):
    expected = reads_of_a_decoded_token(tiny_llama(), masked)
    assert reads_of_a_decoded_token(adapted(rep_mode=mode), masked) == expected


# ---------------------------------------------------------------------------- promise 10: precision
CASTS = {"to(bfloat16)": torch.bfloat16, "half()": torch.float16}


@grid(adapter=OWN_ADAPTERS, dtype=CASTS)
def test_adapters_and_centers_stay_float32_when_the_model_is_cast_and_train_on(adapter, dtype):
    model = adapted(adapter)
    before = values_of(model)
    model.half() if dtype is torch.float16 else model.to(dtype)
    for name, tensor in model.state_dict().items():
        if ".monkeyjump." in name:
            assert torch.equal(tensor, before[name]), name
        else:
            assert tensor.dtype == dtype, name
    found, moved = train(model, [batch(seed=seed) for seed in range(2)])
    assert {tensor.dtype for tensor in (found | moved).values()} == {torch.float32}
    assert [name for name, gradient in found.items() if not gradient.any()] == []
    assert all_differ(moved, before)


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
    return [shape for shape in floats if shape[:2] == [2, 9] or shape[0] == 18]  # all tokens


@grid(adapter=OWN_ADAPTERS)
def test_what_is_kept_for_the_backward_pass_of_a_bf16_base_is_bf16(adapter):
    base = tiny_llama().to(torch.bfloat16).requires_grad_(False).train()
    expected = kept_in_float32(base)  # by its norms
    assert kept_in_float32(adapted(adapter, base, shared_expert="up_proj")) == expected


@grid(dtype=["bfloat16", "float16", "float64"], adapter=OWN_ADAPTERS)
def test_adapters_and_centers_are_float32_under_any_default(dtype, adapter, request):
    model = tiny_llama()
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(getattr(torch, dtype))
    apply_monkeyjump(model, adapter=adapter)
    assert {t.dtype for t in (trained(model) | centers(model)).values()} == {torch.float32}


# ---------------------------------------------------------------------- types and copies, promise 2
@grid(part=["", "model", "model.layers.0", "model.layers.0.self_attn.q_proj"])
def test_a_made_class_makes_a_plain_module(part):
    model = adapted()
    module = model.get_submodule(part)
    given = {"model.layers.0": (model.config, 0)}.get(part, (model.config,))
    made = type(module)(*(given if "proj" not in part else (32, 32)))
    assert type(made) is type(tiny_llama().get_submodule(part))


def test_from_pretrained_of_a_made_class_gives_a_plain_model(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    made = type(adapted()).from_pretrained(tmp_path)
    assert same_logits(made, tiny_llama())


@grid(way=["deepcopy", "torch.save"])
def test_a_copy_of_a_model_with_a_trained_head_is_independent(way, tmp_path):
    model = trained_classifier()
    other = copy.deepcopy(model)
    if way == "torch.save":
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    with unchanged(model), torch.no_grad():
        for parameter in trained(other).values():
            parameter.add_(1.0)
    with disable_adapters(other):
        assert same_logits(other, classifier())


@grid(way=COPIES)
def test_a_copy_is_the_same_after_a_training_step_and_independent(way):
    model = adapted()
    train(model, [batch(), batch()])
    other = way(model)
    assert same_logits(other.eval(), model.eval())
    with unchanged(model):
        _, moved = train(other, [batch(seed=9)] * 3)
    assert all_differ(moved, centers(model))
    assert not same_logits(other.eval(), model)


@grid(way=COPIES)
def test_disabling_a_copy_leaves_the_original_enabled(way):
    model = adapted()
    expected = logits(model)
    with disable_adapters(way(model)):
        assert torch.equal(logits(model), expected)


# ------------------------------------------------------------------------------ threads, promise 13
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


# --------------------------------------------------------------------- devices and hooks, promise 7
@grid(mode=REP_MODES, first=[0, 1])
def test_a_model_over_several_devices_uses_one_in_each_operator(mode, first):
    model = spread(adapted(rep_mode=mode), first).train()
    inputs = left_padded()
    with LikeAGpu():
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        if first == 0:  # no gradient comes back from meta
            loss.backward()
        update_router_centers(model)
        model.eval()(**inputs)


def test_an_adapter_is_loaded_into_a_model_over_several_devices(tmp_path):
    save_adapter(adapted(seed=5), tmp_path)
    model = load_adapter(spread(adapted(), first=1), tmp_path)
    values = model.model.layers[0].state_dict()
    assert_same(values, adapted(seed=5).model.layers[0].state_dict())


@grid(mode=REP_MODES)
def test_a_model_that_is_offloaded_after_it_was_adapted_gives_what_it_gave(mode, tmp_path):
    model = adapted(rep_mode=mode)
    expected = model(**left_padded()).logits
    here = ["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"]
    places = dict.fromkeys(here, "cpu") | {"model.layers.1": "disk"}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    assert_close(model(**left_padded()).logits, expected)


@grid(how=["assign=True", "to_empty", "assignment"])
def test_a_model_that_came_from_meta_trains_and_is_disabled_as_ever(how):
    model = adapted(modules_to_save=["lm_head"])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rope = {name: buffer.clone() for name, buffer in model.model.rotary_emb.named_buffers()}
    model.to("meta")
    if how == "to_empty":
        model.to_empty(device="cpu")
    if how == "assignment":
        replace_tensors(model, state.get)
    else:
        model.load_state_dict(state, assign=how == "assign=True")
    model.model.rotary_emb._buffers.update(rope)
    with disable_adapters(model):
        assert same_logits(model, tiny_llama())
    plain = adapted(modules_to_save=["lm_head"])
    batches = [batch(seed=seed) for seed in range(3)]
    assert_same(train(model, batches)[1], train(plain, batches)[1])
    if how == "assign=True":  # the caller's tensors are not ours to write
        assert_same({name: state[name] for name in centers(plain)}, centers(adapted()))


@grid(adapter=OWN_ADAPTERS)
def test_a_model_moved_by_assignment_trains_where_it_is_now(adapter):
    model = spread(adapted(adapter).train(), first=0, move=assign)
    with LikeAGpu():
        steps(model)


STEERING = torch.linspace(-1.0, 1.0, 32)


class Steer(ModelHook):
    """accelerate's kind of hook, between a block's call and its forward."""

    def pre_forward(self, module, hidden, *args, **kwargs):
        return (hidden + STEERING, *args), kwargs


def only_known_keywords(module, args, kwargs):
    """A hook that steers, and hands on the keywords that it knows."""
    known = ("attention_mask", "position_ids", "position_embeddings", "use_cache")
    kwargs = {name: value for name, value in kwargs.items() if name in known}
    return (args[0] + STEERING, *args[1:]), kwargs


def steered(how, mode):
    """A model whose first block's input is changed by a hook."""
    model = tiny_llama(use_cache=False)
    block = model.model.layers[0]
    if how == "accelerate, before":
        add_hook_to_module(block, Steer())
    adapted(base=model, rep_mode=mode)
    if how == "accelerate, after":
        add_hook_to_module(block, Steer())
    if how == "torch":
        block.register_forward_pre_hook(lambda module, args: (args[0] + STEERING, *args[1:]))
    if how == "torch, with keywords":
        block.register_forward_pre_hook(only_known_keywords, with_kwargs=True)
    return model


HOOKS = ["accelerate, before", "accelerate, after", "torch"]


@grid(how=HOOKS, mode=["token", "last"], checkpointing=CHECKPOINTING)
def test_a_block_routes_what_its_forward_sees_whatever_a_hook_changes(how, mode, checkpointing):
    model = checkpointed(steered(how, mode), checkpointing)
    plain = adapted(base=tiny_llama(use_cache=False), rep_mode=mode)

    def shifted(input_ids, **given):
        embeddings = plain.get_input_embeddings()(input_ids)
        return plain(inputs_embeds=embeddings + STEERING, **given)

    batches = [batch(seed=seed) for seed in range(2)]
    expected = train(plain, batches, forward=shifted)
    for found, right in zip(train(model, batches), expected, strict=True):
        assert_same(found, right, **CLOSE)


@grid(checkpointing=CHECKPOINTING)
def test_a_block_is_routed_although_a_hook_hands_on_no_keyword_of_ours(checkpointing):
    models = steered("torch", "token"), steered("torch, with keywords", "token")
    results = [train(checkpointed(model, checkpointing), [batch()]) for model in models]
    for found, right in zip(*results, strict=True):
        assert_same(found, right)


# --------------------------------------------------------------------- whose steps count, promise 5
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


def test_the_steps_of_a_critics_optimizer_move_no_centers():
    model = adapted().train()
    start = centers(adapted())
    critic = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    assert_same(centers(steps(model, optimizer=critic)), start)
    torch.optim.SGD(trained(model).values()).step()
    assert all_differ(centers(model), start)


@grid(frozen=[False, True])
def test_a_second_adapted_model_moves_by_no_other_models_optimizer(frozen):
    first = adapted().train()
    second = adapted(seed=2).train()
    optimizers = [sgd(model, lr=0.1) for model in (first, second)]
    second.requires_grad_(not frozen)
    start = centers(second)
    for model in (second, first):
        model(input_ids=batch(), labels=batch())
    optimizers[0].step()
    assert_same(centers(second), start)
    optimizers[1].step()
    assert all_differ(centers(second), start)


def step_within(model, names):
    """Gradients, noted as they are complete; those named have an optimizer that steps then."""
    noted = {}
    for name, parameter in plain_names(trained(model)).items():
        optimizer = torch.optim.SGD([parameter], lr=0.05)

        def step(parameter, name=name, optimizer=optimizer):
            noted[f"{name} {len(noted)}"] = parameter.grad.clone()
            if name in names:
                optimizer.step()
                optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)
    return noted


@grid(checkpointing=["wrapper", *CHECKPOINTING], of=["all parameters", "every second one"])
def test_steps_inside_the_backward_pass_are_as_good_as_steps_after_it(checkpointing, of):
    results = []
    for within in (False, True):
        model = adapted(base=tiny_llama(use_cache=False), ema_momentum=0.3).train()
        weights = plain_names(trained(checkpointed(model, checkpointing)))
        every = 1 if of == "all parameters" else 2
        inside = list(weights)[::every] if within else []
        after = [p for name, p in weights.items() if name not in inside]
        noted = step_within(model, inside)
        after = after or [nn.Parameter(torch.ones(1))]  # of nothing
        steps(model, optimizer=torch.optim.SGD(after, lr=0.05))
        model(input_ids=batch())  # before a training forward, at the latest, centers move
        counts = {name: b for name, b in model.named_buffers() if name.endswith("steps")}
        results.append(noted | plain_names(centers(model) | counts))
    assert_same(*results, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_centers_move_by_an_optimizer_that_holds_parameters_flattened(lone_process):
    expected = centers(steps(adapted(ema_momentum=0.3).train()))
    model = adapted(ema_momentum=0.3).train()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    on_cpu = {"device_id": torch.device("cpu"), "ignored_states": frozen}
    wrapped = FullyShardedDataParallel(model, use_orig_params=False, **on_cpu)
    found = plain_names(centers(steps(wrapped)))
    assert_same(found, expected, **CLOSE)


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
    for name in ("gradients", "trained", "loaded"):
        assert_same(first[name], second[name])
    assert first["calls"] == second["calls"] == {5}  # which stop when one has enough


def test_two_processes_have_the_gradients_and_centers_of_one_on_the_whole_batch(two_processes):
    found = two_processes[0][0]
    expected, moved = train(to_distribute(), BATCHES)
    assert_same(found["gradients"], expected, atol=1e-5, rtol=1e-3)
    assert_same({name: found["trained"][name] for name in moved}, moved, **CLOSE)


def test_two_processes_save_one_whole_adapter(two_processes):
    (first, _), folder = two_processes
    model = load_adapter(tiny_llama(), folder / "saved")
    assert_same(trained(model) | centers(model), first["trained"])


def test_an_adapter_loads_into_a_sharded_model_or_is_refused_before_anything_changes(two_processes):
    (first, _), folder = two_processes
    other = load_adapter(tiny_llama(), folder / "other")
    expected = first["trained"] if first["refused"] else trained(other) | centers(other)
    assert_same(first["loaded"], expected)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
@grid(stage=[2, 3])
def test_zero_has_the_parameters_and_centers_of_one_process_on_the_whole_batch(stage, tmp_path):
    torch.save(to_distribute(), tmp_path / "model.pt")
    torch.save(BATCHES, tmp_path / "batches.pt")
    torch.multiprocessing.spawn(work_by_zero, (stage, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    model = to_distribute()
    train(model, BATCHES)
    assert_same(first, second)
    assert_same(first, trained(model) | centers(model), **CLOSE)
    saved = load_adapter(tiny_llama(), tmp_path / "saved")
    assert_same(first, trained(saved) | centers(saved))


def rank_of_two(rank, folder):
    """One of two processes with a seed and a loader of its own; its centers are saved."""
    join(folder, rank, of=2)
    base = tiny_llama()
    torch.manual_seed(100 + rank)
    model = apply_monkeyjump(base, top_k=1, jitter_noise=0.1)
    found = {"at apply": centers(model)}
    for module in (*model.model.layers, model):
        fully_shard(module)
    mine = [{"input_ids": batch(seed=10 * rank + index)} for index in range(3 + 3 * rank)]
    init_router_centers(model, mine, kmeans_iters=50)
    found["after k-means"] = centers(model)
    train(model, [batch(seed=rank), batch(seed=2 + rank)])
    found["after training"] = centers(model)
    torch.save(found, f"{folder}/rank{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The centers of two ranks at three moments."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank_of_two, (str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@OLD_TORCH
@grid(when=["at apply", "after k-means", "after training"])
def test_ranks_with_other_seeds_and_unequal_loaders_have_the_same_centers(when, two_ranks):
    assert_same(two_ranks[0][when], two_ranks[1][when])


@OLD_TORCH
def test_kmeans_takes_of_each_rank_as_many_batches_as_the_shortest_has(two_ranks):
    base = tiny_llama()
    clustered = two_ranks[0]["after k-means"]
    with noted_calls(base, BLOCKS) as seen:
        base(torch.cat([batch(seed=seed) for seed in (0, 1, 2, 10, 11, 12)]))
    assert_same(naive_move(clustered, seen, 0.0), clustered, **LOOSE)


def test_data_parallel_is_refused_at_its_own_call():
    with pytest.raises((RuntimeError, ValueError), match="DataParallel.*torchrun"):
        adapted()._replicate_for_data_parallel()


def test_a_model_inside_data_parallel_is_refused():
    with pytest.raises(ValueError, match="torchrun"):
        apply_monkeyjump(nn.DataParallel(tiny_llama()))


@grid(how=["DTensor", "size alone"])
def test_a_tensor_parallel_base_is_refused_in_words_that_name_it(how, lone_process):
    model = tiny_llama()
    plan = {"model.layers.*.self_attn.q_proj": parallel.ColwiseParallel()}
    if how == "DTensor":
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        parallel.parallelize_module(model, mesh, plan)
    else:  # as transformers leaves it where weights are plain parts
        model._tp_size = 2
    with pytest.raises(ValueError, match="(?i)tensor.parallel|tp_plan"):
        apply_monkeyjump(model)


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


def test_nothing_reads_the_copy_back(tmp_path):
    save_adapter(adapted(**SAVED), tmp_path)
    (tmp_path / COPY).write_text("{}")
    assert same_logits(load_adapter(tiny_llama(), tmp_path), adapted(**SAVED))


def test_an_adapter_is_loaded_into_a_model_that_has_the_same_options_only(tmp_path):
    model = adapted(**SAVED)
    other = adapted(seed=5, **SAVED).train()
    save_adapter(model, tmp_path)
    other(batch())
    load_adapter(other, tmp_path)
    update_router_centers(other)  # what was seen before does not move the centers loaded
    assert same_logits(other.eval(), model)
    other = adapted(top_k=1, **SAVED)
    with refused(other, "top_k=2.+1"):
        load_adapter(other, tmp_path)


def test_a_kill_at_any_moment_of_saving_leaves_the_old_adapter_or_the_new(tmp_path):
    models = [adapted(), adapted(seed=5, temperature=0.2)]
    expected = [logits(model) for model in models]
    folder = tmp_path / "adapter"
    killed = tmp_path / "killed"
    loaded = []
    save_adapter(models[0], folder)
    with noted_states(folder) as states:
        save_adapter(models[1], folder)
    for files in states:
        shutil.rmtree(killed, ignore_errors=True)
        killed.mkdir()
        for name, content in files.items():
            (killed / name).write_bytes(content)
        found = logits(load_adapter(tiny_llama(), killed))
        loaded.append([torch.equal(found, each) for each in expected].index(True))
        save_adapter(models[0], killed)  # what is left behind goes with the next saving
        assert sorted(path.name for path in killed.iterdir()) == [COPY, WEIGHTS]
    assert len(states) >= 4
    assert loaded == sorted(loaded)
    assert set(loaded) == {0, 1}


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
    """As after a full disk."""
    file.write_bytes(file.read_bytes()[:-10])


def pickle_instead(file):
    """What would run code if it were unpickled."""
    file.write_bytes(b"cos\nabort\n(tR.")


def without_a_config(file):
    """Tensors alone, as other libraries write them."""
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


def test_a_base_model_with_an_adapter_in_its_folder_is_still_a_base_model(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    save_adapter(adapted(), tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert same_logits(base, tiny_llama())


def pruned(model, numbers):
    """After these steps, each with AdaLoRA's schedule where it applies."""
    for number in numbers:
        gradients = train(model, [batch(seed=number)])[0]
        for name, parameter in trained(model).items():
            parameter.grad = gradients[name]
        if "lora_E" in str(gradients.keys()):
            allocate_ranks(model, number, 9, target_rank=1.0, interval=2)
    return model


@grid(adapter=OWN_ADAPTERS)
def test_an_adapter_holds_all_that_a_resumed_run_needs(adapter, tmp_path):
    settings = {"adapter": adapter, "update_every": 2, "update_until": 4}
    whole = pruned(adapted(**settings), range(1, 7))
    save_adapter(pruned(adapted(**settings), range(1, 4)), tmp_path)
    resumed = pruned(load_adapter(tiny_llama(), tmp_path), range(4, 7))
    assert_same(resumed.state_dict(), whole.state_dict())


def test_a_folder_of_the_format_before_this_one_is_refused_in_words(tmp_path):
    tensors = {"model.layers.0.self_attn.q_proj.monkeyjump.lora_A": torch.ones(2, 32)}
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"config": "{}"})
    model = tiny_llama()
    message = r"adapter_model\.safetensors.*(before|older)"
    with refused(model, message):
        load_adapter(model, tmp_path)


def test_the_id_of_a_repository_is_refused_with_what_to_do_instead():
    model = tiny_llama()
    with refused(model, "someone/some-adapter.*snapshot_download"):
        load_adapter(model, "someone/some-adapter")


# Names of the model, of its parts, of its projections are others in these types' checkpoints.
RENAMED = dict.fromkeys(["llava", "qwen2_5_vl", "internvl", "exaone", "gpt2"], {})
RENAMED["llava, both"] = {"blocks": {"CLIPEncoderLayer": [0], "LlamaDecoderLayer": [0, 1]}}
RENAMED["llava, a norm"] = {"modules_to_save": ["language_model.norm"]}
RENAMED["llama, PEFT's"] = {"adapter": "peft"}  # the Trainer leaves saving and loading to PEFT


class Keep(transformers.TrainerCallback):
    """What the model was at its first checkpoint."""

    state = None

    def on_save(self, args, state, control, model=None, **kwargs):
        self.state = self.state or copy.deepcopy(model.state_dict())


def trained_plainly(name, folder, seed, resume=None, **settings):
    """A Trainer and its first checkpoint, after four steps with a checkpoint at every second."""
    base = unless_base_fails(lambda: tiny_model(name.partition(",")[0]))
    keep = Keep()
    torch.manual_seed(seed)
    if "PEFT" in name:
        base = pytest.importorskip("peft").get_peft_model(base, peft_config())
    model = apply_monkeyjump(base, top_k=1, update_every=3, **RENAMED[name])
    rows = [{"input_ids": row, "labels": row} for row in batch(16)]
    args = trainer_arguments(folder, max_steps=4, save_steps=2, learning_rate=1e-2, **settings)
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows, callbacks=[keep])
    trainer.train(resume_from_checkpoint=resume)
    return model.state_dict(), keep.state


@grid(name=list(RENAMED))
def test_a_resumed_plain_trainer_ends_as_an_uninterrupted_one(name, tmp_path):
    whole, _ = trained_plainly(name, tmp_path, seed=5)
    resumed, _ = trained_plainly(name, tmp_path, seed=6, resume=f"{tmp_path}/checkpoint-2")
    assert_same(resumed, whole)


@grid(name=list(RENAMED))
def test_a_plain_trainer_loads_its_best_model_at_the_end(name, tmp_path):
    settings = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    settings |= {"metric_for_best_model": "loss", "greater_is_better": True}  # the first one's
    ended, first = trained_plainly(name, tmp_path, seed=5, **settings)
    assert_same(ended, first)


@grid(path=["somewhere.else", "language_model.layers.7", "model.layers.0.self_attn.q_proj"])
def test_a_state_dict_with_our_tensors_under_unplaceable_names_is_refused(path):
    model = adapted(blocks={"LlamaDecoderLayer": [1]})
    name = f"{path}.monkeyjump.lora_A"
    state = {name: torch.ones(2, 32), "lm_head.weight": torch.ones(50, 32)}
    with unchanged(model), pytest.raises((RuntimeError, ValueError), match=re.escape(name)):
        model.load_state_dict(state, strict=False)


def test_loading_something_else_throws_no_statistics_away():
    models = adapted(update_every=2).train(), adapted(update_every=2).train()
    for model in models:
        train(model, [batch()])
    models[0].load_state_dict({"lm_head.weight": models[0].lm_head.weight}, strict=False)
    for model in models:
        train(model, [batch(seed=4)])
    assert_same(centers(models[0]), centers(models[1]))


# ---------------------------------------------------------------------------- observing the routing
def naive_counts(own, hidden, mode, mask):
    """How many real representations are nearest to each expert's own center, one by one."""
    counts = torch.zeros(len(own))
    for sequence, real in zip(hidden, mask.bool().tolist(), strict=True):
        found = naive_representation(sequence, mode, real, None)
        for t in [t for t in range(9) if real[t]] if mode == "token" else [0]:
            counts[(own.double() @ naive_unit(found[t])).argmax()] += 1
    return counts


def totals(counts):
    """How many representations were counted, by block."""
    return [int(count.sum()) for count in counts.values()]


@grid(mode=["token", "mean", "last"], training=[False, True], checkpointing=CHECKPOINTING)
def test_recorded_counts_are_those_of_a_naive_loop(mode, training, checkpointing):
    model = adapted(base=tiny_llama(use_cache=False), rep_mode=mode, jitter_noise=0.9)
    checkpointed(model, checkpointing).train(training)
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    with noted_calls(model, r"input_layernorm$") as seen, record_routing(model) as counts:
        model(input_ids=batch(), attention_mask=mask, labels=batch()).loss.backward()
    assert len(counts) == 2
    for path, found in counts.items():
        hidden = seen[f"{path}.input_layernorm"][0][0][0].detach()
        own = model.get_submodule(path).monkeyjump.centers
        assert_close(found.float(), naive_counts(own, hidden, mode, mask))


def test_recorded_counts_are_of_this_threads_forwards_within_the_context():
    model = adapted()
    with record_routing(model) as counts, ThreadPoolExecutor(1) as pool:
        pool.submit(model, batch()).result()
        model(batch(1, 5))
        model(batch(1, 2))
    model(batch())
    assert totals(counts) == [7, 7]


@grid(mode=["token", "mean"])
def test_a_recorded_generation_counts_what_was_routed_and_not_what_was_kept(mode):
    model = adapted(rep_mode=mode)
    with record_routing(model) as counts:
        model.generate(batch(), max_new_tokens=4, do_sample=False, suppress_tokens=[0])
    assert totals(counts) == [2 * (9 + 3) if mode == "token" else 2] * 2


@OLD_TORCH
def test_recording_under_compile_is_refused_in_words():
    torch._dynamo.reset()
    model = adapted()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with record_routing(model), pytest.raises(Exception, match="observed under torch.compile"):
        compiled(batch())


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


def test_pefts_adapters_are_routed_as_such_and_unmerged_or_not_at_all():
    merged = peft_llama()
    merged.merge_adapter()
    for model, adapter in ((tiny_llama(), "peft"), (peft_llama(), "lora"), (merged, "peft")):
        with pytest.raises(ValueError, match="PEFT"):
            apply_monkeyjump(model, adapter=adapter)


def partly_routed():
    """PEFT's adapters on one block alone, on the embedding and, whole, on the head."""
    targets = r".*embed_tokens|.*1\.self_attn\.[qkvo]_proj"
    return peft_llama(target_modules=targets, modules_to_save=["lm_head"])


def test_what_peft_left_alone_is_not_routed_and_what_it_adapted_elsewhere_is_disabled():
    fast = routed(partly_routed())
    assert list(experts_of(fast)) == ["base_model.model.model.layers.1"]
    with disable_adapters(fast):
        assert same_logits(fast, tiny_llama())


@grid(way=["merge_adapter", "base_model.merge_adapter", "merge_and_unload", "unload"])
def test_routed_adapters_are_never_merged(way):
    fast = routed(partly_routed())
    merge = functools.reduce(getattr, way.split("."), fast)
    with refused(fast, "merged"):
        merge()


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
    assert_same(centers(other), centers(plain), **CLOSE)


def test_routed_adapters_disabled_in_one_thread_are_enabled_in_another():
    fast = routed(peft_llama())
    expected = logits(fast)
    with disable_adapters(fast), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(logits, fast).result(), expected)
        assert same_logits(fast, tiny_llama())


@grid(method=["LoRA", "IA3"])
def test_a_routed_peft_model_is_saved_and_loaded_beside_peft(method, tmp_path):
    peft = pytest.importorskip("peft")
    fast = routed(peft_llama(method), shared_expert="o_proj")
    init_router_centers(fast, [TEXT], kmeans_iters=2)
    fast.save_pretrained(tmp_path)  # brings the router along
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(load_adapter(again, tmp_path).eval()), logits(fast))


def test_an_adapter_that_transformers_added_is_routed_saved_and_loaded(tmp_path):
    model = tiny_llama()
    again = tiny_llama()
    unless_base_fails(lambda: model.add_adapter(peft_config()))  # PEFT may be too old
    fast = routed(shaken(model), shared_expert="o_proj")
    assert_routed(fast, model)
    fast.save_pretrained(tmp_path)
    save_adapter(fast, tmp_path)
    unless_base_fails(lambda: again.load_adapter(str(tmp_path)))
    assert torch.equal(logits(load_adapter(again, tmp_path).eval()), logits(fast))


@grid(method=["LoRA", "DoRA", "VeRA", "IA3"])
def test_routed_peft_adapters_serve_a_bf16_base_and_train_under_autocast(method):
    model = peft_llama(method, tiny_llama().to(torch.bfloat16))
    fast = routed(model)
    assert_routed(fast, model, tolerance=0.05)
    assert logits(fast).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):  # also over float32, as by Trainer
        found = gradients(fast.train()) | gradients(routed(peft_llama(method)).train())
    assert all(gradient.isfinite().all() for gradient in found.values())


# -------------------------------------------------------------------- adapters of your own
class Bottleneck(Adapter):
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
    model = apply_monkeyjump(tiny_llama(), adapter=Bottleneck)
    expected = logits(tiny_llama())
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


def test_a_users_own_adapter_trains_and_is_loaded_where_it_is_known(tmp_path, own_adapters):
    base = tiny_llama().bfloat16()
    assert_all_train(shaken(apply_monkeyjump(base, adapter=Bottleneck, top_k=4)))
    model = shaken(apply_monkeyjump(tiny_llama(), adapter=Bottleneck, top_k=4))
    assert_all_train(model)
    assert_saved_and_loaded(model, tiny_llama(), TEXT, tmp_path)
    del own_adapters["Bottleneck"]  # another process
    with pytest.raises(ValueError, match="Bottleneck"):
        load_adapter(tiny_llama(), tmp_path)


# ------------------------------------------------------------------------------- AdaLoRA's schedule
PEFT_SCHEDULE = {"tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": 14, "beta1": 0.8, "beta2": 0.8}
OUR_SCHEDULE = {"total_steps": 14, "target_rank": 2, "initial_steps": 2, "final_steps": 3}
OUR_SCHEDULE |= {"interval": 2, "beta": 0.8}


def peft_twin(model):
    """PEFT's AdaLoRA with the same values, and its parameters by our names, as wide as ours."""
    peft = pytest.importorskip("peft")
    ranks = {"target_r": 2, "init_r": 4}
    config = peft.AdaLoraConfig(target_modules=PROJECTIONS, **ranks, **PEFT_SCHEDULE)
    other = peft.get_peft_model(tiny_llama(), config).base_model
    theirs = {}
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
    model = adapted("adalora", rank=4)
    pruned = []
    other, theirs = peft_twin(model)
    for step in range(1, 15):
        if resumed and step == 6:
            state = model.state_dict()
            model = adapted("adalora", rank=4, seed=9)
            model.load_state_dict(state)
        step_both(model, theirs, step)
        allocate_ranks(model, step, **OUR_SCHEDULE)
        last = {"force_mask": True} if step >= 11 else {}  # the final phase keeps its first choice
        other.rankallocator.update_and_allocate(other.model, step, **last)
        ours = trained(model)
        assert_same(ours, {name: theirs[name].view_as(p) for name, p in ours.items()}, **CLOSE)
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
        allocate_ranks(model, 10, **{**OUR_SCHEDULE, name: value})
    with pytest.raises(ValueError, match="for adapter='adalora'"):
        allocate_ranks(adapted("lora"), 10, **OUR_SCHEDULE)


def test_the_penalty_is_the_mean_distance_from_orthonormal_and_trains_the_factors():
    start = apply_monkeyjump(tiny_llama(), adapter="adalora")
    assert orthogonal_regularization(start) < 1e-5
    model = adapted("adalora")
    norms = []
    for name, p in trained(model).items():
        if p.dim() == 2:
            matrix = (p.T if name.endswith("A") else p).double()
            norms.append(float((matrix.T @ matrix - torch.eye(2)).pow(2).sum().sqrt()))
    loss = orthogonal_regularization(model)
    loss.backward()
    assert float(loss) == pytest.approx(sum(norms) / len(norms), rel=1e-5)
    assert {p.dim() for p in trained(model).values() if p.grad is not None} == {2}


# ----------------------------------------------------------------------------------- the repository
MODULE = ast.parse(Path(mj.__file__).read_text())


def test_the_module_imports_little_and_prints_only_where_a_name_says_so():
    imported = set()
    printing = set()
    for node in ast.walk(MODULE):
        calls = [inner for inner in ast.walk(node) if isinstance(inner, ast.Call)]
        prints = any(getattr(call.func, "id", "") == "print" for call in calls)
        if isinstance(node, ast.FunctionDef) and prints:
            printing.add(node.name)
    for node in MODULE.body:  # at the top; others where they are needed
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert printing == {"print_trainable_parameters"}
    assert imported - set(sys.stdlib_module_names) == {"torch", "einops"}
