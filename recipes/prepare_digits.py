"""Prepare data and two pretrained checkpoints for the digits recipes.

scikit-learn contains 1,797 images of handwritten digits. They are split once: neither the vision tower
nor the fused model is trained on test images. From them this makes, in one folder,

* ``llama/``: a Llama trained on text alone, as transformers saves it, with its tokenizer;
* ``clip/``: a CLIP trained on training images and captions, as transformers saves it;
* ``images/`` and ``questions/{train,test}.jsonl``: questions about one image, two images or none;
* ``prompt.yaml``: a few test questions for the generate recipe.

Launch: ``python -m torchfuse.recipes.prepare_digits demo``
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

WORDS: Final = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen"
).split()
SPECIAL: Final = ["<pad>", "<bos>", "<unk>", "<eos>"]  # transformers reads an end with id 2 differently
VOCABULARY: Final = [
    *SPECIAL,
    *WORDS,
    *"? plus which digit even odd or what comes next is larger the sum a photo of".split(),
]
SPECIAL_IDS: Final = {
    f"{name}_token_id": VOCABULARY.index(f"<{name}>") for name in ("pad", "bos", "eos")
}
FILLERS: Final = "a photo of the digit is".split()
IMAGE_SIZE: Final = 16
MEAN: Final = [0.305, 0.305, 0.305]
STD: Final = [0.376, 0.376, 0.376]
TEST_SHARE: Final = 0.25

# Shifts of training images, in pixels down and right.
SHIFTS: Final = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))

# What this program writes into the folder, and the file that marks the folder as its own.
PARTS: Final = ("clip", "images", "llama", "prompt.yaml", "questions")
MARKER: Final = ".made_by_prepare_digits"

# Questions, each with the answer for digits a and b.
Question = tuple[str, Callable[[int, int], str]]
ONE_IMAGE: Final[tuple[Question, ...]] = (
    ("which digit ?", lambda a, _: WORDS[a]),
    ("even or odd ?", lambda a, _: "odd" if a % 2 else "even"),
    ("what comes next ?", lambda a, _: WORDS[a + 1]),
)
TWO_IMAGES: Final[tuple[Question, ...]] = (
    ("which is larger ?", lambda a, b: WORDS[max(a, b)]),
    ("what is the sum ?", lambda a, b: WORDS[a + b]),
)
TEXT: Final[tuple[Question, ...]] = (("{a} plus {b} ?", lambda a, b: WORDS[a + b]),)


def main() -> None:
    """Write everything into the folder given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to put it, for example demo")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--llama-steps", type=int, default=1000)
    parser.add_argument("--clip-steps", type=int, default=800)
    options = parser.parse_args()
    folder: Path = options.folder
    _check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".prepare-") as temporary:
        made = Path(temporary)
        digits, tokenizer = split_digits(options.seed), make_tokenizer()
        make_llama(made / "llama", tokenizer, options.llama_steps)
        make_clip(made / "clip", tokenizer, digits, options.clip_steps)
        make_questions(made, digits, options.seed)
        (folder / MARKER).touch()
        for part in sorted(made.iterdir()):
            target = folder / part.name
            if target.is_dir():
                shutil.rmtree(target)
            part.replace(target)


def _check_folder(folder: Path) -> None:
    """Exit if files that this program did not write would be replaced."""
    if folder.exists() and not folder.is_dir():
        sys.exit(f"error: {folder} is a file; name a folder.")
    foreign = [name for name in PARTS if (folder / name).exists()]
    if foreign and not (folder / MARKER).exists():
        sys.exit(
            f"error: {folder} holds {', '.join(foreign)} that this program did not make, and would "
            "replace. Name another folder."
        )


# --- digits --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Digits:
    """Images as bytes ``[n, 16, 16]``, labels ``[n]``, and the indices of training and test images."""

    pixels: np.ndarray
    labels: np.ndarray
    train: np.ndarray
    test: np.ndarray


