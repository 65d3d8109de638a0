"""A chat template from the texts around a system text and around a question."""

from __future__ import annotations

from typing import Final

from torchfuse.data.templates.chat import ChatTemplate
from torchfuse.errors import ConfigError

__all__ = ["text_template"]

_TEXT: Final = "{text}"
_IMAGE: Final = "<image>"
_SOURCE: Final = """
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- SYSTEM }}
    {%- elif message.role == 'user' %}
        {{- QUESTION }}
    {%- else %}
        {{- boundary }}
        {%- generation %}{{ message.content }}{{ end_of_text }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- boundary }}
{%- endif %}
"""


def text_template(system: str = "{text}\n", question: str = "{text}") -> ChatTemplate:
    r"""Make a chat template of two texts, in which a message replaces ``{text}``.

    Special tokens can be written out, if they are in the tokenizer. The default is ``"plain"``.

    Args:
        system: around the system text.
        question: around a question, up to where the answer begins.

    Raises:
        ConfigError: if a text does not have ``{text}`` once, or has ``<image>``.

    Examples:
        >>> llava = text_template(system="{text} ", question="USER: {text} ASSISTANT:")
    """
    texts = {"system": system, "question": question}
    problems = [
        f"template.{name} must hold {_TEXT} once and no {_IMAGE}, got {text!r}"
        for name, text in texts.items()
        if text.count(_TEXT) != 1 or _IMAGE in text
    ]
    if problems:
        raise ConfigError(f"{'; '.join(problems)}.")
    source = _SOURCE
    for name, text in texts.items():
        before, after = text.split(_TEXT)
        source = source.replace(name.upper(), f"{before!r} + message.content + {after!r}")
    return ChatTemplate(source, name="template", adds_bos=True)
