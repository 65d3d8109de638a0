"""LoRA through the recipes: trained, resumed, evaluated, continued, on two ranks, in torchtune's own recipe."""

import json

import pytest
import torch
from own_data import configuration, learned, make_folder, run, same
from programs import digits_config, run_program, run_program_on_ranks, tune
from safetensors.torch import load_file
from torchfuse.recipes import finetune, prepare_digits

from torchfuse import describe, from_pretrained, save_pretrained
from torchfuse.checkpoint import save_trained
from torchfuse.lora.add import describe_lora
from torchfuse.tasks.runs import build_run_model, load_run

STEPS = {"batch_size": 3, "max_steps": 4, "lr_schedule": "constant", "lr": 0.01}
LORA = {
    "decoder": {"rank": 3, "dropout": 0.1},
    "encoder": {"rank": 2, "alpha": 3.0, "targets": ["q_proj", "w?"], "dora": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("lora"))


def test_a_run_trains_resumes_to_the_same_bits_and_is_read(folder, tmp_path, capfd):
    whole = run(folder, tmp_path, train=STEPS, lora=LORA)
    trained = learned(tmp_path / "run")
    assert sum(name.endswith("lora_b.weight") and value.any() for name, value in trained.items()) > 20
    (tmp_path / "two").mkdir()
    short = {"train": STEPS | {"max_steps": 2}, "save_every": 2, "lora": LORA}
    assert run(folder, tmp_path / "two", **short) == whole[:2]
    assert run(folder, tmp_path / "two", train=STEPS, save_every=2, lora=LORA, resume=True) == whole
    assert same(learned(tmp_path / "two" / "run"), trained)
    other = LORA | {"decoder": {"rank": 3}}
    with pytest.raises(SystemExit, match="^1$"):
        run(
            folder,
            tmp_path / "two",
            save_every=2,
            resume=True,
            train=STEPS,
            lora=other,
        )
    assert "lora.decoder.dropout was 0.1 and is 0.0" in capfd.readouterr().err

    model, _ = load_run(tmp_path / "run", device="cpu", dtype="fp32")
    table = describe(model)
    assert table["lora.encoder"].tensors == 3 * 3 * 3 and table["lora.decoder"].tensors == 2 * 3 * 7
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in trained.items())
    save_pretrained(model, tmp_path / "whole")
    assert describe_lora(from_pretrained(tmp_path / "whole")) == describe_lora(model)


def test_a_run_starts_from_an_earlier_one_with_its_lora_merged(folder, tmp_path):
    first, second = (tmp_path / name for name in ("first", "second"))
    for path in (first, second):
        path.mkdir()
    short = STEPS | {"max_steps": 2}
    run(folder, first, train=short, lora=LORA)
    later = {"lora": {"decoder": {"rank": 2}}, "init_from": str(first / "run")}
    run(folder, second, train=short, **later)
    model, _ = load_run(second / "run", device="cpu", dtype="fp32")
    adapted, _ = load_run(first / "run", device="cpu", dtype="fp32")
    base, merged = (dict(m.named_parameters()) for m in (adapted, model))
    name = "decoder.layers.0.attn.q_proj"
    a, b = base[f"{name}.lora_a.weight"], base[f"{name}.lora_b.weight"]
    torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + 2 * b @ a)
    assert merged[f"{name}.lora_a.weight"].shape[0] == 2
    save_trained(adapted, tmp_path / "artifact")
    config = {"model": {"_component_": "torchfuse.from_pretrained", "every": 2, "fusion_vocab_size": 1}}
    config["model"] |= {"decoder": str(folder / "llama"), "encoder": str(folder / "clip")}
    config |= {"init_from": str(tmp_path / "artifact")}
    other = build_run_model(config, device="cpu", dtype="fp32")
    assert describe_lora(other) == []
    assert torch.equal(other.state_dict()[f"{name}.weight"], merged[f"{name}.weight"])


