"""The tower equals transformers' in fp32 within 1e-5, and torchtune's without padding."""

import pytest
import torch
from torch import nn
from torchtune.models.convert_weights import get_mapped_key
from torchtune.models.llama3_2_vision import llama3_2_vision_encoder
from torchtune.models.llama3_2_vision._convert_weights import (
    _FROM_HF,
    llama3_vision_hf_to_tune,
    llama3_vision_tune_to_hf,
)
from transformers import MllamaVisionConfig, MllamaVisionModel
from transformers.models.mllama.modeling_mllama import _prepare_cross_attention_mask

from torchfuse.encoders.mllama import MllamaVisionEncoder
from torchfuse.encoders.mllama_tiles import encoder_mask_of_tiles, grid_to_table, table_to_grid
from torchfuse.params import get_fusion_params

RATIOS = [(1, 1), (1, 2), (1, 3), (2, 1), (3, 1)]
NUMBERS = {
    "image_size": 12,
    "patch_size": 4,
    "embed_dim": 22,
    "num_layers": 5,
    "num_global_layers": 2,
    "num_heads": 2,
    "hidden_dim": 29,
    "decoder_dim": 17,
    "intermediate_layers": [1, 3],
    "max_num_tiles": 3,
    "supported_aspect_ratios": RATIOS,
    "norm_eps": 1e-3,
}
TRANSFORMERS_NAMES = {
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "attention_heads",
    "hidden_dim": "intermediate_size",
    "intermediate_layers": "intermediate_layers_indices",
    "activation": "hidden_act",
    "in_channels": "num_channels",
}
TABLES = [f"clip.{part}_tile_pos_embed.embedding" for part in ("pre", "post")] + [
    "clip.token_pos_embedding.global_token_positional_embedding"
]
# Three rows of two images; the last image of the first row is padding.
IMAGES = [[(1, 3), (0, 0)], [(2, 1), (3, 1)], [(1, 1), (1, 2)]]


@torch.no_grad()
def shake(module):
    """Replace all values by different ones, gates included."""
    for parameter in module.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.8))
    return module.eval()


def transformers_tower(**changes):
    numbers = NUMBERS | changes
    width = numbers["embed_dim"] * (1 + len(numbers["intermediate_layers"]))
    decoder_dim = numbers.pop("decoder_dim")
    numbers["supported_aspect_ratios"] = [list(r) for r in numbers["supported_aspect_ratios"]]
    config = {TRANSFORMERS_NAMES.get(name, name): value for name, value in numbers.items()}
    tower = MllamaVisionModel(MllamaVisionConfig(**config, vision_output_dim=width))
    return shake(tower), shake(nn.Linear(width, decoder_dim))


def pair(**changes):
    """The encoder and transformers' tower with its projector, with the same weights."""
    tower, projector = transformers_tower(**changes)
    encoder = MllamaVisionEncoder(**NUMBERS | changes).eval()
    own = encoder.state_dict()
    source = {f"vision_model.{key}": value for key, value in tower.state_dict().items()}
    source |= {f"multi_modal_projector.{key}": value for key, value in projector.state_dict().items()}
    named = {get_mapped_key(k, _FROM_HF).removeprefix("encoder."): v for k, v in source.items()}
    encoder.load_state_dict({k: v.view(own[k].shape) if k in TABLES else v for k, v in named.items()})
    return encoder, lambda *given: projector(tower(*given).last_hidden_state).flatten(1, 3)


def batch(size=12, rows=IMAGES, tiles=3, channels=3):
    """Pixels, black in padding tiles, aspect ratios, transformers' ids and its mask of tiles."""
    ratio = torch.tensor(rows)
    ids = torch.tensor([[RATIOS.index(r) + 1 if r in RATIOS else 0 for r in row] for row in rows])
    mask = torch.arange(tiles) < ratio.prod(-1, keepdim=True).clamp(min=1)
    images = torch.randn(*ids.shape, tiles, channels, size, size)
    black = ratio.prod(-1)[..., None] <= torch.arange(tiles)
    images[black] = 0
    return images, ratio, ids, mask.long()


