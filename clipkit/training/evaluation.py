"""Scoring the model of a training run: which tasks at which step, on whole weights or their average."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from clipkit.data import Tokenizer
from clipkit.evals import check_metric, create_tasks, evaluate
from clipkit.evals.checks import TaskRecord, about_numbers
from clipkit.model import DualEncoder, create_model
from clipkit.optim import WeightAverage
from clipkit.registry import unknown
from clipkit.sharding import is_sharded, take_unsplit_of_rank_0, whole
from clipkit.towers.image import NO_IMAGES
from clipkit.training.process import lost_a_rank
from clipkit.training.record import Record, due
from clipkit.training.run_folder import flatten
from clipkit.training.saving import Checkpoints


class Evaluation:
    """The evaluation tasks of a run.

    Args:
        model: scored with `average`'s weights where there is one.
        model_config: what makes another model of this kind (clipkit.loading.model_config, pretrained=False);
            split weights are put together in one.
        tasks: {name: settings}, as clipkit.evals.evaluate takes them.
        at_end: names of tasks that are scored after the last step alone.
        every: steps between two evaluations, or {task: steps}; 0, or a task that is not named: only after the last.
        total_steps: the run's last step.
        best_metric: "task/metric" that names the best checkpoint, or None.
        batch_size: images or captions encoded at once.
        objective: "task/metric" that a search makes largest, checked here alone.
        record: where the numbers and warnings go.
        checkpoints: whose manifests keep the numbers; a step's is written before it is scored.

    Raises:
        ValueError: unknown tasks or settings, in `at_end` and `best_metric` too.
    """

    def __init__(
        self,
        model: DualEncoder,
        tokenizer: Tokenizer,
        tasks: Mapping[str, Mapping[str, Any] | None],
        *,
        model_config: Mapping[str, Any],
        device: torch.device,
        batch_size: int,
        total_steps: int,
        average: WeightAverage | None = None,
        at_end: Sequence[str] = (),
        every: int | Mapping[str, int] = 0,
        best_metric: str | None = None,
        objective: str | None = None,
        record: Record,
        checkpoints: Checkpoints,
    ):
        built = create_tasks(tasks)
        for name in at_end:
            if name not in tasks:
                raise unknown("task of final_eval", name, tasks)
        for name, task in built.items():
            if not model.image_tower.encodes and (hasattr(task, "source") or hasattr(task, "data")):
                raise ValueError(
                    f"eval.{name} scores pictures, and {NO_IMAGES}: choose tasks of texts, such as eval=sts"
                )
        check_every(every, tasks)
        for what, name in (("best_metric", best_metric), ("objective", objective)):
            if name:
                check_metric(name, built, what)
        self.model, self.tokenizer, self.average, self.model_config = model, tokenizer, average, model_config
        self.device, self.batch_size = device, batch_size
        self.tasks, self.at_end, self.every, self.total_steps = tasks, at_end, every, total_steps
        self.best_metric, self.record, self.checkpoints = best_metric, record, checkpoints

    def due(self, step: int) -> dict[str, Mapping[str, Any] | None]:
        """The tasks that are scored after this step, none for most."""
        if step == self.total_steps:
            return dict(self.tasks)
        every = self.every if isinstance(self.every, Mapping) else dict.fromkeys(self.tasks, self.every)
        return {
            name: task
            for name, task in self.tasks.items()
            if name not in self.at_end and due(step, every.get(name, 0))
        }

    def resume(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Training is about to go on after `step` with these scores of it, which are made now where they are missing."""
        missing = step > 0 and not metrics and bool(self.due(step))
        self.record.start(step, scored=not missing)
        return self.after(step) if missing else metrics

    def after(self, step: int, batch: Mapping[str, Any] | None = None) -> dict[str, float]:
        """Score the tasks due after this step, and put {"task/metric": value} on record; {} where none is due.

        Called by all ranks, once the step's checkpoint is written.

        Args:
            batch: the step's, for loggers that show pictures of it.

        Raises:
            RuntimeError: that after the last step failed.
        """
        metrics = self._scores(step)
        self.record.evaluation(step, metrics)
        if metrics and batch:
            self.record.samples(step, batch, self.tokenizer)
        self.checkpoints.score(step, metrics)
        return metrics

    def _scores(self, step: int) -> dict[str, float]:
        """The numbers of the tasks due.

        An evaluation that fails before the last step is said, and gives no numbers.

        Raises:
            RuntimeError: that after the last step failed.
        """
        tasks = self.due(step)
        if not tasks:
            return {}
        records: dict[str, TaskRecord] = {}
        try:
            with self._scored() as model:
                results = evaluate(
                    model,
                    self.tokenizer,
                    tasks,
                    device=self.device,
                    batch_size=self.batch_size,
                    group="auto",
                    records=records,
                )
        except (ValueError, OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and lost_a_rank(error):
                raise
            if step == self.total_steps:
                raise RuntimeError(
                    f"the evaluation after the last step failed: {error}. The run is trained and saved: mend what is "
                    "wrong, and the same command scores it"
                ) from error
            self.record.say(f"warning: the evaluation after step {step} failed: {error}. Training goes on")
            return {}
        metrics = flatten(results)
        if step == self.total_steps:
            self.record.last_evaluation(step, about_numbers(results, records))
        if (
            self.best_metric
            and self.best_metric.partition("/")[0] in tasks
            and self.best_metric not in metrics
        ):
            self.record.say(
                f"warning: no best checkpoint: {unknown('best_metric', self.best_metric, metrics)}"
            )
        return metrics

    @contextlib.contextmanager
    def _scored(self) -> Iterator[DualEncoder]:
        """The model to score: with the averaged weights where they are kept, and whole on every rank.

        Ranks encode different numbers of batches, which FSDP2's gathering would wait for in vain: split
        weights are put into a model of their own meanwhile.
        """
        model, average = self.model, self.average
        if is_sharded(model.state_dict()):
            weights = average.weights if average else model.state_dict()
            take_unsplit_of_rank_0(weights)
            with torch.random.fork_rng():
                model = create_model(self.model_config, tokenizer=self.tokenizer)
            model.load_state_dict(whole(weights))
            yield model.to(self.device)
        elif average:
            with average.applied(model):
                yield model
        else:
            yield model


def check_every(every: int | Mapping[str, int], tasks: Mapping[str, Any]) -> None:
    """ValueError unless `every` is a number of steps from 0, or {task: number} of tasks that are there."""
    if not isinstance(every, Mapping):
        return
    for name, steps in every.items():
        if name not in tasks:
            raise unknown("task of eval_every", name, tasks)
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            raise ValueError(f"eval_every gives {name} {steps!r} steps: expected a whole number, 0 or more")
