"""Fine-tune any causal or vision-language model of transformers with Monkey Jump.

    python train_example.py                                     # a demonstration: three minutes on a CPU, no downloads
    python train_example.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset rows.jsonl --eval_accuracy
    python train_example.py --model llava-hf/llava-1.5-7b-hf --dataset images.jsonl --load_in_4bit
    torchrun --nproc_per_node 4 train_example.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset rows.jsonl
    python train_example.py --model Qwen/Qwen2.5-0.5B-Instruct --adapter_path monkeyjump-output --generate "Why?"

A row is {"prompt", "answer"}, with an "image" (path, bytes or Image column) if there is one, or {"messages": [...]} in
the chat format; its last answer is trained on, nothing else. A "task" column splits the accuracy by task; the "choices"
of a row are compared by likelihood. All flags of transformers.TrainingArguments work: --num_train_epochs, --bf16, ...
"""

import inspect
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Trainer, TrainingArguments

import monkeyjump as mj

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# For a model without a chat template: the prompt, a space, the answer, the end.
PLAIN_TEMPLATE = """{% for message in messages %}{% if message.role == 'assistant' %} {% endif %}\
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'text' %}{{ part.text }}{% else %}IMAGE{% endif %}{% endfor %}{% endif %}\
{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"""
GPU = torch.cuda.is_available()
DEFAULTS = {
    "output_dir": "monkeyjump-output", "learning_rate": 1e-3, "logging_steps": 10, "dataloader_pin_memory": GPU,
    "bf16": GPU and torch.cuda.is_bf16_supported(), "ddp_find_unused_parameters": False,
}  # fmt: skip
BASE_STEPS = 400  # of the demonstration's base model
DEMONSTRATION = {
    "output_dir": "monkeyjump-demo", "overwrite_output_dir": True, "eval_accuracy": True, "held_back": 256,
    "max_steps": 400, "per_device_train_batch_size": 64, "per_device_eval_batch_size": 64, "learning_rate": 2e-2,
    "lr_scheduler_type": "cosine", "logging_steps": 100, "shared_expert": ["up_proj", "down_proj"],
}  # fmt: skip


def option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class Options:
    """What is trained, on what, and how it is routed; all else is in transformers.TrainingArguments."""

    model: str | None = option(None, "hub id, folder or .gguf file; none: the demonstration")
    dataset: str | None = option(None, "hub id, folder, or .json, .jsonl, .csv or .parquet file")
    adapter_path: str | None = option(None, "start from this saved adapter; its settings replace those of the flags")
    load_in_4bit: bool = option(False, "quantise the base model to 4 bits (needs bitsandbytes)")
    train_split: str = option("train", "split to train on; a slice such as train[:1000] will do")
    eval_split: str | None = option(None, "split to evaluate on; none: rows of the training split are held back")
    held_back: float = option(0.05, "the rows held back: a share below 1, or a number of rows")
    prompt_column: str = option("prompt", "column of the prompts")
    answer_column: str = option("answer", "column of the answers")
    text_column: str | None = option(None, "train on all of this column's text instead")
    max_length: int | None = option(None, "tokens of the longest row: prompts are cut from the left, answers never")
    eval_accuracy: bool = option(False, "also answer the rows held back, before and after, and count exact matches")
    eval_only: bool = option(False, "evaluate and stop")
    generate: str | None = option(None, "answer this prompt and stop")
    max_new_tokens: int = option(64, "tokens of the longest generated answer")
    adapter: Literal["lora", "lorafa", "adalora", "propulsion"] = option("lora", "kind of the adapters")
    blocks: str | None = option(None, 'JSON such as {"LlamaDecoderLayer": [0, 1]}; none: all of the language model')
    linears: list[str] | None = field(default=None, metadata={"help": "routed projections; none: the attention's"})
    shared_expert: list[str] | None = field(default=None, metadata={"help": "projections that are always on"})
    rank: int = option(2, "rank of the adapters")
    alpha: float = option(16.0, "adapters are scaled by alpha / rank")
    dropout: float = option(0.0, "dropout of the adapters' input")
    degree: int = option(15, "exponent of propulsion")
    top_k: int = option(2, "experts that a token uses")
    temperature: float = option(1.0, "temperature of the router's softmax")
    ema_momentum: float = option(0.9, "what a center keeps of itself in an update")
    rep_mode: Literal["token", "last", "mean", "prompt_end"] = option("token", "what the router looks at")
    jitter_noise: float = option(0.0, "noise on the router's probabilities in training")
    centered: bool = option(False, "the router compares directions as seen from their mean")
    min_share: float = option(0.0, "re-seed an expert that serves a smaller share of the tokens; 0: never")
    update_every: int = option(1, "training forwards from one update of the centers to the next")
    update_until: int | None = option(None, "training forward after which the centers rest")
    kmeans_samples: int = option(4000, "representations for the k-means start of the centers; 0: none")
    target_rank: float = option(1.0, "mean rank that adalora ends with")
    orthogonal_weight: float = option(0.1, "weight of adalora's orthogonality penalty")
    overwrite_output_dir: bool = option(False, "replace another run's adapter and checkpoints")


