"""Evaluation, in training and from the command line by one code path: see `evaluate`."""

# These register the kinds of task.
from clipkit.evals import image_tasks, sentences, transfer, validation_loss  # noqa: F401
from clipkit.evals.classification import classification_metrics, zero_shot_classifier, zero_shot_logits
from clipkit.evals.encoder import Encoder
from clipkit.evals.geometry import consistency_scores, geometry_metrics
from clipkit.evals.linear_probe import linear_probe_metrics
from clipkit.evals.models import load_any
from clipkit.evals.retrieval import retrieval_metrics
from clipkit.evals.tasks import check_metric, check_tasks, create_tasks, evaluate, list_tasks, register_task

__all__ = [
    "Encoder",
    "check_metric",
    "check_tasks",
    "classification_metrics",
    "consistency_scores",
    "create_tasks",
    "evaluate",
    "geometry_metrics",
    "linear_probe_metrics",
    "list_tasks",
    "load_any",
    "register_task",
    "retrieval_metrics",
    "zero_shot_classifier",
    "zero_shot_logits",
]
