"""Which code a session was started from, asked of git in repositories made here, one of them hostile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import clipkit
from clipkit.training import sessions
from clipkit.training.sessions import begin_session, code_state

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
NAMED = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "init.defaultBranch=main")


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *NAMED, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """One commit of train.py, the working directory; clipkit itself lies in no repository."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    package = tmp_path / "site" / "clipkit"
    package.mkdir(parents=True)
    monkeypatch.setattr(clipkit, "__file__", str(package / "__init__.py"))
    folder = tmp_path / "mine"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "train.py").write_text("lr = 1\n")
    git(folder, "add", "train.py")
    git(folder, "commit", "-qm", "first")
    monkeypatch.chdir(folder)
    return folder


def recorded(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "sessions.jsonl").read_text().splitlines()]


def test_each_session_has_the_commit_and_the_diff_that_restores_its_code(tmp_path, repository):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    commit = git(repository, "rev-parse", "HEAD").strip()
    (repository / "notes.txt").write_text("not tracked")
    begin_session(run_dir, 0, say=print)
    (repository / "train.py").write_text("lr = 2\n")
    git(repository, "add", "train.py")
    (repository / "train.py").write_text("lr = 3\n")
    begin_session(run_dir, 4, say=print)
    begin_session(run_dir, 8, say=print)
    git(repository, "commit", "-qam", "second")
    (repository / "train.py").write_text("lr = 4\n")
    begin_session(run_dir, 8, say=print)
    code = [session["code"]["working_directory"] for session in recorded(run_dir)]
    assert code[0] == {"commit": commit, "branch": "main", "dirty": False}
    assert code[1] == {"commit": commit, "branch": "main", "dirty": True, "diff": "git_step_00000004.diff"}
    # The same changes are kept once; the last session's are others, on another commit.
    assert code[2] == code[1] and code[3]["diff"] == "git_step_00000008.diff" and code[3]["commit"] != commit
    assert [session["step"] for session in recorded(run_dir)] == [0, 4, 8, 8]
    assert [session["versions"]["clipkit"] for session in recorded(run_dir)] == ["0.1.0"] * 4
    for one, content in ((code[1], "lr = 3\n"), (code[3], "lr = 4\n")):
        copy = tmp_path / one["commit"]
        git(tmp_path, "clone", "-q", str(repository), str(copy))
        git(copy, "checkout", "-q", one["commit"])
        git(copy, "apply", str(run_dir / one["diff"]))
        assert (copy / "train.py").read_text() == content and not (copy / "notes.txt").exists()


def test_clipkits_own_repository_is_told_apart(tmp_path, repository, monkeypatch):
    own = tmp_path / "site" / "clipkit"
    (own / "__init__.py").write_text("")
    git(own.parent, "init", "-q")
    git(own.parent, "commit", "-qm", "empty", "--allow-empty")
    # Installed into somebody's repository, which does not track it.
    assert set(code_state()) == {"working_directory"}
    git(own.parent, "add", ".")
    git(own.parent, "commit", "-qm", "clipkit")
    (own / "__init__.py").write_text("changed = True\n")
    found = code_state()
    assert found["clipkit"][0]["commit"] == git(own.parent, "rev-parse", "HEAD").strip()
    assert found["clipkit"][0]["dirty"] and b"changed" in found["clipkit"][1]
    assert not found["working_directory"][0]["dirty"]
    monkeypatch.chdir(own)
    assert set(code_state()) == {"working_directory"}


def test_a_hook_that_starts_a_run_leads_git_to_no_other_repository(tmp_path, repository, monkeypatch):
    """git sets these for its hooks, and `git rebase --exec` for what it runs."""
    before, other = code_state(), tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    git(other, "commit", "-qm", "another", "--allow-empty")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
    assert code_state() == before and before["working_directory"][0]["branch"] == "main"


