"""Contrastive sums over all pairs, and their gradients, without keeping the matrix of similarities.

Two differentiable primitives on a rectangular block of pairs, each with three implementations behind `impl=`:

    pair_lse      log-sum-exp of every row and every column (InfoNCE, SimCSE, NLI, InfoLOOB, uniformity)
    pair_softplus sum of softplus over every row            (the sigmoid loss)

`reference.py` is the definition and the first thing to read; `chunked.py` the same in bounded memory on any
device; `triton_tiles.py` the same on CUDA (sm_80 and later). Only torch is imported here.
"""

from clipkit.kernels.pairs import pair_lse, pair_softplus

__all__ = ["pair_lse", "pair_softplus"]
