"""Answer questions about images: single questions, conversations, question files, or a chat.

Prompts come from a YAML file: a list of questions, with ``<image>`` at the position of each image and
``images``, paths relative to that file; or of conversations, whose turns are such questions:

    - question: "<image> which digit ?"
      images: [images/0012.png]
    - system: You are brief.
      turns:
        - question: "<image> which digit ?"
          images: [images/0012.png]
        - question: even or odd ?

They are answered one by one, and printed token by token. Prompts from a question file, a JSON object a
line, are answered in batches. With ``output`` the answers are written to a file, a JSON object a line:

    tune run torchfuse/recipes/generate.py --config recipes/configs/digits/generate.yaml \
        prompts=demo/questions/test.jsonl output=demo/answers.jsonl batch_size=64

``--chat`` starts a conversation in the terminal. The model is that of a finetuning run (``run``; start
in the directory in which it was started if its configuration has relative paths), or any directory of a
whole model (``model``) with a ``transform``.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from torchfuse import quantize
from torchfuse.data.questions import Question, read_questions
from torchfuse.errors import ConfigError, FusionError
from torchfuse.generation import Sampling as TokenSampling
from torchfuse.generation.caches import room_for_text
from torchfuse.io.atomic import write_text
from torchfuse.quantization import Scheme
from torchfuse.tasks.chat import HELP, chat
from torchfuse.tasks.conversation import Conversation
from torchfuse.tasks.prediction import predict
from torchfuse.tasks.prompt_settings import PromptSettings, required_slots
from torchfuse.tasks.prompts import Prompt, encode_turns, prompts_from
from torchfuse.tasks.prompts import Template as PromptTemplate
from torchfuse.tasks.report import Report
from torchfuse.tasks.runs import ModelSource, read_model, read_run
from torchfuse.training.config import read_yaml, recipe
from torchfuse.training.device import device_and_dtype


@dataclass
class Sampling:
    """How the next token is chosen, at temperature 0 the likeliest, and where an answer ends."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    max_new_tokens: int = 32
    stop_tokens: list[int] | None = None


@dataclass
class Template:
    """The text around a system text and around a question, which replace ``{text}``."""

    system: str = "{text}\n"
    question: str = "{text}"


@dataclass
class Config:
    """Keys of the recipe; ``max_tokens`` and ``max_images`` are the limits of a chat."""

    run: str | None = None
    model: str | None = None
    transform: dict[str, Any] | None = None
    prompts: str | None = None
    output: str | None = None
    batch_size: int = 8
    chat: bool = False
    max_tokens: int = 4096
    max_images: int = 4
    template: Template = field(default_factory=Template)
    sampling: Sampling = field(default_factory=Sampling)
    quantization: str | None = None
    quantization_parts: list[str] = field(default_factory=lambda: ["decoder"])
    compile: bool = False
    device: str = "cpu"
    dtype: str = "fp32"
    seed: int = 0


@recipe(Config, flags={"chat": "chat in the terminal; the key prompts is ignored"})
def main(config: Config) -> None:
    """Answer questions about images: single questions, conversations, question files, or a chat."""
    _check(config)
    path = Path(config.prompts or "")
    batched = path.suffix == ".jsonl"
    prompts = [] if config.chat else _read_prompts(path)
    source = read_run(config.run) if config.run else read_model(config.model or "", config.transform)
    settings = _prompt_settings(config, source)
    encoded = encode_turns(source.transform, settings.template, prompts, path=path)

    model = _load(config, source)
    settings.check(model)
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    report = Report()
    if config.chat:
        _chat(config, model, settings, report)
    else:
        images = max(sum(len(turn.images) for turn in prompt.turns) for prompt in prompts)
        slots = required_slots(model, settings, encoded, images, path=path)
        if batched:
            answers = _answer_in_batches(config, model, settings, prompts, report)
        else:
            answers = _answer_one_by_one(model, settings, prompts, slots, images, report)
        if config.output:
            _write_answers(Path(config.output), prompts, answers)
    print("\n" + "\n".join(report.lines(device)))


def _check(config: Config) -> None:
    """Raise one ``ConfigError`` for all problems of the configuration itself."""
    problems = []
    if not config.run and not config.model:
        raise ConfigError("Configuration key 'run' (or 'model'): missing, and must be given.")
    if config.run and config.model:
        problems.append(f"give run={config.run} or model={config.model}, not both")
    if config.model and config.transform is None:
        problems.append("model needs a transform, as the configurations of finetuning have one")
    if config.run and not config.model and config.transform is not None:
        problems.append("give transform with model only; a run has its own")
    if not config.chat and not config.prompts:
        problems.append("give prompts, a YAML file or a .jsonl, or --chat")
    if config.chat and config.output:
        problems.append("output is for prompts, not for a chat")
    problems += [
        f"{name}={value} must be at least {least}"
        for name, value, least in (
            ("batch_size", config.batch_size, 1),
            ("max_tokens", config.max_tokens, 2),
            ("max_images", config.max_images, 0),
            ("sampling.max_new_tokens", config.sampling.max_new_tokens, 1),
        )
        if value < least
    ]
    stops = config.sampling.stop_tokens or []
    if negative := [stop for stop in stops if stop < 0]:
        problems.append(f"sampling.stop_tokens {negative} are no ids")
    problems += [f"sampling.{problem}" for problem in _sampling(config).problems()]
    problems += PromptTemplate(**vars(config.template)).problems()
    if config.quantization is not None and config.quantization not in get_args(Scheme):
        known = ", ".join(get_args(Scheme))
        problems.append(f"quantization must be null or one of {known}, got {config.quantization!r}")
    parts = config.quantization_parts
    if not parts or not all(part.partition(".")[0] in ("decoder", "encoder") for part in parts):
        problems.append(f"quantization_parts must be decoder, encoder or encoder.<name>, got {parts}")
    try:
        device_and_dtype(config.device, config.dtype)
    except ValueError as error:
        problems.append(str(error).rstrip("."))
    problems += _output_problems(config)
    if problems:
        raise ConfigError(f"{'; '.join(problems)}.")


