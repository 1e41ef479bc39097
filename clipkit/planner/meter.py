"""Counts what torch operators do: bytes alive, operations, bytes moved, collectives.

Run on fake tensors (`torch._subclasses.FakeTensorMode`: shapes, dtypes and storages without memory), it tells
what a step of any size would take, on any machine. Run on real tensors, it measures the same numbers.

    with FakeTensorMode(), Meter() as meter:
        ...
    meter.peak, meter.operators, meter.collectives
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from clipkit.kernels.chunked import DEFAULT_CHUNK
from clipkit.kernels.configs import find

_ATEN = torch.ops.aten
# torch counts the CPU's attention in its newer releases; before, by the formulas of CUDA's, which has the same arguments.
_FORMULAS = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        _ATEN._scaled_dot_product_flash_attention
    ],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
    **flop_registry,
}
# What each collective sends and receives a rank, ring algorithms, in units of (W - 1) / W of the full
# tensor's bytes.
RING = {"all_gather": 1, "reduce_scatter": 1, "broadcast": 1, "all_reduce": 2}
_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
_COLLECTIVES = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "broadcast_": "broadcast",
}


@dataclasses.dataclass(frozen=True)
class Operator:
    """One operator.

    flops: multiplications and additions, of products, convolutions and attention alone. moved: bytes of
    inputs and outputs.
    half: computes in bf16 or fp16. recorded: autograd recorded it, which in a backward is a recomputed
    forward.
    """

    flops: int
    moved: int
    half: bool
    recorded: bool


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective: its kind (a key of RING) and the bytes of the full tensor."""

    kind: str
    size: int


def volume(collectives: list[Collective], world_size: int) -> int:
    """Bytes that a rank sends (and as many that it receives) for these collectives, by ring algorithms."""
    whole = sum(RING[collective.kind] * collective.size for collective in collectives)
    return round(whole * (world_size - 1) / world_size)


