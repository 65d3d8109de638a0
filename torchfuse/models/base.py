"""The fused model, called as a ``TransformerDecoder`` is.

Architectures differ in their strategies alone: a strategy turns a call into a ``ModalityContext``, and
the decoder runs on that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchfuse.errors import ConfigError, ModelError
from torchfuse.models.documents import check_document_ids
from torchfuse.models.encoding import EncoderOwner, encoder_names
from torchfuse.models.minimal_decoder import accept_embeddings, is_minimal
from torchfuse.models.strategy import (
    ImageFormat,
    ModalityStrategy,
    features_per_image,
    join_formats,
)
from torchfuse.models.surface import DecoderSurface
from torchfuse.models.types import UNNAMED, EncoderInput, EncoderMask, ModalityContext, OnMissing
from torchfuse.modules.documents import document_mask, document_positions
from torchfuse.naming import ModelWithParts, unwrap, unwrap_model
from torchfuse.params import get_fusion_params, register_fusion_module, set_trainable

__all__ = ["FusedModel", "refuse_fused"]


class FusedModel(DecoderSurface, EncoderOwner, ModelWithParts):
    """A pretrained decoder, pretrained encoders and what connects them.

    Keys of the state dict: ``decoder.<its own>``, ``encoder.<its own>`` and ``adapter.<its own>``, or
    ``encoders.<name>.<its own>`` and ``adapters.<name>.<its own>`` when encoders are given by name.

    Args:
        decoder: a ``TransformerDecoder``, with the fusion layers that the strategy needs.
        encoder: one module, or modules by name. An encoder returns features ``[b, n, d_e]``.
        strategy: how features reach the decoder.
        adapter: maps features to the decoder's width, one for each encoder. None: the encoder does. Its
            parameters are fusion parameters, unless it has ``fusion_params()`` of its own.
        decoder_trainable: whether the pretrained decoder trains.
        encoder_trainable: whether the encoders train; also ``{name: bool}``.
        fusion_trainable: whether fusion parameters train.
        on_missing: what happens to an encoder, and the layers that use it, in a batch without input for
            it. ``"skip"``: they do not run. ``"participate"``: they run on a stand-in that adds exactly
            zero, forward and backward, so that under data parallelism every rank runs the same
            parameters. Calls with caches skip.
        example_input: the stand-in's keywords for the encoder (``{name: keywords}`` by name), of the
            smallest size that it accepts. None: the result of its ``example_input()``.

    Raises:
        ModelError: if names do not agree, ``"participate"`` has no example input, the decoder is a
            fused model already, or its layers are not those that the strategy needs.
    """

    own_attributes: ClassVar[frozenset[str]] = frozenset(
        "strategy encoder encoders adapter adapters on_missing example_input "
        "encoder_tokens strict".split()
    )
    strict: bool = True
    """Whether features without a placeholder in the text are an error."""

    def __init__(
        self,
        decoder: nn.Module,
        encoder: nn.Module | Mapping[str, nn.Module],
        *,
        strategy: ModalityStrategy,
        adapter: nn.Module | Mapping[str, nn.Module] | None = None,
        decoder_trainable: bool = False,
        encoder_trainable: bool | Mapping[str, bool] = False,
        fusion_trainable: bool = True,
        on_missing: OnMissing = "skip",
        example_input: EncoderInput | None = None,
    ) -> None:
        super().__init__()
        refuse_fused(decoder)
        strategy.check_decoder(decoder, encoder_names(encoder))
        self.decoder = decoder
        self._own_encoders(encoder, adapter, on_missing, example_input)
        strategy.check_encoders(self.encoder_names)
        self.strategy = strategy
        adapters = [self.get_adapter(name) for name in self.encoder_names]
        unmarked = [a for a in adapters if a is not None and not hasattr(a, "fusion_params")]
        for module in unmarked:
            register_fusion_module(module)
        try:
            set_trainable(
                self,
                decoder=decoder_trainable,
                encoder=encoder_trainable,
                # A model without any fusion parameter is allowed.
                fusion=fusion_trainable and bool(get_fusion_params(self)),
            )
        except BaseException:
            for module in unmarked:
                del module.fusion_params
            raise
        if is_minimal(decoder):
            accept_embeddings(decoder)

    @classmethod
    def build(
        cls,
        decoder: nn.Module,
        encoder: nn.Module | Mapping[str, nn.Module],
        *,
        strategy: Any,
        **options: Any,
    ) -> FusedModel:
        """Build the model for ``fuse``; a class with other arguments than these overrides it."""
        return cls(decoder, encoder, strategy=strategy, **options)

    @property
    def _caches_features(self) -> bool:  # type: ignore[override]
        return self.strategy.caches_features

    def parts(self) -> dict[str, nn.Module]:
        """Return the pretrained parts: ``"decoder"``, and ``"encoder"`` or ``"encoder.<name>"``."""
        return {"decoder": self.decoder, **self.encoder_parts()}

    def adapter_params(self) -> list[str]:
        """Return the names of the parameters that train; torchtune's LoRA recipes freeze all others."""
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def image_format(self) -> ImageFormat:
        """Return how images and other media are represented in this model's sequences."""
        formats = {name: self._image_format(name) for name in self.encoder_names}
        return join_formats(formats) if self._named else formats[UNNAMED]

    def _image_format(self, name: str) -> ImageFormat:
        try:
            features = features_per_image(self, name, one_tile=True)
        except ConfigError:  # unknown until the encoder runs
            features = None
        if self.strategy.extra_tokens(1):
            return ImageFormat("prefix", None, features)
        if (placeholder := self.strategy.placeholder(name)) is not None:
            return ImageFormat("placeholder", placeholder, features)
        table: Any = self.tok_embeddings
        token = table.vocab_size if getattr(table, "fusion_vocab_size", 0) else None
        tiled = hasattr(unwrap(self.get_encoder(name)), "tokens_per_tile")
        return ImageFormat("marker", token, features, "group" if tiled else "all")

    def train(self, mode: bool = True) -> FusedModel:
        """Set the mode as ``nn.Module.train`` does, but keep fully frozen modules in ``eval``."""
        super().train(mode)
        if mode:
            for child in self.children():
                _evaluate_frozen(child)
            for encoder in self.encoder_parts().values():  # including one without parameters
                if not any(p.requires_grad for p in encoder.parameters()):
                    encoder.eval()
        return self

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        encoder_input: EncoderInput | None = None,
        encoder_mask: EncoderMask | None = None,
        input_pos: Tensor | None = None,
        encoder_embeds: Tensor | Mapping[str, Tensor] | None = None,
        document_ids: Tensor | None = None,
    ) -> Any:
        """Score tokens, given inputs of the encoders.

        Args:
            tokens: ids, ``[b, s]``.
            mask: bool ``[b, s, s]`` (with caches ``[b, s, slots]``), True where a token may attend to
                another. None: causal. Needed with caches.
            encoder_input: keywords of the encoder; ``{name: keywords}`` when encoders have names, where
                a name may be left out. ``encoder_output``: see ``encode``. None: a batch of text, or a
                step whose features are cached.
            encoder_mask: which features count: bool ``[b, s, n]``, True where text position ``s`` may
                attend to feature ``n``, or ``[b, n]``, True where feature ``n`` belongs to the row. Over
                the features of all encoders in their order, or by name. None: all count; in a step
                whose features are cached, those that the last token of the call before may attend to.
                With caches it may be as wide as the encoder's cache.
            input_pos: positions, ``[b, s]`` or ``[s]``. None: ``0 .. s - 1``. Needed with caches.
            encoder_embeds: what ``encode`` returned, in place of ``encoder_input``.
            document_ids: which document each token belongs to, ``[b, s]``, -1: padding, where rows hold
                several that follow each other (see ``torchfuse.data.pack``). A token attends to its own
                document alone, and positions start at 0 in each. In place of ``mask``, not with caches.

        Returns:
            Logits ``[b, s, v]``, aligned with ``tokens``. With ``num_output_chunks`` a list of chunks,
            with ``output_hidden_states`` a list of hidden states and the logits.

        Raises:
            ModelError: if inputs do not fit the model or each other.
        """
        cached = self.caches_are_enabled()
        call: dict[str, Any] = {}
        if document_ids is not None:
            check_document_ids(self, tokens, document_ids, mask)
            call["document_ids"], mask = document_ids, document_mask(document_ids)
            input_pos = document_positions(document_ids) if input_pos is None else input_pos
        if mask is None and not cached and self.caches_are_setup():
            # torchtune's attention is causal without a mask only where no cache exists.
            s = tokens.shape[1]
            mask = torch.ones(1, s, s, dtype=torch.bool, device=tokens.device).tril()
        if cached and self.training and torch.is_grad_enabled():
            raise ModelError(
                "Caches are for inference: keys and values of an earlier call have no gradient, "
                "so training through them would be wrong. Call model.eval(), or run under "
                "torch.no_grad(); torchtune.modules.delete_kv_caches(model) removes the caches."
            )
        if cached and (mask is None or input_pos is None):
            raise ModelError(
                "Caches are set up, so mask ([b, s, slots], True: may attend) and input_pos must be "
                "given; torchtune.modules.delete_kv_caches(model) removes the caches."
            )
        features = self._features(
            tokens,
            encoder_input,
            encoder_embeds,
            encoder_mask,
            participate=self.on_missing == "participate" and not cached,
            encoder_slots=self.encoder_max_cache_seq_len if cached else None,
        )
        context = self.strategy.prepare(
            self, tokens, features, mask=mask, encoder_mask=encoder_mask, input_pos=input_pos, **call
        )
        output = self._decode(context)
        if cached and context.cache_state is not None:
            self.cache_state = context.cache_state
        return output

    def _decode(self, context: ModalityContext) -> Any:
        """Run the decoder."""
        kwargs: dict[str, Any] = {
            "mask": context.mask,
            "encoder_input": context.encoder_input,
            "encoder_mask": context.encoder_mask,
            "input_pos": context.input_pos,
        }
        if context.embeds is None:
            return self.decoder(context.tokens, **kwargs)
        scored = context.output_slice or slice(None)
        if is_minimal(self.decoder):
            output = self.decoder(context.embeds, mask=context.mask, input_pos=context.input_pos)
            return output[:, scored]
        self._check_embeds(context.embeds, several_documents=context.document_ids is not None)
        if context.routing is not None:
            kwargs["routing"] = context.routing
        hidden, h = [], context.embeds
        for index, layer in enumerate(self.layers):
            if index in self.output_hidden_states:
                hidden.append(h[:, scored])
            h = layer(h, **kwargs)
        output = self._unembed(h[:, scored], context)
        return [*hidden, output] if hidden else output

    def _unembed(self, h: Tensor, context: ModalityContext) -> Any:
        """Score hidden states ``[b, s, d]`` of the positions in ``context.output_slice``."""
        return self.decoder.unembed(h)

    def _check_embeds(self, embeds: Tensor, *, several_documents: bool) -> None:
        # A row of several documents may be longer: positions start at 0 in each.
        if embeds.shape[1] > self.max_seq_len and not several_documents:
            raise ModelError(
                f"The sequence of text and features is {embeds.shape[1]} tokens long, and the decoder's "
                f"max_seq_len is {self.max_seq_len}. Shorten the text or use fewer features."
            )
        if hasattr(self.decoder, "unshard"):
            raise ModelError(
                "The decoder is sharded as a module of its own, but this architecture runs its layers "
                "from the fused model. Call fully_shard on the layers and on the fused model instead."
            )


def refuse_fused(decoder: nn.Module) -> None:
    """Raise a ``ModelError`` if the decoder is a fused model, whose encoders would not run."""
    model = unwrap_model(decoder)
    if isinstance(model, FusedModel):
        raise ModelError(
            f"The decoder is a {type(model).__name__}, fused already. Fuse the plain decoder with all "
            "encoders at once: encoder={name: module}."
        )


def _evaluate_frozen(module: nn.Module) -> None:
    parameters = list(module.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        module.eval()
        return
    for child in module.children():
        _evaluate_frozen(child)
