"""Features computed once: the losses of pixels, and what is noticed when something changes."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
from itertools import islice

import pytest
import torch
from pictures import picture
from prompt_settings import tokenizer
from ranks import run_on_ranks
from safetensors.torch import save_file
from support import VOCAB, WIDTH, open_gates, tiny_decoder

from torchfuse import fuse, set_trainable
from torchfuse.data import (
    ImageTransform,
    Media,
    MediaInput,
    MediaReader,
    Message,
    Sample,
    SampleTransform,
    TiledImageTransform,
    padded_collate_images,
    read_samples,
)
from torchfuse.data.features import FeatureStore, store
from torchfuse.data.loading import LoaderOptions, StepLoader
from torchfuse.encoders.clip import ClipVisionEncoder
from torchfuse.encoders.mllama import MllamaVisionEncoder
from torchfuse.errors import CheckpointError, ConfigError, DataError, ModelError
from torchfuse.params import get_fusion_params
from torchfuse.tasks.feature_cache import cache_features
from torchfuse.training import next_token_loss, shard

NAMES = ["a.png", "b.png", "c.png", "d.png", "e.png"]
SIZES = [(23, 17), (8, 8), (9, 29), (31, 7), (17, 19)]
RATIOS = [(1, 1), (1, 2), (1, 3), (2, 1), (3, 1), (2, 2), (1, 4), (4, 1)]
# Images of the conversations: none, one, two; shared between conversations.
ROWS = [[0], [], [1, 2], [0], [3], [], [4], [2, 0], [3], [1], [4, 3], [], [2], [0], [1]]
LENGTH = 101


def tower(seed=3):
    torch.manual_seed(seed)
    return ClipVisionEncoder(image_size=8, patch_size=4, embed_dim=10, num_layers=3, num_heads=2)


def tiled_tower():
    torch.manual_seed(3)
    return MllamaVisionEncoder(
        image_size=8,
        patch_size=4,
        embed_dim=10,
        num_layers=2,
        num_global_layers=1,
        num_heads=2,
        hidden_dim=23,
        decoder_dim=WIDTH,
        intermediate_layers=[0],
        max_num_tiles=4,
        supported_aspect_ratios=RATIOS,
    )


MODELS = {
    "cross_attention": {"arch": "cross_attention", "every": 2, "fusion_vocab_size": 1},
    "joint_decoder": {"arch": "joint_decoder", "encoder_token": VOCAB},
    "prefix": {"arch": "joint_decoder"},
    "tiles": {"arch": "cross_attention", "every": 2, "fusion_vocab_size": 1, "adapter": None},
}


def make_model(name="cross_attention", encoder=None, **options):
    """A fused model with a frozen encoder, of which the rest of what fusion added trains."""
    encoder = encoder or (tiled_tower() if name == "tiles" else tower())
    torch.manual_seed(7)
    model = fuse(tiny_decoder(max_seq_len=LENGTH), encoder, **MODELS[name] | options)
    for part in model.encoder_parts().values():
        part.requires_grad_(False)  # the projection of Mllama's tower is a part that fusion trains
    return open_gates(model).train() if "cross" in MODELS[name]["arch"] else model.train()


def make_transform(model, folder, image_transform=None):
    tiled = hasattr(model.encoder, "tokens_per_tile")
    image_transform = image_transform or (TiledImageTransform(8) if tiled else ImageTransform(8))
    return SampleTransform.for_model(model, folder / "words", image_transform, template="plain")


def write_data(folder, rows=ROWS):
    """Conversations about images that differ in every pixel."""
    tokenizer(folder / "words")
    for index, (name, size) in enumerate(zip(NAMES, SIZES, strict=True)):
        picture(*size, seed=index).save(folder / name)
    records = []
    for number, row in enumerate(rows):
        question = " <image> ".join(f"w{4 + (number + i) % 31}" for i in range(len(row) + 1))
        answer = " ".join(f"w{4 + (3 * number + i) % 31}" for i in range(1 + number % 4))
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append({"image": [NAMES[i] for i in row], "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(records))
    return read_samples(folder / "rows.json")


@pytest.fixture
def samples(tmp_path):
    return write_data(tmp_path)


def losses(model, samples, transform, *, packed=False, **options):
    """Losses and gradients of one epoch, and the keywords of the encoder."""
    sizes = {"batch_size": 2, "max_seq_len": 19} if packed else {"batch_size": 3}
    options = LoaderOptions(packed=packed, **sizes, **options)
    loader = StepLoader(samples, transform, options)
    found, keywords = [], set()
    for (batch,), _ in islice(loader.steps(), loader.num_steps):
        keywords |= batch.get("encoder_input", {}).keys()
        labels = batch.pop("labels")
        total, _ = next_token_loss(model(**batch), labels)
        model.zero_grad()
        total.backward()
        gradients = {
            name: p.grad.clone() for name, p in get_fusion_params(model).items() if p.requires_grad
        }
        found.append((total.detach(), gradients))
    assert len(found) > 1
    return found, keywords


def count_images(model):
    """A list that grows by the images of each call of the encoder."""
    seen = []
    model.encoder.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["images"].flatten(0, -4).shape[0]), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_pixels(tmp_path, samples, name, packed):
    model = make_model(name)
    transform = make_transform(model, tmp_path)
    expected, keywords = losses(model, samples, transform, packed=packed)
    assert "images" in keywords
    cached = cache_features(model, samples, transform, tmp_path / "features", batch_size=2)
    seen = count_images(model)
    got, keywords = losses(model, samples, cached, packed=packed)
    assert keywords == {"encoder_output"} and not seen
    assert [cached.length(sample) for sample in samples] == [transform.length(s) for s in samples]
    # Not to the bit: the encoder's batches have other shapes, and tiles that pad an image have no features.
    for (loss, gradients), (other, others) in zip(expected, got, strict=True):
        torch.testing.assert_close(other, loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(others, gradients, rtol=1e-4, atol=1e-5)


def test_the_dtype_is_the_towers(tmp_path, samples):
    model = make_model(encoder=tower().bfloat16())
    transform = make_transform(model, tmp_path)
    cached = cache_features(model, samples, transform, tmp_path / "features")
    features = cached.media_input(samples[0].images[0]).items
    assert features.dtype == torch.bfloat16
    pixels = transform.media_input(samples[0].images[0]).items
    own = model.run_encoder("encoder", {"images": pixels[None]})
    torch.testing.assert_close(features, own, rtol=0.02, atol=0.02)


def test_a_whole_image_is_one_tile_of_a_tiled_tower(tmp_path, samples):
    model = make_model("tiles")
    transform = make_transform(model, tmp_path, ImageTransform(8))
    cached = cache_features(model, samples, transform, tmp_path / "features")
    [image] = samples[0].images
    tile = transform.media_input(image).items[None, None]
    own = model.run_encoder("encoder", {"images": tile})[0, : model.encoder.tokens_per_tile]
    torch.testing.assert_close(cached.media_input(image).items, own[None])


def test_media_of_several_items(tmp_path, samples):
    """Clips of different lengths, read by a function of the user's own."""
    clips = {len(name): torch.randn(len(name), 3, 8, 8) for name in ("xyz", "xyzuv")}
    kinds = {"clip": lambda media: MediaInput(clips[len(media.read())])}
    model = make_model()
    options = {"template": "plain", "media_transforms": kinds}
    transform = SampleTransform.for_model(model, tmp_path / "words", None, **options)
    media = [Media(data=name, modality="clip") for name in (b"xyz", b"xyzuv", b"uvx")]
    turns = [Message("user", [media[0], *media[1:], "w5"]), Message("assistant", ["w6"])]
    cached = cache_features(model, [Sample(turns)], transform, tmp_path / "features")
    for each in media:
        frames = kinds["clip"](each).items
        own = model.run_encoder("encoder", {"images": frames[None]}).unflatten(1, (len(frames), -1))[0]
        torch.testing.assert_close(cached.media_input(each).items, own)
        assert cached.reader.num_items(each) == len(frames)


