"""Rows, sums and log-sum-exps over the ranks of a group, each with its gradient.

A loss over a group is written as one global sum, `all_reduce_sum(own rows' part)`, and its collectives keep
one convention: backward on a rank yields W times its share of the gradient (W = the group's size), so that
the mean over ranks, which DDP and FSDP take, is the gradient of one process on the whole batch. The value is
the same on every rank.

    own rows x (B, D) ----------------------------------. own rows y (B, D) --all_gather_rows--> y (N, D)
    -----+--> partial sums --all_reduce_sum--> loss ()
                      <--reduce-scatter--  dy (N, D) ----'

Rank r of the group owns rows r B .. (r + 1) B of every gathered tensor. With `group=None` each function is
the identity and costs nothing. Only torch is needed; the collectives work on gloo and NCCL.
"""

from __future__ import annotations

import functools
import os
import pickle
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist

if dist.is_available():
    # Its functions' default group is the one that is up as the module is imported, which they would then hold for
    # ever; DDP imports it. gloo's threads live as long as their group, and one that lets go of its last tensor while
    # Python ends aborts the process, after all work was done. So it is imported here, before there is a group.
    import torch.distributed.nn  # noqa: F401

# Raises on the device, without a wait; private in torch's stub alone.
_assert_async = torch._assert_async  # pyright: ignore[reportPrivateImportUsage]

if TYPE_CHECKING:
    Group: TypeAlias = dist.ProcessGroup | None
else:
    # Builds without distributed have no such name.
    Group = Any


def is_distributed() -> bool:
    """Whether torch.distributed is initialised with more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def resolve_group(group: Group | str = "auto") -> Group:
    """The process group that `group` stands for, or None where there is no other rank to meet.

    Args:
        group: "auto" is the default group when torch.distributed runs with more than one rank, else None; a
            ProcessGroup or None stands for itself, and a group of one rank is None.

    Raises:
        ValueError: any other string, or a group this rank is no member of.
    """
    if isinstance(group, str):
        if group != "auto":
            raise ValueError(f'group is {group!r}: give "auto", a torch.distributed.ProcessGroup or None')
        return dist.group.WORLD if is_distributed() else None
    if group is None:
        return None
    if dist.get_rank(group) < 0:
        raise ValueError(
            "this rank is no member of the group it was given: give each rank the group it belongs to"
        )
    return group if dist.get_world_size(group) > 1 else None


def rank(group: Group | str = "auto") -> int:
    """This process's place in the group; 0 where there is none."""
    group = resolve_group(group)
    return 0 if group is None else dist.get_rank(group)


def world_size(group: Group | str = "auto") -> int:
    """The number of ranks in the group; 1 where there is none."""
    group = resolve_group(group)
    return 1 if group is None else dist.get_world_size(group)


def barrier(group: Group | str = "auto") -> None:
    """Return when every rank of the group has come here."""
    group = resolve_group(group)
    if group is not None:
        dist.barrier(group)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP2 splits, gathered on every rank of it, which all must ask; any other tensor itself."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def gather_objects(obj: Any, group: Group | str = "auto") -> list[Any]:
    """Every rank's picklable `obj`, in rank order, on every rank."""
    group = resolve_group(group)
    if group is None:
        return [obj]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, obj, group=group)
    return gathered


def check_same_rows(rows: int, group: Group, device: torch.device, what: str = "features") -> None:
    """ValueError, on every rank alike, unless each rank of the group brings the same number of rows.

    One small all-gather. Without it an uneven last batch would hang in the next collective or read memory
    that was never written.
    """
    problem = agree(group, None, {what: (rows,)}, device)
    if problem is not None:
        raise ValueError(problem)


