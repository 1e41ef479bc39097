"""Embed, search and classify files with a trained model.

    clipkit-predict embed    runs/quickstart/default --images photos/ --output photos.npy
    clipkit-predict embed    runs/quickstart/default --texts captions.txt --output captions.parquet
    clipkit-predict search   runs/quickstart/default "a red circle" photos/ --top 5
    clipkit-predict search   runs/quickstart/default "a red circle" photos.npy
    clipkit-predict classify runs/quickstart/default photos/ --labels cat,dog --top 2
    clipkit-predict teacher  runs/quickstart/default 'shards/*.tar' --output teacher   # features for data.teacher

MODEL is a run or checkpoint folder, a folder that clipkit-export wrote, open_clip:NAME[=WEIGHTS],
open_clip:local-dir:FOLDER, open_clip:hf-hub:NAME, or (texts alone) sentence_transformers:FOLDER.
Results go to standard output, one JSON line a file or query. Images that cannot be read, and files of a folder whose
format is not read, are named on standard error and left out; the exit status is then 3, or 0 with --allow-skipped.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from clipkit.evals.classification import read_classes
from clipkit.evals.models import other_library
from clipkit.foreign import blamed_on, named_by
from clipkit.predict import Predictor, load_embeddings, save_embeddings, write_teacher

# The exit status of a command that has done its work but for files that could not be read.
SKIPPED = 3


def main(arguments: list[str] | None = None) -> None:
    """The console command."""
    given = _parser().parse_args(arguments)
    try:
        # A run or checkpoint folder may come from anybody; a file of images is the user's own.
        with blamed_on(given.model, settings=False):
            skipped = given.run(given)
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
    for path, reason in skipped.items():
        print(f"skipped {path}: {reason}", file=sys.stderr)
    if skipped and not given.allow_skipped:
        print(f"{len(skipped)} files were left out; --allow-skipped makes that a success", file=sys.stderr)
        sys.exit(SKIPPED)


def embed(given: argparse.Namespace) -> dict[str, str]:
    """Write the embeddings of images or of a text file's lines."""
    predictor = _predictor(given)
    if given.images:
        keys, features = predictor.embed_images(given.images)
    else:
        keys = [line for line in Path(given.texts).read_text("utf-8").splitlines() if line.strip()]
        features = predictor.embed_texts(keys)
    save_embeddings(given.output, keys, features)
    print(json.dumps({"output": given.output, "rows": len(keys), "dimensions": features.shape[1]}))
    return predictor.skipped


def search(given: argparse.Namespace) -> dict[str, str]:
    """Print the files nearest to a text."""
    predictor = _predictor(given)
    if Path(given.where).suffix in (".npy", ".parquet"):
        keys, features = load_embeddings(given.where)
    else:
        keys, features = predictor.embed_images(given.where)
    for key, score in predictor.search(given.query, keys, features, k=given.top):
        print(json.dumps({"file": key, "cosine": round(score, 6)}))
    return predictor.skipped


def classify(given: argparse.Namespace) -> dict[str, str]:
    """Print every file's likeliest labels."""
    labels = given.labels.split(",") if "," in given.labels else given.labels
    classes, _ = read_classes([label.strip() for label in labels] if isinstance(labels, list) else labels)
    predictor = _predictor(given)
    for key, found in predictor.classify(
        given.images, classes, templates=given.templates or "plain", k=given.top
    ):
        labels = [{"label": label, "probability": round(p, 6)} for label, p in found]
        for one in labels:
            if same := next((group for group in predictor.alike if one["label"] in group), None):
                one["same_prompt_as"] = [label for label in same if label != one["label"]]
        print(json.dumps({"file": key, "labels": labels}))
    return predictor.skipped


def teacher(given: argparse.Namespace) -> dict[str, str]:
    """Write the features of training data for data.teacher."""
    predictor = _predictor(given)
    able = ["image", "text"] if hasattr(predictor.encoder.model, "encode_image") else ["text"]
    table = Path(given.train[0]).suffix in (".csv", ".tsv", ".jsonl", ".parquet")
    data = {"kind": "table" if table else "shards", "train": given.train}
    if table:
        data["table"] = {"image": given.image, "caption": given.caption}
    written = write_teacher(
        predictor, data, given.output, name=given.model, sides=given.sides or able, half=given.half
    )
    print(json.dumps({"output": given.output, **written}))
    return {cause: f"{count} samples" for cause, count in written["skipped"].items()}


def _predictor(given: argparse.Namespace) -> Predictor:
    if other_library(given.model):
        return Predictor(given.model, device=given.device, batch_size=given.batch_size)
    with blamed_on(given.model), named_by(given.model):
        return Predictor(given.model, device=given.device, batch_size=given.batch_size)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clipkit-predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="embed|search|classify|teacher")
    for name, run, text in (
        ("embed", embed, "embeddings of images or texts to a file"),
        ("search", search, "the images of a folder nearest to a text"),
        ("classify", classify, "the likeliest of some labels for every image"),
        ("teacher", teacher, "features of training images and captions, for data.teacher"),
    ):
        command = commands.add_parser(name, help=text)
        command.set_defaults(run=run)
        command.add_argument("model", help="run or checkpoint folder, or open_clip:NAME[=WEIGHTS]")
        command.add_argument("--device", default="cpu")
        command.add_argument("--batch-size", type=int, default=64)
        command.add_argument(
            "--allow-skipped", action="store_true", help="end with 0 where files were left out, not with 3"
        )
        if name == "embed":
            source = command.add_mutually_exclusive_group(required=True)
            source.add_argument("--images", nargs="+", help="image files or folders")
            source.add_argument("--texts", help="text file, one text a line")
            command.add_argument(
                "--output", required=True, help=".npy (keys beside it in .keys.json) or .parquet"
            )
        elif name == "search":
            command.add_argument("query")
            command.add_argument("where", help="folder of images, or embeddings written by embed")
            command.add_argument("--top", type=int, default=5)
        elif name == "teacher":
            command.add_argument(
                "train", nargs="+", help="shards (paths, globs, braces), or a table of pictures"
            )
            command.add_argument("--output", required=True, help="folder to make")
            command.add_argument(
                "--sides", nargs="+", choices=("image", "text"), help="default: what the model encodes"
            )
            command.add_argument("--half", action="store_true", help="keep float16, in half the space")
            command.add_argument("--image", default="image", help="of a table: column with paths")
            command.add_argument(
                "--caption", default="caption", nargs="+", help="of a table: columns with captions"
            )
        else:
            command.add_argument("images", nargs="+", help="image files or folders")
            command.add_argument("--labels", required=True, help="a,b,c or a file with one a line")
            command.add_argument("--templates", nargs="+", help="such as 'a photo of a {}.'")
            command.add_argument("--top", type=int, default=1)
    return parser


if __name__ == "__main__":
    main()
