"""A traced window of steps: what is in the file, and that nothing of the profiler is left after it."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from clipkit.training.profile import Profile


def spans(path) -> list[str]:
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    return sorted({event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")})


def work(steps) -> list[tuple[int, bool]]:
    found = []
    for step in steps:
        torch.ones(4, 4) @ torch.ones(4, 4)
        found.append((step, torch._C._autograd._profiler_enabled()))
    return found


def test_the_steps_of_the_window_are_traced_and_no_others(tmp_path, capsys):
    found = work(Profile(tmp_path / "profile", start=2, steps=3).over(range(10, 18)))
    assert found == [(step, 12 <= step < 15) for step in range(10, 18)]
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "rank_0.12.pt.trace.json.gz"
    # Steps are counted from 1 in a run's lines.
    assert spans(path) == ["ProfilerStep#13", "ProfilerStep#14", "ProfilerStep#15"]
    assert str(path.parent) in capsys.readouterr().out


def test_a_window_past_the_end_is_said(tmp_path):
    said: list[str] = []
    found = work(Profile(tmp_path / "profile", start=2, steps=3).over(range(4), say=said.append))
    assert [step for step, _ in found] == [0, 1, 2, 3] and "2 are traced" in said[0]
    assert spans(tmp_path / "profile" / "rank_0.2.pt.trace.json.gz") == ["ProfilerStep#3", "ProfilerStep#4"]
    said.clear()
    assert [
        step for step, _ in work(Profile(tmp_path / "none", start=9, steps=3).over(range(4), say=said.append))
    ]
    assert "0 are traced" in said[0] and not (tmp_path / "none").exists()


def test_without_steps_nothing_is_started(tmp_path):
    assert work(Profile(tmp_path / "profile").over(range(12))) == [(step, False) for step in range(12)]
    assert not list(tmp_path.iterdir())


def test_leaving_the_loop_within_the_window_ends_it(tmp_path):
    def leave():
        for _ in Profile(tmp_path / "profile", start=0, steps=5).over(range(9)):
            torch.ones(4, 4) @ torch.ones(4, 4)
            raise SystemExit(75)

    with pytest.raises(SystemExit):
        leave()
    assert not torch._C._autograd._profiler_enabled()
    assert spans(tmp_path / "profile" / "rank_0.0.pt.trace.json.gz") == ["ProfilerStep#1"]


def test_a_link_is_replaced_and_a_folder_that_takes_nothing_is_said(tmp_path):
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "rank_0.0.pt.trace.json.gz").symlink_to(tmp_path / "elsewhere")
    work(Profile(tmp_path / "profile", start=0, steps=1).over(range(1)))
    assert (tmp_path / "elsewhere").read_text() == "kept"
    assert spans(tmp_path / "profile" / "rank_0.0.pt.trace.json.gz") == ["ProfilerStep#1"]
    said: list[str] = []
    (tmp_path / "file").write_text("")
    work(Profile(tmp_path / "file", start=0, steps=1).over(range(1), say=said.append))
    assert "could not be written" in said[-1]
