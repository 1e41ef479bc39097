"""What the commands say of themselves."""

from __future__ import annotations

import sys

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

import clipkit
from clipkit.command import programs

PROGRAMS = ("pretrain", "evaluate", "export", "plan")


@pytest.fixture(autouse=True)
def hydra():
    yield
    GlobalHydra.instance().clear()


def said(capsys, monkeypatch, program: str, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", [f"clipkit-{program}", *arguments])
    try:
        programs.run(program)
    except SystemExit as stopped:
        assert stopped.code in (0, None)
    return capsys.readouterr().out


@pytest.mark.parametrize("program", PROGRAMS)
def test_version_and_help_are_clipkits(program, capsys, monkeypatch):
    assert said(capsys, monkeypatch, program, "--version") == f"clipkit {clipkit.__version__}\n"
    found = said(capsys, monkeypatch, program, "--help")
    assert found.startswith(f"clipkit-{program}: ") and "is powered by Hydra" not in found


def test_resolved_settings_hold_the_paths_of_generated_data(capsys, monkeypatch):
    found = yaml.safe_load(said(capsys, monkeypatch, "pretrain", "--cfg", "job", "--resolve", "seed=3"))
    assert found["seed"] == 3 and found["eval"]["retrieval"]["shards"] == found["data"]["val"]
    assert "hydra" not in found


def test_an_interrupt_while_modules_load_is_no_traceback(monkeypatch, capsys):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(programs, "check_config_dir", interrupted)
    monkeypatch.setattr(sys, "argv", ["clipkit-pretrain"])
    with pytest.raises(SystemExit) as stopped:
        programs.run("pretrain")
    assert stopped.value.code == 130 and "Interrupted" in capsys.readouterr().err