def say(*text: Any) -> None:
    if PartialState().is_main_process:
        print(*text, flush=True)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Until training starts an error is somebody's input: say what and where, without a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError, SafetensorError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetsError) else None
        if os.environ.get("RANK", "0") == "0":
            print("train_example.py: error:", " ".join(str(cause or error).split())[:600], file=sys.stderr)
        sys.exit(2)


# ---------------- rows to tokens


def parts(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, list):  # Arrow gives each part the keys of all, as None
        return [{key: value for key, value in part.items() if value is not None} for part in content]
    return [{"type": "text", "text": str(content)}] if content not in (None, "") else []


def picture(source: Any) -> Any:
    source = source.get("bytes") or source["path"] if isinstance(source, dict) else source
    source = Image.open(BytesIO(source)) if isinstance(source, bytes) else source
    source = Image.open(source) if isinstance(source, str) and "://" not in source else source
    return source.convert("RGB") if isinstance(source, Image.Image) else source  # the processor opens addresses


class Chat:
    """Rows as conversations and as padded batches; called as the Trainer's data collator it labels answers, only."""

    def __init__(self, processor: Any, vision: bool, options: Options, dtype: torch.dtype = torch.float32) -> None:
        self.processor, self.vision, self.options, self.dtype = processor, vision, options, dtype
        self.tokenizer = processor.tokenizer if vision else processor
        self.tokenizer.truncation_side = "left"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        if not processor.chat_template:
            processor.chat_template = PLAIN_TEMPLATE.replace("IMAGE", getattr(processor, "image_token", ""))
        path = Path(options.dataset or ".")
        self.folder = path if path.is_dir() else path.parent

    def conversation(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """The row's messages, checked: lists of parts for a vision-language model, else strings."""
        if row.get("messages"):
            messages = [{"role": m["role"], "content": parts(m["content"])} for m in row["messages"]]
        else:
            images = row.get("image") or row.get("images") or []
            images = [{"type": "image", "image": image} for image in (images if isinstance(images, list) else [images])]
            messages = [{"role": "user", "content": images + parts(row[self.options.prompt_column])},
                        {"role": "assistant", "content": parts(row.get(self.options.answer_column))}]  # fmt: skip
        for part in (part for message in messages for part in message["content"] if part["type"] != "text"):
            kind = part["type"]
            source = part.get(kind) or part.get("path") or part.get("url")
            if not self.vision:
                raise ValueError(f"holds {kind} data, but {self.options.model} is a text-only model")
            if kind != "image" and not hasattr(self.processor, f"{kind}_processor"):
                raise ValueError(f"holds {kind} data, which {type(self.processor).__name__} does not take")
            if isinstance(source, str) and "://" not in source:
                source = str(self.folder / source)
                if not Path(source).is_file():
                    raise ValueError(f"there is no file {source}")
            part[kind] = source
        if not self.vision:
            messages = [{**m, "content": "".join(part["text"] for part in m["content"])} for m in messages]
        return messages

    def answer(self, row: dict[str, Any]) -> str:
        last = self.conversation(row)[-1]
        content = last["content"] if last["role"] == "assistant" else ""
        return (content if isinstance(content, str) else "".join(part.get("text", "") for part in content)).strip()

    def answered(self, row: dict[str, Any], answer: str) -> dict[str, Any]:
        if row.get("messages"):
            return {**row, "messages": [*row["messages"][:-1], {"role": "assistant", "content": answer}]}
        return {**row, self.options.answer_column: answer}

    def text(self, row: dict[str, Any], prompt_only: bool = False) -> str:
        if column := self.options.text_column:
            return "" if prompt_only else row[column] + (self.tokenizer.eos_token or "")
        messages = self.conversation(row)
        messages = messages[:-1] if prompt_only and messages[-1]["role"] == "assistant" else messages
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt_only)

    def special(self, text: str) -> dict[str, bool]:
        bos = self.tokenizer.bos_token  # many chat templates write it themselves
        return {"add_special_tokens": not (bos and text.startswith(bos))}

    def answer_tokens(self, row: dict[str, Any]) -> list[int]:
        """What follows the tokens that the prompt alone has too: no prompt's token is trained on, whatever merges."""
        whole, prompt = self.text(row), self.text(row, prompt_only=True)
        whole, prompt = (self.tokenizer(text, **self.special(whole)).input_ids for text in (whole, prompt))
        pairs = enumerate(zip(whole, prompt, strict=False))
        return whole[next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(whole))) :]

    def batch(self, rows: list[dict[str, Any]], prompt_only: bool = False, side: str = "right") -> Any:
        texts = [self.text(row, prompt_only) for row in rows]
        self.tokenizer.padding_side = side
        keywords = {"padding": True, "return_tensors": "pt", **self.special(texts[0])}
        if not self.vision:
            keywords |= {"truncation": bool(self.options.max_length), "max_length": self.options.max_length}
            return self.tokenizer(texts, return_token_type_ids=False, **keywords)
        content = [[part for message in self.conversation(row) for part in message["content"]] for row in rows]
        for kind, load in {"image": picture, "video": lambda source: source}.items():
            media = [[load(part[kind]) for part in row if part["type"] == kind] for row in content]
            if any(media):
                keywords[f"{kind}s"] = media
        return self.processor(text=texts, **keywords).to(self.dtype)

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        batch = self.batch(rows)
        ends = batch["attention_mask"].sum(dim=1, keepdim=True)
        starts = ends - torch.tensor([[row["answer_length"]] for row in rows])
        places = torch.arange(batch["input_ids"].shape[1])
        batch["labels"] = batch["input_ids"].where((places >= starts) & (places < ends), -100)
        if self.options.rep_mode == "prompt_end":  # label smoothing takes the labels away
            batch["prompt_end"] = (starts[:, 0] - 1).clamp(min=0)
        return batch

    def measure(self, row: dict[str, Any]) -> dict[str, Any]:
        """How many tokens the row's answer has, and why the row cannot be used if it cannot."""
        limit, column = self.options.max_length or float("inf"), self.options.text_column
        try:
            if not (row[column] if column else self.answer(row)):
                raise ValueError("has no text" if column else "has no answer")
            answer = len(self.answer_tokens(row))
            if answer >= limit and not column:
                raise ValueError(f"has an answer of {answer} tokens, --max_length is {limit}")
            if self.vision and limit < (length := self.batch([row])["input_ids"].shape[1]):
                raise ValueError(f"has {length} tokens with its images, --max_length is {limit}")
        except Exception as error:  # of the row, its chat template, or its images, wherever they are
            return {"answer_length": 0, "problem": str(error) or type(error).__name__}
        return {"answer_length": answer, "problem": ""}

    def usable(self, rows: datasets.Dataset) -> datasets.Dataset:
        """The rows that can be trained on; the others are counted and the first is shown."""
        found = rows.map(self.measure, remove_columns=rows.column_names, keep_in_memory=True)[:]
        bad = [i for i, problem in enumerate(found["problem"]) if problem]
        if len(bad) == len(rows):
            raise ValueError(f"{self.options.dataset}: no usable row; row 0 {found['problem'][0]}")
        if bad:
            say(f"{len(bad)} of {len(rows)} rows left out; the first, row {bad[0]}, {found['problem'][bad[0]]}")
        rows = rows.add_column("answer_length", found["answer_length"])
        return rows.select([i for i, problem in enumerate(found["problem"]) if not problem]) if bad else rows


