"""Answer questions about images: single questions, conversations, files of samples, or a chat.

Prompts come from a YAML file: a list of questions, with ``<image>`` at the position of each image and
``images``, paths relative to that file; or of conversations, whose turns are such questions:

    - question: "<image> which digit ?"
      images: [images/0012.png]
    - system: You are brief.
      turns:
        - question: "<image> which digit ?"
          images: [images/0012.png]
        - question: even or odd ?

They are answered one by one, and printed token by token. Prompts of any other file are samples, in a
format that ``torchfuse.data.read_samples`` reads: the messages before the last answer are the prompt.
They are answered in batches. With ``output`` the answers are written to a file, a JSON object a line:

    tune run torchfuse/recipes/generate.py --config recipes/configs/digits/generate.yaml \
        prompts=demo/questions/test.jsonl output=demo/answers.jsonl batch_size=64

``--chat`` starts a conversation in the terminal. The model is that of a finetuning run (``run``; start
in the directory in which it was started if its configuration has relative paths), or any directory of a
whole model (``model``). Its chat template, and all else of the transform, are those of the run, or of
the directory; ``template`` names another one.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchfuse.recipes.generate_config import Config, check_config, sampling_of, template_of

from torchfuse import quantize
from torchfuse.data.samples import Message, Sample
from torchfuse.data.transform import SampleTransform
from torchfuse.errors import ConfigError, FusionError
from torchfuse.generation.caches import room_for_text
from torchfuse.io.atomic import write_text
from torchfuse.tasks.chat import HELP, chat
from torchfuse.tasks.conversation import Conversation
from torchfuse.tasks.prediction import predict
from torchfuse.tasks.prompt_lengths import num_items, turn_lengths
from torchfuse.tasks.prompt_settings import PromptSettings, required_slots
from torchfuse.tasks.prompts import Prompt, load_samples, message_text, prompt_record, prompts_from
from torchfuse.tasks.report import Report
from torchfuse.tasks.runs import read_model, read_run
from torchfuse.training.config import read_yaml, recipe


@recipe(Config, flags={"chat": "chat in the terminal; the key prompts is ignored"})
def main(config: Config) -> None:
    """Answer questions about images: single questions, conversations, files of samples, or a chat."""
    check_config(config)
    prompts = [] if config.chat else _read_prompts(config)
    load = read_run(config.run) if config.run else read_model(config.model or "", config.transform)
    model, transform = load(config.device, config.dtype)
    _quantize(model.eval().requires_grad_(False), config)
    settings = _prompt_settings(config, transform)
    settings.check(model)
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    report = Report()
    if config.chat:
        _chat(config, model, settings, report)
    else:
        answer = _answer_one_by_one if _is_yaml(config) else _answer_in_batches
        records = answer(config, model, settings, prompts, report)
        if config.output:
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            write_text(Path(config.output), "".join(lines))
            print(f"wrote {len(lines)} answers to {config.output}")
    print("\n" + "\n".join(report.lines(device)))


def _is_yaml(config: Config) -> bool:
    return Path(config.prompts or "").suffix in (".yaml", ".yml")


def _read_prompts(config: Config) -> list[Any]:
    """Return the prompts of a YAML file, or the samples of any other."""
    path = Path(config.prompts or "")
    if _is_yaml(config):
        return prompts_from(read_yaml(path, "it is a list of prompts"), path)
    return load_samples(path, format=config.format, image_root=config.image_root)


def _prompt_settings(config: Config, transform: SampleTransform) -> PromptSettings:
    template = template_of(config)
    return PromptSettings(
        transform if template is None else transform.with_template(template),
        sampling=sampling_of(config),
        max_new_tokens=config.sampling.max_new_tokens,
        stop_tokens=config.sampling.stop_tokens,
        seed=config.seed,
        compile=config.compile,
    )


def _quantize(model: nn.Module, config: Config) -> None:
    if config.quantization is not None:
        try:
            print(quantize(model, config.quantization, parts=config.quantization_parts))
        except FusionError as error:
            raise ConfigError(f"quantization={config.quantization}: {error}") from error


def _answer_in_batches(
    config: Config, model: nn.Module, settings: PromptSettings, samples: list[Sample], report: Report
) -> list[dict[str, Any]]:
    """Answer the prompts of samples; return what the output holds of each."""
    predictions = predict(model, settings, samples, batch_size=config.batch_size, report=report)
    if not config.output:
        for prediction in predictions:
            print(f"{_question_line(prediction.sample.prompt[-1])}\n    {prediction.text}")
    folder = Path(config.output or "").parent
    return [{**prompt_record(p.sample.prompt, folder), "answer": p.text} for p in predictions]


def _answer_one_by_one(
    config: Config, model: nn.Module, settings: PromptSettings, prompts: list[Prompt], report: Report
) -> list[dict[str, Any]]:
    """Answer conversations; return what the output holds of each."""
    transform, path = settings.transform, Path(config.prompts or "")
    lengths = turn_lengths(transform, prompts, path=path)
    images = max(num_items(transform, prompt.turns) for prompt in prompts)
    features = transform.formats.max_features(images)
    tokens = required_slots(model, settings, lengths, features, path=path)
    folder, records = Path(config.output or "").parent, []
    print()
    options = {"max_tokens": tokens, "max_images": images, "report": report}
    with Conversation(model, settings, **options) as conversation:
        for index, prompt in enumerate(prompts):
            conversation.reset(prompt.system, index=index)
            system = {} if prompt.system is None else {"system": prompt.system}
            turns = []
            if system:
                print(prompt.system)
            for turn in prompt.turns:
                print(f"{_question_line(turn)}\n    ", end="", flush=True)
                answer = conversation.ask(turn, stream=_print_piece)
                turns.append({**prompt_record([turn], folder), "answer": answer})
                print()
            records.append({**system, "turns": turns} if len(turns) > 1 or system else turns[0])
    return records


def _chat(config: Config, model: nn.Module, settings: PromptSettings, report: Report) -> None:
    transform = settings.transform
    tiles = 1 if transform.image_transform is None else transform.image_transform.max_items
    images = config.max_images * tiles
    tokens = min(config.max_tokens, room_for_text(model, transform.formats.max_features(images)))
    print(HELP)
    options = {"max_tokens": tokens, "max_images": images, "report": report}
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


def _question_line(question: Message) -> str:
    names = ", ".join(Path(str(media)).name for media in question.media)
    return f"{message_text(question)}  [{names}]" if names else message_text(question)


if __name__ == "__main__":
    main()
