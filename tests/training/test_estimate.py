"""The estimate of a training's memory: against sizes that are known, and what changes must do to it."""

import json
from dataclasses import replace

import hf
import pytest
import torch
import yaml
from own_data import configuration, make_folder

from torchfuse import describe, set_trainable
from torchfuse.cli.main import main
from torchfuse.training import StepSettings, estimate, linear_next_token_loss
from torchfuse.training.estimation.result import gib
from torchfuse.training.estimation.tracker import MemoryTracker

SETTINGS = StepSettings(batch_size=2, seq_len=31, images=1, supervised=0.5, dtype=torch.float32)


def model(arch="joint_decoder", **options):
    if arch != "cross_attention":
        options = {"placement": "prefix", "every": None, **options}
    with torch.device("meta"):
        return hf.fused_model(arch=arch, decoder_trainable=True, **options)


def kinds(result, phase="optimizer"):
    totals = {}
    for kind, size in result.phases[phase].items():
        totals[kind.partition(".")[0]] = totals.get(kind.partition(".")[0], 0) + size
    return totals


@pytest.mark.parametrize("arch", ["cross_attention", "joint_decoder", "mot", "moma", "deepstack"])
def test_weights_gradients_and_states_are_those_of_the_parameters(arch):
    fused = model(arch)
    parts = describe(fused)["total"]
    found = kinds(estimate(fused, SETTINGS))
    buffers = sum(b.nbytes for b in fused.buffers())
    trained = [p for p in fused.parameters() if p.requires_grad]
    assert found["weights"] >= 4 * parts.parameters + buffers
    assert found["weights"] <= 4 * parts.parameters + buffers + 2**16  # rotary tables, which meta lacks
    assert found["gradients"] == 4 * parts.trainable
    # Two states of each value, and a number of steps of each parameter.
    assert found["optimizer"] >= 8 * parts.trainable + 4 * len(trained)


def test_the_model_is_unchanged():
    fused = model()
    before = {
        name: (id(p), p.device.type, p.dtype, p.requires_grad) for name, p in fused.named_parameters()
    }
    estimate(fused, replace(SETTINGS, dtype=torch.bfloat16))
    after = {
        name: (id(p), p.device.type, p.dtype, p.requires_grad) for name, p in fused.named_parameters()
    }
    assert after == before
    assert not any(p.grad is not None or p._post_accumulate_grad_hooks for p in fused.parameters())


def test_operations_are_those_of_the_matrices():
    """Two of each weight and position forward, four backward, and those of attention."""
    fused = model(num_layers=3)
    set_trainable(fused, decoder=True, encoder=False, fusion=False)
    result = estimate(fused, replace(SETTINGS, images=0, supervised=1.0))
    matrices = sum(
        p.numel()
        for n, p in fused.decoder.named_parameters()
        if p.dim() == 2 and "tok_embeddings" not in n
    )
    attention = (
        3 * 4 * 31 * 24
    )  # of each position: layers, two products of two operations, length, width
    per_token = 6 * matrices + attention * (1 + 2.5)  # the backward pass computes the scores again
    assert result.flops_per_token == pytest.approx(per_token, rel=0.05)


def test_a_frozen_model_keeps_less():
    full = estimate(model(), SETTINGS)
    frozen = model()
    set_trainable(frozen, decoder=False, encoder=False, fusion=True)
    lean = estimate(frozen, SETTINGS)
    assert kinds(lean)["gradients"] == 4 * describe(frozen)["total"].trainable
    assert lean.parameters["decoder"][1] == 0
    assert lean.phases["forward"]["activations.decoder"] < full.phases["forward"]["activations.decoder"]


def test_activations_grow_with_rows_and_shrink_with_checkpointing():
    def activations(**changes):
        return estimate(model(), replace(SETTINGS, **changes)).phases["forward"]["activations.decoder"]

    one, two = activations(batch_size=1), activations(batch_size=2)
    assert two == pytest.approx(2 * one, rel=0.05)
    assert activations(activation_checkpointing=True) < two / 2


def test_fp32_weights_double_what_trains_in_bf16():
    settings = replace(SETTINGS, dtype=torch.bfloat16)
    fused = model().to(torch.bfloat16)
    kept, plain = (
        kinds(estimate(fused, replace(settings, fp32_weights=keep))) for keep in (True, False)
    )
    assert kept["gradients"] == 2 * plain["gradients"]
    assert kept["optimizer"] > 1.9 * plain["optimizer"]


def test_eight_bit_states_take_a_quarter():
    fused = model(embed_dim=96, intermediate_dim=256, num_heads=6, vocab_size=1024)
    small = replace(SETTINGS, optimizer={"_component_": "torchao.optim.AdamW8bit"})
    eight, full = (kinds(estimate(fused, s), "backward")["optimizer"] for s in (small, SETTINGS))
    assert full / 4 < eight < full / 3.5


