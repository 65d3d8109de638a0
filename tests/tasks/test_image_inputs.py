"""Images of Llama 3.2 Vision: cut into tiles by its own processor, or whole as one tile."""

import pytest
import torch
from checkpoint.parity import assert_close, random_tokens
from hf import MLLAMA_TEXT, mllama
from pictures import picture
from transformers import MllamaImageProcessorPil

from torchfuse import from_pretrained
from torchfuse.data import padded_collate_images
from torchfuse.data.images import ImageTransform, TiledImageTransform
from torchfuse.errors import ConfigError
from torchfuse.tasks.image_inputs import encode_images, fit_to_encoder
from torchfuse.tasks.runs import check_images

PER_TILE, LENGTH = 10, 23
IMAGES = [[picture(20, 9), picture(9, 31)], [picture(25, 23)]]  # 2, 3 and 4 tiles


@pytest.fixture
def models(tmp_path):
    """A Llama 3.2 Vision of transformers, the same of torchfuse, and its image processor."""
    source = mllama(tmp_path)
    processor = MllamaImageProcessorPil(size={"height": 12, "width": 12}, resample=3)
    processor.save_pretrained(tmp_path)
    with torch.no_grad():
        yield source, from_pretrained(tmp_path).eval(), processor, tmp_path


def batch_of(images, features_of, transform):
    """A batch in which every token may attend to all images of its row."""
    rows = []
    for tokens, row in zip(random_tokens(MLLAMA_TEXT["vocab_size"]), images, strict=True):
        media = [transform.media_input(image) for image in row]
        mask = torch.ones(LENGTH, sum(map(features_of, media)), dtype=torch.bool)
        rows.append({"tokens": tokens, "images": media, "encoder_mask": mask})
    return padded_collate_images(rows)


def test_tiles_of_the_processor_give_the_logits_of_transformers(models):
    source, model, processor, folder = models
    transform = ImageTransform.from_directory(folder)
    check_images(model, transform, folder)
    batch = batch_of(IMAGES, lambda media: PER_TILE * media.num_items, transform)
    inputs = dict(processor(IMAGES, return_tensors="pt"))
    del inputs["num_tiles"]
    valid = inputs["aspect_ratio_mask"] * (inputs["aspect_ratio_ids"] > 0)[..., None]
    assert valid.sum(-1).tolist() == [[2, 3], [4, 0]]
    expected = source(
        input_ids=batch["tokens"],
        cross_attention_mask=valid[:, None].expand(-1, LENGTH, -1, -1),
        **inputs,
    ).logits
    got = model(**fit_to_encoder(model, batch))
    assert_close(got[..., : expected.shape[-1]], expected)
    tokens, mask = batch["tokens"], batch["encoder_mask"]
    embeds = encode_images(model, batch["encoder_input"])
    torch.testing.assert_close(model(tokens, encoder_embeds=embeds, encoder_mask=mask), got)


def test_a_whole_image_is_the_first_tile(models):
    model = models[1]
    whole = batch_of(IMAGES, lambda _: PER_TILE, ImageTransform(12))
    tiles = batch_of(
        IMAGES, lambda _: PER_TILE, TiledImageTransform(12, resample="bicubic", max_tiles=1)
    )
    for one in (whole, tiles):
        one["encoder_input"]["images"] = torch.ones_like(one["encoder_input"]["images"])
    got = model(**fit_to_encoder(model, whole))
    mask = torch.nn.functional.pad(tiles["encoder_mask"].unflatten(2, (-1, PER_TILE)), (0, 3 * PER_TILE))
    expected = model(**{**tiles, "encoder_mask": mask.flatten(2)})
    torch.testing.assert_close(got, expected)
    embeds = encode_images(model, whole["encoder_input"])
    assert embeds.shape[1] == 2 * PER_TILE
    logits = model(whole["tokens"], encoder_embeds=embeds, encoder_mask=whole["encoder_mask"])
    torch.testing.assert_close(logits, expected)


def test_tiles_that_do_not_fit_the_tower_are_refused_at_start(models):
    model = models[1]
    for transform, message in (
        (TiledImageTransform(12, max_tiles=3), "max_tiles is 3, the encoder's 4"),
        (TiledImageTransform(8), "size is 8, the encoder's 12"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_images(model, transform, None)
    check_images(model, ImageTransform(12), None)
    with pytest.raises(ConfigError, match="max_tiles is 4, the encoder's None"):
        TiledImageTransform(12).check(12)
