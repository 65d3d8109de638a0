"""A training step from cached features against one that runs the encoder, side by side in one run.

The tower has the size of CLIP ViT-B/16 (12 layers, 768 wide, 196 features an image), the decoder the
width of SmolLM2 (576, 9 / 3 heads, 1536 in the feed-forward, vocabulary 49,152); weights are random. A
step reads its samples and runs the model forward and backward; nothing is updated, so that losses can be
compared. In each round both ways take the same samples, one after the other, in alternating order. Ratios
are of seconds, and, since other programs disturb these, of seconds of CPU of all threads.

Run: python tests/benchmarks/feature_cache.py [--arch joint_decoder] [--layers 6] [--batch 4] [--rounds 5]
     [--words 40] [--dtype float32] [--device cuda] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torchtune.models.llama3_2 import llama3_2

from torchfuse import fuse, get_fusion_params
from torchfuse.data import ImageTransform, SampleTransform, padded_collate_images, read_samples
from torchfuse.encoders.clip import ClipVisionEncoder
from torchfuse.tasks.feature_cache import cache_features
from torchfuse.training import next_token_loss

VOCAB, SIDE, WORDS = 49_152, 224, 1000


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--arch", choices=("cross_attention", "joint_decoder"), default="joint_decoder")
    parser.add_argument("--layers", type=int, default=6, help="of the decoder; SmolLM2-135M has 30")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--words", type=int, default=40, help="of a sample, half of them learned")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args(argv)


def write_data(folder, options):
    """A tokenizer of words, and a conversation about one image for each row of a round."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(4, WORDS))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(words[:4])
    made.save(str(folder / "tokenizer.json"))
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(ids))
    random, records = np.random.default_rng(0), []
    for row in range(options.batch * (options.rounds + 1)):
        small = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        small.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{row}.jpg", quality=90)
        text = [words[i] for i in random.integers(4, WORDS, options.words)]
        question, answer = " ".join(text[::2]), " ".join(text[1::2])
        turns = [{"from": "human", "value": f"<image> {question}"}, {"from": "gpt", "value": answer}]
        records.append({"image": f"{row}.jpg", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(records))
    return read_samples(folder / "rows.json")


def build(options):
    torch.manual_seed(0)
    decoder = llama3_2(
        vocab_size=VOCAB,
        num_layers=options.layers,
        num_heads=9,
        num_kv_heads=3,
        embed_dim=576,
        max_seq_len=1024,
        intermediate_dim=1536,
    )
    tower = ClipVisionEncoder(
        image_size=SIDE, patch_size=16, embed_dim=768, num_layers=12, num_heads=12, feature_layer=12
    )
    given = {"encoder_token": VOCAB} if options.arch == "joint_decoder" else {"fusion_vocab_size": 1}
    torch.nn.init.normal_(decoder.tok_embeddings.weight, std=0.02)
    model = fuse(decoder, tower, arch=options.arch, **given)
    return model.to(options.device, getattr(torch, options.dtype)).train()


def measure(model, samples, transform, device):
    """Take one step; seconds, of them for reading, seconds of CPU, loss a token, norm of the gradient."""
    started, worked = time.perf_counter(), time.process_time()
    batch = padded_collate_images([transform(sample) for sample in samples], transform.pad_id)
    read = time.perf_counter() - started
    inputs = {key: tensor.to(device) for key, tensor in batch.pop("encoder_input").items()}
    batch = {key: tensor.to(device) for key, tensor in batch.items()}
    labels = batch.pop("labels")
    total, count = next_token_loss(model(**batch, encoder_input=inputs), labels)
    (total / count).backward()
    gradients = [p.grad.norm() for p in get_fusion_params(model).values() if p.grad is not None]
    norm = float(torch.stack(gradients).norm())
    model.zero_grad()
    worked = time.process_time() - worked
    return time.perf_counter() - started, read, worked, float(total.detach() / count), norm


def main(argv=None):
    options = parse(argv)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples, model = write_data(folder, options), build(options)
        pixels = SampleTransform.for_model(model, folder, ImageTransform(SIDE), template="plain")
        started = time.perf_counter()
        cached = cache_features(model, samples, pixels, folder / "features", batch_size=8)
        filled = time.perf_counter() - started
        size = sum(file.stat().st_size for file in (folder / "features").iterdir())
        found = {"encoder": [], "cache": []}
        transforms = {"encoder": pixels, "cache": cached}
        for turn in range(options.rounds + 1):
            rows = [samples[turn * options.batch + i] for i in range(options.batch)]
            for way in list(transforms)[:: 1 if turn % 2 else -1]:
                result = measure(model, rows, transforms[way], options.device)
                if turn:  # the first round warms up
                    found[way].append(result)
    report(options, found, len(samples), filled, size)
    return found


def report(options, found, count, filled, size):
    """Print what was compared."""
    print(
        f"{platform.processor() or platform.machine()}, {options.device}, {options.threads} threads, "
        f"torch {torch.__version__}, {options.dtype}: {options.arch}, {options.layers} decoder layers, "
        f"{options.batch} samples a step, one image and {options.words} words each"
    )
    print(f"filling: {count} images in {filled:.1f} s, {size / count / 1e3:.0f} kB an image")
    for way, results in found.items():
        seconds, read, worked = (statistics.median(r[i] for r in results) for i in range(3))
        print(
            f"{way:<8} {seconds:.3f} s a step, of them {read:.3f} s reading; {worked:.2f} s of CPU; "
            f"loss {results[-1][3]:.5f}"
        )
    pairs = list(zip(found["encoder"], found["cache"], strict=True))
    times, works = (spread([cache[i] / encoder[i] for encoder, cache in pairs]) for i in (0, 2))
    loss, norm = (max(abs(cache[i] / encoder[i] - 1) for encoder, cache in pairs) for i in (3, 4))
    print(
        f"cache / encoder: {times} of the time, {works} of the seconds of CPU over {len(pairs)} rounds; "
        f"losses differ by at most {loss:.1e}, norms of gradients by {norm:.1e}"
    )


def spread(ratios):
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f} .. {max(ratios):.2f}]"


if __name__ == "__main__":
    main()
