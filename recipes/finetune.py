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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING, OmegaConf
from torch import Tensor, distributed, nn
from torchtune import training
from torchtune.training.lr_schedulers import get_cosine_schedule_with_warmup
from torchtune.utils import batch_to_device, get_world_size_and_rank
from tqdm import tqdm

from torchfuse import describe, param_groups
from torchfuse.checkpoint.files import write_whole
from torchfuse.checkpoint.trained import save_trained
from torchfuse.config import build, recipe
from torchfuse.data.questions import (
    Question,
    QuestionDataset,
    QuestionTransform,
    check_questions,
    read_questions,
)
from torchfuse.data.steps import count_tokens, optimizer_steps
from torchfuse.devices import device_and_dtype
from torchfuse.evaluation import (
    Answered,
    TrainingRecord,
    accuracy,
    accuracy_by_kind,
    accuracy_table,
    answer_questions,
    answer_record,
    costs_in_words,
    examine,
    training_costs,
)
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
    leaves what trains as the model says. Every ``eval_every`` steps and after the last, questions about
    one image are asked: the first ``eval_limit`` of ``data.test``.
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
    eval_every: int | None = None
    eval_limit: int | None = None


@recipe(Config)
def main(config: Config) -> None:
    """Finetune a fused model on questions about images."""
    started = time.perf_counter()
    check_numbers(config)
    stages = FreezeSchedule(read_freeze_meta(config.freeze))
    distributed_run = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if distributed_run:
        distributed.init_process_group()
    say, write = (print, _write) if get_world_size_and_rank()[1] == 0 else (_silent, _silent)
    training.set_seed(config.seed)
    output = _output_dir(config.output_dir)

    transform: QuestionTransform = build(config.transform, what="transform", kind=QuestionTransform)
    questions = QuestionDataset(transform, config.data.train, config.data.limit)
    test = config.data.test
    held_out = read_questions(test) if test else []
    longest = check_questions(transform, held_out, test) if test else 0
    now_and_then = _to_ask_in_training(held_out, config)
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

    text = [question for question in held_out if not question.images]
    before = {"before": accuracy_by_kind(ask(text))} if text else {}
    record = _train(model, questions, stages, config, say, lambda: accuracy(ask(now_and_then))["all"])
    set_requires_grad(model, dict.fromkeys(trained, True))  # what an earlier stage trained is saved too
    save_trained(model, output / "fusion")
    write(output / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
    write(output / "losses.json", json.dumps(record.losses) + "\n")
    say(f"saved {output / 'fusion'}")

    answered, shares = examine(ask, held_out, config.seed)
    if answered:
        write(output / "answers.jsonl", "".join(answer_record(a, output) + "\n" for a in answered))
    shares, costs = before | shares, training_costs(model, record)
    say(f"\n{accuracy_table(shares)}\n\n{costs_in_words(costs)}\n")
    metrics = {**shares, **costs, "seconds": round(time.perf_counter() - started, 1)}
    write(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    if distributed_run:
        distributed.destroy_process_group()


def check_numbers(config: Config) -> None:
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
            ("eval_every", config.eval_every, 1),
            ("eval_limit", config.eval_limit, 1),
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


def _to_ask_in_training(held_out: list[Question], config: Config) -> list[Question]:
    """The questions about one image that are asked while the model is trained."""
    about_one = [question for question in held_out if len(question.images) == 1]
    if config.eval_every is not None and not about_one:
        raise ValueError(
            f"eval_every={config.eval_every} asks questions about one image, and there is none in "
            f"data.test={config.data.test}; name a file with some, or set eval_every=null."
        )
    return about_one[: config.eval_limit]


def _train(
    model: nn.Module,
    questions: QuestionDataset,
    stages: FreezeSchedule,
    config: Config,
    say: Any,
    ask: Callable[[], float],
) -> TrainingRecord:
    """Train, and ask now and then."""
    options, (device, _) = config.train, device_and_dtype(config.device, config.dtype)
    world_size, rank = get_world_size_and_rank()
    num_steps, steps = optimizer_steps(
        questions,
        batch_size=options.batch_size,
        batches_per_step=options.gradient_accumulation_steps,
        epochs=options.epochs,
        max_steps=options.max_steps,
        seed=config.seed,
        world_size=world_size,
        rank=rank,
    )
    optimizer = torch.optim.AdamW(
        param_groups(model, lr=options.lr, weight_decay=options.weight_decay, stages=stages)
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, options.warmup_steps, num_steps)
    record = TrainingRecord()
    model.train()
    began = time.perf_counter()
    with tqdm(total=num_steps, desc="finetune", disable=None if rank == 0 else True) as bar:
        for number, step in enumerate(steps, 1):
            for batch in step:
                record.tokens.update(count_tokens(batch, questions.transform))
                batch_to_device(batch, device)
            stages.apply(model, number - 1)
            loss = _backward(model, step, world_size)
            if not math.isfinite(loss):
                raise ValueError(
                    f"The loss of step {number} is {loss}; nothing is saved. Try a lower train.lr or "
                    "more train.warmup_steps."
                )
            if options.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), options.clip_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            record.losses.append((number, loss))
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}")
            if bar.disable and number % max(1, num_steps // 10) == 0:
                say(f"step {number} of {num_steps}: loss {loss:.3f}")
            if config.eval_every and (number % config.eval_every == 0 or number == num_steps):
                record.seconds += time.perf_counter() - began
                record.accuracies.append((number, ask()))
                began = time.perf_counter()
    record.seconds += time.perf_counter() - began
    record.add_up_ranks(device)
    return record


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


def _write(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
