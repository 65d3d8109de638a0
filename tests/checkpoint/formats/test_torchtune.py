"""torchtune 0.6.1's own fused models and their checkpoints, loaded by torchfuse and the other way round."""

import copy
import json
import re

import pytest
import torch
from checkpoint.parity import assert_close, assert_same_tensors
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
    TILE_TABLES,
    VOCAB,
    WIDTH,
    example,
    shake,
    tables_of_grids,
    torchfuse_decoder,
    torchfuse_encoder,
    torchfuse_model,
    torchtune_decoder,
    torchtune_encoder,
    torchtune_model,
    with_torchtune_epsilons,
)

from torchfuse import (
    DeepFusionModel,
    EarlyFusionModel,
    export,
    from_pretrained,
    fuse,
    load_pretrained,
)
from torchfuse.encoders.clip import ClipVisionEncoder
from torchfuse.encoders.mllama_tiles import grid_to_table
from torchfuse.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("no_grad")

ANY_TILES = [[(2, 2), (1, 4)], [(1, 1), (3, 1)], [(2, 1), (2, 2)]]
# torchtune's tower attends to padding tiles, so here there are none.
NO_PADDING = [[(2, 2), (1, 4)], [(4, 1), (1, 4)], [(2, 2), (4, 1)]]


def close(got, expected):
    assert_close(got, expected, atol=1e-5)


def torchtune_reader(folder, file, out):
    return FullModelTorchTuneCheckpointer(
        checkpoint_dir=str(folder),
        checkpoint_files=[file],
        model_type="LLAMA3_VISION",
        output_dir=str(out),
    )


def torchtune_file(folder, model, suffix=".bin"):
    """Return a file of torchtune's own checkpointer, or with ``.pt`` of ``torch.save``."""
    (folder / "base").mkdir(parents=True)
    torch.save(model.state_dict(), folder / "base" / "model.pt")
    if suffix == ".pt":
        return folder / "base" / "model.pt"
    reader = torchtune_reader(folder / "base", "model.pt", folder / "out")
    reader.save_checkpoint({"model": model.state_dict()}, epoch=3)
    (file,) = (folder / "out" / "epoch_3").glob("*.bin")
    return file


def model_with_torchtune_tower(decoder):
    """Return torchfuse's model around a plain decoder, or around torchtune's fused one."""
    if decoder == "plain":
        return with_torchtune_epsilons(torchfuse_model(torchtune_encoder()))
    return DeepFusionModel(torchtune_decoder(), torchtune_encoder()).eval()