def load_rows(chat: Chat, training: TrainingArguments) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The rows to train and to evaluate on, without those that cannot be used."""
    options, path = chat.options, Path(chat.options.dataset)

    def load(split: str) -> datasets.Dataset:
        if path.is_file() and not path.stat().st_size:
            rows = []
        elif path.suffix in FORMATS:
            rows = datasets.load_dataset(FORMATS[path.suffix], data_files=str(path), split=split)
        elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            rows = datasets.load_from_disk(str(path))
            splits = rows if isinstance(rows, datasets.DatasetDict) else {"train": rows}
            if split not in splits:
                raise ValueError(f"{path}: no split {split!r}; it has {', '.join(splits)}")
            rows = splits[split]
        else:
            rows = datasets.load_dataset(options.dataset, split=split)
        if not len(rows):
            raise ValueError(f"{options.dataset}: no rows")
        wanted = [options.text_column] if options.text_column else [options.prompt_column, options.answer_column]
        for column in [] if "messages" in rows.column_names and not options.text_column else wanted:
            if column not in rows.column_names:
                raise ValueError(f"{options.dataset}: no column {column!r}; it has {', '.join(rows.column_names)}")
        for column, feature in rows.features.items():
            if isinstance(feature, datasets.Image):  # decoded when a batch needs them, not when rows are counted
                rows = rows.cast_column(column, datasets.Image(decode=False))
        return chat.usable(rows)

    rows = load(options.train_split) if not (options.eval_only and options.eval_split) else None
    if options.eval_split or not options.held_back:
        return rows, load(options.eval_split) if options.eval_split else None
    held_back = options.held_back if options.held_back < 1 else int(options.held_back)
    halves = rows.train_test_split(held_back, seed=training.seed)
    return halves["train"], halves["test"]


# ---------------- training and evaluation


ROUTER_LOGS: dict[str, Callable[[dict[str, Any]], float]] = {
    "entropy": lambda block: block["entropy"],
    "largest_share": lambda block: float(block["share"].max()),
    "cosine": lambda block: float((block["share"] * block["cosine"]).sum()),
}
PENDING = ("statistics", "worst")  # what a router saw since its centers moved


def routers(model: torch.nn.Module) -> dict[str, mj.Router]:
    return {name: module for name, module in model.named_modules() if isinstance(module, mj.Router)}


class MonkeyJumpTrainer(Trainer):
    """The Trainer, whose checkpoints hold the adapters alone and whose logs tell how tokens are routed."""

    orthogonal_weight, routing = 0.0, None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **keywords: Any) -> Any:
        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **keywords)
        if not (self.orthogonal_weight and model.training):
            return result
        penalty = mj.orthogonal_regularization(self.model) * self.orthogonal_weight
        penalty = penalty / self.args.gradient_accumulation_steps
        return (result[0] + penalty, result[1]) if return_outputs else result + penalty

    def log(self, logs: dict[str, float], *args: Any, **keywords: Any) -> None:
        if "loss" in logs:
            self.routing = mj.router_statistics(self.model, reset=True)
            for name, of in ROUTER_LOGS.items():
                logs[f"router_{name}"] = sum(map(of, self.routing.values())) / len(self.routing)
        super().log(logs, *args, **keywords)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        directory = output_dir or self.args.output_dir
        os.makedirs(directory, exist_ok=True)  # every rank writes its statistics
        mj.save_adapter(self.model, directory)
        tensors = mj.monkeyjump_state_dict(self.model)  # more than the adapter: the Trainer resumes from this file
        if self.args.should_save:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(tensors, Path(directory, "model.safetensors"), metadata={"format": "pt"})
        of = routers(self.model).items()
        pending = {f"{name}.{kind}": getattr(router, kind).cpu() for name, router in of for kind in PENDING}
        save_file(pending, Path(directory, f"statistics-{self.args.process_index}.safetensors"))


class MonkeyJumpCallback(transformers.TrainerCallback):
    """Exact resuming, and AdaLoRA's schedule: a tenth of the steps at full rank, the last three tenths fixed."""

    def __init__(self, target_rank: float | None) -> None:
        self.target_rank = target_rank

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        saved = Path(args.resume_from_checkpoint or "", f"statistics-{args.process_index}.safetensors")
        for name, tensor in (load_file(saved) if saved.is_file() else {}).items():  # of the last step before
            path, _, kind = name.rpartition(".")
            getattr(model.get_submodule(path), kind).copy_(tensor)

    def on_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.target_rank:
            first, last = state.max_steps // 10, 3 * state.max_steps // 10
            mj.allocate_ranks(model, state.global_step + 1, state.max_steps, target_rank=self.target_rank,
                              initial_steps=first, final_steps=last)  # fmt: skip


