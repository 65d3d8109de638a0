"""Every YAML is run by ``tune run``, as its header says."""

import json
import re

import pytest
import torch
import yaml
from PIL import Image
from programs import CONFIGS, DIGITS, digits_config, run_program, run_program_on_ranks, start, tune
from safetensors import safe_open
from safetensors.torch import load_file
from torchfuse.recipes import draw_digits, finetune
from torchfuse.recipes.finetune_checks import flat
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama3_2 import llama3_2

from torchfuse import get_fusion_params
from torchfuse.data import read_samples
from torchfuse.tasks.runs import load_run

ARCHS = ["cross_attention", "joint_decoder", "mot", "moma", "deepstack"]


FINETUNE = "torchfuse/recipes/finetune.py"
SHORT = ["train.max_steps=2", "train.batch_size=16"]


@pytest.mark.parametrize("arch", ARCHS)
def test_finetune(run_of, arch):
    output, printed = run_of(arch)
    assert re.search(r"decoder +38 +596,096 +0 ", printed)
    assert re.search(r"fusion +\d+ +([\d,]+) +\1 \(100\.0 %\)", printed)
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


def test_the_command_in_a_process_of_its_own(digits, tmp_path):
    options = digits_config(
        "cross_attention", f"output_dir={tmp_path / 'run'}", *SHORT, "data.test=null"
    )
    done = start(digits.parent, "tune", "run", FINETUNE, *options)
    assert done.returncode == 0, done.stderr
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2]


def test_the_command_with_a_mistyped_key(digits, capsys):
    with pytest.raises(SystemExit, match="^1$"):
        tune(digits.parent, FINETUNE, *digits_config("cross_attention", "train.max_stps=2"))
    assert capsys.readouterr().err.startswith("error: Configuration key 'train.max_stps': unknown")


def test_text_alone_has_the_language_models_logits_after_training_too(digits, run_of, monkeypatch):
    """The logits of torchtune's decoder, its weights converted by torchtune, bit for bit."""
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
    samples = read_samples(digits / "questions" / "test_text.jsonl")
    assert len(samples) > 3
    for sample in samples:
        tokens = torch.tensor([transform(sample)["tokens"]])
        with torch.no_grad():
            assert torch.equal(model.eval()(tokens), alone.eval()(tokens)), sample.origin


def test_generate(digits, run_of):
    output, _ = run_of("cross_attention")
    options = digits_config("generate", f"run={output}")
    printed = tune(digits.parent, "torchfuse/recipes/generate.py", *options)
    assert "<image> which digit ?  [0" in printed
    assert "two plus three ?\n    " in printed
    assert re.search(r"\d+ tokens for 4 prompts in", printed)


@pytest.mark.parametrize("trained", ["fusion", "everything"])
def test_evaluate(digits, run_of, tmp_path, monkeypatch, trained):
    if trained == "fusion":
        output, _ = run_of("joint_decoder")
    else:
        output = tmp_path
        flags = ["model.decoder_trainable=true", "model.encoder_trainable=true"]
        flags += [f"output_dir={output}", "train.lr=0.01", "train.warmup_steps=0"]
        run_program(finetune, digits.parent, *digits_config("joint_decoder", *SHORT, *flags))
        monkeypatch.chdir(digits.parent)
        model, _ = load_run(output, device="cpu", dtype="fp32")
        saved = load_file(output / "fusion" / "trained.safetensors")
        name = "decoder.layers.0.mlp.w1.weight"
        assert torch.equal(model.state_dict()[name], saved[name])
        pretrained = load_file(digits / "llama" / "model.safetensors")
        assert not torch.equal(saved[name], pretrained["model.layers.0.mlp.gate_proj.weight"])
    options = digits_config("evaluate", f"run={output}")
    printed = tune(digits.parent, "torchfuse/recipes/evaluate.py", *options)
    metrics = json.loads((output / "metrics.json").read_text())["after"]
    for kind, share in metrics.items():
        assert re.search(rf"{kind} +{share:.1%}  of \d+", printed), printed


@pytest.mark.long
def test_compare(digits, tmp_path):
    archs = ["mot", "deepstack"]
    printed = tune(
        digits.parent,
        "torchfuse/recipes/compare.py",
        *digits_config("compare", f"output_dir={tmp_path / 'compare'}"),
        f"configs=[{','.join(str(DIGITS / f'{arch}.yaml') for arch in archs)}]",
        *(f"budget.{change}" for change in SHORT),
    )
    assert re.search(r"^mot +[\d,]+ +\d+ s +[\d,]+ ", printed, re.MULTILINE), printed
    assert {path.name for path in tmp_path.iterdir()} == {"compare", "compare.json", "compare.png"}
    assert {path.name for path in (tmp_path / "compare").iterdir()} == {*archs}