def close(got, expected, tolerance=1e-5):
    assert expected.abs().max() > 1  # there is something to compare
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layers", [[1, 3], [4, 0, -2], [2]], ids=str)
@pytest.mark.parametrize("size", [8, 12, 16])  # 5, 10, 17 tokens: never a multiple of 8
@torch.no_grad()
def test_equals_transformers(size, layers):
    encoder, reference = pair(image_size=size, intermediate_layers=layers)
    images, ratio, ids, mask = batch(size)
    expected = reference(images, ids, mask)
    assert expected.shape == (3, 2 * encoder.num_tokens, 17)
    close(encoder(images, ratio), expected)
    close(encoder(images, aspect_ratio_ids=ids), expected)
    close(encoder(images, aspect_ratio_ids=ids, aspect_ratio_mask=mask), expected)
    one = images[:, 1:], ids[:, 1:], mask[:, 1:]
    close(encoder(one[0], ratio[:, 1:]), reference(*one))


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "quick_gelu"},
        {"num_global_layers": 0},
        {"in_channels": 2},
        {"max_num_tiles": 7},
        {"max_num_tiles": 1, "supported_aspect_ratios": [(1, 1)]},
    ],
    ids=str,
)
@torch.no_grad()
def test_equals_transformers_with_other_numbers(changes):
    encoder, reference = pair(**changes)
    tiles = changes.get("max_num_tiles", 3)
    rows = IMAGES if tiles > 1 else [[(1, 1), (0, 0)]]
    images, ratio, ids, mask = batch(rows=rows, tiles=tiles, channels=changes.get("in_channels", 3))
    close(encoder(images, ratio), reference(images, ids, mask))


@torch.no_grad()
def test_masks_of_tiles_equal_transformers():
    encoder, reference = pair()
    images, ratio, ids, mask = batch()
    mask[1, 1], mask[0, 0] = torch.tensor([1, 0, 1]), torch.tensor([0, 1, 0])
    got = encoder(images, ratio, aspect_ratio_mask=mask.bool())
    close(got, reference(images, ids, mask))
    assert (got - encoder(images, ratio)).abs().max() > 0.1


def test_gradients_are_those_of_transformers():
    encoder, reference = pair()
    images, ratio, ids, mask = batch()
    images.requires_grad_()
    weight = torch.randn(3, 2 * encoder.num_tokens, 17)
    (expected,) = torch.autograd.grad((reference(images, ids, mask) * weight).sum(), images)
    (encoder(images, ratio) * weight).sum().backward()
    close(images.grad, expected, 1e-4)
    assert all(p.grad.abs().sum() > 0 for p in encoder.parameters())


@torch.no_grad()
def test_missing_tiles_are_black_padding():
    encoder, _ = pair()
    images, ratio, ids, mask = batch(rows=[[(1, 2), (1, 1)], [(0, 0), (2, 1)]])
    whole = encoder(images, ratio)
    close(encoder(images[:, :, :2], ratio), whole)
    given = {"aspect_ratio_ids": ids, "aspect_ratio_mask": mask[:, :, :2]}
    close(encoder(images[:, :, :2], **given), whole)
    alone = images[:1, 1:, :1]
    close(encoder(alone), encoder(alone, torch.tensor([[[1, 1]]])))


def test_an_image_without_a_tile_is_finite_and_affects_no_other():
    encoder, _ = pair()
    images, ratio, _, mask = batch()
    expected = encoder(images, ratio).detach().unflatten(1, (2, -1))
    mask[0, 1] = 0
    features = encoder(images, ratio, aspect_ratio_mask=mask).unflatten(1, (2, -1))
    assert features.isfinite().all()
    others = torch.ones(3, 2, dtype=torch.bool)
    others[0, 1] = False
    close(features[others], expected[others])
    features.sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


