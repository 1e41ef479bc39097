"""What knowing pairs is worth, by runs that differ in nothing else.

    python benchmarks/pair_ids.py duplicates      # 15 runs of about a minute, two at a time: generated scenes, no download
    python benchmarks/pair_ids.py captions        # 6 runs of some minutes: $CLIPKIT_TEST_DATA/flickr8k-mini

`duplicates`: every training scene is drawn 40 times, told from either of its shapes, so that a batch of 256 is full of
false negatives whose truth is known. Retrieval among 500 unseen scenes and zero-shot over 64 classes, without ids, with
ids of equal captions (which miss a scene told from the other shape), and with the truth (`json:scene`), as positives
and masked.

An exact copy is a mild false negative to `infonce`: what pushes its text away is smaller than what pulls it near, by its
own pair. Whether ids help is what this measures, for either loss; it is not taken for granted.

`captions`: one caption a picture and step, each in turn, against five, over the same number of pictures.

Prints a table of mean, smallest and largest over the seeds, and one line of JSON. Runs are kept under --runs, and one
that is finished is not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import harness

DUPLICATES = {
    "no ids": (),
    "captions, positive": ("data.pair_ids=caption", "loss.{loss}.same_ids=positive"),
    "captions, masked": ("data.pair_ids=caption", "loss.{loss}.same_ids=mask"),
    "truth, positive": ("data.pair_ids=json:scene", "loss.{loss}.same_ids=positive"),
    "truth, masked": ("data.pair_ids=json:scene", "loss.{loss}.same_ids=mask"),
}
CAPTIONS = {"one caption": (), "five captions": ("data.captions_per_image=5",)}
LOSSES = {
    "infonce": ("loss=infonce",),
    # Zhai et al. 2023, section 3.2.
    "sigmoid": ("loss=sigmoid", "init_logit_bias=-10", "init_logit_scale=10"),
}
SETS = {
    "duplicates": (("data.shapes.copies=40", "batch_size=256", "steps=350"), DUPLICATES),
    "captions": (("experiment=flickr8k_tiny", "num_threads=1"), CAPTIONS),
}
METRICS = ("text_to_image_R@1", "image_to_text_R@1", "text_to_image_R@10", "top1")


def train(overrides: tuple[str, ...], folder: Path) -> dict[str, float]:
    """The final metrics of a run."""
    command = [
        sys.executable,
        "-m",
        "clipkit.recipes.pretrain",
        *overrides,
        f"output_dir={folder}",
        "logger=none",
    ]
    with open(folder.parent / f"{folder.name}.log", "w", encoding="utf-8") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True, cwd=harness.ROOT)
    (summary,) = folder.rglob("summary.json")
    return json.loads(summary.read_text(encoding="utf-8"))["metrics"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", choices=sorted(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--loss", choices=sorted(LOSSES), default="infonce")
    parser.add_argument("--cases", nargs="+", help="some of the cases; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/pair_ids"), help="folder of the runs")
    parser.add_argument(
        "--set", nargs="*", default=[], help="further overrides of every run, such as steps=100"
    )
    arguments = parser.parse_args()
    common, cases = SETS[arguments.which]
    common += LOSSES[arguments.loss]
    if unknown := set(arguments.cases or ()) - set(cases):
        parser.error(f"no case {sorted(unknown)[0]!r}: they are {', '.join(cases)}")
    cases = {case: cases[case] for case in arguments.cases or cases}
    root = arguments.runs.resolve() / arguments.which
    root.mkdir(parents=True, exist_ok=True)
    jobs = {
        (case, seed): (
            (
                *common,
                *(one.format(loss=arguments.loss) for one in overrides),
                *arguments.set,
                f"seed={seed}",
            ),
            root / f"{arguments.loss}-{case.replace(', ', '-').replace(' ', '_')}-{seed}",
        )
        for seed in arguments.seeds
        for case, overrides in cases.items()
    }
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = dict(zip(jobs, pool.map(lambda job: train(*job), jobs.values())))
    rows: list[dict[str, Any]] = []
    for case in cases:
        metrics = [found[case, seed] for seed in arguments.seeds]
        for name in METRICS:
            values = [value for one in metrics for key, value in one.items() if key.endswith(f"/{name}")]
            if values:
                rows.append({"case": case, "metric": name, "values": values})
    print(
        f"{arguments.which}: {' '.join(['clipkit-pretrain', *common, *arguments.set])}, seeds {arguments.seeds}"
    )
    for row in rows:
        values = row["values"]
        print(
            f"{row['case']:20} {row['metric']:20} {statistics.mean(values):.4f}  ({min(values):.4f} to {max(values):.4f})"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
