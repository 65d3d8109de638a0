"""The training of a finetuning run, which can be saved and resumed at any step."""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, distributed, nn
from torchfuse.recipes.finetune_config import Config, resume_signature
from torchtune.training.lr_schedulers import get_cosine_schedule_with_warmup
from torchtune.utils import batch_to_device, get_world_size_and_rank
from tqdm import tqdm

from torchfuse import param_groups
from torchfuse.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from torchfuse.data.questions import QuestionDataset
from torchfuse.data.steps import count_tokens, optimizer_steps
from torchfuse.errors import CheckpointError, ConfigError
from torchfuse.params import FreezeSchedule
from torchfuse.tasks.image_inputs import fit_to_encoder
from torchfuse.training import TrainingRecord, device_and_dtype, next_token_loss

CHECKPOINTS: Final = "checkpoints"  # below output_dir


class Trainer:
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
        if not self.trained:
            raise ConfigError(
                "No parameter trains: set model.fusion_trainable=true, or add a freeze stage."
            )
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

    def train(self, log: Callable[[str], None], validate: Callable[[], float]) -> TrainingRecord:
        """Take the remaining steps; validate and save as often as configured; return the record."""
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
                loss = self._train_step(step)
                record.losses.append((self.step, loss))
                record.seconds += time.perf_counter() - began
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}")
                if bar.disable and self.step % max(1, self.num_steps // 10) == 0:
                    log(f"step {self.step} of {self.num_steps}: loss {loss:.3f}")
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

    def _is_due(self, every: int | None) -> bool:
        return every is not None and (self.step % every == 0 or self.step == self.num_steps)

    @property
    def _checkpoints(self) -> Path:
        return Path(self.config.output_dir) / CHECKPOINTS


def _backward(model: nn.Module, step: list[dict[str, Any]], world_size: int) -> float:
    """Compute the gradients of one optimizer step, in which every supervised token weighs the same."""
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