def agree(
    group: Group,
    problem: str | None,
    brought: Mapping[str, tuple[Any, ...]],
    device: torch.device,
    *,
    read: bool = True,
) -> str | None:
    """What is wrong on some rank, told on every rank alike; None where all ranks may go on.

    One all-gather of a number a rank, before anything else is exchanged: a rank that raised by itself would
    leave the others waiting. Only where something is wrong are messages exchanged.

    Args:
        problem: what this rank found wrong with what it was given, or None.
        brought: what has to be the same on all ranks: name to (rows, *other dimensions, dtype).
        device: where the number travels; one the group's backend serves.
        read: whether the host looks. Where it does not, the device asserts it later without a wait (on CUDA
            that ends the process).
    """
    if group is None:
        return problem
    # The last bit: whether this rank reads, and so could take part in the exchange of messages.
    code = 0 if problem is not None else 2 * (zlib.crc32(repr(brought).encode()) + 1)
    codes = _gather(torch.full((1,), code + read, device=device, dtype=torch.int64), group)
    if not read:
        same = ((codes >> 1) == (codes[0] >> 1)).all() & (codes[0] > 1)
        _assert_async(same, "the ranks of a group brought inputs that do not fit together")
        return None
    if str(dist.get_backend(group)) == "fake":
        # Nothing came from elsewhere, and clipkit.planner's tensors have no values.
        return problem
    found = codes.tolist()
    if problem is None and all(other >> 1 == code >> 1 for other in found):
        return None
    if not all(other & 1 for other in found):
        return problem or "another rank brought other inputs than this one, or some that it refused"
    return _disagreement(gather_objects((problem, dict(brought)), group))


def assert_same_rows(rows: Sequence[int], group: Group, device: torch.device) -> None:
    """`agree` about numbers of rows inside torch.compile, without a look by the host: RuntimeError on every
    rank where they differ."""
    if group is None or not rows:
        return
    counts = torch.cat([torch.full((1,), number, device=device, dtype=torch.int64) for number in rows])
    everyone = _gather(counts[None], group)
    _assert_async(
        (everyone == everyone[:1]).all(), "every rank of a group must bring the same number of rows"
    )


def _disagreement(reports: list[tuple[str | None, dict[str, tuple[Any, ...]]]]) -> str:
    ranks = range(len(reports))
    problem = next((problem for problem, _ in reports if problem is not None), None)
    if problem is not None:
        found = [str(r) for r in ranks if reports[r][0] == problem]
        if len(found) == len(reports):
            return problem
        return f"{problem} (on rank {', '.join(found)} of ranks 0..{len(reports) - 1})"
    names = [name for r in ranks for name in reports[r][1]]
    for name in dict.fromkeys(names):
        each = [brought.get(name) for _, brought in reports]
        if len(set(each)) == 1:
            continue
        rows = [value[0] for value in each if value]
        if len({value and value[1:] for value in each}) == 1:
            return (
                f"every rank of a group must bring the same number of {name} rows, but ranks "
                f"0..{len(each) - 1} brought {rows}: drop the uneven last batch (drop_last=True) or give "
                "each rank an equal share"
            )
        told = "; ".join(f"rank {r}: {_told(each[r])}" for r in ranks)
        return f"every rank of a group must bring {name} of the same shape and type, but brought {told}"
    return "the ranks of a group brought inputs that do not fit together"


def _told(value: tuple[Any, ...] | None) -> str:
    """(rows, *other dimensions, dtype) as words."""
    return "none" if value is None else f"{value[-1]} of shape ({', '.join(map(str, value[:-1]))})"


class Ranks:
    """The ranks that a loss meets: their number, this one's place, and each tensor gathered once.

    A loss makes one with `clipkit.losses.checks.meet`; a weighted sum gives all of its terms the same one, so
    that no feature travels twice.

    Attributes:
        group: a ProcessGroup, or None for this process alone.
        rank: this process's place in it.
        size: W.
    """

    def __init__(self, group: Group = None):
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self._widened: list[tuple[torch.Tensor, torch.Tensor]] = []
        # Own rows and everyone's; own rows and what makes everyone's of them.
        self._gathered: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._derived: list[tuple[torch.Tensor, Callable[[], torch.Tensor]]] = []

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """(W B, ...): every rank's rows of x (B, ...), in rank order, with a gradient.

        All ranks have agreed that they bring the same number of rows.
        """
        if self.group is None:
            return x
        for own, everyone in self._gathered:
            if own is x:
                return everyone
        for own, make in self._derived:
            if own is x:
                everyone = make()
                break
        else:
            everyone = _AllGatherRows.apply(x, self.group, self.given_dtype(x))
        self._gathered.append((x, everyone))
        return everyone

    def wide(self, x: torch.Tensor) -> torch.Tensor:
        """x, or half-precision x in fp32: one tensor for all that a loss does with it, so that its gradient
        is added up before it is rounded. It is gathered as it was."""
        if not _is_half(x):
            return x
        for narrow, wide in self._widened:
            if narrow is x:
                return wide
        self._widened.append((x, x.float()))
        return self._widened[-1][1]

    def given_dtype(self, x: torch.Tensor) -> torch.dtype:
        """The type in which a loss was given what `wide` made x of: the one in which its rows travel."""
        return next((narrow.dtype for narrow, wide in self._widened if wide is x), x.dtype)

    def own(self, rows: int) -> slice:
        """Where this rank's `rows` rows lie among everyone's."""
        return slice(self.rank * rows, (self.rank + 1) * rows)

    def deriving(self, made: Sequence[tuple[torch.Tensor, Callable[[], torch.Tensor]]]) -> Ranks:
        """The same ranks, which make everyone's rows of some tensors by a function in place of a gather."""
        other = Ranks(self.group)
        other._widened, other._gathered = self._widened, self._gathered
        other._derived = [*self._derived, *made]
        return other


