"""A vision-language model as a training loop may want it: pixels and ids in, logits and labels out.

``VLMWrapper`` is a face of the model that ``fuse`` builds and has no parameter of its own. Every name
is the fused model's in every view, so artifacts, freeze specs, sharding and checkpoints of one are those
of the other, and whatever takes a fused model takes its face. Called as a decoder is, it is the fused
model, which is what generation does.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any, ClassVar, Final

from torch import Tensor, nn

from torchfuse.encoders.frames import frame_features_mask, hide_padding
from torchfuse.encoders.registry import pixels_keyword
from torchfuse.errors import ModelError
from torchfuse.models.base import FusedModel
from torchfuse.models.fuse import fuse
from torchfuse.models.strategy import ModalityStrategy
from torchfuse.models.vlm.config import (
    AdapterConfig,
    ModelConfig,
    VisionEncoderConfig,
    VLMConfig,
    read_config,
)
from torchfuse.models.vlm.lengths import check_vlm_lengths
from torchfuse.naming import TransparentWrapper, model_behind, unwrap

__all__ = ["VLMWrapper", "build_vlm_wrapper", "inner_transformer"]

# What parts of the fused model are called here, too.
_ALSO_CALLED: Final = {"vision_encoder": "encoder", "transformer": "decoder"}


class VLMWrapper(TransparentWrapper):
    """A fused model that takes pixels and ids, and hands labels through.

    ``wrapper.fused`` is the model itself; what it has, the wrapper has: ``adapter``, ``strategy``,
    ``parts()``, ``encode()``, caches. ``train()`` keeps frozen parts in evaluation mode as it does.

    Args:
        vision_encoder: takes images ``[b, c, h, w]``, and clips ``[b, f, c, h, w]`` where there are any
            (see ``FrameEncoder``), and returns features ``[b, n, d_e]``.
        adapter: a module, the name of one, or None, as for ``fuse``.
        transformer: a plain decoder. Its layers are wrapped in place, as by ``fuse``.
        strategy: the architecture, with its options.
        num_frames: frames of a clip at most, or images a row. None: any number.
        **fuse_options: what else ``fuse`` takes: ``every``, ``fusion_vocab_size``, what trains.

    Raises:
        ModelError: for anything that does not fit; the parts are as they were then.

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

    is_face: ClassVar[bool] = True

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
        pixels = _check(vision_encoder, num_frames)
        fused = fuse(transformer, vision_encoder, arch=strategy, adapter=adapter, **fuse_options)
        self._set_up(fused, pixels, num_frames)

    @classmethod
    def around(cls, model: FusedModel, *, num_frames: int | None = None) -> VLMWrapper:
        """The same face of a model that is fused already, from ``from_pretrained`` for example.

        Args:
            model: a fused model with one encoder, without a name.
            num_frames: as above.

        Raises:
            ModelError: if its encoders have names.
        """
        pixels = _check(getattr(model, "encoder", None), num_frames)
        wrapper = cls.__new__(cls)
        TransparentWrapper.__init__(wrapper)
        wrapper._set_up(model, pixels, num_frames)
        return wrapper

    def _set_up(self, fused: FusedModel, pixels: str, num_frames: int | None) -> None:
        self._pixels, self.num_frames = pixels, num_frames
        self.wrap(fused, child="fused")

    @property
    def vision_encoder(self) -> nn.Module:
        """The encoder."""
        return self._inner.encoder

    @property
    def transformer(self) -> nn.Module:
        """The decoder, with what fusion put into it."""
        return self._inner.decoder

    @property
    def _inner(self) -> Any:
        return self.wrapped

    @property
    def num_image_tokens(self) -> int:
        """How many positions of the sequence an image takes, or a clip of ``num_frames``.

        0 for ``cross_attention``, whose layers attend to features that stand nowhere in the sequence.
        """
        fused = self._inner
        return int(fused.strategy.num_image_tokens(fused, self.num_frames or 1))

    def __setattr__(self, name: str, value: Any) -> None:
        name = _ALSO_CALLED.get(name, name)
        fused = self.__dict__.get("_modules", {}).get("fused")
        # What callers assign and the model remembers is the model's; a method put here stays here.
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
                and goes to the fused model as it is.
            labels: ids ``[b, s]`` aligned with ``input_ids``. They come back as they are: the shift by
                one is the loss's, see ``torchfuse.training.next_token_loss``.
            frame_mask: for clips: bool ``[b, f]``, True: the frame is real. A padded frame is seen by
                nobody, and a row without any real one is a row of text.
            **decoder_call: keywords of the fused model, where the call is a decoder's.

        Returns:
            Logits ``[b, s, v]`` aligned with ``input_ids``, and the labels.

        Raises:
            ModelError: if the inputs do not fit each other or the model.
        """
        if input_ids is None:
            tokens = decoder_call.pop("tokens", pixel_values)
            other = labels is not None or frame_mask is not None
            if tokens is None or tokens.is_floating_point() or other:
                raise ModelError(
                    "A VLMWrapper is called with pixel_values and input_ids, beside which labels and "
                    "frame_mask may stand, or as a decoder is with ids alone; got neither."
                )
            return self._inner(tokens, **decoder_call)
        if decoder_call:
            raise ModelError(
                "Beside pixel_values and input_ids there are labels and frame_mask; got "
                f"{', '.join(decoder_call)}, which the decoder's own call takes."
            )
        return self._inner(input_ids, **self._features_of(pixel_values, frame_mask)), labels

    def _features_of(self, pixels: Tensor | None, frame_mask: Tensor | None) -> dict[str, Any]:
        """What the fused model is given for pixels."""
        num_frames = None if pixels is None or pixels.dim() != 5 else pixels.shape[1]
        if self.num_frames is not None and num_frames is not None and num_frames > self.num_frames:
            raise ModelError(f"Clips have {self.num_frames} frames at most here, got {num_frames}.")
        if frame_mask is None:
            return {} if pixels is None else {"encoder_input": {self._pixels: pixels}}
        if pixels is None or num_frames is None:
            got = None if pixels is None else list(pixels.shape)
            raise ModelError(
                f"frame_mask goes with clips, pixel_values [b, f, c, h, w]; got pixel_values {got}."
            )
        least: int = getattr(unwrap(self.vision_encoder), "min_frames", 0)
        shown = hide_padding(pixels, frame_mask, min_frames=least)
        # Which features are a frame's shows behind the adapter.
        embeds = self._inner.encode({self._pixels: shown})
        each, left = divmod(embeds.shape[1], num_frames)
        if left or not each:
            raise ModelError(
                f"{embeds.shape[1]} features of {num_frames} frames are not equally many of each frame. "
                "Wrap an encoder of one image a row in FrameEncoder, and give an adapter that pools "
                "the side of a frame's grid."
            )
        return {"encoder_embeds": embeds, "encoder_mask": frame_features_mask(frame_mask, each)}


def _check(encoder: Any, num_frames: int | None) -> str:
    """The encoder's keyword for pixels."""
    if not isinstance(encoder, nn.Module):
        raise ModelError(
            "A VLMWrapper has one vision encoder without a name, got "
            f"{'encoders by name' if encoder is None else type(encoder).__name__}. A fused model takes "
            "several: encoder_input={name: keywords}."
        )
    if num_frames is not None and num_frames < 1:
        raise ModelError(f"num_frames must be at least 1, got {num_frames}.")
    return pixels_keyword(encoder)