def test_without_git_a_repository_or_a_commit_there_is_nothing_and_no_error(
    tmp_path, repository, monkeypatch
):
    said: list[str] = []
    monkeypatch.chdir(tmp_path)
    assert begin_session(tmp_path, 0, say=said.append)["code"] == {}
    (tmp_path / "new").mkdir()
    git(tmp_path / "new", "init", "-q")
    monkeypatch.chdir(tmp_path / "new")
    assert code_state() == {}
    monkeypatch.chdir(repository)
    assert set(code_state()) == {"working_directory"}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert begin_session(tmp_path, 3, say=said.append)["code"] == {}
    assert [session["step"] for session in recorded(tmp_path)] == [0, 3] and not said


def test_a_record_that_cannot_be_written_is_said(tmp_path, repository):
    said: list[str] = []
    (repository / "train.py").write_text("lr = 2\n")
    os.mkfifo(tmp_path / "sessions.jsonl")
    assert begin_session(tmp_path, 0, say=said.append)["code"]["working_directory"]["dirty"]
    assert len(said) == 1 and "not on record" in said[0]


def test_a_diff_is_cut_at_its_bound(tmp_path, repository, monkeypatch):
    monkeypatch.setattr(sessions, "_DIFF_BYTES", 5000)
    (repository / "train.py").write_text("x\n" * 10_000)
    diff = code_state()["working_directory"][1]
    assert len(diff) < 5100 and diff.endswith(b"(cut here)\n") and b"lr = 1" in diff


def test_a_git_that_hangs_is_given_up_with_all_it_started(tmp_path, repository, monkeypatch):
    (tmp_path / "bin").mkdir()
    hanging = tmp_path / "bin" / "git"
    hanging.write_text(f"#!/bin/sh\nsleep 1000 & echo $! >> {tmp_path}/pids\nwait\n")
    hanging.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(sessions, "_SECONDS", 0.5)
    assert code_state() == {}
    for pid in (tmp_path / "pids").read_text().split():
        state = Path(f"/proc/{pid}/stat")
        assert not state.exists() or state.read_text().split()[2] in "ZX"


def test_nothing_that_a_repositorys_settings_name_is_run(tmp_path, repository):
    """Every such program leaves a file when git is asked plainly, and none when clipkit asks."""
    marks = tmp_path / "marks"
    marks.mkdir()

    def program(name: str, body: str = "cat") -> str:
        path = tmp_path / f"{name}.sh"
        path.write_text(f"#!/bin/sh\ntouch {marks}/{name}\n{body}\n")
        path.chmod(0o755)
        return str(path)

    (repository / ".gitattributes").write_text("*.py diff=own\n*.bin filter=own\n*.txt filter=o=wn\n")
    for name in ("data.bin", "data.txt"):
        (repository / name).write_text("one\n")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "attributes")
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    shutil.copy(program("hook", ""), hooks / "post-index-change")
    for key, value in {
        "core.fsmonitor": program("fsmonitor", ""),
        "core.hooksPath": str(hooks),
        "diff.external": program("external", ""),
        "diff.own.textconv": program("textconv", 'cat "$1"'),
        "diff.own.command": program("command", ""),
        "filter.own.clean": program("clean"),
        "filter.own.smudge": program("smudge"),
        "filter.own.required": "true",
        "core.pager": program("pager"),
    }.items():
        git(repository, "config", key, value)
    for name in ("train.py", "data.bin", "data.txt"):
        (repository / name).write_text("two\n")
    state = code_state()["working_directory"]
    assert state[0]["dirty"] and b"+two" in state[1] and state[1].count(b"diff --git") == 3
    assert not list(marks.iterdir())
    git(repository, "diff", "--textconv")
    git(repository, "diff", "--no-ext-diff", "--textconv")
    git(repository, "status")
    assert {"fsmonitor", "hook", "textconv", "clean"} <= {path.name for path in marks.iterdir()}
    # A filter whose name a command line cannot carry: the commit alone is told.
    shutil.rmtree(marks)
    marks.mkdir()
    git(repository, "config", "filter.o=wn.clean", program("named"))
    state = code_state()["working_directory"]
    assert state[0]["dirty"] is None and state[0]["commit"] and not state[1]
    assert not list(marks.iterdir())
