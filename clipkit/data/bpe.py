"""CLIP's byte-pair encoding with open_clip's exact ids, an order of magnitude faster.

Two observations make it fast without changing an id. Byte pairs never cross white space, so every white-space
separated chunk can be looked up whole in a cache. And the cleaning (ftfy, HTML entities) leaves printable
ASCII without '&' as it is, so the common caption skips it.

Sources: Sennrich, Haddow, Birch, "Neural machine translation of rare words with subword units" (ACL 2016),
section 3.2; the vocabulary is OpenAI CLIP's, read from the merges file that the open_clip package carries.
"""

from __future__ import annotations

import gzip
import heapq
import html
import io
import re
import string
import zlib
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import ftfy
import regex

from clipkit.foreign import BrokenFile, permit, read_bytes

_PLAIN = re.compile(r"[\t\n\r -%'-~]*")
_ASCII_WORDS = re.compile(
    r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+", re.ASCII
)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_MERGES = 49152 - 256 - 2
_CACHED_CHUNKS = 200_000
# The merges file of CLIP has 1.3 MB, 3.2 MB unpacked.
_FILE_BYTES, _TEXT_BYTES = 16 << 20, 64 << 20
# Parts of a word from which merging by a heap is faster.
_LONG = 48


def merges_path() -> Path:
    """The merges file inside the installed open_clip package, found without importing the package."""
    spec = find_spec("open_clip")
    path = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz" if spec and spec.origin else None
    if path is None or not path.exists():
        raise RuntimeError(
            "the clip_bpe tokenizer reads its merges from open_clip: pip install open_clip_torch, "
            "or give tokenizer.merges=PATH of bpe_simple_vocab_16e6.txt.gz"
        )
    return path


def read_merges(path: str | Path | None) -> list[str]:
    """The merges of a gzip file, or of open_clip's; ValueError that names it, whatever is in it."""
    if path is None:
        path = merges_path()
    else:
        permit(path, "tokenizer.merges")
    shown = str(path)[:300]
    try:
        raw = read_bytes(path, limit=_FILE_BYTES)
    except (OSError, ValueError) as error:  # ValueError: no regular file, or a NUL in the name
        why = error.strerror if isinstance(error, OSError) else "it is no regular file of bounded size"
        raise BrokenFile(f"the merges file {shown} cannot be read: {why}") from None
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
            text = file.read(_TEXT_BYTES + 1)
        if len(text) > _TEXT_BYTES:
            raise BrokenFile(f"the merges file {shown} unpacks to more than {_TEXT_BYTES} bytes")
        if not text:
            raise BrokenFile(f"the merges file {shown} is empty")
        return text.decode("utf-8").split("\n")[1 : _MERGES + 1]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        raise BrokenFile(
            f"{shown} is no gzip file of merges: it is cut short, altered or another file"
        ) from None


