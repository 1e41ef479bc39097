"""One self-contained HTML page about runs: final numbers with spread, curves, geometry, galleries, confusion.

    clipkit-report runs/quickstart/*                      # writes report.html
    clipkit-report runs/study --output study.html --title "CLIP and CyCLIP with sentence losses"
    clipkit-report runs/* --no-models                     # numbers and curves alone: needs no checkpoint, no data

Runs whose settings differ by the seed alone become one column, mean and standard deviation. A run that cannot be
read is left out, and the page says why. Runs may come from anybody: nothing of one is run or fetched, see SECURITY.md.
"""

from __future__ import annotations

import argparse
import sys

from clipkit.reports.page import write_report


def main(arguments: list[str] | None = None) -> None:
    """The console command."""
    parser = argparse.ArgumentParser(
        prog="clipkit-report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="run folders, or folders that hold them")
    parser.add_argument("--output", default="report.html", help="the page to write (default: %(default)s)")
    parser.add_argument("--title", default="clipkit report")
    parser.add_argument(
        "--queries", type=int, default=6, help="retrieval examples each way (default: %(default)s)"
    )
    parser.add_argument(
        "--device", default="cpu", help="where the evaluation data is encoded again (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, help="images or captions encoded at once (default: %(default)s)"
    )
    parser.add_argument(
        "--no-models", action="store_true", help="leave out what needs a checkpoint and its data"
    )
    parser.add_argument(
        "--trust-paths",
        action="store_true",
        help="runs that you made may name local files anywhere; others only what is below this folder or their own",
    )
    given = parser.parse_args(arguments)
    try:
        path = write_report(
            given.runs,
            given.output,
            title=given.title,
            queries=given.queries,
            device=given.device,
            batch_size=given.batch_size,
            models=not given.no_models,
            trust_paths=given.trust_paths,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
