"""Fine-tune a causal or vision-language model with Monkey Jump, on TRL's SFTTrainer.

    python train_example.py                                       # a demonstration, no download
    python train_example.py --model Qwen/Qwen3-0.6B --dataset rows.jsonl
    python train_example.py --model llava-hf/llava-1.5-7b-hf --dataset pictures/ --load_in_4bit
    torchrun --nproc_per_node 4 train_example.py --config run.yaml    # flags, mixtures of data

Data are a file, a folder (of pictures with metadata.jsonl) or a hub id. A row is {"messages"} or
{"prompt", "completion"}, beside them "images" and "task"; its last answer is trained on.
"""

import argparse
import itertools
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset, Image, Sequence, Value, concatenate_datasets
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, ProcessorMixin
from transformers.hf_argparser import HfArg
from trl.data_utils import prepare_multimodal_messages

import monkeyjump as mj

# Flags: where the defaults differ from TRL's, the recommended form, the demonstration.
HAS_BF16 = torch.cuda.is_bf16_supported(including_emulation=False)
PRECISION = "--bf16 yes --dtype bfloat16" if HAS_BF16 else "--bf16 no"
DEFAULTS = f"""{PRECISION} --learning_rate 1e-3 --eval_on_start yes --dataset_test_split held_back
--test_split_size 0.05 --output_dir monkeyjump-output"""
RECOMMENDED = "--linears up_proj down_proj --shared_expert q_proj k_proj v_proj o_proj --top_k 1"
DEMONSTRATION = """--model demonstration/model --dataset demonstration/rows.jsonl --rank 8
--output_dir demonstration/output --learning_rate 1e-2 --max_steps 300 --logging_steps 50
--per_device_train_batch_size 64 --gradient_checkpointing no"""
GREETING = """No data set is given: a demonstration. A small Llama of random weights learns three
tasks on words, in a minute on a CPU; figures vary. By hand: python train_example.py"""
# For a model without a chat template: the prompt, a space, the answer.
TEMPLATE = """{{ bos_token }}{% for m in messages %}\
{{ m.content if m.role != 'assistant' else ' ' + m.content + eos_token }}{% endfor %}"""
CARD = """# [Monkey Jump](https://arxiv.org/abs/2601.06356) adapters for {name}
```python
from transformers import AutoProcessor, {model.__class__.__name__}
from monkeyjump import load_adapter
model = {model.__class__.__name__}.from_pretrained({name!r}{settings})
load_adapter(model, {folder!r}).eval()
processor = AutoProcessor.from_pretrained({folder!r})
```
Trained by TRL's SFTTrainer with {model.monkeyjump_wiring.config}
"""
NOT_TAKEN = re.compile("lora_|use_(peft|dora|rslora)|(dataset_)?streaming")
HUB_NAME = re.compile(r"(?!.*\.(jsonl?|csv|parquet|gguf)$)\w[\w.-]*(/[\w.-]+)?")  # not a path
USED = {"messages", "prompt", "completion", "image", "images", "task", "tools"}
MEDIA = re.compile(r"(Image|Video|Audio)\(|\.(png|jpe?g|webp|bmp|gif|mp4|mov|avi|mkv|wav|mp3)\W*$")
UNUSED = """is not used: pictures belong into "images" (--columns images=NAME), as do the frames of
a video (monkeyjump.py itself takes video models); audio is not taken"""


@dataclass
class Options(trl.SFTConfig, trl.ScriptArguments, trl.ModelConfig, trl.DatasetMixtureConfig):
    """What TRL's trainer and scripts take, and what this one adds."""

    model_name_or_path: str | None = HfArg(default=None, aliases="--model", help="or a .gguf file")
    dataset_name: str | None = HfArg(default=None, aliases="--dataset", help="none: demonstration")
    columns: list[str] | None = HfArg(default=None, help="your names: prompt=question task=kind")
    adapter_path: str | None = HfArg(default=None, help="a saved adapter to start from")
    target_rank: float | None = HfArg(default=None, help="adalora prunes to this mean rank")