@torch.no_grad()
def test_equals_torchtune_where_nothing_is_padding():
    """Without padding tokens and tiles; torchtune counts hidden states before the layer."""
    reference = shake(
        llama3_2_vision_encoder(
            patch_size=4,
            num_heads=2,
            clip_embed_dim=22,
            clip_num_layers=5,
            clip_hidden_states=[2, 4],
            num_layers_projection=2,
            decoder_embed_dim=17,
            tile_size=12,
            max_num_tiles=3,
        )
    )
    changes = {"hidden_dim": 88, "norm_eps": 1e-5, "pad_tokens_to": 1}
    encoder = MllamaVisionEncoder(**NUMBERS | changes)
    state = reference.state_dict()
    assert list(state) == list(encoder.state_dict())
    encoder.load_state_dict(
        {k: grid_to_table(v, RATIOS, 3) if k in TABLES else v for k, v in state.items()}
    )
    images, ratio, _, _ = batch(rows=[[(1, 3), (3, 1)], [(3, 1), (3, 1)]])
    close(encoder(images, ratio), reference(images, ratio))


def test_fusion_parameters_are_the_projections():
    encoder = MllamaVisionEncoder(**NUMBERS)
    learned = [f"projection.{name}" for name, _ in encoder.projection.named_parameters()]
    assert len(learned) == 2 * 14 + 2  # two gated layers and the output
    assert list(get_fusion_params(encoder)) == learned


def test_attributes_match_the_features():
    encoder = MllamaVisionEncoder(**NUMBERS)
    sizes = encoder.image_size, encoder.feature_dim, encoder.tokens_per_tile, encoder.num_tokens
    assert sizes == (12, 17, 10, 30)
    assert encoder(**encoder.example_input()).shape == (1, 30, 17)
    wide = MllamaVisionEncoder(**NUMBERS | {"supported_aspect_ratios": [(1, 3), (2, 1)]})
    assert wide.example_input()["images"].shape == (1, 1, 2, 3, 12, 12)
    assert wide(**wide.example_input()).shape == (1, 30, 17)


def test_the_published_tower_has_the_parameters_of_transformers():
    config = MllamaVisionConfig(image_size=560)
    with torch.device("meta"):
        reference = MllamaVisionModel(config)
        encoder = MllamaVisionEncoder(
            image_size=560,
            patch_size=14,
            embed_dim=1280,
            num_layers=32,
            num_global_layers=8,
            num_heads=16,
            hidden_dim=5120,
            decoder_dim=4096,
            intermediate_layers=config.intermediate_layers_indices,
            max_num_tiles=4,
            supported_aspect_ratios=config.supported_aspect_ratios,
        )
        projector = nn.Linear(config.vision_output_dim, 4096)
    count = [sum(p.numel() for p in m.parameters()) for m in (encoder, reference, projector)]
    assert count[0] == count[1] + count[2]
    assert encoder.num_tokens == 4 * 1601


@torch.no_grad()
def test_compiles_to_one_graph():
    numbers = NUMBERS | {"num_layers": 2, "num_global_layers": 1, "intermediate_layers": [0]}
    encoder = shake(MllamaVisionEncoder(**numbers))
    images, ratio, ids, mask = batch(rows=[[(1, 2), (0, 0)], [(2, 1), (1, 1)]])
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    close(compiled(images, ratio), encoder(images, ratio))
    given = {"aspect_ratio_ids": ids, "aspect_ratio_mask": mask[:, :, :2]}
    close(compiled(images[:, :, :2], **given), encoder(images[:, :, :2], **given))


