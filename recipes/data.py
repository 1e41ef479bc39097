"""Make shards, look at shards.

    clipkit-data pack captions.csv shards/ --image file --caption caption --workers 8
    clipkit-data pack photographs/ shards/               # a folder: NAME.jpg with NAME.txt beside it
    clipkit-data check 'shards/*.tar' --overlap 'flickr30k/*.tar' --workers 8
    clipkit-data stats 'shards/*.tar'
    clipkit-data index 'shards/*.tar' --workers 8 --sizes shards/sizes.json      # runs then begin at once

Each prints a table and, with --json FILE, writes every number. `check` ends with status 1 when more than
--max-bad-fraction of the samples are bad.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from clipkit.data import check, index_shards, pack, stats
from clipkit.files import write_json


def main(arguments: list[str] | None = None) -> int:
    """The console command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="clipkit-data", description="Make shards, look at shards.")
    commands = parser.add_subparsers(dest="command", required=True)
    pack_parser = commands.add_parser(
        "pack", help="write shards from a table of pictures or a folder; run again to resume"
    )
    pack_parser.add_argument(
        "source", help=".csv, .tsv, .jsonl, .parquet, or a folder of pictures with NAME.txt beside them"
    )
    pack_parser.add_argument("folder", help="where the shards go")
    pack_parser.add_argument(
        "--image", default="image", help="column with paths (or bytes, in Parquet); default image"
    )
    pack_parser.add_argument(
        "--caption", default=["caption"], nargs="+", help="column or columns with captions; default caption"
    )
    pack_parser.add_argument("--root", help="folder that paths are relative to; default: the source's")
    pack_parser.add_argument(
        "--samples-per-shard", type=int, default=10_000, help="rows a shard; default 10000"
    )
    pack_parser.add_argument(
        "--resize",
        type=int,
        help="reduce larger pictures to this shorter side, pixels; default: keep the bytes",
    )
    pack_parser.add_argument("--workers", type=int, default=1, help="processes; default 1")
    pack_parser.add_argument(
        "--keep", nargs="+", default=[], help="further columns for KEY.json, such as an id for data.pair_ids"
    )
    pack_parser.add_argument(
        "--separator", help="sign between a table's fields; default: a comma in .csv, a tab in .tsv"
    )
    pack_parser.add_argument(
        "--encoding", help="of a table, such as cp1252; default: UTF-8, or what its mark says"
    )
    pack_parser.add_argument(
        "--quotes",
        default="auto",
        choices=("auto", "csv", "none"),
        help="whether quotes in a table enclose fields (csv) or are letters (none); default: found out",
    )
    check_parser = commands.add_parser(
        "check", help="decode everything; count faults, duplicates and overlap"
    )
    check_parser.add_argument("shards", nargs="+", help="paths, globs, braces or URLs")
    check_parser.add_argument("--overlap", nargs="+", help="shards of an evaluation set to compare with")
    check_parser.add_argument(
        "--max-bad-fraction", type=float, default=0.05, help="status 1 above it; default 0.05"
    )
    check_parser.add_argument("--workers", type=int, default=1, help="processes; default 1")
    stats_parser = commands.add_parser("stats", help="samples, sizes and captions, without decoding")
    stats_parser.add_argument("shards", nargs="+", help="paths, globs, braces or URLs")
    index_parser = commands.add_parser(
        "index", help="count samples and note where they lie, so that runs begin at once; run again to go on"
    )
    index_parser.add_argument("shards", nargs="+", help="paths, globs, braces or URLs")
    index_parser.add_argument("--workers", type=int, default=1, help="processes; default 1")
    index_parser.add_argument(
        "--cache-dir", help="where indexes go, as data.cache_dir; default $CLIPKIT_CACHE or ~/.cache/clipkit"
    )
    index_parser.add_argument(
        "--sizes",
        help="write the samples of each shard here; as sizes.json beside the shards it tells every machine",
    )
    for command in (pack_parser, check_parser, stats_parser, index_parser):
        command.add_argument("--json", help="write the numbers to this file")
    options = parser.parse_args(arguments)
    try:
        report, status = _COMMANDS[options.command](options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"clipkit-data {options.command}: {error}", file=sys.stderr)
        return 2
    print("\n".join(_lines(report)))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    return status


def _pack(options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    report = pack(
        options.source,
        options.folder,
        image=options.image,
        caption=options.caption,
        root=options.root,
        samples_per_shard=options.samples_per_shard,
        workers=options.workers,
        resize=options.resize,
        keep=options.keep,
        separator=options.separator,
        encoding=options.encoding,
        quotes=options.quotes,
    )
    return report, 0 if report["samples"] else 1


def _check(options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    report = check(options.shards, overlap_with=options.overlap, workers=options.workers)
    bad = sum(report["faults"].values())
    return report, 1 if not report["good"] or bad > options.max_bad_fraction * report["samples"] else 0


def _stats(options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    return stats(options.shards), 0


def _index(options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    report = index_shards(options.shards, workers=options.workers, cache_dir=options.cache_dir)
    counts = report.pop("counts")
    if options.sizes:
        sizes = {name.partition("?")[0].rpartition("/")[2]: count for name, count in counts.items()}
        if len(sizes) < len(counts):
            raise ValueError("--sizes: two of the shards have the same name; index one folder at a time")
        write_json(Path(options.sizes), sizes)
    return report, 1 if report["bad_shards"] else 0


_COMMANDS = {"pack": _pack, "check": _check, "stats": _stats, "index": _index}


def _lines(report: dict[str, Any], indent: str = "") -> list[str]:
    """The report as aligned lines."""
    lines = []
    width = max((len(str(key)) for key in report), default=0)
    for key, value in report.items():
        if isinstance(value, dict) and value and not set(value) <= {"min", "median", "max"}:
            lines += [f"{indent}{key}", *_lines(value, indent + "  ")]
        elif isinstance(value, list):
            lines += [f"{indent}{key}", *(f"{indent}  {item}" for item in value)]
        else:
            if isinstance(value, dict):
                value = ", ".join(f"{name} {number:g}" for name, number in value.items()) or "none"
            lines.append(f"{indent}{str(key):<{width}}  {value}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
