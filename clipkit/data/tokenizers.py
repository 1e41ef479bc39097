"""Tokenizers: text to a (B, L) table of ids, padded, truncated so that the end token stays.

    clip_bpe   CLIP's byte pairs, open_clip's exact ids (49,408 of them), pad 0
    words      a closed vocabulary of the words of the training captions; small, for generated data
    hf         any fast Hugging Face tokenizer, by hub name or local folder

`save` writes everything a run needs to make the same ids again as one JSON file; `load_tokenizer` reads it
back. It may come from anybody: it is checked whole, and opens no other file (one of an earlier version may name
its merges, see clipkit.foreign.permit).

Of a text longer than 100,000 characters the rest is not looked at.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tokenizers
import torch

from clipkit.data.bpe import BytePairs, canonicalize
from clipkit.foreign import VOCABULARY_BYTES, BrokenFile, checked, permit, read_json
from clipkit.registry import Registry, check_keys

_registry = Registry("tokenizer")
# A class of one's own: a Tokenizer whose arguments are its settings, and whose `state()` gives them back.
register_tokenizer = _registry.register
# Cleaning takes time for every character, and a text tower reads some hundred tokens.
MAX_CHARACTERS = 100_000
_MAX_CONTEXT = 65_536


class Tokenizer:
    """What every tokenizer has.

    Attributes:
        name: its registry name.
        context_length: L, the number of columns.
        vocab_size: ids are in [0, vocab_size).
        pad_id, sot_id, eot_id: padding, first and last token of a text. A vocabulary with one special token has
            it for all of them, and then none before a text.
        clean: None for the tokenizer's own way, or "canonicalize": lower case, no punctuation (SigLIP).
    """

    name: str
    clean: str | None = None
    context_length: int
    vocab_size: int
    pad_id: int
    sot_id: int
    eot_id: int

    def ids(self, text: str) -> list[int]:
        """The ids of one text without start, end and padding; may stop once context_length is filled."""
        raise NotImplementedError

    def words_of(self, ids: Sequence[int]) -> str:
        """The text of ids without start, end and padding."""
        return " ".join(map(str, ids))

    def decode(self, ids: Sequence[int]) -> str:
        """The text that a row of ids stands for, as the model reads it: cut to its length, unknown words marked."""
        words = list(ids)
        if words[:1] == [self.sot_id]:
            words = words[1:]
        if self.eot_id in words:
            words = words[: words.index(self.eot_id)]
        while words[-1:] == [self.pad_id]:
            words.pop()
        return self.words_of(words)

    def state(self) -> dict[str, Any]:
        """What `load_tokenizer` needs, as JSON values."""
        raise NotImplementedError

    def _cleaned(self, text: str) -> str:
        return canonicalize(text) if self.clean else text

    def _clean_state(self) -> dict[str, str]:
        return {"clean": self.clean} if self.clean else {}

    def __call__(self, texts: str | list[str]) -> torch.Tensor:
        """Ids of one text or a list of B texts: (B, L) int64."""
        texts = _cut(texts)
        room = self.context_length - 2
        flat: list[int] = []
        lengths = []
        for text in texts:
            ids = self.ids(text)
            if len(ids) > room:
                ids = ids[:room]
            flat.append(self.sot_id)
            flat += ids
            flat.append(self.eot_id)
            lengths.append(len(ids) + 2)
        table = np.full((len(texts), self.context_length), self.pad_id, dtype=np.int64)
        # All ids at once, row after row, where a row's length says that there is one.
        table[np.arange(self.context_length) < np.array(lengths, dtype=np.int64)[:, None]] = flat
        return torch.from_numpy(table)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as JSON, in one step."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps({"tokenizer": self.name, **self.state()}), encoding="utf-8")
        os.replace(part, path)


@_registry.register("clip_bpe")
class ClipBPE(Tokenizer):
    """CLIP's tokenizer (Radford et al. 2021, section 2.4), ids equal to open_clip's `SimpleTokenizer`.

    Args:
        context_length: tokens a text, start and end included.
        merges: the merges file, or the merges themselves ("a b" each); None takes those inside the open_clip
            package.
        clean: None for CLIP's own (mended, lower case), or "canonicalize".
    """

    name = "clip_bpe"

    def __init__(
        self,
        *,
        context_length: int = 77,
        merges: str | Path | Sequence[str] | None = None,
        clean: str | None = None,
    ):
        self.context_length, self.clean = _check_length(context_length), _check_clean(clean)
        self._pairs = BytePairs(merges)
        self.vocab_size = self._pairs.vocab_size
        self.pad_id, self.sot_id, self.eot_id = 0, self._pairs.sot_id, self._pairs.eot_id

    def ids(self, text: str) -> list[int]:
        return self._pairs.ids(self._cleaned(text), self.context_length, cleaned=bool(self.clean))

    def words_of(self, ids: Sequence[int]) -> str:
        return self._pairs.text(ids)

    def state(self) -> dict[str, Any]:
        return {"context_length": self.context_length, "merges": self._pairs.merges, **self._clean_state()}


_WORD = re.compile(r"[^\W_]+|[^\w\s]|_")


@_registry.register("words")
class Words(Tokenizer):
    """A closed vocabulary: ids 0 padding, 1 unknown, 2 start, then the words by alphabet, the end token last.

    Args:
        vocabulary: the words.
        context_length: tokens a text, start and end included.
        clean: None, or "canonicalize".
    """

    name = "words"

    def __init__(self, *, vocabulary: Iterable[str], context_length: int = 16, clean: str | None = None):
        self.context_length, self.clean = _check_length(context_length), _check_clean(clean)
        self.words = sorted(set(vocabulary))
        self._ids = {word: i for i, word in enumerate(self.words, start=3)}
        self.pad_id, self.unk_id, self.sot_id, self.eot_id = 0, 1, 2, len(self.words) + 3
        self.vocab_size = self.eot_id + 1

    @classmethod
    def build(
        cls,
        captions: Iterable[str],
        *,
        context_length: int = 16,
        max_words: int = 50_000,
        min_count: int = 1,
        clean: str | None = None,
    ) -> Words:
        """The vocabulary of `captions`: the `max_words` commonest words seen at least `min_count` times."""
        counts: Counter[str] = Counter()
        clean = _check_clean(clean)
        for caption in captions:
            caption = canonicalize(caption) if clean else caption
            counts.update(_WORD.findall(caption.lower()))
        if not counts:
            raise ValueError(
                "the words tokenizer found no word in the training captions: give data.train shards "
                "whose captions are not empty"
            )
        kept = sorted(
            (word for word, n in counts.items() if n >= min_count), key=lambda word: (-counts[word], word)
        )
        return cls(vocabulary=kept[:max_words], context_length=context_length, clean=clean)

    def ids(self, text: str) -> list[int]:
        return [self._ids.get(word, self.unk_id) for word in _WORD.findall(self._cleaned(text).lower())]

    def words_of(self, ids: Sequence[int]) -> str:
        return " ".join("<unknown>" if one == self.unk_id else self.words[one - 3] for one in ids)

    def state(self) -> dict[str, Any]:
        return {"context_length": self.context_length, "vocabulary": self.words, **self._clean_state()}


@_registry.register("hf")
class HuggingFace(Tokenizer):
    """A fast Hugging Face tokenizer with its own special tokens.

    Args:
        backend: a `tokenizers.Tokenizer`.
        context_length: tokens a text, special tokens included.
        special: {"pad": id, "sot": id, "eot": id}.
        clean: None, or "canonicalize".

    Raises:
        ValueError: an id that the vocabulary does not have.
    """

    name = "hf"

    def __init__(
        self, *, backend: Any, context_length: int, special: Mapping[str, int], clean: str | None = None
    ):
        self.context_length, self.clean = _check_length(context_length), _check_clean(clean)
        self._backend = backend
        self.pad_id, self.sot_id, self.eot_id = special["pad"], special["sot"], special["eot"]
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        for name, one in special.items():
            if not 0 <= one < self.vocab_size or backend.id_to_token(one) is None:
                raise ValueError(f"special.{name} is {one}, which is no token of the {self.vocab_size}")
        backend.enable_truncation(self.context_length)
        backend.enable_padding(
            length=self.context_length, pad_id=self.pad_id, pad_token=backend.id_to_token(self.pad_id)
        )

    @classmethod
    def build(cls, model: str, *, context_length: int = 77, clean: str | None = None) -> HuggingFace:
        """Load `model`, a hub name or a folder (a folder may hold nothing but the vocabulary files).

        One that puts no end token behind a text, as GPT-2's, is made to: its own start token (where it has another
        than the end token), the text, the end token.
        """
        fast = _load_hf(model)
        pad, sot, eot = fast.pad_token_id, fast.cls_token_id, fast.sep_token_id
        eot = fast.eos_token_id if eot is None else eot
        sot = fast.bos_token_id if sot is None else sot
        if eot is None:
            raise ValueError(
                f"the tokenizer {model!r} has no end token (sep_token or eos_token), which pools the text"
            )
        special = {"pad": eot if pad is None else pad, "sot": eot if sot is None else sot, "eot": eot}
        backend = _with_end_token(fast.backend_tokenizer, special, model)
        return cls(backend=backend, context_length=context_length, special=special, clean=clean)

    def ids(self, text: str) -> list[int]:
        return self._backend.encode(self._cleaned(text), add_special_tokens=False).ids

    def words_of(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def __call__(self, texts: str | list[str]) -> torch.Tensor:
        texts = [self._cleaned(text) for text in _cut(texts)]
        rows = [encoding.ids for encoding in self._backend.encode_batch(texts)]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.context_length)

    def state(self) -> dict[str, Any]:
        special = {"pad": self.pad_id, "sot": self.sot_id, "eot": self.eot_id}
        return {
            "context_length": self.context_length,
            "special": special,
            "backend": self._backend.to_str(),
            **self._clean_state(),
        }


def list_tokenizers() -> list[str]:
    """The names `create_tokenizer` knows."""
    return _registry.names()


def create_tokenizer(
    spec: str | Mapping[str, Any], *, captions: Iterable[str] | Callable[[], Iterable[str]] | None = None
) -> Tokenizer:
    """A tokenizer from its settings.

    Args:
        spec: a name, or {"name": ..., settings}. clip_bpe: context_length (tokens), merges (path). words:
            context_length, max_words, min_count. hf: model (hub name or folder), context_length. All of these:
            clean. Any of them: path alone, a JSON file that `save` wrote.
        captions: the training captions (or a function that gives them), read by "words" alone.

    Raises:
        ValueError: an unknown name or setting, or "words" without captions.
    """
    check_tokenizer(spec)
    spec = {"name": spec} if isinstance(spec, str) else dict(spec)
    name, path = spec.pop("name", None), spec.pop("path", None)
    if path:
        permit(path, "tokenizer.path")
        return load_tokenizer(path)
    if name == "clip_bpe":
        return ClipBPE(**spec)
    if name == "hf":
        permit(spec["model"], "tokenizer.model")
        return HuggingFace.build(**spec)
    if name not in _STATES:
        # null: its own default, where the YAML it starts from has a setting that it lacks.
        return _registry.get(name)(**{key: value for key, value in spec.items() if value is not None})
    if captions is None:
        raise ValueError(
            "tokenizer words is built from the training captions: pass captions=..., or tokenizer.path of "
            "a saved one"
        )
    return Words.build(captions() if callable(captions) else captions, **spec)


_SETTINGS = {
    "clip_bpe": ("context_length", "merges", "clean"),
    "words": ("context_length", "max_words", "min_count", "clean"),
    "hf": ("model", "context_length", "clean"),
}


def check_tokenizer(spec: str | Mapping[str, Any]) -> None:
    """ValueError for an unknown name, or a setting that what it names does not take; no file is looked at."""
    spec = {"name": spec} if isinstance(spec, str) else spec
    if spec.get("path"):
        return
    name = spec.get("name")
    known = _settings(_registry.get(name), str(name))
    given = [key for key in spec if key not in ("name", "path")]
    if name not in _STATES:
        given = [key for key in given if spec[key] is not None]
    check_keys(given, known, f"tokenizer {name}")
    for key, least in (("context_length", 3), ("max_words", 1), ("min_count", 1)):
        value = spec.get(key, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"tokenizer.{key}={value!r}: expected a whole number, {least} or more")
    _check_clean(spec.get("clean"))
    if name == "hf" and not spec.get("model"):
        raise ValueError(
            "tokenizer hf needs tokenizer.model: a hub name such as roberta-base, or a local folder"
        )


def _settings(made: Any, name: str) -> Iterable[str]:
    return _SETTINGS.get(name) or inspect.signature(made).parameters


class _ClipState(msgspec.Struct, forbid_unknown_fields=True):
    context_length: int
    # A list; a path in files of earlier versions.
    merges: list[str] | str | None = None
    clean: str | None = None


class _WordsState(msgspec.Struct, forbid_unknown_fields=True):
    context_length: int
    vocabulary: list[str]
    clean: str | None = None


class _Special(msgspec.Struct, forbid_unknown_fields=True):
    pad: int
    sot: int
    eot: int


class _HuggingFaceState(msgspec.Struct, forbid_unknown_fields=True):
    context_length: int
    special: _Special
    backend: str
    clean: str | None = None


_STATES = {"clip_bpe": _ClipState, "words": _WordsState, "hf": _HuggingFaceState}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer that `save` wrote to `path`.

    Raises:
        ValueError: the file is not there, or is not what `save` writes; names it and quotes nothing of it.
    """
    path = Path(path)
    try:
        found = read_json(path, dict[str, Any], limit=VOCABULARY_BYTES)
    except (OSError, ValueError) as error:
        raise BrokenFile(f"{path} is not a tokenizer file written by clipkit: {error}") from None
    name = found.pop("tokenizer", None)
    if not isinstance(name, str) or name not in _registry.names():
        raise BrokenFile(
            f"{path} is not a tokenizer file written by clipkit: it names no tokenizer that there is"
        )
    if name not in _STATES:
        return _own(name, found, path)
    state: Any = checked(found, _STATES[name], name=str(path))
    try:
        if name == "clip_bpe":
            return ClipBPE(context_length=state.context_length, merges=state.merges, clean=state.clean)
        if name == "words":
            return Words(vocabulary=state.vocabulary, context_length=state.context_length, clean=state.clean)
        return _checked_backend(state)
    except ValueError as error:
        raise BrokenFile(f"{path} is not a tokenizer file written by clipkit: {error}") from None


