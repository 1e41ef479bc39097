"""What ranks of the planner's tests run, in a module that spawned ranks can import: collectives counted in a
real step.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.distributed as dist

from clipkit.grad_cache import cached_backward
from clipkit.losses import create_loss
from clipkit.model import create_model

TOKENIZER = SimpleNamespace(vocab_size=50, context_length=12, pad_id=0, sot_id=48, eot_id=49)
MODEL = {
    "embed_dim": 24,
    "image_tower": {"name": "timm", "model": "test_resnet", "image_size": 32},
    "text_tower": {"name": "transformer", "width": 32, "layers": 2, "heads": 4, "dropout": 0.0},
}
LOSS = {"infonce": {}, "cyclic": {}}
BATCH_SIZE = 12
LOSSES = {
    "infonce": {"infonce": {}},
    "cyclip": {"infonce": {}, "cyclic": {}},
    "sigmoid": {"sigmoid": {}},
    "simcse": {"simcse": {}},
}


def batch(rows: int) -> dict[str, torch.Tensor]:
    text = torch.randint(1, 48, (rows, 12))
    text[:, 7] = 49
    return {"image": torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8), "text": text}


class Counted:
    """While active, the full tensors' bytes of every collective that torch.distributed's functions are called
    for.
    """

    # torch 2.15 calls them *_single; the argument that holds the full tensor.
    NAMES = {
        "all_gather_into_tensor": ("all_gather", 0),
        "all_gather_single": ("all_gather", 0),
        "reduce_scatter_tensor": ("reduce_scatter", 1),
        "reduce_scatter_single": ("reduce_scatter", 1),
        "all_reduce": ("all_reduce", 0),
    }

    def __enter__(self) -> Counted:
        self.sizes = {kind: 0 for kind, _ in self.NAMES.values()}
        self.inside = False
        self.own = {name: getattr(dist, name) for name in self.NAMES if hasattr(dist, name)}
        for name in self.own:
            setattr(dist, name, self._counting(name))
        return self

    def _counting(self, name: str):
        kind, place = self.NAMES[name]

        def call(*args, **kwargs):
            # One may be written in terms of another.
            outermost, self.inside = not self.inside, True
            try:
                if outermost:
                    given = list(args[:2]) + [v for v in kwargs.values() if isinstance(v, torch.Tensor)]
                    self.sizes[kind] += given[place].numel() * given[place].element_size()
                return self.own[name](*args, **kwargs)
            finally:
                self.inside = not outermost

        return call

    def __exit__(self, *_) -> None:
        for name, function in self.own.items():
            setattr(dist, name, function)


def real_step() -> dict:
    """Everything that ranks are asked, in one start of them."""
    return {
        "losses": {name: loss_collectives(spec) for name, spec in LOSSES.items()},
        "ddp": ddp_gradients(),
        "fsdp": {micro: fsdp_collectives(micro) for micro in (6, 2)},
    }


def loss_collectives(spec: dict) -> dict[str, int]:
    """Bytes by collective of one forward and backward of a loss on random features, as MODEL gives
    them.
    """
    loss = create_loss(spec)
    rows = BATCH_SIZE // dist.get_world_size()
    features = {
        name: torch.nn.functional.normalize(torch.randn(rows, 24), dim=1).requires_grad_()
        for name in ("image_features", "text_features", "text_features_view2")
    }
    with Counted() as counted:
        scalars = {
            name: torch.tensor(value, requires_grad=True)
            for name, value in (("logit_scale", 10.0), ("logit_bias", -10.0))
        }
        loss({**features, **scalars})["loss"].backward()
    return counted.sizes


def ddp_gradients() -> int:
    """Bytes that DDP reduces in a step, from its own buckets."""
    model = torch.nn.parallel.DistributedDataParallel(create_model(MODEL, tokenizer=TOKENIZER).train())
    sizes = []

    def hook(state, bucket):
        sizes.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])

    model.register_comm_hook(None, hook)
    create_loss(LOSS)(model(batch(6)))["loss"].backward()
    return sum(sizes)


def fsdp_collectives(micro: int) -> dict[str, int]:
    """Bytes by collective of a step of the towers under FSDP2, in micro-batches of `micro` of 6 rows."""
    from torch.distributed.fsdp import fully_shard

    model = create_model(MODEL, tokenizer=TOKENIZER).train()
    for block in (*model.image_tower.blocks(), *model.text_tower.blocks()):
        fully_shard(block)
    fully_shard(model)
    # Alone on its rank: only FSDP2 communicates.
    loss = create_loss(LOSS, group=None)
    with Counted() as counted:
        cached_backward(model, loss, batch(6), micro_batch_size=micro)
    return counted.sizes
