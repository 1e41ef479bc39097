"""What each rank of test_feed.py runs; spawned processes import it, so it is no test file itself.

A run's own way from shards to gradients, in float64: stream, model, loss, and the mean over the ranks that DDP takes.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipkit.data import create_stream
from clipkit.data.spec import complete
from clipkit.distributed import all_gather_rows, all_reduce_sum, resolve_group
from clipkit.distributed import rank as rank_of
from clipkit.grad_cache import cached_backward
from clipkit.losses import WeightedSum, create_loss
from clipkit.model import create_model
from clipkit.training.feed import check_pairs

PAIRS, LENGTH, VOCABULARY = 8, 12, 60
TOKENIZER = SimpleNamespace(vocab_size=VOCABULARY, context_length=LENGTH, pad_id=0, sot_id=58, eot_id=59)
MODEL = {
    "embed_dim": 8,
    "init_logit_bias": -2.0,
    "image_tower": {
        "name": "clip_vit",
        "image_size": 16,
        "patch_size": 8,
        "width": 16,
        "layers": 1,
        "heads": 2,
    },
    "text_tower": {"name": "transformer", "width": 16, "layers": 1, "heads": 2},
}
INFONCE, MASKED, SIGMOID = {"infonce": {}}, {"infonce": {"same_ids": "mask"}}, {"sigmoid": {}}
# Case -> data settings, loss.
CASES = {
    "captions": ({"pair_ids": "caption"}, INFONCE),
    "captions masked": ({"pair_ids": "caption"}, MASKED),
    "json": ({"pair_ids": "json:scene"}, {**SIGMOID, "cyclic": {}}),
    "several": ({"captions_per_image": 2}, {**INFONCE, "cyclic": {}}),
    "several and keys": ({"captions_per_image": 2, "pair_ids": "key:#"}, {**MASKED, **SIGMOID}),
    "hard negatives": ({"hard_negatives": "wrong"}, "wrong captions"),
    "everything": (
        {
            "pair_ids": "json:scene",
            "captions_per_image": 2,
            "hard_negatives": "wrong",
            "hard_negatives_per_caption": 2,
        },
        "wrong captions",
    ),
}


class WrongCaptions(nn.Module):
    """An image's own caption against the group's captions and hard negatives, but those of its id."""

    inputs = ("image_features", "text_features", "logit_scale", "hard_negative_features")
    optional_inputs = ("pair_ids",)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        hard_negative_features: Tensor,
        pair_ids: Tensor | None = None,
    ) -> Tensor:
        group = resolve_group("auto")
        texts = all_gather_rows(text_features, group)
        wrong = all_gather_rows(hard_negative_features.flatten(0, 1), group)
        logits = logit_scale * image_features @ torch.cat([texts, wrong]).T
        own = torch.arange(len(logits)) + rank_of(group) * len(logits)
        if pair_ids is not None:
            same = pair_ids[:, None] == all_gather_rows(pair_ids, group)[None]
            same[torch.arange(len(same)), own] = False
            logits[:, : len(texts)] = logits[:, : len(texts)].masked_fill(same, -torch.inf)
        loss = nn.functional.cross_entropy(logits, own, reduction="sum") / len(texts)
        return all_reduce_sum(loss, group)


def tokenize(texts: list[str]) -> Tensor:
    rows = [[58, *(1 + byte % 57 for byte in text.encode()[: LENGTH - 2]), 59] for text in texts]
    return torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])


def run(
    case: str, folder: str, *, rank: int, world_size: int, micro_batch_size: int | None
) -> dict[str, Tensor]:
    """Value, gradients (averaged over the ranks) and what the data knows, of the third global batch."""
    spec, loss = CASES[case]
    loss = WeightedSum({"wrong_captions": WrongCaptions()}) if loss == "wrong captions" else create_loss(loss)
    data = complete({"train": f"{folder}/*.tar", **spec})
    check_pairs(data, loss)
    stream = create_stream(
        data,
        tokenizer=tokenize,
        image_size=16,
        batch_size=PAIRS // world_size,
        seed=5,
        rank=rank,
        world_size=world_size,
    )
    batches = iter(stream)
    batch = [next(batches) for _ in range(3)][-1]
    torch.manual_seed(0)
    model = create_model(MODEL, tokenizer=TOKENIZER).double().eval()
    wanted = (*loss.inputs, *loss.optional_inputs)
    if micro_batch_size:
        terms = cached_backward(model, loss, batch, micro_batch_size=micro_batch_size, inputs=wanted)
    else:
        terms = loss(model(batch, wanted))
        terms["loss"].backward()
    flat = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    )
    if world_size > 1:
        dist.all_reduce(flat)
        flat /= world_size
    return {"value": terms["loss"].detach(), "gradient": flat}


def run_rank(folder: str) -> dict[tuple[str, int | None], dict[str, Tensor]]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    return {
        (case, micro): run(case, folder, rank=rank, world_size=world_size, micro_batch_size=micro)
        for case in CASES
        for micro in (None, 1)
    }
