"""Chat templates: how a conversation is written, and what of it is learned."""

from torchfuse.data.templates.chat import TEMPLATES, ChatTemplate, Rendered, last_answer

__all__ = ["TEMPLATES", "ChatTemplate", "Rendered", "last_answer"]