def test_a_later_start_computes_what_is_missing_and_reads_nothing_else(tmp_path, samples, monkeypatch):
    model = make_model()
    transform = make_transform(model, tmp_path)
    seen = count_images(model)
    cache_features(model, samples[:3], transform, tmp_path / "features", batch_size=2)
    assert seen == [2, 1]
    cached = cache_features(model, samples, transform, tmp_path / "features", batch_size=9)
    assert seen[2:] == [1, 2]  # one is computed again, for comparison
    read = []
    monkeypatch.setattr(Media, "read", lambda media: read.append(media) or media.path.read_bytes())
    cache_features(model, samples, cached, tmp_path / "features")
    assert seen[4:] == [1] and not read


def test_equal_files_have_one_entry(tmp_path, samples):
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    model = make_model()
    cached = cache_features(model, samples, make_transform(model, tmp_path), tmp_path / "features")
    assert len(FeatureStore(tmp_path / "features")) == len(NAMES) - 1
    first, second = samples[0].images[0], samples[2].images[0]
    assert first.path != second.path
    assert torch.equal(cached.media_input(first).items, cached.media_input(second).items)


def test_a_changed_image_is_noticed(tmp_path, samples):
    model = make_model()
    transform = make_transform(model, tmp_path)
    cached = cache_features(model, samples, transform, tmp_path / "features")
    [image] = samples[0].images
    old = cached.media_input(image).items
    picture(23, 17, seed=99).save(image.path)
    with pytest.raises(DataError, match=r"a.png has no features in .*features: it was changed after"):
        cached(samples[0])
    cached = cache_features(model, samples, transform, tmp_path / "features")
    new = cached.media_input(image).items
    own = model.run_encoder("encoder", {"images": transform.media_input(image).items[None]})
    torch.testing.assert_close(new, own)
    assert not torch.allclose(new, old)
    os.utime(image.path)  # no other content
    torch.testing.assert_close(cached.media_input(image).items, new)
    seen = count_images(model)
    cache_features(model, samples, transform, tmp_path / "features")
    assert seen == [1]


