"""The ranks' texts passed round a ring in place of a gather: no rank ever holds all of them.

    forward, step s = 0 .. W - 1, on rank r:
        the texts of rank r - s  --send-->  rank r + 1          (under the tiles, not in the last step)
        own images x those texts  -->  row sums of own images, column sums of those texts
    backward, step s: the same, and one hop behind the texts
        their gradient so far  --send-->  rank r + 1            (under the tiles of step s + 1)

so that the texts' gradient comes back to its owner added up: W - 1 sends of texts forward, W - 1 of texts and
W - 1 of gradients backward. Texts travel in the type they were given in, gradients in fp32 (fp64 for fp64).
Forward a rank holds two parts of B rows beside its own texts, and keeps of a part its sums alone; the texts go
round again backward, where it holds two parts and a few gradients of B rows. None of it grows with W.

A part's tiles are the kernels' own, and the gradient of a part is that of its sums times their share of the
whole row's. On NCCL sends run on a stream of their own, under the tiles; on gloo the threads that send share
the cores that compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipkit.distributed import Ranks, first_derivative_only
from clipkit.kernels import ops, pairs, reference
from clipkit.kernels.chunked import Pairs
from clipkit.losses.checks import check_choice
from clipkit.losses.duplicates import NearContent, SameIds

OVERLAPS = ("none", "ring")
_TEXTS, _GRADIENTS = 1, 2


def check_overlap(overlap: str, false_negatives: str | None) -> str:
    """`overlap` if it is known and every other setting can do without everyone's texts; ValueError otherwise."""
    check_choice("overlap", overlap, OVERLAPS)
    if overlap == "ring" and false_negatives is not None:
        raise ValueError(
            'false_negatives compares everyone\'s texts, which overlap="ring" never holds: use overlap="none"'
        )
    return overlap


def check_ring_ids(loss: Any, pair_ids: Any) -> None:
    """ValueError for ids whose use takes the sum of everyone's texts of one content."""
    if loss.overlap == "none" or pair_ids is None:
        return
    if loss.same_ids == "positive":
        what = 'same_ids="positive" adds up the texts of one id'
    elif getattr(loss, "label_smoothing", 0.0) > 0:
        what = "label_smoothing with pair_ids adds up the texts of other ids"
    else:
        return
    raise ValueError(
        f'{what}, over all ranks, which overlap="ring" never holds: use overlap="none", or same_ids="mask" '
        "without smoothing"
    )


def runs_ring(loss: Any, ranks: Ranks) -> bool:
    """Whether this call passes texts round: a rank alone has no ring.

    Raises:
        ValueError: under torch.compile, which does not see sends; outside fullgraph=True it then leaves this
            loss out of its graph.
    """
    if loss.overlap == "none" or ranks.group is None:
        return False
    if torch.compiler.is_compiling():
        raise ValueError('overlap="ring" sends from rank to rank, which torch.compile cannot trace')
    return True