@torch.no_grad()
def predict(model: Any, chat: Chat, rows: list[dict[str, Any]]) -> list[str]:
    """The answer to each row: the likeliest of its choices if it has them, else what the model generates."""
    if not rows[0].get("choices"):
        batch = chat.batch(rows, prompt_only=True, side="left").to(model.device)
        ids = model.generate(**batch, max_new_tokens=chat.options.max_new_tokens, do_sample=False,
                             pad_token_id=chat.tokenizer.pad_token_id)  # fmt: skip
        answers = chat.tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in answers]
    rows = [{**row, "choices": [str(choice).strip() for choice in row["choices"]]} for row in rows]
    spans = [[chat.answer_tokens(chat.answered(row, choice)) for choice in row["choices"]] for row in rows]
    if all(len({tuple(span[1:]) for span in row}) == 1 for row in spans):  # they differ in one token: one forward a row
        batch = chat.batch(rows, prompt_only=True).to(model.device)
        ends = batch["attention_mask"].sum(dim=1) - 1
        logits = model(**batch).logits[torch.arange(len(rows)), ends]
        scores = [logits[i, [span[0] for span in row]] for i, row in enumerate(spans)]
    else:
        candidates = [chat.answered(row, choice) for row in rows for choice in row["choices"]]
        candidates = [{**row, **chat.measure(row)} for row in candidates]
        batch = chat(candidates).to(model.device)
        labels = batch["labels"][:, 1:]  # given to the model too: they tell rep_mode="prompt_end" where the prompt ends
        known = labels != -100
        logits = model(**batch).logits[:, :-1][known].float()
        loss = torch.zeros(known.shape, device=logits.device)
        loss[known] = torch.nn.functional.cross_entropy(logits, labels[known], reduction="none")
        loss[torch.tensor([bool(row["problem"]) for row in candidates])] = torch.inf  # too long, or empty
        scores = (-loss.sum(dim=1)).split([len(row["choices"]) for row in rows])
    return [row["choices"][int(score.argmax())] for row, score in zip(rows, scores, strict=True)]


