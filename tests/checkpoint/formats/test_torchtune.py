"""torchtune 0.6.1's own fused models and checkpoints: the same numbers here, and back again there."""

import copy
import json
import re

import pytest
import torch
from hf import mllama
from safetensors.torch import load_file, save_file
from support import IMAGE, tiny_decoder
from torch import nn
from torchtune.modules import delete_kv_caches, model_fusion
from torchtune.training import FullModelHFCheckpointer, FullModelTorchTuneCheckpointer
from torchtune_models import (
    FUSED,
    NEW,
    RATIOS,
    VOCAB,
    WIDTH,
    example,
    shake,
    torchfuse_decoder,
    torchfuse_encoder,
    torchfuse_model,
    torchtune_decoder,
    torchtune_encoder,
    torchtune_model,
    with_torchtune_epsilons,
)

from torchfuse import DeepFusionModel, EarlyFusionModel, export, fuse, load_pretrained
from torchfuse.checkpoint.load import from_pretrained
from torchfuse.encoders.clip import ClipVisionEncoder
from torchfuse.encoders.mllama_tiles import grid_to_table

ANY_TILES = [[(2, 2), (1, 4)], [(1, 1), (3, 1)], [(2, 1), (2, 2)]]
NO_PADDING = [[(2, 2), (1, 4)], [(4, 1), (1, 4)], [(2, 2), (4, 1)]]  # what torchtune pads is seen there
TABLES = [f"encoder.clip.{part}_tile_pos_embed.embedding" for part in ("pre", "post")] + [
    "encoder.clip.token_pos_embedding.global_token_positional_embedding"
]


def close(got, expected):
    assert expected.abs().max() > 1  # there is something to compare
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def same(got, expected):
    """The same names with the same values, to the bit."""
    assert set(got) == set(expected)
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


def their_file(folder, model, suffix=".bin"):
    """What torchtune's own checkpointer writes; with ``.pt`` what it is given."""
    (folder / "base").mkdir()
    torch.save(model.state_dict(), folder / "base" / "model.pt")
    if suffix == ".pt":
        return folder / "base" / "model.pt"
    reader = their_reader(folder / "base", "model.pt", folder / "out")
    reader.save_checkpoint({"model": model.state_dict()}, epoch=3)
    (file,) = (folder / "out" / "epoch_3").glob("*.bin")
    return file


def their_reader(folder, file, out):
    return FullModelTorchTuneCheckpointer(
        checkpoint_dir=str(folder),
        checkpoint_files=[file],
        model_type="LLAMA3_VISION",
        output_dir=str(out),
    )


def ours_around(parts):
    """Our model with torchtune's tower: around a plain decoder, or around their fused one."""
    if parts == "plain":
        return with_torchtune_epsilons(torchfuse_model(torchtune_encoder()))
    return DeepFusionModel(torchtune_decoder(), torchtune_encoder()).eval()


@pytest.mark.format(
    "torchtune DeepFusionModel",
    "in and out",
    "state dicts load strictly; logits within 1e-5 in fp32, cached too",
)
@pytest.mark.parametrize("parts", ["plain", "theirs"])
@torch.no_grad()
def test_state_dicts_go_both_ways(parts):
    theirs, ours = torchtune_model(), ours_around(parts)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    ours.load_state_dict(theirs.state_dict(), strict=True)
    tokens, beside = example(ANY_TILES)
    expected = theirs(tokens, **beside)
    close(ours(tokens, **beside), expected)
    close(
        ours(tokens, encoder_input=beside["encoder_input"]),
        theirs(tokens, encoder_input=beside["encoder_input"]),
    )
    close(ours(tokens), theirs(tokens))
    assert (theirs(tokens) - expected).abs().max() > 0.5  # the images matter
    other = model_fusion.DeepFusionModel(torchtune_decoder(), torchtune_encoder()).eval()
    other.load_state_dict(before, strict=True)
    ours.load_state_dict(before, strict=True)
    got = other(tokens, **beside)
    close(got, ours(tokens, **beside))
    assert (got - expected).abs().max() > 0.5


