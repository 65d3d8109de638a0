"""Images must be transformed as the encoder was trained on them."""

import pytest
import torch
from models.architectures import llama_and_clip
from support import text

from torchfuse import fuse
from torchfuse.data.images import ImageTransform
from torchfuse.tasks.runs import check_images

HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
OPENAI = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def test_another_size_mean_or_std_than_the_encoders_is_refused(tmp_path):
    model = fuse(*llama_and_clip(), arch="mot")
    text_of = ", ".join(f'"{key}": {value}' for key, value in OPENAI.items())
    (tmp_path / "preprocessor_config.json").write_text(
        f'{{"size": 12, "crop_size": 12, "do_center_crop": true, {text_of}}}'
    )
    check_images(model, ImageTransform.from_directory(tmp_path), tmp_path)
    with pytest.raises(
        ValueError, match=r"mean is \[0\.5, 0\.5, 0\.5\], the encoder's \[0\.48.*; std is \[0\.5, "
    ):
        check_images(model, ImageTransform(12, **HALF), tmp_path)
    with pytest.raises(ValueError, match="size is 16, the encoder's 12"):
        check_images(model, ImageTransform(16), None)
    with pytest.raises(ValueError, match=r"must|takes|expects|got .*16"):
        model(text(), encoder_input={"images": torch.zeros(2, 3, 16, 16)})
