"""Evaluation, in training and from the command line by one code path: see `evaluate`."""

from clipkit.evals.classification import classification_metrics, zero_shot_classifier, zero_shot_logits
from clipkit.evals.encoder import Encoder
from clipkit.evals.retrieval import retrieval_metrics
from clipkit.evals.tasks import create_tasks, evaluate, list_tasks, register_task

__all__ = [
    "Encoder",
    "classification_metrics",
    "create_tasks",
    "evaluate",
    "list_tasks",
    "register_task",
    "retrieval_metrics",
    "zero_shot_classifier",
    "zero_shot_logits",
]
