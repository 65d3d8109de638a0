"""Tasks on a fused model: prompts, conversations, predictions for files of questions, evaluation."""

from torchfuse.tasks.conversation import Conversation
from torchfuse.tasks.evaluation import accuracy, accuracy_by_kind, evaluate
from torchfuse.tasks.prediction import Prediction, predict
from torchfuse.tasks.prompt_settings import PromptSettings
from torchfuse.tasks.prompts import Prompt, Template, prompts_from
from torchfuse.tasks.report import Report
from torchfuse.tasks.runs import load_run

__all__ = [
    "Conversation",
    "Prediction",
    "Prompt",
    "PromptSettings",
    "Report",
    "Template",
    "accuracy",
    "accuracy_by_kind",
    "evaluate",
    "load_run",
    "predict",
    "prompts_from",
]
