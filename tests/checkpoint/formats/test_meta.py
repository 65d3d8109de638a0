"""Meta's own files of Llama 3.2 Vision, with torchtune's converter as the reference."""

import dataclasses
import json
import pickle

import pytest
import torch
from torchtune.models.llama3_2_vision._convert_weights import (
    llama3_vision_meta_to_tune,
    llama3_vision_tune_to_meta,
)
from torchtune_models import (
    FUSED,
    NEW,
    RATIOS,
    VOCAB,
    example,
    torchfuse_encoder,
    torchfuse_model,
    torchtune_model,
    with_torchtune_epsilons,
)

from torchfuse import load_pretrained
from torchfuse.checkpoint.formats import meta
from torchfuse.checkpoint.formats.meta import Meta
from torchfuse.checkpoint.formats.mllama import Mllama
from torchfuse.checkpoint.load import from_pretrained
from torchfuse.encoders.mllama_tiles import grid_to_table

HIDDEN = 96  # Meta's rule for the numbers below: 4 * 24 * 2 / 3 = 64, times 1.4 is 89, up to eights
PARAMS = {
    "dim": 24,
    "n_layers": 6,
    "n_heads": 6,
    "n_kv_heads": 2,
    "ffn_dim_multiplier": 1.4,
    "multiple_of": 8,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "vision_chunk_size": 12,
    "vision_max_num_chunks": 4,
    "vision_num_cross_attention_layers": 3,
    "vocab_size": VOCAB,
}
VISION = {
    "patch_size": 4,
    "hidden_size": 20,
    "num_hidden_layers": 5,
    "num_global_layers": 2,
    "intermediate_size": 80,
    "attention_heads": 5,
    "intermediate_layers_indices": [0, 2],
}
PUBLISHED = {
    "dim": 4096,
    "ffn_dim_multiplier": 1.3,
    "multiple_of": 1024,
    "n_heads": 32,
    "n_kv_heads": 8,
    "n_layers": 32,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "vision_chunk_size": 448,
    "vision_max_num_chunks": 4,
    "vision_num_cross_attention_layers": 8,
    "vocab_size": 128256,
}
LARGE = PUBLISHED | {
    "dim": 8192,
    "multiple_of": 4096,
    "n_heads": 64,
    "n_layers": 80,
    "vision_num_cross_attention_layers": 20,
}


def meta_model():
    """torchtune's model of these sizes."""
    return torchtune_model(intermediate_dim=HIDDEN)


def meta_folder(folder, theirs, params=PARAMS, **more):
    """The file that torchtune's converter makes of a model, with what Meta's has besides."""
    state = {"text_model.rope.freqs": torch.randn(2), **llama3_vision_tune_to_meta(theirs.state_dict())}
    torch.save(state | more, folder / "consolidated.00.pth")
    if params is not None:
        (folder / "params.json").write_text(json.dumps(params))
    return folder


def expected_of(theirs):
    expected = dict(theirs.state_dict())
    for name, tensor in expected.items():
        if "tile_pos_embed.embedding" in name or "global_token" in name:
            expected[name] = grid_to_table(tensor, RATIOS, 4)
    return expected


def same(got, expected):
    assert set(got) == set(expected)
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


def our_sizes(**encoder):
    """What Meta's file fits: the weights were trained with tokens padded to eights."""
    return torchfuse_model(torchfuse_encoder(**{"pad_tokens_to": 8} | encoder), intermediate_dim=HIDDEN)


@pytest.fixture
def tiny_vision(monkeypatch):
    monkeypatch.setattr(meta, "_VISION", VISION)


@pytest.mark.parametrize("what", ["file", "folder"])
@pytest.mark.parametrize("params", [True, False], ids=["params", "alone"])
@torch.no_grad()
def test_a_file_loads_into_a_model(tmp_path, tiny_vision, what, params):
    theirs, ours = meta_model(), our_sizes()
    meta_folder(tmp_path, theirs, PARAMS if params else None)
    load_pretrained(ours, tmp_path / "consolidated.00.pth" if what == "file" else tmp_path)
    same(ours.state_dict(), expected_of(theirs))


