"""Conceptual Captions 3M: from Google's TSV to checked shards.

    python -m clipkit.recipes.prepare_cc3m Train_GCC-training.tsv data/cc3m/train
    python -m clipkit.recipes.prepare_cc3m Validation_GCC-1.1.0-Validation.tsv data/cc3m/val

Get the TSV files (caption, tab, URL; no header) at
https://ai.google.com/research/ConceptualCaptions/download. This program checks their form, runs img2dataset on
them, asks once more for what did not answer, and then runs clipkit-data check on what arrived. Run it again and
it goes on where it stopped.

img2dataset wants an older webdataset than clipkit, so it has an environment of its own: `--install` makes one,
or give the command of one that you have with `--img2dataset`.

    python -m venv ~/.cache/clipkit/img2dataset
    ~/.cache/clipkit/img2dataset/bin/pip install img2dataset

A URL that timed out, or whose server was busy or not found, is asked again in each further pass (`--passes`);
one that is gone (404, 410 and the like), or whose answer is no picture, is not. Shards of the second pass are
retry-1-00000.tar and so on, beside the first's.

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
import venv
from pathlib import Path

from clipkit.data import check
from clipkit.data.spec import cache_folder
from clipkit.data.tables import read_table

# What a server says of a page that is gone for good, or closed to us.
GONE = tuple(f"HTTP Error {status}" for status in (400, 401, 403, 404, 405, 406, 410, 414, 451))
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
    parser.add_argument(
        "--passes", type=int, default=2, help="how often a URL that does not answer is asked; default 2"
    )
    parser.add_argument("--img2dataset", type=Path, help="the command, in an environment of its own")
    parser.add_argument("--install", action="store_true", help="make that environment where there is none")
    options = parser.parse_args(arguments)
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        listed = with_header(Path(options.tsv), folder / "pairs.tsv")
        program = find_program(options.img2dataset, install=options.install)
    except (ValueError, OSError) as error:
        print(f"prepare_cc3m: {error}", file=sys.stderr)
        return 2
    # img2dataset takes every json here for a shard's statistics; earlier versions of this program left one.
    (folder / "check.json").unlink(missing_ok=True)
    print(
        f"{listed} pairs in {options.tsv} (the published files have {PUBLISHED['train']} and "
        f"{PUBLISHED['val']})",
        flush=True,
    )
    settings = (options.image_size, options.processes, options.threads)
    try:
        subprocess.run(command(program, folder, *settings), check=True)
        for number in range(1, options.passes):
            if not retry(program, folder, number, *settings):
                break
    except (subprocess.CalledProcessError, OSError) as error:
        print(f"prepare_cc3m: {error}; run this again to go on", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"prepare_cc3m: what did not answer is not asked again: {error}", file=sys.stderr)
    return report(folder, listed, options.check_workers, options.overlap)


def find_program(given: Path | None, *, install: bool) -> Path:
    """The img2dataset command; ValueError that says how to get one."""
    if given is not None:
        if not given.is_file():
            raise ValueError(f"--img2dataset: there is no {given}")
        return given
    environment = cache_folder({}) / "img2dataset"
    program = environment / "bin" / "img2dataset"
    if program.is_file():
        return program
    if not install:
        raise ValueError(
            f"there is no img2dataset in {environment}. It wants an older webdataset than clipkit and so has an "
            "environment of its own: run this again with --install, which makes it, or make it by "
            f"`python -m venv {environment}` and `{environment}/bin/pip install img2dataset`, or give "
            "--img2dataset the command of one that you have"
        )
    print(f"installing img2dataset in {environment}", flush=True)
    venv.create(environment, with_pip=True)
    try:
        subprocess.run([environment / "bin" / "pip", "install", "img2dataset"], check=True)
    except subprocess.CalledProcessError as error:
        raise ValueError(f"pip could not install img2dataset in {environment}: {error}") from None
    return program


def retry(program: Path, folder: Path, number: int, *settings: int) -> bool:
    """Ask again for what the pass before did not get, and put its shards beside the others; False: nothing is left.

    Raises:
        ValueError: the statistics of the pass before cannot be read.
    """
    before = folder if number == 1 else folder / f"retry-{number - 1}"
    own = folder / f"retry-{number}"
    finished = own / "finished"
    if not finished.exists():
        own.mkdir(exist_ok=True)
        pairs = unanswered(before)
        if not pairs:
            return False
        print(f"asking again for {len(pairs)} pairs that did not answer", flush=True)
        with open(own / "pairs.tsv", "w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out, delimiter="\t", lineterminator="\n")
            writer.writerows([("caption", "url"), *pairs])
        subprocess.run(command(program, own, *settings), check=True)
        # Where this is stopped, those that are left are renamed by the next run.
        for shard in sorted(own.glob("*.tar")):
            shard.rename(folder / f"retry-{number}-{shard.name}")
        finished.touch()
    return True


def unanswered(folder: Path) -> list[tuple[str, str]]:
    """(caption, URL) of a pass's pairs that may answer another time, from what img2dataset writes beside its shards."""
    pairs = []
    for table in sorted(folder.glob("[0-9]*.parquet")):
        for _, row in read_table(table, ["caption", "url", "status", "error_message"]):
            assert isinstance(row, dict)
            if row["status"] == "failed_to_download" and not str(row["error_message"]).startswith(GONE):
                pairs.append((row["caption"], row["url"]))
    return pairs


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


def command(program: Path, folder: Path, image_size: int, processes: int, threads: int) -> list[str]:
    """The img2dataset call: shards of 10,000, shorter side reduced to `image_size`, continued when they are
    there.
    """
    return [
        str(program),
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
    """Check the shards, write FOLDER/check/report.json and print how many pairs survived."""
    found = check(str(folder / "*.tar"), overlap_with=overlap, workers=workers)
    # Not beside the shards: see main.
    file = folder / "check" / "report.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")
    print(
        f"{found['good']} of {listed} pairs ({100 * found['good'] / listed:.1f} %) are whole; faults: "
        f"{found['faults'] or 'none'}; "
        f"every number is in {file}"
    )
    return 0 if found["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