def accuracy(model: Any, chat: Chat, rows: datasets.Dataset, batch_size: int, sharded: bool) -> dict[str, float]:
    """The share of rows answered exactly, in all and by task. Processes split the rows unless they share a model."""
    model.eval()
    hits, everything = [], list(range(len(rows)))
    with nullcontext(everything) if sharded else PartialState().split_between_processes(everything) as indices:
        rows = rows.select(indices).to_list()
    kinds = [row for row in rows if row.get("choices")], [row for row in rows if not row.get("choices")]
    batches = [kind[i : i + batch_size] for kind in kinds for i in range(0, len(kind), batch_size)]
    for batch in tqdm(batches, "answering", disable=not PartialState().is_main_process):
        for row, answer in zip(batch, predict(model, chat, batch), strict=True):
            hits.append((str(row.get("task") or ""), float(answer == chat.answer(row))))
    hits = hits if sharded or PartialState().num_processes == 1 else gather_object(hits)
    tasks = sorted({task for task, _ in hits if task})
    chosen = {"accuracy": hits} | {f"  {task}": [hit for hit in hits if hit[0] == task] for task in tasks}
    return {name: sum(hit for _, hit in group) / len(group) for name, group in chosen.items()}


def routing_table(routing: dict[str, dict[str, Any]]) -> str:
    width, lines, header = max(map(len, routing)), [], None
    for block, values in routing.items():
        if values["experts"] != header:
            header = values["experts"]
            lines.append("share of tokens".ljust(width) + "".join(f"  {name.split('.')[-1]:>9}" for name in header))
        lines.append(block.ljust(width) + "".join(f"  {float(share):>9.1%}" for share in values["share"]))
    return "\n".join(lines)