def _output_problems(config: Config) -> list[str]:
    if not config.output:
        return []
    path = Path(config.output)
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK) or path.is_dir():
        return [f"output={path} must be a file in a directory that can be written to"]
    if config.prompts and path.resolve() == Path(config.prompts).resolve():
        return [f"output={path} is the file of the prompts"]
    return []


def _read_prompts(path: Path) -> list[Prompt]:
    if path.suffix == ".jsonl":
        return [Prompt((question,)) for question in read_questions(path)]
    return prompts_from(read_yaml(path, "it is a list of prompts"), path)


def _sampling(config: Config) -> TokenSampling:
    chosen = vars(config.sampling)
    return TokenSampling(
        **{n: v for n, v in chosen.items() if n not in ("max_new_tokens", "stop_tokens")}
    )


def _prompt_settings(config: Config, source: ModelSource) -> PromptSettings:
    return PromptSettings(
        source.transform,
        template=PromptTemplate(**vars(config.template)),
        sampling=_sampling(config),
        max_new_tokens=config.sampling.max_new_tokens,
        stop_tokens=config.sampling.stop_tokens,
        seed=config.seed,
        compile=config.compile,
    )


def _load(config: Config, source: ModelSource) -> nn.Module:
    model = source.load(config.device, config.dtype).eval().requires_grad_(False)
    if config.quantization is not None:
        try:
            print(quantize(model, config.quantization, parts=config.quantization_parts))
        except FusionError as error:
            raise ConfigError(f"quantization={config.quantization}: {error}") from error
    return model


def _answer_in_batches(
    config: Config, model: nn.Module, settings: PromptSettings, prompts: list[Prompt], report: Report
) -> list[list[str]]:
    questions = [prompt.turns[0] for prompt in prompts]
    predictions = predict(model, settings, questions, batch_size=config.batch_size, report=report)
    if not config.output:
        for prediction in predictions:
            print(f"{_question_line(prediction.question)}\n    {prediction.text}")
    return [[prediction.text] for prediction in predictions]


def _answer_one_by_one(
    model: nn.Module,
    settings: PromptSettings,
    prompts: list[Prompt],
    max_tokens: int,
    max_images: int,
    report: Report,
) -> list[list[str]]:
    answers: list[list[str]] = []
    print()
    options = {"max_tokens": max_tokens, "max_images": max_images, "report": report}
    with Conversation(model, settings, **options) as conversation:
        for index, prompt in enumerate(prompts):
            conversation.reset(prompt.system, index=index)
            answers.append([])
            if prompt.system is not None:
                print(prompt.system)
            for question in prompt.turns:
                print(f"{_question_line(question)}\n    ", end="", flush=True)
                answers[-1].append(conversation.ask(question, stream=_print_piece))
                print()
    return answers


def _chat(config: Config, model: nn.Module, settings: PromptSettings, report: Report) -> None:
    features = config.max_images * settings.transform.features_per_image
    tokens = min(config.max_tokens, room_for_text(model, features))
    options = {"max_tokens": tokens, "max_images": config.max_images, "report": report}
    print(HELP)
    with Conversation(model, settings, **options) as conversation:
        chat(conversation, _input_lines(), _print_piece)


def _input_lines() -> Iterator[str]:
    """Iterate over the lines of the standard input, until it ends or is interrupted."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except (EOFError, KeyboardInterrupt):
            return


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)


def _question_line(question: Question) -> str:
    names = ", ".join(image.name for image in question.images)
    return f"{question.question}  [{names}]" if names else question.question


def _write_answers(path: Path, prompts: list[Prompt], answers: list[list[str]]) -> None:
    """Write a JSON object for each prompt; paths of images are relative to the file."""

    def record(question: Question, answer: str) -> dict[str, Any]:
        images = [os.path.relpath(image, path.parent) for image in question.images]
        return {"question": question.question, "images": images, "answer": answer}

    lines = []
    for prompt, texts in zip(prompts, answers, strict=True):
        turns = [record(question, answer) for question, answer in zip(prompt.turns, texts, strict=True)]
        whole = turns[0] if len(turns) == 1 and prompt.system is None else {"turns": turns}
        if prompt.system is not None:
            whole = {"system": prompt.system, **whole}
        lines.append(json.dumps(whole, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))
    print(f"wrote {len(lines)} answers to {path}")


if __name__ == "__main__":
    main()
