"""LLaVA by the commands that the documentation prints: stage 1, stage 2, LoRA, export into transformers."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import true_sizes
from programs import start, tune
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from torchfuse import merge_lora
from torchfuse.cli.main import main
from torchfuse.data import padded_collate_images, read_samples
from torchfuse.tasks import load_run

PAGE = Path(__file__).parents[2] / "docs" / "configs.md"
# Sizes, and rates at which so small a model learns in a few steps.
STEPS = 13
SMALL = "device=cpu dtype=fp32 data.max_seq_len=120 data.num_workers=0 train.warmup_steps=0"
SMALL += f" train.gradient_accumulation_steps=1 train.max_steps={STEPS} train.epochs=9"
RATES = {
    "stage1": "train.batch_size=8 train.lr=0.3",
    "stage2": "train.lr=3e-3",
    "lora": "train.lr.lora.decoder=1e-2",
}
ADAPTER = {f"adapter.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}


def page_commands():
    """The commands of the page, by the folder that each writes; the folders are below ``runs``."""
    section = PAGE.read_text().partition("## LLaVA in three commands")[2]
    (block,) = re.findall(
        r"^```bash\n(.*?)^```", section.partition("\n## ")[0], re.DOTALL | re.MULTILINE
    )
    commands = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]
    outputs = [[word for word in command if word.startswith("output_dir=")] for command in commands]
    names = [output[0].removeprefix("output_dir=runs/") for output in outputs[:-1]]
    return dict(zip([*names, "export"], commands, strict=True))


COMMANDS = page_commands()


def make_folder(folder):
    """Checkpoints and data with the names that the page has."""
    true_sizes.make_llava_folder(folder)
    (folder / "checkpoints" / "Llama-3.1-8B-Instruct").rename(folder / "llama")
    (folder / "checkpoints" / "clip-vit-large-patch14-336").rename(folder / "clip")
    datasets = folder / "datasets"
    for images in (datasets / "LLaVA-Pretrain" / "images", datasets / "coco" / "train2017"):
        shutil.copytree(images, folder, dirs_exist_ok=True)
    (datasets / "LLaVA-Pretrain" / "blip_laion_cc_sbu_558k.json").rename(folder / "captions.json")
    conversations = datasets / "LLaVA-Instruct-150K" / "llava_instruct_150k.json"
    shutil.copy(conversations, folder / "own.json")
    conversations.rename(folder / "conversations.json")
    shutil.rmtree(datasets)
    return folder


def small(name, *changes):
    """A command of the page at a small size."""
    return [*COMMANDS[name], *SMALL.split(), *RATES[name].split(), *changes]


def losses(run):
    return [loss for _, loss in json.loads((run / "losses.json").read_text())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which the commands of the page have run."""
    folder = make_folder(tmp_path_factory.mktemp("llava"))
    for name in RATES:
        program, run, *arguments = small(name)
        assert [program, run] == ["tune", "run"]
        tune(folder, *arguments)
    return folder


