"""The finetuning run: build, train, save, evaluate."""

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, distributed, nn
from torchfuse.recipes.finetune_config import Config, resume_signature
from torchtune import training
from torchtune.training.lr_schedulers import get_cosine_schedule_with_warmup
from torchtune.utils import batch_to_device, get_world_size_and_rank
from tqdm import tqdm

from torchfuse import describe, param_groups
from torchfuse.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from torchfuse.checkpoint.artifact.trained import save_trained
from torchfuse.data.questions import (
    Question,
    QuestionDataset,
    QuestionTransform,
    check_questions,
    read_questions,
)
from torchfuse.data.steps import count_tokens, optimizer_steps
from torchfuse.errors import CheckpointError, ConfigError
from torchfuse.io.atomic import write_text
from torchfuse.params import FreezeSchedule
from torchfuse.tasks.evaluation import (
    accuracy,
    accuracy_by_kind,
    accuracy_table,
    evaluate,
    format_costs,
    prediction_record,
    training_costs,
)
from torchfuse.tasks.image_inputs import fit_to_encoder
from torchfuse.tasks.prediction import Prediction, predict
from torchfuse.tasks.prompt_settings import PromptSettings
from torchfuse.tasks.runs import build_model, check_images
from torchfuse.training.config import build
from torchfuse.training.device import device_and_dtype
from torchfuse.training.loss import next_token_loss
from torchfuse.training.record import TrainingRecord
from torchfuse.training.sharding import shard

_CHECKPOINTS = "checkpoints"  # below output_dir


