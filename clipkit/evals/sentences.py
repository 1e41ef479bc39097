"""Sentence similarity: STS12-16, STS Benchmark and SICK-R as SentEval lays them out, by SimCSE's protocol.

A set's score is 100 times Spearman's rank correlation between the cosine of the two sentences' features and
the human score, over the subsets of a year put together ("all": Gao et al., 2021, appendix B). A pair without
a gold score is left out, as SentEval does.

    FOLDER/downstream/STS/STS12-en-test/STS.input.NAME.txt, STS.gs.NAME.txt
    FOLDER/downstream/STS/STSBenchmark/sts-{train,dev,test}.csv
    FOLDER/downstream/SICK/SICK_{train,trial,test_annotated}.txt
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from clipkit.evals.encoder import Encoder
from clipkit.evals.interval import Scored, correlation_of
from clipkit.evals.tasks import register_task
from clipkit.foreign import VOCABULARY_BYTES, BrokenFile, permit, read_bytes, read_text
from clipkit.registry import unknown

# (first sentence, second sentence, gold score)
Pair = tuple[str, str, float]
# SimCSE's seven.
STANDARD = ("STS12", "STS13", "STS14", "STS15", "STS16", "STSB", "SICK-R")
_SICK = {
    "SICK_train.txt": "SICK-R-train",
    "SICK_trial.txt": "SICK-R-dev",
    "SICK_test_annotated.txt": "SICK-R",
}
_STSB = {"sts-train.csv": "STSB-train", "sts-dev.csv": "STSB-dev", "sts-test.csv": "STSB"}


def find_sets(folder: str | Path) -> dict[str, Callable[[], dict[str, list[Pair]]]]:
    """The sets under a SentEval folder: name -> reader of {subset: pairs}.

    Names: STS12 .. STS16 (test), STS12-train, STSB, STSB-dev, STSB-train, SICK-R, SICK-R-dev, SICK-R-train.
    """
    permit(folder, "folder")
    root = Path(folder)
    root = root / "downstream" if (root / "downstream").is_dir() else root
    sets: dict[str, Callable[[], dict[str, list[Pair]]]] = {}
    for year in sorted(root.glob("STS/STS*-en-*")):
        sets[year.name.replace("-en-test", "").replace("-en-", "-")] = partial(_read_year, year)
    for name, known in _STSB.items():
        if (path := root / "STS" / "STSBenchmark" / name).is_file():
            sets[known] = partial(_read_table, path, (5, 6, 4), header=False)
    for name, known in _SICK.items():
        if (path := root / "SICK" / name).is_file():
            sets[known] = partial(_read_table, path, (1, 2, 3), header=True)
    if not sets:
        raise ValueError(
            f"no STS or SICK set under {folder}: expected SentEval's folders downstream/STS and downstream/SICK"
        )
    return sets


def _read_year(folder: Path) -> dict[str, list[Pair]]:
    subsets = {}
    for path in sorted(folder.glob("STS.input.*.txt")):
        name = path.name[len("STS.input.") : -len(".txt")]
        sentences = read_lines(path)
        gold = read_lines(folder / f"STS.gs.{name}.txt")
        if len([line for line in sentences if line]) > len(gold):
            raise ValueError(f"{path} has more lines than its gold scores")
        rows: list[Pair] = []
        for number, (line, score) in enumerate(zip(sentences, gold, strict=False), 1):
            if score.strip():
                pair = line.split("\t")
                if len(pair) < 2:
                    raise BrokenFile(f"{path}, line {number}: expected two sentences with a tab between")
                where = f"{folder / f'STS.gs.{name}.txt'}, line {number}"
                rows.append((pair[0], pair[1], _score(score, where)))
        subsets[name] = rows
    if not subsets:
        raise ValueError(f"{folder} holds no STS.input.NAME.txt")
    return subsets


def _read_table(path: Path, columns: tuple[int, int, int], *, header: bool) -> dict[str, list[Pair]]:
    # Sentences hold unbalanced quotes: no csv reader.
    lines = [(number, line) for number, line in enumerate(read_lines(path), 1) if line.strip()]
    first, second, gold = columns
    rows: list[Pair] = []
    for number, line in lines[int(header) :]:
        row = line.split("\t")
        if len(row) <= max(columns):
            raise BrokenFile(
                f"{path}, line {number}: {len(row)} columns, expected {max(columns) + 1} or more"
            )
        rows.append((row[first], row[second].rstrip("\r"), _score(row[gold], f"{path}, line {number}")))
    return {"all": rows}


def read_lines(path: Path, *, encoding: str = "utf-8") -> list[str]:
    """A text file's lines, split at line feeds alone: str.splitlines would also split at \\x85 and the like.

    Raises:
        ValueError: it is not there, no regular file, or no such text; names it.
    """
    permit(path, "folder")
    try:
        if encoding == "utf-8":
            return read_text(path, limit=VOCABULARY_BYTES).removeprefix("\ufeff").split("\n")
        return read_bytes(path, limit=VOCABULARY_BYTES).decode(encoding).split("\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _score(text: str, where: str) -> float:
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise BrokenFile(f"{where}: the gold score is no number")
    return score


def spearman(similarity: Tensor, gold: Tensor) -> float:
    """Spearman's rank correlation of similarities (n,) with human scores (n,), in float64.

    As scipy.stats.spearmanr: what ties shares its mean rank, on both sides, and the number is Pearson's correlation of
    the ranks. Similarities that agree to 1e-12 differ by nothing but the rounding of a float64 product (two equal
    sentences have a cosine of 1 give or take 2e-16) and tie. Where all of them do, it is undefined, and 0 here.
    """
    if len(gold) < 2 or float(gold.min()) == float(gold.max()):
        raise ValueError(
            f"Spearman's correlation of {len(gold)} pairs is undefined: every gold score is the same"
        )
    a, b = _mean_ranks(similarity.double().round(decimals=12)), _mean_ranks(gold.double())
    a, b = a - a.mean(), b - b.mean()
    spread = float(a.norm() * b.norm())
    return float(a @ b) / spread if spread else 0.0


def _mean_ranks(values: Tensor) -> Tensor:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts.double() - 1) / 2)[inverse]


@register_task("sts")
class STS:
    """Semantic textual similarity: {set: 100 x Spearman, "average": over the sets scored}.

    Args:
        folder: SentEval's data folder.
        sets: names as find_sets gives them; None: every test set found, or every set where there is no test
            set.
        per_subset: also report each subset, as `STS12.MSRpar`.
    """

    def __init__(self, *, folder: str, sets: list[str] | None = None, per_subset: bool = False):
        found = find_sets(folder)
        if sets is None:
            sets = [name for name in STANDARD if name in found] or list(found)
        for name in sets:
            if name not in found:
                raise unknown(f"STS set under {folder}", name, found)
        self.sets, self.per_subset = {name: found[name] for name in sets}, per_subset
        # The subsets' names are in the files.
        self.metrics = None if per_subset else (*sets, "average")

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        metrics, scores = {}, []
        for name, read in self.sets.items():
            subsets = read()
            pairs = [pair for rows in subsets.values() for pair in rows]
            encoder.record.read(name, pairs, items=len(pairs))
            encoder.tell(f"{name}, {len(pairs)} pairs of sentences")
            features = encoder.texts([pair[0] for pair in pairs] + [pair[1] for pair in pairs]).double()
            similarity = torch.cosine_similarity(features[: len(pairs)], features[len(pairs) :], dim=1)
            gold = torch.tensor([pair[2] for pair in pairs], dtype=torch.float64)
            metrics[name] = 100 * spearman(similarity, gold)
            scores.append(metrics[name])
            encoder.record.scored[name] = correlation_of(similarity, gold)
            if self.per_subset and len(subsets) > 1:
                start = 0
                for subset, rows in subsets.items():
                    part = slice(start, start + len(rows))
                    metrics[f"{name}.{subset}"] = 100 * spearman(similarity[part], gold[part])
                    start += len(rows)
        encoder.record.scored["average"] = Scored(
            sum(one.n for one in encoder.record.scored.values()), chance=0.0
        )
        return {**metrics, "average": sum(scores) / len(scores)}
