"""What a quantized decoder changes: logits and greedy answers of a finetuned run, side by side.

The run's model is loaded twice and quantized once. Both read the run's test questions with their right
answers, and the relative error is ``norm(quantized - plain) / norm(plain)`` over the logits of all
tokens that are no padding, and over those alone that score a token of an answer. Then both answer
every question, and answers are the same when they are so word for word, right or wrong.

Run: python tests/benchmarks/quantized_answers.py --run demo/cross_attention [--dtypes fp32 bf16]
(from where the run was started, if its configuration holds relative paths)
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from tqdm import tqdm

from torchfuse import quantize
from torchfuse.data.collate import padded_collate_images
from torchfuse.quantization import Scheme
from torchfuse.tasks.evaluation import accuracy
from torchfuse.tasks.prediction import predict
from torchfuse.tasks.prompt_lengths import longest_answer
from torchfuse.tasks.prompt_settings import PromptSettings
from torchfuse.tasks.prompts import load_samples
from torchfuse.tasks.runs import load_run
from torchfuse.training.config import read_config

IGNORED = -100
MOST_MOVED, LEAST_SAME = 0.02, 0.98


class Compared(NamedTuple):
    moved: float  # relative error of the logits of all tokens
    moved_answers: float  # of those that score an answer's tokens
    same: float  # share of the samples with the same answer
    right: tuple[float, float]  # share of right answers, plain and quantized


@torch.no_grad()
def relative_errors(plain, quantized, transform, samples, options):
    """Over all tokens that are no padding, and over those that score an answer."""
    squares = torch.zeros(2, 2, dtype=torch.float64)  # (all, answers) x (difference, plain)
    batches = range(0, len(samples), options.batch_size)
    for start in tqdm(batches, desc="logits", disable=None, leave=False):
        encoded = [transform(sample) for sample in samples[start : start + options.batch_size]]
        batch = padded_collate_images(encoded, padding_idx=transform.pad_id)
        given = {
            "encoder_input": {k: v.to(options.device) for k, v in batch["encoder_input"].items()},
            "encoder_mask": batch["encoder_mask"].to(options.device),
        } if "encoder_input" in batch else {}  # fmt: skip
        tokens = batch["tokens"].to(options.device)
        logits, moved = (m(tokens, **given).double().cpu() for m in (plain, quantized))
        lengths = torch.tensor([len(each["tokens"]) for each in encoded])
        counts = torch.arange(tokens.shape[1]) < lengths[:, None]
        scores = torch.zeros_like(counts)
        scores[:, :-1] = batch["labels"][:, 1:] != IGNORED
        for which, at in enumerate((counts, scores)):
            squares[which, 0] += (moved - logits)[at].square().sum()
            squares[which, 1] += logits[at].square().sum()
    return (squares[:, 0] / squares[:, 1]).sqrt().tolist()


def compare(options, questions_file, dtype):
    """One dtype, printed as a block."""
    samples = load_samples(questions_file)[: options.limit]
    (plain, transform), (quantized, _) = (
        load_run(options.run, device=options.device, dtype=dtype) for _ in range(2)
    )
    longest = longest_answer(transform, samples, questions_file)
    for model in (plain, quantized):
        model.eval().requires_grad_(False)
    done = quantize(quantized, options.scheme, parts=options.parts)
    errors = relative_errors(plain, quantized, transform, samples, options)
    settings = PromptSettings(transform, max_new_tokens=longest)
    answers = [
        predict(model, settings, samples, batch_size=options.batch_size) for model in (plain, quantized)
    ]
    same = sum(a.text == b.text for a, b in zip(*answers, strict=True)) / len(samples)
    found = Compared(*errors, same, tuple(accuracy(predictions)["all"] for predictions in answers))
    print(f"{dtype}: {str(done).splitlines()[0]}")
    print(f"  logits moved by {found.moved:.3%}, {verdict(found.moved <= MOST_MOVED)} {MOST_MOVED:.0%}")
    print(f"  of these, logits that score an answer by {found.moved_answers:.3%}")
    print(f"  same greedy answers {found.same:.2%}, {verdict(same >= LEAST_SAME)} {LEAST_SAME:.0%}")
    print(f"  right answers {found.right[0]:.2%} before, {found.right[1]:.2%} after\n")
    return found


def verdict(within):
    return "within" if within else "NOT within"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output_dir of a finetuning run")
    parser.add_argument("--questions", type=Path, help="another file than the run's test questions")
    parser.add_argument("--limit", type=int, help="how many of them, from the start")
    parser.add_argument("--scheme", choices=get_args(Scheme), default="int8_weight_only")
    parser.add_argument("--parts", nargs="+", default=["decoder"])
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=128)
    options = parser.parse_args(argv)
    config = read_config(options.run / "config.yaml", "every finetuning run writes one")
    questions = options.questions or Path(config["data"]["test"])
    print(f"torch {torch.__version__}, {options.device}, {platform.machine()}")
    print(
        f"{options.run} ({config['model'].get('arch')}), {options.scheme} of {', '.join(options.parts)}"
    )
    print(f"{len(load_samples(questions)[: options.limit])} samples of {questions}\n")
    return {dtype: compare(options, questions, dtype) for dtype in options.dtypes}


if __name__ == "__main__":
    main()
