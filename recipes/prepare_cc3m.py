"""Conceptual Captions 3M: from Google's TSV to checked shards.

    python -m clipkit.recipes.prepare_cc3m Train_GCC-training.tsv data/cc3m/train
    python -m clipkit.recipes.prepare_cc3m Validation_GCC-1.1.0-Validation.tsv data/cc3m/val

Get the TSV files (caption, tab, URL; no header) at
https://ai.google.com/research/ConceptualCaptions/download. This program checks their form, runs img2dataset
(pip install img2dataset) on them, and then clipkit-data check on what arrived. Run it again and img2dataset
goes on where it stopped.

Sizes to expect. The TSV files have 3,318,333 training and 15,840 validation pairs (Sharma et al., ACL 2018,
table 2). Pages disappear, so a download has fewer: the copy `pixparse/cc3m-wds` on Hugging Face, fetched on
2021-12-22, has 2,905,954 of the training pairs (87.6 %), and its validation set of 2023-12-13 has 13,443
(84.9 %). Fewer than half of that is worth a look at img2dataset's statistics: too many processes, or a
resolver that gives up, lose pairs that still exist.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

from clipkit.data import check

PUBLISHED = {"train": 3_318_333, "val": 15_840}


def main(arguments: list[str] | None = None) -> int:
    """Prepare one split; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="prepare_cc3m", description="Conceptual Captions 3M from TSV to checked shards."
    )
    parser.add_argument("tsv", help="Train_GCC-training.tsv or Validation_GCC-1.1.0-Validation.tsv")
    parser.add_argument("folder", help="where the shards go")
    parser.add_argument(
        "--image-size",
        type=int,
        default=256,
        help="shorter side in pixels; larger pictures are reduced to it",
    )
    parser.add_argument(
        "--processes", type=int, default=4, help="img2dataset processes; more lose more pairs"
    )
    parser.add_argument("--threads", type=int, default=32, help="downloads at a time in each process")
    parser.add_argument("--check-workers", type=int, default=4, help="processes of the check")
    parser.add_argument("--overlap", nargs="+", help="shards of evaluation sets to compare with")
    options = parser.parse_args(arguments)
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        listed = with_header(Path(options.tsv), folder / "pairs.tsv")
    except (ValueError, OSError) as error:
        print(f"prepare_cc3m: {error}", file=sys.stderr)
        return 2
    print(
        f"{listed} pairs in {options.tsv} (the published files have {PUBLISHED['train']} and "
        f"{PUBLISHED['val']})",
        flush=True,
    )
    try:
        subprocess.run(command(folder, options.image_size, options.processes, options.threads), check=True)
    except FileNotFoundError:
        print("prepare_cc3m: img2dataset is not installed: pip install img2dataset", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(
            f"prepare_cc3m: img2dataset ended with status {error.returncode}; run this again to go on",
            file=sys.stderr,
        )
        return 1
    return report(folder, listed, options.check_workers, options.overlap)


def with_header(source: Path, target: Path) -> int:
    """Write `source` to `target` with the header that img2dataset wants; returns the number of pairs.

    Raises:
        ValueError: a line that is not a caption, a tab and a URL, with its number.
    """
    pairs = 0
    with (
        open(source, encoding="utf-8", newline="") as lines,
        open(target, "w", encoding="utf-8", newline="") as out,
    ):
        writer = csv.writer(out, delimiter="\t", lineterminator="\n")
        writer.writerow(["caption", "url"])
        for line, raw in enumerate(lines, 1):
            caption, tab, url = raw.rstrip("\r\n").partition("\t")
            if line == 1 and (caption, url) == ("caption", "url"):
                continue
            if not tab or not caption.strip() or not url.startswith(("http://", "https://")):
                raise ValueError(
                    f"{source}, line {line}: expected a caption, a tab and a URL, got {raw.rstrip()[:80]!r}"
                )
            writer.writerow([caption, url])
            pairs += 1
    if not pairs:
        raise ValueError(f"{source} has no pairs")
    return pairs


def command(folder: Path, image_size: int, processes: int, threads: int) -> list[str]:
    """The img2dataset call: shards of 10,000, shorter side reduced to `image_size`, continued when they are
    there.
    """
    return [
        "img2dataset",
        "--url_list",
        str(folder / "pairs.tsv"),
        "--input_format",
        "tsv",
        "--url_col",
        "url",
        "--caption_col",
        "caption",
        "--output_format",
        "webdataset",
        "--output_folder",
        str(folder),
        "--number_sample_per_shard",
        "10000",
        "--image_size",
        str(image_size),
        "--resize_mode",
        "keep_ratio",
        "--resize_only_if_bigger",
        "True",
        "--processes_count",
        str(processes),
        "--thread_count",
        str(threads),
        "--incremental_mode",
        "incremental",
        "--enable_wandb",
        "False",
    ]


def report(folder: Path, listed: int, workers: int, overlap: list[str] | None) -> int:
    """Check the shards, write FOLDER/check.json and print how many pairs survived."""
    found = check(str(folder / "*.tar"), overlap_with=overlap, workers=workers)
    (folder / "check.json").write_text(json.dumps(found, indent=1) + "\n")
    print(
        f"{found['good']} of {listed} pairs ({100 * found['good'] / listed:.1f} %) are whole; faults: "
        f"{found['faults'] or 'none'}; "
        f"every number is in {folder / 'check.json'}"
    )
    return 0 if found["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
