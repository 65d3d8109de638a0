"""Finetuning on the data that people have: two directories, LLaVA JSON and Parquet, nothing else."""

import json
import shutil

import pytest
import torch
import yaml
from own_data import configuration, loss_of, losses_of_one_batch, make_folder, run

from torchfuse.data import LoaderOptions, StepLoader, read_samples
from torchfuse.errors import ConfigError
from torchfuse.tasks.runs import build_model, load_run
from torchfuse.tasks.transforms import make_transform


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("own"))


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
    _, loss = losses_of_one_batch(folder, tmp_path, batch_size=rows, arch=arch, data=data)
    trained, transform = load_run(tmp_path / "run", device="cpu", dtype="fp32")
    assert loss == pytest.approx(loss_of(trained.eval(), transform, samples), rel=2e-6)


def test_the_dtype_of_the_weights_by_name(folder):
    section = yaml.safe_load(configuration(folder).read_text())["model"]
    for dtype, named in (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")):
        model = build_model({**section, "dtype": named}, {}, device="cpu", dtype=dtype)
        expected = {"fp32": torch.float32, "bf16": torch.bfloat16}[named]
        assert {p.dtype for p in model.parameters()} == {expected}
    for named, problem in (
        ("bf16", r"x\.yaml, model\.dtype=bf16 needs dtype=bf16"),
        ("half", r"x\.yaml, model\.dtype must be one of fp32, bf16, got 'half'"),
    ):
        with pytest.raises(ConfigError, match=problem):
            build_model({**section, "dtype": named}, {}, device="cpu", dtype="fp32", where="x.yaml, ")


def test_a_batch_of_text_trains_nothing_where_an_adapter_trains(folder, tmp_path):
    """One row in four has no image, and no other part of the model has anything to learn from it."""
    steps = {"batch_size": 1, "max_steps": 9}
    assert len(run(folder, tmp_path, arch="joint_decoder", train=steps)) == 9


def test_what_is_left_out_is_counted(folder, tmp_path):
    row = {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}
    long = {"messages": [{"role": "user", "content": "a" * 61}, {"role": "assistant", "content": "b"}]}
    rows = [*[json.dumps(row)] * 3, json.dumps(long), '{"messages": ', json.dumps(long)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    data = {"train": str(tmp_path / "rows.jsonl"), "bad_samples": "skip", "max_seq_len": 61}
    run(folder, tmp_path, data=data, train={"batch_size": 6, "max_steps": 1})
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["left_out"] == {"skipped": 1, "too_long": 2}


def test_workers_change_no_loss(folder, tmp_path):
    data = {"packed": True, "template": "chatml"}
    alone = run(folder, tmp_path, data=data, output_dir=str(tmp_path / "run"))
    workers = {"num_workers": 2, "start_method": "spawn", "prefetch_factor": 1}
    assert run(folder, tmp_path, data=data | workers) == alone


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_cached_features_change_no_loss(folder, tmp_path, packed):
    cache = tmp_path / "features"
    data = {"packed": packed}
    losses = run(folder, tmp_path, data=data)
    for _ in range(2):  # the second run finds them
        again = run(folder, tmp_path, data=data | {"cache_features": str(cache)})
        assert again == pytest.approx(losses, rel=1e-5)
    assert list(cache.glob("*.safetensors"))


def test_an_encoder_that_trains_has_no_cached_features(folder, tmp_path, capfd):
    with pytest.raises(SystemExit, match="^1$"):
        run(
            folder,
            tmp_path,
            model={"encoder_trainable": True},
            data={"cache_features": str(tmp_path / "features")},
        )
    assert "needs a frozen encoder, and encoder" in capfd.readouterr().err


def test_a_run_resumes_on_the_same_rows_only(folder, tmp_path, capfd):
    file = tmp_path / "rows.jsonl"
    rows = [json.dumps(row) + "\n" for row in json.loads((folder / "llava.json").read_text())]
    file.write_text("".join(rows))
    data = {"train": [{"path": str(file), "image_root": str(folder / "pictures")}]}
    whole = run(folder, tmp_path, data=data, save_every=1)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_2")
    assert run(folder, tmp_path, data=data, save_every=1, resume=True) == whole
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_2")
    file.write_text("".join(reversed(rows)))
    with pytest.raises(SystemExit, match="^1$"):
        run(folder, tmp_path, data=data, save_every=1, resume=True)
    assert "was trained on other data" in capfd.readouterr().err