def test_draw(digits, run_of, tmp_path, capsys):
    runs = {arch: run_of(arch)[0] for arch in ("cross_attention", "joint_decoder")}
    folder = tmp_path / "drawn"
    folder.mkdir()
    for arch, output in runs.items():
        (folder / arch).symlink_to(output)
    run_program(draw_digits, tmp_path, folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    for arch, output in runs.items():
        assert metrics[arch] == json.loads((output / "metrics.json").read_text())
    for name, at_least in (("loss.png", 400), ("answers.png", 1000)):
        with Image.open(folder / name) as image:
            assert min(image.size) >= at_least
            assert len(image.convert("L").getcolors()) > 100  # something is drawn
    with pytest.raises(SystemExit, match="^2$"):
        run_program(draw_digits, tmp_path, digits / "llama")
    assert "holds no finished run" in capsys.readouterr().err


def losses(run):
    return json.loads((run / "losses.json").read_text())


def fusion_tensors(run):
    return load_file(run / "fusion" / "fusion.safetensors")


@pytest.mark.distributed
def test_finetune_on_two_ranks_learns_what_one_learns(digits, tmp_path):
    """Half the batch on each of two sharded ranks is one step of the whole batch."""
    common = [
        "model.on_missing=participate",
        "train.max_steps=1",
        "train.epochs=1",
        "train.warmup_steps=0",
    ]
    runs = alone, ranks = tmp_path / "alone", tmp_path / "ranks"
    for run, size, program in ((alone, 64, run_program), (ranks, 32, run_program_on_ranks)):
        changes = [f"output_dir={run}", f"train.batch_size={size}", *common]
        program(finetune, digits.parent, *digits_config("cross_attention", *changes))
    assert losses(alone)[0][1] == pytest.approx(losses(ranks)[0][1], rel=1e-5)
    metrics = [json.loads((run / "metrics.json").read_text())["after"] for run in runs]
    assert metrics[0] == metrics[1]
    one, other = map(fusion_tensors, runs)
    assert one.keys() == other.keys()
    # Adam's first step is the sign of a gradient; one of almost nothing may have either.
    apart = sum(int((other[name] - value).abs().gt(2e-4).sum()) for name, value in one.items())
    assert apart < 1e-4 * sum(value.numel() for value in one.values())


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.parametrize("name", [*ARCHS, "two_stages"])
def test_the_command_on_two_ranks(digits, tmp_path, name):
    options = ["model.on_missing=participate", f"output_dir={tmp_path / 'run'}", *SHORT]
    ranks = ["tune", "run", "--nproc_per_node", 2, FINETUNE]
    done = start(digits.parent, *ranks, *digits_config(name, *options))
    assert done.returncode == 0, done.stderr
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2]


def test_torchtunes_own_recipe_trains_and_continues(digits, tmp_path):
    """``tune run full_finetune_single_device``, unmodified, for two steps an epoch."""
    changes = [f"output_dir={tmp_path}", "max_steps_per_epoch=2", "batch_size=16"]
    common = ["full_finetune_single_device", *digits_config("torchtune_full_finetune", *changes)]
    tune(digits.parent, *common)
    epochs = [tmp_path / f"epoch_{n}" / "fusion.safetensors" for n in (0, 1)]
    first, second = map(load_file, epochs)
    gate = "decoder.layers.0.fusion_layer.ca_scale.scale"
    assert first[gate].abs() > 0  # it starts at zero
    assert not torch.equal(first[gate], second[gate])
    tune(digits.parent, *common, "resume_from_checkpoint=True", "epochs=2")
    assert torch.allclose(load_file(epochs[1])[gate], second[gate], rtol=1e-4)


def test_every_yaml_is_run_by_a_test():
    run = {
        *ARCHS,
        "two_stages",
        "compare",
        "generate",
        "evaluate",
        "torchtune_full_finetune",
        "torchtune_lora",
    }
    assert {path.stem for path in DIGITS.glob("*.yaml")} == run


def test_no_configuration_names_a_thing_twice():
    """Paths are named once, and what the model determines is not named in the section of the data."""
    determined = {"tokenizer", "image_transform", "image_token", "features_per_image", "scope"}
    for path in CONFIGS.rglob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        assert not determined & config.get("data", {}).keys(), path
        assert not config.get("transform"), path
        paths = [value for _, value in flat(config) if isinstance(value, str) and "/" in value]
        own = [value for value in paths if "${" not in value]
        assert len(set(own)) == len(own), path


def test_headers_say_how_to_make_the_data_and_how_to_launch():
    for path in CONFIGS.rglob("*.yaml"):
        header = path.read_text().split("\n\n")[0] + path.read_text().split("\n\n")[1]
        assert "tune run " in header, path
        name = path.relative_to(CONFIGS).with_suffix("").as_posix()
        assert re.search(rf"--config (recipes/configs/)?{name}\b", header), path
