"""Tests of train_example.py and README: what a user reads, types, and types wrong.

pytest -n 2 benchmarks/test_train_example.py
"""

import copy
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import datasets
import huggingface_hub
import pytest
import torch
import transformers
import trl
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import monkeyjump as mj
import train_example
from benchmarks.architectures import image_inputs, tiny_model
from monkeyjump import apply_monkeyjump, save_adapter
from test_monkeyjump import TEXT, batch, rows_of, tiny_llama

EXAMPLE = Path(train_example.__file__)
README = EXAMPLE.with_name("README.md")
EXAMPLE_FLAGS = """--use_cpu --per_device_train_batch_size 4 --learning_rate 0.01 --logging_steps 5
--disable_tqdm yes --test_split_size 0.2 --gradient_checkpointing no"""
EXAMPLE_SHAPE = {"hidden_size": 64, "intermediate_size": 64}
EXAMPLE_SHAPE |= {"num_hidden_layers": 2, "num_attention_heads": 4}
EXAMPLE_CHAT = """{% for m in messages %}{% for part in m.content %}{{ part.text or '<image>' }}\
{% endfor %}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"""
# Accelerate shards on accelerators only, though gloo can: two CPU processes pass for such.
EXAMPLE_FSDP_ON_CPU = """
import accelerate.state as state, train_example
initialise, kinds = state.PartialState.__init__, state.DistributedType
def pretend(self, *arguments, **keywords):
    initialise(self, *arguments, **keywords)
    if self.distributed_type == kinds.MULTI_CPU:
        self.distributed_type = kinds.MULTI_GPU
state.PartialState.__init__ = pretend
train_example.main()
"""


def example_run(flags):
    """Run the example in this process."""
    train_example.main(shlex.split(f"{EXAMPLE_FLAGS} {flags}"))


def example_error(flags):
    """The line with which the example refuses these flags."""
    with pytest.raises(SystemExit) as stop:
        example_run(flags)
    return str(stop.value.code)


def example_start(flags, log, program=EXAMPLE, processes=1):
    """Start the example as processes of their own, which write to the file log."""
    path = os.pathsep.join([str(EXAMPLE.parent), *sys.path])
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    line = [sys.executable]
    if processes > 1:
        line += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    line += [str(program), *shlex.split(f"{EXAMPLE_FLAGS} {flags}")]
    with open(log, "w") as file:
        return subprocess.Popen(line, env={**os.environ, **quiet}, stdout=file, stderr=file)


def example_finish(flags, log, **launch):
    """Run the example as processes of their own to its end; one that hangs is ended."""
    with example_start(flags, log, **launch) as process:
        try:
            code = process.wait(120)
        finally:
            process.terminate()  # torchrun takes its processes along
    assert code == 0, log.read_text()[-3000:]


def example_history(folder, name="loss"):
    """By step, what the newest checkpoint's log says."""
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[name] for entry in history if name in entry}


def example_losses(printed, task="all"):
    """A task's loss before and after training."""
    line = re.search(rf"{task}: loss (\S+) -> (\S+),", printed)
    return float(line[1]), float(line[2])


def example_rows(path, rows):
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def example_pair(prompt, completion, **columns):
    """A row in TRL's format."""
    return {"prompt": prompt, "completion": completion, **columns}


def example_tokenizer():
    """A token a byte."""
    special = ["<s>", "</s>", "<pad>", "<image>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def example_llava(folder, tokenizer, llama):
    """A tiny LLaVA with its processor."""
    pictures = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    settings = {"patch_size": 8, "vision_feature_select_strategy": "default"}
    settings |= {"num_additional_image_tokens": 1, "chat_template": EXAMPLE_CHAT}
    transformers.LlavaProcessor(pictures(**sizes), tokenizer, **settings).save_pretrained(folder)
    eyes = CLIPVisionConfig(**EXAMPLE_SHAPE, image_size=16, patch_size=8)
    marks = {"image_token_index": 3, "image_token_id": 3}
    config = LlavaConfig(vision_config=eyes, text_config=llama, **marks)
    LlavaForConditionalGeneration(config).save_pretrained(folder)


CHAT = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}</s>{% endfor %}"