def read_flags(argv, *presets):
    """Options and those of routing: from flags, else --config, else the last preset with it."""
    text = {"usage": argparse.SUPPRESS, "description": __doc__}
    parser = trl.TrlParser((Options, mj.MonkeyJumpConfig), **text)
    for preset in (DEFAULTS, *presets):
        parser.set_defaults(**vars(parser.parse_args(preset.split())))
    return parser.parse_args_and_config(argv)


def parse(argv):
    """Options, those of routing, and the latter where the recommended form is the default."""
    presets = []
    options, routing = read_flags(argv)
    if options.process_index > 0:
        sys.stdout = open(os.devnull, "w")  # the first process speaks
    if not (options.model_name_or_path or options.dataset_name or options.datasets):
        presets.append(DEMONSTRATION)
        options, routing = read_flags(argv, *presets)
        with options.main_process_first(local=False):
            if options.process_index == 0:
                demonstration()
    check(options)
    output = Path(options.output_dir)
    if options.resume_from_checkpoint in ("true", "True", "last"):
        options.resume_from_checkpoint = last_checkpoint(output)
    is_new = not options.resume_from_checkpoint and str(output) not in DEMONSTRATION
    if is_new and any(output.glob("**/monkeyjump.safetensors")):
        raise ValueError(f"--output_dir {output} holds another run's adapter")
    return options, routing, read_flags(argv, *presets, RECOMMENDED)[1]


def check(options):
    """ValueError for flags that would do nothing and names that lead nowhere."""
    if int(os.environ.get("WORLD_SIZE", 1)) != options.world_size or options.n_gpu > 1:
        raise ValueError("one process a device, by torchrun or accelerate; on CPUs --use_cpu")
    for name, field in Options.__dataclass_fields__.items():
        if NOT_TAKEN.match(name) and getattr(options, name) != field.default:
            raise ValueError(f"--{name} is not taken: see --rank; rows are not streamed")
    named = [("--dataset", config.path) for config in data_sets(options)]
    for flag, name in [("--model", options.model_name_or_path), *named]:
        if not name:
            raise ValueError(f"{flag} is needed")
        if not (os.path.exists(name) or HUB_NAME.fullmatch(name)):
            raise ValueError(f"{flag} {name}: no such file or folder")


def last_checkpoint(output):
    """The newest checkpoint that no kill cut short."""
    states = output.glob("checkpoint-*/trainer_state.json")  # a checkpoint's last file
    for state in sorted(states, key=os.path.getmtime, reverse=True):
        if state.read_text().endswith("\n}\n"):
            return str(state.parent)
    raise ValueError(f"no complete checkpoint in {output}")


def data_sets(options):
    """What --dataset names, and the mixture in --config."""
    mixture = list(options.datasets)
    if options.dataset_name or not mixture:
        one = {"path": options.dataset_name, "name": options.dataset_config}
        mixture.append({**one, "split": options.dataset_train_split})
    return trl.DatasetMixtureConfig(mixture).datasets


def source_of(options):
    """The base model's folder or hub name, and how it is loaded."""
    settings = {"revision": options.model_revision, "trust_remote_code": options.trust_remote_code}
    path = Path(options.model_name_or_path)
    if path.suffix != ".gguf":
        return str(path), settings
    return str(path.parent), {**settings, "gguf_file": path.name}


def turns_of(row):
    """A row's conversation; ValueError for what cannot be trained on, or would not be used."""
    turns = row.get("messages")
    if turns is None:
        turns = []
        for role, name in (("user", "prompt"), ("assistant", "completion")):
            text = row.get(name)
            if not isinstance(text, list):  # a table's answer may be a number
                text = [{"role": role, "content": "" if text is None else str(text)}]
            turns += text
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError("the last turn is not the assistant's")
    for turn in turns:
        content = turn.get("content")
        if not content and not turn.get("tool_calls"):
            raise ValueError(f"the {turn['role']}'s text is missing, null or empty")
        if isinstance(content, list):
            check_parts(content)
    return turns


