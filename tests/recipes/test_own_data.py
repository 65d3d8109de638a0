"""Finetuning on the data that people have: two directories, LLaVA JSON and Parquet, nothing else."""

import json

import datasets
import hf
import pytest
import torch
import yaml
from PIL import Image
from programs import tune
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from torchfuse.data import LoaderOptions, StepLoader, padded_collate_images, read_samples
from torchfuse.tasks.runs import build_model, load_run
from torchfuse.tasks.transforms import make_transform
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two directories of pretrained models and two files of sixty rows."""
    folder = tmp_path_factory.mktemp("own")
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


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("arch", ["cross_attention", "joint_decoder", "mot", "deepstack"])
def test_two_files_train_as_they_are(folder, tmp_path, arch, packed):
    options = {"layers": [0, 1]} if arch == "deepstack" else {}
    more = {"packed": packed, "num_workers": 2 if arch == "mot" else 0}
    losses = run(folder, tmp_path, arch=arch, model=options, data=more)
    assert len(losses) == 2
    assert all(0 < loss < 20 for loss in losses)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("arch", ["cross_attention", "joint_decoder"])
def test_the_loss_is_that_of_the_rows_one_by_one(folder, tmp_path, arch, packed):
    train, num = str(folder / "rows.parquet"), 13
    data = {"train": train, "limit": num, "packed": packed}
    samples = read_samples(train)[:num]
    config = configuration(folder, arch, data=data, output_dir=str(tmp_path / "run"))
    given = yaml.safe_load(config.read_text())
    model = build_model(given["model"], {}, device="cpu", dtype="fp32")
    transform = make_transform(model, given)
    rows = StepLoader(samples, transform, LoaderOptions(packed=packed)).num_steps
    assert (rows < num) == packed
    (loss,) = run(
        folder, tmp_path, arch=arch, data=data, train={"lr": 0.0, "batch_size": rows, "max_steps": 1}
    )
    trained, transform = load_run(tmp_path / "run", device="cpu", dtype="fp32")
    assert loss == pytest.approx(loss_of(trained.eval(), transform, samples), rel=1e-5)


def test_workers_change_no_loss(folder, tmp_path):
    data = {"packed": True, "template": "chatml"}
    alone = run(folder, tmp_path, data=data, output_dir=str(tmp_path / "run"))
    workers = {"num_workers": 2, "start_method": "spawn", "prefetch_factor": 1}
    assert run(folder, tmp_path, data=data | workers) == alone
