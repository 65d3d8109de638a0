"""Two ranks train on packs, some without media, as one process does on the same rows."""

import json

import pytest
import yaml
from audio_data import make_audio_folder
from own_data import VOCAB, configuration
from programs import run_program, run_program_on_ranks
from torchfuse.recipes import finetune

from torchfuse.data import LoaderOptions, StepLoader, read_mixture
from torchfuse.tasks.runs import build_model
from torchfuse.tasks.transforms import make_transform

STEPS = 5
READER = {"audio": "sound_reading.spectrogram"}
PLACEHOLDERS = {"encoder_token": {"image": VOCAB + 3, "audio": VOCAB + 5}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows of which few have an image or a recording, so that some packs have none."""
    folder = make_audio_folder(tmp_path_factory.mktemp("ranks"))
    records = json.loads((folder / "llava.json").read_text())
    few = [record for number, record in enumerate(records) if number % 4 == 2 or number % 12 == 0]
    (folder / "few.json").write_text(json.dumps(few * 2))
    return folder


def media_on_ranks(config):
    """For each step, the encoders that each of two ranks has media for."""
    given = yaml.safe_load(config.read_text())
    model = build_model(given["model"], {}, device="cpu", dtype="fp32")
    data = given["data"]
    options = LoaderOptions(
        packed=True, max_seq_len=data["max_seq_len"], max_steps=STEPS, epochs=3, seed=given["seed"]
    )
    samples = read_mixture(data["train"], seed=given["seed"])
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(config.parent)
        transform = make_transform(model, given)
        loaders = [StepLoader(samples, transform, options, world_size=2, rank=rank) for rank in (0, 1)]
        steps = zip(*(loader.steps() for loader in loaders), range(STEPS), strict=False)
        return [tuple(names(batch) for [batch], _ in pair) for *pair, _ in steps]


def names(batch):
    inputs = batch.get("encoder_input", {})
    return "".join(name[0] for name in inputs)  # of the encoders, or of an encoder's keywords


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("arch", "options"),
    [("cross_attention", None), ("joint_decoder", None), ("cross_attention", {}), ("mot", PLACEHOLDERS)],
    ids=["cross_attention", "joint_decoder", "cross_attention-two", "mot-two"],
)
def test_packs_on_two_ranks(folder, tmp_path, arch, options):
    rows = [{"path": str(folder / "few.json"), "image_root": str(folder / "pictures")}]
    model, data = {"on_missing": "participate"}, {}
    if options is not None:
        model |= {
            "encoder": {"image": str(folder / "clip"), "audio": str(folder / "whisper")},
            **options,
        }
        data, rows = {"media_transforms": READER}, [*rows, {"path": str(folder / "rows.jsonl")}]
    losses = {}
    for name, size, program in (("one", 2, run_program), ("two", 1, run_program_on_ranks)):
        config = configuration(
            folder,
            arch,
            output_dir=str(tmp_path / name),
            model=model,
            data={"train": rows, "packed": True, "max_seq_len": 110, **data},
            train={"batch_size": size, "max_steps": STEPS, "epochs": 3, "lr": 0.1},
            seed=3,
        )
        program(finetune, folder, "--config", config)
        given = json.loads((tmp_path / name / "losses.json").read_text())
        losses[name] = [loss for _, loss in given]
    shown = media_on_ranks(config)
    for kind in "i" if options is None else "ia":
        assert any((kind in one) != (kind in other) for one, other in shown), shown
    assert len(losses["one"]) == STEPS
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-5)


@pytest.mark.distributed
def test_what_is_left_out_on_any_rank_is_named(folder, tmp_path):
    row = {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n{{\n" * 4)
    config = configuration(
        folder,
        output_dir=str(tmp_path / "run"),
        model={"on_missing": "participate"},
        data={"train": str(tmp_path / "rows.jsonl"), "bad_samples": "skip"},
        train={"batch_size": 4, "max_steps": 1},
    )
    printed = run_program_on_ranks(finetune, folder, "--config", config)
    assert all(printed.count(f"rows.jsonl, line {line}: no JSON") == 1 for line in (2, 4, 6, 8))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["left_out"]["skipped"] == 4


@pytest.mark.distributed
def test_a_run_with_ddp_is_resumed_with_fsdp(folder, tmp_path):
    train = {"batch_size": 1, "gradient_accumulation_steps": 3, "lr": 0.1, "lr_schedule": "constant"}
    changes = {"model": {"on_missing": "participate"}, "save_every": 2, "seed": 3, "resume": True}

    def run(name, steps, program, batches=3, **parallel):
        sizes = {**train, "max_steps": steps, "gradient_accumulation_steps": batches}
        output = tmp_path / name
        config = configuration(folder, output_dir=str(output), train=sizes, parallel=parallel, **changes)
        program(finetune, folder, "--config", config)
        return [loss for _, loss in json.loads((output / "losses.json").read_text())]

    whole = run("one", 4, run_program, batches=6)
    run("two", 2, run_program_on_ranks, strategy="ddp")
    resumed = run("two", 4, run_program_on_ranks, strategy="fsdp", shard=2)
    assert resumed == pytest.approx(whole, rel=1e-5)
