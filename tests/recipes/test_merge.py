"""Scores along the line between two runs, as a user asks for them."""

from __future__ import annotations

import json

import pytest

from tests.recipes.runs import SMALL, only_run, run


@pytest.mark.slow
def test_the_ends_of_the_line_score_as_the_runs_themselves(shapes, tmp_path):
    settings = [*SMALL, shapes, "steps=3", "logger=none"]
    runs = []
    for seed in (1, 2):
        run(*settings, f"seed={seed}", f"output_dir={tmp_path}/{seed}")
        runs.append(only_run(tmp_path / str(seed)))
    output = run(
        f"merge=[{runs[0]},{runs[1]}]",
        "alpha=[0,0.5,1]",
        "trust_paths=true",
        f"output={tmp_path}/line.json",
        recipe="export.py",
    )
    assert "alpha 0.5" in output and "running statistics are averaged" in output
    found = json.loads((tmp_path / "line.json").read_text())["metrics_by_alpha"]
    assert [*found] == ["0", "0.5", "1"]
    for alpha, folder in (("0", runs[0]), ("1", runs[1])):
        expected = json.loads((folder / "summary.json").read_text())["metrics"]
        for name, value in found[alpha].items():
            assert value == pytest.approx(expected[name], abs=1e-6), name
    assert found["0.5"] != found["0"]
