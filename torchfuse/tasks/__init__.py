"""Tasks on a fused model: prompts, conversations, predictions for files of samples, evaluation."""

from torchfuse.tasks.conversation import Conversation
from torchfuse.tasks.evaluation import accuracy, accuracy_by_kind, evaluate
from torchfuse.tasks.prediction import Prediction, predict
from torchfuse.tasks.prompt_settings import PromptSettings
from torchfuse.tasks.prompts import Prompt, load_samples, prompts_from, user_message
from torchfuse.tasks.report import Report
from torchfuse.tasks.runs import load_run
from torchfuse.tasks.transforms import make_transform

__all__ = [
    "Conversation",
    "Prediction",
    "Prompt",
    "PromptSettings",
    "Report",
    "accuracy",
    "accuracy_by_kind",
    "evaluate",
    "load_run",
    "load_samples",
    "make_transform",
    "predict",
    "prompts_from",
    "user_message",
]
