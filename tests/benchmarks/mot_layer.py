"""A MoT layer against a dense layer over as many tokens, forward and backward, in turns in one run.

Run: python tests/benchmarks/mot_layer.py [--width 1024 --image 576 --text 512 --rounds 15]

Both run the same arithmetic for each token: image tokens through their own weights, text through its
own. What MoT costs on top is taking the sequence apart and putting it together.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch
from torchtune.models.llama3_2 import llama3_2
from tqdm import tqdm

from torchfuse.models.layers import mot_layer
from torchfuse.modules.experts.routing import Routing


def time_once(layer, x, gradient, synchronize, **call):
    """Seconds of the forward, and of forward and backward together."""
    layer.zero_grad(set_to_none=True)
    synchronize()
    start = time.perf_counter()
    out = layer(x, **call)
    synchronize()
    forward = time.perf_counter() - start
    out.backward(gradient)
    synchronize()
    return forward, time.perf_counter() - start


def spread(values, unit="ms", scale=1e3):
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    return f"{scale * statistics.median(values):8.2f} {unit} [{scale * low:.2f} .. {scale * high:.2f}]"


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2816)
    parser.add_argument("--image", type=int, default=576)
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    return parser.parse_args(argv)


def main(argv=None):
    options = parse(argv)
    torch.manual_seed(0)
    length = options.image + options.text
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    with device:
        dense, other = llama3_2(
            vocab_size=7,
            num_layers=2,
            num_heads=options.heads,
            num_kv_heads=options.kv_heads,
            embed_dim=options.width,
            max_seq_len=length,
            intermediate_dim=options.hidden,
            scale_factor=1,
        ).layers.to(dtype)
        x = torch.randn(options.batch, length, options.width, dtype=dtype, requires_grad=True)
        gradient = torch.randn_like(x)
        at = torch.cat([torch.arange(options.image), torch.arange(options.text)])
    layer = mot_layer(other, ["image"])
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {where}, {dtype}")
    print(
        f"{options.image} image and {options.text} text tokens, {options.batch} rows, width {options.width}"
    )
    print(f"median of {options.rounds} rounds, in turns, and the middle half of them\n")
    calls = {
        "dense": (dense, {"input_pos": at}),
        "mot": (layer, {"input_pos": at, "routing": Routing({"image": options.image})}),
    }
    times = {name: [] for name in calls}
    for turn in tqdm(range(options.rounds + 2), disable=None, leave=False):
        for name in reversed(calls) if turn % 2 else calls:
            module, call = calls[name]
            once = time_once(module, x, gradient, synchronize, **call)
            if turn >= 2:  # warm-up
                times[name].append(once)
    ratios = {}
    for index, what in enumerate(("forward", "forward + backward")):
        values = {name: [once[index] for once in measured] for name, measured in times.items()}
        for name, measured in values.items():
            print(f"{what:<19} {name:<6} {spread(measured)}")
        each = [mot / one for mot, one in zip(values["mot"], values["dense"], strict=True)]
        ratios[what] = statistics.median(each)
        print(f"{what:<19} mot / dense {spread(each, unit='', scale=1)}\n")
    return ratios


if __name__ == "__main__":
    main()