def test_bfloat16_and_autocast_are_close_to_fp32():
    encoder, _ = pair()
    images, ratio, _, _ = batch()
    expected = encoder(images, ratio)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = encoder(images, ratio)
    half = encoder.to(torch.bfloat16)(images.bfloat16(), ratio)
    for got in (mixed, half):
        assert got.dtype == torch.bfloat16
        assert (got.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"patch_size": 5}, "patch_size=5 must divide image_size=12"),
        ({"embed_dim": 0, "decoder_dim": -1}, "embed_dim=0 must be at least 1; decoder_dim=-1 must be"),
        ({"num_global_layers": -1}, "num_global_layers=-1 must be at least 0"),
        ({"num_heads": 3}, "num_heads=3 must divide embed_dim=22"),
        ({"activation": "tanh"}, "activation='tanh' must be one of"),
        ({"intermediate_layers": [5, 0, -6]}, r"intermediate_layers \[5, -6\] must lie in \[-5, 5\)"),
        ({"supported_aspect_ratios": [(1, 1), (2, 2)]}, r"ratios \[\(2, 2\)\] must be .* 1 to 3 tiles"),
        ({"supported_aspect_ratios": [(1, 0)]}, r"ratios \[\(1, 0\)\] must be"),
        ({"supported_aspect_ratios": [(1, 2), (1, 2)]}, "must all be different"),
        ({"supported_aspect_ratios": []}, "at least one aspect ratio"),
        ({"patch_size": 5, "num_heads": 3}, "image_size=12; num_heads=3"),
    ],
    ids=str,
)
def test_numbers_that_do_not_fit_are_named(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        MllamaVisionEncoder(**NUMBERS | changes)


@pytest.mark.parametrize(
    "shape",
    [(1, 2, 3, 3, 12, 13), (1, 2, 3, 4, 12, 12), (2, 3, 3, 12, 12), (1, 2, 4, 3, 12, 12)],
    ids=str,
)
def test_images_of_another_shape_are_named(shape):
    complaint = r"takes images \[b, m, t, 3, 12, 12\] with t from 1 to 3 tiles"
    with pytest.raises(ValueError, match=complaint):
        MllamaVisionEncoder(**NUMBERS)(torch.zeros(shape), torch.ones(1, 2, 2, dtype=torch.long))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({}, "give aspect_ratio .* 2 tiles are ambiguous"),
        ({"aspect_ratio": [[[1, 1]]]}, r"aspect_ratio must have shape \[1, 2, 2\], got \[1, 1, 2\]"),
        ({"aspect_ratio_ids": [[1]]}, r"aspect_ratio_ids must have shape \[1, 2\], got \[1, 1\]"),
        (
            {"aspect_ratio_ids": [[1, 1]], "aspect_ratio_mask": [[[1], [1]]]},
            r"mask must have shape \[1, 2, 2\]",
        ),
        ({"aspect_ratio_ids": [[1, 1]], "aspect_ratio": [[[1, 1], [1, 2]]]}, "mean the same; give one"),
        ({"aspect_ratio": [[[1, 1], [2, 2]]]}, r"\[\[2, 2\]\] among the given, but supported are"),
        ({"aspect_ratio": [[[0, 1], [1, 1]]]}, r"\[\[0, 1\]\] among the given, but supported are"),
        (
            {"aspect_ratio_ids": [[6, -1]]},
            r"\[6, -1\] among the given, but supported are the ids 0 to 5",
        ),
        ({"aspect_ratio": [[[1, 1], [3, 1]]]}, r"\[3\] tiles an image, but images has 2"),
    ],
    ids=str,
)
def test_aspect_ratios_that_do_not_fit_are_named(given, complaint):
    given = {name: torch.tensor(value) for name, value in given.items()}
    with pytest.raises(ValueError, match=complaint):
        MllamaVisionEncoder(**NUMBERS)(torch.zeros(1, 2, 2, 3, 12, 12), **given)


FOUR = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
KEYS = [f"encoder.{key}" for key in TABLES]
CONVERT = {"encoder_dim": 5, "num_tiles": 4, "supported_aspect_ratios": FOUR}


def grid_of(ratios, tiles, tokens):
    """A random grid, zero where no aspect ratio reaches."""
    reached = torch.zeros(tiles, tiles, 1, 1)
    for h, w in ratios:
        reached[:h, :w] = 1
    return torch.randn(tiles, tiles, tokens, 5) * reached


@pytest.mark.parametrize("tokens", [1, 3])
def test_tables_and_grids_equal_torchtunes_converters(tokens):
    grid = grid_of(FOUR, 4, tokens)
    layer = {"encoder.clip.layers.0.sa_norm.weight": torch.ones(1)}
    converted = llama3_vision_tune_to_hf(dict.fromkeys(KEYS, grid) | layer, **CONVERT)
    table = grid_to_table(grid, FOUR, 4)
    for key, value in converted.items():
        if "embedding" in key:
            assert torch.equal(value.view(9, 4, tokens, 5), table)
    back = llama3_vision_hf_to_tune(converted, **CONVERT)
    for key in KEYS:
        assert torch.equal(back[key], table_to_grid(table, FOUR))
    assert torch.equal(table_to_grid(table, FOUR), grid)


