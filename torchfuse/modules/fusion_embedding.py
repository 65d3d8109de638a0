"""An embedding of new tokens, in a parameter separate from the pretrained table.

Training the new rows of one big table means masking the gradients of the old rows, which drift under
weight decay all the same and cannot be sharded. Here the pretrained table *is* the module (an
``nn.Embedding`` whose key is ``weight``, as before), and the new tokens are a second, small table
below it, ``fusion_embedding.weight``. No key is ever renamed, so no hook is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchfuse.errors import ModelError
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

__all__ = ["FusionEmbedding", "RowInit"]


class FusionEmbedding(nn.Embedding):
    """A pretrained embedding and a small trainable one for new tokens; a drop-in for ``nn.Embedding``.

    Ids in ``[0, vocab_size)`` look up the pretrained table ``weight``; ids in
    ``[vocab_size, vocab_size + fusion_vocab_size)`` look up ``fusion_embedding.weight``. Signature,
    attributes and key names are those of torchtune 0.6.1's ``FusionEmbedding``.

    The lookup has static shapes and never waits for the device, so it compiles to one graph and can
    be exported.

    Args:
        vocab_size: rows of the pretrained table.
        fusion_vocab_size: number of new tokens.
        embed_dim: width of both tables.
        device: device of both tables.
        dtype: dtype of both tables.

    Raises:
        ConfigError: if a size is not positive.

    Examples:
        >>> embedding = FusionEmbedding(vocab_size=11, fusion_vocab_size=2, embed_dim=3)
        >>> embedding(torch.tensor([[0, 10, 11, 12]])).shape
        torch.Size([1, 4, 3])
        >>> list(embedding.state_dict())
        ['weight', 'fusion_embedding.weight']
    """

    def __init__(
        self,
        vocab_size: int,
        fusion_vocab_size: int,
        embed_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(
            "FusionEmbedding",
            vocab_size=vocab_size,
            fusion_vocab_size=fusion_vocab_size,
            embed_dim=embed_dim,
        )
        super().__init__(vocab_size, embed_dim, device=device, dtype=dtype)
        self.fusion_embedding = nn.Embedding(fusion_vocab_size, embed_dim, device=device, dtype=dtype)
        self.dim = embed_dim
        self.num_embeddings = vocab_size + fusion_vocab_size

    @property
    def vocab_size(self) -> int:
        """Rows of the pretrained table."""
        return self.weight.shape[0]

    @property
    def fusion_vocab_size(self) -> int:
        """Number of new tokens."""
        return self.fusion_embedding.num_embeddings

    @property
    def embedding(self) -> nn.Embedding:
        """The pretrained table as a plain ``nn.Embedding`` that shares the parameter."""
        return _plain(self.weight, self.padding_idx, self.sparse)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # nn.Embedding's takes a bare tensor
        cls, embedding: nn.Embedding, num_new: int, init: RowInit = "mean"
    ) -> FusionEmbedding:
        """Add new tokens to a pretrained embedding, which keeps its parameter object.

        Args:
            embedding: the pretrained table, ``[v, d]``.
            num_new: number of new tokens.
            init: their first values. ``"mean"``: each row the mean of the pretrained rows.
                ``"normal"``: drawn per column with the mean and the deviation of the pretrained rows.
                A tensor ``[num_new, d]``: these values.

        Raises:
            ConfigError: if ``num_new`` is not positive, or ``init`` is an unknown name.
            ModelError: if ``init`` has another shape, or the embedding has what a second table would
                break (a forward of its own, ``max_norm``, ``scale_grad_by_freq``, hooks).

        Examples:
            >>> base = nn.Embedding(11, 3)
            >>> fused = FusionEmbedding.from_pretrained(base, 2)
            >>> fused.weight is base.weight
            True
            >>> torch.allclose(fused(torch.tensor(12)), base.weight.mean(0))
            True
        """
        check_num_new(num_new)
        _check_plain(embedding)
        rows = first_rows(embedding, num_new, init)
        vocab_size, embed_dim = embedding.weight.shape
        fused = cls(vocab_size, num_new, embed_dim, device="meta")
        fused.weight = embedding.weight
        fused.fusion_embedding.weight = nn.Parameter(rows["weight"])
        fused.padding_idx, fused.sparse = embedding.padding_idx, embedding.sparse
        return fused.train(embedding.training)

    def expand(self, num_new: int, init: RowInit = "mean") -> FusionEmbedding:
        """Append more new tokens in place.

        The new table becomes a new parameter, so build the optimizer afterwards.

        Args:
            num_new: number of tokens to add.
            init: as in ``from_pretrained``.

        Returns:
            The module itself.

        Raises:
            ConfigError: as in ``from_pretrained``.
            ModelError: as in ``from_pretrained``. In both cases nothing has changed.
        """
        append_rows(self, self.fusion_embedding, num_new, init)
        self.fusion_embedding.num_embeddings += num_new
        self.num_embeddings += num_new
        return self

    def new_rows_are_means(self) -> bool:
        """Whether every new row still is the mean of the pretrained rows, as ``init="mean"`` sets it."""
        return rows_are_means(self, self.fusion_embedding)

    def reset_new_rows(self, init: RowInit = "mean") -> None:
        """Reset the new rows to their first values, for example after the pretrained table was loaded.

        Args:
            init: as in ``from_pretrained``.

        Raises:
            ConfigError: as in ``from_pretrained``.
            ModelError: as in ``from_pretrained``. In both cases nothing has changed.
        """
        reset_rows(self, self.fusion_embedding, init)

    def merge(self) -> nn.Embedding:
        """Return one plain embedding of all tokens, old and new; this module stays as it is.

        Returns:
            An ``nn.Embedding`` with ``vocab_size + fusion_vocab_size`` rows in the pretrained
            table's dtype, trainable if either table was.
        """
        weight = merged_parameters(self, self.fusion_embedding)["weight"]
        return _plain(weight, self.padding_idx, self.sparse)

    def fusion_params(self) -> list[str]:
        """Return the names, relative to this module, of the parameters that fusion added."""
        return ["fusion_embedding.weight"]

    def forward(self, input: Tensor) -> Tensor:
        """Look up ids.

        Args:
            input: integer ids of any shape, in ``[0, vocab_size + fusion_vocab_size)``.

        Returns:
            Embeddings, ``[*input.shape, d]``, in the pretrained table's dtype.

        Raises:
            ModelError: for an id outside both tables, on the CPU. On an accelerator the check would
                wait for the device at every call, and a compiled or exported graph cannot raise it:
                there torch's own bounds assertion applies, as with ``nn.Embedding``.
        """
        if _ids_can_be_checked(input):
            self._check_ids(input)
        vocab_size = self.vocab_size
        # Each id is looked up in both tables, in the wrong one at a row that exists; `where` keeps one.
        pretrained = super().forward(input.clamp(max=vocab_size - 1))
        new = self.fusion_embedding((input - vocab_size).clamp(min=0)).to(pretrained.dtype)
        return torch.where((input >= vocab_size).unsqueeze(-1), new, pretrained)

    def extra_repr(self) -> str:
        return f"{self.vocab_size} + {self.fusion_vocab_size}, {self.embedding_dim}"

    def _check_ids(self, input: Tensor) -> None:
        if not input.numel():
            return
        low, high = (int(bound) for bound in torch.aminmax(input))
        if low < 0 or high >= self.num_embeddings:
            raise ModelError(
                f"Token ids must lie in [0, {self.num_embeddings}): {self.vocab_size} pretrained "
                f"tokens and {self.fusion_vocab_size} new ones. Got ids from {low} to {high}. Was the "
                "tokenizer given more special tokens than the model (fusion_vocab_size)?"
            )


def _ids_can_be_checked(input: Tensor) -> bool:
    """Whether reading the values needs no synchronisation and breaks no graph."""
    return input.device.type == "cpu" and type(input) is Tensor and not torch.compiler.is_compiling()


def _plain(weight: Tensor, padding_idx: int | None, sparse: bool) -> nn.Embedding:
    num_rows, embed_dim = weight.shape
    embedding = nn.Embedding(num_rows, embed_dim, padding_idx=padding_idx, sparse=sparse, device="meta")
    embedding.weight = weight
    return embedding


def _check_plain(embedding: nn.Embedding) -> None:
    if isinstance(embedding, FusionEmbedding):
        raise ModelError("This is a FusionEmbedding already; add tokens to it with expand(n).")
    if type(embedding).forward is not nn.Embedding.forward:
        raise ModelError(
            f"{type(embedding).__name__} has a forward of its own, which a second table beside it "
            "would bypass. Give the plain nn.Embedding."
        )
    problems = []
    if embedding.max_norm is not None:
        problems.append(f"max_norm={embedding.max_norm}")
    if embedding.scale_grad_by_freq:
        problems.append("scale_grad_by_freq=True")
    if embedding._forward_hooks or embedding._forward_pre_hooks:
        problems.append("forward hooks (is it sharded already? add tokens first)")
    if problems:
        raise ModelError(f"New tokens cannot be added beside an embedding with {', '.join(problems)}.")