def byte_llama():
    """A tiny model with room for every byte."""
    return tiny_llama(vocab_size=260, max_position_embeddings=512)


class TinyHub:
    """What README asks a hub for, made small: models, tokenizers, data, an adapter's folder."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        small = {
            "AutoModelForCausalLM": byte_llama,
            "AutoModelForImageTextToText": partial(tiny_model, "llava"),
            "AutoModelForSequenceClassification": self.classifier,
            "AutoTokenizer": self.tokenizer,
            "AutoProcessor": self.processor,
        }
        for name, make in small.items():
            loads = partial(self.load, make)
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
    def tokenizer():
        tokenizer = example_tokenizer()
        tokenizer.chat_template = CHAT
        return tokenizer

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


@pytest.fixture(scope="session")
def example_folder(tmp_path_factory):
    """A tiny Llama in text/ and text.jsonl, a tiny LLaVA in vision/ and pictures/."""
    folder = tmp_path_factory.mktemp("example")
    tokenizer = example_tokenizer()
    torch.manual_seed(0)
    tokens = {"vocab_size": 260, "eos_token_id": 1, "pad_token_id": 2}
    llama = LlamaConfig(initializer_range=0.2, **tokens, **EXAMPLE_SHAPE)
    LlamaForCausalLM(llama).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    example_llava(folder / "vision", tokenizer, llama)
    turns = []
    for letter in "abcdefghijklmnop":
        question = {"role": "user", "content": f"up {letter}:"}
        turns.append([question, {"role": "assistant", "content": letter.upper()}])
    example_rows(folder / "text.jsonl", 3 * [{"messages": messages} for messages in turns])
    (folder / "pictures").mkdir()
    rows = []
    for color in ("red", "blue"):
        Image.new("RGB", (20, 20), color).save(folder / "pictures" / f"{color}.png")
        rows.append(example_pair("color?", color, file_name=f"{color}.png"))
    example_rows(folder / "pictures" / "metadata.jsonl", rows)
    return folder


@pytest.fixture
def example_text(example_folder):
    """The flags for the tiny Llama and its rows."""
    return f"--model {example_folder}/text --dataset {example_folder}/text.jsonl"


@pytest.fixture(scope="session")
def example_mix(example_folder, tmp_path_factory):
    """What a run on three tasks, mixed by --config, printed and wrote."""
    folder = tmp_path_factory.mktemp("mix")
    rows = [example_pair(f"up {letter}:", letter.upper()) for letter in "abcdefghijkl"]
    example_rows(folder / "up.jsonl", [{**row, "task": "up"} for row in rows])
    example_rows(folder / "yes.jsonl", 12 * [example_pair("is it?", "yes", task="yes")])
    digits = "".join(f"{number} again:,{number},digit\n" for number in range(8))
    (folder / "digit.csv").write_text("prompt,completion,task\n" + digits)
    names = ("up.jsonl", "yes.jsonl", "digit.csv")
    mixture = "".join(f"  - path: {folder / name}\n" for name in names)
    routing = "linears: [q_proj, k_proj]\nshared_expert: [v_proj, o_proj, up_proj, down_proj]\n"
    routing += "top_k: 1\nrank: 8\nrep_mode: prompt_end\n"
    (folder / "run.yaml").write_text(f"max_steps: 50\n{routing}datasets:\n{mixture}")
    printed = folder / "printed"
    flags = f"--model {example_folder}/text --config {folder}/run.yaml --save_steps 25"
    with open(printed, "w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        example_run(f"{flags} --output_dir {folder}/out --gradient_accumulation_steps 2")
    return folder / "out", printed.read_text()


def test_example_learns_each_task_of_a_mixture(example_mix):
    for task in ("up", "yes", "digit"):
        before, after = example_losses(example_mix[1], task)
        assert after < before / 2


def test_example_says_which_expert_serves_which_task(example_mix):
    lines = example_mix[1].splitlines()
    start = min(i for i, line in enumerate(lines) if line.startswith("model.layers."))
    assert lines[start].split()[1:] == ["self_attn.q_proj", "self_attn.k_proj"]
    table = {line.split()[0]: line.split()[1:] for line in lines[start + 1 : start + 4]}
    assert sorted(table) == ["digit", "up", "yes"]
    for shares in table.values():
        assert sum(int(share.rstrip("%")) for share in shares) == pytest.approx(100, abs=1)


def test_example_shows_an_answer_to_each_task(example_mix):
    assert "'is it?' -> 'yes', right is 'yes'" in example_mix[1]
    assert example_mix[1].count(", right is ") == 3


def test_example_says_which_form_it_trains_and_how_many_parameters(example_mix):
    model = tiny_llama(2, hidden_size=64, intermediate_size=64, num_key_value_heads=4)
    others = ["v_proj", "o_proj", "up_proj", "down_proj"]
    apply_monkeyjump(model, linears=["q_proj", "k_proj"], shared_expert=others, rank=8)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    line = next(line for line in example_mix[1].splitlines() if "form" in line)
    assert f"trainable params: {trained:,} " in line


def test_example_saves_adapters_and_tokenizer_and_no_base_model(example_mix):
    names = {path.name for path in (example_mix[0] / "checkpoint-50").iterdir()}
    assert names >= {"monkeyjump.safetensors", "tokenizer.json", "optimizer.pt"}
    assert not names & {"model.safetensors", "adapter_config.json", "adapter_model.safetensors"}


def test_example_takes_options_from_a_yaml_file(example_mix):
    config = json.loads((example_mix[0] / "monkeyjump.json").read_text())
    assert (config["rep_mode"], config["linears"]) == ("prompt_end", ["q_proj", "k_proj"])


def test_example_writes_a_card_whose_lines_load_the_adapter(example_mix, example_folder):
    card = (example_mix[0] / "README.md").read_text()
    assert "Monkey Jump" in card
    assert "rep_mode='prompt_end'" in card
    names = {}
    exec(re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1], names)
    tensors = load_file(example_mix[0] / "monkeyjump.safetensors")
    loaded = names["model"].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert names["processor"].chat_template == train_example.TEMPLATE


def test_example_goes_on_after_a_kill_as_if_there_had_been_none(example_text, tmp_path):
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    flags = f"{example_text} --adapter adalora --rank 4 --target_rank 2 --update_every 2"
    flags += " --jitter_noise 0.1 --max_steps 20 --save_steps 5 --gradient_accumulation_steps 2"
    example_run(f"{flags} --output_dir {whole}")
    process = example_start(f"{flags} --output_dir {killed}", tmp_path / "log")
    while not (killed / "checkpoint-10" / "monkeyjump.safetensors").exists():
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "checkpoint-20").exists()
    example_run(f"{flags} --output_dir {killed} --resume_from_checkpoint true")
    found = load_file(killed / "monkeyjump.safetensors")
    torch.testing.assert_close(found, load_file(whole / "monkeyjump.safetensors"), atol=0, rtol=0)
    assert example_history(killed) == example_history(whole)
    ranks = [int(t.count_nonzero()) for name, t in found.items() if name.endswith(".lora_E")]
    assert sum(ranks) == 2 * len(ranks)  # one budget for all
    cut = killed / "checkpoint-20" / "trainer_state.json"
    cut.write_text(cut.read_text()[:200])  # as if killed while it was written
    assert train_example.last_checkpoint(killed) == str(killed / "checkpoint-15")


def test_example_continues_a_saved_adapter_in_its_form(example_text, tmp_path, capsys):
    first = f"--linears q_proj v_proj --top_k 1 --max_steps 15 --output_dir {tmp_path}/first"
    example_run(f"{example_text} {first} --save_strategy no")
    reached = example_losses(capsys.readouterr().out)[1]
    more = f"--adapter_path {tmp_path}/first --output_dir {tmp_path}/more --max_steps 1"
    example_run(f"{example_text} {more} --save_strategy no")
    assert example_losses(capsys.readouterr().out)[0] == pytest.approx(reached, abs=1e-3)


EXAMPLE_ODD_RUNS = {
    "packing": "--packing --max_length 64",
    "loss on the prompt too": "--completion_only_loss no",
    "checkpointing and bfloat16": "--gradient_checkpointing yes --bf16 yes",
    "the best checkpoint at the end": "--load_best_model_at_end yes --eval_strategy steps "
    "--eval_steps 1 --save_steps 1 --metric_for_best_model eval_all_loss",
}


@pytest.mark.parametrize("case", EXAMPLE_ODD_RUNS)
def test_example_runs_to_the_end_with(case, example_text, tmp_path, capsys):
    flags = f"--max_steps 2 --save_strategy steps {EXAMPLE_ODD_RUNS[case]}"
    example_run(f"{example_text} --output_dir {tmp_path}/out {flags}")
    assert ", right is " in capsys.readouterr().out


def test_example_trains_on_a_folder_of_pictures(example_folder, tmp_path, capsys):
    flags = f"--model {example_folder}/vision --dataset {example_folder}/pictures --max_steps 20"
    flags += f" --save_strategy no --dataset_test_split train --output_dir {tmp_path}/out"
    example_run(flags)
    printed = capsys.readouterr().out
    before, after = example_losses(printed)
    assert after < before / 5
    assert re.search(r"-> '(red|blue)', right is '\1'", printed)


def test_example_finds_pictures_beside_the_file_under_another_name(example_folder, tmp_path):
    rows = [example_pair("color?", "red", photo="pictures/red.png"), example_pair("who?", "me")]
    example_rows(example_folder / "photos.jsonl", rows)
    flags = f"--model {example_folder}/vision --dataset {example_folder}/photos.jsonl --use_cpu"
    options = train_example.read_flags([*flags.split(), "--columns", "image=photo"])[0]
    processor = transformers.AutoProcessor.from_pretrained(example_folder / "vision")
    found = train_example.load_rows(options, processor, "train")
    sizes = [[picture.size for picture in row["images"]] for row in found]
    assert sizes == [[(20, 20)], []]


def test_example_leaves_out_and_counts_rows_over_the_limit(example_folder, tmp_path, capsys):
    rows = [example_pair("a", "b"), example_pair("a" * 30, "b"), example_pair("c", "d")]
    example_rows(tmp_path / "rows.jsonl", rows)
    flags = f"--dataset {tmp_path}/rows.jsonl --max_length 20 --use_cpu"
    options = train_example.read_flags(flags.split())[0]
    processor = transformers.AutoTokenizer.from_pretrained(example_folder / "text")
    processor.chat_template = train_example.TEMPLATE
    assert len(train_example.load_rows(options, processor, "train")) == 2
    assert "1 of 3 rows" in capsys.readouterr().out


def test_example_takes_a_mark_of_a_picture_that_has_other_fields():
    train_example.check_parts([{"type": "image", "index": 0, "text": None, "image": None}])


EXAMPLE_ASSISTANT = {"role": "assistant", "content": "b"}
EXAMPLE_VIDEO = [{"type": "video"}, {"type": "text", "text": "a"}]
EXAMPLE_PAYLOAD = [{"type": "image", "image": "red.png"}, {"type": "text", "text": "a"}]
# What is wrong in the third row, and what is said of it.
EXAMPLE_WRONG_ROWS = {
    "null answer": (example_pair("a", None), "the assistant's text is missing, null or empty"),
    "no answer": ({"prompt": "a"}, "the assistant's text is missing, null or empty"),
    "empty answer": (example_pair("a", ""), "the assistant's text is missing, null or empty"),
    "null question": (example_pair(None, "b"), "the user's text is missing, null or empty"),
    "empty messages": ({"messages": []}, "the last turn is not the assistant's"),
    "user's turn last": (
        {"messages": [EXAMPLE_ASSISTANT, {"role": "user", "content": "a"}]},
        "the last turn is not the assistant's",
    ),
    "path of a picture": (example_pair("a", "b", image_path="red.png"), "'image_path' is not used"),
    "path of a video": (example_pair("a", "b", clip="x/y.mp4"), "'clip' is not used"),
    "path of a sound": (example_pair("a", "b", sound="y.wav"), "'sound' is not used"),
    "video in a message": (
        {"messages": [{"role": "user", "content": EXAMPLE_VIDEO}, EXAMPLE_ASSISTANT]},
        "the video in a message is not used",
    ),
    "picture in a message": (
        {"messages": [{"role": "user", "content": EXAMPLE_PAYLOAD}, EXAMPLE_ASSISTANT]},
        "the image in a message is not used",
    ),
    "picture for a text model": (
        example_pair("a", "b", images=["red.png"]),
        "it holds pictures, but the model reads text alone",
    ),
    "unreadable picture": (example_pair("a", "b", images=["broken.png"]), "broken.png"),
    "missing picture": (example_pair("a", "b", images=["none.png"]), "none.png"),
}


@pytest.fixture
def example_no_weights(monkeypatch):
    """No model can be loaded."""

    def refuse(*args, **kwargs):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(train_example.AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(train_example.AutoModelForImageTextToText, "from_pretrained", refuse)


@pytest.mark.parametrize("case", EXAMPLE_WRONG_ROWS)
def test_example_names_the_row_with(case, example_folder, example_no_weights, tmp_path):
    wrong, expected = EXAMPLE_WRONG_ROWS[case]
    right = example_pair("a", "b")
    if "messages" in wrong:
        question = [{"type": "text", "text": "a"}] if "in a message" in case else "a"
        right = {"messages": [{"role": "user", "content": question}, EXAMPLE_ASSISTANT]}
    example_rows(tmp_path / "rows.jsonl", [right, right, wrong])
    Image.new("RGB", (4, 4)).save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_text("not a picture")
    kind = "vision" if expected.endswith(".png") else "text"
    flags = f"--model {example_folder}/{kind} --dataset {tmp_path}/rows.jsonl"
    error = example_error(f"{flags} --output_dir {tmp_path}/out")
    assert error.startswith(f"train_example.py: error: {tmp_path}/rows.jsonl, row 2: ")
    assert expected in error
    assert "\n" not in error


EXAMPLE_WRONG_FLAGS = {
    "no model": ("--dataset {tmp}/rows.csv", "--model is needed"),
    "no data": ("--model {base}", "--dataset is needed"),
    "unknown flag": ("--lerning_rate 1", "--lerning_rate"),
    "unknown adapter": ("--adapter dora", "dora"),
    "one of PEFT's flags": ("--lora_r 8", "--lora_r is not taken: see --rank"),
    "missing file": ("--dataset {tmp}/none.jsonl", "none.jsonl: no such file or folder"),
    "missing file here": ("--dataset none.jsonl", "--dataset none.jsonl: no such file or folder"),
    "missing folder": ("--dataset ./none", "--dataset ./none: no such file or folder"),
    "missing model": ("--model {tmp}/none", "none: no such file or folder"),
    "missing config": ("--config {tmp}/none.yaml", "none.yaml"),
    "missing adapter": ("--adapter_path {tmp}/none", "none"),
    "no such column": ("--columns prompt=question", "question"),
    "no such split": ("--dataset_test_split test", 'Unknown split "test"'),
    "no rows": ("--dataset {tmp}/empty.jsonl", "empty.jsonl: no rows"),
    "broken rows": ("--dataset {tmp}/broken.jsonl", "JSON"),
    "column of pictures": ("--dataset {tmp}/parquet", "the column 'photo' is not used"),
    "too many experts": ("--top_k 9", "top_k=9"),
    "ranks of another adapter": ("--target_rank 1", "adapter='lora'"),
    "too high a rank": ("--adapter adalora --target_rank 3", "target_rank=3.0"),
    "another run's folder": ("--output_dir {tmp}/taken", "taken holds another run's adapter"),
    "nothing to resume": ("--resume_from_checkpoint last", "no complete checkpoint"),
    "another adapter's checkpoint": ("--rank 4 --resume_from_checkpoint {tmp}/taken", "rank"),
}


@pytest.fixture(scope="session")
def example_wrong(example_folder, tmp_path_factory):
    """A folder of things that are wrong."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text('{"prompt": "a",')
    (folder / "rows.csv").write_text("prompt,completion\na,b\n")
    (folder / "parquet").mkdir()
    photo = str(example_folder / "pictures" / "red.png")
    rows = datasets.Dataset.from_list(4 * [example_pair("a", "b", photo=photo)])
    rows.cast_column("photo", datasets.Image()).to_parquet(folder / "parquet" / "train.parquet")
    model = LlamaForCausalLM.from_pretrained(example_folder / "text")
    save_adapter(apply_monkeyjump(model, top_k=1), folder / "taken")
    return folder