def test_bf16_trains_in_fp32(folder, tmp_path):
    exact = run(folder, tmp_path, train=STEPS, lora=LORA)
    losses = run(folder, tmp_path, train=STEPS, lora=LORA, dtype="bf16")
    assert losses == pytest.approx(exact, rel=0.05)
    assert {tensor.dtype for tensor in learned(tmp_path / "run").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("lora", "problem"),
    [
        ({"decoder": {"rank": 0}}, "lora.decoder: rank must be a whole number of at least 1, got 0"),
        ({"decoder": {"alpha": 3.0}}, "lora.decoder.rank must be given with lora.decoder.alpha"),
        ({"eye": {"rank": 3}}, "'lora.eye': unknown; there are decoder, encoder, fusion"),
        (
            {"decoder": {"rank": 3, "targets": ["query"]}},
            "'query' matches no linear layer; decoder has q_proj",
        ),
        ({"fusion": {"rank": 3, "quantize_base": True}}, "quantize_base is for pretrained parts"),
    ],
    ids=["rank", "alpha", "part", "targets", "nf4"],
)
def test_mistakes_end_the_run_before_it_starts(folder, tmp_path, capfd, lora, problem):
    with pytest.raises(SystemExit, match="^1$"):
        run(folder, tmp_path, lora=lora)
    assert problem in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_the_digits_are_learned_as_in_full(tmp_path):
    """LoRA and QLoRA in the decoder, at most two points behind a decoder that trains in full."""
    demo = tmp_path / "demo"
    run_program(prepare_digits, tmp_path, demo)
    file = demo / "questions" / "test.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:600]))
    common = ["data.limit=12000", "data.cache_features=features", "eval_batch_size=200"]
    common += ["train.max_steps=250", "train.warmup_steps=20"]
    adapted = ["train.lr={lora.decoder: 4.0e-3, fusion: 4.0e-3}", "lora.decoder.rank=16"]
    runs = {
        "full": ["train.lr={decoder: 1.0e-3, fusion: 4.0e-3}", "model.decoder_trainable=true"],
        "lora": adapted,
        "qlora": [*adapted, "lora.decoder.quantize_base=true"],
    }
    right = {}
    for name, changes in runs.items():
        options = digits_config("joint_decoder", f"output_dir={name}", *common, *changes)
        tune(tmp_path, "torchfuse/recipes/finetune.py", *options)
        right[name] = json.loads((tmp_path / name / "metrics.json").read_text())["after"]["all"]
    print(right)
    assert right["full"] > 0.9
    assert min(right.values()) > right["full"] - 0.02


@pytest.mark.distributed
@pytest.mark.parametrize("arch", ["cross_attention", "joint_decoder"])
def test_two_ranks_are_one_process(folder, tmp_path, arch):
    losses = {}
    lora = {part: {**LORA[part], "dropout": 0.0} for part in LORA}
    for name, size, program in (("one", 2, run_program), ("two", 1, run_program_on_ranks)):
        config = configuration(
            folder,
            arch,
            output_dir=str(tmp_path / name),
            model={"on_missing": "participate"},
            train={"batch_size": size, "gradient_accumulation_steps": 2, "max_steps": 5, "lr": 0.05},
            lora=lora,
        )
        program(finetune, folder, "--config", config)
        losses[name] = [loss for _, loss in json.loads((tmp_path / name / "losses.json").read_text())]
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-5)


@pytest.mark.parametrize("changes", [["use_dora=True"], ["quantize_base=True"]], ids=["dora", "qlora"])
def test_torchtunes_lora_recipe_trains_and_saves(digits, tmp_path, changes):
    """``tune run lora_finetune_single_device``, unmodified, for two steps."""
    changes = [f"model.{change}" for change in changes]
    changes += [f"output_dir={tmp_path}", "max_steps_per_epoch=2", "batch_size=16"]
    common = ["lora_finetune_single_device", *digits_config("torchtune_lora", *changes)]
    tune(digits.parent, *common)
    saved = load_file(tmp_path / "epoch_0" / "fusion.safetensors")
    gate = "decoder.layers.0.fusion_layer.ca_scale.scale"
    assert saved[gate].abs() > 0 and saved["decoder.layers.0.attn.q_proj.lora_b.weight"].any()
    assert not any(name.endswith("attn.q_proj.weight") and "fusion" not in name for name in saved)


def test_a_run_over_a_quantized_base_is_read(digits, tmp_path, monkeypatch):
    lora = ["lora.decoder.rank=3", "lora.decoder.quantize_base=true"]
    changes = [f"output_dir={tmp_path}", "train.max_steps=2", "train.batch_size=16"]
    tune(
        digits.parent, "torchfuse/recipes/finetune.py", *digits_config("joint_decoder", *changes, *lora)
    )
    monkeypatch.chdir(digits.parent)
    model, _ = load_run(tmp_path, device="cpu", dtype="fp32")
    assert "nf4" in describe(model)["decoder"].dtype
    state, trained = model.state_dict(), learned(tmp_path)
    assert all(torch.equal(state[name], value) for name, value in trained.items())
    assert trained["decoder.layers.0.attn.q_proj.lora_b.weight"].any()