def all_gather_rows(x: torch.Tensor, group: Group = None, *, check: bool = True) -> torch.Tensor:
    """Every rank's rows, in rank order, with a gradient.

    Args:
        x: (B, ...), the same shape on each rank.
        group: a ProcessGroup or None (x itself comes back).
        check: refuse ranks with different numbers of rows. Pass False where a call just before checked the
            same B.

    Returns:
        (W B, ...). Backward is a reduce-scatter SUM: each rank receives what all ranks' parts want of its
        rows.

    Raises:
        ValueError: the ranks' row counts differ; the message lists them.
    """
    if group is None:
        return x
    if check:
        check_same_rows(len(x), group, x.device)
    return _AllGatherRows.apply(x, group, x.dtype)


def all_reduce_sum(x: torch.Tensor, group: Group = None) -> torch.Tensor:
    """The SUM of x over the group's ranks, for a result that every rank then uses in the same way.

    Backward multiplies by W and needs no communication: each rank's W-fold share is what the mean over ranks
    expects. Use it for the final sum of a loss, and for statistics from which each rank computes the same
    loss.
    """
    return x if group is None else _AllReduceSum.apply(x, group)


def sum_over_ranks(x: torch.Tensor, group: Group = None) -> torch.Tensor:
    """The SUM of x over the group's ranks, for a statistic that each rank then uses in its own way.

    Backward is the SUM over ranks too: a rank's x is owed what every rank makes of the total.
    """
    return x if group is None else _SumOverRanks.apply(x, group)


def logsumexp_over_ranks(x: torch.Tensor, group: Group = None) -> torch.Tensor:
    """This rank's rows of the elementwise log-sum-exp over ranks.

    Args:
        x: (N,), each rank's partial log-sums of the same N columns, N = W B. An empty sum is -inf.

    Returns:
        (B,): log sum_r exp(x_r) for the columns this rank owns. Backward gathers the owners' gradients.
    """
    return x if group is None else _LogSumExpOverRanks.apply(x, group)


