"""`ls`: every group and choice with a line, those of plugins and of a user's folder too, and timm's names."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import yaml

from clipkit.command import plugins, programs
from clipkit.command.listing import line_of, ls
from tests.processes import ROOT

CONF = ROOT / "conf"


def parsed(text: str) -> dict[str, dict[str, str]]:
    """{group: {choice: line}} of what ls prints."""
    found: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        if not line.startswith(" "):
            found[line.partition("=")[0]] = here = {}
        else:
            name, _, rest = line.strip().partition("  ")
            here[name] = rest.strip()
    return found


@pytest.mark.parametrize("program", ["pretrain", "plan", "evaluate"])
def test_every_file_of_every_group_is_listed_with_a_line(program):
    found = parsed(ls(program, []))
    assert set(found) >= {"evaluate": {"eval"}}.get(
        program, {"data", "image_tower", "text_tower", "loss", "experiment"}
    )
    assert ("gpu" in found) == (program == "plan")
    for group, choices in found.items():
        assert set(choices) == {path.stem for path in (CONF / group).glob("*.yaml")}
        assert all(
            line and len(line) <= 100 and not line.startswith(("@package", "clipkit-"))
            for line in choices.values()
        )


def test_the_default_is_the_one_that_is_composed():
    chosen = {
        key: one
        for entry in yaml.safe_load((CONF / "pretrain.yaml").read_text())["defaults"]
        if isinstance(entry, dict)
        for key, one in entry.items()
    }
    for group, heading in (
        (line.partition("=")[0], line) for line in ls("pretrain", []).splitlines() if not line.startswith(" ")
    ):
        assert heading == f"{group}=  (default: {chosen[group]})"


def test_one_group_and_a_pattern_of_its_names():
    assert set(parsed(ls("pretrain", ["loss"]))) == {"loss"}
    assert list(parsed(ls("pretrain", ["loss", "cycl*"]))["loss"]) == ["cyclic", "cyclip"]
    assert list(parsed(ls("pretrain", ["loss", "ycli"]))["loss"]) == ["cyclic", "cyclip"]
    assert "no name matches *nothing*" in ls("pretrain", ["loss", "nothing"])


@pytest.mark.parametrize("pattern", ["convnextv2_*", "*vit_base*", "no_such_*"])
def test_patterns_of_image_towers_reach_timms_names(pattern):
    found = ls("pretrain", ["image_tower", pattern])
    names = timm.list_models(pattern)
    listed = [line.strip() for line in found.split("image_tower.model=")[1].splitlines()[1:]]
    assert f"({len(names)} of timm's match {pattern})" in found
    assert listed == (names or [f"no name matches {pattern}"])


def test_choices_of_plugins_and_of_a_folder_are_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(plugins, "_packages", [])
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    theirs, mine = tmp_path / "their_listed_package/conf/loss", tmp_path / "mine/experiment"
    theirs.mkdir(parents=True), mine.mkdir(parents=True)
    (tmp_path / "their_listed_package/__init__.py").touch()
    (theirs / "their_loss.yaml").write_text("# Theirs, of a paper. More of it.\ntheir_loss: {}\n")
    (mine / "my_run.yaml").write_text("# @package _global_\n# A run of mine.\nsteps: 3\n")
    text = ls("pretrain", ["plugins=[their_listed_package.losses]"], str(tmp_path / "mine"))
    found = parsed(text)
    assert found["loss"]["their_loss"] == "Theirs, of a paper"
    assert found["experiment"]["my_run"] == "A run of mine" and "quickstart" in found["experiment"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["los"], "unknown group 'los'. Did you mean 'loss'"),
        (["loss", "a", "b"], "not 'b': clipkit-pretrain ls"),
        (["loss=clip"], "not 'loss=clip': clipkit-pretrain ls"),
        (["plugins=[no_such_package_here]"], "there is no such package"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        ls("pretrain", arguments)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("# One (Radford et al. 2021, section 2). Two.\na: 1\n", "One (Radford et al. 2021, section 2)"),
        ("# Over two\n# lines, as one.\na: 1\n", "Over two lines, as one"),
        ("# @package _global_\n# clipkit-pretrain a=1\n#    and so on\n#\n# What it is.\n", "What it is"),
        ("a: 1  # beside a key\n", "beside a key"),
        ("a: 1\n", ""),
        ("", ""),
        ("# \x1b[31mred\x07\n", "\ufffd[31mred\ufffd"),
    ],
)
def test_the_line_is_the_first_sentence_of_the_first_comment(tmp_path, text, line):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert line_of(path) == line


def test_the_command_prints_it_and_imports_no_torch(tmp_path):
    code = "import sys; from clipkit.command import pretrain; pretrain(); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "ls", "optim"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    *listed, torch_there = done.stdout.splitlines()
    assert listed == ls("pretrain", ["optim"]).splitlines() and torch_there == "False"
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_group_is_an_error_of_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["clipkit-pretrain", "ls", "optm"])
    with pytest.raises(SystemExit) as stopped:
        programs.run("pretrain")
    assert stopped.value.code == 1 and "Did you mean 'optim'" in capsys.readouterr().err