def split_digits(seed: int) -> Digits:
    """Load the digits, resize them and split them at random."""
    digits = load_digits()
    small = (digits.images / 16 * 255).round().astype(np.uint8)
    side = (IMAGE_SIZE, IMAGE_SIZE)
    pixels = np.stack([np.asarray(Image.fromarray(i).resize(side, Image.BICUBIC)) for i in small])
    order = np.random.default_rng(seed).permutation(len(pixels))
    num_test = int(len(pixels) * TEST_SHARE)
    return Digits(pixels, digits.target, np.sort(order[num_test:]), np.sort(order[:num_test]))


# --- text ----------------------------------------------------------------------------------------


def make_tokenizer() -> Tokenizer:
    """Return a tokenizer of whole words."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def sentences() -> list[tuple[list[str], str, str]]:
    """Return all texts of the language model: words of digits, a question, and the answer."""
    pairs = list(product(range(10), range(10)))
    single = [([WORDS[a]], text, answer(a, a)) for a in range(10) for text, answer in ONE_IMAGE]
    double = [
        ([WORDS[a], WORDS[b]], text, answer(a, b)) for a, b in pairs for text, answer in TWO_IMAGES
    ]
    plain: list[tuple[list[str], str, str]] = [
        ([], text.format(a=WORDS[a], b=WORDS[b]), answer(a, b))
        for a, b in pairs
        for text, answer in TEXT
    ]
    return single + double + plain


def context(digits: list[str], question: str) -> str:
    """Return words of digits among random other words, then the question: ``a photo six is ...``."""
    parts = []
    for digit in digits:
        parts += [*random.choices(FILLERS, k=random.randrange(3)), digit]
    parts += random.choices(FILLERS, k=random.randrange(3)) if digits else []
    return " ".join([*parts, question])


def make_llama(folder: Path, tokenizer: Tokenizer, steps: int) -> None:
    """Train a Llama on text alone, every token of it, and save it as transformers does."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        **SPECIAL_IDS,
    )
    model = LlamaForCausalLM(config)
    texts = sentences()

    def loss(batch: Tensor) -> Tensor:
        lines = [
            f"<bos> {context(digits, question)} {answer} <eos>"
            for digits, question, answer in (texts[i] for i in batch.tolist())
        ]
        rows = [torch.tensor(e.ids) for e in tokenizer.encode_batch(lines, add_special_tokens=False)]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return model(tokens, labels=tokens.masked_fill(tokens == config.pad_token_id, -100)).loss

    train("llama", model, loss, len(texts), batch_size=64, steps=steps, lr=2e-3)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))


# --- images --------------------------------------------------------------------------------------


def make_clip(folder: Path, tokenizer: Tokenizer, digits: Digits, steps: int) -> None:
    """Train a CLIP on training images and captions, and save it as transformers does."""
    model = CLIPModel(
        CLIPConfig(
            text_config=CLIPTextConfig(
                vocab_size=len(VOCABULARY),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=16,
                **SPECIAL_IDS,
            ).to_dict(),
            vision_config=CLIPVisionConfig(
                hidden_size=96,
                intermediate_size=192,
                num_hidden_layers=4,
                num_attention_heads=4,
                image_size=IMAGE_SIZE,
                patch_size=8,
            ).to_dict(),
            projection_dim=64,
        )
    )
    captions = torch.tensor(
        [tokenizer.encode(f"<bos> a photo of the digit {WORDS[d]} <eos>").ids for d in range(10)]
    )
    images, targets = normalise(digits.pixels), torch.from_numpy(digits.labels)
    train_images, train_targets = images[digits.train], targets[digits.train]

    def loss(batch: Tensor) -> Tensor:
        # The batch is scored against all ten captions; images of one digit share a caption.
        out = model(input_ids=captions, pixel_values=shift(train_images[batch]))
        return F.cross_entropy(out.logits_per_image, train_targets[batch])

    train("clip", model, loss, len(train_images), batch_size=128, steps=steps, lr=1e-3)
    with torch.no_grad():
        out = model.eval()(input_ids=captions, pixel_values=images[digits.test])
        correct = (out.logits_per_image.argmax(dim=1) == targets[digits.test]).float().mean()
    print(f"clip: {correct:.1%} of {len(digits.test)} test images match their caption best")
    model.save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessor(size=size, crop_size=size, image_mean=MEAN, image_std=STD).save_pretrained(folder)


