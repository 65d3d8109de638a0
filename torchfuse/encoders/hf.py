"""Any vision or audio tower of transformers as an encoder, under the tower's own parameter names.

The tower itself runs: features are its ``last_hidden_state`` or one of its ``hidden_states``, to the
bit. Facts that a tower does not state, above all its number of special tokens, come from ``hf_towers``.
Nothing is guessed: for a tower that is not in a table there the caller must give them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from torchfuse.encoders import hf_towers
from torchfuse.errors import ConfigError, ModelError
from torchfuse.naming import TransparentWrapper

__all__ = ["HfEncoder", "computed_buffers"]


class HfEncoder(TransparentWrapper):
    """Features of a transformers tower, whose parameters keep their names.

    Layers after ``feature_layer`` run, and get no gradient. With a ``feature_layer`` the module cannot
    be pickled, because the hooks that transformers reads hidden states with cannot; ``deepcopy`` and
    ``state_dict`` work.

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
        image_size: side of the images if it differs from the tower's configuration. A tower with
            learned positions interpolates them then.
        num_special_tokens: number of special tokens, for a tower that is not known here.

    Raises:
        ModelError: if the module is not a tower.
        ConfigError: naming every argument that does not fit the tower.

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
        if main not in hf_towers.AXES or hasattr(tower, "decoder") or not hasattr(config, "hidden_size"):
            raise ModelError(
                f"An HfEncoder wraps one vision or audio tower of transformers, which takes one of "
                f"{', '.join(hf_towers.AXES)} and has config.hidden_size; got a {type(tower).__name__}. "
                "Of a whole model give the tower alone, such as model.vision_model or model.encoder."
            )
        special, problems = hf_towers.count_special_tokens(config, keep_cls, num_special_tokens)
        num_layers = int(getattr(config, "num_hidden_layers", 0))
        if feature_layer is not None and not -num_layers - 1 <= feature_layer <= num_layers:
            problems.append(
                f"feature_layer={feature_layer} must lie between {-num_layers - 1} and {num_layers}, or "
                "be None for last_hidden_state"
            )
        if feature_layer is None and getattr(config, "add_adapter", False):
            # It comes after the last layer, and changes the width and the number of features.
            problems.append("its own adapter (add_adapter) is not supported, give a feature_layer")
        axes = hf_towers.input_axes(config.model_type, main)
        sides = hf_towers.pair(getattr(config, "image_size", None)) if axes == 4 else None
        resized = image_size is not None and sides != (image_size, image_size)
        can_interpolate = "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters
        any_size = can_interpolate or config.model_type in hf_towers.ANY_SIZE
        if resized and not (sides and any_size):
            problems.append(f"image_size={image_size} is not possible, the tower is fixed to {sides}")
        if problems:
            raise ConfigError(f"{type(tower).__name__} ({config.model_type}): {'; '.join(problems)}.")
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
        return hf_towers.num_tokens(self.config, self.sides, kept)

    def example_input(self) -> dict[str, Tensor]:
        """Return the smallest input that the tower runs on: a black image, one black patch, or silence.

        Raises:
            ModelError: if it is not known for this tower.
        """
        return hf_towers.example_input(self.config, self.main_input, self.sides)

    def forward(self, **inputs: Any) -> Tensor:
        """Encode images or clips.

        Args:
            **inputs: the tower's own keywords, as its processor makes them; ``images`` is another name
                for ``pixel_values``. Tensors may have one axis more, after the first, for ``m``
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
        features = self._select(self.wrapped(**(self._defaults | keywords), return_dict=True))
        if self.keep_cls is False:
            features = features[:, self.num_special_tokens :]
        return features.reshape(rows, items * features.shape[1], features.shape[2])

    def features_mask(self, **inputs: Any) -> Tensor | None:
        """Return which features are not padding, for ``encoder_mask``.

        Args:
            **inputs: as for ``forward``, with ``pixel_attention_mask`` (``[b, n]``) for SigLIP 2 and
                ``attention_mask`` (``[b, t]``, padded on the right) for audio towers.

        Returns:
            Bool ``[b, m * n]``, True: may attend; None if the inputs have no such mask.

        Raises:
            ModelError: if it is not known how this tower's mask applies to its features.
        """
        keywords, rows, _ = self._per_item(inputs)
        mask = hf_towers.features_mask(self.config, keywords)
        return mask if mask is None else mask.reshape(rows, -1)

    def _per_item(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], int, int]:
        """Return the tower's keywords with one item a row, the number of rows, and of items in each."""
        keywords = dict(inputs)
        if self.main_input == "pixel_values" and "images" in keywords:
            if "pixel_values" in keywords:
                raise ModelError("Give images or pixel_values, they are the same input.")
            keywords["pixel_values"] = keywords.pop("images")
        main, axes = keywords.get(self.main_input), self._axes
        if not isinstance(main, Tensor) or main.dim() not in (axes, axes + 1):
            names = f"only {', '.join(keywords) or 'nothing'}"
            got = list(main.shape) if isinstance(main, Tensor) else names
            raise ModelError(
                f"A {self.model_type} tower takes {self.main_input} with {axes} axes, or {axes + 1} for "
                f"several a row; got {got}."
            )
        any_size = self.model_type in hf_towers.ANY_SIZE or keywords.get("interpolate_pos_encoding")
        if self.sides and not any_size and main.shape[-2:] != self.sides:
            raise ModelError(
                f"This {self.model_type} tower takes images of {self.sides[0]} x {self.sides[1]}, got "
                f"{list(main.shape)}. Resize them, or build the encoder with image_size=."
            )
        if main.dim() == axes:
            return keywords, main.shape[0], 1
        flat = {k: v.flatten(0, 1) if isinstance(v, Tensor) else v for k, v in keywords.items()}
        return flat, main.shape[0], main.shape[1]

    def _select(self, output: Any) -> Tensor:
        """Return the features ``[b, n, d_e]`` in a tower's output."""
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
            raise ModelError(f"The {self.model_type} tower must return features [b, n, d_e], got {got}.")
        return features

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HfEncoder:
        # to_empty must not lose buffers that no checkpoint holds (position ids).
        before = list(computed_buffers(self.wrapped))
        super()._apply(fn, recurse)
        for module, name, old in before:
            new = module._buffers[name]
            if new is not None and new is not old and not old.is_meta and not new.is_meta:
                new.copy_(old)
        return self


def computed_buffers(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Iterate over the buffers that no checkpoint holds, with their owners and names."""
    for owner in module.modules():
        for name in sorted(owner._non_persistent_buffers_set):
            if (buffer := owner._buffers.get(name)) is not None:
                yield owner, name, buffer


def _install_hooks(tower: nn.Module) -> None:
    """Install transformers' hooks for hidden states now: its lock would break a graph later."""
    try:
        from transformers.utils.output_capturing import maybe_install_capturing_hooks
    except ImportError:  # versions that read hidden states without hooks
        return
    # Where a part of the tower has its hooks, installing them on the whole would double them.
    if not any(hasattr(module, "_output_capturing_hooks_installed") for module in tower.modules()):
        maybe_install_capturing_hooks(tower)