def _byte_letters() -> dict[int, str]:
    """Bytes to printable letters: printable Latin-1 stands for itself, the rest is moved to U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    moved = (byte for byte in range(256) if byte not in letters)
    letters.update({byte: chr(256 + i) for i, byte in enumerate(moved)})
    return letters


class _Chunks(dict):
    """Chunk -> ids, filled on demand, emptied when it has grown large."""

    def __init__(self, pairs: BytePairs):
        super().__init__()
        self._pairs = pairs

    def __missing__(self, chunk: str) -> tuple[int, ...]:
        ids = self._pairs._encode(chunk)
        if len(chunk) <= 64:
            if len(self) >= _CACHED_CHUNKS:
                self.clear()
                self._pairs._words.clear()
            self[chunk] = ids
        return ids

    def __reduce__(self):
        return (_Chunks, (self._pairs,))


class BytePairs:
    """Text to ids.

    Args:
        merges: path of the gzip merges file, or the merges themselves, one "a b" each; None finds open_clip's file.

    Attributes:
        merges: the merges, where they are not open_clip's; else None.

    Raises:
        ValueError: the file is not there, or holds anything else; names it and quotes nothing of it.
    """

    def __init__(self, merges: str | Path | Sequence[str] | None = None):
        if merges is None or isinstance(merges, (str, Path)):
            name, lines = str(merges), read_merges(merges)
        else:
            name, lines = "the tokenizer's merges", list(merges)
        self.merges = lines if merges else None
        if len(lines) > _MERGES:
            raise BrokenFile(f"{name}: {len(lines)} merges, more than the {_MERGES} of CLIP")
        pairs = [tuple(line.split()) for line in lines]
        for number, pair in enumerate(pairs, 1):
            # open_clip counts blank lines too.
            if len(pair) not in (0, 2):
                raise BrokenFile(f"{name}: merge {number} is not two parts with a space between")
        self._letters = _byte_letters()
        alphabet = list(self._letters.values())
        vocabulary = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in pairs]
        vocabulary += ["<start_of_text>", "<end_of_text>"]
        self._ids = {token: i for i, token in enumerate(vocabulary)}
        self._ranks = {pair: i for i, pair in enumerate(pairs)}
        self.vocab_size = len(vocabulary)
        self.sot_id, self.eot_id = self._ids["<start_of_text>"], self._ids["<end_of_text>"]
        self._chunks, self._words = _Chunks(self), {}
        self._any_word = None

    def ids(self, text: str, limit: int, *, cleaned: bool = False) -> list[int]:
        """The text's ids without start and end, at least the first `limit` of them when there are so many.

        Args:
            cleaned: the text is as `canonicalize` leaves it, and not cleaned again: that could change it.
        """
        if not cleaned:
            text = _mended(text)
        chunks = text.lower().split()
        if len(chunks) <= limit:
            return list(chain.from_iterable(map(self._chunks.__getitem__, chunks)))
        out: list[int] = []
        for chunk in chunks:
            out += self._chunks[chunk]
            if len(out) >= limit:
                break
        return out

    def text(self, ids: Sequence[int]) -> str:
        """What ids stand for, in lower case and with a space after each word and mark."""
        tokens, bytes_of = (
            {i: token for token, i in self._ids.items()},
            {v: k for k, v in self._letters.items()},
        )
        words = "".join(tokens.get(one, "") for one in ids).split("</w>")
        raw = b" ".join(bytes(bytes_of[letter] for letter in word) for word in words)
        return raw.decode("utf-8", "replace").strip()

    def _encode(self, chunk: str) -> tuple[int, ...]:
        if chunk.isascii():
            words = [chunk] if chunk.isalpha() else _ASCII_WORDS.findall(chunk)
        else:
            words = self._unicode_words(chunk)
        out: list[int] = []
        for word in words:
            ids = self._words.get(word)
            if ids is None:
                ids = self._pairs(word)
                if len(word) <= 64:
                    self._words[word] = ids
            out += ids
        return tuple(out)

    def _unicode_words(self, chunk: str) -> list[str]:
        if self._any_word is None:
            self._any_word = regex.compile(
                r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
                regex.IGNORECASE,
            )
        return self._any_word.findall(chunk)

    def _pairs(self, word: str) -> list[int]:
        """One word's ids: the lowest-ranked neighbouring pair is merged everywhere, until none has a rank."""
        if word in ("<start_of_text>", "<end_of_text>"):
            return [self._ids[word]]
        if word.isascii() and word.isprintable():
            # A word that is a token is that token: the merges that made the token never crossed its ends.
            whole = self._ids.get(word + "</w>")
            if whole is not None:
                return [whole]
            parts = list(word)
        else:
            parts = [self._letters[byte] for byte in word.encode("utf-8")]
        parts[-1] += "</w>"
        rank = self._ranks.get
        if len(parts) > _LONG:
            parts = _merge_long(parts, self._ranks)
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:]))
            ranks = [rank(pair, _MERGES) for pair in pairs]
            lowest = min(ranks)
            if lowest == _MERGES:
                break
            at = ranks.index(lowest)
            if ranks.count(lowest) == 1:
                parts[at : at + 2] = ["".join(pairs[at])]
            else:
                parts = _merge_everywhere(parts, pairs[at])
        return [self._ids[part] for part in parts]


def _merge_long(parts: list[str], ranks: dict[tuple[str, ...], int]) -> list[str]:
    """What merging the lowest-ranked pair everywhere, again and again, leaves of a long word: in O(n log n).

    Parts are a linked list, candidate pairs a heap of (rank, place). A round takes all of one rank, from left to
    right, before it looks at the pairs that these merges made.
    """
    count = len(parts)
    after, before = list(range(1, count + 1)), list(range(-1, count - 1))
    text: list[str | None] = list(parts)
    rank = ranks.get
    heap = [(found, i) for i, pair in enumerate(zip(parts, parts[1:])) if (found := rank(pair)) is not None]
    heapq.heapify(heap)
    while heap:
        lowest, made = heap[0][0], []
        while heap and heap[0][0] == lowest:
            left = heapq.heappop(heap)[1]
            right = after[left]
            # An entry of parts that have been merged since.
            if right == count or rank((text[left], text[right])) != lowest:  # pyright: ignore[reportArgumentType]
                continue
            text[left] = f"{text[left]}{text[right]}"
            text[right], after[left] = None, after[right]
            if after[right] < count:
                before[after[right]] = left
            made.append(left)
        for left in made:
            for start in (before[left], left):
                if start >= 0 and text[start] is not None and after[start] < count:
                    found = rank((text[start], text[after[start]]))  # pyright: ignore[reportArgumentType]
                    if found is not None:
                        heapq.heappush(heap, (found, start))
    return [part for part in text if part is not None]


def _merge_everywhere(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged, i = [], 0
    while i < len(parts):
        if i + 1 < len(parts) and (parts[i], parts[i + 1]) == pair:
            merged.append(parts[i] + parts[i + 1])
            i += 2
        else:
            merged.append(parts[i])
            i += 1
    return merged


def canonicalize(text: str) -> str:
    """open_clip's `clean="canonicalize"`, which SigLIP's models were trained with: cleaned, "_" a space, ASCII
    punctuation left out, lower case, one space between words.
    """
    return " ".join(_mended(text).replace("_", " ").translate(_NO_PUNCTUATION).lower().split())


def _mended(text: str) -> str:
    """The text cleaned; printable ASCII without '&' needs none."""
    if "&" in text or not (text.isascii() and (text.isprintable() or _PLAIN.fullmatch(text))):
        return _clean(text)
    return text


def _clean(text: str) -> str:
    """open_clip's cleaning: mojibake mended, entities unescaped twice, white space collapsed."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return " ".join(text.split())
