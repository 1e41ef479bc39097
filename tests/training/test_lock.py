"""One process at a time in a run folder, and nobody kept out by a process that is gone."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
from pathlib import Path

import pytest

from clipkit.training import lock
from clipkit.training.lock import RunFolderInUse, locked
from tests.processes import wait_until

GONE = {"host": "another-machine", "pid": 4242, "started": 1.5, "job": None}


def holding(folder: Path) -> int:
    """The process id of a child that holds the folder's lock until it is killed."""
    ready, said = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with locked(folder):
                os.write(said, b"!")
                signal.pause()
        finally:
            os._exit(1)
    assert os.read(ready, 1) == b"!"
    os.close(ready)
    os.close(said)
    return child


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
    child = holding(tmp_path / "run")
    try:
        with pytest.raises(RunFolderInUse, match=f"process {child} on {socket.gethostname()} is training in"):
            with locked(tmp_path / "run"):
                raise AssertionError("two hold it")
    finally:
        end(child)
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / "run" / ".lock").read_text() == ""


def test_a_second_lock_in_the_same_process_is_refused(tmp_path):
    with locked(tmp_path):
        with pytest.raises(RunFolderInUse), locked(tmp_path / ".." / tmp_path.name):
            pass
        child = os.fork()
        if child == 0:
            try:
                with locked(tmp_path):
                    os._exit(0)
            except RunFolderInUse:
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_holder_that_was_killed_keeps_nobody_out(tmp_path):
    """Nor do the data workers that outlive it for a moment: they do not inherit the lock."""
    child = os.fork()
    if child == 0:
        with locked(tmp_path):
            worker = os.fork()
            if worker == 0:
                signal.pause()
            (tmp_path / "worker").write_text(str(worker))
            signal.pause()
    wait_until(lambda: (tmp_path / "worker").exists() and (tmp_path / "worker").read_text())
    worker = int((tmp_path / "worker").read_text())
    end(child)
    try:
        with locked(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_folder_that_another_machine_left_is_free_once_its_touches_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.2)
    said = []
    (tmp_path / ".lock").write_text(json.dumps(GONE))
    with locked(tmp_path, say=said.append):
        pass
    assert "process 4242 on another-machine" in said[0]
    # Long ago by the file's own clock: no wait.
    (tmp_path / ".lock").write_text(json.dumps(GONE))
    os.utime(tmp_path / ".lock", (1, 1))
    with locked(tmp_path, say=said.append):
        pass
    assert len(said) == 1


def test_a_holder_on_another_machine_that_still_touches_the_file_is_respected(tmp_path, monkeypatch):
    """As on a file system that locks within one machine alone."""
    monkeypatch.setattr(lock, "BEAT_S", 0.5)
    path = tmp_path / ".lock"
    path.write_text(json.dumps(GONE))
    child = os.fork()
    if child == 0:
        while True:
            os.utime(path)
    try:
        with pytest.raises(RunFolderInUse, match="process 4242 on another-machine"), locked(tmp_path):
            pass
    finally:
        end(child)
    assert json.loads(path.read_text()) == GONE


def test_a_requeued_job_takes_its_own_folder_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    (tmp_path / ".lock").write_text(json.dumps({**GONE, "job": "77"}))
    with locked(tmp_path, say=lambda text: pytest.fail(text)):
        pass


@pytest.mark.parametrize("alive", [True, False])
def test_without_locks_the_file_says_who_is_there(alive, tmp_path, monkeypatch):
    def unsupported(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    holder = lock._me() if alive else {**lock._me(), "pid": 2**22 + 1}
    (tmp_path / ".lock").write_text(json.dumps(holder))
    if alive:
        with pytest.raises(RunFolderInUse), locked(tmp_path):
            pass
    else:
        with locked(tmp_path):
            pass


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"pid": "x"}', b"\xff" * 100, b"[" * 5000])
def test_a_lock_file_of_any_content_is_taken(content, tmp_path):
    (tmp_path / ".lock").write_bytes(content)
    with locked(tmp_path):
        pass


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="cannot be written"), locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "outside").exists()
