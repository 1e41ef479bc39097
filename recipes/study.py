"""The language-encoder study: {CLIP, CyCLIP} x {no sentence loss, L_s, L_n, both} over seeds, with findings.

    clipkit-study --data FOLDER --threads 1 --parallel 2                # a laptop's size, 24 runs; FOLDER as tests use it
    clipkit-study --seeds 0 epochs=2                                    # overrides go to every run
    clipkit-study --scale cc3m --processes 4 data.root=/data/cc3m \\
        data.sentences.triplets=/data/nli_for_simcse.csv
    clipkit-study --table runs/study_mini                               # from the finished runs alone

L_s is `simcse` (unsupervised), L_n is `nli_contrastive` (supervised). It leaves study.md, .csv, .json and
.html; the page has the trade-off of alignment against uniformity over training. The same command again trains
only what is missing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from clipkit.command import jobs, processes
from clipkit.command.compose import start_hydra
from clipkit.command.programs import reported
from clipkit.reports.study import BASES, SENTENCES, write_study

SCALES = {"mini": "study_mini", "cc3m": "study_cc3m"}


def main(arguments: list[str] | None = None) -> None:
    """The console command."""
    parser = argparse.ArgumentParser(
        prog="clipkit-study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="settings of every run, as for clipkit-pretrain")
    parser.add_argument(
        "--scale", choices=SCALES, default="mini", help="conf/experiment/study_*.yaml (default: %(default)s)"
    )
    parser.add_argument("--seeds", default="0,1,2", help="as many runs of each arm (default: %(default)s)")
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="the evaluation sets, and at mini scale the training data (CLIPKIT_TEST_DATA)",
    )
    processes.add_job_options(parser)
    parser.add_argument(
        "--table", nargs="+", metavar="FOLDER", help="only the table and findings of the finished runs below"
    )
    parser.add_argument(
        "--output", help="OUTPUT.md, .csv, .json, .html (default: study, in the folder of the runs)"
    )
    given = parser.parse_args(arguments)
    with reported("pretrain"):
        if given.table:
            write_study(given.table, given.output or str(Path(given.table[0]) / "study"))
            return
        if given.data:
            if not Path(given.data).is_dir():
                raise ValueError(f"--data: there is no folder {given.data}")
            os.environ["CLIPKIT_TEST_DATA"] = str(Path(given.data).resolve())
        start_hydra(given.config_dir)
        wanted = arms(SCALES[given.scale], seeds(given.seeds), given.overrides)
        planned = processes.plan(wanted, threads=given.threads)
        outcome = processes.run_all(
            planned,
            processes=given.processes,
            parallel=given.parallel,
            threads=given.threads,
            config_dir=given.config_dir,
        )
        done = [job.run_dir for job in outcome.jobs if job.state == jobs.FINISHED]
        if done:
            write_study(done, given.output or str(Path(planned[0].run_dir).parent / "study"))
        outcome.report(compared=False)
        sys.exit(outcome.status)


def seeds(text: str) -> list[int]:
    """--seeds as numbers; ValueError for anything else."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--seeds {text!r}: expected whole numbers with commas between, such as 0,1,2"
        ) from None
    if len(set(found)) < len(found):
        raise ValueError(f"--seeds {text!r}: a seed is there twice")
    return found


def arms(experiment: str, seeds: Sequence[int], overrides: Sequence[str]) -> list[list[str]]:
    """Every run's overrides, a seed after the other, so that a study that is stopped has whole seeds."""
    for entry in overrides:
        if entry.lstrip("+~").split("=")[0] in ("loss", "seed", "experiment"):
            raise ValueError(
                f"{entry}: the study sets loss, seed and experiment itself; see --seeds and --scale"
            )
    jobs_of_all = []
    for seed in seeds:
        for terms in SENTENCES.values():
            for base in BASES.values():
                loss = f"[{','.join([base, *terms])}]" if terms else base
                jobs_of_all.append([f"experiment={experiment}", f"loss={loss}", f"seed={seed}", *overrides])
    return jobs_of_all


if __name__ == "__main__":
    main()
