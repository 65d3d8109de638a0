"""Answers about images and recordings, in batches and turn by turn, against the model without caches."""

from dataclasses import replace

import pytest
import torch
import yaml
from audio_data import make_audio_folder
from own_data import VOCAB, configuration
from support import open_gates

from torchfuse.data import Media, Message, Sample, padded_collate_images
from torchfuse.generation import session
from torchfuse.tasks.conversation import Conversation
from torchfuse.tasks.evaluation import answer_losses
from torchfuse.tasks.prediction import predict
from torchfuse.tasks.prompt_settings import PromptSettings
from torchfuse.tasks.runs import build_model
from torchfuse.tasks.transforms import make_transform

NEW = 5
ARCHS = {
    "cross_attention": ("cross_attention", {}),
    "prefix": ("joint_decoder", {}),
    "placeholder": (
        "joint_decoder",
        {"encoder_token": {"image": VOCAB + 3, "audio": VOCAB + 5}},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_audio_folder(tmp_path_factory.mktemp("audio"))


@pytest.fixture(scope="module", params=[*ARCHS])
def built(folder, request):
    arch, options = ARCHS[request.param]
    encoders = {"image": str(folder / "clip"), "audio": str(folder / "whisper")}
    given = {"model": {"encoder": encoders, **options}}
    given["data"] = {"media_transforms": {"audio": "sound_reading.spectrogram"}}
    config = configuration(folder, arch, **given)
    config = yaml.safe_load(config.read_text())
    torch.manual_seed(3)
    model = build_model(config["model"], {}, device="cpu", dtype="fp32").eval()
    if arch == "cross_attention":
        open_gates(model)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(folder)
        transform = make_transform(model, config)
    settings = PromptSettings(transform, max_new_tokens=NEW, stop_tokens=())
    settings.check(model)
    return model, settings


def image(folder, number):
    return Media(folder / "pictures" / f"{4 * number}.png")


def sound(folder, number):
    return Media(folder / f"{number}.wav", modality="audio")


def chosen(model, transform, tokens, media):
    """The likeliest token after each one, without caches."""
    inputs = {"image": [], "audio": []}
    for each in media:
        inputs[each.modality].append(transform.media_input(each))
    messages = [Message("user", list(media))]
    sample = {
        "tokens": tokens,
        "images": inputs,
        "encoder_mask": transform.encoder_mask(tokens, transform.items(messages)),
    }
    return model(**padded_collate_images([sample])).argmax(dim=-1)[0].tolist()


@torch.no_grad()
def test_turns_with_images_and_recordings(folder, built):
    model, settings = built
    first = [image(folder, 0), "and", sound(folder, 1), "What?"]
    later = [sound(folder, 2), "Then", image(folder, 3), sound(folder, 1), "?"]
    if settings.transform.layout == "prefix":
        later = ["And then?"]
    turns, shown = [], [part for part in first if isinstance(part, Media)]
    with Conversation(model, settings, max_tokens=180, max_images=6) as conversation:
        for content in (first, later):
            conversation.ask(Message("user", content))
            turns.append((list(conversation.tokens), list(conversation.media)))
        assert conversation.report.images == len(set(conversation.media))
    assert turns[0][1] == shown
    for tokens, media in turns:
        expected = chosen(model, settings.transform, tokens, media)
        assert tokens[-NEW:] == expected[-NEW - 1 : -1]


def questions(folder):
    """Contents with an image, with sounds, without media, and with both."""
    return [
        [image(folder, 0), "What?"],
        [sound(folder, 1), "And", sound(folder, 2), "?"],
        ["Nothing"],
        [sound(folder, 3), image(folder, 4), "Both?"],
    ]


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@torch.no_grad()
def test_batches(folder, built, compile, monkeypatch):
    monkeypatch.setattr(session, "compiled", lambda function, device: function)
    model, settings = built
    contents = [*questions(folder), [image(folder, 5), image(folder, 6), "Two?"]]
    samples = [Sample([Message("user", content)]) for content in contents]
    together = predict(model, replace(settings, compile=compile), samples, batch_size=3)
    for sample, prediction in zip(samples, together, strict=True):
        [alone] = predict(model, settings, [sample], batch_size=1)
        assert prediction.text == alone.text


@torch.no_grad()
def test_losses_of_answers(folder, built):
    model, settings = built
    contents = questions(folder)
    answer = Message("assistant", ["It is 3."])
    samples = [Sample([Message("user", content), answer]) for content in contents]
    losses = answer_losses(model, settings.transform, samples, batch_size=3)
    for sample, loss in zip(samples, losses, strict=True):
        batch = padded_collate_images([settings.transform(sample)])
        labels = batch.pop("labels")[0, 1:]
        expected = torch.nn.functional.cross_entropy(model(**batch)[0, :-1], labels, reduction="sum")
        assert loss.total == pytest.approx(float(expected), rel=1e-5)
