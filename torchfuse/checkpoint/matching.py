"""Which tensor of a checkpoint goes into which tensor of a module, and all that does not fit.

Every pretrained tensor must be in the checkpoint exactly once, in its shape, and nothing else may be in
it; settings that no shape shows (heads, rotary base, epsilons) must agree with the checkpoint's own
configuration. Nothing is written before all of this holds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchfuse.checkpoint.formats.key_table import KeyTable, Layout
from torchfuse.checkpoint.formats.registry import find_format, formats_of, read_spec
from torchfuse.checkpoint.formats.spec import Spec
from torchfuse.checkpoint.tensors import module_tensors
from torchfuse.errors import CheckpointError
from torchfuse.io.directory import Checkpoint
from torchfuse.naming import canonical_name, unwrap
from torchfuse.params import quantized_dtype

__all__ = ["Source", "match_model", "match_parts"]


@dataclass(frozen=True)
class Source:
    """Where the values of one tensor of a module come from.

    Attributes:
        name: the tensor's name in the module.
        target: the tensor.
        checkpoint: where its values are.
        key: their name in the checkpoint.
        layout: how they are laid out in the checkpoint.
        rows: which rows of the checkpoint's tensor; None: all.
    """

    name: str
    target: Tensor
    checkpoint: Checkpoint
    key: str
    layout: Layout | None
    rows: slice | None = None

    def read(self) -> Tensor:
        """Return the values in the module's layout, maybe with the first axis unflattened."""
        return self._to_target(self.checkpoint.read(self.key))

    def _to_target(self, tensor: Tensor) -> Tensor:
        tensor = tensor if self.rows is None else tensor[self.rows]
        return tensor if self.layout is None else self.layout.to_target(tensor)

    def problems(self) -> list[str]:
        """List the reasons why the values do not fit the tensor."""
        shape, dtype = self.checkpoint[self.key], self.checkpoint.dtype(self.key)
        try:
            values = self._to_target(torch.empty(shape, dtype=dtype, device="meta"))
            if self.layout is not None:
                values = values.flatten(0, max(0, values.dim() - self.target.dim()))
            fits = values.shape == self.target.shape
        except (RuntimeError, IndexError, ValueError):
            fits = False
        problems = []
        if not fits:
            problems.append(
                f"shape: {self.key} is {list(shape)}, {self.name} is {list(self.target.shape)}"
            )
        if dtype.is_floating_point != self.target.dtype.is_floating_point:
            problems.append(f"dtype: {self.key} is {dtype}, {self.name} is {self.target.dtype}")
        return problems


def match_model(model: nn.Module, checkpoint: Checkpoint, spec: Spec) -> list[Source]:
    """Match a whole model with its checkpoint.

    Args:
        model: a fused model.
        checkpoint: a checkpoint of a whole model.
        spec: the settings in the checkpoint.

    Raises:
        CheckpointError: with all that does not fit.
    """
    config = checkpoint.config
    tied = any(c.get("tie_word_embeddings") for c in (config, config.get("text_config") or {}))
    targets = {canonical_name(name): t for name, t in module_tensors(unwrap(model)).items()}
    try:
        own = type(spec).from_module(model)
        sources, problems = _match_tensors(targets, checkpoint, own.key_table(), tied=tied)
        problems += [f"config.json: {problem}" for problem in spec.differences(own)]
    except ValueError as error:
        sources, problems = [], [str(error)]
    _raise_problems({str(checkpoint.path): problems})
    return sources


def match_parts(
    parts: Mapping[str, tuple[nn.Module, Checkpoint]], added: Collection[int] = ()
) -> list[Source]:
    """Match parts of a model, each with its own checkpoint.

    Args:
        parts: modules and checkpoints; the key is ``"decoder"`` for a decoder.
        added: tensors that fusion added to the parts, by ``id``.

    Raises:
        CheckpointError: with all that does not fit in any part.
    """
    matched, problems = [], {}
    for name, (module, checkpoint) in parts.items():
        formats = formats_of("decoder" if name == "decoder" else "encoder")
        sources, found = _match_part(unwrap(module), checkpoint, formats, added)
        matched += sources
        problems[f"{name} from {checkpoint.path}"] = found
    _raise_problems(problems)
    return matched


