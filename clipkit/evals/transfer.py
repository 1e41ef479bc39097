"""Sentence features as inputs of a classifier: SentEval's transfer tasks (Conneau and Kiela, 2018).

Logistic regression with SentEval's folds and grids:

    MR CR SUBJ MPQA  mean test accuracy of 10 stratified folds; in each, C of 2^-2 .. 2^3 by 10 inner folds
    SST2             C of 2^-2 .. 2^3 on the dev set, accuracy on the test set
    TREC             C of 2^-1 .. 2^5 by 10 folds of the training set, accuracy on the test set
    MRPC             as TREC on [|u - v|, u * v]; accuracy, and F1 as MRPC_F1

Samples are sorted by their number of words before they are split, as SentEval does. Files as SentEval's
get_transfer_data leaves them under FOLDER/downstream. Scores are per cent.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from clipkit.evals.encoder import Encoder
from clipkit.evals.logistic import fit_logistic, predict_logistic
from clipkit.evals.sentences import read_lines
from clipkit.evals.tasks import register_task
from clipkit.foreign import BrokenFile, permit
from clipkit.registry import unknown

SEED = 1111
SMALL_GRID = tuple(2.0**t for t in range(-2, 4))
LARGE_GRID = tuple(2.0**t for t in range(-1, 6))
_BINARY = {
    "MR": ("MR/rt-polarity.pos", "MR/rt-polarity.neg"),
    "CR": ("CR/custrev.pos", "CR/custrev.neg"),
    "SUBJ": ("SUBJ/subj.objective", "SUBJ/subj.subjective"),
    "MPQA": ("MPQA/mpqa.pos", "MPQA/mpqa.neg"),
}
_SST2 = tuple(f"SST/binary/sentiment-{part}" for part in ("train", "dev", "test"))
_TREC = ("TREC/train_5500.label", "TREC/TREC_10.label")
_MRPC = ("MRPC/msr_paraphrase_train.txt", "MRPC/msr_paraphrase_test.txt")
FILES = {**_BINARY, "SST2": _SST2, "TREC": _TREC, "MRPC": _MRPC}


@register_task("senteval")
class SentEval:
    """SentEval's transfer tasks: {task: accuracy in per cent, "average": over the tasks scored}.

    Args:
        folder: SentEval's data folder.
        tasks: of MR, CR, SUBJ, MPQA, SST2, TREC, MRPC; None: every one whose files are there.
        folds: 10 in the published protocol; fewer is faster and not comparable.
    """

    def __init__(self, *, folder: str, tasks: list[str] | None = None, folds: int = 10):
        permit(folder, "folder")
        self.root = Path(folder) / "downstream" if (Path(folder) / "downstream").is_dir() else Path(folder)
        here = [task for task, files in FILES.items() if all((self.root / name).is_file() for name in files)]
        for task in tasks or []:
            if task not in FILES:
                raise unknown("SentEval task", task, FILES)
            if task not in here:
                raise ValueError(f"SentEval task {task} needs {', '.join(FILES[task])} under {self.root}")
        self.tasks, self.folds = list(tasks or here), folds
        self.metrics = (*self.tasks, *(["MRPC_F1"] if "MRPC" in self.tasks else []), "average")
        if not self.tasks:
            raise ValueError(
                f"no SentEval task under {folder}: expected for instance downstream/MR/rt-polarity.pos"
            )

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        metrics = {}
        for task in self.tasks:
            encoder.tell(f"SentEval's {task}")
            if task in _BINARY:
                texts, labels = sorted_rows(read_binary(self.root, task))
                encoder.record.read(task, (texts, labels.tolist()), items=len(texts))
                metrics[task] = nested_accuracy(encoder.texts(texts), labels, folds=self.folds)
            elif task == "SST2":
                parts = [sorted_rows(read_sst2(self.root / name)) for name in _SST2]
                content = [(texts, labels.tolist()) for texts, labels in parts]
                encoder.record.read(task, content, items=len(parts[-1][0]))
                metrics[task] = dev_accuracy(*[(encoder.texts(texts), labels) for texts, labels in parts])
            elif task == "TREC":
                (train, y), (test, truth) = [sorted_rows(rows) for rows in read_trec(self.root)]
                content = (train, y.tolist(), test, truth.tolist())
                encoder.record.read(task, content, items=len(test))
                predicted = kfold_predict(encoder.texts(train), y, encoder.texts(test), folds=self.folds)
                metrics[task] = 100 * float((predicted == truth).double().mean())
            else:
                metrics |= self._mrpc(encoder)
        scored = [metrics[task] for task in self.tasks]
        return {**metrics, "average": sum(scored) / len(scored)}

    def _mrpc(self, encoder: Encoder) -> dict[str, float]:
        data, content = [], []
        for name in _MRPC:
            first, second, labels = read_mrpc(self.root / name)
            content.append((first, second, labels.tolist()))
            u, v = encoder.texts(first), encoder.texts(second)
            data.append((torch.cat([(u - v).abs(), u * v], dim=1), labels))
        encoder.record.read("MRPC", content, items=len(content[-1][0]))
        (train, y), (test, truth) = data
        predicted = kfold_predict(train, y, test, folds=self.folds)
        positive = int(((predicted == 1) & (truth == 1)).sum())
        f1 = 2 * positive / max(1, int((predicted == 1).sum() + (truth == 1).sum()))
        return {"MRPC": 100 * float((predicted == truth).double().mean()), "MRPC_F1": 100 * f1}


def read_binary(root: Path, task: str) -> list[tuple[str, int]]:
    """(sentence, 1 or 0) of the positive and then the negative file."""
    rows = []
    for name, label in zip(_BINARY[task], (1, 0), strict=True):
        rows += [(line.strip(), label) for _, line in _rows(root / name, encoding="latin-1")]
    return rows


def read_sst2(path: Path) -> list[tuple[str, int]]:
    """(sentence, label) of lines `sentence TAB label`."""
    rows = []
    for number, line in _rows(path):
        sentence, _, label = line.rpartition("\t")
        rows.append((sentence.strip(), _binary_label(label, path, number)))
    return rows


def read_trec(root: Path) -> list[list[tuple[str, int]]]:
    """Train and test rows (question, coarse class); lines are `COARSE:fine question`."""
    parts, classes = [], {}
    for name in _TREC:
        rows = []
        for number, line in _rows(root / name, encoding="latin-1"):
            kind, _, question = line.partition(" ")
            coarse, colon, _ = kind.partition(":")
            if not colon or (parts and coarse not in classes):
                raise BrokenFile(
                    f"{root / name}, line {number}: expected `COARSE:fine question` with a known class"
                )
            rows.append((question.strip(), coarse))
        classes = classes or {label: i for i, label in enumerate(sorted({label for _, label in rows}))}
        parts.append(rows)
    return [[(question, classes[label]) for question, label in part] for part in parts]


def read_mrpc(path: Path) -> tuple[list[str], list[str], Tensor]:
    """First sentences, second sentences, (n,) labels, sorted by their numbers of words."""
    rows = []
    for number, line in _rows(path)[1:]:
        row = line.rstrip("\r").split("\t")
        if len(row) < 5:
            raise BrokenFile(f"{path}, line {number}: {len(row)} columns, expected 5")
        rows.append((_binary_label(row[0], path, number), row[0], row[3], row[4]))
    rows.sort(key=lambda row: (len(row[2].split()), len(row[3].split()), row[1]))
    return [row[2] for row in rows], [row[3] for row in rows], torch.tensor([row[0] for row in rows])


def _rows(path: Path, *, encoding: str = "utf-8") -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers; a file without any is an error."""
    rows = [
        (number, line) for number, line in enumerate(read_lines(path, encoding=encoding), 1) if line.strip()
    ]
    if not rows:
        raise BrokenFile(f"{path} has no rows")
    return rows


