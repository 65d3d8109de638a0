"""What generation took: time by phase, tokens, bytes and memory.

Decoding one token reads every weight of the decoder and every slot of the caches once, and computes
little with them, so bytes read in a second say how near a machine is to what it can do. Time is taken
around whole phases, where the device is waited for anyway: a prompt that was read, an answer that is
there. Whatever compiles counts as compiling, so that a rate is that of the steps behind it.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from torchfuse.data.masks import left_padding
from torchfuse.generation.session import Session
from torchfuse.modules.fusion_layer import FusionLayer
from torchfuse.modules.kv_cache import EncoderKVCache
from torchfuse.naming import unwrap
from torchfuse.params import storage_nbytes

__all__ = ["Report", "TimedSession", "clock", "peak_memory", "step_bytes"]

_PREFIXES: Final = ("", "k", "M", "G", "T")


@dataclass
class Report:
    """What was done and how long it took; prints as a few lines.

    Attributes:
        prompts: answers that were asked for.
        images: images that the encoder ran on.
        encode_seconds: time of the encoder and its adapter.
        prompt_tokens: tokens of prompts that were read, without padding.
        prefill_seconds: time of reading them, in sessions of which the graphs were there already.
        prefills: how often that was timed.
        tokens: tokens of answers.
        decode_seconds: time of the steps behind the prompts.
        steps: how many those were; a step makes a token for each row that is not finished.
        step_tokens: tokens that they made.
        bytes_read: bytes of weights and caches that they read, see ``step_bytes``.
        compile_seconds: time of prompts and steps for which something had to be compiled first; they are
            in none of the other numbers of time.
    """

    prompts: int = 0
    images: int = 0
    encode_seconds: float = 0.0
    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    prefills: int = 0
    tokens: int = 0
    decode_seconds: float = 0.0
    steps: int = 0
    step_tokens: int = 0
    bytes_read: int = 0
    compile_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Time of all phases."""
        return self.encode_seconds + self.prefill_seconds + self.decode_seconds + self.compile_seconds

    def lines(self, device: torch.device) -> list[str]:
        """The report in plain words.

        Args:
            device: where the model is, for its peak memory.
        """
        peak, whose = peak_memory(device)
        lines = [
            f"{self.tokens} tokens for {self.prompts} prompts in {self.seconds:.2f} s on {device}",
            f"  images:    {self.images} encoded in {self.encode_seconds:.3f} s",
        ]
        if self.compile_seconds:
            lines.append(f"  compiling: {self.compile_seconds:.2f} s, in none of the rates below")
        if self.prefills:
            each = self.prefill_seconds / self.prefills
            lines.append(
                f"  prefill:   {self.prefill_seconds:.3f} s in all, {1000 * each:.1f} ms each; "
                f"{self.prompt_tokens} tokens of prompts"
            )
        if self.steps and self.decode_seconds:
            rate = self.bytes_read / self.decode_seconds
            lines += [
                f"  decoding:  {self.step_tokens / self.decode_seconds:.1f} tokens/s, "
                f"{self.steps} steps of {1000 * self.decode_seconds / self.steps:.2f} ms",
                f"  bandwidth: {_sized(rate)}/s; a step reads {_sized(self.bytes_read / self.steps)}: "
                "the decoder's weights as they are held, and all slots of the caches",
            ]
        return [*lines, f"  memory:    {_sized(peak)} at its peak, {whose}"]

    def time_images(self, number: int, device: torch.device, encode: Callable[[], Tensor]) -> Tensor:
        """Run an encoder on a number of images, and note what it took."""
        started = clock(device)
        features = encode()
        self.encode_seconds += clock(device) - started
        self.images += number
        return features