@pytest.fixture(scope="module")
def models(folder):
    """By name of a run, its model and transform in fp32."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        return {name: load_run(f"runs/{name}", device="cpu", dtype="fp32") for name in RATES}


def state_of(models, name):
    return {key: value.clone() for key, value in models[name][0].state_dict().items()}


def changed(before, after):
    return {name for name in after if name in before and not torch.equal(before[name], after[name])}


def test_the_loss_falls(folder):
    for name in RATES:
        run = losses(folder / "runs" / name)
        assert len(run) == STEPS
        assert sum(run[-4:]) < 0.97 * sum(run[:4]), name


def test_what_llava_trains_is_trained(models, folder):
    first, second, lora = (state_of(models, name) for name in RATES)
    pretrained = load_file(folder / "llama" / "model.safetensors")
    base = {name for name in first if name.startswith("decoder.")}
    encoder = {name for name in first if name.startswith("encoder.")}
    assert base | encoder | ADAPTER == first.keys()
    embedding = "decoder.tok_embeddings.weight"
    assert torch.equal(first[embedding], pretrained["model.embed_tokens.weight"])
    assert changed(first, second) == base | ADAPTER
    lora_names = lora.keys() - second.keys()
    assert all(name.endswith(("lora_a.weight", "lora_b.weight")) for name in lora_names)
    assert len(lora_names) == 2 * 7 * true_sizes.TEXT["num_hidden_layers"]
    assert all(lora[name].any() for name in lora_names)
    assert changed(second, lora) == ADAPTER


@pytest.mark.parametrize(("name", "earlier"), [("stage2", "stage1"), ("lora", "stage2")])
def test_a_stage_starts_from_the_one_before_it(models, folder, name, earlier):
    """With a rate of zero it saves what it started from."""
    output = f"runs/{name}_start"
    rates = "{lora.decoder: 0.0, fusion: 0.0}" if name == "lora" else "0.0"
    changes = [f"output_dir={output}", f"train.lr={rates}", "train.max_steps=1"]
    tune(folder, *small(name, *changes)[2:])
    assert losses(folder / output)[0] == losses(folder / "runs" / name)[0]
    saved = load_file(folder / output / "fusion" / "fusion.safetensors")
    trained = folder / output / "fusion" / "trained.safetensors"
    saved |= load_file(trained) if trained.exists() else {}
    before = state_of(models, earlier)
    assert saved.keys() & before.keys() >= ADAPTER
    assert all(torch.equal(saved[key], before[key]) for key in saved.keys() & before.keys())
    assert not any(saved[key].any() for key in saved if key.endswith("lora_b.weight"))


@pytest.fixture(scope="module")
def samples(models, folder):
    """Rows with an image, with two, with none and with several turns, encoded."""
    turns = json.loads((folder / "conversations.json").read_text())[2]
    assert len(turns["conversations"]) == 4
    rows = [turns]
    for images, text in (
        (["1.png"], "<image>\nNumber?"),
        (["2.png", "3.png"], "<image> <image>?"),
        ([], "?"),
    ):
        said = [{"from": "human", "value": text}, {"from": "gpt", "value": "Seven."}]
        rows.append({"image": images, "conversations": said})
    (folder / "batch.json").write_text(json.dumps(rows))
    transform = models["stage1"][1]
    encoded = [transform(sample) for sample in read_samples(folder / "batch.json")]
    assert [len(sample["images"]) for sample in encoded] == [1, 1, 2, 0]
    return encoded


@torch.no_grad()
def logits_of(model, samples):
    """The logits of a run's model at all tokens, row by row."""
    batch = padded_collate_images(samples)
    batch.pop("labels")
    return at_tokens(model.eval()(**batch), samples)


@torch.no_grad()
def logits_of_transformers(directory, samples):
    """Those of the model that transformers loads from a directory."""
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    batch = padded_collate_images(samples)
    lengths = torch.tensor([len(sample["tokens"]) for sample in samples])
    mask = (torch.arange(batch["tokens"].shape[1]) < lengths[:, None]).long()
    pixels = torch.cat([sample["images"] for sample in samples])
    return at_tokens(
        model(input_ids=batch["tokens"], attention_mask=mask, pixel_values=pixels).logits, samples
    )


def at_tokens(logits, samples):
    return torch.cat([row[: len(sample["tokens"])] for row, sample in zip(logits, samples, strict=True)])


def test_the_exported_weights_give_equal_logits_in_transformers(models, folder, samples, monkeypatch):
    monkeypatch.chdir(folder)
    logits = {}
    for name, (model, _) in models.items():
        program, *arguments = COMMANDS["export"]
        assert program == "torchfuse"
        assert arguments[:2] == ["export", "runs/lora"]
        arguments[1:3] = [f"runs/{name}", f"exported/{name}"]
        assert main(arguments) == 0
        logits[name] = logits_of(model, samples)
        expected = logits_of_transformers(f"exported/{name}", samples)
        assert (logits[name] - expected).abs().max() < 1e-4
    assert (logits["stage2"] - logits["stage1"]).abs().max() > 0.1
    assert (logits["lora"] - logits["stage2"]).abs().max() > 0.1
    black = [sample | {"images": torch.zeros_like(sample["images"])} for sample in samples]
    assert (logits_of(models["lora"][0], black) - logits["lora"]).abs().max() > 0.1


@pytest.mark.long
def test_the_commands_of_the_page_run_one_after_the_other(tmp_path, monkeypatch):
    """Each in a process of its own, in bf16 as configured."""
    folder = make_folder(tmp_path)
    for name in COMMANDS:
        command = COMMANDS["export"] if name == "export" else small(name, "dtype=bf16")
        done = start(folder, *command)
        assert done.returncode == 0, done.stderr
    monkeypatch.chdir(folder)
    model, transform = load_run("runs/lora", device="cpu", dtype="bf16")
    merge_lora(model)
    encoded = [transform(sample) for sample in read_samples("conversations.json")][:7]
    expected = logits_of_transformers(COMMANDS["export"][3], encoded)
    assert (logits_of(model.float(), encoded) - expected).abs().max() < 1e-4