def check_parts(parts):
    """ValueError for what a message holds beside text and marks of pictures, {"type": "image"}."""
    for part in parts:
        others = part | {"type": None, "text": None, "index": None}
        if part["type"] not in ("text", "image") or any(others.values()):
            raise ValueError(f"the {part['type']} in a message {UNUSED}")


def convert(row, number, path, folder, features, processor):
    """A row as TRL takes it; ValueError with its number for one that cannot be trained on."""
    try:
        shown = turns = turns_of(row)
        for name in row.keys() - USED:
            if MEDIA.search(str(features[name])) or MEDIA.search(str(row[name])):
                raise ValueError(f"the column {name!r} {UNUSED}")
        pictures = list(filter(None, row.get("images") or [row.get("image")]))
        for picture in pictures:
            if not picture["bytes"]:  # its path leads from the folder
                picture["path"] = os.path.join(folder, picture["path"])
        if isinstance(processor, ProcessorMixin):
            shown = prepare_multimodal_messages(turns, list(map(Image().decode_example, pictures)))
        elif pictures:
            raise ValueError("it holds pictures, but the model reads text alone")
        text = processor.apply_chat_template(shown, tools=row.get("tools"), tokenize=False)
    except Exception as error:  # Pillow's and the template's are of many kinds
        raise ValueError(f"{path}, row {number}: {error}") from None
    tokenizer = getattr(processor, "tokenizer", processor)
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    found = {"prompt": turns[:-1], "completion": turns[-1:], "tools": row.get("tools")}
    return {**found, "images": pictures, "task": row.get("task") or "all", "tokens": tokens}


def load_rows(options, processor, split=None):
    """The rows of all data sets as TRL takes them, without those over the limit."""
    parts = []
    for config in data_sets(options):
        source = vars(config) | {"split": split or config.split}
        if source.get("fraction"):
            raise ValueError(f"{config.path}: give a split like train[:10%], not a fraction")
        folder = Path(config.path).absolute()
        if folder.is_file():  # load_dataset takes its folder
            if not folder.stat().st_size:
                raise ValueError(f"{config.path}: no rows")
            source |= {"path": str(folder.parent), "data_files": folder.name}
            folder = folder.parent
        rows = trl.get_dataset(trl.DatasetMixtureConfig([source]))["train"]
        for pair in options.columns or []:
            ours, theirs = pair.split("=")
            rows = rows.rename_column(theirs, ours)
        kinds = {"image": Image(decode=False), "images": Sequence(Image(decode=False))}
        kinds["task"] = Value("string")
        for name in kinds.keys() & rows.features.keys():
            rows = rows.cast_column(name, kinds[name])
        given = {"path": config.path, "folder": str(folder), "features": rows.features}
        given["processor"] = processor
        if unused := set(rows.column_names) - USED:
            print(f"{config.path}: columns that are not used: {', '.join(sorted(unused))}")
        once = {"remove_columns": rows.column_names, "load_from_cache_file": False}
        rows = rows.map(convert, with_indices=True, fn_kwargs=given, **once)
        parts.append(rows.cast_column("images", Sequence(Image())))
    rows = concatenate_datasets(parts)
    kept = rows.filter(lambda tokens: tokens <= options.max_length, input_columns="tokens")
    print(f"{len(rows) - len(kept)} of {len(rows)} rows are left out, longer than --max_length")
    if isinstance(processor, ProcessorMixin):
        return kept
    return kept.remove_columns("images")