class TimedSession(Session):
    """A session that notes in a report what its phases took.

    Args:
        model: as for ``Session``.
        report: what is added to. Answers themselves are counted by who knows where they end.
        **options: as for ``Session``.
    """

    def __init__(self, model: nn.Module, *, report: Report, **options: Any) -> None:
        super().__init__(model, **options)
        self._report = report
        self._device = self._valid.device
        self._compiled = 0.0  # seconds of this answer's steps that compiled, and their number
        self._compiled_steps = 0
        self._read_at, self._read_length = 0.0, 0

    def answer(self, tokens: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """As ``Session.answer``."""
        self._compiled, self._compiled_steps = 0.0, 0
        result = super().answer(tokens, **options)
        steps = self.length - self._read_length - self._compiled_steps
        report = self._report
        report.decode_seconds += clock(self._device) - self._read_at - self._compiled
        report.compile_seconds += self._compiled
        report.steps += steps
        report.bytes_read += steps * step_bytes(self.model)
        report.prompt_tokens += int(left_padding(tokens, self.pad_id).sum())
        return result

    def count(self, answers: list[list[int]]) -> None:
        """Note the answers that the last call gave, one list of ids for each prompt."""
        self._report.prompts += len(answers)
        self._report.tokens += sum(map(len, answers))
        # The first token of a row is the prefill's, and those of steps that compiled have no time.
        first = 1 + self._compiled_steps
        self._report.step_tokens += sum(max(0, len(answer) - first) for answer in answers)

    def _read(self, *args: Any) -> Tensor:
        started, graphs = clock(self._device), _graphs()
        logits = super()._read(*args)
        self._read_at, self._read_length = clock(self._device), self.length
        if _graphs() != graphs:
            self._report.compile_seconds += self._read_at - started
        else:
            self._report.prefill_seconds += self._read_at - started
            self._report.prefills += 1
        return logits

    def _step(self, token: Tensor, counts: Tensor) -> Tensor:
        if not self.compile:
            return super()._step(token, counts)
        started, graphs = time.perf_counter(), _graphs()
        logits = super()._step(token, counts)
        if _graphs() != graphs:  # compiling keeps the host, so its clock is enough
            self._compiled += time.perf_counter() - started
            self._compiled_steps += 1
        return logits


def clock(device: torch.device) -> float:
    """Seconds, once a device has done all that it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def step_bytes(model: nn.Module) -> int:
    """Bytes that one step of decoding reads, with the model's caches set up.

    That is the decoder's parameters as they are held, fusion layers included, and keys and values of
    every slot of the caches. Not read are the embedding table, of which a step needs a row, unless the
    head is tied to it; what makes keys and values of features, once they are kept; layers for features
    where there are none; encoders and adapters. Without compilation quantized weights are widened at
    each step, which reads and writes more.
    """
    decoder: Any = getattr(unwrap(model), "decoder", model)
    inner: Any = unwrap(decoder)
    tied = getattr(inner.output, "tied_module", None) is not None
    unread: list[nn.Module | None] = [] if tied else [inner.tok_embeddings]
    total = 0
    for module in decoder.modules():
        if isinstance(module, FusionLayer) and not _reads_features(module.fusion_layer):
            unread.append(module.fusion_layer)
        cache = getattr(module, "kv_cache", None)
        if isinstance(cache, EncoderKVCache):
            unread += [getattr(module, name, None) for name in ("k_proj", "v_proj", "k_norm")]
        if cache is not None and getattr(cache, "is_filled", True):
            total += cache.k_cache.nbytes + cache.v_cache.nbytes
    skipped = {id(p) for module in unread if module is not None for p in module.parameters()}
    return total + sum(storage_nbytes(p) for p in decoder.parameters() if id(p) not in skipped)


def _reads_features(layer: nn.Module) -> bool:
    """Whether a layer's cache of features, if it has one, holds any."""
    return all(getattr(module, "is_filled", True) for module in layer.modules())


def peak_memory(device: torch.device) -> tuple[int, str]:
    """The most memory there was at once, and whose it is."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), f"allocated by tensors on {device}"
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used * (1 if sys.platform == "darwin" else 1024), "the whole process with its libraries"


def _graphs() -> int:
    """How many graphs this process has compiled."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _sized(number: float) -> str:
    """A number of bytes with three digits that count.

    Examples:
        >>> _sized(36_100_000), _sized(987)
        ('36.1 MB', '987 B')
    """
    power = 0
    while number >= 999.5 and power < len(_PREFIXES) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {_PREFIXES[power]}B"
