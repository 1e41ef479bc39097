"""Finished runs as a dated result file: what was run, on what, how long, and every final number.

    clipkit-pretrain -m seed=0,1,2
    python benchmarks/runs.py runs/quickstart/* --title "Quickstart, three seeds" \\
        --output benchmarks/results/2026-11-cpu2-quickstart.md

A run that is not finished is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import yaml


def read(folder: Path) -> dict[str, Any]:
    """A run's summary and config, and its seconds of training from metrics.jsonl."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    if not summary.get("finished"):
        raise SystemExit(f"{folder} is not finished: its summary.json says so")
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return {"folder": folder, "summary": summary, "config": config}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="finished run folders")
    parser.add_argument("--title", required=True)
    parser.add_argument("--note", default="", help="how the runs were made, in a sentence or two")
    parser.add_argument("--output", required=True, type=Path, help="the Markdown file to write")
    arguments = parser.parse_args()
    runs = [read(folder) for folder in arguments.runs]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    versions = runs[0]["summary"]["versions"]
    lines = [
        f"# {arguments.title}",
        "",
        f"{date.today()}, commit {commit}, {os.cpu_count()} CPU cores ({platform.machine()}), no GPU. "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
    ]
    if arguments.note:
        lines += ["", arguments.note]
    metrics = list(runs[0]["summary"]["metrics"])
    header = ["command", "losses", "seed", "steps", "threads", "seconds", *metrics]
    rows = []
    for run in runs:
        summary, config = run["summary"], run["config"]
        words = [
            word
            for word in summary["command"][1:]
            if not word.startswith(("output_dir", "num_threads", "log_every"))
        ]
        rows.append(
            [
                "`clipkit-pretrain " + " ".join(words) + "`",
                " + ".join(config["loss"]),
                config["seed"],
                summary["step"],
                config["num_threads"] or "all",
                f"{summary['seconds_this_session']:.0f}",
                *(f"{summary['metrics'][name]:.4g}" for name in metrics),
            ]
        )
    lines += [
        "",
        "Fractions, 1 is perfect; seconds are of training, checkpoints and evaluation, without start-up.",
        "",
    ]
    # One run a column: many metrics, few runs.
    columns = list(zip(header, *rows))
    lines += ["| " + " | ".join(map(str, columns[0])) + " |", "| --- |" + " ---: |" * len(rows)]
    lines += ["| " + " | ".join(map(str, column)) + " |" for column in columns[1:]]
    numbers = [{"command": row[0].strip("`"), **run["summary"]["metrics"]} for row, run in zip(rows, runs)]
    lines += ["", "```json", json.dumps(numbers), "```", ""]
    arguments.output.write_text("\n".join(lines), encoding="utf-8")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