def load_data(options):
    """The tokenizer or the processor, rows to train on and, by task, rows to test on."""
    name, settings = source_of(options)
    processor = transformers.AutoProcessor.from_pretrained(name, **settings)
    if not isinstance(processor, ProcessorMixin):
        processor.chat_template = processor.chat_template or TEMPLATE
    rows = load_rows(options, processor)
    if options.dataset_test_split == "held_back":
        rows, test = rows.train_test_split(options.test_split_size, seed=options.seed).values()
    else:
        test = load_rows(options, processor, options.dataset_test_split)
    tasks = sorted(test.unique("task"))
    by_task = {task: test.filter(task.__eq__, input_columns="task") for task in tasks}
    if not options.packing:
        options.max_length = None  # TRL would cut answers off, and pictures
    return processor, rows, by_task


def load_model(options, processor):
    """The base model."""
    name, settings = source_of(options)
    settings |= {"dtype": options.dtype, "attn_implementation": options.attn_implementation}
    settings["quantization_config"] = trl.get_quantization_config(options)
    if "gguf_file" in settings and hasattr(transformers, "GgufConfig"):  # else it stays packed
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    settings |= options.model_init_kwargs or {}
    options.model_init_kwargs = None  # used
    if isinstance(processor, ProcessorMixin):
        return AutoModelForImageTextToText.from_pretrained(name, **settings)
    return AutoModelForCausalLM.from_pretrained(name, **settings)


def adapt(model, options, routing, recommended):
    """Give the model its adapters: in the form of the flags, or as they were saved."""
    transformers.set_seed(options.seed)
    saved = options.resume_from_checkpoint or options.adapter_path
    if not saved or routing != mj.MonkeyJumpConfig():
        is_settled = any([routing.blocks, routing.linears, routing.shared_expert])
        leaves = {path.rpartition(".")[2] for path, _ in model.named_modules()}
        if not is_settled and leaves.issuperset(recommended.linears + recommended.shared_expert):
            routing = recommended
        mj.apply_monkeyjump(model, routing)
    if saved:  # refused if the flags ask for another form
        mj.load_adapter(model, saved)
    if options.target_rank:  # refused if it does not fit
        mj.allocate_ranks(model, 1, 100, target_rank=options.target_rank)
    print(f"The form is {model.monkeyjump_wiring.config}", end=": ")
    mj.print_trainable_parameters(model)
    return model


class MonkeyJumpTrainer(trl.SFTTrainer):
    """Its checkpoints are adapters, written and read by save_adapter and load_adapter alone."""

    def __init__(self, model, options, rows, test, processor):
        """Works around what transformers, TRL and accelerate do to adapters unknown to them."""
        model._hf_peft_config_loaded = getattr(model, "is_quantized", False)  # else it refuses
        super().__init__(model, options, None, rows, test, processor)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # over 4 bits TRL makes them bfloat16
        transformers.trainer.save_fsdp_model = lambda *args, **kwargs: None  # the whole base model

    def save_model(self, output_dir=None, _internal_call=False):
        """The adapter, and the tokenizer or processor."""
        directory = output_dir or self.args.output_dir
        mj.save_adapter(self.model, directory)
        if self.args.should_save:
            self.processing_class.save_pretrained(directory)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub()

    def _load_from_checkpoint(self, resume_from_checkpoint=None, model=None):
        """To resume, and for --load_best_model_at_end."""
        mj.load_adapter(self.model, resume_from_checkpoint or self.state.best_model_checkpoint)

    _load_best_model = _load_from_checkpoint

    def create_model_card(self, *args, **kwargs):
        """How to load the adapter."""
        name, settings = source_of(self.args)
        folder = self.args.output_dir
        settings = "".join(f", {key}={value!r}" for key, value in settings.items())
        card = CARD.format(name=name, settings=settings, folder=folder, model=self.model)
        if self.is_world_process_zero():
            Path(folder, "README.md").write_text(card)


