"""State dicts out of files that anybody may have written: safetensors, torch's own format, TorchScript archives as OpenAI's.

None of them is executed. torch's files are read by its restricted unpickler (`weights_only=True`); of a TorchScript archive,
which torch itself would load with the code in it, the pickle is read here by stand-ins for the few names that tensors and
modules are written with.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clipkit.foreign import BrokenFile

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# What OpenAI's archives hold beside their weights.
_NUMBERS = ("input_resolution", "context_length", "vocab_size")


def read_state_dict(path: str | Path) -> tuple[dict[str, Tensor], bool]:
    """(name to tensor, whether the file is a TorchScript archive) of a weights file.

    A training checkpoint's `state_dict` is taken out of it, and DistributedDataParallel's `module.` off its names.

    Raises:
        BrokenFile: it is cut short, altered, or holds anything but tensors by name.
        OSError: it is not there.
    """
    path = Path(path)
    if not path.is_file():
        raise BrokenFile(f"{path} is not a file of weights ({', '.join(SUFFIXES)})")
    if path.stat().st_size == 0:
        raise BrokenFile(f"{path} is empty: it holds no weights")
    archive = False
    if path.suffix == ".safetensors":
        try:
            found: Any = load_file(path)
        except SafetensorError as error:
            raise BrokenFile(
                f"{path} is no safetensors file, or not all of one ({str(error)[:200]})"
            ) from None
    elif _is_torch_script(path):
        found, archive = _read_torch_script(path), True
    else:
        found = _read_torch(path)
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not found:
        raise BrokenFile(f"{path} holds no tensors by name")
    odd = [
        str(name)[:80]
        for name, value in found.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if odd:
        raise BrokenFile(f"{path} is no state dict: {odd[0]!r} is no tensor")
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}, archive


def _read_torch(path: Path) -> Any:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # torch stores; what deflates may take any amount of memory.
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise BrokenFile(
                        f"{path} is compressed, as no file that torch.save wrote is: it was not loaded"
                    )
        return torch.load(path, map_location="cpu", weights_only=True)
    except (BrokenFile, OSError):
        raise
    except Exception:
        # torch's own words advise to load it as a pickle, which runs what it holds.
        raise BrokenFile(
            f"{path} was not loaded: it is damaged, or holds more than tensors and plain values. Save its state dict alone "
            "(torch.save(model.state_dict(), ...), or safetensors)"
        ) from None


def _is_torch_script(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


class _Storage:
    """Stands for a storage class of torch's, such as HalfStorage."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype


class _Module:
    """Stands for a module of the archive, whatever its class: its attributes by name."""

    state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


_DTYPES = {
    "HalfStorage": torch.float16, "FloatStorage": torch.float32, "DoubleStorage": torch.float64,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "BoolStorage": torch.bool, "ByteStorage": torch.uint8,
}  # fmt: skip
# Python's own unpickler: C's allocates what a memo's number claims. typeshed does not list it.
_Unpickler: Any = getattr(pickle, "_Unpickler")  # noqa: B009


class _ScriptUnpickler(_Unpickler):
    """Makes tensors of the archive's own bytes, stand-ins for its modules, and nothing else."""

    def __init__(self, content: bytes, archive: zipfile.ZipFile, prefix: str):
        super().__init__(io.BytesIO(content))
        self.archive, self.prefix = archive, prefix

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        if module == "torch" and name in _DTYPES:
            return _Storage(_DTYPES[name])
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor")):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle":
            return _plain
        raise BrokenFile(f"it names {module[:50]}.{name[:50]}, which no weights need")

    def persistent_load(self, pid: Any) -> Tensor:
        _, storage, key, _, _ = pid
        # Larger than the file it cannot be: the entries are stored, not deflated.
        raw = bytearray(self.archive.read(f"{self.prefix}/data/{key}"))
        return torch.frombuffer(raw, dtype=storage.dtype) if raw else torch.empty(0, dtype=storage.dtype)


def _tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    # Raises where it reaches beyond the storage.
    return torch.as_strided(storage, tuple(size), tuple(stride), offset)


def _plain(*given: Any) -> Any:
    """Stands for the functions that give lists their types."""
    return given[0] if given else []


def _read_torch_script(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            if any(
                entry.compress_type != zipfile.ZIP_STORED
                for entry in archive.infolist()
                if "/data" in entry.filename
            ):
                raise BrokenFile(
                    f"{path} has compressed weights, as no archive of torch's has: it was not loaded"
                )
            prefix = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).rpartition(
                "/"
            )[0]
            root = _ScriptUnpickler(archive.read(f"{prefix}/data.pkl"), archive, prefix).load()
            found: dict[str, Tensor] = {}
            _collect(root, "", found, 0)
    except BrokenFile as error:
        raise error if str(path) in str(error) else BrokenFile(f"{path} was not loaded: {error}") from None
    except Exception:
        raise BrokenFile(f"{path} is a TorchScript archive that is cut short or altered") from None
    return {name: tensor for name, tensor in found.items() if name not in _NUMBERS}


def _collect(value: Any, prefix: str, found: dict[str, Tensor], depth: int) -> None:
    """The tensors of modules in modules, by dotted names."""
    if depth > 64:
        raise BrokenFile("its modules are nested too deep")
    if isinstance(value, Tensor):
        found[prefix] = value
    elif isinstance(value, _Module):
        for name, inner in value.state.items():
            _collect(inner, f"{prefix}.{name}" if prefix else str(name), found, depth + 1)
