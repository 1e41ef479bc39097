"""The gradient cache against one ordinary graph: values, gradients, random numbers, ranks and memory."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from clipkit.distributed import rank
from clipkit.grad_cache import cached_backward, split_batch
from tests.grad_cache.cases import (
    ALL,
    CLIP,
    Towers,
    assert_same_gradients,
    contrastive,
    make_batch,
    one_graph,
    with_premises,
)
from tests.processes import launch


@pytest.fixture
def model():
    torch.manual_seed(1)
    return Towers().double().train()


@pytest.mark.parametrize(
    "rows, premises, micro_batch_size", [(8, 4, 4), (9, 5, 4), (7, 2, 2), (6, 13, 3), (5, 1, 5)]
)
def test_equals_one_graph_with_the_same_masks(model, rows, premises, micro_batch_size):
    reference, batch = copy.deepcopy(model), make_batch(rows, premises)
    torch.manual_seed(7)
    expected = one_graph(reference, with_premises, batch, micro_batch_size, ALL)
    end = torch.get_rng_state()
    torch.manual_seed(7)
    terms = cached_backward(model, with_premises, batch, micro_batch_size=micro_batch_size, inputs=ALL)
    assert torch.equal(torch.get_rng_state(), end), "the run's random numbers must go on as after one pass"
    for name, value in expected.items():
        assert not terms[name].requires_grad
        torch.testing.assert_close(terms[name], value.detach(), rtol=1e-12, atol=0)
    assert_same_gradients(model, reference, 1e-12)


def test_a_loss_that_draws_random_numbers_leaves_the_generator_as_one_graph_does(model):
    def noisy(features):
        return contrastive(features) * torch.rand(())

    reference, batch = copy.deepcopy(model), make_batch(6)
    torch.manual_seed(7)
    one_graph(reference, noisy, batch, 2, CLIP)
    end = torch.get_rng_state()
    torch.manual_seed(7)
    cached_backward(model, noisy, batch, micro_batch_size=2, inputs=CLIP)
    assert torch.equal(torch.get_rng_state(), end)
    assert_same_gradients(model, reference, 1e-12)


def test_gradients_add_to_what_is_there_and_follow_backward_scale(model):
    reference, batch = copy.deepcopy(model), make_batch(6)
    for part in (0, 1):
        torch.manual_seed(part)
        one_graph(reference, lambda f: {"loss": 0.5 * contrastive(f)}, batch, 2, CLIP)
    for part in (0, 1):
        torch.manual_seed(part)
        terms = cached_backward(model, contrastive, batch, micro_batch_size=2, backward_scale=0.5)
    assert_same_gradients(model, reference, 1e-12)
    assert terms["loss"] > 1  # the value itself is not scaled


@pytest.mark.parametrize("outer", [False, True])
def test_autocast_gives_every_weight_the_full_batch_gradient(outer):
    """bf16 rounding of another batch size is all that differs, also inside an autocast of the caller's."""
    torch.manual_seed(1)
    model = Towers(batch_norm=False, dropout=0.0, attention_dropout=0.0).train()
    reference, batch = copy.deepcopy(model), make_batch(8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        features = reference(batch)
    contrastive({name: value.float() for name, value in features.items()}).backward()
    in_fp32 = lambda f: contrastive({name: value.float() for name, value in f.items()})
    if outer:
        with torch.autocast("cpu", torch.bfloat16):
            cached_backward(model, in_fp32, batch, micro_batch_size=3)
    else:
        cached_backward(
            model, in_fp32, batch, micro_batch_size=3, autocast=torch.autocast("cpu", torch.bfloat16)
        )
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert parameter.grad is not None, name
        assert (parameter.grad - expected.grad).norm() <= 0.03 * expected.grad.norm() + 1e-4, name


def test_several_losses_of_the_registry_at_once(model):
    """One cached step of four losses over three streams equals one graph, parameters of a loss included."""
    from clipkit.losses import create_loss

    spec = {
        "infonce": {},
        "cyclic": {"weight": 0.1},
        "simcse": {"head": True, "embed_dim": 8},
        "nli_contrastive": {},
    }
    torch.manual_seed(2)
    loss = create_loss(spec).double()
    batch = make_batch(6)
    generator = torch.Generator().manual_seed(0)
    for name in ("premise", "entailment", "contradiction"):
        batch[name] = torch.randint(0, 20, (4, 5), generator=generator)
    reference, reference_loss = copy.deepcopy(model), copy.deepcopy(loss)
    torch.manual_seed(9)
    expected = one_graph(reference, reference_loss, batch, 2, loss.inputs)
    torch.manual_seed(9)
    terms = cached_backward(model, loss, batch, micro_batch_size=2)
    assert terms.keys() == {"loss", *spec}
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value.detach(), rtol=1e-12, atol=0)
    assert_same_gradients(model, reference, 1e-12)
    assert_same_gradients(loss, reference_loss, 1e-12)