def _own(name: str, state: dict[str, Any], path: Path) -> Tokenizer:
    """A registered tokenizer from what its `state()` gave."""
    made = _registry.get(name)
    try:
        check_keys(state, _settings(made, name), f"tokenizer {name}")
        return made(**state)
    except (TypeError, ValueError) as error:
        raise BrokenFile(f"{path} is no tokenizer {name}: {error}") from None


def _checked_backend(state: _HuggingFaceState) -> HuggingFace:
    """The tokenizer of a state whose backend anybody may have written; ValueError where it makes no ids."""
    special = {"pad": state.special.pad, "sot": state.special.sot, "eot": state.special.eot}
    try:
        backend = tokenizers.Tokenizer.from_str(state.backend)
        made = HuggingFace(
            backend=backend, context_length=state.context_length, special=special, clean=state.clean
        )
        tried = made(["a word", ""])
    except ValueError:
        raise
    except BaseException as error:
        # The library raises plain Exceptions, and its Rust code panics by a BaseException.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError("its backend is no tokenizer that the tokenizers library takes") from None
    if int(tried.min()) < 0 or int(tried.max()) >= made.vocab_size:
        raise ValueError("its backend gives ids beyond its vocabulary")
    return made


def _cut(texts: str | Iterable[str]) -> list[str]:
    """The texts as a list, none longer than is looked at."""
    return [text[:MAX_CHARACTERS] for text in ([texts] if isinstance(texts, str) else texts)]


