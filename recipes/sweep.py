"""Run a sweep whose jobs are processes of their own, or compare the runs that are there.

    clipkit-sweep 'loss=clip,cyclip' seed=0,1                        # the grammar and the folders of clipkit-pretrain -m
    clipkit-sweep 'loss=clip,cyclip' seed=0,1 --parallel 2 --threads 1
    clipkit-sweep 'loss=clip,cyclip' seed=0,1 --processes 2          # each job a torchrun of two ranks
    clipkit-sweep --table runs/quickstart                            # only the table of the finished runs
    clipkit-sweep --table runs/quickstart --output comparison        # and comparison.md, .csv, .json, .html

A job that is killed, or crashes in native code, ends itself and no other. The same command again does only
what is missing. Ctrl-C and SIGTERM are passed on: the jobs save and stop. A job's output is in its run
folder, output.log.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from clipkit.command import jobs, plugins, processes
from clipkit.command.compose import start_hydra
from clipkit.command.programs import reported
from clipkit.reports.comparison import finished_groups, left_out, text_tables, write_comparison
from clipkit.reports.runs import find_runs


def main(arguments: list[str] | None = None) -> None:
    """The console command."""
    parser = argparse.ArgumentParser(
        prog="clipkit-sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="as for clipkit-pretrain -m; a comma makes jobs")
    processes.add_job_options(parser)
    parser.add_argument(
        "--table", nargs="+", metavar="FOLDER", help="compare the finished runs below; train nothing"
    )
    parser.add_argument("--output", help="also write the comparison to OUTPUT.md, .csv, .json and .html")
    parser.add_argument("--order", metavar="TASK/METRIC", help="the metric whose best mean comes first")
    given = parser.parse_args(arguments)
    if given.table and given.overrides:
        sys.exit(f"Error: --table trains nothing, but overrides are given: {' '.join(given.overrides)}")
    if not given.table and not given.overrides:
        parser.error("give overrides, such as 'loss=clip,cyclip' seed=0,1, or --table FOLDER")
    with reported("pretrain"):
        if given.table:
            write_tables(given.table, given.output, given.order)
            return
        plugins.search(plugins.given(given.overrides))
        planned = processes.plan(
            jobs.expand(given.overrides, start_hydra(given.config_dir)), threads=given.threads
        )
        outcome = processes.run_all(
            planned,
            processes=given.processes,
            parallel=given.parallel,
            threads=given.threads,
            config_dir=given.config_dir,
        )
        outcome.report(given.order)
        if given.output:
            done = [job.run_dir for job in outcome.jobs if job.state == jobs.FINISHED]
            write_tables(done, given.output, given.order, shown=False)
        sys.exit(outcome.status)


def write_tables(
    folders: Sequence[str], output: str | None, order: str | None, *, shown: bool = True
) -> None:
    """Print the comparison of the finished runs, and write it to OUTPUT.md, .csv, .json and .html."""
    runs = find_runs(folders)
    groups, missing = finished_groups(runs, order=order), left_out(runs)
    if shown:
        print(
            f"Mean ± sample standard deviation over n runs that differ by the seed alone:\n{text_tables(groups) or 'no run was evaluated'}"
        )
        print("".join(f"\n{line}" for line in missing))
    if output:
        print("written: " + ", ".join(map(str, write_comparison(groups, output, left_out=missing))))


if __name__ == "__main__":
    main()
