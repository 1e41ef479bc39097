"""All of hydra: the console commands of the programs in recipes/ that are composed from conf/.

compose     conf/ and the overrides, as plain values
check       overrides that nothing reads, and errors that say what to do
listing     what there is to choose: `ls`
programs    one run, or a sweep by hydra's launchers: imports the program when a job starts
jobs        what the jobs of a sweep leave on record
processes   a sweep whose jobs are processes of their own (clipkit-sweep, clipkit-study)
"""

from __future__ import annotations

import sys

from clipkit.command.programs import run

__all__ = ["evaluate", "export", "plan", "pretrain", "run"]


def pretrain() -> None:
    """clipkit-pretrain"""
    run("pretrain")


def evaluate() -> None:
    """clipkit-evaluate"""
    run("evaluate")


def export() -> None:
    """clipkit-export"""
    run("export")


def plan() -> None:
    """clipkit-plan, whose `--json` and `gpus=1,8` hydra would take for an option and a sweep."""
    sys.argv[1:] = [_hydras(argument) for argument in sys.argv[1:]]
    run("plan")


def _hydras(argument: str) -> str:
    if argument == "--json":
        return "json=true"
    if argument.startswith("gpus=") and not argument.startswith("gpus=["):
        return f"gpus=[{argument.removeprefix('gpus=')}]"
    return argument