@torch.no_grad()
def decoded_with_caches(model, tokens, beside, num_features):
    """The prompt with its images, then one token a step that finds them in the cache."""
    b, s = tokens.shape
    model.setup_caches(b, torch.float32, encoder_max_seq_len=num_features, decoder_max_seq_len=s + 4)
    causal = torch.ones(s, s + 4, dtype=torch.bool).tril().expand(b, -1, -1)
    seen = beside["encoder_mask"]
    pieces = [
        model(
            tokens[:, :7],
            encoder_input=beside["encoder_input"],
            encoder_mask=seen[:, :7],
            mask=causal[:, :7],
            input_pos=torch.arange(7),
        )
    ]
    for at in range(7, s):
        step = {"mask": causal[:, at : at + 1], "input_pos": torch.tensor([at])}
        pieces.append(model(tokens[:, at : at + 1], encoder_mask=seen[:, at : at + 1], **step))
    delete_kv_caches(model)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("parts", ["plain", "theirs"])
def test_cached_decoding_is_theirs(parts):
    theirs, ours = torchtune_model(), ours_around(parts)
    ours.load_state_dict(theirs.state_dict())
    tokens, beside = example(ANY_TILES)
    num_features = beside["encoder_mask"].shape[-1]
    expected = decoded_with_caches(theirs, tokens, beside, num_features)
    close(decoded_with_caches(ours, tokens, beside, num_features), expected)
    with torch.no_grad():
        close(expected, ours(tokens, **beside))


@torch.no_grad()
def test_their_epsilons_show_where_states_are_small():
    """Why the two norms of a fused layer are set by hand here."""
    theirs, ours = torchtune_model(), torchfuse_model(torchtune_encoder())
    state = theirs.state_dict()
    for name in (
        "tok_embeddings",
        "tok_embeddings.fusion_embedding",
        "layers.0.attn.output_proj",
        "layers.0.mlp.w2",
    ):
        state[f"decoder.{name}.weight"].mul_(0.01)
    state["decoder.layers.1.fusion_layer.ca_scale.scale"].mul_(0.001)
    ours.load_state_dict(state)
    tokens, beside = example(ANY_TILES)
    expected = theirs(tokens, **beside)
    assert (ours(tokens, **beside) - expected).abs().max() > 1e-4
    close(with_torchtune_epsilons(ours)(tokens, **beside), expected)


@pytest.mark.format(
    "torchtune DeepFusionModel", "in", "files of its checkpointers (.bin, .pt); logits within 1e-5"
)
@pytest.mark.parametrize("suffix", [".bin", ".pt"])
@pytest.mark.parametrize("tower", ["theirs", "ours"])
@torch.no_grad()
def test_their_files_load(tmp_path, tower, suffix):
    theirs = torchtune_model()
    file = their_file(tmp_path, theirs, suffix)
    ours = torchfuse_model(torchtune_encoder() if tower == "theirs" else None)
    load_pretrained(ours, file)
    expected = dict(theirs.state_dict())
    if tower == "ours":
        expected |= {name: grid_to_table(expected[name], RATIOS, 4) for name in TABLES}
    same(ours.state_dict(), expected)
    tokens, beside = example(NO_PADDING)
    close(with_torchtune_epsilons(ours)(tokens, **beside), theirs(tokens, **beside))


def test_a_file_that_does_not_fit_is_refused_whole(tmp_path):
    file = their_file(tmp_path, torchtune_model(embed_dim=WIDTH, intermediate_dim=43), ".pt")
    ours = torchfuse_model()
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.w1\.weight is \[43, 24\].* is \[41, 24\]"):
        load_pretrained(ours, file)
    same(ours.state_dict(), before)
    with pytest.raises(ValueError, match="there is no configuration of the model: build it"):
        from_pretrained(file)


def a_model_that_a_grid_can_hold(folder):
    """All random, and with the embeddings of tiles of a grid."""
    model = torchfuse_model()
    folder.mkdir()
    load_pretrained(model, their_file(folder, torchtune_model(), ".pt"))
    return model


