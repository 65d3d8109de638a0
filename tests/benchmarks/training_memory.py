"""Measured and estimated memory of training steps, side by side.

    python tests/benchmarks/training_memory.py

Each case is trained for two steps in a process of its own, on the CPU. Measured is the peak of the resident memory
over that before the model was built, after a step of a tiny model, so that libraries are loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

if __package__:
    from .resident import reset_peak, resident
else:
    from resident import reset_peak, resident

SIZES = {
    "vocab_size": 16_001,
    "num_heads": 8,
    "num_kv_heads": 4,
    "embed_dim": 512,
    "intermediate_dim": 1408,
}
SIZES |= {"max_seq_len": 1024, "image_size": 112, "patch_size": 14, "vision_num_heads": 6}
SIZES |= {"vision_embed_dim": 384, "vision_num_layers": 5, "vision_hidden_dim": 1536}
TINY = {"vocab_size": 101, "num_layers": 3, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 16}
TINY |= {
    "intermediate_dim": 32,
    "max_seq_len": 64,
    "image_size": 28,
    "patch_size": 14,
    "vision_num_heads": 2,
}
TINY |= {"vision_embed_dim": 8, "vision_num_layers": 1}
CASES: dict[str, dict[str, Any]] = {
    "full": {"num_layers": 11, "arch": "joint_decoder", "decoder_trainable": True, "seq_len": 1001},
    "checkpointing": {
        "num_layers": 17,
        "arch": "cross_attention",
        "every": 3,
        "decoder_trainable": True,
        "rows": 4,
        "seq_len": 907,
        "checkpointing": True,
    },
    "lora": {"num_layers": 17, "arch": "joint_decoder", "rank": 16, "dtype": "bf16", "rows": 5},
}
# Freed memory goes back to the system at once.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


def build(case: dict[str, Any], sizes: dict[str, Any]) -> Any:
    """The model of a case, on the default device, with LoRA if it has a rank."""
    import torch

    from torchfuse.models.builders import llama_clip

    keys = ("num_layers", "arch", "every", "decoder_trainable")
    options = {**sizes, **{key: case[key] for key in keys if key in case and key not in sizes}}
    if case["arch"] != "cross_attention":
        options["placement"] = "prefix"
    model = llama_clip(**options)
    if case.get("dtype") == "bf16":
        model = model.to(torch.bfloat16)
    if "rank" in case:
        import torchfuse

        torchfuse.add_lora(model, rank=case["rank"], alpha=2 * case["rank"])
    return model


def settings(case: dict[str, Any]) -> Any:
    """How the model of a case is trained."""
    import torch

    from torchfuse.training import StepSettings

    return StepSettings(
        batch_size=case.get("rows", 2),
        seq_len=case.get("seq_len", 701),
        images=case.get("images", 2),
        supervised=0.3,
        dtype=torch.bfloat16 if case.get("dtype") == "bf16" else torch.float32,
        activation_checkpointing=case.get("checkpointing", False),
    )


def train(case: dict[str, Any], sizes: dict[str, Any]) -> None:
    """Take two steps as the finetune recipe does."""
    import torch

    from torchfuse.training import linear_next_token_loss
    from torchfuse.training.estimation.batch import example_batch
    from torchfuse.training.parallel import checkpoint_activations

    model, step = build(case, sizes), settings(case)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    model.train()
    if case.get("checkpointing"):
        checkpoint_activations(model, [n for n, p in model.named_parameters() if p.requires_grad])
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    length = 48 if sizes is TINY else step.seq_len
    batch = example_batch(model, rows=step.batch_size, length=length, images=step.images)
    tokens = torch.randint(sizes["vocab_size"], batch["tokens"].shape)
    batch["tokens"] = tokens
    batch["encoder_input"] = {k: torch.randn(v.shape) for k, v in batch["encoder_input"].items()}
    if "encoder_mask" in batch:
        batch["encoder_mask"] = torch.ones(batch["encoder_mask"].shape, dtype=torch.bool)
    labels = tokens.masked_fill(torch.rand(tokens.shape) > step.supervised, -100)
    bf16 = step.dtype is torch.bfloat16
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            total, count = linear_next_token_loss(model, **batch, labels=labels)
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()


def measure(name: str) -> int:
    """The peak over the memory before, in this process."""
    case = CASES[name]
    train(case, TINY)
    before = resident("VmRSS")
    reset_peak()
    train(case, SIZES)
    return resident("VmHWM") - before


def estimated(name: str) -> Any:
    """The estimate of the peak, by kind."""
    import torch

    from torchfuse.training import estimate

    with torch.device("meta"):
        model = build(CASES[name], SIZES)
    return estimate(model, settings(CASES[name]))


def compare(name: str) -> tuple[int, Any]:
    """Measured and estimated bytes of a case, measured in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--case", name]
    done = subprocess.run(command, env=os.environ | MALLOC, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(json.loads(done.stdout.splitlines()[-1])), estimated(name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, help="measure this one here, and print the bytes")
    given = parser.parse_args()
    if given.case:
        print(measure(given.case))
        return
    for name in CASES:
        measured, result = compare(name)
        print(f"{name}: measured {measured / 1e9:.3f} GB, estimated {result.peak / 1e9:.3f} GB")
        for kind, size in sorted(result.memory.items(), key=lambda item: -item[1])[:8]:
            print(f"    {kind:<24} {size / 1e9:.3f}")
        print(
            "    peaks:",
            {phase: round(size / 1e9, 3) for phase, size in result.peaks.items()},
            flush=True,
        )


if __name__ == "__main__":
    main()
