"""Exact gradients of large contrastive batches in bounded memory, and BatchNorm under them."""

from clipkit.grad_cache.batch_norm import UpdateOnce, WholeBatch
from clipkit.grad_cache.cache import cached_backward
from clipkit.grad_cache.splitting import split_batch

__all__ = ["UpdateOnce", "WholeBatch", "cached_backward", "split_batch"]
