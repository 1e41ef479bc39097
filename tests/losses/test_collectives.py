"""What a loss exchanges with other ranks, counted, and compiled without a graph break."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from clipkit.losses import InfoNCE, Sigmoid, create_loss, list_losses
from clipkit.planner.meter import Meter
from tests.losses.test_every_loss import D, build, gradients, make


@contextlib.contextmanager
def fake_ranks(number: int) -> Iterator[None]:
    """torch.distributed as rank 1 of so many that send nothing: each gathers its own rows as many times."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=1, world_size=number, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def four_ranks() -> Iterator[None]:
    with fake_ranks(4):
        yield


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
        # The agreement alone; no texts.
        ({"infonce": {"overlap": "ring"}}, 1),
        (
            {
                "infonce": {"overlap": "ring", "label_smoothing": 0.1},
                "sigmoid": {"overlap": "ring"},
                "cyclic": {},
            },
            1,
        ),
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


@pytest.fixture
def sent(monkeypatch) -> list[torch.Tensor]:
    """What this rank has sent to another."""
    found, real = [], dist.batch_isend_irecv

    def record(operations):
        for operation in operations:
            assert operation.peer == {dist.isend: 2, dist.irecv: 0}[operation.op]
            if operation.op is dist.isend:
                found.append(operation.tensor)
            else:
                # The backend sends nothing: what comes is own rows again.
                operation.tensor.copy_(operations[0].tensor)
        return real(operations)

    monkeypatch.setattr(dist, "batch_isend_irecv", record)
    return found


@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("name", ["infonce", "sigmoid"])
def test_a_ring_sends_each_part_on_once_and_gradients_in_fp32(four_ranks, sent, name, impl):
    loss = create_loss({name: {"overlap": "ring", "impl": impl}})
    features = make(loss, dtype=torch.bfloat16)
    value = loss(features)["loss"]
    assert [tensor.dtype for tensor in sent] == [torch.bfloat16] * 3
    del sent[:]
    value.backward()
    assert sorted(str(tensor.dtype) for tensor in sent) == ["torch.bfloat16"] * 3 + ["torch.float32"] * 3
    assert all(tensor.shape == (5, D) for tensor in sent)


@pytest.mark.parametrize("frozen, sends", [("image_features", 6), ("text_features", 3)])
def test_a_ring_passes_no_gradient_of_texts_that_want_none(four_ranks, sent, frozen, sends):
    loss = create_loss({"infonce": {"overlap": "ring"}})
    features = make(loss)
    features[frozen] = features[frozen].detach()
    value = loss(features)["loss"]
    del sent[:]
    value.backward()
    assert len(sent) == sends


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that operators give within it."""

    def __init__(self):
        super().__init__()
        self.found: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.found |= {tuple(x.shape) for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x)}
        return out


@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("overlap", ["none", "ring"])
@pytest.mark.parametrize("name", ["infonce", "sigmoid"])
def test_no_rank_of_a_ring_holds_the_texts_of_all(four_ranks, name, overlap, impl):
    settings = {"overlap": overlap, "impl": impl}
    settings |= {"label_smoothing": 0.1} if name == "infonce" and overlap == "ring" else {}
    loss = create_loss({name: settings})
    features = make(loss)
    with Shapes() as shapes:
        loss(features)["loss"].backward()
    assert ((4 * 5, D) in shapes.found) == (overlap == "none")
    assert ((5, 4 * 5) in shapes.found) == (overlap == "none" and impl == "dense")


def held(loss, ranks: int) -> tuple[float, float, float]:
    """(peak of forward, what it keeps, peak of backward) in tensors of own rows, beside the inputs."""
    rows, dim = 32, 512
    features = {
        name: torch.nn.functional.normalize(torch.randn(rows, dim), dim=-1).requires_grad_()
        for name in ("image_features", "text_features")
    }
    features |= {name: torch.tensor(value) for name, value in (("logit_scale", 10.0), ("logit_bias", -10.0))}
    with fake_ranks(ranks), Meter() as meter:
        value = loss(features)["loss"]
        forward, kept = meter.peak, meter.alive
        value.backward()
    return forward / (4 * rows * dim), kept / (4 * rows * dim), meter.peak / (4 * rows * dim)


@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("name", ["infonce", "sigmoid"])
def test_what_a_ring_holds_does_not_grow_with_the_ranks(name, impl):
    loss = create_loss({name: {"overlap": "ring", "impl": impl}})
    few, many = held(loss, 4), held(loss, 16)
    assert many[0] < 4 and many[1] < 0.3 and many[2] < 14
    assert many[2] < 1.05 * few[2]
    gathered = held(create_loss({name: {"impl": impl}}), 16)
    assert gathered[0] > 16 and gathered[1] > 16 and gathered[2] > 32


def test_a_ring_is_left_out_of_a_compiled_graph_or_refused(four_ranks, sent):
    loss = create_loss({"infonce": {"overlap": "ring"}})
    features = make(loss)
    expected = loss(features)["loss"]
    torch._dynamo.reset()
    found = torch.compile(loss, backend="eager")(features)["loss"]
    assert torch.allclose(found, expected)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="cannot trace"):
        torch.compile(loss, backend="eager", fullgraph=True)(features)


@pytest.mark.parametrize("loss", [InfoNCE, Sigmoid])
@pytest.mark.parametrize("settings", [{"overlap": "rings"}, {"overlap": "ring", "false_negatives": "mask"}])
def test_a_ring_refuses_what_needs_the_texts_of_all_when_it_is_made(loss, settings):
    with pytest.raises(ValueError, match="overlap"):
        loss(**settings)


@pytest.mark.parametrize(
    "spec",
    [
        {"infonce": {}},
        {"sigmoid": {}},
        {"infonce": {"same_ids": "mask", "label_smoothing": 0.1}},
    ],
)
def test_a_ring_refuses_ids_that_need_the_texts_of_all_on_one_process_too(spec):
    loss = create_loss({name: {**settings, "overlap": "ring"} for name, settings in spec.items()})
    features = make(loss)
    assert loss(features)["loss"].isfinite()
    with pytest.raises(ValueError, match="overlap"):
        loss({**features, "pair_ids": torch.arange(5)})