@pytest.mark.format(
    "torchtune DeepFusionModel",
    "in and out",
    "state dicts load strictly; logits within 1e-5 in fp32, cached too",
)
@pytest.mark.parametrize("decoder", ["plain", "fused"])
def test_state_dicts_load_both_ways(decoder):
    source, model = torchtune_model(), model_with_torchtune_tower(decoder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(source.state_dict(), strict=True)
    tokens, inputs = example(ANY_TILES)
    unmasked = {"encoder_input": inputs["encoder_input"]}
    expected = source(tokens, **inputs)
    close(model(tokens, **inputs), expected)
    close(model(tokens, **unmasked), source(tokens, **unmasked))
    close(model(tokens), source(tokens))
    assert (source(tokens) - expected).abs().max() > 0.5  # the images matter
    other = model_fusion.DeepFusionModel(torchtune_decoder(), torchtune_encoder()).eval()
    other.load_state_dict(before, strict=True)
    model.load_state_dict(before, strict=True)
    got = other(tokens, **inputs)
    close(got, model(tokens, **inputs))
    assert (got - expected).abs().max() > 0.5


def decoded_with_caches(model, tokens, inputs, num_features):
    """Return logits of a prompt with its images, then of one token a step with cached features."""
    b, s = tokens.shape
    model.setup_caches(b, torch.float32, encoder_max_seq_len=num_features, decoder_max_seq_len=s + 4)
    causal = torch.ones(s, s + 4, dtype=torch.bool).tril().expand(b, -1, -1)
    mask = inputs["encoder_mask"]
    pieces = [
        model(
            tokens[:, :7],
            encoder_input=inputs["encoder_input"],
            encoder_mask=mask[:, :7],
            mask=causal[:, :7],
            input_pos=torch.arange(7),
        )
    ]
    for at in range(7, s):
        step = {"mask": causal[:, at : at + 1], "input_pos": torch.tensor([at])}
        pieces.append(model(tokens[:, at : at + 1], encoder_mask=mask[:, at : at + 1], **step))
    delete_kv_caches(model)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("decoder", ["plain", "fused"])
def test_cached_decoding(decoder):
    source, model = torchtune_model(), model_with_torchtune_tower(decoder)
    model.load_state_dict(source.state_dict())
    tokens, inputs = example(ANY_TILES)
    num_features = inputs["encoder_mask"].shape[-1]
    expected = decoded_with_caches(source, tokens, inputs, num_features)
    close(decoded_with_caches(model, tokens, inputs, num_features), expected)
    close(expected, model(tokens, **inputs))


def test_the_epsilons_of_torchtunes_builder_matter_where_states_are_small():
    """Why the two norms of a fused layer are set by hand in these tests."""
    source, model = torchtune_model(), torchfuse_model(torchtune_encoder())
    state = source.state_dict()
    for name in (
        "tok_embeddings",
        "tok_embeddings.fusion_embedding",
        "layers.0.attn.output_proj",
        "layers.0.mlp.w2",
    ):
        state[f"decoder.{name}.weight"].mul_(0.01)
    state["decoder.layers.1.fusion_layer.ca_scale.scale"].mul_(0.001)
    model.load_state_dict(state)
    tokens, inputs = example(ANY_TILES)
    expected = source(tokens, **inputs)
    assert (model(tokens, **inputs) - expected).abs().max() > 1e-4
    close(with_torchtune_epsilons(model)(tokens, **inputs), expected)


@pytest.mark.format(
    "torchtune DeepFusionModel", "in", "files of its checkpointers (.bin, .pt); logits within 1e-5"
)
@pytest.mark.parametrize("suffix", [".bin", ".pt"])
@pytest.mark.parametrize("tower", ["torchtune", "torchfuse"])
def test_torchtunes_files_load(tmp_path, tower, suffix):
    source = torchtune_model()
    file = torchtune_file(tmp_path, source, suffix)
    model = torchfuse_model(torchtune_encoder() if tower == "torchtune" else None)
    load_pretrained(model, file)
    expected = source.state_dict()
    assert_same_tensors(
        model.state_dict(), expected if tower == "torchtune" else tables_of_grids(expected)
    )
    tokens, inputs = example(NO_PADDING)
    close(with_torchtune_epsilons(model)(tokens, **inputs), source(tokens, **inputs))


def test_a_file_that_does_not_fit_changes_nothing(tmp_path):
    file = torchtune_file(tmp_path, torchtune_model(embed_dim=WIDTH, intermediate_dim=43), ".pt")
    model = torchfuse_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.mlp\.w1\.weight is \[43, 24\].* is \[41, 24\]"
    ):
        load_pretrained(model, file)
    assert_same_tensors(model.state_dict(), before)
    with pytest.raises(CheckpointError, match="there is no configuration of the model: build it"):
        from_pretrained(file)


def model_for_grids(folder):
    """Return a random model whose embeddings of tiles a grid can hold."""
    model = torchfuse_model()
    load_pretrained(model, torchtune_file(folder, torchtune_model(), ".pt"))
    return model


