"""FusionEmbedding against torchtune's: forward, and forward with backward, side by side in one run.

Run: python tests/benchmarks/fusion_embedding.py [--vocab 128256 --width 2048 --batch 4 --length 2048]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch
from torchtune.modules.model_fusion import FusionEmbedding as TorchtuneFusionEmbedding
from tqdm import tqdm

from torchfuse import FusionEmbedding


def time_once(module, ids, gradient):
    """Seconds of the forward, and of forward and backward together."""
    for parameter in module.parameters():
        parameter.grad = None
    start = time.perf_counter()
    out = module(ids)
    forward = time.perf_counter() - start
    out.backward(gradient)
    return forward, time.perf_counter() - start


def spread(values):
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    return f"{1e3 * statistics.median(values):8.1f} ms  [{1e3 * low:.1f} .. {1e3 * high:.1f}]"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--new", type=int, default=8)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    shape = (options.batch, options.length)
    ids = torch.randint(0, options.vocab, shape)
    new = torch.rand(shape) < 0.05
    ids[new] = torch.randint(options.vocab, options.vocab + options.new, (int(new.sum()),))
    gradient = torch.randn(*shape, options.width)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    print(f"ids {list(shape)} (5 % new), tables {options.vocab} + {options.new} x {options.width}, fp32")
    print("median of", options.rounds, "rounds, in turns, and the middle half of them\n")

    sizes = (options.vocab, options.new, options.width)
    torchfuse_module, torchtune_module = FusionEmbedding(*sizes), TorchtuneFusionEmbedding(*sizes)
    torchtune_module.load_state_dict(torchfuse_module.state_dict())
    assert torch.equal(torchfuse_module(ids), torchtune_module(ids))
    ratios = {}
    for base in ("frozen", "trainable"):
        torchfuse_module.weight.requires_grad_(base == "trainable")
        torchtune_module.embedding.weight.requires_grad_(base == "trainable")
        times = {"torchfuse": [], "torchtune": []}
        for turn in tqdm(range(options.rounds + 2), desc=base, disable=None, leave=False):
            for name, module in (("torchfuse", torchfuse_module), ("torchtune", torchtune_module)):
                once = time_once(module, ids, gradient)
                if turn >= 2:  # warm-up
                    times[name].append(once)
        for index, what in enumerate(("forward", "forward + backward")):
            medians = {}
            for name, measured in times.items():
                values = [once[index] for once in measured]
                medians[name] = statistics.median(values)
                print(f"{base:<10} {what:<19} {name}  {spread(values)}")
            ratio = medians["torchtune"] / medians["torchfuse"]
            ratios[base, what] = ratio
            print(f"{base:<10} {what:<19} torchfuse is {ratio:.2f} times as fast\n")
    return ratios


if __name__ == "__main__":
    main()