def last_checkpoint(directory: str) -> str:
    """The newest complete checkpoint: trainer_state.json is written last, so a killed save lacks it or cuts it."""
    found = [path for path in Path(directory).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    for path in sorted(found, key=lambda path: -int(path.name.split("-")[-1])):
        with suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
    raise ValueError(f"--resume_from_checkpoint: no complete checkpoint in {directory}")


# ---------------- the demonstration


def byte_level_tokenizer(*more: str) -> transformers.PreTrainedTokenizerFast:
    """One token a byte, three special ones, and as many more as are given."""
    special = ["<s>", "</s>", "<pad>", *more]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def demonstration(folder: Path, seed: int, use_cpu: bool) -> None:
    """Make a small Llama that can do some tasks on words, and rows of other tasks for Monkey Jump to teach it."""
    transformers.set_seed(seed)
    known: dict[str, Callable[[str], str]] = {
        "copy": lambda w: w, "reverse": lambda w: w[::-1], "last": lambda w: w[-1], "tail": lambda w: w[1:],
        "next": lambda w: "".join(chr((ord(c) - 96) % 26 + 97) for c in w)}  # fmt: skip
    new = {"first": lambda w: w[0], "second": lambda w: w[1], "head": lambda w: w[:-1], "double": lambda w: w + w}

    def rows(tasks: dict[str, Callable[[str], str]], count: int) -> datasets.Dataset:
        words = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=4)) for _ in range(count)]
        made = [(task, word) for word, task in zip(words, len(words) * list(tasks), strict=False)]
        return datasets.Dataset.from_list(
            [{"task": task, "prompt": f"{task} {word}:", "answer": tasks[task](word)} for task, word in made]
        )

    tokenizer = byte_level_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        initializer_range=0.1, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    say("the base model, a small Llama, learns to", ", ".join(known))
    arguments = TrainingArguments(
        str(folder), max_steps=BASE_STEPS, per_device_train_batch_size=64, learning_rate=5e-3, adam_beta2=0.98,
        warmup_steps=BASE_STEPS // 10, lr_scheduler_type="cosine", logging_steps=100, save_strategy="no", seed=seed,
        remove_unused_columns=False, dataloader_pin_memory=torch.cuda.is_available(), use_cpu=use_cpu,
    )  # fmt: skip
    chat, model = Chat(tokenizer, False, Options()), transformers.LlamaForCausalLM(config)
    base = Trainer(model, arguments, data_collator=chat, train_dataset=chat.usable(rows(known, 20 * BASE_STEPS)))
    base.train()
    base.save_model(str(folder / "base"))
    tokenizer.save_pretrained(folder / "base")
    if base.is_world_process_zero():
        rows(new, 15 * BASE_STEPS).to_json(folder / "rows.jsonl")
    base.accelerator.wait_for_everyone()
    say("Monkey Jump teaches it to", ", ".join(new))


# ---------------- the run


