"""Head and cross-entropy: ``linear_next_token_loss``, torch's ``linear_cross_entropy`` and all logits.

Each computes the same summed loss of the same hidden states, and the gradients of them and, with --full,
of the head. torch's function, which torch 2.15 has, gets the hidden states of supervised positions too, so
that what is compared is how the two compute; with its default options and with chunks of ``--chunk``.

Before anything is measured losses and gradients must agree. The cases alternate within each round; time is
also given as ratio to torchfuse's of the same round. Memory is the peak of a step over what was allocated
before it; on the CPU it is what is resident (Linux).

Run: python tests/benchmarks/linear_loss.py [--supervised 10 100] [--rounds 5] [--full] [--device cuda]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from torchfuse.training import linear_next_token_loss, next_token_loss

if __package__:
    from .bandwidth import synchronize
    from .decoders import DTYPES
    from .train_measure import peak_memory
    from .train_step import device_name, spread
else:
    from bandwidth import synchronize
    from decoders import DTYPES
    from train_measure import peak_memory
    from train_step import device_name, spread


class Head(nn.Module):
    """A decoder without layers: hidden states in, logits or chunks out, as torchtune's."""

    def __init__(self, width, vocab_size):
        super().__init__()
        self.output = nn.Linear(width, vocab_size, bias=False)
        self.num_output_chunks = 0

    def chunked_output(self, hidden):
        return [self.output(chunk) for chunk in hidden.chunk(self.num_output_chunks, dim=1)]

    def forward(self, tokens, hidden):
        return self.chunked_output(hidden) if self.num_output_chunks else self.output(hidden)


def torchfuse_loss(head, hidden, labels):
    return linear_next_token_loss(head, labels, labels=labels, hidden=hidden)[0]


def all_logits(head, hidden, labels):
    return next_token_loss(head(labels, hidden), labels)[0]


def torch_loss(**options):
    def loss(head, hidden, labels):
        learned = labels[:, 1:] != -100
        return functional.linear_cross_entropy(
            hidden[:, :-1][learned],
            head.output.weight,
            labels[:, 1:][learned],
            reduction="sum",
            options=nn.LinearCrossEntropyOptions(**options),
        )

    return loss


def cases(options):
    """The functions that are compared, by name."""
    found = {"torchfuse": torchfuse_loss, "all logits": all_logits}
    if hasattr(functional, "linear_cross_entropy"):
        chunks = {"batch_chunk_size": options.chunk, "chunking_method": None}
        found |= {"torch": torch_loss(), f"torch, chunks of {options.chunk}": torch_loss(**chunks)}
    return found


def run(loss, head, hidden, labels):
    """Return the loss and the gradients of hidden states and head."""
    hidden = hidden.clone().requires_grad_()
    head.zero_grad(set_to_none=True)
    total = loss(head, hidden, labels)
    total.backward()
    return total.detach(), hidden.grad, head.output.weight.grad


def check(options, found, *batch):
    """Compare the results of all with torchfuse's, in units of the largest of each."""
    expected = run(torchfuse_loss, *batch)
    for name, loss in found.items():
        for result, own in zip(run(loss, *batch), expected, strict=True):
            if own is not None:
                difference = (result - own).abs().max() / own.abs().max()
                assert difference <= (1e-5 if options.dtype == "fp32" else 2e-2), (
                    name,
                    float(difference),
                )


def measure(options, share, head):
    """Print a table, and return the ratios of time to torchfuse's by name."""
    torch.manual_seed(1)
    shape = (options.rows, options.length)
    hidden = torch.randn(*shape, options.width, device=options.device, dtype=DTYPES[options.dtype])
    labels = torch.randint(options.vocab, shape, device=options.device)
    labels[:, : options.length - max(1, round(share / 100 * options.length))] = -100
    found = cases(options)
    check(options, found, head, hidden, labels)
    seconds = {name: [] for name in found}
    for turn in tqdm(range(options.rounds + 1), desc=f"{share} %", disable=None, leave=False):
        for name in found if turn % 2 else reversed(found):
            synchronize(options.device)
            start = time.perf_counter()
            run(found[name], head, hidden, labels)
            synchronize(options.device)
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    print(f"\n{share} % supervised: {int((labels[:, 1:] != -100).sum())} of {labels.numel()} positions")
    print(f"{'':<22} {'seconds':<24} {'of torchfuse':<22} memory, MB")
    ratios = {}
    for name, values in seconds.items():
        shares = [value / own for value, own in zip(values, seconds["torchfuse"], strict=True)]
        ratios[name] = statistics.median(shares)
        gc.collect()
        peak = peak_memory(options.device, lambda name=name: run(found[name], head, hidden, labels))
        print(f"{name:<22} {spread(values, 3):<24} {spread(shares):<22} {peak / 1e6:.0f}")
    return ratios


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="fp32 on the CPU, bf16 on a GPU")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--supervised", nargs="+", type=int, default=[10, 100], help="per cent")
    parser.add_argument("--chunk", type=int, default=128, help="rows of torch's chunks")
    parser.add_argument("--full", action="store_true", help="the head trains too")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    options.dtype = options.dtype or ("bf16" if options.device == "cuda" else "fp32")
    torch.manual_seed(0)
    head = Head(options.width, options.vocab).to(options.device, DTYPES[options.dtype])
    head.requires_grad_(options.full)
    print(
        f"torch {torch.__version__}, {device_name(options)}, {torch.get_num_threads()} threads, "
        f"{options.dtype}; width {options.width}, vocabulary {options.vocab}; median of {options.rounds} "
        "rounds and [least .. most]"
    )
    return {share: measure(options, share, head) for share in options.supervised}


if __name__ == "__main__":
    main()
