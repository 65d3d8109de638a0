"""Every YAML is run, by the command that its header gives."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama3_2 import llama3_2

from torchfuse import get_fusion_params, recipes
from torchfuse.data.questions import read_questions
from torchfuse.tasks.runs import load_run

CONFIGS = Path(recipes.__file__).parent / "configs"
ARCHS = ["cross_attention", "joint_decoder", "mot", "moma", "deepstack"]
TUNE = str(Path(sys.executable).parent / "tune")


def tune(folder, *arguments, **environment):
    """``tune run`` in a folder beside ``demo``; the recipe comes from the installed package."""
    return subprocess.run(
        [TUNE, "run", *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=400,
    )


def finetune(digits, arch, output, *overrides):
    return tune(
        digits.parent,
        "torchfuse/recipes/finetune.py",
        "--config",
        CONFIGS / "digits" / f"{arch}.yaml",
        f"output_dir={output}",
        "train.max_steps=2",
        "train.batch_size=16",
        *overrides,
    )


@pytest.fixture(scope="session")
def run_of(digits):
    made = {}

    def run(arch):
        if arch not in made:
            output = digits / f"run_{arch}"
            done = finetune(digits, arch, output)
            assert done.returncode == 0, done.stderr
            made[arch] = (output, done.stdout)
        return made[arch]

    return run


@pytest.mark.parametrize("arch", ARCHS)
def test_finetune(run_of, arch):
    output, said = run_of(arch)
    assert re.search(r"decoder +38 +596,096 +0 ", said)
    assert re.search(r"fusion +\d+ +([\d,]+) +\1 \(100\.0 %\)", said)
    metrics = json.loads((output / "metrics.json").read_text())
    assert set(metrics["after"]) == {"one_image", "two_images", "text", "all"}
    assert metrics["before"]["text"] == metrics["after"]["text"]
    assert set(metrics["images_exchanged"]) == {"one_image", "two_images"}
    losses = json.loads((output / "losses.json").read_text())
    assert [step for step, _ in losses] == [1, 2]
    assert all(1 < loss < 6 for _, loss in losses)
    answers = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 48
    assert all((output / image).is_file() for answer in answers for image in answer["images"])
    with safe_open(output / "fusion" / "fusion.safetensors", framework="pt") as reader:
        names = list(reader.keys())
    assert names
    assert not any(name.startswith("encoder") for name in names)


def test_text_alone_is_answered_by_the_language_model_after_training_too(digits, run_of, monkeypatch):
    """The logits of torchtune's decoder, its weights converted by torchtune, to the last bit."""
    output, _ = run_of("cross_attention")
    monkeypatch.chdir(digits.parent)  # the run's configuration holds relative paths
    model, transform = load_run(output, device="cpu", dtype="fp32")
    gates = [p for name, p in get_fusion_params(model).items() if name.endswith("_scale.scale")]
    assert gates
    assert all(gate != 0 for gate in gates)
    sizes = json.loads((digits / "llama" / "config.json").read_text())
    alone = llama3_2(
        vocab_size=sizes["vocab_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        num_kv_heads=sizes["num_key_value_heads"],
        embed_dim=sizes["hidden_size"],
        max_seq_len=sizes["max_position_embeddings"],
        intermediate_dim=sizes["intermediate_size"],
        rope_base=int(sizes["rope_parameters"]["rope_theta"]),
        scale_factor=1,
        norm_eps=sizes["rms_norm_eps"],
    )
    weights = hf_to_tune(
        load_file(digits / "llama" / "model.safetensors"),
        num_heads=sizes["num_attention_heads"],
        num_kv_heads=sizes["num_key_value_heads"],
        dim=sizes["hidden_size"],
    )
    alone.load_state_dict({name: value for name, value in weights.items() if name != "output.weight"})
    asked = [
        question
        for question in read_questions(digits / "questions" / "test_all.jsonl")
        if not question.images
    ]
    assert len(asked) > 3
    for question in asked:
        tokens = torch.tensor([transform(question)["tokens"]])
        with torch.no_grad():
            assert torch.equal(model.eval()(tokens), alone.eval()(tokens)), question.question


def test_generate(digits, run_of):
    output, _ = run_of("cross_attention")
    done = tune(
        digits.parent,
        "torchfuse/recipes/generate.py",
        "--config",
        CONFIGS / "digits" / "generate.yaml",
        f"run={output}",
    )
    assert done.returncode == 0, done.stderr
    assert "<image> which digit ?  [0" in done.stdout
    assert "two plus three ?\n    " in done.stdout
    assert re.search(r"\d+ tokens for 4 prompts in", done.stdout)


@pytest.mark.parametrize("trained", ["fusion", "everything"])
def test_evaluate(digits, run_of, tmp_path, monkeypatch, trained):
    if trained == "fusion":
        output, _ = run_of("joint_decoder")
    else:
        output = tmp_path
        flags = ["model.decoder_trainable=true", "model.encoder_trainable=true", "train.lr=0.01"]
        done = finetune(digits, "joint_decoder", output, "train.warmup_steps=0", *flags)
        assert done.returncode == 0, done.stderr
        monkeypatch.chdir(digits.parent)
        model, _ = load_run(output, device="cpu", dtype="fp32")
        trained = load_file(output / "fusion" / "trained.safetensors")
        name = "decoder.layers.0.mlp.w1.weight"
        assert torch.equal(model.state_dict()[name], trained[name])
        pretrained = load_file(digits / "llama" / "model.safetensors")
        assert not torch.equal(trained[name], pretrained["model.layers.0.mlp.gate_proj.weight"])
    done = tune(
        digits.parent,
        "torchfuse/recipes/evaluate.py",
        "--config",
        CONFIGS / "digits" / "evaluate.yaml",
        f"run={output}",
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((output / "metrics.json").read_text())["after"]
    for kind, share in metrics.items():
        assert re.search(rf"{kind} +{share:.1%}  of \d+", done.stdout), done.stdout


def test_compare(digits, tmp_path):
    archs = ["mot", "deepstack"]
    done = tune(
        digits.parent,
        "torchfuse/recipes/compare.py",
        "--config",
        CONFIGS / "digits" / "compare.yaml",
        f"output_dir={tmp_path / 'compare'}",
        f"configs=[{','.join(str(CONFIGS / 'digits' / f'{arch}.yaml') for arch in archs)}]",
        "budget.train.max_steps=2",
        "budget.train.batch_size=16",
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^mot +[\d,]+ +\d+ s +[\d,]+ ", done.stdout, re.MULTILINE), done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"compare", "compare.json", "compare.png"}
    assert {path.name for path in (tmp_path / "compare").iterdir()} == {*archs}


def test_draw(digits, run_of, tmp_path):
    command = [sys.executable, "-m", "torchfuse.recipes.draw_digits"]
    runs = {arch: run_of(arch)[0] for arch in ("cross_attention", "joint_decoder")}
    folder = digits.parent / "drawn"
    folder.mkdir()
    for arch, output in runs.items():
        (folder / arch).symlink_to(output)
    done = subprocess.run([*command, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((folder / "metrics.json").read_text())
    for arch, output in runs.items():
        assert metrics[arch] == json.loads((output / "metrics.json").read_text())
    for name, at_least in (("loss.png", 400), ("answers.png", 1000)):
        with Image.open(folder / name) as image:
            assert min(image.size) >= at_least
            assert len(image.convert("L").getcolors()) > 100  # something is drawn
    empty = subprocess.run([*command, tmp_path], capture_output=True, text=True)
    assert empty.returncode == 2
    assert "holds no finished run" in empty.stderr


@pytest.mark.distributed
@pytest.mark.parametrize("arch", ["cross_attention"])
def test_defect_5_finetune_on_two_ranks_learns_what_one_learns(digits, tmp_path, arch):
    """Half the batch on each of two sharded ranks is one step of the whole batch."""
    common = ["model.on_missing=participate", "train.max_steps=1", "train.epochs=1"]
    alone = finetune(
        digits, arch, tmp_path / "alone", *common, "train.batch_size=64", "train.warmup_steps=0"
    )
    assert alone.returncode == 0, alone.stderr
    ranks = tune(
        digits.parent,
        "--nproc_per_node",
        "2",
        "torchfuse/recipes/finetune.py",
        "--config",
        CONFIGS / "digits" / f"{arch}.yaml",
        f"output_dir={tmp_path / 'ranks'}",
        *common,
        "train.batch_size=32",
        "train.warmup_steps=0",
    )
    assert ranks.returncode == 0, ranks.stderr
    losses = [json.loads((tmp_path / name / "losses.json").read_text()) for name in ("alone", "ranks")]
    assert losses[0][0][1] == pytest.approx(losses[1][0][1], rel=1e-5)
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("alone", "ranks")]
    assert metrics[0]["after"] == metrics[1]["after"]
    tensors = []
    for name in ("alone", "ranks"):
        with safe_open(tmp_path / name / "fusion" / "fusion.safetensors", framework="pt") as reader:
            tensors.append({key: reader.get_tensor(key) for key in reader.keys()})  # noqa: SIM118
    assert tensors[0].keys() == tensors[1].keys()
    # Adam's first step is the sign of a gradient; one of almost nothing may have either.
    apart = sum(int((tensors[1][n] - v).abs().gt(2e-4).sum()) for n, v in tensors[0].items())
    assert apart < 1e-4 * sum(v.numel() for v in tensors[0].values())


def test_torchtunes_own_recipe_trains_and_continues(digits, tmp_path):
    """``tune run full_finetune_single_device``, unmodified, for two steps an epoch."""
    config = CONFIGS / "digits" / "torchtune_full_finetune.yaml"
    common = [
        "full_finetune_single_device",
        "--config",
        config,
        f"output_dir={tmp_path}",
        "max_steps_per_epoch=2",
        "batch_size=16",
    ]
    done = tune(digits.parent, *common)
    assert done.returncode == 0, done.stderr
    epochs = [tmp_path / f"epoch_{n}" / "fusion.safetensors" for n in (0, 1)]
    tensors = []
    for file in epochs:
        with safe_open(file, framework="pt") as reader:
            tensors.append({key: reader.get_tensor(key) for key in reader.keys()})  # noqa: SIM118
    name = "decoder.layers.0.fusion_layer.ca_scale.scale"
    assert tensors[0][name].abs() > 0  # the gate starts at zero
    assert not torch.equal(tensors[0][name], tensors[1][name])
    more = tune(digits.parent, *common, "resume_from_checkpoint=True", "epochs=2")
    assert more.returncode == 0, more.stderr
    with safe_open(epochs[1], framework="pt") as reader:
        assert torch.allclose(reader.get_tensor(name), tensors[1][name], rtol=1e-4)


def test_every_yaml_is_run_by_a_test():
    run = {*ARCHS, "two_stages", "compare", "generate", "evaluate", "torchtune_full_finetune"}
    assert {path.stem for path in CONFIGS.rglob("*.yaml")} == run


def test_headers_say_how_to_make_the_data_and_how_to_launch():
    for path in CONFIGS.rglob("*.yaml"):
        header = path.read_text().split("\n\n")[0] + path.read_text().split("\n\n")[1]
        assert "tune run " in header, path
        assert path.name in header, path