@torch.no_grad()
def change_a_weight(model, transform):
    weight = model.encoder.layers[1].attn.q_proj.weight
    weight[3, 2] = weight[3, 2].nextafter(torch.tensor(9.0))
    return model, transform


def change_the_layer(model, transform):
    model.encoder.layers[1].mlp.activation = torch.nn.ReLU()
    return model, transform


CHANGES = {
    "weight": (change_a_weight, r"encoder.tensors.layers.1.attn.q_proj.weight was float32 \[10, 10\]"),
    "dtype": (
        lambda m, t: (m.bfloat16(), t),
        r"(?s)\.weight was float32 .*, and is bfloat16 .*\n  and \d+ more",
    ),
    "tower": (
        lambda m, t: (make_model(encoder=tower(seed=4)), t),
        "Give data.cache_features another folder, or delete this one",
    ),
    "code": (change_the_layer, r"features of the image .*, although weights and settings are the same"),
    "mean": (
        lambda m, t: (m, t.with_reader(MediaReader(ImageTransform(8, [0.5, 0.4, 0.3])))),
        r"transform.image_transform.mean was \[0.48145466, .*\], and is \[0.5, 0.4, 0.3\]",
    ),
    "filter": (
        lambda m, t: (m, t.with_reader(MediaReader(ImageTransform(8, resample="nearest")))),
        "transform.image_transform.resample was bicubic, and is nearest",
    ),
    "another modality": (
        lambda m, t: (m, t.with_reader(MediaReader(ImageTransform(8), {"sound": read_samples}))),
        "transform.others.sound was not there, and is torchfuse.data.readers.read.read_samples",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_tower_or_transform_is_refused(tmp_path, samples, change):
    model = make_model()
    transform = make_transform(model, tmp_path)
    cache_features(model, samples, transform, tmp_path / "features")
    before = {file.name: file.read_bytes() for file in (tmp_path / "features").iterdir()}
    model, transform = CHANGES[change][0](model, transform)
    with pytest.raises(CheckpointError, match=CHANGES[change][1]):
        cache_features(model, samples, transform, tmp_path / "features")
    assert {file.name: file.read_bytes() for file in (tmp_path / "features").iterdir()} == before


def test_damaged_folders_are_named(tmp_path, samples):
    model = make_model()
    transform = make_transform(model, tmp_path)
    folder = tmp_path / "features"
    cache_features(model, samples[:1], transform, folder)
    cache_features(model, samples, transform, folder)
    cut, other = (folder / f"0000{number}.safetensors" for number in range(2))
    cut.write_bytes(cut.read_bytes()[:-1])
    other.write_bytes(b"\0" * 99)
    with pytest.raises(
        CheckpointError, match=r"(?s)delete them.*00000.safetensors: .*00001.safetensors: "
    ):
        cache_features(model, samples, transform, folder)
    other.unlink()
    cut.unlink()
    seen = count_images(model)
    cache_features(model, samples, transform, folder)
    assert sum(seen) == len(NAMES)
    (folder / "features.json").unlink()
    with pytest.raises(CheckpointError, match=r"no features.json: it is unknown which encoder"):
        cache_features(model, samples, transform, folder)


def test_what_cannot_be_read_is_an_error_where_it_is_used(tmp_path, samples):
    model = make_model()
    transform = make_transform(model, tmp_path)
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "e.png").unlink()
    cached = cache_features(model, samples, transform, tmp_path / "features")
    with pytest.raises(DataError) as expected:
        transform(samples[0])
    with pytest.raises(DataError) as got:
        cached(samples[0])
    assert str(got.value) == str(expected.value)
    with pytest.raises(DataError, match=r"e.png cannot be read: No such file"):
        cached(samples[6])
    assert len(FeatureStore(tmp_path / "features")) == len(NAMES) - 2


def test_what_cannot_be_cached_is_refused(tmp_path, samples):
    frozen = make_model()
    transform = make_transform(frozen, tmp_path)
    cached = cache_features(frozen, samples, transform, tmp_path / "features")
    given = {"encoder_output": cached.media_input(samples[0].images[0]).items}
    training = make_model()
    set_trainable(training, encoder=True)
    with pytest.raises(ConfigError, match=r"data.cache_features needs a frozen encoder, and \d+ of its"):
        cache_features(training, samples, transform, tmp_path / "features")
    with pytest.raises(ModelError, match="The output of 'encoder' was computed before, and .* train"):
        training.encode(given)
    for wrong in ({**given, "images": given["encoder_output"]}, {"encoder_output": torch.ones(2, 3)}):
        with pytest.raises(ModelError, match="encoder_output must be the only keyword"):
            frozen.encode(wrong)
    named = make_model(encoder={"eye": tower(), "ear": tower()})
    with pytest.raises(ConfigError, match="a model with one encoder, got eye, ear"):
        cache_features(named, samples, transform, tmp_path / "features")
    with pytest.raises(ConfigError, match="a model with one encoder, got none"):
        cache_features(tiny_decoder(), samples, transform, tmp_path / "features")


def fill_until_killed(folder, when):
    """Fill a folder in shards of one image, and die at the end, or in the middle, of writing the third."""
    written = []

    def save(tensors, path):
        written.append(path)
        save_file(tensors, path)
        if len(written) == 3:
            if when == "writing":
                path.write_bytes(path.read_bytes()[:200])
            os.kill(os.getpid(), signal.SIGKILL)

    store.save_file = save
    store.SHARD_NBYTES = 1
    model, samples = make_model(), read_samples(folder / "rows.json")
    cache_features(model, samples, make_transform(model, folder), folder / "features", batch_size=1)


def test_a_killed_start_is_continued(tmp_path, samples):
    model = make_model()
    transform = make_transform(model, tmp_path)
    process = multiprocessing.get_context("fork").Process(
        target=fill_until_killed, args=(tmp_path, "writing")
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(FeatureStore(tmp_path / "features")) == 2
    seen = count_images(model)
    cached = cache_features(model, samples, transform, tmp_path / "features")
    assert sum(seen) == 1 + len(NAMES) - 2  # one for comparison
    assert not [file for file in (tmp_path / "features").iterdir() if file.name.startswith(".")]
    for (loss, _), (other, _) in zip(
        losses(model, samples, transform)[0], losses(model, samples, cached)[0], strict=True
    ):
        torch.testing.assert_close(other, loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.long)])
