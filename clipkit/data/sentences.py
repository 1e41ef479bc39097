"""Sentence batches for the NLI losses: triplets and labelled pairs, read whole, in an exact order.

Files are .jsonl, .csv, .tsv, .txt (tabs) or .parquet, with columns of one of these names:

triplets   sent0, sent1, hard_neg (SimCSE: Gao, Yao, Chen, EMNLP 2021), anchor, positive, negative, or premise,
           entailment, contradiction: a sentence, one that it entails, one that it contradicts. Or the columns of pairs:
           the k-th entailment of a premise in the file then stands beside its k-th contradiction
pairs      premise, hypothesis, label, or SNLI's and MNLI's own sentence1, sentence2, gold_label; label entailment,
           neutral, contradiction or 0, 1, 2

Left out and counted: rows with a blank sentence, and those without a gold label (SNLI's "-" and -1).
"""

from __future__ import annotations

import glob
import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipkit.data.captions import clean_caption
from clipkit.data.order import EpochOrder
from clipkit.data.tables import SUFFIXES, read_table
from clipkit.foreign import permit
from clipkit.registry import check_keys

LABELS = {"entailment": 0, "neutral": 1, "contradiction": 2}
_PAIR = (("premise", "hypothesis", "label"), ("sentence1", "sentence2", "gold_label"))
_TRIPLET = (
    ("sent0", "sent1", "hard_neg"),
    ("anchor", "positive", "negative"),
    ("premise", "entailment", "contradiction"),
)


