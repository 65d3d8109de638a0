"""Tasks on a fused model: prompts, conversations, predictions for files of samples, evaluation."""

from torchfuse.tasks.conversation import Conversation
from torchfuse.tasks.evaluation import (
    AnswerLoss,
    Score,
    accuracy,
    accuracy_by_kind,
    answer_losses,
    draw_predictions,
    evaluate,
    group_scores,
    sample_group,
    score_predictions,
    score_table,
)
from torchfuse.tasks.metrics import anls, contained, exact_match, references, vqa_accuracy
from torchfuse.tasks.prediction import Prediction, predict
from torchfuse.tasks.prompt_settings import PromptSettings
from torchfuse.tasks.prompts import Prompt, load_samples, prompts_from, user_message
from torchfuse.tasks.report import Report
from torchfuse.tasks.runs import load_run
from torchfuse.tasks.transforms import make_transform

__all__ = [
    "AnswerLoss",
    "Conversation",
    "Prediction",
    "Prompt",
    "PromptSettings",
    "Report",
    "Score",
    "accuracy",
    "accuracy_by_kind",
    "anls",
    "answer_losses",
    "contained",
    "draw_predictions",
    "evaluate",
    "exact_match",
    "group_scores",
    "load_run",
    "load_samples",
    "make_transform",
    "predict",
    "prompts_from",
    "references",
    "sample_group",
    "score_predictions",
    "score_table",
    "user_message",
    "vqa_accuracy",
]