@pytest.mark.format(
    "torchtune DeepFusionModel",
    "out",
    "its own checkpointer reads it; logits within 1e-5; read back to the bit",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_libraries_read_an_export(tmp_path, dtype):
    model = model_for_grids(tmp_path / "from").to(dtype)
    export(model, tmp_path / "export", format="torchtune")
    reader = torchtune_reader(tmp_path / "export", "model.safetensors", tmp_path / "out")
    state = reader.load_checkpoint()["model"]
    assert {tensor.dtype for tensor in state.values()} == {dtype}
    other = torchtune_model()
    other.load_state_dict(state, strict=True)
    again = from_pretrained(tmp_path / "export").eval()
    assert_same_tensors(again.state_dict(), model.state_dict())
    tokens, inputs = example(NO_PADDING)
    if dtype == torch.float32:
        close(other(tokens, **inputs), with_torchtune_epsilons(model)(tokens, **inputs))
        assert torch.equal(with_torchtune_epsilons(again)(tokens, **inputs), model(tokens, **inputs))
    # torchtune trains, saves, and copies the config.json of the export.
    reader.save_checkpoint({"model": shake(other).state_dict()}, epoch=5)
    (file,) = (tmp_path / "out" / "epoch_5").glob("*.bin")
    expected = {name: tensor.to(dtype) for name, tensor in other.state_dict().items()}
    trained = from_pretrained(file, dtype=dtype)
    assert_same_tensors(trained.state_dict(), tables_of_grids(expected))


def test_parts_that_no_configuration_describes(tmp_path):
    """torchtune's tower and its epsilons: keys are enough, once the model is built."""
    model = shake(model_with_torchtune_tower("plain"))
    export(model, tmp_path / "export", format="torchtune")
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    assert_same_tensors(tensors, model.state_dict())
    other = torchtune_model()
    other.load_state_dict(tensors, strict=True)
    tokens, inputs = example(ANY_TILES)
    close(other(tokens, **inputs), model(tokens, **inputs))
    again = model_with_torchtune_tower("plain")
    load_pretrained(again, tmp_path / "export")
    assert_same_tensors(again.state_dict(), model.state_dict())
    with pytest.raises(
        CheckpointError, match="does not describe the model: build it, and give it to load"
    ):
        from_pretrained(tmp_path / "export")


def test_a_described_export_and_models_that_differ(tmp_path):
    export(model_for_grids(tmp_path / "from"), tmp_path / "export", format="torchtune")
    undescribed = torchfuse_model(torchtune_encoder())
    load_pretrained(undescribed, tmp_path / "export")
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    assert_same_tensors(undescribed.state_dict(), tensors)
    other = fuse(
        torchfuse_decoder(num_heads=3, num_kv_heads=1),
        torchfuse_encoder(intermediate_layers=[1, 2]),
        adapter=None,
        layers=FUSED,
        fusion_vocab_size=NEW,
    )
    with pytest.raises(
        CheckpointError, match=r"head_dim 4, the model has 8(.|\n)*intermediate_layers_indices"
    ):
        load_pretrained(other, tmp_path / "export")


def clip_tower():
    sizes = {"image_size": 12, "patch_size": 4, "embed_dim": 18, "num_layers": 3, "num_heads": 2}
    return shake(ClipVisionEncoder(**sizes, keep_cls=True))


def early_fusion(model_class, *names):
    """A decoder with a CLIP tower, ten features an image, and maybe a second encoder."""
    towers = {"image": clip_tower(), "other": shake(nn.Sequential(nn.Linear(5, 11), nn.Linear(11, 18)))}
    tokens = {"image": IMAGE, "other": IMAGE + 2}
    return model_class(
        shake(tiny_decoder()), {n: towers[n] for n in names}, {n: tokens[n] for n in names}
    ).eval()


def early_fusion_example():
    tokens = torch.randint(0, VOCAB, (2, 29))
    tokens[:, 3:13], tokens[0, 17:21], tokens[1, 23:27] = IMAGE, IMAGE + 2, IMAGE + 2
    return tokens, {
        "image": {"images": torch.randn(2, 3, 12, 12)},
        "other": {"input": torch.randn(2, 4, 5)},
    }


@pytest.mark.format(
    "torchtune EarlyFusionModel", "in and out", "state dicts load strictly; logits within 1e-5 in fp32"
)
def test_early_fusion_state_dicts_load_both_ways():
    source = early_fusion(model_fusion.EarlyFusionModel, "image", "other")
    model = early_fusion(EarlyFusionModel, "image", "other")
    other = copy.deepcopy(source)
    tokens, inputs = early_fusion_example()
    before = model(tokens, encoder_input=inputs)
    other.load_state_dict(model.state_dict(), strict=True)
    close(other(tokens, encoder_input=inputs), before)
    model.load_state_dict(source.state_dict(), strict=True)
    expected = source(tokens, encoder_input=inputs)
    close(model(tokens, encoder_input=inputs), expected)
    assert (before - expected).abs().max() > 0.5


@pytest.mark.format("torchtune EarlyFusionModel", "in and out", "files of its checkpointer")
def test_early_fusion_files_load_both_ways(tmp_path):
    source = early_fusion(model_fusion.EarlyFusionModel, "image")
    model = early_fusion(EarlyFusionModel, "image")
    load_pretrained(model, torchtune_file(tmp_path, source))
    assert_same_tensors(model.state_dict(), source.state_dict())
    shake(model)
    export(model, tmp_path / "export", format="torchtune")
    reader = torchtune_reader(tmp_path / "export", "model.safetensors", tmp_path / "again")
    source.load_state_dict(reader.load_checkpoint()["model"], strict=True)
    again = from_pretrained(tmp_path / "export", fusion_trainable=False).eval()
    assert_same_tensors(again.state_dict(), model.state_dict())
    tokens, inputs = early_fusion_example()
    tokens[tokens > IMAGE], inputs = 1, {"image": inputs["image"]}
    expected = model(tokens, encoder_input=inputs)
    close(source(tokens, encoder_input=inputs), expected)
    assert torch.equal(again(tokens, encoder_input=inputs), expected)


def test_early_fusion_with_a_tower_of_tiles(tmp_path):
    """Grids are converted below the key of a named encoder, too."""
    source = model_fusion.EarlyFusionModel(
        shake(torchfuse_decoder()), {"a": torchtune_encoder()}, {"a": IMAGE}
    ).eval()
    model = EarlyFusionModel(torchfuse_decoder(), {"a": torchfuse_encoder()}, {"a": IMAGE}).eval()
    load_pretrained(model, torchtune_file(tmp_path, source))
    tokens = torch.randint(0, VOCAB, (2, 47))
    tokens[:, 2:42] = IMAGE
    ratios = torch.tensor([[[2, 2]], [[1, 4]]])
    inputs = {"a": {"images": torch.randn(2, 1, 4, 3, 12, 12), "aspect_ratio": ratios}}
    close(model(tokens, encoder_input=inputs), source(tokens, encoder_input=inputs))
    export(model, tmp_path / "export", format="torchtune")
    assert_same_tensors(from_pretrained(tmp_path / "export").state_dict(), model.state_dict())
    source.load_state_dict(load_file(tmp_path / "export" / "model.safetensors"), strict=True)
    close(source(tokens, encoder_input=inputs), model(tokens, encoder_input=inputs))


def hf_directory(folder, grids):
    """A Mllama directory; with ``grids``, its embeddings of tiles come from grids, as Meta's do."""
    mllama(folder)
    if grids:
        tensors = load_file(folder / "model.safetensors")
        tables = [key for key in tensors if "tile" in key and "embedding.weight" in key]
        assert len(tables) == 3
        for key in tables:
            tokens = tensors[key].shape[1] // (4 * 20)
            tensors[key] = grid_to_table(torch.randn(4, 4, tokens, 20), RATIOS, 4).flatten(1)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())["vision_config"]
    assert [tuple(ratio) for ratio in config["supported_aspect_ratios"]] == RATIOS
    return folder


