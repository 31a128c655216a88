"""Tiny models of every type that transformers registers, and the table of those that were tried.

python benchmarks/architectures.py > benchmarks/architectures.md     # four minutes on one core

Run as a program it runs test_architectures.py and prints which types pass it. The tests import
its models: `tiny_model("llama")`, and what to call them with: `text_inputs(model)`,
`image_inputs(model)`, `video_inputs(model)`.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import inspect
import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto import modeling_auto

ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------------------------- the types
# All causal and vision-language types; one that is both is asked for text alone.
TYPES = dict.fromkeys(
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, AutoModelForImageTextToText
)
TYPES |= dict.fromkeys(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM)
for name in ("blt", "evolla"):  # their tokens are patches of bytes, and proteins
    TYPES.pop(name, None)

# Refused by apply_monkeyjump, and why.
UNROUTABLE = {
    "deepseek_v4 gemma3n_text hy_v4 hy_v4_vl": "hidden states have four dimensions",
    "prophetnet qwen4_exp qwen4_exp_text": "several streams in one hidden state",
    "florence2 pix2struct pp_formulanet t5gemma2 udop": "encoder-decoder",
    "cpmant": "puts tokens in front",
    "xlm": "no class of blocks",
    "xlnet": "attention without linears",
}
UNROUTABLE = {name: why for names, why in UNROUTABLE.items() for name in names.split()}

# ------------------------------------------------------------------------------- tiny configs
# An integer of a config becomes at most what the first pattern that its name contains says;
# None: it stays as it is.
LIMITS = {
    r"_token_i|_offset$|factor|conv|kernel|period|every|temporal|interval|per_second": None,
    r"deepstack|mtp|compress": None,
    r"^((n|topk|num_expert)_group|(mamba_)?n_?groups|o_groups)$": 1,
    r"layers$|n_layer$|depth$|num_blocks|per_tok|[^x]_topk$|top_k|_k$|topk_blocks|loops|passes": 2,
    r"(kv|key|[^r]_key_value)_heads$": 2,
    r"mamba_(n_|num_)?heads$|(?<!qk_)head_?dim$|dim_head|d_head|d_kv|head_size|kv_channels": 8,
    r"index_topk|d_state|state_size|hidden_size_per_layer_input|attn_scalar|laurel|rotary_dim": 8,
    r"heads$|n_head$|experts$|patch_size|latents|query_tokens|query_num|chunk_size|per_image": 4,
    r"lora_rank|d_rel|crop_size|image_size": 16,
    r"intermediate_size|ffn|d_ff|dim_ff|dff|mlp_dim|n_inner|feed_forward_size|expert_dim": 48,
    r"moe_hidden_size": 48,
    r"vocab_size|num_embeddings|codebook_size|position|n_ctx|seq_len|max_length|window": 128,
    r"context_length|rel_extent": 128,
    r"hidden_size|d_model|n_embd|dim_model|emb(ed|edding)?_(dim|size)|embed_proj": 32,
    r"projection_dim|adapter_(in|out)|lru_width|output_dim|proj_dims|d_inner|projector_": 32,
}
IMAGE = 90
VIDEO = 91  # the tokens that mark their places
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOKENS |= {"image_token_id": IMAGE, "image_token_index": IMAGE}
TOKENS |= {"video_token_id": VIDEO, "video_token_index": VIDEO}

# Sizes that must divide, multiply or exclude one another: fields of a config, or of a part of it.
MROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
MROPE = {"text_config": {"rope_parameters": {**MROPE, "mrope_section": [2, 1, 1]}}}
ZAMBA = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4}
ZAMBA |= {"num_mem_blocks": 1, "attention_hidden_size": 64, "attention_head_dim": 16}
CHANGES = {
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": IMAGE}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 8},
    "mllama": {"text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]}},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xmod": {"default_language": "en_XX"},
    "zamba": ZAMBA,
    "zamba2": ZAMBA,
}
WITH_MROPE = """cosmos3_edge glm46v glm4v glm4v_moe glm_ocr glmga hy_v4_vl paddleocr_vl qwen2_5_vl
qwen2_vl"""
CHANGES |= dict.fromkeys(WITH_MROPE.split(), MROPE)


def limit_of(name: str) -> int | None:
    """The largest integer for a field of this name; None: any."""
    for pattern, limit in LIMITS.items():
        if re.search(pattern, name):
            return limit
    return None


def small_fields(default: dict[str, Any]) -> dict[str, Any]:
    """Of a config's fields those that must be smaller, or other, than they are by default."""
    fields: dict[str, Any] = {}
    unnamed = 99  # special tokens are distinct, and at the top of the vocabulary
    for name, value in default.items():
        limit = limit_of(name)
        may_be_small = limit in (1, 2, 4, 8) or name == "sliding_window"
        if re.search(r"_token_(id|index)$", name):
            fields[name] = TOKENS.get(name, unnamed)
            unnamed -= 1
        elif limit is not None and type(value) is int:
            fields[name] = min(limit, value)
        elif value is None and may_be_small:
            fields[name] = limit
        elif type(value) is float and "drop" in name:
            fields[name] = 0.0
        elif name == "use_mamba_kernels":
            fields[name] = False
    if "kv_lora_rank" in default and "num_key_value_heads" in fields:  # latent attention
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    return fields


