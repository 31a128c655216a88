"""Fine-tune a causal or vision-language model with Monkey Jump, on TRL's SFTTrainer.

    python train_example.py  # a demonstration, no download
    python train_example.py --model Qwen/Qwen3-0.6B --dataset rows.jsonl
    python train_example.py --model llava-hf/llava-1.5-7b-hf --dataset images.jsonl --load_in_4bit
    python train_example.py --model Qwen/Qwen3-0.6B --adapter_path monkeyjump-output --generate "Why?"

A row is {"prompt", "answer"} or {"messages"}; its last answer is trained on. "image" or "images" are paths beside the
file, or an Image column. Fields of trl.SFTConfig are flags (--resume_from_checkpoint last), so are those of routing.
"""

import argparse
import inspect
import json
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import transformers
from safetensors.torch import save_file
from trl import ModelConfig, SFTConfig, SFTTrainer, get_quantization_config

import monkeyjump as mj

RECOMMENDED = "--linears up_proj down_proj --shared_expert q_proj k_proj v_proj o_proj --top_k 1"
STEPS = 400  # of each half of the demonstration
DEFAULTS = {"output_dir": "monkeyjump-output", "learning_rate": 1e-3, "max_length": None, "eval_on_start": True}
DEFAULTS["bf16"] = torch.cuda.is_bf16_supported()  # SFTConfig's suit full fine-tuning, and cut answers off
# For a model without a chat template: the prompt, a space, the answer.
TEMPLATE = """{{ bos_token }}{% for m in messages %}\
{{ m.content if m.role != 'assistant' else ' ' + m.content + eos_token }}{% endfor %}"""


@dataclass
class Options:
    model: str | None = None  # hub id, folder or .gguf file
    dataset: str | None = None  # hub id, folder, .jsonl, .csv or .parquet file
    train_split: str = "train"  # train[:1000] will do
    eval_split: str | None = None  # None: a share of the other is held back
    held_back: float = 0.05
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    load_in_4bit: bool = False  # needs bitsandbytes
    adapter_path: str | None = None  # to start from; its routing replaces the flags
    kmeans_samples: int = 4000  # representations for k-means; 0: none
    target_rank: float | None = None  # adalora prunes to this mean
    generate: str | None = None  # answer this prompt and stop