def normalise(pixels: np.ndarray) -> Tensor:
    """Convert bytes ``[n, 16, 16]`` to normalised pixels ``[n, 3, 16, 16]``."""
    values = torch.from_numpy(pixels).float().div(255)[:, None].expand(-1, 3, -1, -1)
    return (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def shift(images: Tensor) -> Tensor:
    """Shift a batch of images by a random one of the shifts."""
    return torch.roll(images, random.choice(SHIFTS), dims=(-2, -1))


# --- questions -----------------------------------------------------------------------------------


def make_questions(folder: Path, digits: Digits, seed: int) -> None:
    """Write the images, and questions about those of each split."""
    (folder / "images").mkdir()
    (folder / "questions").mkdir()
    rng = random.Random(seed)
    splits = {"train": (digits.train, 4, SHIFTS), "test": (digits.test, 1, SHIFTS[:1])}
    for split, (indices, rounds, shifts) in splits.items():
        for index, (number, by) in product(indices, enumerate(shifts)):
            picture = np.roll(digits.pixels[index], by, axis=(0, 1))
            Image.fromarray(picture).save(folder / "images" / image_name(int(index), number))
        records = [
            record
            for _ in range(rounds)
            for record in questions_about(list(indices), digits.labels, len(shifts), rng)
        ]
        rng.shuffle(records)
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "questions" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    shown = [image_name(int(index), 0) for index in digits.test[:2]]
    (folder / "prompt.yaml").write_text(prompt_yaml(*shown), encoding="utf-8")


def questions_about(
    indices: list[int], labels: np.ndarray, num_shifts: int, rng: random.Random
) -> list[dict[str, Any]]:
    """Return records of all kinds of questions, each about every image once."""
    records = []

    def add(kind: str, question: str, answer: str, *shown: int) -> None:
        names = [image_name(int(index), rng.randrange(num_shifts)) for index in shown]
        images = [f"../images/{name}" for name in names]
        records.append({"kind": kind, "question": question, "answer": answer, "images": images})

    for text, answer in ONE_IMAGE:
        for i in indices:
            add("one_image", f"<image> {text}", answer(labels[i], labels[i]), i)
    partners = indices.copy()
    for text, answer in TWO_IMAGES:
        rng.shuffle(partners)
        for i, j in zip(indices, partners, strict=True):
            add("two_images", f"<image> <image> {text}", answer(labels[i], labels[j]), i, j)
    for text, answer in TEXT:
        for _ in range(len(indices) // 2):
            a, b = rng.randrange(10), rng.randrange(10)
            add("text", text.format(a=WORDS[a], b=WORDS[b]), answer(a, b))
    return records


def image_name(index: int, shift: int) -> str:
    """Return the file name of a digit, shifted by one of the shifts."""
    return f"{index:04d}.png" if shift == 0 else f"{index:04d}-{shift}.png"


def prompt_yaml(first: str, second: str) -> str:
    """Return prompts for the generate recipe."""
    return (
        "# Prompts for torchfuse/recipes/generate.py; paths are relative to this file.\n"
        f'- question: "<image> which digit ?"\n  images: [images/{first}]\n'
        f'- question: "<image> even or odd ?"\n  images: [images/{second}]\n'
        f'- question: "<image> <image> what is the sum ?"\n'
        f"  images: [images/{first}, images/{second}]\n"
        '- question: "two plus three ?"\n'
    )


# --- training ------------------------------------------------------------------------------------


def train(
    name: str,
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    num_rows: int,
    *,
    batch_size: int,
    steps: int,
    lr: float,
) -> None:
    """Train all parameters of a model on random batches of rows."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    with tqdm(range(steps), desc=f"train {name}", disable=None) as bar:
        for _ in bar:
            value = loss(torch.randint(num_rows, (batch_size,)))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{value.item():.3f}")
    print(f"{name}: loss {value.item():.3f} after {steps} steps")


if __name__ == "__main__":
    main()
