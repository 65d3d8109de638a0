"""One call from two pretrained parts to a fused model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import nn

from torchfuse.errors import ConfigError, ModelError
from torchfuse.models.base import FusedModel, refuse_fused
from torchfuse.models.encoding import encoder_names
from torchfuse.models.strategy import ModalityStrategy, build_modality_strategy
from torchfuse.models.types import UNNAMED, EncoderInput, OnMissing
from torchfuse.modules.adapters import build_adapter
from torchfuse.modules.fusion_embedding import FusionEmbedding
from torchfuse.modules.fusion_linear import FusionLinear, TiedFusionLinear
from torchfuse.modules.new_rows import RowInit
from torchfuse.naming import unwrap
from torchfuse.options import check_fields

__all__ = ["fuse"]

AdapterSpec = str | nn.Module | None


def fuse(
    decoder: nn.Module,
    encoder: nn.Module | Mapping[str, nn.Module],
    *,
    arch: str | ModalityStrategy = "cross_attention",
    adapter: AdapterSpec | Mapping[str, AdapterSpec] = "mlp_2layer",
    every: int | None = None,
    encoder_dim: int | Mapping[str, int] | None = None,
    fusion_vocab_size: int = 0,
    fusion_init: RowInit = "mean",
    fusion_head: bool = False,
    decoder_trainable: bool = False,
    encoder_trainable: bool | Mapping[str, bool] = False,
    fusion_trainable: bool = True,
    on_missing: OnMissing = "skip",
    example_input: EncoderInput | None = None,
    **arch_options: Any,
) -> FusedModel:
    """Fuse a pretrained encoder into a pretrained decoder.

    Decoder and encoder become submodules of the model: their parameters keep their names and values,
    and new modules are added on their device and in their dtype. Before its first step the model scores
    text exactly as the decoder did.

    Args:
        decoder: a torchtune ``TransformerDecoder``. Its layers and embeddings are wrapped in place.
        encoder: a module that returns features ``[b, n, d_e]``, or modules by name.
        arch: ``"cross_attention"``, ``"joint_decoder"``, ``"mot"``, ``"moma"``, ``"deepstack"`` or
            another registered name; or a strategy, which has its options already.
        adapter: the name of a registered one (see ``build_adapter``), a module, or None if the encoder
            already returns the decoder's width; by name for named encoders that differ.
        every: layer ``i`` is fused when ``(i + 1) % every == 0``; not beside ``layers=``, which names
            layers. None: 4 for ``"cross_attention"``, 1 for ``"mot"`` and ``"moma"``; for
            ``"deepstack"`` the first three layers, or all but the last if those are fewer.
            ``"joint_decoder"`` fuses no layer and takes none. With ``placement="prefix"`` hidden states
            of features after the last layer are unused: there ``"mot"`` has keys and values only, and
            ``"moma"`` and ``"deepstack"`` leave the layer out, and raise if no other is chosen.
        encoder_dim: width of the features. None: the encoder's ``feature_dim``, ``embed_dim`` or
            ``config.hidden_size``.
        fusion_vocab_size: number of new tokens, embedded beside the pretrained table.
        fusion_init: first values of their embeddings, see ``FusionEmbedding.from_pretrained``.
            ``"mean"`` is computed again when ``load_pretrained`` fills the table later; ``"normal"`` is
            drawn from the table as it is now.
        fusion_head: whether the head scores the new tokens too, as ids after the pretrained ones. A
            tied head scores with the embedding's new rows; any other gets new rows of its own, which
            start by ``fusion_init`` if that is a name, else as means.
        decoder_trainable: whether the pretrained decoder trains.
        encoder_trainable: whether the encoders train; also ``{name: bool}``.
        fusion_trainable: whether fusion parameters train.
        on_missing: ``"skip"`` or ``"participate"``, see ``FusedModel``.
        example_input: see ``FusedModel``.
        **arch_options: the architecture's own, see ``CrossAttentionStrategy``,
            ``JointDecoderStrategy`` (``placement=``, ``encoder_token=``), ``MoTStrategy``,
            ``MoMaStrategy`` and ``DeepStackStrategy``.

    Returns:
        A ``DeepFusionModel``, ``EarlyFusionModel`` or ``MixtureFusionModel``, or the model class of
        another architecture.

    Raises:
        ConfigError: for an unknown name or option, or a value out of its range.
        ModelError: if the parts do not fit each other; decoder and encoder are unchanged in any case.

    Examples:
        >>> from torch import nn
        >>> from torchtune.models.llama3_2 import llama3_2
        >>> decoder = llama3_2(
        ...     vocab_size=11, num_layers=2, num_heads=3, num_kv_heads=1, embed_dim=12, max_seq_len=7
        ... )
        >>> model = fuse(decoder, nn.Linear(5, 5), every=2, encoder_dim=5)
        >>> tokens, features = torch.tensor([[1, 2, 3]]), {"input": torch.randn(1, 4, 5)}
        >>> model(tokens, encoder_input=features).shape
        torch.Size([1, 3, 11])
    """
    embedding = _token_embedding(decoder)
    refuse_fused(decoder)
    strategy = _strategy(arch, arch_options)
    encoders = _encoders(encoder)
    names = encoder_names(encoder)
    strategy.check_encoders(names)
    specs = _by_name(adapter, encoders, "adapter")
    widths = _by_name(encoder_dim, encoders, "encoder_dim")
    adapters = {
        name: _adapter(specs[name], name, encoders[name], widths[name], embedding) for name in encoders
    }
    if len({spec is None for spec in adapters.values()}) > 1:
        raise ConfigError("Give an adapter to all encoders or to none; nn.Identity() does nothing.")
    put_layers_in_place = strategy.plan(decoder, names, every=every)
    fused_embedding = None
    if fusion_vocab_size:
        fused_embedding = FusionEmbedding.from_pretrained(embedding, fusion_vocab_size, fusion_init)
    head = getattr(decoder, "output", None)
    fused_head = _fused_head(head, embedding, fused_embedding, fusion_init) if fusion_head else None

    given_adapters: Any = adapters if _is_named(encoder) else adapters[UNNAMED]
    if all(a is None for a in adapters.values()):
        given_adapters = None
    layers: Any = decoder.layers
    children = [(module, dict(module._modules)) for module in (decoder, layers)]
    try:
        put_layers_in_place()
        if fused_embedding is not None:
            _replace_embedding(decoder, embedding, fused_embedding)
        if fused_head is not None:
            decoder.output = fused_head  # type: ignore[assignment]
        model: FusedModel = (strategy.model_class or FusedModel).build(
            decoder,
            encoder,
            strategy=strategy,
            adapter=given_adapters,
            decoder_trainable=decoder_trainable,
            encoder_trainable=encoder_trainable,
            fusion_trainable=fusion_trainable,
            on_missing=on_missing,
            example_input=example_input,
        )
        return model
    except BaseException:
        for module, before in children:
            module._modules.update(before)
        if fused_head is not None:
            decoder.output = head  # type: ignore[assignment]
        if fused_embedding is not None:
            _replace_embedding(decoder, fused_embedding, embedding)
        raise


def _is_named(encoder: Any) -> bool:
    return isinstance(encoder, Mapping | nn.ModuleDict)


def _encoders(given: Any) -> dict[str, nn.Module]:
    encoders = dict(given.items()) if _is_named(given) else {UNNAMED: given}
    if wrong := [value for value in encoders.values() if not isinstance(value, nn.Module)]:
        raise ModelError(
            "encoder must be a module that returns features [b, n, d_e], or a mapping of names to such "
            f"modules; got {', '.join(map(repr, wrong))}."
        )
    return encoders


def _strategy(arch: str | ModalityStrategy, options: Mapping[str, Any]) -> ModalityStrategy:
    if not isinstance(arch, ModalityStrategy):
        return build_modality_strategy(arch, **options)
    if options:
        raise ConfigError(
            f"{', '.join(options)} cannot be given beside a {type(arch).__name__}, which has its "
            "options already; the name of an architecture takes them."
        )
    given: Any = arch
    if is_dataclass(given):
        check_fields(given, type(arch).__name__)
    return arch


def _token_embedding(decoder: nn.Module) -> nn.Embedding:
    embedding = getattr(decoder, "tok_embeddings", None)
    if not isinstance(embedding, nn.Embedding) or not isinstance(
        getattr(decoder, "layers", None), nn.ModuleList
    ):
        raise ModelError(
            "fuse needs a decoder with tok_embeddings (an nn.Embedding) and layers (an "
            f"nn.ModuleList), as torchtune's TransformerDecoder has; got a {type(decoder).__name__}."
        )
    if any(getattr(module, "kv_cache", None) is not None for module in decoder.modules()):
        raise ModelError(
            "The decoder has caches, and new layers would have none. Remove them first "
            "(torchtune.modules.delete_kv_caches), fuse, and set them up on the fused model."
        )
    return embedding


def _by_name(given: Any, encoders: Mapping[str, nn.Module], what: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        return dict.fromkeys(encoders, given)
    if given.keys() != encoders.keys():
        raise ConfigError(
            f"{what} must have the names of the encoders, {', '.join(encoders)}; got "
            f"{', '.join(map(str, given))}."
        )
    return dict(given)


def _adapter(
    spec: AdapterSpec,
    name: str,
    encoder: nn.Module,
    encoder_dim: int | None,
    embedding: nn.Embedding,
) -> nn.Module | None:
    if spec is None:
        return None
    weight = embedding.weight
    width = encoder_dim if encoder_dim is not None else _feature_dim(encoder)
    if isinstance(spec, nn.Module):
        _check_widths(spec, name, width, embedding.embedding_dim)
        return spec
    if width is None:
        raise ConfigError(
            f"The width of the features of {name!r} is not known: {type(encoder).__name__} has no "
            "feature_dim, embed_dim or config.hidden_size. Pass encoder_dim=."
        )
    with weight.device:
        num_tokens = getattr(encoder, "num_tokens", None)
        adapter = build_adapter(spec, width, embedding.embedding_dim, num_tokens=num_tokens)
        return adapter.to(_floating(weight))


def _check_widths(adapter: nn.Module, name: str, encoder_dim: int | None, embed_dim: int) -> None:
    expected = {"in_dim": ("the encoder's features", encoder_dim), "out_dim": ("the decoder", embed_dim)}
    own = {side: getattr(unwrap(adapter), side, None) for side in expected}
    problems = [
        f"its {side} is {own[side]}, the width of {part} {width}"
        for side, (part, width) in expected.items()
        if isinstance(own[side], int) and width is not None and own[side] != width
    ]
    if problems:
        raise ModelError(
            f"The adapter of {name!r} ({type(adapter).__name__}) does not fit: {'; '.join(problems)}."
        )


def _feature_dim(encoder: nn.Module) -> int | None:
    for holder, attribute in ((encoder, "feature_dim"), (encoder, "embed_dim")):
        if isinstance(getattr(holder, attribute, None), int):
            return int(getattr(holder, attribute))
    width = getattr(getattr(encoder, "config", None), "hidden_size", None)
    return width if isinstance(width, int) else None


def _floating(weight: torch.Tensor) -> torch.dtype:
    return weight.dtype if weight.is_floating_point() else torch.get_default_dtype()


def _replace_embedding(decoder: nn.Module, old: nn.Embedding, new: nn.Embedding) -> None:
    decoder.tok_embeddings = new
    # torchtune's TiedLinear is no module: it holds the embedding and reads its weight at each call.
    head = getattr(decoder, "output", None)
    if getattr(head, "tied_module", None) is old:
        head.tied_module = new  # type: ignore[union-attr]


def _fused_head(
    head: Any, embedding: nn.Embedding, fused: FusionEmbedding | None, init: RowInit
) -> FusionLinear | TiedFusionLinear:
    """Build a head that scores the new tokens too, from the decoder's head."""
    from torchtune.modules import TiedLinear

    if fused is None:
        raise ConfigError(
            "fusion_head scores new tokens, of which there are none: give fusion_vocab_size."
        )
    if type(head) is TiedLinear and head.tied_module is embedding:
        return TiedFusionLinear(fused)
    if not isinstance(head, nn.Linear) or head.weight is embedding.weight:
        raise ModelError(
            "fusion_head needs a decoder whose output is an nn.Linear with a weight of its own, or "
            f"torchtune's TiedLinear over tok_embeddings; got a {type(head).__name__}."
        )
    if head.weight.shape[0] != fused.vocab_size:
        raise ModelError(
            f"fusion_head scores new tokens at their ids, but the head scores {head.weight.shape[0]} "
            f"tokens and the embedding has {fused.vocab_size}. Cut or pad one of them first."
        )
    return FusionLinear.from_pretrained(
        head, fused.fusion_vocab_size, "mean" if isinstance(init, torch.Tensor) else init
    )