def ring_lse(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    ranks: Ranks,
    same: SameIds | NearContent | None,
    *,
    impl: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """`pair_lse` of own images with every rank's texts, without the pairs of one id.

    Args:
        x, y: (B, D) own images and own texts, from `ranks.wide`; every rank brings the same B.
        scale: ().

    Returns:
        row_lse (B,) over all N = W B texts, and col_lse (N,), this rank's images' part of every text's sum, in
        rank order.
    """
    ring = _Ring(x, y, ranks, same, impl, precision)
    return _RingLse.apply(x.to(ring.dtype), y, scale, ring)


def ring_softplus(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    ranks: Ranks,
    same: SameIds | NearContent | None,
    *,
    impl: str,
    precision: str,
) -> Tensor:
    """`pair_softplus` of own images with every rank's texts, (B,); as `ring_lse`."""
    ring = _Ring(x, y, ranks, same, impl, precision)
    return _RingSoftplus.apply(x.to(ring.dtype), y, scale, bias, ring)


class _Ring:
    """Own texts on their way round, and what each part of them is computed with."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        ranks: Ranks,
        same: SameIds | NearContent | None,
        impl: str,
        precision: str,
    ):
        assert ranks.group is not None, "a rank alone has no ring"
        assert not isinstance(same, NearContent), "check_overlap refuses false_negatives"
        self.group, self.rank, self.size, self.rows = ranks.group, ranks.rank, ranks.size, len(y)
        self.next, self.previous = (
            dist.get_global_rank(ranks.group, (self.rank + step) % self.size) for step in (1, -1)
        )
        self.dtype = torch.promote_types(x.dtype, y.dtype)
        self.travels_as = ranks.given_dtype(y)
        self.same = same
        # Once: autocast, which it looks at, is another in the backward pass.
        self.impl = pairs.choose_implementation(impl, precision, x.to(self.dtype), y.to(self.dtype))
        self.chunk = pairs.DEFAULT_CHUNK

    def send(self, sent: Tensor, tag: int, into: Tensor | None = None) -> Callable[[], Tensor]:
        """Start to send to the next rank and to receive as much from the previous; the function that waits."""
        received = torch.empty_like(sent) if into is None else into
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, self.next, self.group, tag),
                dist.P2POp(dist.irecv, received, self.previous, self.group, tag),
            ]
        )

        def arrived(sent: Tensor = sent) -> Tensor:
            # `sent` lives until it has left.
            for work in works:
                work.wait()
            return received

        return arrived

    def parts(self, y: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(owner, its texts) of every rank, own first, valid until the next; those travel on meanwhile."""
        held, spare = y.detach().to(self.travels_as).contiguous(), None
        for step in range(self.size):
            arrived = self.send(held, _TEXTS, spare) if step < self.size - 1 else None
            yield (self.rank - step) % self.size, held.to(self.dtype)
            if arrived is not None:
                # Own texts are the caller's; what has come from elsewhere is overwritten.
                held, spare = arrived(), held if step > 0 else None

    def columns(self, owner: int) -> slice:
        """Where a rank's texts lie among everyone's."""
        return slice(owner * self.rows, (owner + 1) * self.rows)

    def pairs(self, owner: int) -> Pairs:
        """The pairs of own images with the owner's texts that stay out of the sums."""
        ids = (None, None) if self.same is None else (self.same.ids, self.same.all_ids[self.columns(owner)])
        return Pairs(0, *ids, exclude_positives=owner == self.rank)

    def lse(self, x: Tensor, part: Tensor, scale: Tensor, owner: int) -> tuple[Tensor, ...]:
        """(row_lse, col_lse, *sums) of one part; the sums are what `lse_gradients` takes."""
        out = self.pairs(owner)
        if self.impl == "dense":
            return reference.pair_lse(x, part, scale, **vars(out))
        return ops.pair_lse_op(
            x, part, scale, out.row_ids, out.col_ids, None, 0, out.exclude_positives, self.impl, self.chunk
        )

    def lse_gradients(
        self,
        grads: tuple[Tensor, Tensor],
        sums: tuple[Tensor, ...],
        inputs: tuple[Tensor, Tensor, Tensor],
        owner: int,
        needs: tuple[bool, ...],
    ) -> list[Tensor | None]:
        """[dx, dpart, dscale] of one part's sums."""
        out = self.pairs(owner)
        if self.impl == "dense":
            return _gradients(lambda *given: reference.pair_lse(*given, **vars(out)), inputs, grads, needs)
        return _needed(
            ops.pair_lse_backward_op(
                *grads, *inputs, out.row_ids, out.col_ids, None, *sums, 0, out.exclude_positives, self.impl,
                self.chunk, needs[0], needs[1], False,
            ),
            needs,
        )  # fmt: skip

    def softplus(self, x: Tensor, part: Tensor, scale: Tensor, bias: Tensor, owner: int) -> Tensor:
        """Row sums of one part."""
        out = self.pairs(owner)
        if self.impl == "dense":
            return reference.pair_softplus(x, part, scale, bias, **vars(out))
        return ops.pair_softplus_op(
            x, part, scale, bias, out.row_ids, out.col_ids, 0, out.exclude_positives, self.impl, self.chunk
        )

    def softplus_gradients(
        self, grad: Tensor, inputs: tuple[Tensor, ...], owner: int, needs: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """[dx, dpart, dscale, dbias] of one part's sums."""
        out = self.pairs(owner)
        if self.impl == "dense":
            return _gradients(
                lambda *given: reference.pair_softplus(*given, **vars(out)), inputs, (grad,), needs
            )
        return _needed(
            ops.pair_softplus_backward_op(
                grad, *inputs, out.row_ids, out.col_ids, 0, out.exclude_positives, self.impl, self.chunk,
                needs[0], needs[1], needs[3],
            ),
            needs,
        )  # fmt: skip

    def backward(
        self, y: Tensor, gradients: Callable[[int, Tensor], list[Tensor | None]]
    ) -> list[Tensor | None]:
        """Own images', own texts' and the scalars' gradients, of `gradients(owner, its texts)` of every part."""
        totals: list[Tensor | None] = []
        on_its_way = None
        for owner, part in self.parts(y):
            found = gradients(owner, part)
            if owner == self.rank:
                totals = found
                continue
            of_part = found[1]
            found[1] = None
            totals = [a if b is None else b if a is None else a.add_(b) for a, b in zip(totals, found)]
            if of_part is not None:
                if on_its_way is not None:
                    of_part = of_part.add_(on_its_way())
                on_its_way = self.send(of_part.contiguous(), _GRADIENTS)
        if on_its_way is not None:
            own = totals[1]
            assert own is not None, "own texts have a gradient where others' have"
            totals[1] = own.add_(on_its_way())
        return totals


def _gradients(
    function: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients of a differentiable function, computed anew."""
    with torch.enable_grad():
        leaves = [value.detach().requires_grad_(need) for value, need in zip(inputs, needs)]
        made = torch.autograd.grad(function(*leaves), [leaf for leaf in leaves if leaf.requires_grad], grads)
    found = iter(made)
    return [next(found) if need else None for need in needs]


def _needed(made: tuple[Tensor, ...], needs: tuple[bool, ...]) -> list[Tensor | None]:
    return [value if need else None for value, need in zip(made, needs)]


class _RingLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale, ring):
        row_lse = torch.full((len(x),), -torch.inf, dtype=reference.compute_dtype(x), device=x.device)
        col_lse = row_lse.new_empty(ring.size * ring.rows)
        kept = []
        for owner, part in ring.parts(y):
            of_rows, of_cols, *sums = ring.lse(x, part, scale, owner)
            row_lse = torch.logaddexp(row_lse, of_rows)
            col_lse[ring.columns(owner)] = of_cols
            kept += [of_rows, of_cols, *sums]
        ctx.ring = ring
        ctx.save_for_backward(x, y, scale, row_lse, *kept)
        return row_lse, col_lse

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_row, grad_col):
        ring, needs = ctx.ring, ctx.needs_input_grad[:3]
        x, y, scale, row_lse, *kept = ctx.saved_tensors
        each = len(kept) // ring.size

        def gradients(owner: int, part: Tensor) -> list[Tensor | None]:
            first = (ring.rank - owner) % ring.size * each
            of_rows, *sums = kept[first : first + each]
            # An empty sum has no share; elsewhere a part's share of the row's sum is at most 1.
            share = torch.where(of_rows == -torch.inf, torch.zeros_like(of_rows), (of_rows - row_lse).exp())
            grads = (grad_row * share, grad_col[ring.columns(owner)].contiguous())
            return ring.lse_gradients(grads, (of_rows, *sums), (x, part, scale), owner, needs)

        d_x, d_y, d_scale = ring.backward(y, gradients)
        return d_x, None if d_y is None else d_y.to(y.dtype), d_scale, None


class _RingSoftplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale, bias, ring):
        total = torch.zeros(len(x), dtype=reference.compute_dtype(x), device=x.device)
        for owner, part in ring.parts(y):
            total += ring.softplus(x, part, scale, bias, owner)
        ctx.ring = ring
        ctx.save_for_backward(x, y, scale, bias)
        return total

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):
        ring, needs = ctx.ring, ctx.needs_input_grad[:4]
        x, y, scale, bias = ctx.saved_tensors
        grad = grad.contiguous()
        d_x, d_y, d_scale, d_bias = ring.backward(
            y, lambda owner, part: ring.softplus_gradients(grad, (x, part, scale, bias), owner, needs)
        )
        return d_x, None if d_y is None else d_y.to(y.dtype), d_scale, d_bias, None
