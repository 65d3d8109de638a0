"""Foreign names and ours, as a table; one converter for all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

__all__ = ["Format", "Match", "Rule"]

# What a tensor goes through on its way in, given the module it is for and the tensor's name there.
Transform = Callable[[Tensor, nn.Module, str], Tensor]


@dataclass(frozen=True)
class Rule:
    r"""One kind of foreign key.

    Attributes:
        pattern: regular expression that the whole key must match.
        target: our name, with ``\1`` for groups. None: a known key that is of no use to us.
        transform: what the tensor goes through. It must not change the shape.
    """

    pattern: str
    target: str | None
    transform: Transform | None = None


@dataclass(frozen=True)
class Match:
    """Where one of our tensors comes from."""

    source: str
    transform: Transform | None


@dataclass(frozen=True)
class Format:
    """How one kind of checkpoint names things, and how its configuration reads.

    Attributes:
        name: what people call the format.
        rules: at most one of them matches a key.
        tied: our names that may be taken from another of our names where a checkpoint ties them.
        check_config: finds what the checkpoint's configuration says and the module does otherwise,
            in sentences.
    """

    name: str
    rules: Sequence[Rule]
    tied: Mapping[str, str] = field(default_factory=dict)
    check_config: Callable[[Mapping[str, Any], nn.Module], list[str]] = lambda config, module: []

    def translate(self, keys: Iterable[str]) -> tuple[dict[str, Match], list[str]]:
        """Translate foreign keys.

        Returns:
            For each of our names where it comes from, and the keys that no rule knows (a second key
            for the same name among them).
        """
        matches: dict[str, Match] = {}
        unknown = []
        for key in keys:
            for rule in self.rules:
                found = re.fullmatch(rule.pattern, key)
                if found is None:
                    continue
                if rule.target is not None:
                    target = found.expand(rule.target)
                    if target in matches:
                        unknown.append(key)
                    else:
                        matches[target] = Match(key, rule.transform)
                break
            else:
                unknown.append(key)
        return matches, unknown