def parse(argv):
    """Our options, the Trainer's arguments, and the keywords of apply_monkeyjump."""
    flags = (inspect.getsource(kind).partition("    def")[0] for kind in (Options, mj.MonkeyJumpConfig))
    notes = f"{__doc__}Recommended, feed-forward routed: {RECOMMENDED}\n\n" + "\n".join(flags)
    text = {"description": notes, "usage": "%(prog)s [flags]", "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = transformers.HfArgumentParser((Options, SFTConfig), **text)
    parser.error = stop
    parser.set_defaults(**DEFAULTS)
    special = {"blocks": {"type": json.loads}, "linears": {"nargs": "+"}, "shared_expert": {"nargs": "+"}}
    for name, keyword in inspect.signature(mj.apply_monkeyjump).parameters.items():
        if keyword.kind is keyword.KEYWORD_ONLY:
            kind = special.get(name, {"type": int if keyword.default is None else type(keyword.default)})
            parser.add_argument(f"--{name}", default=keyword.default, **kind)
    options, training, routing = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    return options, training, vars(routing)


def stop(error):
    print("train_example.py: error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)


def load_rows(options, split):
    """A split as TRL takes it: a "prompt", the "completion", which alone is trained on, and "images"."""
    prompt, answer, path = options.prompt_column, options.answer_column, Path(options.dataset or "")
    folder, file = (path.absolute().parent, path.name) if path.is_file() else (path, None)
    if options.generate:
        rows = datasets.Dataset.from_list([{prompt: options.generate, answer: ""}])
    elif file and not path.stat().st_size:
        raise ValueError(f"{path}: no rows")
    else:
        rows = datasets.load_dataset(folder.as_posix(), data_files=file, split=split)
    columns = set(rows.column_names)
    if not (columns >= {"messages"} or columns >= {prompt, answer}):
        raise ValueError(f"{path}: no {prompt!r} and {answer!r} among {sorted(columns)}: see --prompt_column")

    def convert(row):
        pair = [{"role": "user", "content": row.get(prompt)}, {"role": "assistant", "content": row.get(answer)}]
        *turns, last = row.get("messages") or pair
        return {"prompt": turns, "completion": [last]}

    def locate(row):
        return {"images": [str(folder / image) for image in row.get("images") or [row.get("image")] if image]}

    for column in columns & {prompt, answer}:
        rows = rows.cast_column(column, datasets.Value("string"))  # a table's answers may be numbers
    rows = rows.map(convert, remove_columns=list(columns - {"image", "images"}))
    kind = rows.features.get("images") or rows.features.get("image")
    if kind in (datasets.Value("string"), datasets.Sequence(datasets.Value("string"))):
        rows = rows.map(locate, remove_columns=list(columns & {"image"}))
        rows = rows.cast_column("images", datasets.Sequence(datasets.Image()))
    return rows


def load(options, training, routing):
    """What the Trainer needs: an adapted model, its tokenizer or processor, and rows."""
    if not (options.model and (options.dataset or options.generate)):
        raise ValueError("--model and --dataset are needed")
    output, resume = Path(training.output_dir), training.resume_from_checkpoint
    if resume == "last":  # a killed save lacks the state, written last
        states = [path for path in output.glob("checkpoint-*/trainer_state.json") if path.stat().st_size]
        if not states:
            raise ValueError(f"no complete checkpoint in {output}")
        resume = training.resume_from_checkpoint = str(max(states, key=lambda path: path.stat().st_mtime).parent)
    elif not (resume or options.generate) and any(output.glob("**/adapter_model.safetensors")):
        raise ValueError(f"--output_dir {output} holds another run's adapter")
    name, source = options.model, {}
    if name.endswith(".gguf"):
        name, source = str(Path(name).parent), {"gguf_file": Path(name).name}
    processor = transformers.AutoProcessor.from_pretrained(name, **source)
    sees = isinstance(processor, transformers.ProcessorMixin)
    if not (sees or processor.chat_template):
        processor.chat_template = TEMPLATE
    train_rows = load_rows(options, options.train_split)  # before the weights
    if options.eval_split or options.generate:
        eval_rows = load_rows(options, options.eval_split)
    else:
        train_rows, eval_rows = train_rows.train_test_split(options.held_back, seed=training.seed).values()
    dtype = "bfloat16" if training.bf16 else "float32"
    quantization = get_quantization_config(ModelConfig(dtype=dtype, load_in_4bit=options.load_in_4bit))
    if source and hasattr(transformers, "GgufConfig"):  # newer ones would keep weights packed
        quantization = transformers.GgufConfig(dequantize=True)
    auto = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(name, dtype=dtype, quantization_config=quantization, **source)
    if options.adapter_path:
        mj.load_adapter(model, options.adapter_path)
    else:
        mj.apply_monkeyjump(model, **routing)
    if options.target_rank:  # refuses what it does not fit
        mj.allocate_ranks(model, 1, 100, target_rank=options.target_rank)
    if resume:  # refuses another adapter's; the Trainer would load a part of it
        mj.load_adapter(model, resume)
    model._hf_peft_config_loaded = options.load_in_4bit  # the Trainer asks if anything is trained
    return {"model": model, "processing_class": processor, "train_dataset": train_rows, "eval_dataset": eval_rows}


class MonkeyJumpTrainer(SFTTrainer):
    """Its checkpoints hold what Monkey Jump added, its logs how tokens are routed."""

    def save_model(self, output_dir=None, _internal_call=False):
        directory = output_dir or self.args.output_dir
        mj.save_adapter(self.model, directory)
        if self.args.should_save and not self.is_fsdp_enabled:  # it writes its own
            tensors = {name: tensor for name, tensor in self.model.state_dict().items() if "monkeyjump" in name}
            save_file(tensors, Path(directory, "model.safetensors"))  # what the Trainer resumes from

    def _issue_warnings_after_load(self, load_result):
        """That a checkpoint lacks the base model is no accident."""

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            blocks = mj.router_statistics(self.model).values()
            logs["router_largest_share"] = max(float(max(block["share"])) for block in blocks)
        super().log(logs, *args, **kwargs)


@dataclass
class RankSchedule(transformers.TrainerCallback):
    """AdaLoRA's: all ranks for a tenth of the steps, then fewer, settled for the last three tenths."""

    target_rank: float

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        step, steps, goal = state.global_step + 1, state.max_steps, self.target_rank
        first, last = steps // 10, 3 * steps // 10
        mj.allocate_ranks(model, step, steps, target_rank=goal, initial_steps=first, final_steps=last)


@torch.no_grad()
def reply(trainer, row):
    """A row's prompt, what the model answers, and the right answer."""
    batch = {name: tensor.to(trainer.model.device) for name, tensor in trainer.data_collator([row]).items()}
    labels = batch.pop("labels")
    end = (labels[0] != -100).nonzero()[0]
    prompt = {name: value[:, :end] if value.shape == labels.shape else value for name, value in batch.items()}
    tokens = trainer.model.eval().generate(**prompt, max_new_tokens=256, do_sample=False)
    texts = prompt["input_ids"][0], tokens[0, end:], labels[0, end:]
    return [trainer.processing_class.decode(text, skip_special_tokens=True).strip() for text in texts]


def demonstration():
    """A small Llama that knows some tasks on words, and rows of others: the flags to teach it those."""
    known = {"copy": lambda w: w, "reverse": lambda w: w[::-1], "last": lambda w: w[-1], "tail": lambda w: w[1:]}
    new = {"first": lambda w: w[0], "head": lambda w: w[:-1], "double": lambda w: w + w}
    folder = tempfile.mkdtemp(prefix="monkeyjump-")

    def write(name, tasks):
        with open(f"{folder}/{name}.jsonl", "w") as file:
            for task in 4 * STEPS * list(tasks):
                word = "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=4))
                file.write(json.dumps({"prompt": f"{task} {word}:", "answer": tasks[task](word)}) + "\n")
        return f"--dataset {file.name} --output_dir {folder}/{name}"

    transformers.set_seed(0)
    tokenizer = transformers.ByT5Tokenizer(extra_ids=0, chat_template=TEMPLATE)  # a token a byte
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.1, **shape)
    flags = f"--max_steps {STEPS} --per_device_train_batch_size 64 --gradient_checkpointing no --logging_steps 100"
    options, training, _ = parse(f"{write('base', known)} {flags} --learning_rate 5e-3 --eval_on_start no".split())
    model = transformers.LlamaForCausalLM(config)
    trainer = SFTTrainer(model, training, train_dataset=load_rows(options, "train"), processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    flags = f"{write('new', new)} {flags} --learning_rate 2e-2 --model {folder}/base {RECOMMENDED}"
    print("It knows", *known, "and learns", *new, "by: python train_example.py", flags)
    return flags.split()


def main(argv=None):
    argv = argv or sys.argv[1:] or demonstration()
    try:
        options, training, routing = parse(argv)
        transformers.set_seed(training.seed)
        parts = load(options, training, routing)
    except (ImportError, OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        stop(f"{error} {error.__cause__ or ''}")
    trainer = MonkeyJumpTrainer(args=training, **parts)
    if options.target_rank:
        trainer.add_callback(RankSchedule(options.target_rank))
    if options.generate:
        print(reply(trainer, trainer.eval_dataset[0])[1])
        return
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL makes them bfloat16 over 4 bits
            parameter.data = parameter.data.float()
    if options.kmeans_samples and not (options.adapter_path or training.resume_from_checkpoint):
        mj.init_router_centers(trainer, subset_size=options.kmeans_samples, seed=training.seed)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    mj.save_adapter(trainer.model, training.output_dir)
    trainer.evaluate()
    trainer.accelerator.end_training()
    if not trainer.is_world_process_zero():
        return
    for block, seen in mj.router_statistics(trainer.model).items():
        print(block, *(f"{name} {share:.0%}" for name, share in zip(seen["experts"], seen["share"], strict=True)))
    for metric in ("eval_loss", "eval_mean_token_accuracy"):  # of each evaluation
        print(f"{metric}:", *(f"{entry[metric]:.4f}" for entry in trainer.state.log_history if metric in entry))
    if not trainer.is_fsdp_enabled:  # the model stays sharded
        mj.load_adapter(mj.remove_monkeyjump(trainer.model), training.output_dir)
        for row, _ in zip(trainer.eval_dataset, range(4), strict=False):
            prompt, given, right = reply(trainer, row)
            print(f"{prompt[-60:]!r} -> {given!r}, right is {right!r}")
    print(training.output_dir)


if __name__ == "__main__":
    main()