def inner_transformer(model: nn.Module) -> nn.Module:
    """The decoder inside a ``VLMWrapper`` or fused model, through every wrapper around it.

    Args:
        model: compiled, activation-checkpointed, sharded, or plain. What is neither of the two is
            returned without wrappers.
    """
    inner = model_behind(model)
    return unwrap(inner.decoder) if isinstance(inner, FusedModel) else inner


def build_vlm_wrapper(
    model_config: ModelConfig | Mapping[str, Any],
    vision_config: VisionEncoderConfig | Mapping[str, Any],
    adapter_config: AdapterConfig | Mapping[str, Any],
    vlm_config: VLMConfig | Mapping[str, Any],
) -> VLMWrapper:
    """Build a ``VLMWrapper`` from configurations, with fresh weights.

    ``torchfuse.load_pretrained(wrapper, decoder=..., encoder=...)`` fills it. What trains is as
    ``vlm_config.freeze`` and the stages from step 0 say.

    Args:
        model_config: the decoder.
        vision_config: the encoder.
        adapter_config: the adapter.
        vlm_config: the architecture. Each may be a mapping of its fields, and in this one the
            architecture's options may stand beside them: ``{"arch": "mot", "start": "zero"}``.

    Raises:
        ModelError: if a configuration does not fit, naming key, value and choices; if text and features
            do not fit the decoder, with every number, as far as known before anything is built.

    Examples:
        >>> model = build_vlm_wrapper(
        ...     {"vocab_size": 11, "num_layers": 2, "num_heads": 3, "num_kv_heads": 1, "embed_dim": 12,
        ...      "max_seq_len": 17, "intermediate_dim": 13},
        ...     {"type": "random", "num_tokens": 5, "feature_dim": 7},
        ...     {"type": "linear"},
        ...     {"arch": "mot", "start": "zero", "max_text_len": 12},
        ... )
        >>> type(model.fused).__name__, model.num_image_tokens
        ('MixtureFusionModel', 5)
    """
    model = read_config(ModelConfig, model_config, "model")
    vision = read_config(VisionEncoderConfig, vision_config, "vision_encoder")
    adapter = read_config(AdapterConfig, adapter_config, "adapter")
    vlm = read_config(VLMConfig, vlm_config, "vlm")
    check_vlm_lengths(model, vision, adapter, vlm)
    encoder: Any = vision.build()
    check_vlm_lengths(model, vision, adapter, vlm, encoder)
    wrapper = VLMWrapper(
        encoder,
        adapter.build(encoder.feature_dim, model.embed_dim, encoder.num_tokens),
        model.build(),
        vlm.strategy,
        num_frames=vision.num_frames,
        every=vlm.every,
        fusion_vocab_size=vlm.fusion_vocab_size,
        on_missing=vlm.on_missing,
    )
    schedule = vlm.schedule
    schedule.trained_ever(wrapper)
    schedule.apply(wrapper, 0)
    return wrapper
