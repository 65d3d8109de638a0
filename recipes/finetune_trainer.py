"""The training of a finetuning run, which can be saved and resumed at any step."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, distributed, nn
from torch.optim.lr_scheduler import LRScheduler
from torchfuse.recipes.finetune_checks import check_resumed, resume_signature
from torchfuse.recipes.finetune_config import Config
from torchtune.utils import batch_to_device, get_world_size_and_rank

from torchfuse import param_groups
from torchfuse.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    read_checkpoint,
    remove_checkpoints,
    save_checkpoint,
)
from torchfuse.checkpoint.run import checkpoint_steps
from torchfuse.data.loading import Cursor, StepLoader, count_tokens
from torchfuse.errors import ConfigError, DataError, ModelError
from torchfuse.params import FreezeSchedule
from torchfuse.tasks.image_inputs import fit_to_encoder
from torchfuse.training import TrainingRecord, build, device_and_dtype, linear_next_token_loss
from torchfuse.training.finite import NonFiniteSteps, clip_gradients
from torchfuse.training.interruption import Interruption
from torchfuse.training.memory import step_in_backward
from torchfuse.training.parallel import DataParallel, Watchdog
from torchfuse.training.precision import computing_in
from torchfuse.training.progress import Progress, StepMetrics
from torchfuse.training.schedules import lr_schedule

CHECKPOINTS: Final = "checkpoints"  # below output_dir


class Trainer:
    """The state of a run: model, optimizer, schedules and record, saved and loaded together.

    Args:
        model: the model, which is sharded if there are several ranks and the configuration says so.
        stages: which parameters train from which step on.
        loader: the batches of every step.
        config: the recipe's configuration.
    """

    def __init__(
        self, model: nn.Module, stages: FreezeSchedule, loader: StepLoader, config: Config
    ) -> None:
        self.model, self.stages, self.loader, self.config = model, stages, loader, config
        self.device, self.dtype = device_and_dtype(config.device, config.dtype)
        self.world_size, self.rank = get_world_size_and_rank()
        self.parallel = _parallelize(model, config, self.device, self.dtype)
        self.watchdog = Watchdog(config.parallel.timeout_minutes)
        self.step, self.cursor, self.record = 0, Cursor(), TrainingRecord()
        self._idle = 0  # steps in a row without anything to learn
        self.trained = stages.trained_ever(model)
        if not self.trained:
            raise ConfigError(
                "No parameter trains: set model.fusion_trainable=true, or add a freeze stage."
            )
        stages.apply(model, 0)
        self.num_steps = loader.num_steps
        options = config.train
        # What was taken in the backward pass cannot be skipped.
        skippable = 0 if options.optimizer_in_backward else options.max_skipped_steps
        self.non_finite = NonFiniteSteps(skippable)
        self.optimizer = build(
            options.optimizer,
            param_groups(
                model,
                lr=options.lr,
                weight_decay=options.weight_decay,
                layer_decay=options.lr_layer_decay,
                stages=stages,
            ),
            what="train.optimizer",
            kind=torch.optim.Optimizer,
        )
        self.lr_schedule = self._lr_schedule()
        if options.optimizer_in_backward:
            parameters = (p for group in self.optimizer.param_groups for p in group["params"])
            step_in_backward(parameters, self.optimizer)

    def resume(self) -> bool:
        """Load the newest checkpoint if the configuration asks for it; return whether there is one.

        Raises:
            ConfigError: if the checkpoint was made with a different configuration.
            CheckpointError: if it does not fit the model or the optimizer.
        """
        folder = self._checkpoints
        if not self.config.resume or latest_checkpoint(folder) is None:
            return False
        found = read_checkpoint(folder)
        check_resumed(found, self.config, self.world_size, self.num_steps, self.loader.samples.digest)
        data = found.extra.get("data")  # a version that saved none read the samples in order
        cursor = self.loader.cursor_of_step(found.step) if data is None else Cursor(**data["cursor"])
        loaded = load_checkpoint(found.path, self.model, self.optimizer)
        self.step, self.cursor = loaded.step, cursor
        self.record = TrainingRecord.restored(loaded.extra["record"], self.rank)
        self.lr_schedule = self._lr_schedule()
        return True

    def _lr_schedule(self) -> LRScheduler:
        options = self.config.train
        return lr_schedule(
            options.lr_schedule,
            self.optimizer,
            options.warmup_steps,
            self.num_steps,
            steps_taken=self.step,
        )

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
                "data": {"digest": self.loader.samples.digest, "cursor": self.cursor.state()},
            },
            trained=self.trained,
        )
        if self.config.keep_last is not None and self.rank == 0:
            best = [self._best_step()] if self.config.keep_best else []
            remove_checkpoints(self._checkpoints, keep_last=self.config.keep_last, keep=best)

    def _best_step(self) -> int:
        """Return the saved step with the highest accuracy, the last of several; 0 if none is known."""
        saved = set(checkpoint_steps(self._checkpoints))
        known = [(share, step) for step, share in self.record.accuracies if step in saved]
        return max(known, default=(0.0, 0))[1]

    def train(self, progress: Progress, validate: Callable[[], float]) -> TrainingRecord:
        """Take the remaining steps; validate and save as often as configured; return the record.

        Raises:
            RunInterruptedError: if the system asked for the end of the run, which is saved.
        """
        record, config = self.record, self.config
        self.model.train()
        steps = islice(self.loader.steps(self.cursor), self.num_steps - self.step)
        with progress, self.watchdog, Interruption() as interruption:
            metrics = StepMetrics()
            while (drawn := self._next(steps, metrics)) is not None:
                step, self.cursor = drawn
                skipped = self._train_step(step, metrics)
                if skipped is None:
                    record.losses.append((self.step, metrics.loss))
                record.seconds += sum(metrics.seconds.values())
                progress.update(self.step, metrics)
                for message in self.loader.skipped:  # each rank reads rows of its own
                    progress.message(f"skipped: {message}")
                if skipped is not None and self.rank == 0:
                    progress.message(f"skipped: {skipped}")
                counts = {"skipped": len(self.loader.skipped), "too_long": self.loader.too_long}
                record.samples.update(counts)
                record.skipped_steps += skipped is not None
                self.loader.skipped, self.loader.too_long = [], 0
                self._check_progress()
                self.watchdog.enter(f"evaluation or saving after step {self.step}", limited=False)
                if self._is_due(config.eval_every):
                    record.accuracies.append((self.step, validate()))
                if self._is_due(config.save_every):
                    self.save()
                if interruption.requested(self.device) and self.step < self.num_steps:
                    if not self._is_due(config.save_every):
                        self.save()
                    raise RunInterruptedError(self.step)
                metrics = StepMetrics()
        return record.of_all_ranks(self.device)

    def _train_step(self, step: list[dict[str, Any]], metrics: StepMetrics) -> str | None:
        """Take one optimizer step; return why its update was skipped, if it was."""
        with self._timing("data", metrics):
            for batch in step:
                for name, number in count_tokens(batch, self.loader.transform).items():
                    metrics.tokens[name] = metrics.tokens.get(name, 0) + number
                batch_to_device(batch, self.device)
                batch.update(fit_to_encoder(self.model, batch))
        self.record.tokens.update(metrics.tokens)
        self.stages.apply(self.model, self.step)
        with self._timing("model", metrics):
            self._backward(step, metrics)
        with self._timing("optimizer", metrics):
            self.step += 1
            metrics.grad_norm = clip_gradients(self.model.parameters(), self.config.train.clip_grad_norm)
            metrics.lr = {group["name"]: float(group["lr"]) for group in self.optimizer.param_groups}
            skipped = self.non_finite.check(self.step, metrics.loss, metrics.grad_norm, self.optimizer)
            if self._idle:  # momentum and weight decay would move the weights
                skipped = f"step {self.step}: no supervised token"
            if skipped is None and not self.config.train.optimizer_in_backward:
                self.optimizer.step()
            self.optimizer.zero_grad()
            with warnings.catch_warnings():  # torch's, where the first step is skipped
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                self.lr_schedule.step()
        return skipped

    def _backward(self, step: list[dict[str, Any]], metrics: StepMetrics) -> None:
        """Compute the gradients of a step, in which every supervised token weighs the same."""
        train = self.config.train
        targets = [(batch.pop("labels"), batch.pop("loss_weights", None)) for batch in step]
        count = torch.zeros((), device=self.device)
        for labels, weights in targets:
            learned = (labels[:, 1:] != -100).float()
            count = count + (learned if weights is None else learned * weights[:, 1:]).sum()
        metrics.tokens["supervised"] = int(count)
        if self.world_size > 1:
            distributed.all_reduce(count)
        self._idle = 0 if count > 0 else self._idle + 1
        # Weights may add up to less than 1.
        count = torch.where(count > 0, count, torch.ones_like(count))
        total: Tensor = torch.zeros((), device=self.device)
        for index, (batch, (labels, weights)) in enumerate(zip(step, targets, strict=True)):
            self._seed_batch(index, len(step))
            with self.parallel.batch(last=index == len(step) - 1) as model:
                with computing_in(self.dtype, self.device):
                    summed, _ = linear_next_token_loss(
                        model,
                        **batch,
                        labels=labels,
                        loss_weights=weights,
                        z_loss=train.z_loss,
                        label_smoothing=train.label_smoothing,
                    )
                # Nothing that trains takes part in a batch of text where only an adapter trains.
                if summed.requires_grad or self.world_size > 1:
                    # Gradients are averaged over ranks, and the count is of all ranks already.
                    (summed * self.world_size / count).backward()
            total = total + summed.detach()
        if self.world_size > 1:
            distributed.all_reduce(total)
        metrics.loss = float(total / count)

    def _seed_batch(self, index: int, num_batches: int) -> None:
        """Seed dropout and noise by the number of a batch among those of all steps and ranks.

        So a resumed run draws what an uninterrupted one does, and two ranks what one process does.
        """
        number = (self.step * num_batches + index) * self.world_size + self.rank
        torch.manual_seed(self.config.seed + number)

    @contextmanager
    def _timing(self, part: str, metrics: StepMetrics) -> Iterator[None]:
        """Measure a part of a step, which the watchdog limits."""
        self.watchdog.enter(f"step {self.step + 1}, {part}")
        with metrics.timing(part):
            yield

    def _next(self, steps: Iterator[Any], metrics: StepMetrics) -> Any:
        """Return the batches of the next step and the cursor after it; None after the last."""
        with self._timing("data", metrics):
            return next(steps, None)

    def _check_progress(self) -> None:
        """Raise a ``DataError`` if all steps of an epoch, or of the run, had nothing to learn."""
        if self._idle < min(self.loader.steps_per_epoch, self.num_steps):
            return
        counts = self.record.samples
        raise DataError(
            f"{self._idle} steps in a row had nothing to learn: {counts['skipped']} samples were left "
            f"out because they cannot be used, and {counts['too_long']} because they are longer than "
            f"{self.loader.options.max_seq_len} tokens. torchfuse check-data names them."
        )

    def _is_due(self, every: int | None) -> bool:
        return every is not None and (self.step % every == 0 or self.step == self.num_steps)

    @property
    def _checkpoints(self) -> Path:
        return Path(self.config.output_dir) / CHECKPOINTS


class RunInterruptedError(Exception):
    """The system asked for the end of a run; it was saved after a step."""


def _parallelize(
    model: nn.Module, config: Config, device: torch.device, dtype: torch.dtype
) -> DataParallel:
    computed_in = dtype if config.train.fp32_weights else torch.float32
    try:
        return DataParallel(model, config.parallel, device=device, dtype=computed_in)
    except ModelError as error:
        raise ConfigError(f"The model cannot be trained on several ranks: {error}") from error
