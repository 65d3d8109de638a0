"""Pictures of noise, and processor files."""

import json

import numpy as np
from PIL import Image


def picture(width=23, height=17, seed=3):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def write(directory, **config):
    (directory / "preprocessor_config.json").write_text(json.dumps(config))
    return directory
