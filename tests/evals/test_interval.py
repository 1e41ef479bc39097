"""Intervals and chance levels: each statistic against others' code on the items written out, guessing by counting."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from clipkit.evals import classification_metrics, evaluate, retrieval_metrics
from clipkit.evals.checks import TaskRecord
from clipkit.evals.interval import (
    DRAWS,
    Scored,
    correlation_of,
    intervals,
    mean_of,
    mean_of_groups,
    median_of,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))
from eval_cases import TinyModel, ties, tokenize
from test_labels import sets  # noqa: F401


def drawn(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, n, n)


def weighted(scored: Scored, items: np.ndarray) -> float:
    weights = torch.bincount(torch.from_numpy(items), minlength=scored.n).double()
    assert scored.statistic is not None
    return float(scored.statistic(weights[None])[0])


@pytest.mark.parametrize("seed", range(4))
def test_a_draw_s_metric_is_that_of_its_items_written_out(seed):
    """NumPy's mean and median, scipy's Spearman, and a loop over classes, on repeated rows with ties."""
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(seed)
    n = 40 + seed
    values, groups = random.integers(0, 6, n) / 4, random.integers(0, 5, n) * 2
    other = random.integers(0, 4, n) + values
    x, y, g = (torch.from_numpy(one) for one in (values, other, groups))
    for items in (drawn(n, seed), drawn(n, seed + 100), np.arange(n)):
        assert weighted(mean_of(x), items) == pytest.approx(values[items].mean(), abs=1e-12)
        assert weighted(median_of(x), items) == pytest.approx(float(np.median(values[items])), abs=1e-12)
        by_class = [values[items][groups[items] == one].mean() for one in np.unique(groups[items])]
        assert weighted(mean_of_groups(x, g), items) == pytest.approx(np.mean(by_class), abs=1e-12)
        expected = 100 * stats.spearmanr(values[items], other[items]).statistic
        assert weighted(correlation_of(x, y), items) == pytest.approx(expected, abs=1e-9)


def test_an_interval_is_about_the_known_one_and_the_same_each_time():
    """Of a mean of n draws: 1.96 standard errors to both sides; pictures with five captions count as one."""
    random = np.random.default_rng(0)
    hits = torch.from_numpy((random.random(2000) < 0.3).astype(float))
    found = intervals({"a": mean_of(hits), "none": Scored(3)})
    assert found == intervals({"a": mean_of(hits), "none": Scored(3)}) and found["none"] is None
    low, high = found["a"]
    error = 1.96 * float(hits.std()) / math.sqrt(len(hits))
    middle = float(hits.mean())
    assert low == pytest.approx(middle - error, abs=0.15 * error)
    assert high == pytest.approx(middle + error, abs=0.15 * error)
    captions = hits.repeat_interleave(5)
    units = torch.arange(2000).repeat_interleave(5)
    assert intervals({"a": mean_of(captions, units=units)})["a"] == pytest.approx(found["a"], abs=1e-12)
    alone = intervals({"a": mean_of(captions)})["a"]
    assert high - low > 2 * (alone[1] - alone[0]), "as if five times as much were known"


def test_draws_in_blocks_are_the_same_draws(monkeypatch):
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    whole = intervals({"a": mean_of(values), "b": median_of(values)})
    monkeypatch.setattr("clipkit.evals.interval._BLOCK", 50 * 7)
    assert intervals({"a": mean_of(values), "b": median_of(values)}) == whole and DRAWS % 7


def test_chance_is_what_guessing_has():
    """Retrieval by every order of 6 captions of 3 pictures, of which one has three; classes by hand."""
    index = torch.tensor([0, 1, 1, 2, 2, 2])
    scored: dict[str, Scored] = {}
    torch.manual_seed(0)
    retrieval_metrics(torch.randn(3, 4), torch.randn(6, 4), index, k=(1, 2), scored=scored)
    orders = list(itertools.permutations(range(6)))
    first = {i: [1 + min(o.index(c) for c in range(6) if index[c] == i) for o in orders] for i in range(3)}
    for k in (1, 2):
        expected = np.mean([np.mean([rank <= k for rank in first[i]]) for i in range(3)])
        assert scored[f"image_to_text_R@{k}"].chance == pytest.approx(expected)
        assert scored[f"text_to_image_R@{k}"].chance == pytest.approx(k / 3)
    ranks = [rank for i in range(3) for rank in first[i]]
    assert scored["image_to_text_mean_rank"].chance == pytest.approx(np.mean(ranks))
    assert scored["image_to_text_median_rank"].chance == pytest.approx(np.median(ranks))
    assert scored["text_to_image_mean_rank"].chance == scored["text_to_image_median_rank"].chance == 2
    scored = {}
    classification_metrics(torch.randn(9, 4), torch.randn(7, 4), torch.arange(9) % 3, scored=scored)
    assert [scored[name].chance for name in ("top1", "top5", "mean_per_class")] == pytest.approx(
        [1 / 7, 5 / 7, 1 / 7]
    )


def test_every_draw_of_all_items_is_the_metric_itself():
    images, texts, index = ties(3)
    scored: dict[str, Scored] = {}
    metrics = retrieval_metrics(images, texts, index, scored=scored)
    assert set(scored) == set(metrics)
    for name, value in metrics.items():
        assert weighted(scored[name], np.arange(scored[name].n)) == pytest.approx(value, abs=1e-12)


def test_every_task_says_its_items_its_interval_and_chance(sets):  # noqa: F811
    shards = {**sets["shards"], "label_key": "fine"}
    classes = {"classes": ["cat", "polar bear", "dog", "owl"]}
    prompts = {**classes, "templates": ["a {}"]}
    tasks = {
        "retrieval": {"kind": "retrieval", **sets["clip_benchmark"]},
        "zero_shot": {"kind": "zero_shot", **shards, **prompts},
        "probe": {"kind": "linear_probe", "train": shards, "test": shards, **classes},
        "consistency": {"kind": "consistency", "train": shards, "test": shards, **prompts},
    }
    records: dict[str, TaskRecord] = {}
    results = evaluate(TinyModel(), tokenize, tasks, records=records)
    for name, metrics in results.items():
        for metric, one in records[name].numbers(metrics).items():
            if metric == "C":
                continue
            assert one["value"] == metrics[metric] and one["n"] in (24, 48) and one["chance"] is not None, (
                metric
            )
            low, high = one["interval"]
            assert low <= one["value"] <= high, (name, metric)
