import pytest
import torch

from torchfuse.encoders.clip import ClipVisionEncoder, clip_vit_l_14_336

NUMBERS = {"image_size": 12, "patch_size": 4, "embed_dim": 10, "num_layers": 3, "num_heads": 5}


def test_attributes_match_the_features():
    for keep_cls, tokens in ((False, 9), (True, 10)):
        encoder = ClipVisionEncoder(**NUMBERS, keep_cls=keep_cls)
        assert (encoder.num_tokens, encoder.feature_dim, encoder.image_size) == (tokens, 10, 12)
        assert encoder(torch.randn(2, 3, 3, 12, 12)).shape == (2, 3 * tokens, 10)
        assert encoder(**encoder.example_input()).shape == (1, tokens, 10)


def test_images_of_a_row_are_independent():
    encoder = ClipVisionEncoder(**NUMBERS)
    images = torch.randn(2, 3, 3, 12, 12)
    rows = encoder(images).view(2, 3, 9, 10)
    torch.testing.assert_close(rows[1, 2], encoder(images[1, 2:])[0], rtol=1e-5, atol=1e-6)


def test_layers_after_the_features_do_not_run():
    encoder = ClipVisionEncoder(**NUMBERS, feature_layer=1)
    ran = []
    for index, layer in enumerate(encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    encoder(torch.randn(1, 3, 12, 12))
    assert ran == [0]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"patch_size": 5}, "patch_size=5 must divide image_size=12"),
        ({"patch_size": 0}, "patch_size=0 must divide"),
        ({"embed_dim": 0, "hidden_dim": -1}, "embed_dim=0 must be at least 1; hidden_dim=-1 must be"),
        ({"num_heads": 3}, "num_heads=3 must divide embed_dim=10"),
        ({"activation": "tanh"}, "activation='tanh' must be one of quick_gelu, gelu"),
        ({"feature_layer": 4}, "feature_layer=4 must lie between -4 and 3"),
        ({"patch_size": 5, "num_heads": 3}, "image_size=12; num_heads=3"),
    ],
    ids=str,
)
def test_numbers_that_do_not_fit_are_named(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        ClipVisionEncoder(**NUMBERS | changes)


@pytest.mark.parametrize("shape", [(1, 3, 12, 13), (1, 4, 12, 12), (3, 12, 12), (1, 1, 1, 3, 12, 12)])
def test_images_of_another_size_are_named(shape):
    with pytest.raises(ValueError, match=r"takes images \[b, 3, 12, 12\]"):
        ClipVisionEncoder(**NUMBERS)(torch.zeros(shape))


def test_the_large_tower_has_openais_sizes():
    with torch.device("meta"):
        encoder = clip_vit_l_14_336()
    assert sum(p.numel() for p in encoder.parameters()) == 303_507_456  # as transformers counts it
    assert (encoder.num_tokens, encoder.feature_dim, encoder.num_hidden) == (576, 1024, 23)
