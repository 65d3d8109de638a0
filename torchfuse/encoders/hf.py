"""Any vision or audio tower of transformers as an encoder, under the tower's own names.

The tower itself runs: features are its ``last_hidden_state`` or one of its ``hidden_states``, to the
bit. What a tower does not say of itself, above all how many tokens stand in front of its patches, is a
table by ``model_type`` here. Nothing is guessed: for a tower that is in no table the caller must say it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from torchfuse.errors import ModelError
from torchfuse.naming import TransparentWrapper

__all__ = ["AXES", "HfEncoder", "computed_buffers", "special_tokens"]

# The tokens that stand in front of the others.
_SPECIAL: Final[dict[str, tuple[str, ...]]] = {
    "clip_vision_model": ("class",),
    "vit": ("class",),
    "deit": ("class", "distillation"),
    "dinov2": ("class",),
    "dinov2_with_registers": ("class", "register"),
    "dinov3_vit": ("class", "register"),
    "siglip_vision_model": (),
    "siglip2_vision_model": (),
    "audio-spectrogram-transformer": ("class", "distillation"),
    "whisper": (),
    "wav2vec2": (),
    "hubert": (),
}
# Axes of a batch of the main input, where an input of this name has them otherwise.
AXES: Final = {"pixel_values": 4, "input_features": 3, "input_values": 2}
_OTHER_AXES: Final = {"siglip2_vision_model": 3, "audio-spectrogram-transformer": 3}
# These take images of any size, and make more or fewer features of them.
_ANY_SIZE: Final = frozenset({"dinov2", "dinov2_with_registers", "dinov3_vit"})


class HfEncoder(TransparentWrapper):
    """Features of a transformers tower, whose parameters keep their names.

    Layers behind ``feature_layer`` run, and get no gradient. With a ``feature_layer`` the module cannot
    be pickled, because the hooks that transformers reads hidden states with cannot; ``deepcopy`` and
    ``state_dict`` are as ever.

    Args:
        tower: a built ``CLIPVisionModel``, ``SiglipVisionModel``, ``Siglip2VisionModel``,
            ``Dinov2Model``, ``ViTModel``, ``WhisperEncoder``, ``Wav2Vec2Model``, ``ASTModel``, or
            another that takes ``pixel_values``, ``input_features`` or ``input_values``.
        feature_layer: None: the features are the tower's ``last_hidden_state``. Otherwise they are
            ``hidden_states[feature_layer]``: 0 is the input of the first layer, -1 the output of the
            last. None and -1 differ where the last norm is part of ``last_hidden_state`` alone (SigLIP,
            SigLIP 2, ViT, DINOv2, AST). In CLIP it is part of neither, in Whisper of both.
        keep_cls: whether the special tokens in front (class, distillation, registers) stay, all of them.
            Must be given where there are such tokens, and must be None where there are none.
        image_size: side of the images if it is not the one in the tower's configuration. A tower with
            learned positions interpolates them then.
        num_special_tokens: number of special tokens, for a tower that is not known here.

    Raises:
        ModelError: if it is no tower, or an argument does not fit it, naming each.

    Examples:
        >>> from transformers import SiglipVisionConfig, SiglipVisionModel
        >>> config = SiglipVisionConfig(
        ...     hidden_size=6, intermediate_size=7, num_hidden_layers=3, num_attention_heads=2,
        ...     image_size=8, patch_size=4,
        ... )
        >>> encoder = HfEncoder(SiglipVisionModel(config), feature_layer=-2)
        >>> encoder(pixel_values=torch.randn(2, 3, 3, 8, 8)).shape  # two rows of three images
        torch.Size([2, 12, 6])
    """

    def __init__(
        self,
        tower: nn.Module,
        *,
        feature_layer: int | None = None,
        keep_cls: bool | None = None,
        image_size: int | None = None,
        num_special_tokens: int | None = None,
    ) -> None:
        super().__init__()
        config: Any = getattr(tower, "config", None)
        main = getattr(tower, "main_input_name", None)
        if main not in AXES or hasattr(tower, "decoder") or not hasattr(config, "hidden_size"):
            raise ModelError(
                f"An HfEncoder wraps one vision or audio tower of transformers, which takes one of "
                f"{', '.join(AXES)} and has config.hidden_size; got a {type(tower).__name__}. Of a "
                "whole model give the tower alone, such as model.vision_model or model.encoder."
            )
        special, problems = _special_tokens(config, keep_cls, num_special_tokens)
        num_layers = int(getattr(config, "num_hidden_layers", 0))
        if feature_layer is not None and not -num_layers - 1 <= feature_layer <= num_layers:
            problems.append(
                f"feature_layer={feature_layer} must lie between {-num_layers - 1} and {num_layers}, or "
                "be None for last_hidden_state"
            )
        if feature_layer is None and getattr(config, "add_adapter", False):
            # It stands behind the last layer, and changes the width and the number of features.
            problems.append("its own adapter (add_adapter) cannot be part of it, give a feature_layer")
        axes = _OTHER_AXES.get(config.model_type, AXES[main])
        sides = _pair(getattr(config, "image_size", None)) if axes == 4 else None
        resized = image_size is not None and sides != (image_size, image_size)
        can_interpolate = "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters
        if resized and not (sides and (config.model_type in _ANY_SIZE or can_interpolate)):
            problems.append(f"image_size={image_size} cannot be had, the tower is fixed to {sides}")
        if problems:
            raise ModelError(f"{type(tower).__name__} ({config.model_type}): {'; '.join(problems)}.")
        self.config, self.model_type, self.main_input = config, str(config.model_type), str(main)
        self.feature_layer, self.keep_cls = feature_layer, keep_cls
        self.num_special_tokens, self._axes = special, axes
        self.sides = (image_size, image_size) if image_size is not None else sides
        self._defaults = {"interpolate_pos_encoding": True} if resized and can_interpolate else {}
        self._hidden = None if feature_layer is None else feature_layer % (num_layers + 1)
        self.wrap(tower, child="tower")
        if self._hidden is not None:
            _install_hooks(tower)

    @property
    def image_size(self) -> int | None:
        """Side of the square images, in pixels; None where there is no such side."""
        return self.sides[0] if self.sides and self.sides[0] == self.sides[1] else None

    @property
    def feature_dim(self) -> int:
        """Width of the features."""
        return int(self.config.hidden_size)

    @property
    def num_tokens(self) -> int | None:
        """Features of one image or clip; None where they depend on the input, or are not known here."""
        kept = self.num_special_tokens if self.keep_cls else 0
        config = self.config
        if self.model_type == "whisper":
            return int(config.max_source_positions)
        if self.model_type == "audio-spectrogram-transformer":
            mels = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
            return int(mels * ((config.max_length - config.patch_size) // config.time_stride + 1)) + kept
        patch = _pair(getattr(config, "patch_size", None))
        if self.model_type not in _SPECIAL or not self.sides or not patch:
            return None
        return (self.sides[0] // patch[0]) * (self.sides[1] // patch[1]) + kept

    def example_input(self) -> dict[str, Tensor]:
        """The smallest input that the tower runs on: a black image, one black patch, or silence.

        Raises:
            ModelError: if it is not known for this tower.
        """
        config = self.config
        shape: list[int] | None = None
        if self.model_type == "siglip2_vision_model":
            return {
                "pixel_values": torch.zeros(1, 1, config.num_channels * config.patch_size**2),
                "pixel_attention_mask": torch.ones(1, 1, dtype=torch.long),
                "spatial_shapes": torch.ones(1, 2, dtype=torch.long),
            }
        if self.sides:
            shape = [getattr(config, "num_channels", 3), *self.sides]
        elif self.model_type == "whisper":
            shape = [config.num_mel_bins, 2 * config.max_source_positions]
        elif self.model_type == "audio-spectrogram-transformer":
            shape = [config.max_length, config.num_mel_bins]
        elif hasattr(config, "conv_stride"):
            length = getattr(config, "mask_time_length", 1)  # shorter clips cannot be masked in training
            for kernel, stride in reversed([*zip(config.conv_kernel, config.conv_stride, strict=True)]):
                length = (length - 1) * stride + kernel
            shape = [length]
        if shape is None:
            raise ModelError(
                f"The smallest input of {self.model_type!r} is not known: pass example_input=."
            )
        return {self.main_input: torch.zeros(1, *shape)}

    def forward(self, **inputs: Any) -> Tensor:
        """Encode images or clips.

        Args:
            **inputs: the tower's own keywords, as its processor makes them; ``images`` is another name
                for ``pixel_values``. Tensors may have one axis more, behind the first, for ``m``
                images or clips a row: ``pixel_values`` ``[b, m, 3, h, w]``.

        Returns:
            Features ``[b, m * n, d_e]``, image by image. Padding of the input (NaFlex patches, silence)
            has features too; see ``features_mask``.

        Raises:
            ModelError: if the main input is missing or has the wrong shape, or the tower returns no
                features ``[b, n, d_e]``.
        """
        keywords, rows, items = self._per_item(inputs)
        if self._hidden is not None:
            keywords["output_hidden_states"] = [self._hidden]
        output = self.wrapped(**(self._defaults | keywords), return_dict=True)
        features = self._choose(output)
        if self.keep_cls is False:
            features = features[:, self.num_special_tokens :]
        return features.reshape(rows, items * features.shape[1], features.shape[2])

    def features_mask(self, **inputs: Any) -> Tensor | None:
        """Which features are no padding, for ``encoder_mask``.

        Args:
            **inputs: as for ``forward``. SigLIP 2 is asked for ``pixel_attention_mask`` (``[b, n]``),
                audio towers for ``attention_mask`` (``[b, t]``, padded on the right).

        Returns:
            Bool ``[b, m * n]``, True: may attend; None if the inputs have no such mask.

        Raises:
            ModelError: if it is not known how this tower's mask falls on its features.
        """
        keywords, rows, _ = self._per_item(inputs)
        naflex = self.model_type == "siglip2_vision_model"
        mask = keywords.get("pixel_attention_mask" if naflex else "attention_mask")
        if mask is None:
            return None
        if self.model_type == "whisper":
            mask = mask[:, ::2]
        elif hasattr(self.config, "conv_stride"):
            mask = self._mask_behind_convolutions(mask)
        elif not naflex:
            raise ModelError(f"How a mask falls on the features of {self.model_type!r} is not known.")
        return mask.bool().reshape(rows, -1)

    def _per_item(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], int, int]:
        """The tower's keywords with one item a row, the number of rows, and of items in each."""
        keywords = dict(inputs)
        if self.main_input == "pixel_values" and "images" in keywords:
            if "pixel_values" in keywords:
                raise ModelError("Give images or pixel_values, they are the same input.")
            keywords["pixel_values"] = keywords.pop("images")
        main = keywords.get(self.main_input)
        axes = self._axes
        if not isinstance(main, Tensor) or main.dim() not in (axes, axes + 1):
            got = (
                list(main.shape)
                if isinstance(main, Tensor)
                else f"only {', '.join(keywords) or 'nothing'}"
            )
            raise ModelError(
                f"A {self.model_type} tower takes {self.main_input} with {axes} axes, or {axes + 1} for "
                f"several a row; got {got}."
            )
        any_size = self.model_type in _ANY_SIZE or keywords.get("interpolate_pos_encoding")
        if self.sides and not any_size and main.shape[-2:] != self.sides:
            raise ModelError(
                f"This {self.model_type} tower takes images of {self.sides[0]} x {self.sides[1]}, got "
                f"{list(main.shape)}. Resize them, or build the encoder with image_size=."
            )
        if main.dim() == axes:
            return keywords, main.shape[0], 1
        flat = {k: v.flatten(0, 1) if isinstance(v, Tensor) else v for k, v in keywords.items()}
        return flat, main.shape[0], main.shape[1]

    def _choose(self, output: Any) -> Tensor:
        if self._hidden is None:
            features = getattr(output, "last_hidden_state", None)
        else:
            states, num_layers = output.hidden_states, self.config.num_hidden_layers
            if len(states) != num_layers + 1:
                raise ModelError(
                    f"The {self.model_type} tower has {num_layers} layers, but returned {len(states)} "
                    "hidden states, so that they cannot be counted. If it drops layers at random, set "
                    "its layerdrop to 0."
                )
            features = states[self._hidden]
        if not isinstance(features, Tensor) or features.dim() != 3:
            got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ModelError(f"The {self.model_type} tower must give features [b, n, d_e], got {got}.")
        return features

    def _mask_behind_convolutions(self, mask: Tensor) -> Tensor:
        config = self.config
        lengths, total = mask.long().sum(-1), mask.shape[-1]
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            lengths, total = (lengths - kernel) // stride + 1, (total - kernel) // stride + 1
        return torch.arange(total, device=mask.device) < lengths[:, None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HfEncoder:
        # What no checkpoint holds (position ids) must survive to_empty: nothing would fill it again.
        before = list(computed_buffers(self.wrapped))
        super()._apply(fn, recurse)
        for module, name, old in before:
            new = module._buffers[name]
            if new is not None and new is not old and not old.is_meta and not new.is_meta:
                new.copy_(old)
        return self


def special_tokens(model_type: str) -> tuple[str, ...] | None:
    """The kinds of special tokens that a tower puts in front; None where it is not known."""
    return _SPECIAL.get(model_type)


def _special_tokens(config: Any, keep_cls: bool | None, given: int | None) -> tuple[int, list[str]]:
    """The number of special tokens, and what is wrong with what was said about them."""
    names = _SPECIAL.get(config.model_type)
    if names is None and given is None:
        return 0, [
            "how many special tokens it puts in front is not known here: give num_special_tokens="
        ]
    counts = {name: config.num_register_tokens if name == "register" else 1 for name in names or ()}
    known = sum(counts.values())
    if given is not None and (given < 0 or (names is not None and given != known)):
        right = "it must be at least 0" if names is None else f"it has {known}"
        return known, [f"num_special_tokens={given}, but {right}"]
    number = known if given is None else given
    if number and keep_cls is None:
        what = " and ".join(f"{count} {name}" for name, count in counts.items()) or str(number)
        return number, [f"it has {what} token in front: say keep_cls=True or keep_cls=False"]
    if not number and keep_cls is not None:
        return number, [
            f"keep_cls={keep_cls}, but it has no class token to keep or drop: leave keep_cls out"
        ]
    return number, []


def _install_hooks(tower: nn.Module) -> None:
    """Have transformers set its hooks on hidden states now; later, its lock would break a graph."""
    try:
        from transformers.utils.output_capturing import maybe_install_capturing_hooks
    except ImportError:  # versions that read hidden states without hooks
        return
    # Where a part of the tower has its hooks already, installing them on the whole would double them.
    if not any(hasattr(module, "_output_capturing_hooks_installed") for module in tower.modules()):
        maybe_install_capturing_hooks(tower)


def computed_buffers(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Buffers that no checkpoint holds, with their owners."""
    for owner in module.modules():
        for name in sorted(owner._non_persistent_buffers_set):
            if (buffer := owner._buffers.get(name)) is not None:
                yield owner, name, buffer


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    return (
        (int(value[0]), int(value[1])) if isinstance(value, list | tuple) and len(value) == 2 else None
    )