def _match_part(
    module: nn.Module, checkpoint: Checkpoint, formats: Sequence[type[Spec]], added: Collection[int]
) -> tuple[list[Source], list[str]]:
    try:
        format_ = find_format(module, formats)
        spec, own = read_spec(checkpoint.config, (format_,)), format_.from_module(module)
        prefix = own.key_prefix(checkpoint)
    except ValueError as error:
        return [], [str(error)]
    tied = bool(checkpoint.config.get("tie_word_embeddings"))
    targets = {canonical_name(n): t for n, t in module_tensors(module).items() if id(t) not in added}
    sources, problems = _match_tensors(targets, checkpoint, own.key_table(), tied=tied, prefix=prefix)
    return sources, problems + [f"config.json: {problem}" for problem in spec.differences(own)]


def _raise_problems(problems: Mapping[str, Sequence[str]]) -> None:
    sections = ["\n  ".join([f"{what}:", *found]) for what, found in problems.items() if found]
    if sections:
        raise CheckpointError("\n".join(["Nothing was loaded, because not everything fits.", *sections]))


def _match_tensors(
    targets: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    table: KeyTable,
    *,
    tied: bool,
    prefix: str = "",
) -> tuple[list[Source], list[str]]:
    """Match tensors with those of a checkpoint.

    Args:
        targets: the tensors to fill, by target key.
        checkpoint: the checkpoint.
        table: its keys and the module's.
        tied: whether the checkpoint's configuration ties the head to the embedding.
        prefix: keys that do not begin with this belong to another part.

    Returns:
        Where each tensor comes from, and all that does not fit.
    """
    keys = [key for key in checkpoint if key.startswith(prefix)]
    found, unknown = (table.with_prefix(prefix, "") if prefix else table).to_targets(keys)
    problems = [f"unexpected: {key}" for key in unknown]
    for name, origin in table.tied.items():
        if origin not in found:
            continue
        if name in targets and name not in found and tied:
            found[name] = found[origin]  # one tensor in the checkpoint, two in the module
        elif name not in targets and name in found:  # two in the checkpoint, one in the module
            key, other = found.pop(name)[0], found[origin][0]
            same_shape = checkpoint[key] == checkpoint[other]
            if not same_shape or not torch.equal(checkpoint.read(key), checkpoint.read(other)):
                problems.append(f"unexpected: {key}")
    matched = {
        name: Source(name, target, checkpoint, *found[name])
        for name, target in targets.items()
        if name in found
    }
    matched |= _appended_rows(matched, targets, table)
    problems += [f"unexpected: {key}" for name, (key, _) in found.items() if name not in targets]
    problems += [f"missing: {name}" for name in targets if name not in matched]
    problems += [
        f"quantized: {n}; load before quantize" for n, t in targets.items() if quantized_dtype(t)
    ]
    sources = list(matched.values())
    return sources, problems + [problem for source in sources for problem in source.problems()]


def _appended_rows(
    matched: Mapping[str, Source], targets: Mapping[str, Tensor], table: KeyTable
) -> dict[str, Source]:
    """Split tensors of the checkpoint whose last rows are a tensor of its own in the module."""
    split = {}
    for name, origin in table.appended.items():
        if name not in targets or name in matched or origin not in matched:
            continue
        base, new, rest = matched[origin], targets[name].shape[0], targets[name].shape[1:]
        old = targets[origin].shape[0]
        checkpoint, key = base.checkpoint, base.key
        if checkpoint[key] == (old + new, *rest):
            split[origin] = Source(origin, base.target, checkpoint, key, None, slice(0, old))
            split[name] = Source(name, targets[name], checkpoint, key, None, slice(old, old + new))
    return split
