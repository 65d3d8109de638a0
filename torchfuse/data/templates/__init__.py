"""Chat templates: how a conversation is written, and what of it is learned."""

from torchfuse.data.templates.chat import TEMPLATES, ChatTemplate, Rendered, last_answer
from torchfuse.data.templates.text import text_template

__all__ = ["TEMPLATES", "ChatTemplate", "Rendered", "last_answer", "text_template"]
