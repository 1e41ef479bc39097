"""Fuzz what reads run folders and checkpoints: no crash, no hang, nothing but a clear message.

    python tests/fuzz_runs.py SECONDS [SEED [CASES]]

Every case is a small run folder of which one or two files are changed: bytes overwritten, removed or repeated, values
of JSON and YAML replaced by others, headers of safetensors and the pickle in train.pt altered; in half of the cases
the manifest's hashes are made to fit, as a stranger would. A case that takes a minute is a hang. The last line is the
number of cases by outcome; a failing case is kept in fuzz-failure/ and named.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import yaml

from clipkit.checkpoint import (
    best_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    prune,
    rng_state,
    save_checkpoint,
)
from clipkit.data.tokenizers import Words
from clipkit.loading import load_model, model_config
from clipkit.loggers import JSONLines
from clipkit.model import create_model
from clipkit.training import run_folder

# Nested, endless and of other kinds; no value is anything that clipkit writes there.
VALUES: list[Any] = [
    None, True, -1, 0, 3, 10**9, 10**30, 1e308, float("nan"), float("inf"), "", "x", "../../x", "/etc/passwd", "a" * 5000,
    "pipe:touch fuzzed", "\ud800", "\0", [], [[]], {}, {"a": {"b": []}}, [1, "a", None], {"": 0}, {"name": "hf"},
]  # fmt: skip
SETTINGS = {
    "seed": 0,
    "batch_size": 8,
    "embed_dim": 8,
    "data": {"train": "x"},
    "image_tower": {"name": "timm", "model": "test_resnet", "pretrained": False},
    "text_tower": {"name": "transformer", "width": 16, "heads": 2, "layers": 1},
    "loss": {"infonce": {}},
    "optim": {"lr": 0.1, "weight_decay": 0.0},
    "clip_grad_norm": 1.0,
    "max_logit_scale": 100.0,
    "precision": "fp32",
    "resume": True,
    "amend": None,
}


def make_run(folder: Path) -> Path:
    """A run folder with two checkpoints, as a run of three steps leaves it."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    tokenizer = Words(vocabulary=["red", "circle"], context_length=8)
    model = create_model(model_config(SETTINGS), tokenizer=tokenizer)
    for step in (2, 3):
        save_checkpoint(
            folder / "checkpoints",
            step,
            weights={f"model.{name}": tensor for name, tensor in model.state_dict().items()},
            optimizer={"optimizer.0.exp_avg": torch.ones(3)},
            train_state={"ranks": [{"rng": rng_state()}], "schedule": {"last_epoch": step}},
            config=SETTINGS,
            tokenizer=tokenizer,
            metrics={"zero_shot/top1": 0.5},
        )
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    record = JSONLines(folder / "metrics.jsonl")
    for step in (1, 2, 3):
        record.log(step, {"train/loss": 1.5, "eval/zero_shot/top1": 0.5})
    run_folder.record_amendment(folder, {"amend": {"optim.lr": 0.01}}, 2)
    run_folder.write_summary(folder, finished=True, step=3, metrics={"zero_shot/top1": 0.5})
    return folder


def readers(folder: Path) -> list[Callable[[], object]]:
    """Everything that reads a run folder, once each."""
    checkpoints = folder / "checkpoints"
    return [
        lambda: latest_checkpoint(checkpoints),
        lambda: best_checkpoint(checkpoints, "zero_shot/top1"),
        lambda: load_checkpoint(checkpoints / "step_00000003"),
        lambda: load_model(folder),
        lambda: load_model(checkpoints / "step_00000003"),
        lambda: run_folder.open_run(folder, SETTINGS),
        lambda: run_folder.amended(folder, SETTINGS),
        lambda: JSONLines(folder / "metrics.jsonl", start_step=2, scored=False),
        lambda: prune(checkpoints, keep=1, metric="zero_shot/top1"),
    ]


def change_bytes(content: bytes, draw: random.Random) -> bytes:
    raw = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        place, kind = draw.randrange(len(raw) + 1), draw.randrange(5)
        if kind == 0 and raw:
            raw[place % len(raw)] = draw.randrange(256)
        elif kind == 1:
            del raw[place:]
        elif kind == 2:
            del raw[place : place + draw.choice((1, 4, 100))]
        elif kind == 3:
            raw[place:place] = raw[place : place + draw.choice((1, 4, 100))]
        else:
            raw[place:place] = draw.choice(
                (b"[" * 3000, b"\0", b"\xff", b"9" * 5000, b'"', b"1e999", b"&a [*a]", b"{")
            )
    return bytes(raw)