def texts(rows, generator):
    """(rows, 8) ids: start 2, words 3 to 28, end 29, padding 0."""
    text = torch.randint(3, 29, (rows, 8), generator=generator)
    text[:, 0], text[:, 5], text[:, 6:] = 2, 29, 0
    return text


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_dual_encoder_with_every_stream_of_a_step(activation_checkpointing):
    """clipkit's own model: two text views, masked tokens, two sentence streams with fewer rows than
    micro-batches."""
    pytest.importorskip("timm")
    from clipkit.losses import create_loss
    from clipkit.model import DualEncoder
    from clipkit.towers import create_image_tower, create_text_tower

    torch.manual_seed(0)
    image = {"name": "timm", "model": "test_resnet", "image_size": 32}
    text = {"name": "transformer", "width": 16, "layers": 1, "heads": 2, "dropout": 0.1, "pooling": "mean"}
    model = DualEncoder(
        create_image_tower({**image, "activation_checkpointing": activation_checkpointing}, embed_dim=16),
        create_text_tower(
            {**text, "causal": False}, embed_dim=16, vocab_size=30, context_length=8, pad_id=0, eot_id=29
        ),
        embed_dim=16, init_logit_bias=-1.0, mlm_probability=0.3, mask_id=1, sot_id=2,
    )  # fmt: skip
    model = model.double().train()
    spec = {name: {} for name in ("infonce", "cyclic", "sigmoid", "simcse", "nli_contrastive", "mlm")}
    loss = create_loss({**spec, "nli_softmax": {"embed_dim": 16}, "fastclip": {"num_samples": 50}}).double()
    generator = torch.Generator().manual_seed(0)
    batch = {
        "image": torch.randint(0, 256, (12, 3, 32, 32), generator=generator, dtype=torch.uint8),
        "text": texts(12, generator),
        "sample_index": torch.randperm(50, generator=generator)[:12],
        "pair_ids": torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]),
        "key": list("abcdefghijkl"),
        "nli_labels": torch.tensor([0, 2, 1]),
    }
    batch |= {name: texts(2, generator) for name in ("premise", "entailment", "contradiction")}
    batch |= {name: texts(3, generator) for name in ("pair_premise", "pair_hypothesis")}
    reference, reference_loss = copy.deepcopy(model), copy.deepcopy(loss)
    torch.manual_seed(3)
    expected = one_graph(reference, reference_loss, batch, 3, (*loss.inputs, "pair_ids"))
    torch.manual_seed(3)
    terms = cached_backward(model, loss, batch, micro_batch_size=3)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value.detach(), rtol=1e-12, atol=0)
    assert_same_gradients(model, reference, 1e-11)
    assert_same_gradients(loss, reference_loss, 1e-11)