@pytest.mark.parametrize("case", EXAMPLE_WRONG_FLAGS)
def test_example_refuses_in_one_line(case, example_folder, example_text, example_wrong, tmp_path):
    flags, expected = EXAMPLE_WRONG_FLAGS[case]
    flags = flags.format(tmp=example_wrong, base=example_folder / "text")
    if case not in ("no model", "no data"):
        flags = f"{example_text} {flags}"
    if "output_dir" not in flags:
        flags = f"--output_dir {tmp_path}/out {flags}"
    error = example_error(flags)
    assert error.startswith("train_example.py: error: ")
    assert expected in error
    assert "\n" not in error
    assert list(tmp_path.iterdir()) == []


def test_example_refuses_processes_that_do_not_find_each_other(example_text, monkeypatch):
    options = train_example.read_flags(shlex.split(f"{EXAMPLE_FLAGS} {example_text}"))[0]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process a device"):
        train_example.check(options)


def test_example_refuses_several_gpus_without_a_launcher(example_text):
    options = train_example.read_flags(shlex.split(f"{EXAMPLE_FLAGS} {example_text}"))[0]
    options._n_gpu = 2
    with pytest.raises(ValueError, match="one process a device"):
        train_example.check(options)


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_example_runs_on_two_processes_as_on_one(sharded, example_text, example_wrong, tmp_path):
    log = tmp_path / "log"
    launch = {"processes": 2}
    flags = f"{example_text} --max_steps 4 --save_steps 2 --adapter_path {example_wrong}/taken"
    example_run(f"{flags} --output_dir {tmp_path}/one --per_device_train_batch_size 8")
    flags += f" --output_dir {tmp_path}/two --ddp_backend gloo"
    if sharded:
        launch["program"] = tmp_path / "fsdp_on_cpu.py"
        config = tmp_path / "fsdp.json"
        launch["program"].write_text(EXAMPLE_FSDP_ON_CPU)
        wrapped = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        config.write_text(json.dumps(wrapped))
        flags += f" --fsdp 'full_shard auto_wrap' --fsdp_config {config}"
    example_finish(flags, log, **launch)
    assert log.read_text().count("all: loss") == 1
    weights = [tmp_path / name / "monkeyjump.safetensors" for name in ("one", "two")]
    one, two = map(load_file, weights)
    torch.testing.assert_close(two, one, atol=1e-3, rtol=1e-3)
    if sharded:
        assert not list(tmp_path.glob("two/**/pytorch_model_fsdp*"))  # the base is not saved
        flags += f" --resume_from_checkpoint {tmp_path}/two/checkpoint-2"
        example_finish(flags, log, **launch)
        torch.testing.assert_close(load_file(weights[1]), two)


