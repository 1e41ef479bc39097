"""Sentence batches for the NLI losses: triplets and labelled pairs, read whole, in an exact order.

triplets   jsonl lines {"sent0", "sent1", "hard_neg"}: a premise, a sentence it entails, one it
           contradicts; or the csv of SimCSE (Gao, Yao, Chen, EMNLP 2021) with these columns
pairs      jsonl lines {"premise", "hypothesis", "label"}; label entailment, neutral, contradiction or 0,
           1, 2 (SNLI's "-" and -1, pairs without a gold label, are left out)
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipkit.data.order import EpochOrder
from clipkit.foreign import permit
from clipkit.registry import check_keys

LABELS = {"entailment": 0, "neutral": 1, "contradiction": 2}
_TRIPLET, _PAIR = ("sent0", "sent1", "hard_neg"), ("premise", "hypothesis", "label")


class SentenceStream:
    """Endless sentence batches; see `create_sentences`.

    Attributes:
        triplets, pairs: how many of each there are.
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
    ):
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
        spec: {"triplets": file or files, "pairs": file or files}, jsonl or csv; either may be missing or
            None.
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
            batch.
    """
    check_keys(spec, ["triplets", "pairs"], "data.sentences")
    triplets = [row for path in _files(spec.get("triplets")) for row in _read(path, _TRIPLET)]
    pairs = [row for path in _files(spec.get("pairs")) for row in _read(path, _PAIR)]
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
    )


def _files(names: Any) -> list[Path]:
    if not names:
        return []
    paths = [Path(name).expanduser() for name in ([names] if isinstance(names, (str, Path)) else names)]
    for path in paths:
        permit(path, "data.sentences")
        if not path.is_file():
            raise ValueError(f"data.sentences: there is no file {path}")
    return paths


def _read(path: Path, columns: tuple[str, ...]) -> list[tuple]:
    """The rows of one file; ValueError names file and line."""
    rows = []
    for line, row in _csv(path, columns) if path.suffix == ".csv" else _jsonl(path):
        texts = []
        for column in columns:
            value = row.get(column)
            if column == "label":
                value = _label(value, path, line)
            elif not isinstance(value, str) or not value.strip():
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
        if texts[-1] is not None:
            rows.append(tuple(texts))
    if not rows:
        raise ValueError(f"{path} has no rows; expected {', '.join(columns)}")
    return rows


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


def _jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    with open(path, "rb") as file:
        for line, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {line}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {line}: expected an object, got {type(row).__name__}")
            yield line, row


def _csv(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        try:
            missing = set(columns) - set(reader.fieldnames or ())
            if missing:
                raise ValueError(
                    f"{path}, line 1: no column {', '.join(sorted(missing))}; the header is "
                    f"{reader.fieldnames}, expected {', '.join(columns)}"
                )
            for row in reader:
                yield reader.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, near line {reader.line_num}: {error}") from None
