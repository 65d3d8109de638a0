"""An audio tower trains, is evaluated and answers through the recipes: all that is added is a function that reads sound."""

import json
import wave

import numpy as np
import pytest
import torch
import transformers
import yaml
from own_data import configuration, loss_of, losses_of_one_batch, make_folder, run
from programs import tune

from torchfuse.data import LoaderOptions, MediaInput, MediaReader, StepLoader, read_samples
from torchfuse.tasks.runs import build_model, load_run
from torchfuse.tasks.transforms import make_transform

FRAMES, BINS = 22, 6
ROWS = 13
READER = """
import io
import wave

import numpy as np
import torch

from torchfuse.data import MediaInput


def spectrogram(media):
    with wave.open(io.BytesIO(media.read())) as sound:
        levels = np.frombuffer(sound.readframes(sound.getnframes()), "<i2") / 2**15
    power = torch.stft(
        torch.tensor(levels).float(), 2 * 6 - 2, 7, window=torch.hann_window(10), return_complex=True
    ).abs()
    return MediaInput(torch.log1p(power)[None, :, :22], keyword="input_features")
"""


def write_tone(file, number):
    levels = 2e4 * np.sin(np.arange(200) * (0.1 + 0.07 * number))
    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(1000)
        sound.writeframes(levels.astype("<i2").tobytes())


def row(number):
    """A conversation with one recording, two, or none."""
    names = [f"{number}.wav", f"{number + 1}.wav"][: number % 3]
    question = {"role": "user", "content": "<audio>" * len(names) + f"Number {number}?"}
    if number % 2:
        parts = [{"type": "audio"} for _ in names] + [{"type": "text", "text": f"Number {number}?"}]
        question["content"] = parts
    answer = {"role": "assistant", "content": f"It is {number}."}
    return {"messages": [question, answer], "audio": names}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("audio"))
    (folder / "sound_reading.py").write_text(READER)
    for number in range(ROWS + 1):
        write_tone(folder / f"{number}.wav", number)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row(n)) + "\n" for n in range(ROWS)))
    torch.manual_seed(7)
    config = transformers.WhisperConfig(
        vocab_size=40,
        d_model=12,
        encoder_layers=2,
        encoder_attention_heads=3,
        encoder_ffn_dim=17,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=8,
        num_mel_bins=BINS,
        max_source_positions=FRAMES // 2,
        init_std=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    transformers.WhisperModel(config).save_pretrained(folder / "whisper")
    # In a file with the name of an image processor's.
    transformers.WhisperFeatureExtractor(BINS).save_pretrained(folder / "whisper")
    return folder


def load(folder, arch, given):
    """The model of a configuration, and its transform."""
    config = yaml.safe_load(configuration(folder, arch, **given).read_text())
    model = build_model(config["model"], {}, device="cpu", dtype="fp32")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(folder)
        return model, make_transform(model, config)


def sections(folder, **data):
    """The sections of the configuration that have to do with audio."""
    rows = str(folder / "rows.jsonl")
    reader = {"audio": "sound_reading.spectrogram"}
    return {
        "model": {"encoder": str(folder / "whisper")},
        "data": {"train": rows, "media_transforms": reader, **data},
    }


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("arch", ["cross_attention", "joint_decoder"])
def test_the_loss_is_that_of_the_rows_one_by_one(folder, tmp_path, arch, packed):
    given = sections(folder, packed=packed, num_workers=2 * packed)
    model, transform = load(folder, arch, given)
    rows = StepLoader(
        read_samples(given["data"]["train"]), transform, LoaderOptions(packed=packed)
    ).num_steps
    assert (rows < ROWS) == packed
    _, loss = losses_of_one_batch(folder, tmp_path, batch_size=rows, arch=arch, **given)
    model, transform = load_run(tmp_path / "run", device="cpu", dtype="fp32")
    samples = read_samples(folder / "rows.jsonl")
    assert loss == pytest.approx(loss_of(model.eval(), transform, samples), rel=2e-6)
    silence = MediaInput(torch.zeros(1, BINS, FRAMES), keyword="input_features")
    silent = transform.with_reader(MediaReader(None, {"audio": lambda media: silence}))
    assert loss != pytest.approx(loss_of(model, silent, samples), rel=3e-5)


@pytest.mark.parametrize("arch", ["cross_attention", "joint_decoder"])
def test_it_learns_is_evaluated_and_answers(folder, tmp_path, arch):
    given = sections(folder, test=str(folder / "rows.jsonl"))
    train = {"lr": 1e-2, "batch_size": 4, "epochs": 2, "max_steps": None}
    losses = run(folder, tmp_path, arch=arch, **given, train=train, save_every=4)
    assert losses[-1] < losses[0]
    output = tmp_path / "run"
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step_4", "step_6"]
    answers = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == ROWS

    given = {"run": str(output), "device": "cpu"}
    rows = str(folder / "rows.jsonl")
    (folder / "evaluate.yaml").write_text(yaml.safe_dump(given | {"questions": rows}))
    printed = tune(folder, "torchfuse/recipes/evaluate.py", "--config", folder / "evaluate.yaml")
    assert f"of {ROWS}" in printed
    written = tmp_path / "answers.jsonl"
    given |= {"prompts": rows, "output": str(written), "sampling": {"max_new_tokens": 3}}
    (folder / "generate.yaml").write_text(yaml.safe_dump(given))
    tune(folder, "torchfuse/recipes/generate.py", "--config", folder / "generate.yaml")
    again = read_samples(written)
    assert [[m.modality for m in s.media] for s in again] == [["audio"] * (n % 3) for n in range(ROWS)]