def test_example_trains_float32_adapters_over_a_four_bit_base(example_text, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    seen = {}

    def spy(trainer, **keywords):
        seen.update(trainer.model.named_parameters())

    monkeypatch.setattr(mj, "init_router_centers", spy)
    flags = f"--load_in_4bit --output_dir {tmp_path}/out --max_steps 2 --save_steps 2"
    example_run(f"{example_text} {flags}")
    kinds = {parameter.dtype for parameter in seen.values() if parameter.requires_grad}
    assert kinds == {torch.float32}
    assert type(seen["model.layers.0.self_attn.q_proj.weight"]).__name__ == "Params4bit"


@pytest.fixture(scope="session")
def example_demonstration(tmp_path_factory):
    """What the demonstration prints, with two flags."""
    folder = tmp_path_factory.mktemp("demonstration")
    printed = folder / "printed"
    with open(printed, "w") as file, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "stdout", file)
        flags = "--use_cpu --max_steps 40 --output_dir here --disable_tqdm yes --save_strategy no"
        train_example.main(flags.split())
    return folder, printed.read_text()


def test_example_demonstration_says_first_what_it_is(example_demonstration):
    assert example_demonstration[1].startswith("No data set is given: a demonstration.")


def test_example_demonstration_takes_flags(example_demonstration):
    assert (example_demonstration[0] / "here" / "monkeyjump.safetensors").exists()


