"""Finetune a fused model on questions about images.

Fuses, loads both pretrained checkpoints unchanged, trains what the model's flags say (what fusion added,
unless told otherwise), asks held-out questions, and saves what was learned.

Launch on one device, or on several with FSDP2:

    tune run torchfuse/recipes/finetune.py --config recipes/configs/digits/cross_attention.yaml
    tune run --nproc_per_node 2 torchfuse/recipes/finetune.py --config ... model.on_missing=participate

Any key can be overridden: ``train.lr=1e-3 model.every=2``.
"""

import json
import math
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING, OmegaConf
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, DistributedSampler
from torchtune import training
from torchtune.training.lr_schedulers import get_cosine_schedule_with_warmup
from torchtune.utils import batch_to_device, get_world_size_and_rank
from tqdm import tqdm

from torchfuse import describe, param_groups
from torchfuse.checkpoint.files import write_whole
from torchfuse.checkpoint.trained import save_trained
from torchfuse.config import build, recipe
from torchfuse.data.collate import padded_collate_images
from torchfuse.data.questions import (
    Question,
    QuestionDataset,
    QuestionTransform,
    check_questions,
    read_questions,
)
from torchfuse.devices import device_and_dtype
from torchfuse.evaluation import Answered, accuracy, answer_questions, exchange_images
from torchfuse.params import FreezeSchedule, read_freeze_meta
from torchfuse.params.trainable import set_requires_grad
from torchfuse.runs import build_model, check_images
from torchfuse.training import next_token_loss, shard


@dataclass
class Pretrained:
    """Directories of pretrained checkpoints; an encoder's by name where encoders have names."""

    decoder: str = MISSING
    encoder: Any = MISSING


@dataclass
class Data:
    """Question files."""

    train: str = MISSING
    test: str | None = None
    limit: int | None = None


@dataclass
class Train:
    """Optimisation; ``lr`` and ``weight_decay`` are numbers, or by part of the model."""

    lr: Any = 1e-3
    weight_decay: Any = 0.0
    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    warmup_steps: int = 0
    clip_grad_norm: float | None = 1.0


@dataclass
class Config:
    """Everything that the recipe takes.

    ``freeze`` lists stages, ``{start_step, specs: [{module, frozen}]}``, see ``torchfuse.params``; none
    leaves what trains as the model says.
    """

    output_dir: str = MISSING
    model: dict[str, Any] = MISSING
    pretrained: Pretrained = field(default_factory=Pretrained)
    transform: dict[str, Any] = MISSING
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    freeze: list[dict[str, Any]] = field(default_factory=list)
    device: str = "cpu"
    dtype: str = "fp32"
    seed: int = 0
    activation_checkpointing: bool = False
    compile: bool = False
    eval_batch_size: int = 128


