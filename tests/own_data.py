"""Two directories of pretrained models, and files of records as people have them."""

from __future__ import annotations

import json
import sys

import datasets
import hf
import pytest
import torch
import yaml
from PIL import Image
from programs import tune
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torchfuse.recipes import finetune

from torchfuse.data import padded_collate_images
from torchfuse.training import next_token_loss

ROWS = 60
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<pad>"]
VOCAB = 256 + len(SPECIAL)
SHAPE = {"height": 12, "width": 12}


def save_tokenizer(folder):
    """A tokenizer of bytes with a chat template, beside a model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    bytes_.add_special_tokens(SPECIAL)
    bytes_.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<|im_end|>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML} | special))


def picture(number):
    return Image.new("RGB", (9 + number % 5, 17), (4 * number % 256, 7 * number % 256, 80))


def turns(number):
    """A conversation: one image, two images, none, or one with several turns."""
    tags = ["<image>\n", "<image><image>\n", "", "<image>\n"][number % 4]
    said = [("human", f"{tags}Number {number}?"), ("gpt", f"It is {number}.")]
    return said if number % 4 < 3 else [*said, ("human", "Sure?"), ("gpt", "Yes.")]


def make_folder(folder):
    """Write two directories of pretrained models and two files of sixty rows."""
    config = {"vocab_size": VOCAB, "max_position_embeddings": 257}
    hf.llama(folder / "llama", **config, bos_token_id=None, eos_token_id=257, pad_token_id=258)
    save_tokenizer(folder / "llama")
    hf.clip_tower(folder / "clip")
    eyes = {"crop_size": SHAPE, "size": SHAPE, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(eyes))
    (folder / "pictures").mkdir()
    records, columns = [], []
    for number in range(ROWS):
        shown = [f"{number}.png", f"{number + 1}.png"][: [1, 2, 0, 1][number % 4]]
        for name in shown:
            picture(int(name[:-4])).save(folder / "pictures" / name)
        said = [{"from": role, "value": text} for role, text in turns(number)]
        records.append({"id": number, "image": shown, "conversations": said})
        roles = {"human": "user", "gpt": "assistant"}
        messages = [{"role": roles[role], "content": text} for role, text in turns(number)]
        images = [(folder / "pictures" / name).read_bytes() for name in shown]
        columns.append({"messages": messages, "images": [{"bytes": b, "path": None} for b in images]})
    (folder / "llava.json").write_text(json.dumps(records))
    datasets.Dataset.from_list(columns).to_parquet(folder / "rows.parquet", batch_size=7)
    return folder


def configuration(folder, arch="cross_attention", **changes):
    options = {"every": 2, "fusion_vocab_size": 1} if arch == "cross_attention" else {}
    config = {
        "output_dir": str(folder / "run"),
        "model": {
            "_component_": "torchfuse.from_pretrained",
            "decoder": str(folder / "llama"),
            "encoder": str(folder / "clip"),
            "arch": arch,
            **options,
        },
        "data": {
            "train": [
                {"path": str(folder / "llava.json"), "image_root": str(folder / "pictures")},
                {"path": str(folder / "rows.parquet")},
            ]
        },
        "train": {"batch_size": 3, "max_steps": 2},
    }
    for key, value in changes.items():
        config[key] = config.get(key, {}) | value if isinstance(value, dict) else value
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def run(folder, tmp_path, **changes):
    """Finetune through ``tune run``; return the losses."""
    output = str(tmp_path / "run")
    printed = tune(
        folder,
        "torchfuse/recipes/finetune.py",
        "--config",
        configuration(folder, **{"output_dir": output} | changes),
    )
    assert f"saved {output}" in printed
    return [loss for _, loss in json.loads((tmp_path / "run" / "losses.json").read_text())]


def learned(output):
    """The tensors of a run's artifact, by name."""
    return load_file(output / "fusion" / "fusion.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def error_of_run(folder, monkeypatch, capfd, *arguments, **changes):
    """The one error that a run prints, by changes of a configuration that is right, and of its command line."""
    file = configuration(folder, **changes)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["finetune", "--config", str(file), *arguments])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit, match="^1$"):
        finetune.main()
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


@torch.no_grad()
def loss_of(model, transform, samples):
    """The loss a token of samples, one by one."""
    total, count = torch.zeros(()), 0
    for sample in samples:
        batch = padded_collate_images([transform(sample)])
        labels = batch.pop("labels")
        assert transform.decode([t for t in labels[0].tolist() if t >= 0]).startswith("It is")
        summed, number = next_token_loss(model(**batch), labels)
        total, count = total + summed, count + number
    return float(total / count)


def losses_of_one_batch(folder, tmp_path, *, batch_size, train=(), **changes):
    """The losses of two steps on the same rows; ``tmp_path / "run"`` is left as it is after the first.

    Cross-attention starts as if there were no images; after a large step they matter.
    """
    steps = {"lr": 1.0, "batch_size": batch_size, "epochs": 2, "max_steps": 2, **dict(train)}
    losses = run(folder, tmp_path, train=steps, **changes)
    first = run(folder, tmp_path, train=steps | {"max_steps": 1}, **changes)
    assert first == losses[:1]
    return losses