def test_example_demonstration_learns_three_tasks(example_demonstration):
    for task in ("first", "head", "odd"):
        before, after = example_losses(example_demonstration[1], task)
        assert after < before / 2


def test_example_trains_the_recommended_form_by_default(example_demonstration):
    config = json.loads((example_demonstration[0] / "here" / "monkeyjump.json").read_text())
    assert config["linears"] == ["up_proj", "down_proj"]
    assert config["shared_expert"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert config["top_k"] == 1


def test_example_keeps_to_the_modules_form_where_the_projections_are_others(capsys):
    tokens = {"vocab_size": 50, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**tokens))
    options, routing = train_example.read_flags(["--use_cpu"], train_example.DEFAULTS)
    recommended = train_example.read_flags(["--use_cpu"], train_example.RECOMMENDED)[1]
    train_example.adapt(model, options, routing, recommended)
    assert model.monkeyjump_wiring.config == mj.MonkeyJumpConfig()


def test_example_explains_every_option_of_the_routing(capsys):
    with pytest.raises(SystemExit):
        train_example.read_flags(["--help"])
    printed = capsys.readouterr().out
    for name in mj.MonkeyJumpConfig.__dataclass_fields__:
        assert f"--{name}" in printed


@pytest.mark.parametrize("recipe", ["copy", "precompute"])
def test_example_dpo_starts_from_the_adapter_as_its_reference(recipe, tmp_path):
    tokens = {f"w{number}": number for number in range(50)}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "w0", "eos_token": "w2"}
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    trained = apply_monkeyjump(tiny_llama(), top_k=1)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    tiny_llama().save_pretrained(tmp_path / "base")
    save_adapter(trained, tmp_path / "adapter")
    rows = []
    for number in range(4, 12):
        pair = {"chosen": f"w{number + 9} w8", "rejected": f"w{number + 20} w7"}
        rows.append({"prompt": f"w{number} w9", **pair})
    settings = {"max_steps": 1, "logging_steps": 1, "use_cpu": True, "bf16": False}
    settings |= {"report_to": [], "save_strategy": "no", "gradient_checkpointing": False}
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    policy = mj.load_adapter(policy, tmp_path / "adapter")
    reference = copy.deepcopy(policy) if recipe == "copy" else None
    settings["precompute_ref_log_probs"] = recipe == "precompute"
    arguments = trl.DPOConfig(str(tmp_path), **settings)
    data = {"train_dataset": datasets.Dataset.from_list(rows), "processing_class": words}
    trainer = trl.DPOTrainer(policy, ref_model=reference, args=arguments, **data)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


# ------------------------------------------------------------------------------------------ README
def test_the_readmes_python_blocks_run_as_they_stand_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TinyHub(tmp_path / "hub", monkeypatch)
    Image.new("RGB", (16, 16)).save("photo.jpg")
    readme = README.read_text()
    names = {"train_dataset": rows_of(batch(8)), "dataloader": [TEXT]}
    found = list(re.finditer(r"```python\n(.*?)```", readme, flags=re.DOTALL))
    for block in found:
        above = readme.count("\n", 0, block.start(1))  # so that errors name README's lines
        exec(compile("\n" * above + block[1], "README.md", "exec"), names)
    assert len(found) >= 3


def test_the_method_stands_in_the_modules_first_480_lines():
    above, _, _ = Path(mj.__file__).read_text().partition("# ---------- You have read the method.")
    assert above.count("\n") <= 480


def test_readme_is_as_short_as_promised():
    assert README.read_text().count("\n") <= 230