@pytest.mark.format(
    "Llama 3.2 Vision (Mllama)", "in", "every tensor equals torchtune's own conversion to the bit"
)
def test_a_mllama_directory_becomes_what_torchtune_makes_of_it(tmp_path):
    folder = hf_directory(tmp_path / "hf", grids=True)
    reader = FullModelHFCheckpointer(
        checkpoint_dir=str(folder),
        checkpoint_files=["model.safetensors"],
        model_type="LLAMA3_VISION",
        output_dir=str(tmp_path / "out"),
    )
    model = from_pretrained(folder)
    export(model, tmp_path / "export", format="torchtune")
    got = load_file(tmp_path / "export" / "model.safetensors")
    gates = [got[name] for name in got if name.endswith(("scale.scale", ".gate"))]
    assert len(gates) == 2 * 2 + 2 * 2 + 3
    assert all(gate.abs() > 0 for gate in gates)
    assert_same_tensors(got, reader.load_checkpoint()["model"])
    assert_same_tensors(from_pretrained(tmp_path / "export").state_dict(), model.state_dict())


def test_embeddings_of_tiles_that_no_grid_holds_are_named(tmp_path):
    model = from_pretrained(hf_directory(tmp_path / "hf", grids=False))
    with pytest.raises(CheckpointError, match="The format torchtune cannot hold") as error:
        export(model, tmp_path / "export", format="torchtune")
    text = str(error.value)
    for name in TILE_TABLES:
        assert f"{name}: A grid cannot hold rows [0, 1, 2, " in text
    assert "The format torchfuse can hold it, and mllama where it can hold the rest" in text
    assert not (tmp_path / "export").exists()
    for name in ("torchfuse", "mllama"):
        export(model, tmp_path / name, format=name)
        assert_same_tensors(from_pretrained(tmp_path / name).state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("make", "problems"),
    [
        (
            lambda: fuse(tiny_decoder(), clip_tower(), every=2),
            ["the adapter of 'encoder': torchtune has no adapters"],
        ),
        (
            lambda: fuse(tiny_decoder(), {"a": clip_tower(), "b": clip_tower()}, every=2, adapter=None),
            ["its named encoders: torchtune's DeepFusionModel has one without a name"],
        ),
        (
            lambda: fuse(tiny_decoder(), clip_tower(), arch="joint_decoder", encoder_token=IMAGE),
            ["its encoder without a name: torchtune's EarlyFusionModel", "the adapter of 'encoder'"],
        ),
        (
            lambda: fuse(tiny_decoder(), {"a": clip_tower()}, arch="joint_decoder", adapter=None),
            ["its placement: torchtune's EarlyFusionModel has placeholders"],
        ),
        (
            lambda: fuse(tiny_decoder(), clip_tower(), arch="mot"),
            ["its architecture 'mot': torchtune does not have it"],
        ),
        *(
            (
                lambda tied=tied: fuse(
                    tiny_decoder(tied=tied),
                    clip_tower(),
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
    ids="adapter named unnamed prefix mot head tied".split(),
)
def test_what_torchtune_cannot_hold_is_named(tmp_path, make, problems):
    with pytest.raises(CheckpointError, match="The format torchtune cannot hold") as error:
        export(make(), tmp_path / "export", format="torchtune")
    assert [text for text in problems if text not in str(error.value)] == []
    assert re.search("Formats that can: .*torchfuse", str(error.value))
    assert not (tmp_path / "export").exists()
