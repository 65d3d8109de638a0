"""An output head for new tokens, in parameters separate from those of the pretrained head.

The counterpart of ``FusionEmbedding``: the pretrained head *is* the module (an ``nn.Linear`` with the
keys ``weight`` and ``bias``, as before), and the rows of the new tokens are a second, small head below
it, ``fusion_linear.weight``. The logits of both are concatenated, so the pretrained tokens' logits are
bit-identical, and the two tables are never copied together.

A head that is tied to the embedding has no parameters: ``TiedFusionLinear`` reads both tables of a
``FusionEmbedding`` at each call.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchfuse.errors import ModelError
from torchfuse.modules.fusion_embedding import FusionEmbedding
from torchfuse.modules.new_rows import (
    RowInit,
    append_rows,
    check_num_new,
    check_sizes,
    first_rows,
    merged_parameters,
    reset_rows,
    rows_are_means,
)

__all__ = ["FusionLinear", "TiedFusionLinear"]


class FusionLinear(nn.Linear):
    """A pretrained output head and a small trainable one for new tokens; a drop-in for ``nn.Linear``.

    Logits of the pretrained tokens come first, from ``weight`` ``[v, d]``, then those of the new ones,
    from ``fusion_linear.weight`` ``[n, d]``. ``out_features`` is the width of the logits,
    ``vocab_size + fusion_vocab_size``.

    Args:
        embed_dim: width of the input.
        vocab_size: rows of the pretrained head.
        fusion_vocab_size: number of new tokens.
        bias: whether both heads have a bias.
        device: device of both heads.
        dtype: dtype of both heads.

    Raises:
        ConfigError: if a size is not positive.

    Examples:
        >>> head = FusionLinear(embed_dim=3, vocab_size=11, fusion_vocab_size=2)
        >>> head(torch.randn(1, 5, 3)).shape
        torch.Size([1, 5, 13])
        >>> list(head.state_dict())
        ['weight', 'fusion_linear.weight']
    """

    extends_linear: ClassVar[bool] = True
    """Whether ``weight`` is used by the forward of ``nn.Linear`` alone, and so can be quantized."""

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        fusion_vocab_size: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(
            "FusionLinear",
            embed_dim=embed_dim,
            vocab_size=vocab_size,
            fusion_vocab_size=fusion_vocab_size,
        )
        super().__init__(embed_dim, vocab_size, bias=bias, device=device, dtype=dtype)
        self.fusion_linear = nn.Linear(
            embed_dim, fusion_vocab_size, bias=bias, device=device, dtype=dtype
        )
        self.out_features = vocab_size + fusion_vocab_size

    @property
    def vocab_size(self) -> int:
        """Rows of the pretrained head."""
        return self.weight.shape[0]

    @property
    def fusion_vocab_size(self) -> int:
        """Number of new tokens."""
        return self.fusion_linear.out_features

    @classmethod
    def from_pretrained(cls, linear: nn.Linear, num_new: int, init: RowInit = "mean") -> FusionLinear:
        """Add new tokens to a pretrained head, which keeps its parameter objects.

        Args:
            linear: the pretrained head, ``[v, d]``, with or without bias.
            num_new: number of new tokens.
            init: first values of their rows. ``"mean"``: each the mean of the pretrained rows, so that a
                new token's logit is the mean of the pretrained logits. ``"normal"``: drawn per column
                with the mean and the deviation of the pretrained rows. A tensor ``[num_new, d]``: these
                values. A bias is initialized likewise; with given rows it is the mean.

        Raises:
            ConfigError: if ``num_new`` is not positive, or ``init`` is an unknown name.
            ModelError: if ``init`` has another shape, or the head has what a second one would break (a
                forward of its own, hooks, a weight that is sharded, quantized or computed).

        Examples:
            >>> base = nn.Linear(3, 11)
            >>> fused = FusionLinear.from_pretrained(base, 2)
            >>> fused.weight is base.weight
            True
            >>> x = torch.randn(3)
            >>> torch.allclose(fused(x)[-1], base(x).mean(), atol=1e-6)
            True
        """
        check_num_new(num_new)
        _check_plain(linear)
        rows = first_rows(linear, num_new, init)
        vocab_size, embed_dim = linear.weight.shape
        fused = cls(embed_dim, vocab_size, num_new, bias="bias" in rows, device="meta")
        fused.weight, fused.bias = linear.weight, linear.bias
        for name, values in rows.items():
            setattr(fused.fusion_linear, name, nn.Parameter(values))
        return fused.train(linear.training)

    def expand(self, num_new: int, init: RowInit = "mean") -> FusionLinear:
        """Append more new tokens in place.

        The new rows become a new parameter, so build the optimizer afterwards.

        Args:
            num_new: number of tokens to add.
            init: as in ``from_pretrained``.

        Returns:
            The module itself.

        Raises:
            ConfigError: as in ``from_pretrained``.
            ModelError: as in ``from_pretrained``. In both cases nothing has changed.
        """
        append_rows(self, self.fusion_linear, num_new, init)
        self.fusion_linear.out_features += num_new
        self.out_features += num_new
        return self

    def new_rows_are_means(self) -> bool:
        """Whether every new row still is the mean of the pretrained rows, as ``init="mean"`` sets it."""
        return rows_are_means(self, self.fusion_linear)

    def reset_new_rows(self, init: RowInit = "mean") -> None:
        """Reset the new rows to their first values, for example after the pretrained head was loaded.

        Args:
            init: as in ``from_pretrained``.

        Raises:
            ConfigError: as in ``from_pretrained``.
            ModelError: as in ``from_pretrained``. In both cases nothing has changed.
        """
        reset_rows(self, self.fusion_linear, init)

    def merge(self) -> nn.Linear:
        """Return one plain head of all tokens, old and new; this module stays as it is.

        Returns:
            An ``nn.Linear`` with ``vocab_size + fusion_vocab_size`` rows in the pretrained head's dtype,
            trainable where either head was.
        """
        merged = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        for name, parameter in merged_parameters(self, self.fusion_linear).items():
            setattr(merged, name, parameter)
        return merged.train(self.training)

    def fusion_params(self) -> list[str]:
        """Return the names, relative to this module, of the parameters that fusion added."""
        return [f"fusion_linear.{name}" for name, _ in self.fusion_linear.named_parameters()]

    def forward(self, input: Tensor) -> Tensor:
        """Score tokens.

        Args:
            input: hidden states, ``[.., d]``.

        Returns:
            Logits, ``[.., vocab_size + fusion_vocab_size]``, in the pretrained head's dtype.
        """
        pretrained = super().forward(input)
        new = self.fusion_linear(input.to(self.fusion_linear.weight.dtype))
        return torch.cat([pretrained, new.to(pretrained.dtype)], dim=-1)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.vocab_size} + {self.fusion_vocab_size}"


class TiedFusionLinear:
    """An output head that scores with both tables of a ``FusionEmbedding`` and owns no parameter.

    The counterpart of torchtune's ``TiedLinear``, and like it no ``nn.Module``: it holds the embedding,
    under which both tables are registered once, and reads them at each call. So it follows tables that
    are replaced, sharded, copied or pickled together with the model.

    Args:
        tied_module: the embedding.

    Raises:
        ModelError: if it is no ``FusionEmbedding``.

    Examples:
        >>> embedding = FusionEmbedding(vocab_size=11, fusion_vocab_size=2, embed_dim=3)
        >>> TiedFusionLinear(embedding)(torch.randn(1, 5, 3)).shape
        torch.Size([1, 5, 13])
    """

    def __init__(self, tied_module: FusionEmbedding) -> None:
        if not isinstance(tied_module, FusionEmbedding):
            raise ModelError(
                "TiedFusionLinear needs a FusionEmbedding, whose tables it scores with; got a "
                f"{type(tied_module).__name__}. FusionEmbedding.from_pretrained makes one."
            )
        self.tied_module = tied_module

    @property
    def out_features(self) -> int:
        """Number of tokens that are scored."""
        return self.tied_module.num_embeddings

    def __call__(self, input: Tensor) -> Tensor:
        """Score tokens.

        Args:
            input: hidden states, ``[.., d]``.

        Returns:
            Logits, ``[.., vocab_size + fusion_vocab_size]``, in the pretrained table's dtype.
        """
        rows = self.tied_module.fusion_embedding.weight
        pretrained = F.linear(input, self.tied_module.weight)
        new = F.linear(input.to(rows.dtype), rows)
        return torch.cat([pretrained, new.to(pretrained.dtype)], dim=-1)


def _check_plain(linear: nn.Module) -> None:
    if isinstance(linear, FusionLinear):
        raise ModelError("This is a FusionLinear already; add tokens to it with expand(n).")
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        raise ModelError(
            f"{type(linear).__name__} has a forward of its own, which new rows beside it would bypass. "
            "Give a plain nn.Linear."
        )
    problems = []
    if type(linear.weight) is not nn.Parameter:
        kind = type(linear.weight).__name__
        problems.append(f"a {kind} as weight (is it sharded or quantized already? add tokens first)")
    if linear._forward_hooks or linear._forward_pre_hooks:
        problems.append("forward hooks, which would be lost")
    if problems:
        raise ModelError(f"New tokens cannot be added beside a head with {', '.join(problems)}.")