def test_one_micro_batch_is_the_plain_step_to_the_bit(model):
    reference, batch = copy.deepcopy(model), make_batch(6)
    torch.manual_seed(4)
    contrastive(reference(batch)).backward()
    torch.manual_seed(4)
    cached_backward(model, contrastive, batch, micro_batch_size=100)
    for parameter, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)
    for value, expected in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(value, expected)


def test_frozen_tower_and_unused_feature_are_left_alone(model):
    for parameter in model.image.parameters():
        parameter.requires_grad_(False)
    cached_backward(model, contrastive, make_batch(8, 4), micro_batch_size=4, inputs=ALL)
    assert all(parameter.grad is None for parameter in model.image.parameters())
    assert all(parameter.grad is not None for parameter in model.block.parameters())


def test_graphs_hold_one_micro_batch_at_a_time(model):
    """The most bytes saved for backward at once are a micro-batch's, not the batch's."""
    batch = make_batch(32)

    def peak(step):
        saved = {"now": 0, "peak": 0}

        class Held:
            def __init__(self, tensor):
                self.tensor = tensor
                saved["now"] += tensor.nbytes
                saved["peak"] = max(saved["peak"], saved["now"])

            def __del__(self):
                saved["now"] -= self.tensor.nbytes

        # Weights are saved too; what grows with rows is what counts.
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            step()
        return saved["peak"]

    full = peak(lambda: contrastive(model(batch)).backward())
    cached = peak(lambda: cached_backward(model, contrastive, batch, micro_batch_size=4))
    assert cached < 0.3 * full, (cached, full)


class Forgetful(Towers):
    """Draws its own noise from a generator that nobody sets back."""

    def __init__(self):
        super().__init__(batch_norm=False)
        self.generator = torch.Generator().manual_seed(0)

    def text(self, text):
        return F.normalize(super().text(text) + torch.randn(len(text), 8, generator=self.generator), dim=-1)


def test_randomness_out_of_reach_is_an_error():
    with pytest.raises(RuntimeError, match="text_features moved by .* between the two passes"):
        cached_backward(Forgetful().double(), contrastive, make_batch(8), micro_batch_size=4)


@pytest.mark.parametrize(
    "settings, batch, message",
    [
        ({"micro_batch_size": 0}, None, "micro_batch_size is 0: give at least 1"),
        ({"micro_batch_size": 2, "batch_norm": "hole"}, None, "Did you mean 'whole'"),
        ({"micro_batch_size": 2}, {"epoch": 3}, "no rows to split"),
    ],
)
def test_wrong_settings_say_what_to_do(model, settings, batch, message):
    with pytest.raises(ValueError, match=message):
        cached_backward(model, contrastive, make_batch(4) if batch is None else batch, **settings)


def test_a_loss_without_a_loss_says_so(model):
    with pytest.raises(ValueError, match="under \"loss\"; it returned .*'infonce'"):
        cached_backward(model, lambda f: {"infonce": contrastive(f)}, make_batch(4), micro_batch_size=2)


def test_a_nan_in_the_batch_is_a_nan_loss_and_no_error(model):
    """The trainer looks at the loss it gets back; nothing here may hide it or stop before."""
    batch = make_batch(6)
    batch["image"][4] = math.nan
    assert math.isnan(cached_backward(model, contrastive, batch, micro_batch_size=2)["loss"])


def test_split_keeps_every_row_once_and_in_order():
    batch = {
        "image": torch.arange(9),
        "premise": torch.arange(2),
        "key": list("abcdefghi"),
        "epoch": 3,
        "name": "cc3m",
    }
    parts = split_batch(batch, 4)
    assert [len(part["image"]) for part in parts] == [3, 3, 3]
    assert [part["premise"].tolist() for part in parts] == [[], [0], [1]]
    assert torch.equal(torch.cat([part["image"] for part in parts]), batch["image"])
    assert sum((part["key"] for part in parts), []) == batch["key"]
    assert all(part["epoch"] == 3 and part["name"] == "cc3m" for part in parts)


