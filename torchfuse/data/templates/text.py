"""A chat template from the texts around a system text and around a question."""

from __future__ import annotations

import re
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
    halves = {name.upper(): text.split(_TEXT) for name, text in texts.items()}
    source = re.sub(
        "|".join(halves),  # in one pass, because a text may hold these words
        lambda found: "{!r} + message.content + {!r}".format(*halves[found[0]]),
        _SOURCE,
    )
    return ChatTemplate(source, name="template", adds_bos=True)
