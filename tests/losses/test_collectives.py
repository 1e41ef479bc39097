"""What a loss exchanges with other ranks, counted, and compiled without a graph break."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from clipkit.losses import create_loss, list_losses
from tests.losses.test_every_loss import build, gradients, make


@pytest.fixture
def four_ranks() -> Iterator[None]:
    """torch.distributed as rank 1 of 4 that send nothing: each gathers its own rows four times."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


def counted(loss, features) -> dict[str, int]:
    with CommDebugMode() as mode:
        loss(features)["loss"]
    return {str(name).partition(".")[2]: count for name, count in mode.get_comm_counts().items()}


@pytest.mark.parametrize(
    "spec, gathers",
    [
        # The agreement and the texts.
        ({"infonce": {}}, 2),
        # The agreement, the images and the texts, whatever the number of terms.
        ({"infonce": {}, "cyclic": {}, "uniformity": {}, "sigmoid": {}}, 3),
        # And what CLOOB retrieves, twice.
        ({"infonce": {}, "cloob": {}, "infoloob": {}, "uniformity": {}}, 5),
        ({"matryoshka": {"dims": [2, 3, 6]}}, 2),
        ({"matryoshka": {"dims": [2, 3, 6]}, "infonce": {}, "sigmoid": {}}, 2),
        ({"cyclic": {}}, 1),
    ],
)
@pytest.mark.filterwarnings("ignore:For backward hooks")
def test_each_feature_is_gathered_once(four_ranks, spec, gathers):
    loss = create_loss(spec)
    found = counted(loss, make(loss))
    assert sum(count for name, count in found.items() if "gather" in name) == gathers, found


@pytest.mark.parametrize("name", list_losses())
def test_compiles_without_a_graph_break_on_several_ranks(four_ranks, name):
    torch._dynamo.reset()
    eager, compiled = build(name), torch.compile(build(name), fullgraph=True, backend="aot_eager")
    features = make(eager)
    expected, found = gradients(eager, features), gradients(compiled, features)
    for key in expected:
        assert torch.allclose(found[key], expected[key], rtol=1e-5, atol=1e-7), key