def layer_of_each_kind(default: dict[str, Any]) -> dict[str, Any]:
    """Depth, and the lists that have an entry a layer: a layer of each kind, two at least."""
    depths = [name for name in default if re.fullmatch("num_(hidden_)?layers|n_layers?", name)]
    depth = next((name for name in depths if default[name]), None)
    entries = {}
    for name, value in default.items():
        an_entry_a_layer = isinstance(value, list) and len(value) == default.get(depth, -1)
        if an_entry_a_layer and not isinstance(value[0], list):
            entries[name] = list(dict.fromkeys(value))
    if not entries:
        return {}
    kinds = [len(values) for values in entries.values() if isinstance(values[0], str)]
    layers = max([2, *kinds])
    fields = {name: (values * layers)[:layers] for name, values in entries.items()}
    return {depth: layers, **fields}


def tiny_config(kind: type, changes: dict[str, Any] | None = None) -> transformers.PreTrainedConfig:
    """A config of this class, and of its parts, with small sizes; `changes` have the last word."""
    default = kind().to_dict()
    changes = dict(changes or {})
    fields = small_fields(default) | layer_of_each_kind(default)
    for name, part in getattr(kind, "sub_configs", {}).items():
        model_type = (default.get(name) or {}).get("model_type")
        if part.__name__ == "AutoConfig" and model_type in CONFIG_MAPPING:
            part = CONFIG_MAPPING[model_type]
        if part.__name__ != "AutoConfig":
            fields[name] = tiny_config(part, changes.pop(name, None)).to_dict()
    return kind(**fields | changes)


# ---------------------------------------------------------------------- tiny models, and inputs
@functools.lru_cache(maxsize=4)
def base_model(model_type: str) -> nn.Module:
    """One model of this type, to be copied: building takes longer than that."""
    torch.manual_seed(0)
    config = tiny_config(CONFIG_MAPPING[model_type], CHANGES.get(model_type))
    model = TYPES[model_type].from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        closed_gate = not parameter.any() and not name.endswith("bias")
        if closed_gate:  # nothing behind it would train
            nn.init.normal_(parameter, std=0.1)
    return model


def tiny_model(model_type: str) -> nn.Module:
    """A tiny float32 model of this type in eval mode, always the same."""
    return copy.deepcopy(base_model(model_type))


def text_inputs(model: nn.Module, tokens: int = 9) -> dict[str, Tensor]:
    """Two rows of text [2, tokens] as this model takes them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 80, (2, tokens), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kind_of_text = {"gemma3": 0, "paligemma": 1}.get(model.config.model_type)
    if kind_of_text is not None:  # asked for in training
        inputs["token_type_ids"] = torch.full_like(ids, kind_of_text)
    return inputs


def pixels(*shape: int) -> Tensor:
    """Something to look at, of this shape."""
    return torch.arange(float(torch.Size(shape).numel())).sin().view(shape)


def with_places(model: nn.Module, token: int, places: int) -> dict[str, Tensor]:
    """Two rows of text in which `places` tokens stand for an image or a video."""
    inputs = text_inputs(model, tokens=places + 4)
    inputs["input_ids"][:, 2 : 2 + places] = token
    marked = inputs["input_ids"] == token
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = marked * (1 if token == IMAGE else 2)
    elif model.config.model_type == "gemma3":
        inputs["token_type_ids"] = marked.long()
    return inputs


def image_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Two rows with an image of 16 x 16 pixels each, as a processor gives it."""
    model_type = model.config.model_type
    inputs = with_places(model, IMAGE, places=16 if model_type == "llava" else 4)
    if model_type.startswith("qwen"):  # patches in a row, two frames each
        inputs["pixel_values"] = pixels(2, 3, 16, 16).repeat(2, 1, 1, 1).view(32, 96)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
    elif model_type == "idefics3":
        inputs["pixel_values"] = pixels(2, 1, 3, 16, 16)
    else:
        inputs["pixel_values"] = pixels(2, 3, 16, 16)
    return inputs