# A loss with parameters of its own, which DDP reduces beside the model's.
LOSSES = {"infonce": {}, "simcse": {"head": True, "embed_dim": 8}}


def _towers(kind):
    torch.manual_seed(1)
    return Towers(batch_norm=kind == "ddp", dropout=0.2).double().train()


def _make_loss():
    from clipkit.losses import create_loss

    torch.manual_seed(2)
    return create_loss(LOSSES).double()


def _wrap(kind, model, loss, buckets):
    """Model and loss under DDP, which notes every bucket it reduces, or the model and its block under
    FSDP2."""
    if kind == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model.block, mesh=mesh)
        return fully_shard(model, mesh=mesh), loss
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    def counted(state, bucket):
        buckets.append(bucket.index())
        return allreduce_hook(state, bucket)

    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, counted)
    return wrapped, DistributedDataParallel(loss)


def _ranks():
    """On each of two ranks and for both kinds: value, reduced gradients, buffers, number of reductions."""
    results = {}
    for kind in ("ddp", "fsdp"):
        model, loss, buckets = _towers(kind), _make_loss(), []
        wrapped, wrapped_loss = _wrap(kind, model, loss, buckets)
        whole = make_batch(8)
        batch = {name: whole[name][4 * rank() : 4 * rank() + 4] for name in ("image", "text")}
        if kind == "ddp":
            # DDP starts a step from rank 0's buffers.
            model.image[1].running_mean += rank()
        torch.manual_seed(10 + rank())
        terms = cached_backward(wrapped, wrapped_loss, batch, micro_batch_size=2)
        gradients = {
            n: p.grad.full_tensor() if kind == "fsdp" else p.grad for n, p in model.named_parameters()
        }
        if kind == "ddp":
            gradients |= {f"loss.{n}": p.grad for n, p in loss.named_parameters()}
        results[kind] = (terms["loss"].item(), gradients, dict(model.named_buffers()), len(buckets))
    return results


@pytest.fixture(scope="module")
def two_ranks():
    return launch(_ranks, 2)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_with_micro_batches_give_one_process_gradients(two_ranks, kind):
    """Two ranks of two micro-batches are one process with four, under the same masks; DDP reduces once."""
    reference, loss = _towers(kind), _make_loss()
    parts, features = split_batch(make_batch(8), 2), []
    for r in range(2):
        torch.manual_seed(10 + r)
        features += [reference(part, loss.inputs) for part in parts[2 * r : 2 * r + 2]]
    first = features[0]
    whole = {k: torch.cat([f[k] for f in features]) if first[k].dim() else first[k] for k in loss.inputs}
    expected = loss(whole)["loss"]
    expected.backward()
    wanted = {name: parameter.grad for name, parameter in reference.named_parameters()}
    if kind == "ddp":
        wanted |= {f"loss.{name}": parameter.grad for name, parameter in loss.named_parameters()}
    for index, results in enumerate(two_ranks):
        value, gradients, buffers, reductions = results[kind]
        assert math.isclose(value, expected.item(), rel_tol=1e-12)
        assert gradients.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-10, atol=1e-15, msg=name)
        if kind == "ddp":
            assert reductions == 1
            assert int(buffers["image.1.num_batches_tracked"]) == 1
            own = reference.image[0](make_batch(8)["image"][4 * index : 4 * index + 4])
            torch.testing.assert_close(buffers["image.1.running_mean"], 0.1 * own.mean((0, 2, 3)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_masks_are_replayed_and_the_generator_goes_on(model):
    model = model.cuda()
    reference, batch = copy.deepcopy(model), make_batch(9)
    on_device = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    torch.manual_seed(7)
    one_graph(reference, contrastive, on_device, 4, CLIP)
    end = torch.cuda.get_rng_state()
    torch.manual_seed(7)
    cached_backward(model, contrastive, batch, micro_batch_size=4, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), end)
    assert_same_gradients(model, reference, 1e-10)