def _binary_label(text: str, path: Path, number: int) -> int:
    if text.strip() not in ("0", "1"):
        raise BrokenFile(f"{path}, line {number}: the label is neither 0 nor 1")
    return int(text.strip())


def sorted_rows(rows: list[tuple[str, int]]) -> tuple[list[str], Tensor]:
    """Sentences and (n,) labels by number of words, then label."""
    rows = sorted(rows, key=lambda row: (len(row[0].split()), row[1]))
    return [text for text, _ in rows], torch.tensor([label for _, label in rows])


def fold_masks(labels: Tensor, folds: int) -> Tensor:
    """(folds, n) true where a row is in that fold's test part: scikit-learn's StratifiedKFold(shuffle, seed
    1111).
    """
    try:
        from sklearn.model_selection import StratifiedKFold
    except ImportError as error:
        raise ImportError("SentEval's folds are scikit-learn's: pip install scikit-learn") from error

    splits = StratifiedKFold(n_splits=folds, shuffle=True, random_state=SEED).split(
        torch.zeros(len(labels)), labels.numpy()
    )
    masks = torch.zeros(folds, len(labels), dtype=torch.bool)
    for mask, (_, test) in zip(masks, splits, strict=True):
        mask[torch.from_numpy(test)] = True
    return masks