def test_a_grid_of_ratios_that_fill_no_canvas_loses_nothing():
    ratios = [(1, 2), (2, 1), (1, 1)]  # of up to three tiles; torchtune drops all of these
    grid = grid_of(ratios, 3, 2)
    assert torch.equal(table_to_grid(grid_to_table(grid, ratios, 3), ratios), grid)


@pytest.mark.parametrize(
    ("where", "rows"),
    [((0, 2), r"\[0\]"), ((2, 2), r"\[2\]"), ((1, 0), r"\[1\]"), ((5, 0), r"\[1, 2, 3, 4\]")],
    ids=["padding image", "padding tile", "shared tile", "shared tile of the last"],
)
def test_tables_that_a_grid_cannot_hold_are_refused(where, rows):
    table = grid_to_table(grid_of(RATIOS, 3, 2), RATIOS, 3)
    table[where] += 1
    with pytest.raises(ValueError, match=f"cannot hold rows {rows} of this table"):
        table_to_grid(table, RATIOS)


@pytest.mark.parametrize(
    ("grid", "ratios", "tiles", "complaint"),
    [
        ((3, 2, 1, 5), RATIOS, 3, r"must be \[t, t, n, d\], got \[3, 2, 1, 5\]"),
        ((2, 2, 1, 5), RATIOS, 3, "a grid of 2 x 2 tiles is too small"),
        ((3, 3, 1, 5), RATIOS, 2, r"\[\(1, 3\), \(3, 1\)\] must be \(h, w\) with 1 to 2 tiles"),
    ],
)
def test_grids_that_do_not_fit_are_named(grid, ratios, tiles, complaint):
    with pytest.raises(ValueError, match=complaint):
        grid_to_table(torch.zeros(grid), ratios, tiles)


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ((5, 3, 1, 5), r"must be \[6, t, n, d\], got \[5, 3, 1, 5\]"),
        ((6, 15), r"must be \[6, t, n, d\], got \[6, 15\]"),
        ((6, 2, 1, 5), r"with 1 to 2 tiles"),
    ],
)
def test_tables_that_do_not_fit_are_named(table, complaint):
    with pytest.raises(ValueError, match=complaint):
        table_to_grid(torch.zeros(table), RATIOS)


def test_the_encoder_mask_of_tiles_equals_transformers():
    tiles = torch.rand(2, 7, 3, 4) > 0.6
    tiles[0, 2] = tiles[1, 5] = False
    mask, rows = _prepare_cross_attention_mask(tiles.float(), 5, torch.float32)
    expected = (mask == 0)[:, 0] & (rows != 0)[
        :, 0
    ]  # in the reference rows that attend to nothing attend to all
    for given in (tiles, tiles.long()):
        got = encoder_mask_of_tiles(given, 5)
        assert got.dtype == torch.bool and torch.equal(got, expected)
    padded = encoder_mask_of_tiles(tiles[..., :3], 5, max_num_tiles=4)
    assert torch.equal(padded, encoder_mask_of_tiles(tiles & (torch.arange(4) < 3), 5))


@pytest.mark.parametrize(("shape", "tiles"), [((2, 7, 12), None), ((2, 7, 3, 4), 3)])
def test_masks_of_tiles_that_do_not_fit_are_named(shape, tiles):
    with pytest.raises(ValueError, match=r"cross_attention_mask must be \[b, s, m, t\]"):
        encoder_mask_of_tiles(torch.ones(shape), 5, tiles)


@pytest.mark.gpu
@torch.no_grad()
def test_does_not_synchronise_with_the_device():
    encoder, _ = pair()
    images, ratio, ids, mask = batch()
    expected = encoder(images, ratio)
    encoder, images, ratio, ids, mask = (x.cuda() for x in (encoder, images, ratio, ids, mask))
    encoder(images, ratio)  # the first call of a library synchronises
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = [encoder(images, ratio), encoder(images, aspect_ratio_ids=ids, aspect_ratio_mask=mask)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for features in got:
        torch.testing.assert_close(features.cpu(), expected, rtol=1e-4, atol=1e-4)