def parse(argv: list[str] | None) -> tuple[Options, TrainingArguments]:
    parser = transformers.HfArgumentParser((Options, TrainingArguments), description=__doc__)

    def error(message: str) -> None:
        raise ValueError(message)

    parser.error = error  # argparse would print the usage of all two hundred flags
    parser.set_defaults(**DEFAULTS)
    if parser.parse_known_args(argv)[0].model is None:
        parser.set_defaults(**DEMONSTRATION)
    options, training = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    training.remove_unused_columns = False  # the collator reads whole rows
    training._n_gpu = min(training.n_gpu, 1)  # more are for torchrun: DataParallel's threads would share the routers
    options.blocks = json.loads(options.blocks) if options.blocks else None
    return options, training


def check(options: Options, training: TrainingArguments) -> None:
    """What can be known to fail before anything is read, downloaded or written."""
    if options.model is None and (options.dataset or options.adapter_path or options.generate or options.eval_only):
        raise ValueError("--model is missing: a hub id, a folder or a .gguf file")
    if options.model and not (options.dataset or options.generate):
        raise ValueError("--dataset is missing: a hub id, a folder or a .json, .jsonl, .csv or .parquet file")
    for name, kinds in {"model": [".gguf"], "dataset": FORMATS, "adapter_path": []}.items():
        value = getattr(options, name) or ""
        on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value) and Path(value).suffix not in kinds
        if value and (name == "adapter_path" or not on_hub) and not Path(value).exists():
            raise ValueError(f"--{name} {value}: no such file or folder")
    if options.load_in_4bit and not find_spec("bitsandbytes"):
        raise ValueError("--load_in_4bit needs bitsandbytes: pip install bitsandbytes")
    if options.text_column and (options.eval_accuracy or options.generate):
        raise ValueError("--text_column has no answers: --eval_accuracy and --generate need prompts")
    for name, low in {"kmeans_samples": 0, "max_new_tokens": 1}.items():
        if getattr(options, name) < low:
            raise ValueError(f"--{name} {getattr(options, name)}: must be at least {low}")
    output = Path(training.output_dir)
    if files := [path for path in (output, *output.parents) if path.is_file()]:
        raise ValueError(f"--output_dir {output}: {files[0]} is a file")
    if training.resume_from_checkpoint in ("True", "true", "last"):
        training.resume_from_checkpoint = last_checkpoint(training.output_dir)
    elif (chosen := training.resume_from_checkpoint) is not None and not Path(chosen, "trainer_state.json").is_file():
        raise ValueError(f"--resume_from_checkpoint {chosen}: there is no checkpoint")
    if options.eval_only or options.generate or options.overwrite_output_dir or training.resume_from_checkpoint:
        return
    if found := [p for p in Path(training.output_dir).glob("*") if p.name.startswith(("adapter_", "checkpoint-"))]:
        raise ValueError(f"{found[0]} is another run's: --resume_from_checkpoint last goes on with it, "
                         "--overwrite_output_dir replaces it, --output_dir goes elsewhere")  # fmt: skip


