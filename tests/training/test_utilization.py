"""The share of a GPU's peak that a training uses, from the numbers of its tokens."""

import hf
import pytest
import torch
from own_data import make_folder, run
from torchfuse.recipes import finetune_run

from torchfuse import add_lora, set_trainable
from torchfuse.models.strategy import features_per_image
from torchfuse.training import StepSettings, estimate
from torchfuse.training.estimation.utilization import Utilization, operations_per_token, utilization
from torchfuse.training.progress import Progress, StepMetrics

ARCHS = ["cross_attention", "joint_decoder", "mot", "moma", "deepstack"]
# Wide, so that the distances between tokens matter as little as they do at true size.
WIDE = {"embed_dim": 312, "intermediate_dim": 511, "num_heads": 6, "num_kv_heads": 3, "vocab_size": 1009}
WIDE |= {"max_seq_len": 257, "vision_embed_dim": 130, "vision_hidden_dim": 257}


def model(arch="joint_decoder", **options):
    if arch != "cross_attention":
        options = {"placement": "prefix", "every": None, **options}
    with torch.device("meta"):
        return hf.fused_model(arch=arch, **WIDE, **options)


@pytest.mark.parametrize("arch", ARCHS)
def test_tokens_times_their_operations_are_those_of_a_batch(arch):
    fused = model(arch, decoder_trainable=True)
    operations = operations_per_token(fused)
    features = features_per_image(fused, "encoder")
    in_sequence = fused.strategy.num_image_tokens(fused)
    settings = StepSettings(batch_size=3, seq_len=in_sequence + 101, images=1, supervised=0.3)
    expected = estimate(fused, settings)
    expected = expected.flops_per_token * settings.batch_size * settings.seq_len
    tokens = {"text": 303, "image": 3 * features, "supervised": round(0.3 * 300)}
    of_tokens = Utilization(operations, peak=1.0).of(tokens, 1.0)
    assert of_tokens == pytest.approx(expected, rel=0.06)


def test_a_supervised_token_costs_a_head_and_a_feature_its_encoder():
    fused = model(decoder_trainable=False)
    operations = operations_per_token(fused)
    # Forward, and the gradient of the hidden state; the head is frozen.
    assert operations["supervised"] == pytest.approx(4 * 1009 * 312, rel=0.01)
    cached = operations_per_token(fused, features_cached=True)
    assert cached["text"] == operations["text"]
    encoder = sum(p.numel() for p in fused.encoder.parameters() if p.dim() == 2)
    assert operations["image"] - cached["image"] > 4 / 3 * encoder  # two layers of three run


def test_what_trains_is_what_the_caller_says_and_nothing_is_changed():
    fused = model(decoder_trainable=True)
    frozen = [name for name, _ in fused.named_parameters() if name.startswith("adapter")]
    less = operations_per_token(fused, trained=frozen)
    assert less["text"] < 0.75 * operations_per_token(fused)["text"]
    set_trainable(fused, fusion=True)
    assert operations_per_token(fused) == less


def test_a_model_with_lora_on_four_bits_has_the_operations_of_its_matrices():
    sizes = {
        "embed_dim": 128,
        "num_heads": 2,
        "num_kv_heads": 1,
        "intermediate_dim": 384,
        "num_layers": 1,
    }

    def operations(quantize_base):
        fused = hf.fused_model(
            arch="joint_decoder", placement="prefix", **WIDE | sizes | {"every": None}
        )
        add_lora(fused, parts=("decoder",), rank=2, alpha=4, quantize_base=quantize_base)
        return operations_per_token(fused)

    assert operations(True) == operations(False)


def test_only_a_device_whose_peak_is_known_has_a_utilization(monkeypatch):
    fused = model()
    trained = [name for name, p in fused.named_parameters() if p.requires_grad]

    def on(device, name):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
        return utilization(fused, torch.device(device), trained=trained)

    assert on("cuda", "NVIDIA H100 80GB HBM3") == Utilization(operations_per_token(fused), 989e12)
    assert on("cuda", "NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert on("cpu", "NVIDIA H100 80GB HBM3") is None


class Logger:
    def __init__(self):
        self.payloads = []

    def log_dict(self, payload, step):
        self.payloads.append(payload)

    def close(self): ...


def test_the_bar_and_the_logger_get_it(capsys):
    logger, cpu = Logger(), torch.device("cpu")
    half = Utilization({"text": 3.0, "image": 5.0}, peak=14.0)
    metrics = StepMetrics(tokens={"text": 3, "image": 1, "supervised": 2}, seconds={"model": 2.0})
    with Progress(1, 0, device=cpu, log=print, logger=logger, utilization=half) as progress:
        progress._bar.disable = False
        progress._bar.fp = None
        shown = []
        progress._bar.set_postfix_str = shown.append
        progress._bar.update = lambda: None
        progress.update(1, metrics)
        progress._bar.disable = True
    assert logger.payloads[0]["mfu"] == 0.5
    assert shown[0].endswith("MFU 50.0%")


def test_a_run_logs_it_where_the_peak_is_known(tmp_path, monkeypatch):
    folder = make_folder(tmp_path)
    logger = {
        "_component_": "torchtune.training.metric_logging.DiskLogger",
        "log_dir": str(tmp_path / "logs"),
        "filename": "metrics.txt",
    }

    def logged(utilization):
        monkeypatch.setattr(finetune_run, "utilization", utilization)
        losses = run(folder, tmp_path, logger=logger, dtype="bf16")
        lines = (tmp_path / "logs" / "metrics.txt").read_text().splitlines()[-2:]
        parts = [part.rsplit(":", 1) for part in lines[-1].split(" | ")[1].split()]
        return losses, {name: float(value) for name, value in parts}

    def known(model, device, **options):
        return Utilization(operations_per_token(model, **options), peak=1e9)

    def fails(*_, **__):
        raise TypeError("a module that cannot be simulated")

    losses, metrics = logged(utilization)
    assert "mfu" not in metrics
    same, metrics = logged(known)
    assert same == losses
    assert 0 < metrics["mfu"] < 1000
    same, metrics = logged(fails)
    assert same == losses
    assert "mfu" not in metrics
