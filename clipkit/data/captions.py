"""What a sample's text and json files say of it: captions, cleaned of what nobody wrote."""

from __future__ import annotations

import json
import re
from typing import Any

from clipkit.data.faults import DataError

# What ftfy, which CLIP's tokenizer begins with, takes out too: terminal colours, control characters but tab, line feed,
# form feed and carriage return, and the mark that some programs begin a file with.
_UNWRITTEN = re.compile("\x1b\\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b\x0e-\x1f\x7f\ufeff]")


def clean_caption(text: str) -> str:
    """The caption without control characters and outer spaces; empty where no character is visible."""
    if not text.isprintable():
        text = _UNWRITTEN.sub("", text)
        if not any(letter.isprintable() and not letter.isspace() for letter in text):
            return ""
    return text.strip()


def parse_meta(raw: bytes) -> dict[str, Any] | list[str]:
    """A json file: an object, or a list of captions. DataError broken_json."""
    try:
        meta = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError("broken_json", str(error)[:200]) from None
    if isinstance(meta, dict) or (isinstance(meta, list) and all(isinstance(one, str) for one in meta)):
        return meta
    raise DataError("broken_json", f"expected an object or a list of captions, got {type(meta).__name__}")


def listed(meta: dict[str, Any] | list[str], key: str) -> list[str]:
    """The texts under a key, one or a list of them; a json that is a list itself is that of `captions`."""
    if isinstance(meta, list):
        return meta if key == "captions" else []
    value = meta.get(key)
    if isinstance(value, str):
        return [value]
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def decode_caption(raw: bytes) -> list[str]:
    """A caption file's text; none of an empty one. DataError caption_not_utf8."""
    try:
        return [raw.decode("utf-8")] if raw else []
    except UnicodeDecodeError as error:
        raise DataError("caption_not_utf8", str(error)) from None