class _NoSecondDerivative(torch.autograd.Function):
    """`value` itself, and an error for whoever differentiates it again."""

    @staticmethod
    def forward(ctx, value, *depends_on):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "clipkit's losses over several ranks have first derivatives only, and a gradient of a gradient was "
            "asked for (create_graph=True): what a rank's gradient owes to the other ranks' features would be "
            "missing. Compute such a term on one process, with group=None"
        )


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that refuses to be differentiated.

    torch's once_differentiable hangs its refusal on tensors made for it, so that torch.autograd.grad, which
    looks for the way to its inputs, passes by and leaves the term out; here it lies on that way.
    """

    @functools.wraps(backward)
    def refusing(ctx: Any, *grads: torch.Tensor) -> Any:
        with torch.no_grad():
            values = backward(ctx, *grads)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            values = tuple(
                None if value is None else _NoSecondDerivative.apply(value, *grads, *ctx.saved_tensors)
                for value in values
            )
        return values

    return refusing


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, dtype):
        ctx.group = group
        return _gather(x.to(dtype), group).to(x.dtype)

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):
        # Half-precision parts are added up in fp32: W roundings become one.
        wide = grad.float() if _is_half(grad) else grad
        return _reduce_scatter(wide, ctx.group).to(grad.dtype), None, None


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.ranks = dist.get_world_size(group)
        return _summed(x, group)

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):
        return grad * ctx.ranks, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):
        return _summed(grad, ctx.group), None


class _LogSumExpOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        top = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        # A column without any term has top = -inf; shifting by it would make NaN of the honest -inf.
        shift = torch.where(top.isfinite(), top, torch.zeros_like(top))
        total = (x - shift).exp()
        dist.all_reduce(total, group=group)
        total = total.log() + shift
        ctx.group = group
        ctx.save_for_backward(x, total)
        return _own_rows(total, group)

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):
        x, total = ctx.saved_tensors
        share = torch.where(x == -torch.inf, torch.zeros_like(x), (x - total).exp())
        return _gather(grad, ctx.group) * share, None


def _is_half(x: torch.Tensor) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16)


def _summed(x: torch.Tensor, group: Group) -> torch.Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _gather(x: torch.Tensor, group: Group) -> torch.Tensor:
    ranks = dist.get_world_size(group)
    out = x.new_empty((ranks * len(x), *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.detach().contiguous(), group=group)
    return out


def _reduce_scatter(x: torch.Tensor, group: Group) -> torch.Tensor:
    x, backend = x.contiguous(), str(dist.get_backend(group))
    # "fake" is torch's backend that sends nothing: clipkit.planner counts by it what NCCL would be asked for.
    if (x.is_cuda and "nccl" in backend) or backend == "fake":
        out = x.new_empty((len(x) // dist.get_world_size(group), *x.shape[1:]))
        dist.reduce_scatter_tensor(out, x, group=group)
        return out
    # gloo has no reduce-scatter in every torch release that clipkit runs on.
    return _own_rows(_summed(x, group), group).clone()


def _own_rows(x: torch.Tensor, group: Group) -> torch.Tensor:
    rows = len(x) // dist.get_world_size(group)
    return x.narrow(0, dist.get_rank(group) * rows, rows)


def launch(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 300.0) -> list[Any]:
    """Run `fn(*args)` on `world_size` gloo ranks, new processes of this machine, and return what each
    returned.

    For tests, examples and benchmarks on one machine; training starts under torchrun. Each rank uses one
    thread.

    Args:
        fn: a function importable by name (spawned processes import it); it finds torch.distributed
            initialised.
        world_size: the number of ranks, at least 1.
        args: picklable arguments, the same for every rank.
        timeout_s: seconds a collective waits for the other ranks, and all ranks have to finish.

    Returns:
        The ranks' results, in rank order.

    Raises:
        RuntimeError: a rank failed (its traceback is in the message) or did not finish in time.
    """
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}: give at least 1")
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="clipkit-launch-") as folder:
        workers = [
            context.Process(
                target=_worker, args=(fn, index, world_size, folder, timeout_s, args), daemon=True
            )
            for index in range(world_size)
        ]
        try:
            for worker in workers:
                worker.start()
            _join(workers, Path(folder), timeout_s)
            return [
                pickle.loads((Path(folder) / f"result-{index}").read_bytes()) for index in range(world_size)
            ]
        finally:
            for worker in workers:
                if worker.is_alive():
                    worker.kill()
                if worker.pid is not None:
                    worker.join()


def _worker(
    fn: Callable[..., Any], index: int, ranks: int, folder: str, timeout_s: float, args: tuple
) -> None:
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(ranks)})
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=index,
            world_size=ranks,
            timeout=timedelta(seconds=timeout_s),
        )
        result = fn(*args)
        (Path(folder) / f"result-{index}").write_bytes(pickle.dumps(result))
        # The first rank to leave would take the file store with it while another still connects.
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error-{index}").write_text(traceback.format_exc())
        raise SystemExit(1) from None
    # The work is done and its result on disk; torch's threads have been seen to abort an interpreter that is
    # taken down while they end.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _join(workers: list[Any], folder: Path, timeout_s: float) -> None:
    """Wait until all workers ended well; RuntimeError as soon as one failed, or after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
        if any(worker.exitcode for worker in workers):
            break
        time.sleep(0.02)
    failed = [index for index, worker in enumerate(workers) if worker.exitcode != 0]
    if not failed:
        return
    # A rank that fails makes the others fail on its closed connection a moment later: show the first that
    # wrote.
    reports = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime)
    if reports:
        report = reports[0]
        raise RuntimeError(
            f"rank {report.name.removeprefix('error-')} of {len(workers)} failed:\n{report.read_text()}"
        )
    died = {index: worker.exitcode for index, worker in enumerate(workers) if worker.exitcode}
    if died:
        raise RuntimeError(
            f"of {len(workers)} ranks, these died without a Python error: exit codes by rank {died} "
            "(negative: the signal's number)"
        )
    raise RuntimeError(f"ranks {failed} of {len(workers)} did not finish in {timeout_s:g} s")
