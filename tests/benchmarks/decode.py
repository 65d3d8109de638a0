"""Decoding with an image against torchtune's cached loop and transformers' ``generate``, in one run.

All have the same weights, of a random Llama 3.2 Vision: transformers' is saved and read again, torchtune's
decoder takes the same state dict around the same tower. Every answer is greedy. A call for one token is
the time of the prompt (the image is encoded in it, caches are made); what a call for more takes beyond
that is the time of the steps. Implementations alternate within each round, so that other load
on the machine affects all equally; ratios are computed for each round.

"Of the bandwidth" is the bytes that a step must read (weights of the decoder, each once, and the keys and
values of every slot) times steps per second, divided by the bytes per second that the machine reads in the
same run. Memory is the weights plus the peak allocation of a call.

Run: python tests/benchmarks/decode.py [--size 27M 200M] [--dtype fp32 bf16] [--rows 1 8] [--rounds 5]
On a GPU: python tests/benchmarks/decode.py --device cuda --size 11B --dtype bf16 --tiles 1 4
"""

from __future__ import annotations

import argparse
import copy
import itertools
import platform
import re
import statistics
import tempfile
import threading
import time
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

from torchfuse import quantize
from torchfuse.generation import Session
from torchfuse.params import storage_nbytes

if __package__:
    from .bandwidth import bytes_per_second, step_bytes, synchronize
    from .decoders import (
        DTYPES,
        SIZES,
        Torchfuse,
        Torchtune,
        Transformers,
        build,
        images_of,
        make_prompt,
    )
else:
    from bandwidth import bytes_per_second, step_bytes, synchronize
    from decoders import DTYPES, SIZES, Torchfuse, Torchtune, Transformers, build, images_of, make_prompt

PROFILE_HINT = "--profile prints where the compiled steps spend their time"
# The speed of compiled (or quantized) decoding to reach, as a multiple of the better of transformers and torchtune.
TARGETS = {
    ("27M", "fp32", "compiled"): 1.4,
    ("27M", "bf16", "compiled"): 1.5,
    ("200M", "fp32", "compiled"): 1.0,
    ("200M", "bf16", "compiled"): 1.0,
    ("200M", "bf16", "quantized"): 1.2,
}
BATCH_TARGET = 3.0
GPU_TARGETS = {"bandwidth": 0.75, "torchtune": 3.0, "transformers": 2.0}


def seconds(options, implementation, prompt, new):
    synchronize(options.device)
    start = time.perf_counter()
    implementation(prompt, new)
    synchronize(options.device)
    return time.perf_counter() - start


@torch.no_grad()
def bytes_of_step(options, model, prompt):
    """Return what a step reads, once the image's keys and values are cached."""
    tokens, embeds = prompt[0], model.encode(images_of(prompt))
    sizes = {"max_tokens": options.prompt + options.new, "max_features": embeds.shape[1]}
    with Session(model, batch_size=tokens.shape[0], **sizes) as session:
        session.answer(tokens, max_new_tokens=1, encoder_embeds=embeds)
        return step_bytes(model)


def memory(options, implementation, prompt):
    """Return the most bytes that a call adds; None where they cannot be measured."""
    if options.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        implementation(prompt, options.new)
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")
    if not status.exists():
        implementation(prompt, options.new)
        return None

    def anonymous():
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status.read_text())[1])

    before = peak = anonymous()
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        implementation(prompt, options.new)
    finally:
        done.set()
        watcher.join()
    return max(peak, anonymous()) - before


def spread(values, digits=2):
    return (
        f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f} .. {max(values):.{digits}f}]"
    )


def build_implementations(options, hf_model, torchtune_model, model):
    """Return all implementations, those of other libraries first."""
    implementations = [
        Transformers(hf_model, "dynamic"),
        Transformers(hf_model, "static"),
        Torchtune(torchtune_model),
        Torchfuse(model, "torchfuse eager"),
        Torchfuse(model, "torchfuse compiled", compile=True),
    ]
    for scheme in options.quantized:
        smaller = copy.deepcopy(model).requires_grad_(False)
        quantize(smaller, scheme, fusion=True)
        implementations.append(Torchfuse(smaller, f"torchfuse {scheme}, compiled", compile=True))
    return implementations


def measure(options, prompt, implementations, bandwidth, title):
    """Print one table; tokens per second of every round, by implementation, and its share of the bandwidth."""
    rows = prompt[0].shape[0]
    answers, most = {}, {}
    for implementation in implementations:  # the first call compiles
        implementation(prompt, 1)
        answers[implementation.name] = implementation(prompt, options.new)
        most[implementation.name] = memory(options, implementation, prompt)
    first = {implementation.name: [] for implementation in implementations}
    rate = {implementation.name: [] for implementation in implementations}
    for turn in tqdm(range(options.rounds), desc=title, disable=None, leave=False):
        for implementation in implementations if turn % 2 == 0 else reversed(implementations):
            one = seconds(options, implementation, prompt, 1)
            whole = seconds(options, implementation, prompt, options.new)
            first[implementation.name].append(one)
            rate[implementation.name].append(rows * (options.new - 1) / (whole - one))
    fused = next(
        implementation.model
        for implementation in implementations
        if isinstance(implementation, Torchfuse)
    )
    features = num_features(fused, prompt)
    print(f"\n{title}, {features} encoder tokens")
    head = ("prompt, ms", "tokens/s", "of the bandwidth", "memory, MB")
    print(f"{'':<38} {head[0]:<24} {head[1]:<27} {head[2]:<17} {head[3]:<11} same tokens")
    used = {}
    for implementation in implementations:
        name, model = implementation.name, implementation.model
        read_by = model if isinstance(implementation, Torchfuse) else fused
        needed = bytes_of_step(options, read_by, prompt)
        used[name] = statistics.median(rate[name]) / rows * needed / bandwidth
        weights = sum(
            storage_nbytes(tensor) for tensor in {id(p): p for p in model.parameters()}.values()
        )
        megabytes = "" if most[name] is None else f"{(weights + most[name]) / 1e6:,.0f}"
        same = (answers[name] == answers["torchfuse eager"]).float().mean()
        print(
            f"{name:<38} {spread([1e3 * s for s in first[name]], 0):<24} {spread(rate[name], 1):<27} "
            f"{used[name]:<17.0%} {megabytes:<11} {same:.0%}"
        )
    return rate, used


