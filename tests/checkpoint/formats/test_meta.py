"""Meta's own files of Llama 3.2 Vision, with torchtune's converter as the reference."""

import dataclasses
import json
import pickle

import pytest
import torch
from checkpoint.parity import assert_close, assert_same_tensors
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
    tables_of_grids,
    torchfuse_encoder,
    torchfuse_model,
    torchtune_model,
    with_torchtune_epsilons,
)

from torchfuse import from_pretrained, load_pretrained
from torchfuse.checkpoint.formats import Meta, Mllama, meta
from torchfuse.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("no_grad")

HIDDEN = 96  # Meta's rule for the sizes below: 4 * 24 * 2 / 3 = 64, times 1.4 is 89, rounded up to 8s
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


def reference_model():
    """torchtune's model of these sizes."""
    return torchtune_model(intermediate_dim=HIDDEN)


def meta_folder(folder, reference, params=PARAMS, **more):
    """Write the file that torchtune's converter makes of a model, with the buffer that Meta's has too."""
    state = llama3_vision_tune_to_meta(reference.state_dict())
    torch.save(
        {"text_model.rope.freqs": torch.randn(2), **state, **more}, folder / "consolidated.00.pth"
    )
    if params is not None:
        (folder / "params.json").write_text(json.dumps(params))
    return folder


def model_of_metas_sizes(**encoder):
    """A model that Meta's file fits: its weights were trained with tokens padded to multiples of 8."""
    return torchfuse_model(torchfuse_encoder(**{"pad_tokens_to": 8} | encoder), intermediate_dim=HIDDEN)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(autouse=True)
def _tiny_vision(monkeypatch, request):
    if "published" not in request.node.name:
        monkeypatch.setattr(meta, "_VISION", VISION)


@pytest.mark.parametrize("what", ["file", "folder"])
@pytest.mark.parametrize("params", [True, False], ids=["params", "alone"])
def test_a_file_loads_into_a_model(tmp_path, what, params):
    reference, model = reference_model(), model_of_metas_sizes()
    meta_folder(tmp_path, reference, PARAMS if params else None)
    load_pretrained(model, tmp_path / "consolidated.00.pth" if what == "file" else tmp_path)
    assert_same_tensors(model.state_dict(), tables_of_grids(reference.state_dict()))


@pytest.mark.format("Meta's Llama 3.2 Vision file", "in", "every tensor equals torchtune's to the bit")
def test_a_directory_becomes_a_model(tmp_path):
    reference = reference_model()
    model = from_pretrained(meta_folder(tmp_path, reference)).eval()
    assert_same_tensors(model.state_dict(), tables_of_grids(reference.state_dict()))
    converted = llama3_vision_meta_to_tune(torch.load(tmp_path / "consolidated.00.pth"))
    assert_same_tensors(model.state_dict(), tables_of_grids(converted))
    assert model.encoder.pad_tokens_to == 8
    # torchtune's tower has no padding tokens; without them, logits are equal.
    plain = torchfuse_model(intermediate_dim=HIDDEN)
    plain.load_state_dict(model.state_dict())
    tokens, inputs = example([[(2, 2)], [(1, 4)], [(4, 1)]])
    expected = reference(tokens, **inputs)
    assert_close(with_torchtune_epsilons(plain)(tokens, **inputs), expected, atol=1e-5)
    assert_close(model(tokens), reference(tokens), atol=1e-5)
    assert (model(tokens, **inputs) - expected).abs().max() > 1e-3  # the padding tokens matter


def test_settings_are_compared(tmp_path):
    """torchfuse counts states after layers, Meta before them."""
    reference = reference_model()
    meta_folder(tmp_path, reference)
    model = model_of_metas_sizes(intermediate_layers=[1, 3])
    before = state_of(model)
    with pytest.raises(
        CheckpointError, match=r"intermediate_layers_indices \(0, 2\), the model has \(1, 3\)"
    ):
        load_pretrained(model, tmp_path)
    assert_same_tensors(model.state_dict(), before)
    assert from_pretrained(tmp_path).encoder.clip.hidden_layers == [0, 2]
    assert reference.encoder.clip.out_indices == [1, 3]