def _check_length(context_length: int) -> int:
    if not isinstance(context_length, int) or not 3 <= context_length <= _MAX_CONTEXT:
        raise ValueError(
            f"context_length is {str(context_length)[:50]!s}; expected a whole number of tokens, 3 or more (start, "
            f"one word, end) and at most {_MAX_CONTEXT}"
        )
    return context_length


def _check_clean(clean: Any) -> str | None:
    if clean not in (None, "canonicalize"):
        raise ValueError(
            f"tokenizer.clean is {str(clean)[:50]!r}; expected null (the tokenizer's own way) or canonicalize"
        )
    return clean


def _with_end_token(backend: Any, special: Mapping[str, int], model: str) -> Any:
    """The backend, made to end every text with the end token where it does not."""
    # Published files may pad to a length of their own (all-MiniLM-L6-v2: 128).
    backend.no_padding()
    backend.no_truncation()
    bare = backend.encode("a", add_special_tokens=False).ids
    framed = backend.encode("a").ids
    if framed and framed[-1] == special["eot"]:
        return backend
    start = [special["sot"]] if special["sot"] != special["eot"] else []
    if framed not in (bare, [*start, *bare]):
        raise ValueError(
            f"the tokenizer {model!r} puts {backend.id_to_token(framed[-1])!r} behind a text, not its end token "
            f"{backend.id_to_token(special['eot'])!r}, which pools the text: mend its tokenizer.json"
        )
    names = [backend.id_to_token(one) for one in (*start, special["eot"])]
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=[*names[:-1], "$A", names[-1]], special_tokens=[*zip(names, (*start, special["eot"]))]
    )
    return backend


def _load_hf(model: str) -> Any:
    """The transformers tokenizer of a hub name or folder; vocabulary files alone are enough for RoBERTa and
    BERT.
    """
    import transformers

    folder = Path(model)
    if (
        folder.is_dir()
        and not (folder / "tokenizer.json").exists()
        and not (folder / "tokenizer_config.json").exists()
    ):
        if (folder / "merges.txt").exists():
            return transformers.RobertaTokenizerFast.from_pretrained(str(folder))
        if (folder / "vocab.txt").exists():
            # transformers makes the name when it is asked for.
            fast = transformers.BertTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]
            return fast.from_pretrained(str(folder))
    try:
        fast = transformers.AutoTokenizer.from_pretrained(model, use_fast=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer hf could not load {model!r}: {str(error).splitlines()[0]} Give a hub name that is "
            "in the local cache, or a folder with the tokenizer's files."
        ) from None
    if not getattr(fast, "is_fast", False):
        raise ValueError(
            f"{model!r} has no fast tokenizer; convert it (save tokenizer.json) and give the folder"
        )
    return fast
