"""Progress bar and metrics of a training run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from torchfuse.components import build
from torchfuse.errors import ConfigError
from torchfuse.io.ranks import coordination_group, from_rank_zero
from torchfuse.training.estimation.utilization import Utilization

__all__ = ["Progress", "StepMetrics", "build_logger"]


@dataclass
class StepMetrics:
    """Metrics of one optimizer step, on this rank.

    Attributes:
        loss: mean loss of the supervised tokens of all ranks.
        grad_norm: norm of the gradients before they are clipped.
        lr: learning rate by group of parameters.
        tokens: tokens by modality, and ``"supervised"``.
        seconds: by part of the step: ``"data"``, ``"model"`` (forward and backward), ``"optimizer"``.
    """

    loss: float = 0.0
    grad_norm: float = 0.0
    lr: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Add the time of a ``with`` statement to a part of the step."""
        began = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began

    def payload(self, device: torch.device, utilization: Utilization | None = None) -> dict[str, float]:
        """Return everything as numbers by name, for a metric logger.

        Args:
            device: where the model is.
            utilization: computes ``"mfu"``; None: it is left out.

        Examples:
            >>> metrics = StepMetrics(loss=2.5, lr={"fusion": 1e-3}, tokens={"text": 30})
            >>> metrics.seconds = {"data": 0.5, "model": 1.0}
            >>> payload = metrics.payload(torch.device("cpu"))
            >>> payload["lr/fusion"], payload["tokens_per_second/text"], payload["seconds/data"]
            (0.001, 20.0, 0.5)
        """
        total = max(sum(self.seconds.values()), 1e-9)
        payload = {"loss": self.loss, "grad_norm": self.grad_norm}
        payload |= {f"lr/{name}": lr for name, lr in self.lr.items()}
        payload |= {f"tokens_per_second/{name}": num / total for name, num in self.tokens.items()}
        payload |= {f"seconds/{part}": seconds for part, seconds in self.seconds.items()}
        if device.type == "cuda":
            payload["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        if utilization is not None:
            payload["mfu"] = utilization.of(self.tokens, total)
        return payload


class Progress:
    """A bar in a terminal, lines elsewhere, and a metric logger, for the steps of a run.

    Args:
        num_steps: steps of the whole run.
        step: steps that were taken already.
        device: where the model is.
        log: takes lines of text where there is no bar; on one rank.
        logger: torchtune's interface for metric loggers, ``log_dict(payload, step)`` and ``close()``.
        log_every: steps between two calls of the logger.
        shown: whether this rank shows a bar.
        utilization: computes the MFU of each step; None: it is not shown.
    """

    def __init__(
        self,
        num_steps: int,
        step: int,
        *,
        device: torch.device,
        log: Callable[[str], None],
        logger: Any = None,
        log_every: int = 1,
        shown: bool = True,
        utilization: Utilization | None = None,
    ) -> None:
        self._num_steps, self._device, self._log = num_steps, device, log
        self._logger, self._every, self._utilization = logger, log_every, utilization
        self._bar = tqdm(desc="finetune", total=num_steps, initial=step, disable=None if shown else True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        if self._logger is not None:
            self._logger.close()

    def message(self, text: str) -> None:
        """Print a line of text, above the bar where there is one."""
        self._bar.write(text)

    def update(self, step: int, metrics: StepMetrics) -> None:
        """Display and log a step."""
        payload = metrics.payload(self._device, self._utilization)
        self._bar.update()
        self._bar.set_postfix_str(_short(metrics, payload))
        if self._bar.disable and step % max(1, self._num_steps // 10) == 0:
            self._log(f"step {step} of {self._num_steps}: loss {metrics.loss:.3f}")
        if self._logger is not None and step % self._every == 0:
            self._logger.log_dict(payload, step=step)


def build_logger(section: Mapping[str, Any]) -> Any:
    """Return the metric logger that a section of a configuration names; None but on rank zero.

    Every rank calls this, and an error is raised on every rank.

    Args:
        section: ``_component_``, one of ``torchtune.training.metric_logging``, and its keywords.

    Raises:
        ConfigError: if there is no such logger, or it cannot be started: its package is not installed,
            or its directory cannot be written to.
    """
    loggers: list[Any] = [None]

    def start() -> None:
        try:
            loggers[0] = build(section, what="logger")
        except ConfigError:
            raise
        except Exception as error:  # each logger has its own
            text = " ".join(str(error).split())
            raise ConfigError(
                f"logger ({section.get('_component_')}) cannot be started: {type(error).__name__}: "
                f"{text} Give another logger, or logger=null."
            ) from error
        if not hasattr(loggers[0], "log_dict"):
            raise ConfigError(
                "logger must be a metric logger of torchtune, with log_dict; got a "
                f"{type(loggers[0]).__name__}."
            )

    from_rank_zero(coordination_group(), start)
    return loggers[0]


def _short(metrics: StepMetrics, payload: Mapping[str, float]) -> str:
    """Return the text beside the bar: loss, tokens a second, milliseconds by part, memory, MFU."""
    rates = "/".join(f"{payload[f'tokens_per_second/{name}']:.0f} {name}" for name in metrics.tokens)
    times = "/".join(f"{1000 * seconds:.0f}" for seconds in metrics.seconds.values())
    memory = f", {payload['peak_memory_gib']:.1f} GiB" if "peak_memory_gib" in payload else ""
    mfu = f", MFU {payload['mfu']:.1%}" if "mfu" in payload else ""
    parts = "/".join(metrics.seconds)
    return f"loss {metrics.loss:.3f}, tokens/s {rates}, ms {parts} {times}{memory}{mfu}"