@pytest.mark.format("Meta's Llama 3.2 Vision file", "in", "every tensor equals torchtune's to the bit")
@torch.no_grad()
def test_a_directory_becomes_a_model(tmp_path, tiny_vision):
    theirs = meta_model()
    model = from_pretrained(meta_folder(tmp_path, theirs)).eval()
    same(model.state_dict(), expected_of(theirs))
    assert model.encoder.pad_tokens_to == 8
    # torchtune's tower has no padding tokens; with as few here, the numbers are its own.
    plain = torchfuse_model(intermediate_dim=HIDDEN)
    plain.load_state_dict(model.state_dict())
    tokens, beside = example([[(2, 2)], [(1, 4)], [(4, 1)]])
    expected = theirs(tokens, **beside)
    torch.testing.assert_close(
        with_torchtune_epsilons(plain)(tokens, **beside), expected, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(model(tokens), theirs(tokens), rtol=0, atol=1e-5)
    assert (model(tokens, **beside) - expected).abs().max() > 1e-3  # the padding tokens count


@torch.no_grad()
def test_torchtunes_reader_makes_the_same_of_a_file(tmp_path, tiny_vision):
    meta_folder(tmp_path, meta_model())
    state = torch.load(tmp_path / "consolidated.00.pth")
    theirs = meta_model()
    theirs.load_state_dict(llama3_vision_meta_to_tune(state), strict=True)
    same(from_pretrained(tmp_path).state_dict(), expected_of(theirs))


def test_settings_are_compared_where_params_are_there(tmp_path, tiny_vision):
    """Layers are counted from behind here and from before there."""
    theirs = meta_model()
    meta_folder(tmp_path, theirs)
    wrong = our_sizes(intermediate_layers=[1, 3])
    before = {name: tensor.clone() for name, tensor in wrong.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"intermediate_layers_indices \(0, 2\), the model has \(1, 3\)"
    ):
        load_pretrained(wrong, tmp_path)
    same(wrong.state_dict(), before)
    assert from_pretrained(tmp_path).encoder.clip.hidden_layers == [0, 2]
    assert theirs.encoder.clip.out_indices == [1, 3]


def test_a_name_too_many_or_too_few_is_refused(tmp_path, tiny_vision):
    theirs, ours = meta_model(), our_sizes()
    meta_folder(tmp_path, theirs, **{"text_model.layers.6.ffn_norm.weight": torch.ones(24)})
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    for load in (lambda: load_pretrained(ours, tmp_path), lambda: from_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=r"unexpected: text_model\.layers\.6\.ffn_norm"):
            load()
    state = torch.load(tmp_path / "consolidated.00.pth")
    del (
        state["text_model.layers.6.ffn_norm.weight"],
        state["text_model.cross_attention_layers.1.gate_ffwd"],
    )
    torch.save(state, tmp_path / "consolidated.00.pth")
    for load in (lambda: load_pretrained(ours, tmp_path), lambda: from_pretrained(tmp_path)):
        with pytest.raises(
            ValueError, match=r"missing: decoder\.layers\.3\.fusion_layer\.mlp_scale\.scale"
        ):
            load()
    same(ours.state_dict(), before)


class Hostile:
    """Unpickled by anything that trusts it, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["torch.save", "pickle"])
def test_a_hostile_file_is_refused(tmp_path, tiny_vision, kind):
    meta_folder(tmp_path, meta_model())
    file, made = tmp_path / "consolidated.00.pth", tmp_path / "made"
    if kind == "pickle":
        file.write_bytes(pickle.dumps({"text_model.tok_embeddings.weight": Hostile(made)}))
    else:
        torch.save({**torch.load(file), "text_model.more": Hostile(made)}, file)
    ours = our_sizes()
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    for load in (
        lambda: load_pretrained(ours, file),
        lambda: load_pretrained(ours, tmp_path),
        lambda: from_pretrained(tmp_path),
    ):
        with pytest.raises(ValueError, match=r"consolidated\.00\.pth cannot be read as tensors"):
            load()
    assert not made.exists()
    same(ours.state_dict(), before)
    # The attack is one: whoever trusts the file is caught.
    if kind == "pickle":
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert made.exists()


def hugging_face(params, side):
    """The configuration of the same model as Hugging Face has it."""
    large = params["n_layers"] == 80
    crossing = list(range(3, 100 if large else 40, 5))
    assert len(crossing) == params["vision_num_cross_attention_layers"]
    return {
        "model_type": "mllama",
        "image_token_index": 128256,
        "text_config": {
            "model_type": "mllama_text_model",
            "cross_attention_layers": crossing,
            "hidden_size": 8192 if large else 4096,
            "intermediate_size": 28672 if large else 14336,
            "max_position_embeddings": 131072,
            "num_attention_heads": 64 if large else 32,
            "num_hidden_layers": 100 if large else 40,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "vocab_size": 128256,
        },
        "vision_config": {
            "model_type": "mllama_vision_model",
            "attention_heads": 16,
            "hidden_act": "gelu",
            "hidden_size": 1280,
            "image_size": side,
            "intermediate_layers_indices": [3, 7, 15, 23, 30],
            "intermediate_size": 5120,
            "max_num_tiles": 4,
            "norm_eps": 1e-05,
            "num_channels": 3,
            "num_global_layers": 8,
            "num_hidden_layers": 32,
            "patch_size": 14,
            "supported_aspect_ratios": [list(ratio) for ratio in RATIOS],
            "vision_output_dim": 7680,
        },
    }


@pytest.mark.format(
    "Meta's Llama 3.2 Vision file", "in", "settings of the published 11B and 90B equal Hugging Face's"
)
@pytest.mark.parametrize("side", [448, 560])
@pytest.mark.parametrize("params", [PUBLISHED, LARGE], ids=["11B", "90B"])
def test_published_params_say_what_hugging_face_says(params, side):
    """All but the intermediate layers, which both count from before and transformers 5.23 from behind."""
    ours = dataclasses.asdict(Meta.from_config(params | {"vision_chunk_size": side}).model)
    theirs = dataclasses.asdict(Mllama.from_config(hugging_face(params, side)))
    before = theirs["vision"].pop("intermediate_layers")
    assert ours["vision"].pop("intermediate_layers") == tuple(layer - 1 for layer in before)
    assert ours == theirs
    assert ours["text"]["num_layers"] == params["n_layers"]
    assert ours["fused"] == tuple(range(3, params["n_layers"], 4))


def test_the_published_model_has_the_parameters_of_torchtunes():
    from torchtune.models.llama3_2_vision import llama3_2_vision_11b

    with torch.device("meta"):
        ours = Meta.from_config(PUBLISHED | {"vision_chunk_size": 560}).build()
        theirs = llama3_2_vision_11b(image_size=560)
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    grids = [n for n in shapes if "tile_pos_embed.embedding" in n or "global_token" in n]
    for name in grids:  # a row an aspect ratio
        assert shapes[name][:2] == (4, 4)
        shapes[name] = torch.Size((len(RATIOS) + 1, *shapes[name][1:]))
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == shapes
    tower = theirs.encoder.clip
    assert [layer + 1 for layer in ours.encoder.clip.hidden_layers] == list(tower.out_indices)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"dim": None, "n_layers": "six"},
            "n_layers must be a whole number .* got 'six'; dim is missing",
        ),
        ({"vision_num_cross_attention_layers": 7}, "7 cross-attention layers are more than 6 layers"),
        ({"vision_chunk_size": -1}, "vision_chunk_size must be a whole number of at least 1, got -1"),
        ({"ffn_dim_multiplier": 0}, "ffn_dim_multiplier must be a number above 0, got 0"),
        ({"use_scaled_rope": 1}, "use_scaled_rope must be true or false, got 1"),
        ({"n_kv_heads": 4}, "num_key_value_heads=4 must divide num_attention_heads=6"),
    ],
    ids=str,
)
def test_params_that_cannot_be_are_named(tmp_path, tiny_vision, changes, complaint):
    params = {name: value for name, value in (PARAMS | changes).items() if value is not None}
    with pytest.raises(ValueError, match=complaint):
        Meta.from_config(params)
    if "n_layers" in params:
        meta_folder(tmp_path, meta_model(), params)
        with pytest.raises(ValueError, match=complaint):
            from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("layers", "crossing", "fused"), [(6, 3, FUSED), (7, 3, [0, 3, 6]), (5, 5, [0, 1, 2, 3, 4])]
)
def test_cross_attention_is_spread_as_meta_spreads_it(tiny_vision, layers, crossing, fused):
    """Counted from the last layer, every k-th, k rounded up."""
    params = PARAMS | {"n_layers": layers, "vision_num_cross_attention_layers": crossing}
    assert Meta.from_config(params).model.fused == tuple(fused)
    assert NEW == 8  # Meta's learnable embedding has as many rows, and so has what is built
