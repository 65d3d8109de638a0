"""A vision-language model that takes pixels and token ids, and returns logits and labels.

``VLMWrapper`` wraps the model that ``fuse`` builds and has no parameter of its own. In every view its
names are the fused model's, so artifacts, freeze specs, sharding and checkpoints of one are those of the
other, and functions that take a fused model take its wrapper.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, Final

from torch import Tensor, nn

from torchfuse.encoders.frames import frame_features_mask, hide_padding
from torchfuse.encoders.registry import pixels_keyword
from torchfuse.errors import ConfigError, ModelError
from torchfuse.models.base import FusedModel
from torchfuse.models.fuse import fuse
from torchfuse.models.lengths import tokens_of_frame
from torchfuse.models.strategy import ModalityStrategy, features_per_image
from torchfuse.naming import TransparentWrapper, unwrap, unwrap_model

__all__ = ["VLMWrapper", "inner_transformer"]

# The wrapper's names of parts of the fused model.
_ALIASES: Final = {"vision_encoder": "encoder", "transformer": "decoder"}


class VLMWrapper(TransparentWrapper):
    """A fused model that takes pixels and ids, and returns labels unchanged beside the logits.

    ``wrapper.fused`` is the fused model, and its attributes and methods are the wrapper's too:
    ``adapter``, ``strategy``, ``parts()``, ``encode()``, caches.

    Args:
        vision_encoder: takes images ``[b, c, h, w]``, or clips ``[b, f, c, h, w]`` (see
            ``FrameEncoder``), and returns features ``[b, n, d_e]``.
        adapter: a module, the name of a registered one, or None, as for ``fuse``.
        transformer: a plain decoder. Its layers are wrapped in place, as by ``fuse``.
        strategy: the architecture with its options.
        num_frames: the most frames of a clip, or images a row. None: any number.
        **fuse_options: what else ``fuse`` takes: ``every``, ``fusion_vocab_size``, what trains.

    Raises:
        ModelError: for parts that do not fit each other, which are unchanged then.

    Examples:
        >>> import torch
        >>> from torchtune.models.llama3_2 import llama3_2
        >>> from torchfuse.encoders.stub import RandomEncoder
        >>> from torchfuse.models import JointDecoderStrategy
        >>> decoder = llama3_2(
        ...     vocab_size=11, num_layers=2, num_heads=3, num_kv_heads=1, embed_dim=12, max_seq_len=17
        ... )
        >>> strategy = JointDecoderStrategy(placement="prefix")
        >>> model = VLMWrapper(RandomEncoder(5, 7), "linear", decoder, strategy)
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> logits, labels = model(torch.zeros(1, 3, 8, 8), ids, labels=ids)
        >>> logits.shape, labels is ids, model.num_image_tokens
        (torch.Size([1, 3, 11]), True, 5)
    """

    def __init__(
        self,
        vision_encoder: nn.Module,
        adapter: str | nn.Module | None,
        transformer: nn.Module,
        strategy: ModalityStrategy,
        *,
        num_frames: int | None = None,
        **fuse_options: Any,
    ) -> None:
        super().__init__()
        self._set_call(vision_encoder, num_frames)
        fused = fuse(transformer, vision_encoder, arch=strategy, adapter=adapter, **fuse_options)
        self.wrap(fused, child="fused")

    @classmethod
    def around(cls, model: FusedModel, *, num_frames: int | None = None) -> VLMWrapper:
        """Wrap a model that is fused already, from ``from_pretrained`` for example.

        Args:
            model: a fused model with one encoder, without a name.
            num_frames: as for the class.

        Raises:
            ModelError: if its encoders have names.
        """
        wrapper = cls.__new__(cls)
        TransparentWrapper.__init__(wrapper)
        wrapper._set_call(getattr(model, "encoder", None), num_frames)
        wrapper.wrap(model, child="fused")
        return wrapper

    def _set_call(self, encoder: Any, num_frames: int | None) -> None:
        if not isinstance(encoder, nn.Module):
            raise ModelError(
                "A VLMWrapper has one vision encoder without a name, got "
                f"{'encoders by name' if encoder is None else type(encoder).__name__}. A fused model "
                "takes several: encoder_input={name: keywords}."
            )
        if num_frames is not None and num_frames < 1:
            raise ConfigError(f"num_frames must be at least 1, got {num_frames}.")
        self._pixels, self.num_frames = pixels_keyword(encoder), num_frames

    @property
    def vision_encoder(self) -> nn.Module:
        """The encoder."""
        return self.encoder

    @property
    def transformer(self) -> nn.Module:
        """The decoder, with the layers that fusion put into it."""
        return self.decoder

    @property
    def num_image_tokens(self) -> int:
        """Positions of the sequence that an image takes, or a clip of ``num_frames``.

        0 for ``cross_attention``, whose features are not in the sequence.
        """
        return int(self.strategy.num_image_tokens(self.wrapped, self.num_frames or 1))

    def __setattr__(self, name: str, value: Any) -> None:
        name = _ALIASES.get(name, name)
        fused = self.__dict__.get("_modules", {}).get("fused")
        # An attribute of the fused model is set there; a method that is replaced is the wrapper's.
        own = name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        if fused is None or own or isinstance(value, MethodType) or not hasattr(fused, name):
            super().__setattr__(name, value)
        else:
            setattr(unwrap(fused), name, value)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        frame_mask: Tensor | None = None,
        **decoder_call: Any,
    ) -> Any:
        """Score ids, given images.

        Args:
            pixel_values: ``[b, c, h, w]``, or clips ``[b, f, c, h, w]``. None: a batch of text.
            input_ids: ids ``[b, s]``. None: the call is a decoder's, ``wrapper(tokens, mask=..., ...)``,
                and is passed to the fused model.
            labels: ids ``[b, s]`` aligned with ``input_ids``, returned unchanged: the loss shifts them
                by one, see ``torchfuse.training.next_token_loss``.
            frame_mask: for clips, bool ``[b, f]``, True: the frame is real. Padded frames are masked
                out, and a row without a real frame is a row of text.
            **decoder_call: keywords of the fused model, if the call is a decoder's.

        Returns:
            Logits ``[b, s, v]`` aligned with ``input_ids``, and the labels.

        Raises:
            ModelError: if the inputs do not fit each other or the model.
            ConfigError: with ``frame_mask``, if the number of features of a frame is not known.
        """
        if input_ids is not None:
            if decoder_call:
                raise ModelError(
                    "A call with input_ids takes pixel_values, labels and frame_mask beside them; got "
                    f"{', '.join(decoder_call)}, which the decoder's own call takes."
                )
            return self.wrapped(input_ids, **self._features_of(pixel_values, frame_mask)), labels
        tokens = decoder_call.pop("tokens", pixel_values)
        if tokens is None or tokens.is_floating_point() or labels is not None or frame_mask is not None:
            raise ModelError(
                "A VLMWrapper is called with pixel_values and input_ids, optionally with labels and "
                "frame_mask, or as a decoder is with ids alone; got neither."
            )
        return self.wrapped(tokens, **decoder_call)

    def _features_of(self, pixels: Tensor | None, frame_mask: Tensor | None) -> dict[str, Any]:
        """Return the fused model's keywords for pixels."""
        num_frames = None if pixels is None or pixels.dim() != 5 else pixels.shape[1]
        if self.num_frames is not None and num_frames is not None and num_frames > self.num_frames:
            raise ModelError(f"Clips must have at most {self.num_frames} frames, got {num_frames}.")
        if frame_mask is None:
            return {} if pixels is None else {"encoder_input": {self._pixels: pixels}}
        if pixels is None or num_frames is None:
            got = None if pixels is None else list(pixels.shape)
            raise ModelError(
                f"frame_mask is for clips, pixel_values [b, f, c, h, w]; got pixel_values {got}."
            )
        fused: Any = self.wrapped
        encoder: Any = unwrap(fused.encoder)
        # The number is computed, not taken from encode(), which under FSDP2 is one more root forward.
        each = features_per_image(fused, "encoder")
        tokens_of_frame(fused.adapter, encoder.num_tokens, num_frames)
        images = hide_padding(pixels, frame_mask, min_frames=getattr(encoder, "min_frames", 0))
        return {
            "encoder_input": {self._pixels: images},
            "encoder_mask": frame_features_mask(frame_mask, each),
        }


def inner_transformer(model: nn.Module) -> nn.Module:
    """Return the decoder of a ``VLMWrapper`` or fused model, without any wrapper around it.

    Args:
        model: compiled, activation-checkpointed, sharded, or plain. A model that is neither of the two
            is returned without its wrappers.
    """
    inner = unwrap_model(model)
    return unwrap(inner.decoder) if isinstance(inner, FusedModel) else inner