@pytest.mark.format(
    "torchtune DeepFusionModel",
    "out",
    "its own checkpointer reads it; logits within 1e-5; read back to the bit",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_an_export_is_read_there_and_here(tmp_path, dtype):
    ours = a_model_that_a_grid_can_hold(tmp_path / "from").to(dtype)
    export(ours, tmp_path / "export", format="torchtune")
    reader = their_reader(tmp_path / "export", "model.safetensors", tmp_path / "out")
    state = reader.load_checkpoint()["model"]
    assert {tensor.dtype for tensor in state.values()} == {dtype}
    theirs = torchtune_model()
    theirs.load_state_dict(state, strict=True)
    again = from_pretrained(tmp_path / "export").eval()
    same(again.state_dict(), ours.state_dict())
    tokens, beside = example(NO_PADDING)
    if dtype == torch.float32:
        close(theirs(tokens, **beside), with_torchtune_epsilons(ours)(tokens, **beside))
        assert torch.equal(with_torchtune_epsilons(again)(tokens, **beside), ours(tokens, **beside))
    # torchtune trains, saves, and copies what stood beside.
    reader.save_checkpoint({"model": shake(theirs).state_dict()}, epoch=5)
    (file,) = (tmp_path / "out" / "epoch_5").glob("*.bin")
    expected = {name: tensor.to(dtype) for name, tensor in theirs.state_dict().items()}
    expected |= {name: grid_to_table(expected[name], RATIOS, 4) for name in TABLES}
    trained = from_pretrained(file, dtype=dtype)
    same(trained.state_dict(), expected)


@torch.no_grad()
def test_parts_that_no_config_describes_go_out_and_in(tmp_path):
    """torchtune's tower, and its epsilons: names are all that is needed, once the model is built."""
    ours = ours_around("plain")
    shake(ours)
    export(ours, tmp_path / "export", format="torchtune")
    same(load_file(tmp_path / "export" / "model.safetensors"), ours.state_dict())
    theirs = torchtune_model()
    theirs.load_state_dict(load_file(tmp_path / "export" / "model.safetensors"), strict=True)
    tokens, beside = example(ANY_TILES)
    close(theirs(tokens, **beside), ours(tokens, **beside))
    again = ours_around("plain")
    load_pretrained(again, tmp_path / "export")
    same(again.state_dict(), ours.state_dict())
    with pytest.raises(ValueError, match="does not describe the model: build it, and give it to load"):
        from_pretrained(tmp_path / "export")


def test_a_described_export_loads_into_parts_that_are_not(tmp_path):
    ours = a_model_that_a_grid_can_hold(tmp_path / "from")
    export(ours, tmp_path / "export", format="torchtune")
    other = torchfuse_model(torchtune_encoder())
    load_pretrained(other, tmp_path / "export")
    same(other.state_dict(), load_file(tmp_path / "export" / "model.safetensors"))


def test_settings_that_differ_from_the_export_are_named(tmp_path):
    ours = a_model_that_a_grid_can_hold(tmp_path / "from")
    export(ours, tmp_path / "export", format="torchtune")
    other = fuse(
        torchfuse_decoder(num_heads=3, num_kv_heads=1),
        torchfuse_encoder(intermediate_layers=[1, 2]),
        adapter=None,
        layers=FUSED,
        fusion_vocab_size=NEW,
    )
    with pytest.raises(
        ValueError, match=r"head_dim 4, the model has 8(.|\n)*intermediate_layers_indices"
    ):
        load_pretrained(other, tmp_path / "export")


class Towers:
    """Two encoders in front of a decoder; the second is Llama 3.2 Vision's."""

    tokens = {"image": IMAGE, "tiles": IMAGE + 2}

    @staticmethod
    def clip():
        numbers = {"image_size": 12, "patch_size": 4, "embed_dim": 18, "num_layers": 3, "num_heads": 2}
        return shake(ClipVisionEncoder(**numbers, keep_cls=True))

    @staticmethod
    def plain():
        return shake(nn.Sequential(nn.Linear(5, 11), nn.Linear(11, 18)))


def early(cls, encoders, decoder=None):
    decoder = shake(tiny_decoder()) if decoder is None else decoder
    return cls(decoder, encoders, dict(list(Towers.tokens.items())[: len(encoders)])).eval()


def early_example():
    """Ten features an image, and four tokens of what else there is."""
    tokens = torch.randint(0, VOCAB, (2, 29))
    tokens[:, 3:13], tokens[0, 17:21], tokens[1, 23:27] = IMAGE, IMAGE + 2, IMAGE + 2
    return tokens, {
        "image": {"images": torch.randn(2, 3, 12, 12)},
        "tiles": {"input": torch.randn(2, 4, 5)},
    }


@pytest.mark.format(
    "torchtune EarlyFusionModel", "in and out", "state dicts load strictly; logits within 1e-5 in fp32"
)
@torch.no_grad()
def test_early_fusion_state_dicts_go_both_ways():
    towers = {"image": Towers.clip(), "tiles": Towers.plain()}
    theirs = early(model_fusion.EarlyFusionModel, copy.deepcopy(towers))
    ours = early(EarlyFusionModel, {"image": Towers.clip(), "tiles": Towers.plain()})
    tokens, given = early_example()
    first = ours(tokens, encoder_input=given)
    other = early(model_fusion.EarlyFusionModel, {"image": Towers.clip(), "tiles": Towers.plain()})
    other.load_state_dict(ours.state_dict(), strict=True)
    close(other(tokens, encoder_input=given), first)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    expected = theirs(tokens, encoder_input=given)
    close(ours(tokens, encoder_input=given), expected)
    assert (first - expected).abs().max() > 0.5


@pytest.mark.format("torchtune EarlyFusionModel", "in and out", "files of its checkpointer")
@torch.no_grad()
def test_early_fusion_files_go_both_ways(tmp_path):
    theirs = early(model_fusion.EarlyFusionModel, {"image": Towers.clip()})
    ours = early(EarlyFusionModel, {"image": Towers.clip()})
    load_pretrained(ours, their_file(tmp_path, theirs))
    same(ours.state_dict(), theirs.state_dict())
    shake(ours)
    export(ours, tmp_path / "export", format="torchtune")
    reader = their_reader(tmp_path / "export", "model.safetensors", tmp_path / "again")
    theirs.load_state_dict(reader.load_checkpoint()["model"], strict=True)
    again = from_pretrained(tmp_path / "export", fusion_trainable=False).eval()
    same(again.state_dict(), ours.state_dict())
    tokens, given = early_example()
    tokens[tokens > IMAGE], given = 1, {"image": given["image"]}
    expected = ours(tokens, encoder_input=given)
    close(theirs(tokens, encoder_input=given), expected)
    assert torch.equal(again(tokens, encoder_input=given), expected)


@torch.no_grad()
def test_early_fusion_with_a_tower_of_tiles(tmp_path):
    """The tower of Llama 3.2 Vision keeps its grid under the name of its encoder."""
    theirs = model_fusion.EarlyFusionModel(
        shake(torchfuse_decoder()), {"a": torchtune_encoder()}, {"a": IMAGE}
    ).eval()
    ours = EarlyFusionModel(torchfuse_decoder(), {"a": torchfuse_encoder()}, {"a": IMAGE}).eval()
    load_pretrained(ours, their_file(tmp_path, theirs))
    tokens = torch.randint(0, VOCAB, (2, 47))
    tokens[:, 2:42] = IMAGE
    images = {
        "images": torch.randn(2, 1, 4, 3, 12, 12),
        "aspect_ratio": torch.tensor([[[2, 2]], [[1, 4]]]),
    }
    close(ours(tokens, encoder_input={"a": images}), theirs(tokens, encoder_input={"a": images}))
    export(ours, tmp_path / "export", format="torchtune")
    same(from_pretrained(tmp_path / "export").state_dict(), ours.state_dict())
    theirs.load_state_dict(load_file(tmp_path / "export" / "model.safetensors"), strict=True)
    close(ours(tokens, encoder_input={"a": images}), theirs(tokens, encoder_input={"a": images}))


def hf_directory(folder, grids):
    """A Mllama directory; with ``grids`` its embeddings of tiles are such as Meta's conversion makes."""
    mllama(folder)
    if grids:
        tensors = load_file(folder / "model.safetensors")
        tables = [key for key in tensors if "tile" in key and "embedding.weight" in key]
        assert len(tables) == 3
        for key in tables:
            tokens = tensors[key].shape[1] // (4 * 20)
            table = grid_to_table(torch.randn(4, 4, tokens, 20), RATIOS, 4)
            assert table.flatten(1).shape == tensors[key].shape
            tensors[key] = table.flatten(1)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())["vision_config"]
    assert [tuple(ratio) for ratio in config["supported_aspect_ratios"]] == RATIOS
    return folder


