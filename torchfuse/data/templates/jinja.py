"""Jinja templates of chats, rendered as transformers renders them.

The sandbox, the options and the functions are those of ``apply_chat_template``. The block
``{% generation %}`` leaves markers around its text, from which its position in the result is known
wherever a template puts it.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["compile_template", "find_blocks"]

_NONCE: Final = secrets.token_hex(8)  # no text spells it
_BEGIN, _END = f"\ufdd4{_NONCE}", f"\ufdd5{_NONCE}"
_BLOCK: Final = re.compile(f"{_BEGIN}|{_END}")


class _Generation(jinja2.ext.Extension):
    """The block ``{% generation %}...{% endgeneration %}``: text that the model generates."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_BEGIN}{caller()}{_END}"


def compile_template(source: str) -> jinja2.Template:
    """Compile the source of a template.

    Raises:
        jinja2.TemplateSyntaxError: if it is not Jinja.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    return environment.from_string(source)


def find_blocks(rendered: str) -> tuple[str, list[tuple[int, int]]]:
    """Return a rendered text without markers, and start and end of its ``{% generation %}`` blocks."""
    markers = enumerate(_BLOCK.finditer(rendered))
    edges = [marker.start() - index * len(_BEGIN) for index, marker in markers]
    return _BLOCK.sub("", rendered), list(zip(edges[::2], edges[1::2], strict=True))


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: Any, **options: Any) -> str:
    """Return JSON as it is, where Jinja's own filter escapes characters of HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **options})
