"""Small tokenizers as transformers saves them, chat templates, and conversations of every kind."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from torchfuse.data.samples import Media, Message

TEXT = [
    "USER: Which animal is this? ASSISTANT: It is a small cat, isn't it?\n\nYou are a helpful assistant.",
    "Describe the image in one word: seven ... eight 12 345\n\n\n  two  spaces\tand a tab",
    "system user assistant <|im_start|> <|eot_id|> </s> image naïve café 日本語 🙂🎉👩‍👩‍👧",
]
SPECIAL = [
    "<pad>", "<bos>", "<eos>", "<image>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|im_start|>", "<|im_end|>", "</s>",
]  # fmt: skip
IMAGE = SPECIAL.index("<image>")

# Written as in directories of models; the blocks of generation are what transformers needs.
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT:' }}{% generation %}{{ ' ' + message['content'] }}"
    "{{ '</s>' }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAVA = (  # of image models: contents are lists of parts
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for content in message['content'] %}{% if content['type'] == 'text' %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ content['text'] + '</s>' }}{% endgeneration %}"
    "{% else %}{{ content['text'] + ' ' }}{% endif %}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEMPLATES = {"llama3": LLAMA3, "chatml": CHATML, "vicuna": VICUNA}
UNTAGGED = {
    name: text.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    .replace("        {%- generation %}\n", "").replace("        {%- endgeneration %}\n", "")
    for name, text in TEMPLATES.items()
}  # fmt: skip


def byte_level() -> Tokenizer:
    """Merges of bytes, as in Llama 3, Qwen and SmolLM2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def metaspace(scheme: str = "first") -> Tokenizer:
    """Words with a prefix, the first of a text too, as in transformers' own Llama tokenizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=520, special_tokens=tokens))
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][: len(SPECIAL) + 1]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    return tokenizer


def unigram() -> Tokenizer:
    """SentencePiece's other model, whose vocabulary has the special tokens as pieces too."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(" {2,}", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=230, special_tokens=[*SPECIAL, "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 5, trainer)
    return tokenizer


TOKENIZERS = {"byte_level": byte_level, "metaspace": metaspace, "unigram": unigram}


def save(folder: Path, tokenizer: Tokenizer, template: str | None = None, **options: Any) -> Any:
    """Save a tokenizer as transformers does, with the model's configuration; return transformers' own."""
    named = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos")}
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named, **options)
    own.chat_template = template
    own.save_pretrained(folder)
    ids = {f"{name}_token_id": SPECIAL.index(f"<{name}>") for name in ("pad", "bos", "eos")}
    (folder / "config.json").write_text(json.dumps(ids))
    return AutoTokenizer.from_pretrained(folder)


def save_image(path: Path, size: int = 8, seed: int = 0) -> Path:
    """Save an image that differs in every pixel."""
    pixels = np.random.default_rng(seed).integers(256, size=(size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def conversations(number: int, seed: int = 0) -> Iterator[list[Message]]:
    """Conversations with or without a system text, answers that may be empty, and images anywhere."""
    words = " ".join(TEXT).replace("<|im_start|> <|eot_id|> </s> ", "").split(" ")
    source = random.Random(seed)

    def text(least: int) -> str:
        chosen = [source.choice(words) for _ in range(source.randint(least, 7))]
        return (
            source.choice(["", "", " ", "\n"]) + " ".join(chosen) + source.choice(["", "", " ", "\n\n"])
        )

    for _ in range(number):
        messages = [Message("system", [text(1)])] * source.randint(0, 1)
        for _ in range(source.randint(1, 3)):
            content: list[Any] = [text(1)]
            for _ in range(source.choice([0, 0, 1, 2])):
                content.insert(source.randint(0, len(content)), Media(Path("a.png")))
            messages += [Message("user", content), Message("assistant", [text(0)])]
        yield messages


def as_strings(messages: list[Message], image: str = "<image>") -> list[dict[str, str]]:
    """Messages as transformers takes them, with images in the text."""
    return [
        {
            "role": message.role,
            "content": "".join(part if isinstance(part, str) else image for part in message.content),
        }
        for message in messages
    ]