def test_workers_read_pixels_and_features(tmp_path, samples, method):
    model = make_model()
    transform = make_transform(model, tmp_path)
    workers = {"num_workers": 2, "start_method": method}
    cached = cache_features(model, samples, transform, tmp_path / "features", batch_size=2, **workers)
    expected, _ = losses(model, samples, transform)
    got, keywords = losses(model, samples, cached, **workers)
    assert keywords == {"encoder_output"}
    for (loss, _), (other, _) in zip(expected, got, strict=True):
        torch.testing.assert_close(other, loss, rtol=1e-6, atol=0)
    sent = pickle.loads(pickle.dumps(cached))  # as to workers that are not forked
    [image] = samples[0].images
    assert torch.equal(sent.media_input(image).items, cached.media_input(image).items)


def fill_on_ranks(rank, folder):
    model, samples = make_model(on_missing="participate"), read_samples(folder / "rows.json")
    transform = make_transform(model, folder)
    seen = count_images(model)
    cached = cache_features(model, samples, transform, folder / "features")
    (folder / f"seen{rank}").write_text(str(sum(seen)))
    for sample in samples:
        cached(sample)
    batch = padded_collate_images([cached(samples[1])])  # without images
    labels = batch.pop("labels")
    next_token_loss(model(**batch), labels)[0].backward()
    assert sum(seen) == int((folder / f"seen{rank}").read_text())
    assert all(not p.grad.any() for p in model.adapter.parameters())
    with pytest.raises(CheckpointError, match="another encoder or transform"):
        cache_features(make_model(encoder=tower(seed=4)), samples, transform, folder / "features")
    shard(model)
    with pytest.raises(ModelError, match="computed before the model is sharded"):
        cache_features(model, samples, transform, folder / "features")


def test_ranks_share_the_work(tmp_path, samples):
    run_on_ranks(fill_on_ranks, tmp_path)
    seen = [int((tmp_path / f"seen{rank}").read_text()) for rank in range(2)]
    assert sum(seen) == len(NAMES)
    assert len(FeatureStore(tmp_path / "features")) == len(NAMES)
