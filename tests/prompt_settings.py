"""Tiny models that answer questions about tiny images, with all that prompts need."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from support import FEATURE_DIM, VOCAB, open_gates, tiny_decoder
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from torchfuse import fuse
from torchfuse.data.images import ImageTransform
from torchfuse.data.samples import Message, Sample
from torchfuse.data.transform import SampleTransform
from torchfuse.generation.sampling import Sampling
from torchfuse.tasks.prompt_settings import PromptSettings
from torchfuse.tasks.prompts import user_message

PER_IMAGE = 2
MARK = VOCAB  # the first id behind the vocabulary
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(4, VOCAB))]
LAYOUTS = {
    "last": {"scope": "last"},
    "all": {"scope": "all"},
    "group": {"scope": "group"},
    "placeholder": {"layout": "placeholder"},
    "prefix": {"layout": "prefix", "image_token": None},
}


class PixelEncoder(nn.Module):
    """Two features of each image of 8 x 8."""

    feature_dim = FEATURE_DIM
    num_tokens = PER_IMAGE
    image_size = 8

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.ModuleList([nn.Linear(3 * 8 * 8, PER_IMAGE * FEATURE_DIM)])
        self.seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += images.shape[0] * images.shape[1]
        return torch.tanh(self.layers[0](images.flatten(2))).view(images.shape[0], -1, FEATURE_DIM)


def tokenizer(folder: Path, special: Sequence[str] = ()) -> Path:
    """A tokenizer of words, some of them special, as a language model's directory holds it."""
    folder.mkdir(exist_ok=True)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([*WORDS[:4], *special])
    words.save(str(folder / "tokenizer.json"))
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(ids))
    return folder


def give_tokenizer(llama: Path) -> None:
    """Put the tokenizer into the directory of a model, and its ids into the model's configuration."""
    config = json.loads((llama / "config.json").read_text())
    tokenizer(llama)
    config |= json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config))


def images(folder: Path, height: int = 8, width: int | None = None) -> dict[str, Path]:
    """Images that differ in every pixel."""
    made = {}
    for index, name in enumerate("abc"):
        shape = (height, width or height, 3)
        pixels = torch.randint(256, shape, generator=torch.Generator().manual_seed(index))
        made[name] = folder / f"{name}.png"
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(made[name])
    return made


def transform(folder: Path, layout: str, kind: Any = SampleTransform, **given: Any) -> Any:
    """The transform of a layout, with the template plain unless another is given."""
    options: dict[str, Any] = {"image_token": MARK, "features_per_image": PER_IMAGE}
    options |= {"image_transform": ImageTransform(8)} | LAYOUTS[layout]
    return kind(tokenizer(folder / "words"), **options | given)


def sample(text: str, images: Any = (), answer: str | None = None) -> Sample:
    """A question, with its answer if it is given."""
    question = user_message(text, images)
    return Sample([question] if answer is None else [question, Message("assistant", [answer])])


def model_for(layout: str, max_seq_len: int = 97) -> Any:
    decoder = tiny_decoder(max_seq_len=max_seq_len)
    if layout in ("placeholder", "prefix"):
        token = {"encoder_token": MARK} if layout == "placeholder" else {}
        model = fuse(decoder, PixelEncoder(), arch="joint_decoder", placement=layout, **token)
    else:
        model = open_gates(fuse(decoder, PixelEncoder(), every=2, fusion_vocab_size=1))
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.mul_(30)
        rows = model.output.weight  # of the head: special tokens are never the likeliest
        rows[:4] = rows[4:].mean(dim=0)
    return model.eval().requires_grad_(False)


def make_settings(
    folder: Path, layout: str, made: SampleTransform | None = None, **options: Any
) -> PromptSettings:
    given = {
        "max_new_tokens": 5,
        "sampling": Sampling(temperature=0, repetition_penalty=1.7),
        "stop_tokens": (),
    }
    return PromptSettings(made or transform(folder, layout), **given | options)