def choose_by_folds(
    features: Tensor, labels: Tensor, grid: tuple[float, ...], folds: int, classes: int
) -> float:
    """The C of `grid` with the best mean accuracy over folds; the first of equally good ones."""
    masks = fold_masks(labels, folds)
    weights, bias = fit_logistic(
        features,
        labels,
        C=list(grid) * folds,
        weight=(~masks).repeat_interleave(len(grid), 0),
        classes=classes,
    )
    hit = (predict_logistic(features, weights, bias) == labels).reshape(folds, len(grid), -1)
    accuracy = (hit * masks[:, None]).sum(2).double() / masks.sum(1)[:, None]
    mean = accuracy.mean(0)
    return grid[int(torch.nonzero(mean >= mean.max() - 1e-12)[0])]


def nested_accuracy(features: Tensor, labels: Tensor, *, folds: int = 10) -> float:
    """Mean accuracy, per cent, of stratified folds that each choose C by inner folds."""
    classes, scores = int(labels.max()) + 1, []
    for test in fold_masks(labels, folds):
        x, y = features[~test], labels[~test]
        best = choose_by_folds(x, y, SMALL_GRID, folds, classes)
        predicted = predict_logistic(features[test], *fit_logistic(x, y, C=[best], classes=classes))[0]
        scores.append(100 * float((predicted == labels[test]).double().mean()))
    return sum(scores) / len(scores)


def dev_accuracy(
    train: tuple[Tensor, Tensor], dev: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> float:
    """Test accuracy, per cent, of the fit whose C is best on the dev set; each argument is (features,
    labels).
    """
    weights, bias = fit_logistic(*train, C=list(SMALL_GRID))
    accuracy = (predict_logistic(dev[0], weights, bias) == dev[1]).double().mean(1)
    best = int(torch.nonzero(accuracy == accuracy.max())[0])
    predicted = predict_logistic(test[0], weights[best : best + 1], bias[best : best + 1])[0]
    return 100 * float((predicted == test[1]).double().mean())


def kfold_predict(features: Tensor, labels: Tensor, test: Tensor, *, folds: int = 10) -> Tensor:
    """(n,) predictions for `test` of a fit on everything whose C was chosen by folds."""
    classes = int(labels.max()) + 1
    best = choose_by_folds(features, labels, LARGE_GRID, folds, classes)
    return predict_logistic(test, *fit_logistic(features, labels, C=[best], classes=classes))[0]