def prepare(options: Options, training: TrainingArguments) -> tuple[Any, Chat, Any, Any]:
    """The adapted model, its chat and the rows. What configuration, tokenizer and rows rule out needs no weights."""
    name, source = options.model, {}
    if name.endswith(".gguf"):
        name, source = str(Path(name).parent), {"gguf_file": Path(name).name}
    config = transformers.AutoConfig.from_pretrained(name, **source)
    vision = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    names = inspect.signature(mj.apply_monkeyjump).parameters
    keywords = {name: value for name, value in vars(options).items() if name in names and name != "model"}
    if not options.adapter_path:
        with torch.device("meta"):
            mj.apply_monkeyjump(auto.from_config(config), **keywords)
    processor = (transformers.AutoProcessor if vision else transformers.AutoTokenizer).from_pretrained(name, **source)
    if not vision:
        options.max_length = options.max_length or getattr(config, "max_position_embeddings", None)
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    chat, rows = Chat(processor, vision, options, dtype), (None, None)
    if options.dataset and not options.generate:
        with training.main_process_first(desc="reading the rows"):
            rows = load_rows(chat, training)
        chat([(rows[0] or rows[1])[0]])  # a package that the processor lacks is missed here

    if "gguf_file" in source and hasattr(transformers, "GgufConfig"):  # newer versions would keep the weights packed
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if options.load_in_4bit:
        source["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    model = auto.from_pretrained(name, dtype=dtype, **source)
    if options.adapter_path:
        mj.load_adapter(model, options.adapter_path)
    else:
        mj.apply_monkeyjump(model, **keywords)
    if training.resume_from_checkpoint:  # the Trainer would take another adapter's checkpoint without a word
        mj.load_adapter(model, training.resume_from_checkpoint)
    model._hf_peft_config_loaded = getattr(model, "is_quantized", False)  # what the Trainer asks of a quantised model
    return model, chat, *rows


def main(argv: list[str] | None = None) -> None:
    with errors_in_one_line():
        options, training = parse(argv)
        check(options, training)
    if options.model is None:
        folder = Path(training.output_dir)
        demonstration(folder, training.seed, training.use_cpu)
        options.model, options.dataset = str(folder / "base"), str(folder / "rows.jsonl")
    transformers.set_seed(training.seed)
    with errors_in_one_line():
        model, chat, train_rows, eval_rows = prepare(options, training)
    if options.generate:
        model = model if options.load_in_4bit else model.to(training.device)
        say(predict(model.eval(), chat, [{options.prompt_column: options.generate}])[0])
        return

    if PartialState().is_main_process:
        mj.print_trainable_parameters(model)
    ranks = [len(parameter) for name, parameter in model.named_parameters() if name.endswith("lora_E")]
    adalora = bool(ranks)
    with errors_in_one_line():
        if adalora and not 0 < options.target_rank <= sum(ranks) / len(ranks):
            raise ValueError(f"--target_rank {options.target_rank}: must be above 0, at most {sum(ranks) / len(ranks)}")
        sets = {"train_dataset": train_rows, "eval_dataset": eval_rows}
        trainer = MonkeyJumpTrainer(model, training, data_collator=chat, **sets)
    trainer.orthogonal_weight = options.orthogonal_weight if adalora else 0.0
    trainer.add_callback(MonkeyJumpCallback(options.target_rank if adalora else None))
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    results: dict[str, dict[str, float]] = {}

    def evaluate(moment: str) -> None:
        if eval_rows is not None:
            results[moment] = {"loss": trainer.evaluate()["eval_loss"]}
            if options.eval_accuracy:
                results[moment] |= accuracy(model, chat, eval_rows, training.per_device_eval_batch_size, sharded)

    if not sharded:  # a model that is sharded for evaluation cannot be sharded for training any more
        with mj.disable_adapters(model):
            evaluate("before")
    if not options.eval_only:
        fresh = not (options.adapter_path or training.resume_from_checkpoint)
        if options.kmeans_samples and fresh:
            with errors_in_one_line():
                mj.init_router_centers(trainer, subset_size=options.kmeans_samples, seed=training.seed)
        if options.overwrite_output_dir and not training.resume_from_checkpoint and trainer.is_world_process_zero():
            for old in Path(training.output_dir).glob("checkpoint-*"):
                shutil.rmtree(old)
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        mj.save_adapter(model, training.output_dir)
    evaluate("after")

    for metric in results.get("after", {}):
        say(f"{metric:<20}" + "".join(f"  {moment} {values[metric]:8.4f}" for moment, values in results.items()))
    if options.eval_only:
        return
    say(routing_table(trainer.routing or mj.router_statistics(model)))
    if options.eval_accuracy and eval_rows is not None and not sharded:
        model = mj.load_adapter(mj.remove_monkeyjump(model), training.output_dir)
        rows = [{**row, "choices": None} for row in eval_rows.select(range(min(4, len(eval_rows))))]
        say("answers of the adapter loaded from disk:")
        for row, answer in zip(rows, predict(model.eval(), chat, rows), strict=True):
            say(f"  {chat.text(row, prompt_only=True)[-60:]!r} -> {answer!r}, right is {chat.answer(row)!r}")
    if training.push_to_hub:
        trainer.push_to_hub()
    say(training.output_dir)


if __name__ == "__main__":
    main()
