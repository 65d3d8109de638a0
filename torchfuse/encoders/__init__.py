"""Encoders: modules that return features ``[b, n, d_e]``.

Any module will do. These attributes of an encoder are used where it has them:

* ``feature_dim``: the width ``d_e`` of its features;
* ``num_tokens``: the number of features of one image;
* ``image_size``: the side of the square images that it takes, in pixels;
* ``example_input()``: keywords of the smallest input that it runs on.
"""

from typing import TYPE_CHECKING

from torchfuse._lazy import lazy_exports
from torchfuse.encoders.frames import FrameEncoder, frame_features_mask, hide_padding
from torchfuse.encoders.registry import build_encoder, encoder_names, register_encoder
from torchfuse.encoders.stub import RandomEncoder

if TYPE_CHECKING:
    from torchfuse.encoders.clip import ClipVisionEncoder, clip_vit_l_14_336
    from torchfuse.encoders.hf import HfEncoder
    from torchfuse.encoders.hf_build import hf_encoder
    from torchfuse.encoders.mllama import MllamaVisionEncoder
    from torchfuse.encoders.mllama_tiles import encoder_mask_of_tiles

__all__ = [
    "ClipVisionEncoder",
    "FrameEncoder",
    "HfEncoder",
    "MllamaVisionEncoder",
    "RandomEncoder",
    "build_encoder",
    "clip_vit_l_14_336",
    "encoder_mask_of_tiles",
    "encoder_names",
    "frame_features_mask",
    "hf_encoder",
    "hide_padding",
    "register_encoder",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "ClipVisionEncoder": "clip",
        "HfEncoder": "hf",
        "MllamaVisionEncoder": "mllama",
        "clip_vit_l_14_336": "clip",
        "encoder_mask_of_tiles": "mllama_tiles",
        "hf_encoder": "hf_build",
    },
)
