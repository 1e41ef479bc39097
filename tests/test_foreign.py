"""Reading files that others wrote: bounded, of the shape asked for, named in every error, and no say in what is opened."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from clipkit.foreign import (
    BrokenFile,
    blamed_on,
    leads_out,
    named_by,
    parse_json,
    permit,
    read_bytes,
    read_json,
    read_json_lines,
    read_yaml,
    readable,
    redacted,
    shown,
)

SECRET = "hunter2-no-file-content-in-a-message"
BROKEN_JSON = {
    "cut short": f'{{"a": "{SECRET}',
    "empty": "",
    "deep": "[" * 100_000,
    "deep enough to parse": "[" * 500 + "]" * 500,
    "long integer": '{"step": ' + "9" * 5000 + "}",
    "other shape": f'["{SECRET}"]',
    "wrong value": f'{{"step": "{SECRET}"}}',
    "true for a number": '{"step": true}',
    "half a character": '{"step\\ud800": 1}',
    "wide": "[" + "0," * 3_000_000 + "0]",
}
BROKEN_YAML = {
    "cut short": f"a: [{SECRET}",
    "empty": "",
    "a list": f"- {SECRET}",
    "python object": f"a: !!python/object/apply:os.system ['{SECRET}']",
    "aliases without bound": "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)),
    "an alias of itself": "a: &a [*a]",
    "deep": "{a: " * 2000,
    "no date": "a: 2024-99-99",
    "long integer": "a: " + "9" * 5000,
    "number keys": f"1: {SECRET}",
    "unhashable": "? {a: 1}\n: 2",
}


@pytest.mark.parametrize("kind", BROKEN_JSON)
def test_broken_json_is_one_error_that_names_the_file_and_quotes_nothing(kind, tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text(BROKEN_JSON[kind])
    with pytest.raises(BrokenFile, match=str(path)) as error:
        read_json(path, dict[str, int])
    assert SECRET not in str(error.value) and len(str(error.value)) < 400 + len(str(path))


@pytest.mark.parametrize("kind", BROKEN_YAML)
def test_broken_yaml_is_one_error_that_names_the_file_and_quotes_nothing(kind, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(BROKEN_YAML[kind])
    with pytest.raises(BrokenFile, match=str(path)) as error:
        read_yaml(path)
    assert SECRET not in str(error.value) and len(str(error.value)) < 400 + len(str(path))


def test_bytes_that_are_no_text_name_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe" * 10)
    for read in (read_yaml, read_json):
        with pytest.raises(BrokenFile, match=str(path)):
            read(path)


def test_nothing_but_a_regular_file_of_bounded_size_is_read(tmp_path):
    fifo, large = tmp_path / "fifo", tmp_path / "large"
    os.mkfifo(fifo)
    with large.open("wb") as file:
        file.truncate(1 << 40)
    for path in (fifo, large, Path("/dev/zero"), tmp_path):
        with pytest.raises(BrokenFile, match=str(path)):
            read_bytes(path, limit=1 << 20)


def test_good_files_are_read_as_they_were_written(tmp_path):
    value = {"step": 3, "metrics": {"a/b": 0.5, "c": float("nan")}}
    path = tmp_path / "x.json"
    path.write_text(json.dumps(value))
    assert str(read_json(path)) == str(value)
    assert parse_json('{"a": 1}', dict[str, float], name="here") == {"a": 1.0}
    (tmp_path / "x.yaml").write_text("a: &x [1, 2]\nb: *x\n")
    assert read_yaml(tmp_path / "x.yaml") == {"a": [1, 2], "b": [1, 2]}


def test_a_line_cut_short_is_left_out_and_a_file_of_no_line_is_broken(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n\xff\n[1]\n{"ste')
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]
    path.write_bytes(b"\xff\xff\n")
    with pytest.raises(BrokenFile, match=str(path)):
        read_json_lines(path)


def test_a_run_folder_names_data_below_the_present_folder_or_its_own_alone(tmp_path, monkeypatch):
    work, run = tmp_path / "work", tmp_path / "elsewhere" / "run"
    for folder in (work / "data", work / ".ssh", run):
        folder.mkdir(parents=True)
    (run / "out").symlink_to("/etc")
    inner = work / "runs" / "mine"
    inner.mkdir(parents=True)
    (inner / "out").symlink_to("/etc")
    monkeypatch.chdir(work)
    good = ["data/0.tar", work / "data", run / "own.tar", f"file:{work}/data/x.tar"]
    bad = [
        "pipe:touch x", "PIPE:touch x", "https://host/x.tar", "s3:bucket/x", "hf://x", "/etc/passwd", "../secret",
        "data/../../x", ".ssh/id", "~/x.txt", run / "out" / "passwd", run.parent / "other", "file:///etc/passwd",
    ]  # fmt: skip
    for location in [*good, *bad]:
        permit(location, "shards")
    with named_by(run):
        for location in good:
            permit(location, "shards")
        for location in bad:
            with pytest.raises(BrokenFile, match="shards is"):
                permit(location, "shards")
    (work / "runs" / "beside").symlink_to("/etc")
    (work / "linked").symlink_to("/etc")
    with named_by(inner):
        # A link in the present folder is the user's.
        permit("linked/passwd", "shards")
        for location in ("runs/mine/out/passwd", "runs/beside/passwd"):
            with pytest.raises(BrokenFile):
                permit(location, "shards")
    with named_by(run, trust_paths=True):
        permit("/etc/passwd", "shards")
        for location in ("pipe:touch x", "https://host/x.tar"):
            with pytest.raises(BrokenFile):
                permit(location, "shards")


def test_what_is_shown_holds_no_credential():
    texts = {
        "https://user:pa55@host/a/{0..3}.tar?sig=k3y&x=1#t": "https://host/a/{0..3}.tar?...",
        "see s3://AKIA:k3y@bucket/x.tar, please": "see s3://bucket/x.tar, please",
        "pipe:curl -H 'Authorization: Bearer k3y' https://host/x": "pipe:curl ...",
        "Pipe: TOKEN=k3y curl https://host/x": "pipe:TOKEN ...",
        "pipe:curl \\\n -H k3y": "pipe:curl ...",
        "http://user:pa55/k3y@host/x": "http://host/x",
        "a photo of a {}.": "a photo of a {}.",
    }
    for text, wanted in texts.items():
        found = redacted(text)
        assert "k3y" not in found and "pa55" not in found
        assert found == wanted
    assert "k3y" not in str(shown({"a": [{"b": "https://h/x?k=k3y"}], "c": ("pipe:cat k3y",)}))


def test_a_line_that_is_too_long_is_left_out_and_too_many_are_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "x": "' + "x" * (1 << 20) + '"}\n{"step": 3}\n')
    assert read_json_lines(path) == [{"step": 1}, {"step": 3}]
    path.write_bytes(b"\n" * 500_001)
    with pytest.raises(BrokenFile, match=f"{path} has 500001 lines"):
        read_json_lines(path)


def test_a_link_that_leads_out_is_told_from_one_that_stays(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name, target in {"in": "file", "out": "..", "round": "round", "there": "../run/file"}.items():
        (run / name).symlink_to(target)
    (tmp_path / "same").symlink_to("run")
    assert [name for name in ("in", "out", "round", "there", "file") if leads_out(run / name, run)] == ["out"]
    assert not leads_out(tmp_path / "same" / "file", run) and not leads_out(run, run)
    with named_by(run), pytest.raises(BrokenFile):
        permit(run / "out", "shards")


@pytest.mark.parametrize(
    "error", [KeyError("eval"), ZeroDivisionError(), ValueError("of k3y"), OSError("no hub")]
)
def test_whatever_a_strangers_settings_do_is_told_as_the_folders_fault(error):
    with pytest.raises(BrokenFile, match="^runs/a cannot be used: ") as told, blamed_on("runs/a"):
        raise error
    assert told.value.__cause__ is error
    named = ValueError("runs/a/config.json is cut short")
    with pytest.raises(ValueError, match="^runs/a/config.json is cut short$"), blamed_on("runs/a"):
        raise named
    full = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left") as told, blamed_on("runs/a"):
        raise full
    assert told.value is full
    with pytest.raises(ValueError, match="^no image here$"), blamed_on("runs/a", settings=False):
        raise ValueError("no image here")
    with (
        pytest.raises(BrokenFile, match="^runs/a cannot be used: IndexError: row"),
        blamed_on("runs/a", settings=False),
    ):
        raise IndexError("row 5")


def test_what_is_printed_steers_no_terminal():
    assert readable("a\x1b]0;x\x07\tb\nc\u202ed\ud800 é") == "a\ufffd]0;x\ufffd b c\ufffdd\ufffd é"
