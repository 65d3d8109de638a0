"""A training step against torchtune's and transformers', on the same weights and batches, in one run.

All have the weights of one random model that transformers saved: a Llama 3.2 Vision (cross_attention) or
a LLaVA (joint_decoder). A step is zero_grad, the forward pass, the loss and the backward pass, without
an optimizer. The same parameters train in all: cross-attention layers and projections, or everything
(--full). Towers are small, so that the decoder is what is measured. torchtune computes logits and
loss in 8 chunks, as its recipes do, transformers by ``labels=``; neither is given a mask of padding,
which is on the right. "all logits" is torchfuse with ``next_token_loss``.

Before anything is measured losses must agree, and gradients are compared; for each implementation the
greatest difference from torchfuse's is printed, divided by the largest gradient.

Implementations alternate within each round, so that other load on the machine affects all equally;
ratios are computed for each round. Memory is the peak of a step over what was allocated before it:
weights. On the CPU each implementation is a process of its own, and memory is what is resident (Linux).

Run: python tests/benchmarks/train_step.py [--supervised 10 100] [--rounds 5] [--full]
On a GPU: python tests/benchmarks/train_step.py --device cuda
There batches are visual questions, padded and, with torchfuse, packed. MFU counts what the samples
need one by one, without padding and with the head on supervised positions alone.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

from torchfuse.training.estimation.gpus import gpu_named

if __package__:
    from .decoders import DTYPES, SIZES
    from .train_measure import Alone, Step
    from .train_models import ARCHS, IMPLEMENTATIONS, make_batch, save
else:
    from decoders import DTYPES, SIZES
    from train_measure import Alone, Step
    from train_models import ARCHS, IMPLEMENTATIONS, make_batch, save

PEERS = ("torchtune", "transformers")
# Time and peak memory, at most, as multiples of the better peer's, by per cent supervised.
TARGETS = {10: (0.45, 0.55), 100: (1.0, 0.6)}


def spread(values, digits=2):
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} [{low:.{digits}f} .. {high:.{digits}f}]"


def check(options, steps, kind):
    """Compare losses and gradients, and return the greatest differences from torchfuse's."""
    found = {name: step.check(kind) for name, step in steps.items()}
    loss, grads = found.pop("torchfuse")
    largest = max(abs(grad).max() for grad in grads.values())
    differences = {}
    for name, (other, other_grads) in found.items():
        assert other_grads.keys() == grads.keys()
        worst = max(abs(other_grads[key] - grads[key]).max() for key in grads) / largest
        differences[name] = worst
        print(f"{name:<22} loss {other:.6f}, torchfuse's {loss:.6f}; gradients differ by {worst:.1e}")
        assert abs(other - loss) <= (1e-5 if options.dtype == "fp32" else 1e-2) * loss, name
    if options.dtype == "fp32":
        assert min(differences[peer] for peer in PEERS) <= 1e-6, differences
    return differences


def verdict(value, most):
    return "" if most is None else f", at most {most}: {'reached' if value <= most else 'MISSED'}"


def measure(options, steps, kind, packed=()):
    """Seconds of each round, also of the cores together, and bytes, by implementation; "NAME, packed" packs."""
    cases = {name: (step, kind) for name, step in steps.items()}
    cases |= {f"{name}, packed": (steps[name], "packed") for name in packed}
    seconds = {name: [] for name in cases}
    for turn in tqdm(range(options.rounds + 1), desc=str(kind), disable=None, leave=False):
        for name in cases if turn % 2 else reversed(cases):
            step, batch = cases[name]
            taken = step.seconds(batch)
            if turn:  # the first warms up
                seconds[name].append(taken)
    memory = {
        name: [step.memory(batch) for _ in range(min(3, options.rounds))]
        for name, (step, batch) in cases.items()
    }
    return seconds, memory