def change_value(value: Any, draw: random.Random) -> Any:
    """The value with one part replaced, removed or renamed."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key, kind = draw.choice(sorted(value)), draw.randrange(6)
        if kind == 0:
            return {name: one for name, one in value.items() if name != key}
        if kind == 1:
            return {**value, draw.choice(("x", "", "../x", "step", "name")): draw.choice(VALUES)}
        return {**value, key: change_value(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        place = draw.randrange(len(value))
        return [*value[:place], change_value(value[place], draw), *value[place + 1 :]]
    return draw.choice(VALUES)


def change_file(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    if draw.random() < 0.4:
        path.write_bytes(change_bytes(content, draw))
    elif path.suffix == ".json":
        path.write_text(json.dumps(change_value(json.loads(content), draw)))
    elif path.suffix == ".jsonl":
        lines = [json.dumps(change_value(json.loads(line), draw)) for line in content.splitlines()]
        path.write_text("\n".join(lines))
    elif path.suffix == ".yaml":
        try:
            path.write_text(yaml.safe_dump(change_value(yaml.safe_load(content), draw)))
        except UnicodeEncodeError:
            path.write_bytes(b"a: \xed\xa0\x80")
    elif path.suffix == ".safetensors":
        (length,) = struct.unpack("<Q", content[:8])
        header = json.dumps(change_value(json.loads(content[8 : 8 + length]), draw)).encode()
        stated = draw.choice((len(header), len(header), length, 0, 2**40, 2**63))
        path.write_bytes(struct.pack("<Q", stated) + header + content[8 + length :])
    else:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        name = draw.choice(sorted(parts))
        parts[name] = change_bytes(parts[name], draw)
        with zipfile.ZipFile(path, "w", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
            for part, raw in parts.items():
                archive.writestr(part, raw)


def make_hashes_fit(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["sha256"] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in checkpoint.iterdir()
        if path.name != "manifest.json"
    }
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def case(good: Path, folder: Path, draw: random.Random) -> Counter[str]:
    """Change a copy, read it by everything; outcomes by kind. Any other exception passes through."""
    shutil.copytree(good, folder)
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and "00000002" not in path.parent.name
    )
    changed = draw.sample(files, draw.choice((1, 1, 2)))
    for path in changed:
        change_file(path, draw)
    if draw.random() < 0.5 and all(path.name != "manifest.json" for path in changed):
        make_hashes_fit(folder / "checkpoints" / "step_00000003")
    outcomes: Counter[str] = Counter()
    for read in readers(folder):
        try:
            read()
            outcomes["read"] += 1
        except (ValueError, OSError) as error:
            if str(folder) not in str(error) and not str(error).startswith(
                ("amend", "unknown setting to amend")
            ):
                raise AssertionError(f"the message names no file: {error!r}") from error
            outcomes["told"] += 1
    return outcomes


def fuzz(seconds: float, seed: int, cases: int) -> Counter[str]:
    def hangs(*given):
        raise AssertionError("a case takes a minute")

    signal.signal(signal.SIGALRM, hangs)
    outcomes: Counter[str] = Counter()
    end, number = time.monotonic() + seconds, 0
    with tempfile.TemporaryDirectory() as scratch:
        good = make_run(Path(scratch) / "good" / "run")
        while number < cases and time.monotonic() < end:
            draw, folder = random.Random(f"{seed}/{number}"), Path(scratch) / "run"
            signal.alarm(60)
            try:
                with (
                    warnings.catch_warnings(),
                    redirect_stderr(io.StringIO()),
                    redirect_stdout(io.StringIO()),
                ):
                    warnings.simplefilter("ignore")
                    outcomes += case(good, folder, draw)
            except BaseException:
                shutil.copytree(folder, "fuzz-failure", dirs_exist_ok=True)
                print(f"case {number} of seed {seed}: the folder is in fuzz-failure/", flush=True)
                raise
            signal.alarm(0)
            shutil.rmtree(folder)
            number += 1
    return outcomes + Counter(cases=number)


if __name__ == "__main__":
    given = sys.argv[1:]
    found = fuzz(
        float(given[0]),
        int(given[1]) if len(given) > 1 else 0,
        int(given[2]) if len(given) > 2 else sys.maxsize,
    )
    print(", ".join(f"{count} {name}" for name, count in sorted(found.items())))