def video_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Two rows with a video of four frames each, as a processor gives it."""
    model_type = model.config.model_type
    places = {"qwen2_5_vl": 8, "llava_next_video": 16, "llava_onevision": 17}
    inputs = with_places(model, VIDEO, places[model_type])
    if model_type.startswith("qwen"):  # two frames make a patch
        inputs["pixel_values_videos"] = pixels(64, 96)
        inputs["video_grid_thw"] = torch.tensor([[2, 4, 4]] * 2)
    else:
        inputs["pixel_values_videos"] = pixels(2, 4, 3, 16, 16)
    return inputs


# ------------------------------------------------------------------------------------ the table
class Outcomes:
    """A plugin of pytest: of each type's tests, "passed", "failed", or why they were skipped."""

    def __init__(self) -> None:
        self.of_type: dict[str, dict[str, str]] = collections.defaultdict(dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note how a test ended."""
        if report.when != "call":
            return
        name, _, model_type = report.nodeid.rstrip("]").partition("[")
        test = name.partition("architecture_")[2]
        outcome = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else report.outcome
        self.of_type[model_type][test] = " ".join(outcome.split())


def experts_of(model_type: str) -> str:
    """What apply_monkeyjump(model) takes for experts in each kind of block, by their last names."""
    from monkeyjump import Router, apply_monkeyjump

    kinds = {}
    for module in apply_monkeyjump(tiny_model(model_type), top_k=1).modules():
        if isinstance(module, Router) and module.experts:
            leaves = [name.rpartition(".")[2] for name in module.experts]
            kinds[" ".join(leaves)] = None
    return "; ".join(kinds)


def sorted_out(of_type: dict[str, dict[str, str]]) -> list[dict[str, list[str]]]:
    """The types by their experts, those that pass in part by what fails, those not tried by why."""
    passed, partly, never = (collections.defaultdict(list) for _ in range(3))
    for model_type, results in of_type.items():
        skipped = {test: why for test, why in results.items() if why != "passed"}
        if "failed" in results.values():
            never["**FAILED**"].append(model_type)
        elif len(skipped) == len(results):
            why = next(iter(skipped.values()))
            never[why[:110]].append(model_type)
        else:
            passed[experts_of(model_type)].append(model_type)
            for test, why in skipped.items():
                partly[f"{test}: {why[:80]}"].append(model_type)
    for model_type, why in UNROUTABLE.items():
        if model_type in TYPES:
            never[f"refused: {why}"].append(model_type)
    return [passed, partly, never]


def print_table(head: str, rows: dict[str, list[str]]) -> None:
    """In markdown, the longest row first."""
    print(f"| {head} | types |\n|---|---|")
    for key, types in sorted(rows.items(), key=lambda row: -len(row[1])):
        print(f"| {key.replace('|', '/')} | {' '.join(sorted(types))} |")


def main() -> None:
    """Run the tests of every architecture, and print what they say."""
    sys.path.insert(0, str(ROOT))
    outcomes = Outcomes()
    tests = Path(__file__).with_name("test_architectures.py")
    arguments = ["-q", "-p", "no:warnings", str(tests), "-k", "on_every"]
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(arguments, [outcomes])
    passed, partly, never = sorted_out(outcomes.of_type)
    count = sum(len(types) for types in passed.values())
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print("# Tried on\n")
    print(f"Made with `python benchmarks/architectures.py` ({versions}):")
    print(f"**{count} of the {len(TYPES)} causal and vision-language types** that transformers")
    print("registers are adapted with `apply_monkeyjump(model)` and nothing else, and pass the")
    print("tests of every architecture that they can pass without adapters.\n")
    print_table("projections that become experts by default (each kind of block)", passed)
    print("\n## Passed but for what the base model itself fails\n")
    print_table("why", partly)
    print("\n## Not tried\n")
    print_table("why", never)


if __name__ == "__main__":
    main()