def test_offloaded_activations_are_not_kept():
    kept, offloaded = (
        estimate(model(), replace(SETTINGS, activation_offloading=offload)) for offload in (False, True)
    )
    of_decoder = [r.phases["forward"].get("activations.decoder", 0) for r in (kept, offloaded)]
    assert of_decoder[1] < of_decoder[0] / 2
    assert kinds(offloaded) == kinds(kept)  # when the optimizer steps there are none
    assert offloaded.flops_per_token == kept.flops_per_token


def test_gradients_do_not_exist_together_if_parameters_are_updated_in_the_backward_pass():
    fused = model()
    whole, each = (
        estimate(fused, replace(SETTINGS, optimizer_in_backward=in_backward))
        for in_backward in (False, True)
    )
    largest = max(p.nbytes for p in fused.parameters() if p.requires_grad)
    assert kinds(each, "backward").get("gradients", 0) <= 2 * largest
    assert kinds(each).get("gradients", 0) == 0
    assert each.phases["optimizer"]["optimizer"] == whole.phases["optimizer"]["optimizer"]


def test_every_change_of_the_table_has_the_peak_of_an_estimate_with_it(tmp_path, capsys):
    folder = make_folder(tmp_path)
    values = json.loads((folder / "llama" / "config.json").read_text()) | {
        "max_position_embeddings": 1201
    }
    (folder / "llama" / "config.json").write_text(json.dumps(values))
    changes = {"dtype": "bf16", "device": "cuda", "data": {"max_seq_len": 1031, "packed": True}}
    file = str(configuration(folder, model={"decoder_trainable": True}, **changes))
    assert main(["estimate", file, "--seq-len", "1201"]) == 0
    rows = capsys.readouterr().out.partition("\nchange ")[2].splitlines()[2:]
    for row in rows:
        change, peak, _ = row.rsplit(maxsplit=2)
        length = None if "max_seq_len" in change else 1201
        assert gib(estimate(file, overrides=change.split(), seq_len=length).peak) == peak, change
    assert {row.split()[0].partition("=")[0] for row in rows} >= {
        "activation_checkpointing",
        "activation_offloading",
        "data.cache_features",
        "data.max_seq_len",
        "model.decoder_trainable",
        "train.batch_size",
        "train.fp32_weights",
        "train.optimizer._component_",
        "train.optimizer.fused",
        "train.optimizer_in_backward",
    }


def test_shards_divide_weights_gradients_and_states():
    result = estimate(model(), SETTINGS)
    each = result.on(4)
    for kind, size in result.memory.items():
        sharded = kind.startswith(("weights", "gradients", "optimizer"))
        assert each.memory.get(kind, 0) == pytest.approx(size / 4 if sharded else size)
    assert each.tokens_per_second("H100") == 4 * result.tokens_per_second("H100")


def test_the_tracker_counts_what_exists():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), MemoryTracker() as tracker:
        a = torch.empty(7, 11)
        view = a.t()
        b = a * 2
        assert tracker.live.total() == 2 * 4 * 77
        del a
        assert tracker.live.total() == 2 * 4 * 77  # the view is of the same memory
        del view
        assert tracker.live.total() == 4 * 77
        assert tracker.peak.total() == 2 * 4 * 77
        del b
        assert tracker.live.total() == 0


def test_the_loss_is_counted_without_values():
    """A mask of fake labels selects as many rows as are supervised."""
    few, many = (
        estimate(model(), replace(SETTINGS, supervised=share)).phases["forward"].get("loss", 0)
        for share in (0.1, 1.0)
    )
    assert few < many
    assert linear_next_token_loss  # what the recipe trains with


def test_a_configuration_with_and_without_its_directories(tmp_path, capsys):
    folder = make_folder(tmp_path)
    file = configuration(folder, data={"max_seq_len": 61}, train={"batch_size": 3})
    assert main(["estimate", str(file), "train.batch_size=2", "--images", "2"]) == 0
    out = capsys.readouterr().out
    assert "Batches of 2 rows of 61 tokens, 2 images a row" in out
    assert "activation_checkpointing=true" in out
    given = yaml.safe_load(file.read_text())
    parameters = estimate(given).parameters
    for part in ("decoder", "encoder"):
        (folder / given["model"][part] / "model.safetensors").unlink()  # only config.json is read
    assert estimate(given).parameters == parameters


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["gone.yaml"], "gone.yaml cannot be read"),
        (["llava/stage9"], "llava/stage9 is neither a file nor the name of an installed configuration"),
        (
            ["llava/stage1", "model.decoder=checkpoints/Llama-9"],
            "Llama-9 does not exist, and its name is not",
        ),
        (["llava/stage1", "--seq-len", "100"], "no space for text beside the features of 1 images"),
        (["llava/stage1", "--devices", "0"], "devices=0"),
        (["llava/stage1", "train.batchsize=2"], "'train.batchsize': unknown; there are lr, "),
        (["llava/stage1", "train.batch_size=two"], "'train.batch_size': "),
        (["llava/stage1", "dtype=fp8"], "dtype must be one of fp32, bf16, got 'fp8'"),
        (["llava/stage1", "train.lr"], "Override train.lr: expected key=value"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, monkeypatch, capsys, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    assert main(["estimate", *arguments]) == 1
    assert complaint in capsys.readouterr().err