@recipe(Config)
def main(config: Config) -> None:
    """Finetune a fused model on questions about images."""
    started = time.perf_counter()
    _check_numbers(config)
    stages = FreezeSchedule(read_freeze_meta(config.freeze))
    distributed_run = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if distributed_run:
        distributed.init_process_group()
    say = print if get_world_size_and_rank()[1] == 0 else _silent
    training.set_seed(config.seed)
    output = _output_dir(config.output_dir)

    transform: QuestionTransform = build(config.transform, what="transform", kind=QuestionTransform)
    questions = QuestionDataset(transform, config.data.train, config.data.limit)
    test = config.data.test
    held_out = read_questions(test) if test else []
    longest = check_questions(transform, held_out, test) if test else 0
    model = _build_model(config, shard_it=distributed_run)
    _check_image_token(model, transform.image_token)
    check_images(model, transform.image_transform, config.pretrained.encoder)
    trained = stages.trained_ever(model)
    stages.apply(model, 0)
    say(f"\n{describe(model)}\n")

    def ask(asked: list[Question]) -> list[Answered]:
        # Sharded ranks all ask everything: they must run the same steps.
        options = {"batch_size": config.eval_batch_size, "max_new_tokens": longest}
        return answer_questions(model, transform, asked, **options)

    metrics: dict[str, Any] = {}
    if text := [question for question in held_out if not question.images]:
        metrics["before"] = _shares(ask(text))
    history = _train(model, questions, stages, config, say)
    set_requires_grad(model, dict.fromkeys(trained, True))  # what an earlier stage trained is saved too
    save_trained(model, output / "fusion")
    write = _write if get_world_size_and_rank()[1] == 0 else _silent
    write(output / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
    write(output / "losses.json", json.dumps(history) + "\n")
    say(f"saved {output / 'fusion'}")

    if held_out:
        answered = ask(held_out)
        metrics["after"] = _shares(answered) | {"all": round(accuracy(answered)["all"], 4)}
        write(output / "answers.jsonl", "".join(_record(a, output) + "\n" for a in answered))
    numbers = Counter(len(question.images) for question in held_out)
    if seeing := [q for q in held_out if q.images and numbers[len(q.images)] > 1]:
        metrics["images_exchanged"] = _shares(ask(exchange_images(seeing, config.seed)))
    if metrics:
        say(_table(metrics))
    metrics["seconds"] = round(time.perf_counter() - started, 1)
    write(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    if distributed_run:
        distributed.destroy_process_group()


def _check_numbers(config: Config) -> None:
    """Raise one ``ValueError`` for all numbers out of range."""
    train = config.train
    faults = [
        f"{name}={value} must be at least {least}"
        for name, value, least in (
            ("train.epochs", train.epochs, 1),
            ("train.max_steps", train.max_steps, 1),
            ("train.batch_size", train.batch_size, 1),
            ("train.gradient_accumulation_steps", train.gradient_accumulation_steps, 1),
            ("train.warmup_steps", train.warmup_steps, 0),
            ("data.limit", config.data.limit, 1),
            ("eval_batch_size", config.eval_batch_size, 1),
        )
        if value is not None and value < least
    ]
    if train.clip_grad_norm is not None and not train.clip_grad_norm > 0:
        faults.append(f"train.clip_grad_norm={train.clip_grad_norm} must be above 0, or null")
    for name, value in (("train.lr", train.lr), ("train.weight_decay", train.weight_decay)):
        rates = list(value.values()) if isinstance(value, dict) else [value]
        numbers = all(isinstance(rate, int | float) and not isinstance(rate, bool) for rate in rates)
        if not rates or not numbers or min(rates) < 0:
            faults.append(
                f"{name}={value} must be a number of at least 0, or one for each part that trains"
            )
    if faults:
        raise ValueError(f"{'; '.join(faults)}.")


def _check_image_token(model: nn.Module, token: int | None) -> None:
    """Raise a ``ValueError`` if the image token has no row in the embedding and is not replaced."""
    rows = model.tok_embeddings.num_embeddings
    if token is not None and token >= rows and token not in model.strategy.special_tokens():
        raise ValueError(
            f"transform.image_token is {token}, but the model embeds ids below {rows}: set "
            "model.fusion_vocab_size=1 for a row of its own."
        )


def _silent(*_: Any) -> None: ...


def _output_dir(name: str) -> Path:
    """The directory to write to later, known to be writable now."""
    path = Path(name)
    for place in (path, path / "fusion"):
        existing = next(p for p in [place, *place.absolute().parents] if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ValueError(f"output_dir {path}: {existing} is no directory that can be written to.")
    return path


def _build_model(config: Config, *, shard_it: bool) -> nn.Module:
    model = build_model(config.model, vars(config.pretrained), device=config.device, dtype=config.dtype)
    layers = {type(layer) for layer in model.layers}
    if config.activation_checkpointing:
        training.set_activation_checkpointing(model, auto_wrap_policy=layers)
    if config.compile:
        for layer in model.layers:
            layer.compile()
    if shard_it:
        shard(model)
    return model


def _train(
    model: nn.Module, questions: QuestionDataset, stages: FreezeSchedule, config: Config, say: Any
) -> list[list[float]]:
    """Train, and return step and loss of every step."""
    options, (device, _) = config.train, device_and_dtype(config.device, config.dtype)
    world_size, rank = get_world_size_and_rank()
    sampler = DistributedSampler(questions, world_size, rank, seed=config.seed, drop_last=True)
    loader = DataLoader(
        questions,
        batch_size=options.batch_size,
        sampler=sampler,
        drop_last=True,
        collate_fn=lambda samples: padded_collate_images(samples, questions.transform.pad_id),
    )
    steps_per_epoch = len(loader) // options.gradient_accumulation_steps
    num_steps = steps_per_epoch * options.epochs
    if options.max_steps is not None:
        num_steps = min(num_steps, options.max_steps)
    if not num_steps:
        raise ValueError(
            f"{len(questions)} questions are too few for one step of {world_size} x "
            f"{options.batch_size} x {options.gradient_accumulation_steps}."
        )
    optimizer = torch.optim.AdamW(
        param_groups(model, lr=options.lr, weight_decay=options.weight_decay, stages=stages)
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, options.warmup_steps, num_steps)
    history: list[list[float]] = []
    model.train()
    with tqdm(total=num_steps, desc="finetune", disable=None if rank == 0 else True) as bar:
        for epoch in range(options.epochs):
            sampler.set_epoch(epoch)
            batches = iter(loader)
            while len(history) < num_steps:
                step = list(islice(batches, options.gradient_accumulation_steps))
                if len(step) < options.gradient_accumulation_steps:
                    break
                for batch in step:
                    batch_to_device(batch, device)
                stages.apply(model, len(history))
                loss = _backward(model, step, world_size)
                if not math.isfinite(loss):
                    raise ValueError(
                        f"The loss of step {len(history) + 1} is {loss}; nothing is saved. Try a lower "
                        "train.lr or more train.warmup_steps."
                    )
                if options.clip_grad_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), options.clip_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                history.append([len(history) + 1, loss])
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}")
                if bar.disable and len(history) % max(1, num_steps // 10) == 0:
                    say(f"step {len(history)} of {num_steps}: loss {loss:.3f}")
    return history


def _backward(model: nn.Module, step: list[dict[str, Any]], world_size: int) -> float:
    """Gradients of one optimizer step; every supervised token in it weighs the same."""
    labels = [batch.pop("labels") for batch in step]
    count = sum(((label[:, 1:] != -100).sum() for label in labels), torch.zeros((), dtype=torch.long))
    if world_size > 1:
        distributed.all_reduce(count)
    total: Tensor = torch.zeros(())
    for batch, label in zip(step, labels, strict=True):
        summed, _ = next_token_loss(model(**batch), label)
        # FSDP averages gradients over ranks, and the count is of all ranks already.
        (summed * world_size / count.clamp(min=1)).backward()
        total = total + summed.detach()
    if world_size > 1:
        distributed.all_reduce(total)
    return float(total / count.clamp(min=1))


def _shares(answered: list[Answered]) -> dict[str, float]:
    """Accuracy by kind of question."""
    return {kind: round(share, 4) for kind, share in accuracy(answered).items() if kind != "all"}


def _table(metrics: dict[str, Any]) -> str:
    columns = list(metrics)
    kinds = list(dict.fromkeys(kind for name in columns for kind in metrics[name]))
    width = max(map(len, ["accuracy", *kinds]), default=0)
    lines = [f"{'accuracy':<{width}}" + "".join(f"  {name:>16}" for name in columns)]
    for kind in kinds:
        cells = [f"{metrics[n][kind]:.1%}" if kind in metrics[n] else "" for n in columns]
        lines.append(f"{kind:<{width}}" + "".join(f"  {cell:>16}" for cell in cells))
    return "\n" + "\n".join(lines) + "\n"


def _record(answered: Answered, folder: Path) -> str:
    question = answered.question
    return json.dumps(
        {
            "kind": question.kind,
            "question": question.question,
            "images": [os.path.relpath(image, folder) for image in question.images],
            "answer": question.answer,
            "said": answered.said,
        }
    )


def _write(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
