"""Tests of monkeyjump.py on every type of model, with images and video, and on quantised bases.

pytest -n 2 benchmarks/test_architectures.py

A test is skipped where the base model fails without adapters: that is not ours to test.
"""

import contextlib
import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import monkeyjump as mj
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
    load_adapter,
    print_trainable_parameters,
    record_routing,
    remove_monkeyjump,
)
from test_monkeyjump import (
    CLOSE,
    NEAR,
    OWN_ADAPTERS,
    TEXT,
    adapted,
    all_differ,
    assert_all_train,
    assert_near,
    assert_saved_and_loaded,
    by_sgd,
    centers,
    experts_of,
    generated_logits,
    gently_adapted,
    gradients,
    grid,
    logits,
    noted_calls,
    peft_llama,
    routed,
    routed_slowly,
    same_logits,
    tiny_llama,
    trained,
    unless_base_fails,
)

EVERY = pytest.mark.parametrize("model_type", sorted(TYPES.keys() - UNROUTABLE), scope="module")
# Blocks, where the config counts something else.
DEPTH = {"hrm_text": 4, "longcat_flash": 2, "mllama": 2}


def base_of(model_type):
    """A tiny model; where even its builder fails, the test is skipped."""
    return unless_base_fails(lambda: tiny_model(model_type))


def number_of_blocks(model, model_type):
    """By the config, without the blocks that have no token mixer (nemotron_h)."""
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layers_block_type", [])
    blocks = DEPTH.get(model_type, config.num_hidden_layers)
    return blocks - sum(kind in ("mlp", "moe") for kind in kinds)


def adapted_paths(model):
    """A pattern that matches the projections that carry an adapter."""
    paths = []
    for path, module in model.named_modules():
        if isinstance(getattr(module, "monkeyjump", None), mj.Adapter):
            paths.append(f"^{re.escape(path)}$")
    return "|".join(paths)


# --------------------------------------------------------------------------------------- every type
@EVERY
def test_on_every_architecture_new_adapters_change_nothing_and_go_without_a_trace(model_type):
    model = base_of(model_type)
    inputs = text_inputs(model)
    names = list(model.state_dict())
    expected = unless_base_fails(lambda: logits(model, inputs))
    blocks = experts_of(apply_monkeyjump(model, top_k=1))
    assert len(blocks) == number_of_blocks(model, model_type), sorted(blocks)
    assert not re.search("vision|visual|audio|qformer|perceiver", " ".join(blocks))
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
    inputs = text_inputs(model)
    padded = {}
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
        found = logits(model, padded)[:, 3:]
        expected = logits(model, inputs)
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
    model = base_of(model_type).train()
    other = base_of(model_type).train()
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


# --------------------------------------------------------------------------------- images and video
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
    model = base_of(model_type)
    name = VISION_BLOCKS[model_type]
    inputs = image_inputs(model)
    blocks = None
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


# ------------------------------------------------------------------------- particular architectures
def test_a_block_whose_forward_lies_on_the_instance_is_routed_and_the_bases_again():
    model = tiny_llama()
    for block in model.model.layers:  # as transformers 5.0 does when asked for hidden states
        block.forward = type(block).forward.__get__(block)
    assert_all_train(gently_adapted(model))
    assert same_logits(remove_monkeyjump(model.eval()), tiny_llama())


def test_blocks_of_shared_adapters_alone_are_adapted_and_not_routed():
    model = tiny_model("jamba")
    path = "model.layers.0.mamba.out_proj"
    adapted(base=model, linears="q_proj", shared_expert=["mamba.out_proj", "o_proj"], top_k=1)
    assert experts_of(model) == {"model.layers.1": ["self_attn.q_proj"]}
    with noted_calls(model, f"{path}$") as seen:
        assert_all_train(model, text_inputs(model))
    (x, *_), found = seen[path][-1]
    layer = model.get_submodule(path)
    own = layer.monkeyjump
    expected = x @ layer.weight.T + 8.0 * x @ own.lora_A.T @ own.lora_B.T  # 8: alpha / r
    assert_close(found, expected)


# ---------------------------------------------------------------------------------- quantised bases
class QuantisedLinear(nn.Module):
    """What a quantised layer looks like: packed 8-bit weights, and no float matrix to read."""

    def __init__(self, linear):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
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


def test_packed_four_bit_weights_are_counted_as_the_parameters_that_they_hold():
    model = tiny_llama()
    total = sum(p.numel() for p in model.parameters())
    for block in model.model.layers:
        block.self_attn.q_proj = by_bitsandbytes(block.self_attn.q_proj, bits=4)
    model = apply_monkeyjump(model, rank=2)
    new = sum(p.numel() for p in trained(model).values())
    line = print_trainable_parameters(model)
    assert line.startswith(f"trainable params: {new:,} || all params: {total + new:,} ||")


@grid(adapter=OWN_ADAPTERS)
def test_on_a_quantised_base_adapters_start_as_the_identity_train_and_are_saved(adapter, tmp_path):
    assert same_logits(apply_monkeyjump(quantised_llama(), adapter=adapter), quantised_llama())
    model = adapted(adapter, quantised_llama(), top_k=4)
    assert_all_train(model)
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    assert_saved_and_loaded(model, quantised_llama(), TEXT, tmp_path)


@grid(bits=[8, 4])
def test_a_base_of_bitsandbytes_is_adapted(bits):
    model = apply_monkeyjump(quantised_llama(bits))
    assert same_logits(model, quantised_llama(bits))
    assert_all_train(adapted(base=quantised_llama(bits), top_k=4))


@grid(bits=[8, 4])
def test_pefts_adapters_on_a_base_of_bitsandbytes_are_routed(bits):
    model = peft_llama(base=quantised_llama(bits))
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert "bnb" in type(layer).__module__
    fast = routed(model)
    slow = routed_slowly(model, fast)
    assert_near(gradients(fast), gradients(slow), tolerance=0.1)
    assert_close(logits(fast), logits(slow), atol=0.03, rtol=0.03)