def test_unexpected_and_missing_keys(tmp_path):
    model = model_of_metas_sizes()
    extra, file = "text_model.layers.6.ffn_norm.weight", tmp_path / "consolidated.00.pth"
    meta_folder(tmp_path, reference_model(), **{extra: torch.ones(24)})
    before = state_of(model)

    def refused(problem):
        for load in (lambda: load_pretrained(model, tmp_path), lambda: from_pretrained(tmp_path)):
            with pytest.raises(CheckpointError, match=problem):
                load()

    refused(r"unexpected: text_model\.layers\.6\.ffn_norm")
    state = torch.load(file)
    del state[extra], state["text_model.cross_attention_layers.1.gate_ffwd"]
    torch.save(state, file)
    refused(r"missing: decoder\.layers\.3\.fusion_layer\.mlp_scale\.scale")
    assert_same_tensors(model.state_dict(), before)


def test_models_in_several_files_are_refused(tmp_path):
    for number in range(2):
        torch.save({"text_model.norm.weight": torch.ones(3)}, tmp_path / f"consolidated.0{number}.pth")
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has 2 files, consolidated\.00\.pth and so on"):
        from_pretrained(tmp_path)


class Hostile:
    """Makes a folder when a reader that trusts the file unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["torch.save", "pickle"])
def test_a_hostile_file_is_refused(tmp_path, kind):
    meta_folder(tmp_path, reference_model())
    file, made = tmp_path / "consolidated.00.pth", tmp_path / "made"
    if kind == "pickle":
        file.write_bytes(pickle.dumps({"text_model.tok_embeddings.weight": Hostile(made)}))
    else:
        torch.save({**torch.load(file), "text_model.more": Hostile(made)}, file)
    model = model_of_metas_sizes()
    before = state_of(model)
    for load in (
        lambda: load_pretrained(model, file),
        lambda: load_pretrained(model, tmp_path),
        lambda: from_pretrained(tmp_path),
    ):
        with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth cannot be read as tensors"):
            load()
    assert not made.exists()
    assert_same_tensors(model.state_dict(), before)
    # A reader that trusts the file does run the code.
    if kind == "pickle":
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert made.exists()


def hugging_face_config(params, side):
    """The configuration of the same model in Hugging Face's format."""
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
def test_published_params_equal_hugging_faces(params, side):
    """All but the intermediate states: both files count before layers, transformers 5.23 after them."""
    got = dataclasses.asdict(Meta.from_config(params | {"vision_chunk_size": side}).model)
    expected = dataclasses.asdict(Mllama.from_config(hugging_face_config(params, side)))
    before = expected["vision"].pop("intermediate_layers")
    assert got["vision"].pop("intermediate_layers") == tuple(layer - 1 for layer in before)
    assert got == expected
    assert got["text"]["num_layers"] == params["n_layers"]
    assert got["fused"] == tuple(range(3, params["n_layers"], 4))


def test_the_published_model_has_torchtunes_parameters():
    from torchtune.models.llama3_2_vision import llama3_2_vision_11b

    with torch.device("meta"):
        model = Meta.from_config(PUBLISHED | {"vision_chunk_size": 560}).build()
        reference = llama3_2_vision_11b(image_size=560)
    shapes = {name: tensor.shape for name, tensor in reference.state_dict().items()}
    grids = [n for n in shapes if "tile_pos_embed.embedding" in n or "global_token" in n]
    for name in grids:  # in torchfuse a table with one row per aspect ratio
        assert shapes[name][:2] == (4, 4)
        shapes[name] = torch.Size((len(RATIOS) + 1, *shapes[name][1:]))
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    tower = reference.encoder.clip
    assert [layer + 1 for layer in model.encoder.clip.hidden_layers] == list(tower.out_indices)


@pytest.mark.parametrize(
    ("changes", "problem"),
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
def test_params_that_are_not_supported(tmp_path, changes, problem):
    params = {name: value for name, value in (PARAMS | changes).items() if value is not None}
    with pytest.raises(CheckpointError, match=problem):
        Meta.from_config(params)
    meta_folder(tmp_path, reference_model(), params)
    with pytest.raises(CheckpointError, match=problem):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("layers", "crossing", "fused"), [(6, 3, FUSED), (7, 3, [0, 3, 6]), (5, 5, [0, 1, 2, 3, 4])]
)
def test_positions_of_cross_attention_layers(layers, crossing, fused):
    """Counted from the last layer, every k-th, k rounded up, as in Meta's code."""
    params = PARAMS | {"n_layers": layers, "vision_num_cross_attention_layers": crossing}
    assert Meta.from_config(params).model.fused == tuple(fused)
    assert NEW == 8  # rows of Meta's learnable embedding, and of the fusion embedding that is built
