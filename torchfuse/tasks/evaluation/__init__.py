"""Evaluation of trained models: metrics by group, losses on reference answers, costs, pictures."""

from torchfuse.tasks.evaluation.accuracies import (
    accuracy,
    accuracy_by_kind,
    accuracy_table,
    evaluate,
)
from torchfuse.tasks.evaluation.answer_loss import AnswerLoss, answer_losses
from torchfuse.tasks.evaluation.costs import format_costs, training_costs
from torchfuse.tasks.evaluation.groups import group_problems, sample_group, sample_kind
from torchfuse.tasks.evaluation.picture import check_matplotlib, draw_predictions
from torchfuse.tasks.evaluation.records import prediction_record
from torchfuse.tasks.evaluation.scores import (
    LOSS,
    Score,
    Scores,
    group_scores,
    metric_problems,
    score_predictions,
    score_table,
)
from torchfuse.tasks.evaluation.swap import swap_images

__all__ = [
    "LOSS",
    "AnswerLoss",
    "Score",
    "Scores",
    "accuracy",
    "accuracy_by_kind",
    "accuracy_table",
    "answer_losses",
    "check_matplotlib",
    "draw_predictions",
    "evaluate",
    "format_costs",
    "group_problems",
    "group_scores",
    "metric_problems",
    "prediction_record",
    "sample_group",
    "sample_kind",
    "score_predictions",
    "score_table",
    "swap_images",
    "training_costs",
]
