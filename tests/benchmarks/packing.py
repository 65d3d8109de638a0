"""Packed against padded batches of the same number of slots: real tokens a second, in turns in one run.

Run: python tests/benchmarks/packing.py [--slots 2048 --pack 1024 --device cuda --dtype bfloat16]

Conversations are as long as LLaVA's: log-normal, median 60 tokens, 95th percentile 400; four of five
have an image. A padded batch holds as many conversations, as they come, as fit into its slots at the
length of its longest. A step is the forward pass, the loss of all positions and the backward pass of
what fusion added; the decoder is frozen. Positions that are not padding count as real tokens.
"dense" are packed batches too, but attention uses the mask of all tokens of a row: what leaving out other
documents is worth.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time

import torch
from torch import nn
from tqdm import tqdm

from torchfuse import fuse
from torchfuse.data import image_mask, pack, padded_collate_images
from torchfuse.models.decoders.llama import llama_decoder
from torchfuse.modules.documents import document_mask
from torchfuse.training import next_token_loss

_IN_DIM = 32
_LAYOUTS = {"joint_decoder": "placeholder", "cross_attention": "marker"}


class Patches(nn.Module):
    """Features of patches ``[b, m, n, d]``; so small that the decoder is what is measured."""

    feature_dim = 64

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(_IN_DIM, self.feature_dim)

    def forward(self, images):
        return self.map(images.flatten(1, 2))


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--slots", type=int, default=2048, help="positions of a batch")
    parser.add_argument(
        "--pack", type=int, default=1024, help="positions of a pack, and the most of a row"
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--features", type=int, default=64, help="features of an image")
    parser.add_argument("--batches", type=int, default=2, help="batches of a kind in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    return parser.parse_args(argv)


def build(arch, options):
    torch.manual_seed(0)
    decoder = llama_decoder(
        vocab_size=options.vocab,
        num_layers=options.layers,
        num_heads=9,
        num_kv_heads=3,
        embed_dim=576,
        intermediate_dim=1536,
        max_seq_len=max(options.pack, 2048),
        tie_word_embeddings=True,
    )
    own = {"encoder_token": options.vocab} if arch == "joint_decoder" else {"fusion_vocab_size": 1}
    model = fuse(decoder, Patches(), arch=arch, **own)
    return model.to(options.device, getattr(torch, options.dtype))


def samples(arch, options):
    """Samples without end, whose first half is a prompt."""
    generator = torch.Generator().manual_seed(options.seed)
    deviation = math.log(400 / 60) / 1.645
    markers = options.features if arch == "joint_decoder" else 1
    while True:
        length = 60 * math.exp(deviation * float(torch.randn((), generator=generator)))
        num_images = int(torch.rand((), generator=generator) < 0.8)
        tokens = torch.randint(options.vocab, (max(2, round(length)),), generator=generator)
        tokens = torch.cat([torch.full((markers * num_images,), options.vocab), tokens])
        if len(tokens) > options.pack:
            continue
        labels = tokens.clone()
        labels[: len(tokens) // 2] = -100
        labels[tokens == options.vocab] = -100
        yield {
            "tokens": tokens,
            "labels": labels,
            "images": torch.randn(num_images, options.features, _IN_DIM, generator=generator),
            "encoder_mask": image_mask(
                tokens[None],
                options.vocab,
                features_per_image=options.features,
                num_images=num_images,
                markers_per_image=markers,
            )[0],
        }


def padded_batches(stream, slots):
    rows, longest = [], 0
    for sample in stream:
        longest = max(longest, len(sample["tokens"]))
        if rows and (len(rows) + 1) * longest > slots:
            yield padded_collate_images(rows), sum(len(row["tokens"]) for row in rows)
            rows, longest = [], len(sample["tokens"])
        rows.append(sample)


def packed_batches(stream, arch, options):
    packs = pack(stream, options.pack, layout=_LAYOUTS[arch])
    while True:
        rows = [next(packs) for _ in range(options.slots // options.pack)]
        yield padded_collate_images(rows), sum(int((row["document_ids"] >= 0).sum()) for row in rows)


def dense_batches(stream):
    """The same batches with a mask of all tokens of a row."""
    for batch, number in stream:
        ids = batch.pop("document_ids")
        yield batch | {"mask": document_mask(ids).as_subclass(torch.Tensor)}, number


def to_model(value, model):
    """Move a batch to a model's device, and what is computed with to its dtype."""
    if isinstance(value, dict):
        return {key: to_model(each, model) for key, each in value.items()}
    weight = next(model.parameters())
    return value.to(weight.device, weight.dtype if value.is_floating_point() else None)


def clock(model):
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_step(model, batch):
    model.zero_grad(set_to_none=True)
    batch = to_model(batch, model)
    call = {key: value for key, value in batch.items() if key != "labels"}
    start = clock(model)
    total, count = next_token_loss(model(**call), batch["labels"])
    (total / count).backward()
    return clock(model) - start


def spread(values, unit=""):
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    return f"{statistics.median(values):.2f}{unit} [{low:.2f} .. {high:.2f}]"


def compare(arch, options):
    model = build(arch, options).train()
    batches = {
        "padded": padded_batches(samples(arch, options), options.slots),
        "packed": packed_batches(samples(arch, options), arch, options),
        "dense": dense_batches(packed_batches(samples(arch, options), arch, options)),
    }
    rates, steps = {name: [] for name in batches}, {name: [] for name in batches}
    real, slots = dict.fromkeys(batches, 0), dict.fromkeys(batches, 0)
    for turn in tqdm(range(options.rounds + 1), desc=arch, disable=None, leave=False):
        for name in reversed(batches) if turn % 2 else batches:
            drawn = [next(batches[name]) for _ in range(options.batches)]
            seconds = [time_step(model, batch) for batch, _ in drawn]
            if turn:  # the first warms up
                rates[name].append(sum(num for _, num in drawn) / sum(seconds))
                steps[name] += seconds
                real[name] += sum(num for _, num in drawn)
                slots[name] += sum(batch["tokens"].numel() for batch, _ in drawn)
    for name in batches:
        print(
            f"{arch:<16} {name:<6}  {statistics.median(rates[name]):8.0f} real tokens/s   step "
            f"{spread(steps[name], ' s')}   slots used {real[name] / slots[name]:.0%}"
        )
    for other in ("dense", "padded"):
        ratios = [one / base for one, base in zip(rates["packed"], rates[other], strict=True)]
        print(f"{arch:<16} packed / {other} {spread(ratios)}")
    print()
    return statistics.median(ratios)


def main(argv=None):
    options = parse(argv)
    cuda = options.device.startswith("cuda")
    where = torch.cuda.get_device_name(options.device) if cuda else platform.machine()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {where}, {options.dtype}")
    print(
        f"{options.layers} layers, width 576, 9/3 heads, vocabulary {options.vocab}; {options.features} "
        f"features an image;\nat most {options.slots} slots a batch, packs and rows of at most "
        f"{options.pack}; median of {options.rounds} rounds of {options.batches} batches, in turns, and "
        "the middle half\n"
    )
    return {arch: compare(arch, options) for arch in _LAYOUTS}


if __name__ == "__main__":
    main()
