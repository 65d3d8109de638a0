"""An audio tower trains, is evaluated and answers through the recipes, alone and beside one of images."""

import json

import pytest
import torch
import yaml
from audio_data import BINS, FRAMES, ROWS, make_audio_folder
from own_data import VOCAB, configuration, loss_of, losses_of_one_batch, run
from programs import tune

from torchfuse.data import LoaderOptions, MediaInput, MediaReader, StepLoader, read_samples
from torchfuse.tasks.runs import build_model, load_run
from torchfuse.tasks.transforms import make_transform

READER = {"audio": "sound_reading.spectrogram"}
PLACEHOLDERS = {"image": VOCAB + 3, "audio": VOCAB + 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_audio_folder(tmp_path_factory.mktemp("audio"))


def one_encoder(folder):
    """Model and rows of audio alone."""
    return {"encoder": str(folder / "whisper")}, str(folder / "rows.jsonl")


def two_encoders(folder, **options):
    """Model and rows of images and audio."""
    encoders = {"image": str(folder / "clip"), "audio": str(folder / "whisper")}
    return {"encoder": encoders, **options}, str(folder / "both.jsonl")


def placeholders(folder):
    return two_encoders(folder, encoder_token=PLACEHOLDERS)


CASES = [
    pytest.param("cross_attention", one_encoder, id="cross_attention"),
    pytest.param("joint_decoder", one_encoder, id="joint_decoder"),
    pytest.param("cross_attention", two_encoders, id="cross_attention-two"),
    pytest.param("joint_decoder", two_encoders, id="prefix-two"),
    pytest.param("joint_decoder", placeholders, id="placeholder-two"),
    pytest.param("mot", placeholders, id="mot-two"),
]


def load(folder, arch, given):
    """The model of a configuration, and its transform."""
    config = yaml.safe_load(configuration(folder, arch, **given).read_text())
    model = build_model(config["model"], {}, device="cpu", dtype="fp32")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(folder)
        return model, make_transform(model, config)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("arch", "sections"), CASES)
def test_the_loss_is_that_of_the_rows_one_by_one(folder, tmp_path, arch, sections, packed):
    model, rows = sections(folder)
    data = {"train": rows, "media_transforms": READER, "packed": packed, "num_workers": 2 * packed}
    given = {"model": model, "data": data}
    samples = read_samples(rows)
    options = LoaderOptions(packed=packed)
    batch_size = StepLoader(samples, load(folder, arch, given)[1], options).num_steps
    assert (batch_size < ROWS) == packed
    _, loss = losses_of_one_batch(folder, tmp_path, batch_size=batch_size, arch=arch, **given)
    model, transform = load_run(tmp_path / "run", device="cpu", dtype="fp32")
    assert loss == pytest.approx(loss_of(model.eval(), transform, samples), rel=2e-6)
    silence = MediaInput(torch.zeros(1, BINS, FRAMES), keyword="input_features")
    images = transform.image_transform
    silent = transform.with_reader(MediaReader(images, {"audio": lambda media: silence}))
    assert loss != pytest.approx(loss_of(model, silent, samples), rel=2e-5)


@pytest.mark.parametrize(("arch", "sections"), CASES)
def test_it_learns_is_evaluated_and_answers(folder, tmp_path, arch, sections):
    model, rows = sections(folder)
    data = {"train": rows, "test": rows, "media_transforms": READER}
    train = {"lr": 1e-2, "batch_size": 4, "epochs": 2, "max_steps": None}
    losses = run(folder, tmp_path, arch=arch, model=model, data=data, train=train, save_every=4)
    assert losses[-1] < losses[0]
    output = tmp_path / "run"
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step_4", "step_6"]
    answers = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == ROWS

    def recipe(name, **keys):
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"run": str(output), **keys}))
        return tune(folder, f"torchfuse/recipes/{name}.py", "--config", file)

    assert f"of {ROWS}" in recipe("evaluate", questions=rows)
    written = tmp_path / "answers.jsonl"
    recipe("generate", prompts=rows, output=str(written), batch_size=5, sampling={"max_new_tokens": 3})
    assert [[media.modality for media in sample.media] for sample in read_samples(written)] == [
        [media.modality for media in sample.media] for sample in read_samples(rows)
    ]

    question = {"question": "<audio> What?", "audio": ["3.wav"]}
    if "both" in rows:
        question |= {"question": "<audio> or <image> ?", "images": ["pictures/4.png"]}
    prompts = folder / "prompts.yaml"
    prompts.write_text(yaml.safe_dump([question, {"question": "What?"}]))
    written.unlink()
    recipe("generate", prompts=str(prompts), output=str(written), sampling={"max_new_tokens": 3})
    first, second = read_samples(written)
    assert [media.path.name for media in first.media] == ["3.wav", "4.png"][: len(question) - 1]
    assert not second.media


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_cached_features_change_no_loss(folder, tmp_path, packed):
    model, rows = one_encoder(folder)
    data = {"train": rows, "media_transforms": READER, "packed": packed}
    losses = run(folder, tmp_path, model=model, data=data, train={"lr": 0.3, "batch_size": 1})
    for _ in range(2):  # the second run finds them
        cached = data | {"cache_features": str(tmp_path / "features")}
        again = run(folder, tmp_path, model=model, data=cached, train={"lr": 0.3, "batch_size": 1})
        assert again == pytest.approx(losses, rel=1e-5)


def test_features_of_several_encoders_are_not_cached(folder, tmp_path, capfd):
    model, rows = two_encoders(folder)
    data = {"train": rows, "media_transforms": READER, "cache_features": str(tmp_path / "features")}
    with pytest.raises(SystemExit, match="^1$"):
        run(folder, tmp_path, model=model, data=data)
    assert "needs a model with one encoder, got audio, image: leave it out" in capfd.readouterr().err


def test_names_of_encoders_that_are_no_modalities(folder, tmp_path, capfd):
    _, rows = two_encoders(folder)
    model = {"encoder": {"eyes": str(folder / "clip"), "ears": str(folder / "whisper")}}
    data = {"train": rows, "media_transforms": READER}
    with pytest.raises(SystemExit, match="^1$"):
        run(folder, tmp_path, model=model, data=data)
    assert "No media are for ears, eyes: each of several encoders is named" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