class RankSchedule(transformers.TrainerCallback):
    """AdaLoRA's: all ranks for a tenth of the steps, then fewer, settled for the last three."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Prune, between the optimizer's step and zero_grad."""
        step = state.global_step + 1
        last = state.max_steps
        steps = {"initial_steps": last // 10, "final_steps": 3 * last // 10}
        mj.allocate_ranks(model, step, last, target_rank=args.target_rank, **steps)


def answer(trainer, row):
    """What the model says to a row's prompt."""
    processor = trainer.processing_class
    prompt = row["prompt"]
    if isinstance(processor, ProcessorMixin):
        prompt = prepare_multimodal_messages(prompt, row["images"])
    form = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(prompt, add_generation_prompt=True, **form)
    inputs = inputs.to(trainer.model.device)
    with trainer.compute_loss_context_manager():
        tokens = trainer.model.generate(**inputs, max_new_tokens=64, do_sample=False)
    text = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def report(trainer, test):
    """By task: loss and accuracy before and after, an answer, and which experts serve it."""
    shares = {}
    for task, rows in test.items():
        with mj.record_routing(trainer.model) as counts:
            trainer.evaluate(task, metric_key_prefix=f"eval_{task}")
        for block, count in counts.items():
            count = trainer.accelerator.reduce(count.to(trainer.args.device))
            shares.setdefault(block, []).append(count / count.sum())
        loss = f"eval_{task}_loss"
        accuracy = "eval_mean_token_accuracy"
        logs = [log for log in trainer.state.log_history if loss in log]
        print(f"{task}: loss {logs[0][loss]:.4f} -> {logs[-1][loss]:.4f}, token accuracy", end=" ")
        print(f"{logs[0][accuracy]:.4f} -> {logs[-1][accuracy]:.4f}", end=", ")
        question = rows[0]["prompt"][-1]["content"]
        right = rows[0]["completion"][0]["content"]
        print(f"{question!r} -> {answer(trainer, rows[0])!r}, right is {right!r}")
    apart = {block: torch.stack(rows).var(0, correction=0).max() for block, rows in shares.items()}
    for block in sorted(apart, key=apart.get, reverse=True)[:2]:  # where tasks differ most
        print(f"{block:20}", *trainer.model.get_submodule(block).monkeyjump.experts)
        for task, row in zip(test, shares[block], strict=True):
            print(f"{task:>20}", *map("{:.0%}".format, row))


def demonstration():
    """A small Llama of random weights, and rows of three tasks on words for it to learn."""
    print(GREETING, DEMONSTRATION)
    transformers.set_seed(0)
    tokenizer = transformers.ByT5Tokenizer(extra_ids=0, chat_template=TEMPLATE)  # a token a byte
    tokenizer.save_pretrained("demonstration/model")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 4, "initializer_range": 0.1}
    shape |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = transformers.LlamaConfig(**shape)
    transformers.LlamaForCausalLM(config).save_pretrained("demonstration/model")
    rows = []
    for word in map("".join, itertools.permutations("abcdefg", 4)):
        for task, part in (("first", word[0]), ("head", word[:3]), ("odd", word[::2])):
            rows.append({"task": task, "prompt": f"{task} {word}:", "completion": part})
    Dataset.from_list(rows).to_json("demonstration/rows.jsonl")


def main(argv=None):
    """Parse, load, adapt, train, save; what is wrong before training is said in one line."""
    try:
        options, routing, recommended = parse(argv)
        processor, rows, test = load_data(options)
        model = adapt(load_model(options, processor), options, routing, recommended)
        trainer = MonkeyJumpTrainer(model, options, rows, test, processor)
    except Exception as error:
        words = f"train_example.py: error: {error} {error.__cause__ or ''}".split()
        sys.exit(" ".join(words))
    if options.target_rank:
        trainer.add_callback(RankSchedule)
    if not (options.adapter_path or options.resume_from_checkpoint):
        mj.init_router_centers(trainer, seed=options.seed)
    trainer.train(resume_from_checkpoint=options.resume_from_checkpoint)
    trainer.save_model()
    trainer.create_model_card()
    report(trainer, test)
    trainer.accelerator.wait_for_everyone()  # gloo can hang if it ends with work under way
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