class SentenceStream:
    """Endless sentence batches; see `create_sentences`.

    Attributes:
        triplets, pairs: how many of each there are.
        left_out: {file: {cause: rows}}; causes are "blank sentence" and "no gold label".
    """

    def __init__(
        self,
        triplets: list[tuple],
        pairs: list[tuple],
        *,
        tokenizer: Callable[[list[str]], torch.Tensor],
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        left_out: Mapping[str, Mapping[str, int]] | None = None,
    ):
        self.left_out = {file: dict(causes) for file, causes in (left_out or {}).items()}
        self._triplets, self._pairs, self._tokenizer = triplets, pairs, tokenizer
        self.triplets, self.pairs = len(triplets), len(pairs)
        self.batch_size, self._seed, self._rank, self._world_size = batch_size, seed, rank, world_size
        self._orders = {
            name: EpochOrder([len(rows)], seed=seed, name=name)
            for name, rows in (("triplets", triplets), ("pairs", pairs))
            if rows
        }
        self._position = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            batch = self._batch(self._position)
            self._position += self.batch_size * self._world_size
            yield batch

    def _rows(self, name: str, rows: list[tuple], start: int) -> list[tuple]:
        order = self._orders[name]
        first = start + self._rank * self.batch_size
        positions = np.arange(first, first + self.batch_size)
        return [rows[int(order.at(int(t // order.total), np.array([t % order.total]))[0])] for t in positions]

    def _batch(self, start: int) -> dict[str, torch.Tensor]:
        batch = {}
        if self._triplets:
            columns = zip(*self._rows("triplets", self._triplets, start))
            for name, column in zip(("premise", "entailment", "contradiction"), columns):
                batch[name] = self._tokenizer(list(column))
        if self._pairs:
            premise, hypothesis, labels = zip(*self._rows("pairs", self._pairs, start))
            batch["pair_premise"] = self._tokenizer(list(premise))
            batch["pair_hypothesis"] = self._tokenizer(list(hypothesis))
            batch["nli_labels"] = torch.tensor(labels, dtype=torch.int64)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain numbers."""
        return {"position": self._position, "seed": self._seed, "data": self._fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch that `state` was taken at. ValueError for another seed or other
        sentences.
        """
        if (state["seed"], state["data"]) != (self._seed, self._fingerprint()):
            raise ValueError(
                "the sentence position was saved with another seed or other sentences; use the same "
                "data.sentences and seed, or start a new run"
            )
        self._position = int(state["position"])

    def _fingerprint(self) -> str:
        text = repr((self._triplets, self._pairs)).encode("utf-8", "surrogateescape")
        return hashlib.blake2b(text, digest_size=16).hexdigest()


def create_sentences(
    spec: Mapping[str, Any],
    *,
    tokenizer: Callable[[list[str]], torch.Tensor],
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> SentenceStream:
    """An endless stream of NLI batches.

    Args:
        spec: {"triplets": file, glob or a list of these, "pairs": likewise}; either may be missing or None.
        tokenizer: texts -> (M, L) int64.
        batch_size: triplets, and pairs, a rank and batch.
        seed: decides the order, with the epoch.
        rank, world_size: this process's share.

    Returns:
        An iterable of {"premise", "entailment", "contradiction": (M, L) int64} for triplets and
        {"pair_premise", "pair_hypothesis": (P, L) int64, "nli_labels": (P,) int64: 0 entailment, 1 neutral, 2
        contradiction} for pairs.

    Raises:
        ValueError: no file, a missing file, a bad line (named by file and line), or fewer rows than a global
            batch. A row with a blank sentence, or without a gold label, is left out, counted and said.
    """
    check_keys(spec, ["triplets", "pairs"], "data.sentences")
    left_out: dict[str, Counter[str]] = {}
    triplets = [row for path in _files(spec.get("triplets")) for row in _read_triplets(path, left_out)]
    pairs = [row for path in _files(spec.get("pairs")) for row in _read(path, _PAIR, left_out)]
    if rank == 0:
        for file, causes in left_out.items():
            counts = ", ".join(f"{n} with {cause}" for cause, n in sorted(causes.items()))
            print(f"clipkit.data: {file}: left out {counts}", file=sys.stderr, flush=True)
    if not triplets and not pairs:
        raise ValueError(
            "data.sentences names no file: give data.sentences.triplets (sent0, sent1, hard_neg) for "
            "nli_contrastive, or data.sentences.pairs (premise, hypothesis, label) for nli_softmax"
        )
    for what, rows in (("triplets", triplets), ("pairs", pairs)):
        if rows and len(rows) < batch_size * world_size:
            raise ValueError(
                f"data.sentences.{what} has {len(rows)} rows, fewer than the global batch of {batch_size} x "
                f"{world_size} ranks; lower the sentence batch size"
            )
    return SentenceStream(
        triplets,
        pairs,
        tokenizer=tokenizer,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        left_out=left_out,
    )


def _files(names: Any) -> list[Path]:
    paths = []
    for name in [names] if isinstance(names, (str, Path)) else names or []:
        permit(name, "data.sentences")
        path = Path(name).expanduser()
        matches = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not matches:
            raise ValueError(f"data.sentences: there is no file {path}")
        for match in matches:
            permit(match, "data.sentences")
            if not match.is_file() or match.suffix.lower() not in SUFFIXES:
                raise ValueError(f"data.sentences: {match} is no file of {', '.join(SUFFIXES)}")
        paths += matches
    return paths


def _read(path: Path, names: tuple[tuple[str, ...], ...], left_out: dict[str, Counter[str]]) -> list[tuple]:
    """The rows of one file; ValueError names file and line."""
    rows, columns = [], names[0]
    counts: Counter[str] = Counter()
    for number, (line, row) in enumerate(read_table(path)):
        if isinstance(row, str):
            raise ValueError(f"{path}, line {line}: {row}")
        if not number:
            columns = _columns(path, line, row, names)
        texts, blank = [], False
        for column in columns:
            value = row.get(column)
            if column in ("label", "gold_label"):
                value = _label(value, path, line)
            elif (value is None and column in row) or (isinstance(value, str) and not clean_caption(value)):
                blank = True
            elif not isinstance(value, str):
                found = "missing" if value is None else repr(value)[:100]
                raise ValueError(
                    f"{path}, line {line}: {column} is {found}; expected a sentence (columns are "
                    f"{', '.join(columns)})"
                )
            elif not value.isascii() and _has_half_pairs(value):
                raise ValueError(
                    f"{path}, line {line}: {column} holds half of a surrogate pair, which is no text"
                )
            texts.append(value)
        if blank or texts[-1] is None:
            counts["blank sentence" if blank else "no gold label"] += 1
        else:
            rows.append(tuple(texts))
    if counts:
        left_out[str(path)] = left_out.get(str(path), Counter()) + counts
    if not rows:
        raise ValueError(
            f"{path} has no rows; expected {', '.join(names[0])}"
            + (f" (left out: {dict(counts)})" if counts else "")
        )
    return rows


def _columns(
    path: Path, line: int, row: Mapping[str, Any], names: tuple[tuple[str, ...], ...]
) -> tuple[str, ...]:
    """The names that a file's first row has; ValueError where it has none of them whole."""
    whole = [one for one in names if {*one} <= {*row}]
    if whole:
        return whole[0]
    nearest = max(names, key=lambda one: len({*one} & {*row}))
    missing = [name for name in nearest if name not in row]
    known = "; or ".join(", ".join(one) for one in names)
    raise ValueError(
        f"{path}, line {line}: {missing[0]} is missing: no column {missing[0]} among {', '.join(map(str, row))[:300]}. "
        f"Expected {known}"
    )


def _read_triplets(path: Path, left_out: dict[str, Counter[str]]) -> list[tuple]:
    """The triplets of a file, or those that its labelled pairs make."""
    rows = _read(path, (*_TRIPLET, *_PAIR), left_out)
    if not isinstance(rows[0][2], int):
        return rows
    kinds: dict[str, tuple[list[str], list[str]]] = {}
    for premise, hypothesis, label in rows:
        if label != LABELS["neutral"]:
            kinds.setdefault(premise, ([], []))[label == LABELS["contradiction"]].append(hypothesis)
    triplets = [(premise, *one) for premise, both in kinds.items() for one in zip(*both)]
    if not triplets:
        raise ValueError(f"{path} makes no triplet: no premise has both an entailment and a contradiction")
    return triplets


def _has_half_pairs(text: str) -> bool:
    """Whether json spelt what UTF-8 cannot hold."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _label(value: Any, path: Path, line: int) -> int | None:
    if isinstance(value, str) and value.strip().lower() in LABELS:
        return LABELS[value.strip().lower()]
    if value in ("-", "", -1, "-1"):
        return None
    if not isinstance(value, bool) and value in (0, 1, 2, "0", "1", "2"):
        return int(value)
    raise ValueError(
        f"{path}, line {line}: label is {repr(value)[:100]}; expected one of {', '.join(LABELS)}, 0, 1, 2, or - for "
        "none"
    )
