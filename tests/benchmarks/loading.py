"""Share of the time in which a training step waits for its data, without and with workers.

Run: python tests/benchmarks/loading.py [--rows 2000 --layers 6 --slots 2048 --steps 6 --rounds 3]

Records and lengths are as LLaVA's: JSON lines, four of five with a photograph of 480 x 360 pixels as
JPEG, which becomes 64 features. Rows are packed. The decoder has SmolLM2's width and is frozen; a step
is its forward and backward pass. Rounds with different numbers of workers take turns.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from own_data import save_tokenizer

from torchfuse import fuse
from torchfuse.data import (
    ImageTransform,
    LoaderOptions,
    SampleTransform,
    StepLoader,
    read_samples,
)
from torchfuse.models.decoders.llama import llama_decoder
from torchfuse.training import next_token_loss

VOCAB, PHOTOGRAPHS = 49_152, 50


class Patches(nn.Module):
    """64 features of an image of 224 x 224 pixels."""

    feature_dim, num_tokens, image_size = 64, 64, 224

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Conv2d(3, self.feature_dim, 28, 28)

    def forward(self, images):
        features = self.map(images.flatten(0, 1)).flatten(2).transpose(1, 2)
        return features.reshape(images.shape[0], -1, self.feature_dim)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--arch", default="joint_decoder")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--slots", type=int, default=2048, help="tokens of a packed row, one a step")
    parser.add_argument("--steps", type=int, default=6, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    return parser.parse_args(argv)


def write_records(folder, num_rows):
    rng, numbers = random.Random(0), torch.Generator().manual_seed(0)
    (folder / "images").mkdir()
    for number in range(PHOTOGRAPHS):
        coarse = torch.randint(256, (30, 40, 3), generator=numbers, dtype=torch.uint8).numpy()
        Image.fromarray(coarse).resize((480, 360)).save(folder / "images" / f"{number}.jpg")
    lines = []
    for row in range(num_rows):
        # A byte is a token; median 60, 95th percentile 400.
        length = round(60 * math.exp(math.log(400 / 60) / 1.645 * rng.gauss(0, 1)))
        shown = rng.random() < 0.8
        text = "x" * min(max(length // 2, 1), 800)
        turns = [("human", ("<image>\n" if shown else "") + text), ("gpt", text)]
        record = {"conversations": [{"from": role, "value": value} for role, value in turns]}
        lines.append(json.dumps(record | ({"image": f"{row % PHOTOGRAPHS}.jpg"} if shown else {})))
    (folder / "rows.jsonl").write_text("\n".join(lines))


def build(options):
    torch.manual_seed(0)
    sizes = {"num_heads": 9, "num_kv_heads": 3, "embed_dim": 576, "intermediate_dim": 1536}
    decoder = llama_decoder(
        vocab_size=VOCAB,
        num_layers=options.layers,
        max_seq_len=options.slots,
        tie_word_embeddings=True,
        **sizes,
    )
    own = {"fusion_vocab_size": 1} if options.arch == "cross_attention" else {"encoder_token": VOCAB}
    return fuse(decoder, Patches(), arch=options.arch, **own).train()


def run(model, samples, transform, workers, options):
    """Return the seconds of waiting and of all for some steps, after one that starts the workers."""
    loading = LoaderOptions(max_seq_len=options.slots, packed=True, num_workers=workers)
    steps = iter(StepLoader(samples, transform, loading).steps())
    next(steps)
    waited, began = 0.0, time.perf_counter()
    for _ in range(options.steps):
        asked = time.perf_counter()
        (batch,), _ = next(steps)
        waited += time.perf_counter() - asked
        labels = batch.pop("labels")
        total, count = next_token_loss(model(**batch), labels)
        (total / count).backward()
        model.zero_grad(set_to_none=True)
    return waited, time.perf_counter() - began


def main(argv=None):
    options = parse(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_records(folder, options.rows)
        save_tokenizer(folder)
        (folder / "config.json").write_text(json.dumps({"eos_token_id": 257, "pad_token_id": 258}))
        samples = read_samples(folder / "rows.jsonl", image_root=folder / "images")
        model = build(options)
        transform = SampleTransform.for_model(model, folder, ImageTransform(224))
        print(
            f"{options.arch}, {options.layers} layers, packed rows of {options.slots} tokens, "
            f"{options.steps} steps a round, torch {torch.__version__}, {torch.get_num_threads()} "
            f"threads, {platform.machine()}"
        )
        rounds = {workers: [] for workers in options.workers}
        for _ in range(options.rounds):
            for workers, results in rounds.items():
                results.append(run(model, samples, transform, workers, options))
    for workers, results in rounds.items():
        shares = sorted(waited / total for waited, total in results)
        step = statistics.median(total / options.steps for _, total in results)
        print(
            f"{workers} workers: {statistics.median(shares):.1%} of the time waiting for data "
            f"[{shares[0]:.1%} .. {shares[-1]:.1%}], {step:.2f} s a step"
        )


if __name__ == "__main__":
    main()