def run(config: Config, stages: FreezeSchedule) -> None:
    """Finetune, evaluate and save as a configuration says.

    Args:
        config: a configuration whose numbers have been checked.
        stages: which parameters train from which step on.
    """
    started = time.perf_counter()
    distributed_run = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if distributed_run:
        distributed.init_process_group()
    log, write_file = (print, _write_file) if get_world_size_and_rank()[1] == 0 else (_silent, _silent)
    training.set_seed(config.seed)
    output = _output_dir(config)

    transform: QuestionTransform = build(config.transform, what="transform", kind=QuestionTransform)
    questions = QuestionDataset(transform, config.data.train, config.data.limit)
    test = config.data.test
    held_out = read_questions(test) if test else []
    longest = check_questions(transform, held_out, test) if test else 1
    settings = PromptSettings(transform, max_new_tokens=longest)
    now_and_then = _to_ask_in_training(held_out, config)
    model = _build_model(config, shard_it=distributed_run)
    settings.check(model)
    pretrained = config.pretrained
    check_images(model, transform.image_transform, pretrained.encoder or pretrained.path)
    run = _Training(model, stages, questions, config)
    log(f"\n{describe(model)}\n")

    def ask(asked: list[Question]) -> list[Prediction]:
        # Every rank answers all questions: under sharding all ranks must run the same steps.
        return predict(model, settings, asked, batch_size=config.eval_batch_size)

    text = [question for question in held_out if not question.images]
    if run.resume():
        log(f"resumes after step {run.step} of {run.num_steps}")
    elif text:
        run.record.before = accuracy_by_kind(ask(text))
    record = run.train(log, lambda: accuracy(ask(now_and_then))["all"])
    save_trained(model, output / "fusion", trained=run.trained, stages=stages)
    write_file(output / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
    write_file(output / "losses.json", json.dumps(record.losses) + "\n")
    log(f"saved {output / 'fusion'}")

    predictions, shares = evaluate(ask, held_out, config.seed)
    if predictions:
        lines = [prediction_record(prediction, output) + "\n" for prediction in predictions]
        write_file(output / "answers.jsonl", "".join(lines))
    shares = ({"before": record.before} if record.before else {}) | shares
    costs = training_costs(model, record)
    log(f"\n{accuracy_table(shares)}\n\n{format_costs(costs)}\n")
    metrics = {**shares, **costs, "seconds": round(time.perf_counter() - started, 1)}
    write_file(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    if distributed_run:
        distributed.destroy_process_group()


def _silent(*_: Any) -> None: ...


def _output_dir(config: Config) -> Path:
    """Return the output directory after checking that it can be written to."""
    path = Path(config.output_dir)
    for place in (path, path / "fusion", path / _CHECKPOINTS):
        existing = next(p for p in [place, *place.absolute().parents] if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ConfigError(
                f"output_dir {path}: {existing} is not a directory that can be written to."
            )
    earlier = latest_checkpoint(path / _CHECKPOINTS)
    if earlier is not None and config.save_every is not None and not config.resume:
        raise ConfigError(
            f"{earlier} is of an earlier run: resume it with resume=true; for a new run remove it, or "
            "name another output_dir."
        )
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
    """Return the questions about one image that are answered during training."""
    about_one = [question for question in held_out if len(question.images) == 1]
    if config.eval_every is not None and not about_one:
        raise ConfigError(
            f"eval_every={config.eval_every} needs questions about one image, and there is none in "
            f"data.test={config.data.test}; name a file with some, or set eval_every=null."
        )
    return about_one[: config.eval_limit]


class _Training:
    """The state of a run: model, optimizer, schedules and record, saved and loaded together.

    Args:
        model: the model, sharded or not.
        stages: which parameters train from which step on.
        questions: the training set.
        config: the recipe's configuration.
    """

    def __init__(
        self, model: nn.Module, stages: FreezeSchedule, questions: QuestionDataset, config: Config
    ) -> None:
        self.model, self.stages, self.questions, self.config = model, stages, questions, config
        self.device, _ = device_and_dtype(config.device, config.dtype)
        self.world_size, self.rank = get_world_size_and_rank()
        self.step, self.record = 0, TrainingRecord()
        self.trained = stages.trained_ever(model)
        stages.apply(model, 0)
        self.num_steps, _ = self._steps()
        options = config.train
        self.optimizer = torch.optim.AdamW(
            param_groups(model, lr=options.lr, weight_decay=options.weight_decay, stages=stages)
        )
        self.lr_schedule = get_cosine_schedule_with_warmup(
            self.optimizer, options.warmup_steps, self.num_steps
        )

    def resume(self) -> bool:
        """Load the newest checkpoint if the configuration asks for it; return whether there is one.

        Raises:
            ConfigError: if the checkpoint was made with a different configuration.
            CheckpointError: if it does not fit the model or the optimizer.
        """
        folder = self._checkpoints
        if not self.config.resume or latest_checkpoint(folder) is None:
            return False
        loaded = load_checkpoint(folder, self.model, self.optimizer)
        current, saved = resume_signature(self.config, self.world_size), loaded.extra.get("course")
        if saved is None:
            raise CheckpointError(f"{loaded.path} is not a checkpoint of this recipe.")
        differ = [
            f"{name} was {saved.get(name)!r} and is {current.get(name)!r}"
            for name in {**saved, **current}
            if saved.get(name) != current.get(name)
        ]
        if differ:
            raise ConfigError(
                f"{loaded.path} was made with a different configuration: {'; '.join(differ)}."
            )
        self.step = loaded.step
        self.record = TrainingRecord.restored(loaded.extra["record"], self.rank)
        self.lr_schedule.load_state_dict(loaded.extra["lr_schedule"])
        return True

    def save(self) -> None:
        """Write a checkpoint of the run; every rank calls this."""
        save_checkpoint(
            self._checkpoints,
            self.model,
            self.optimizer,
            step=self.step,
            extra={
                "course": resume_signature(self.config, self.world_size),
                "record": self.record.of_all_ranks(self.device).state(),
                "lr_schedule": self.lr_schedule.state_dict(),
            },
            trained=self.trained,
        )

    def train(self, log: Callable[[str], None], ask: Callable[[], float]) -> TrainingRecord:
        """Take the remaining steps; evaluate and save as often as the configuration says."""
        record, config = self.record, self.config
        _, steps = self._steps()
        self.model.train()
        bar = tqdm(
            desc="finetune",
            total=self.num_steps,
            initial=self.step,
            disable=None if self.rank == 0 else True,
        )
        with bar:
            began = time.perf_counter()
            for step in steps:
                loss = self._take(step)
                record.losses.append((self.step, loss))
                record.seconds += time.perf_counter() - began
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}")
                if bar.disable and self.step % max(1, self.num_steps // 10) == 0:
                    log(f"step {self.step} of {self.num_steps}: loss {loss:.3f}")
                if self._is_time(config.eval_every):
                    record.accuracies.append((self.step, ask()))
                if self._is_time(config.save_every):
                    self.save()
                began = time.perf_counter()
        return record.of_all_ranks(self.device)

    def _take(self, step: list[dict[str, Any]]) -> float:
        """One optimizer step; returns its loss."""
        # A function of the step alone, so that a resumed run draws what an uninterrupted one does.
        torch.manual_seed(self.config.seed + self.step * self.world_size + self.rank)
        for batch in step:
            self.record.tokens.update(count_tokens(batch, self.questions.transform))
            batch_to_device(batch, self.device)
            batch.update(fit_to_encoder(self.model, batch))
        self.stages.apply(self.model, self.step)
        loss = _backward(self.model, step, self.world_size)
        self.step += 1
        if not math.isfinite(loss):
            raise ConfigError(
                f"The loss of step {self.step} is {loss}; it is not saved. Try a lower train.lr or more "
                "train.warmup_steps."
            )
        if self.config.train.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_schedule.step()
        return loss

    def _steps(self) -> tuple[int, Iterable[list[dict[str, Any]]]]:
        options = self.config.train
        return optimizer_steps(
            self.questions,
            batch_size=options.batch_size,
            batches_per_step=options.gradient_accumulation_steps,
            epochs=options.epochs,
            max_steps=options.max_steps,
            seed=self.config.seed,
            world_size=self.world_size,
            rank=self.rank,
            start=self.step,
        )

    def _is_time(self, every: int | None) -> bool:
        return every is not None and (self.step % every == 0 or self.step == self.num_steps)

    @property
    def _checkpoints(self) -> Path:
        return Path(self.config.output_dir) / _CHECKPOINTS


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


def _write_file(path: Path, text: str) -> None:
    write_text(path, text)