@torch.no_grad()
def num_features(model, prompt):
    return model.encode(images_of(prompt)).shape[1]


def better_of(rate, names):
    return max(names, key=lambda name: statistics.median(rate[name]))


def ratio_line(rate, name, other, target):
    """Print a ratio of every round, and return its median."""
    ratios = [a / b for a, b in zip(rate[name], rate[other], strict=True)]
    print(f"{name} / {other}: {spread(ratios)}{target_note(statistics.median(ratios), target)}")
    return statistics.median(ratios)


def target_note(value, target):
    return "" if target is None else f", target {target}: {'reached' if value >= target else 'MISSED'}"


def print_ratios(options, size, dtype, rate, used):
    """Print the ratios of the fewest rows, and return them."""
    peers = [name for name in rate if not name.startswith("torchfuse")]
    quantized = [name for name in rate if name.endswith(", compiled")]
    found = {"compiled": "torchfuse compiled"}
    if quantized:
        found["quantized"] = better_of(rate, quantized)
    ratios = {}
    for what, name in found.items():
        target = TARGETS.get((size, dtype, what)) if options.device == "cpu" else None
        ratios[size, dtype, what] = ratio_line(rate, name, better_of(rate, peers), target)
    if options.device == "cuda":
        for peer in ("torchtune", "transformers"):
            best = better_of(rate, [name for name in peers if name.startswith(peer)])
            ratio_line(rate, "torchfuse compiled", best, GPU_TARGETS[peer])
        share = used["torchfuse compiled"]
        print(f"of the bandwidth: {share:.0%}{target_note(share, GPU_TARGETS['bandwidth'])}")
    return ratios


def profile(options, prompt, implementation):
    """Print where the compiled steps spend their time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if options.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        implementation(prompt, options.new)
    print(profiler.key_averages().table(sort_by=f"self_{options.device}_time_total", row_limit=12))


def benchmark(options, size, dtype, folder):
    """Run one size and dtype, with each number of rows, and return the ratios."""
    from transformers import logging

    logging.disable_progress_bar()
    models = build(options, size, DTYPES[dtype], folder)
    bandwidth = bytes_per_second(options.device)
    parameters = sum(p.numel() for p in models[2].parameters())
    print(f"\n{parameters / 1e6:,.1f} M parameters; this machine reads {bandwidth / 1e9:.1f} GB/s")
    implementations = build_implementations(options, *models)
    ratios = {}
    for tiles in options.tiles:
        rates = {}
        for rows in options.rows:
            prompt = make_prompt(options, size, DTYPES[dtype], rows, tiles)
            title = f"{size}, {dtype}, {rows} row{'s' * (rows > 1)}"
            rates[rows], used = measure(options, prompt, implementations, bandwidth, title)
            if rows == min(options.rows):
                ratios |= print_ratios(options, size, dtype, rates[rows], used)
                if options.profile:
                    profile(
                        options,
                        prompt,
                        next(c for c in implementations if c.name == "torchfuse compiled"),
                    )
        fewest, most = min(rates), max(rates)
        if most > fewest:
            name = "torchfuse compiled"
            gains = [a / b for a, b in zip(rates[most][name], rates[fewest][name], strict=True)]
            gain = ratios[size, dtype, "batch"] = statistics.median(gains)
            target = BATCH_TARGET if (fewest, most) == (1, 8) else None
            print(f"{name}, {most} rows / {fewest}: {spread(gains)}{target_note(gain, target)}")
    return ratios


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["27M", "200M"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--tiles", nargs="+", type=int, default=[1], help="of each image")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quantized", nargs="*", default=["int8_weight_only", "int8_dynamic"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args(argv)
    import transformers

    torch.set_num_threads(options.threads)
    device_name = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {device_name}")
    print(f"prompt {options.prompt}, {options.new} new tokens, median of {options.rounds} rounds and")
    print(f"[least .. most]; {options.threads} threads; {PROFILE_HINT}")
    if options.device == "cpu":
        print("figures of a GPU are not measured")
    ratios = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for size, dtype in itertools.product(options.size, options.dtype):
            with tempfile.TemporaryDirectory() as folder:
                ratios |= benchmark(options, size, dtype, Path(folder))
            torch._dynamo.reset()
    return ratios


if __name__ == "__main__":
    main()
