"""The training of a finetuning run, which can be saved and resumed at any step."""

import math
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, distributed, nn
from torchfuse.recipes.finetune_config import Config, default_signature, resume_signature
from torchtune.training.lr_schedulers import get_cosine_schedule_with_warmup
from torchtune.utils import batch_to_device, get_world_size_and_rank
from tqdm import tqdm

from torchfuse import param_groups
from torchfuse.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from torchfuse.data.loading import Cursor, StepLoader, count_tokens
from torchfuse.errors import CheckpointError, ConfigError, DataError
from torchfuse.params import FreezeSchedule
from torchfuse.tasks.image_inputs import fit_to_encoder
from torchfuse.training import TrainingRecord, device_and_dtype, next_token_loss

CHECKPOINTS: Final = "checkpoints"  # below output_dir


class Trainer:
    """The state of a run: model, optimizer, schedules and record, saved and loaded together.

    Args:
        model: the model, sharded or not.
        stages: which parameters train from which step on.
        loader: the batches of every step.
        config: the recipe's configuration.
    """

    def __init__(
        self, model: nn.Module, stages: FreezeSchedule, loader: StepLoader, config: Config
    ) -> None:
        self.model, self.stages, self.loader, self.config = model, stages, loader, config
        self.device, _ = device_and_dtype(config.device, config.dtype)
        self.world_size, self.rank = get_world_size_and_rank()
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
        saved = loaded.extra.get("course")
        if saved is None:
            raise CheckpointError(f"{loaded.path} is not a checkpoint of this recipe.")
        defaults = default_signature()  # of keys that there were not when it was saved
        current, saved = resume_signature(self.config, self.world_size), {**defaults, **saved}
        differ = [
            f"{name} was {saved.get(name)!r} and is {value!r}"
            for name, value in current.items()
            if saved.get(name) != value
        ]
        if differ:
            raise ConfigError(
                f"{loaded.path} was made with a different configuration: {'; '.join(differ)}."
            )
        self.step = loaded.step
        self.cursor = self._restored_cursor(loaded.extra.get("data"), loaded.path)
        self.record = TrainingRecord.restored(loaded.extra["record"], self.rank)
        self.lr_schedule.load_state_dict(loaded.extra["lr_schedule"])
        return True

    def _restored_cursor(self, saved: dict[str, Any] | None, path: Path) -> Cursor:
        """Return the cursor of a checkpoint, after comparing the data that it was trained on."""
        if saved is None:  # of a version that saved none
            return self.loader.cursor_of_step(self.step)
        if saved["digest"] != self.loader.samples.digest:
            raise ConfigError(
                f"{path} was trained on other data: the rows of data.train={self.config.data.train} "
                "have changed since. Restore them, or start a new run in another output_dir."
            )
        return Cursor(**saved["cursor"])

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
                "data": {"digest": self.loader.samples.digest, "cursor": self.cursor.state()},
            },
            trained=self.trained,
        )

    def train(self, log: Callable[[str], None], validate: Callable[[], float]) -> TrainingRecord:
        """Take the remaining steps; validate and save as often as configured; return the record."""
        record, config = self.record, self.config
        self.model.train()
        steps = islice(self.loader.steps(self.cursor), self.num_steps - self.step)
        bar = tqdm(
            desc="finetune",
            total=self.num_steps,
            initial=self.step,
            disable=None if self.rank == 0 else True,
        )
        with bar:
            began = time.perf_counter()
            for step, self.cursor in steps:
                loss = self._train_step(step)
                record.losses.append((self.step, loss))
                record.seconds += time.perf_counter() - began
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}")
                if bar.disable and self.step % max(1, self.num_steps // 10) == 0:
                    log(f"step {self.step} of {self.num_steps}: loss {loss:.3f}")
                for message in self.loader.skipped:
                    print(f"skipped: {message}")  # each rank reads rows of its own
                counts = {"skipped": len(self.loader.skipped), "too_long": self.loader.too_long}
                record.samples.update(counts)
                self.loader.skipped, self.loader.too_long = [], 0
                self._check_progress()
                if self._is_due(config.eval_every):
                    record.accuracies.append((self.step, validate()))
                if self._is_due(config.save_every):
                    self.save()
                began = time.perf_counter()
        return record.of_all_ranks(self.device)

    def _train_step(self, step: list[dict[str, Any]]) -> float:
        """Take one optimizer step; return its loss."""
        # A function of the step alone, so that a resumed run draws what an uninterrupted one does.
        torch.manual_seed(self.config.seed + self.step * self.world_size + self.rank)
        for batch in step:
            self.record.tokens.update(count_tokens(batch, self.loader.transform))
            batch_to_device(batch, self.device)
            batch.update(fit_to_encoder(self.model, batch))
        self.stages.apply(self.model, self.step)
        loss, learned = _backward(self.model, step, self.world_size, self.device)
        self.step += 1
        self._idle = 0 if learned else self._idle + 1
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


def _backward(
    model: nn.Module, step: list[dict[str, Any]], world_size: int, device: torch.device
) -> tuple[float, bool]:
    """Compute the gradients of one optimizer step, in which every supervised token weighs the same.

    Returns:
        The loss, and whether there was a supervised token.
    """
    targets = [(batch.pop("labels"), batch.pop("loss_weights", None)) for batch in step]
    count = torch.zeros((), device=device)
    for labels, weights in targets:
        learned = (labels[:, 1:] != -100).float()
        count = count + (learned if weights is None else learned * weights[:, 1:]).sum()
    if world_size > 1:
        distributed.all_reduce(count)
    any_learned = count > 0
    # Weights may add up to less than 1.
    count = torch.where(any_learned, count, torch.ones_like(count))
    total: Tensor = torch.zeros((), device=device)
    for batch, (labels, weights) in zip(step, targets, strict=True):
        summed, _ = next_token_loss(model(**batch), labels, loss_weights=weights)
        # Nothing that trains takes part in a batch of text where only an adapter trains.
        if summed.requires_grad or world_size > 1:
            # FSDP averages gradients over ranks, and the count is of all ranks already.
            (summed * world_size / count).backward()
        total = total + summed.detach()
    if world_size > 1:
        distributed.all_reduce(total)
    return float(total / count), bool(any_learned)