class Meter(TorchDispatchMode):
    """While active, counts every operator that reaches the dispatcher, backward included.

    Args:
        answer: what a value read off a tensor (`bool(t)`, `t.item()`, `torch.equal`) is taken for; None reads
            it, which fake tensors refuse.
        capability: of the GPU that clipkit's Triton operators are taken to run on.
        mask_share: rows that a boolean index keeps, which only the data knows.

    Attributes:
        alive, peak: bytes of the storages made inside that live now, and at most at once, workspaces
            included.
        operators, collectives: in order.
    """

    def __init__(
        self,
        *,
        answer: bool | None = None,
        capability: tuple[int, int] = (9, 0),
        mask_share: float = 0.15,
    ):
        super().__init__()
        self.answer, self.capability, self.mask_share = answer, capability, mask_share
        self.alive = self.peak = 0
        self.operators: list[Operator] = []
        self.collectives: list[Collective] = []
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # What comes from outside is not made here, nor are views of it.
        self._known.update(tensor.untyped_storage() for tensor in _tensors((args, kwargs)))
        if self.answer is not None and func in _READS:
            return self.answer
        if func is torch.ops.aten.index.Tensor and _is_masked(args[1]):
            output = self._masked_rows(*args)
        else:
            output = func(*args, **kwargs)
        if func.namespace == "c10d":
            self._collective(func, args)
            return output
        made = [self._watch(tensor) for tensor in _tensors(output)]
        if any(made) or func._schema.is_mutable:
            self._operator(func, args, kwargs, output)
        return output

    def _watch(self, tensor: Tensor) -> bool:
        """Count the tensor's storage until it is freed; whether it is new."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return False
        self._known.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, size)
        return True

    def _free(self, size: int) -> None:
        self.alive -= size

    def _masked_rows(self, tensor: Tensor, index: list[Tensor]) -> Tensor:
        (mask,) = index
        rows = max(1, round(self.mask_share * mask.numel()))
        return tensor.new_empty((rows, *tensor.shape[mask.ndim :]))

    def _operator(self, func, args, kwargs, output) -> None:
        inputs = _tensors((args, kwargs))
        moved = sum(_size(tensor) for tensor in [*inputs, *_tensors(output)])
        packet = func._overloadpacket
        if func.namespace == "clipkit":
            flops, workspace, half = self._pair_operator(packet.__name__, func, args)
            self.peak = max(self.peak, self.alive + workspace)
        else:
            formula = _FORMULAS.get(packet)
            flops = int(formula(*args, **kwargs, out_val=output)) if formula else 0
            half = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in inputs)
        self.operators.append(Operator(flops, moved, half, torch.is_grad_enabled()))

    def _pair_operator(self, name: str, func, args) -> tuple[int, int, bool]:
        """(operations, bytes beyond inputs and outputs, in half precision) of one of clipkit.kernels.ops.

        One product of N x M x D forward; backward the same again, and one for each side that needs a
        gradient.
        """
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
        (n, dim), m = given["x"].shape, given["y"].shape[0]
        backward = name.endswith("backward")
        products = 1 + (given["need_x"] + given["need_y"] if backward else 0)
        flops = 2 * n * m * dim * products
        if given["impl"] == "chunked":
            return flops, chunked_workspace(n, m, dim, backward=backward), False
        # Operands split in two fp16 numbers, at three times the operations.
        high = given["impl"] == "triton_high"
        kind = f"{'softplus' if 'softplus' in name else 'lse'}_{'coef' if backward else 'sums'}"
        workspace = triton_workspace(n, m, dim, kind, capability=self.capability, high=high)
        return flops * (3 if high else 1), workspace, True

    def _collective(self, func, args) -> None:
        kind = _COLLECTIVES.get(func._overloadpacket.__name__)
        if kind is not None:
            self.collectives.append(Collective(kind, max(_size(tensor) for tensor in _tensors(args))))


def chunked_workspace(n: int, m: int, dim: int, *, backward: bool, chunk: int = DEFAULT_CHUNK) -> int:
    """Bytes that clipkit.kernels.chunked holds beyond inputs and outputs: a block of logits (backward: two),
    and one chunk of rows in fp32, scaled.
    """
    rows, cols = min(n, chunk), min(m, chunk)
    return 4 * (rows * cols * (2 if backward else 1) + rows * dim)


def triton_workspace(n: int, m: int, dim: int, kind: str, *, capability: tuple[int, int], high: bool) -> int:
    """Bytes that clipkit.kernels.fused holds beyond inputs and outputs: fp16 operands of both sides (three
    times as wide when `high`), and partial sums (forward), or coefficients of an outer block and fp32
    accumulators (backward).
    """
    config = find(kind, capability, -(-dim // 64) * 64)
    step = max(64, config.block_k)
    padded = -(-dim // step) * step
    operands = 2 * (n + m) * padded * (3 if high else 1)
    down, across = (
        -(-min(config.outer, size) // block) for size, block in ((n, config.block_m), (m, config.block_n))
    )
    if kind.endswith("sums"):
        sides = config.block_m if kind.startswith("softplus") else config.block_m + config.block_n
        return operands + 4 * down * across * sides
    cells = down * config.block_m * across * config.block_n
    return operands + 2 * cells * (2 if high else 1) + 4 * (n + m) * padded


@contextmanager
def fused_attention() -> Iterator[None]:
    """Within it attention drops none of its weights: CUDA's fused kernels draw that inside and keep a seed, the CPU's keep
    matrices.

    The function itself is replaced: no mode sees the passes that activation checkpointing repeats.
    """
    own = F.scaled_dot_product_attention

    def without(query, key, value, attn_mask=None, dropout_p=0.0, *args, **kwargs):
        return own(query, key, value, attn_mask, 0.0, *args, **kwargs)

    F.scaled_dot_product_attention = without
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


def _is_masked(index: list[Tensor | None]) -> bool:
    return any(entry is not None and entry.dtype == torch.bool for entry in index)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _size(tensor: Tensor) -> int:
    """Bytes of what the tensor shows, or of what lies behind an expanded one."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