@pytest.mark.format(
    "Llama 3.2 Vision (Mllama)", "in", "every tensor equals torchtune's own conversion to the bit"
)
def test_what_becomes_of_a_mllama_directory_is_what_torchtune_makes_of_it(tmp_path):
    folder = hf_directory(tmp_path / "hf", grids=True)
    reader = FullModelHFCheckpointer(
        checkpoint_dir=str(folder),
        checkpoint_files=["model.safetensors"],
        model_type="LLAMA3_VISION",
        output_dir=str(tmp_path / "out"),
    )
    expected = reader.load_checkpoint()["model"]
    export(from_pretrained(folder), tmp_path / "export", format="torchtune")
    got = load_file(tmp_path / "export" / "model.safetensors")
    gates = [got[name] for name in got if name.endswith(("scale.scale", ".gate"))]
    assert len(gates) == 2 * 2 + 2 * 2 + 3
    assert all(gate.abs() > 0 for gate in gates)
    same(got, expected)
    same(from_pretrained(tmp_path / "export").state_dict(), from_pretrained(folder).state_dict())


def test_embeddings_of_tiles_that_no_grid_holds_are_named(tmp_path):
    model = from_pretrained(hf_directory(tmp_path / "hf", grids=False))
    with pytest.raises(ValueError, match="The format torchtune cannot hold") as error:
        export(model, tmp_path / "export", format="torchtune")
    text = str(error.value)
    for name in TABLES:
        assert f"{name}: A grid cannot hold rows [0, 1, 2, " in text
    assert "The format torchfuse can hold it, and mllama where it can hold the rest" in text
    assert not (tmp_path / "export").exists()
    for name in ("torchfuse", "mllama"):
        export(model, tmp_path / name, format=name)
        same(from_pretrained(tmp_path / name).state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("make", "complaints"),
    [
        (
            lambda: fuse(tiny_decoder(), Towers.clip(), every=2),
            ["the adapter of 'encoder': torchtune has no adapters"],
        ),
        (
            lambda: fuse(
                tiny_decoder(), {"a": Towers.clip(), "b": Towers.clip()}, every=2, adapter=None
            ),
            ["its named encoders: torchtune's DeepFusionModel has one without a name"],
        ),
        (
            lambda: fuse(tiny_decoder(), Towers.clip(), arch="joint_decoder", encoder_token=IMAGE),
            ["its encoder without a name: torchtune's EarlyFusionModel", "the adapter of 'encoder'"],
        ),
        (
            lambda: fuse(
                tiny_decoder(),
                {"a": Towers.clip()},
                arch="joint_decoder",
                placement="prefix",
                adapter=None,
            ),
            ["its placement: torchtune's EarlyFusionModel has placeholders"],
        ),
        *(
            (
                lambda tied=tied: fuse(
                    tiny_decoder(tied=tied),
                    Towers.clip(),
                    every=2,
                    adapter=None,
                    fusion_vocab_size=2,
                    fusion_head=True,
                ),
                ["the head's new rows: no head of torchtune scores new tokens"],
            )
            for tied in (False, True)
        ),
    ],
    ids="adapter named unnamed prefix head tied".split(),
)
def test_what_torchtune_cannot_hold_is_named(tmp_path, make, complaints):
    with pytest.raises(ValueError, match="The format torchtune cannot hold") as error:
        export(make(), tmp_path / "export", format="torchtune")
    assert [text for text in complaints if text not in str(error.value)] == []
    assert re.search(r"Formats that can: .*torchfuse", str(error.value))
    assert not (tmp_path / "export").exists()
