"""Chat templates: how a conversation is written, and what of it is learned."""

from torchfuse.data.templates.chat import TEMPLATES, ChatTemplate, Rendered

__all__ = ["TEMPLATES", "ChatTemplate", "Rendered"]