def report(options, arch, kind, seconds, memory, flops):
    """Print a table, and return the ratios of torchfuse's time and memory to the better peers'."""
    batch, real = make_batch(options, arch, kind)
    rows, length = batch["tokens"].shape
    learned = int((batch["labels"] != -100).sum())
    what = kind if flops else f"{kind} % supervised"
    print(f"\n{arch}, {what}: {rows} x {length} tokens, {learned} labels")
    gpu = gpu_named(device_name(options)) if flops else None
    head = ("seconds", "of all cores", "tokens/s", "MFU", "memory, GB")
    print(f"{'':<22} {head[0]:<24} {head[1]:<13} {head[2]:<9} {head[3]:<5} {head[4]}")
    wall = {name: [taken for taken, _ in values] for name, values in seconds.items()}
    cores = {name: [taken for _, taken in values] for name, values in seconds.items()}
    for name, values in wall.items():
        middle = statistics.median(values)
        share = f"{flops / middle / gpu.flops:.0%}" if gpu else ""
        print(
            f"{name:<22} {spread(values, 3):<24} {statistics.median(cores[name]):<13.3f} "
            f"{real / middle:<9,.0f} {share:<5} {spread([value / 1e9 for value in memory[name]])}"
        )
    measured = options.device == "cpu" and options.size == "165M" and not options.full
    most_time, most_memory = TARGETS.get(kind, (None, None)) if measured else (None, None)
    ratio = better_ratio("time", wall, most_time)
    better_ratio("time of all cores", cores, None)
    return ratio, better_ratio("memory", memory, most_memory)


def better_ratio(what, values, most):
    """Print torchfuse's share of the better peer's, and return the median over the rounds."""
    peer = min(PEERS, key=lambda name: statistics.median(values[name]))
    ratios = [own / other for own, other in zip(values["torchfuse"], values[peer], strict=True)]
    print(f"{what} / {peer}: {spread(ratios)}{verdict(statistics.median(ratios), most)}")
    return statistics.median(ratios)


def compare(options, arch, folder):
    """Run one architecture, and return its ratios by kind of batch."""
    save(options, arch, folder)
    start = Step if options.together else Alone
    steps = {name: start(options, name, arch, folder) for name in IMPLEMENTATIONS}
    visual = options.batch == "visual"
    ratios = {}
    for kind in ["padded"] if visual else options.supervised:
        check(options, steps, kind)
        seconds, memory = measure(options, steps, kind, ["torchfuse"] if visual else [])
        flops = steps["torchfuse"].flops(kind) if visual else None
        ratios[arch, kind] = report(options, arch, kind, seconds, memory, flops)
    for step in steps.values():
        if isinstance(step, Alone):
            step.close()
    return ratios


def device_name(options):
    return torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=SIZES, help="165M on the CPU, 1B on a GPU")
    parser.add_argument("--dtype", choices=DTYPES, help="fp32 on the CPU, bf16 on a GPU")
    parser.add_argument(
        "--archs", nargs="+", choices=ARCHS, help="cross_attention on the CPU, all on a GPU"
    )
    parser.add_argument("--batch", choices=["fixed", "visual"], help="fixed on the CPU, visual on a GPU")
    parser.add_argument("--rows", type=int, help="2 of fixed length, 16 visual questions")
    parser.add_argument(
        "--length", type=int, help="512 of fixed length, 2048 at most of visual questions"
    )
    parser.add_argument(
        "--supervised", nargs="+", type=int, default=[10, 100], help="per cent, of fixed length"
    )
    parser.add_argument("--full", action="store_true", help="train everything")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--together", action="store_true", help="in one process, as on a GPU")
    options = parser.parse_args(argv)
    cuda = options.device == "cuda"
    options.together = options.together or cuda
    options.size = options.size or ("1B" if cuda else "165M")
    options.dtype = options.dtype or ("bf16" if cuda else "fp32")
    options.archs = options.archs or (list(ARCHS) if cuda else ["cross_attention"])
    options.batch = options.batch or ("visual" if cuda else "fixed")
    visual = options.batch == "visual"
    options.rows = options.rows or (16 if visual else 2)
    options.length = options.length or (2048 if visual else 512)
    return options


def main(argv=None):
    options = parse(argv)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    shape = SIZES[options.size]
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {device_name(options)}, "
        f"{options.threads} threads, {options.dtype}"
    )
    print(
        f"{shape['layers']} layers, with cross-attention {shape['layers'] // shape['every']} more, width "
        f"{shape['width']}, vocabulary {shape['vocab']}; {'everything' if options.full else 'fusion'} "
        f"trains; median of {options.rounds} rounds and [least .. most]"
    )
    if options.device == "cpu":
        print("figures of a GPU are not measured")
    ratios = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for arch in options.archs:
            with tempfile.TemporaryDirectory() as folder:
                ratios |= compare(options, arch, Path(folder))
    return ratios


if __name__ == "__main__":
    main()
