"""A long run of tiny steps: what it takes must not grow."""

from __future__ import annotations

import statistics
import time

import psutil
import pytest

from tests.processes import children
from tests.recipes.runs import SMALL, lines, only_run, start

STEPS = 20_000


@pytest.mark.slow
def test_twenty_thousand_steps_take_no_more_memory_files_or_time_than_the_first(tmp_path, shapes):
    process = start(
        *SMALL,
        shapes,
        f"output_dir={tmp_path}",
        f"steps={STEPS}",
        "batch_size=4",
        "embed_dim=16",
        "text_tower.width=16",
        "text_tower.layers=1",
        "log_every=100",
        "eval_every=1000",
        "save_every=500",
        "data.num_workers=1",
        "logger=tensorboard",
    )
    files, workers = [], []
    while process.status is None:
        try:
            files.append(psutil.Process(process.pid).num_fds())
            workers += [worker.num_fds() for worker in children(process.pid)]
        except psutil.Error:
            pass
        time.sleep(0.5)
    process.finished()
    found = [line for line in lines(only_run(tmp_path)) if "train/loss" in line]
    assert len(found) == STEPS // 100

    def of(name: str, part: slice) -> list[float]:
        return [line[name] for line in found[part]]

    # After the first tenth all there is has been made; then a tenth at the end beside it.
    first, last = slice(20, 40), slice(-20, None)
    for name in ("train/memory_gb", "train/workers_memory_gb"):
        assert statistics.median(of(name, last)) < 1.05 * statistics.median(of(name, first)), name
    assert max(files[-20:]) <= max(files[: len(files) // 4]) + 2
    assert not workers or max(workers[-20:]) <= max(workers[: len(workers) // 4]) + 2
    report = {
        name: (of(name, first)[0], of(name, last)[-1])
        for name in ("train/memory_gb", "train/workers_memory_gb")
    }
    seconds = [
        late["train/seconds"] - early["train/seconds"] for early, late in zip(found, found[1:], strict=False)
    ]
    print(report, max(files), statistics.median(seconds[20:40]), statistics.median(seconds[-20:]))
