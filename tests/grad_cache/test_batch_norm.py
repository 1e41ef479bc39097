"""BatchNorm in micro-batches: what equals the full batch, what does not, and one update of the statistics."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from clipkit.grad_cache import cached_backward
from tests.grad_cache.cases import (
    CLIP,
    Towers,
    assert_same_gradients,
    assert_same_state,
    contrastive,
    make_batch,
)


@pytest.fixture
def model():
    torch.manual_seed(1)
    return Towers().double().train()


class MasksByRow(TorchFunctionMode):
    """Dropout masks that belong to rows: call i draws for the whole batch and keeps this part's rows."""

    def __init__(self, seed, rows, total):
        super().__init__()
        self.seed, self.rows, self.total, self.calls = seed, rows, total, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.dropout:
            return func(*args, **kwargs)
        x, p, training = args[0], kwargs["p"], kwargs["training"]
        generator = torch.Generator().manual_seed(1000 * self.seed + self.calls)
        self.calls += 1
        mask = torch.rand(self.total, *x.shape[1:], generator=generator)[self.rows] >= p
        return x * mask / (1 - p) if training else x


class RowMasked(nn.Module):
    """A model whose dropout masks depend on the step and the row, not on how the batch was split."""

    def __init__(self, model, total):
        super().__init__()
        self.model, self.total, self.step = model, total, 0

    def forward(self, batch, inputs=CLIP):
        with MasksByRow(self.step, batch["row"], self.total):
            return self.model(batch, inputs)


def train(model, step, *, steps=5, rows=12):
    """Train by SGD with momentum; `step` leaves a batch's gradient in the parameters. Returns the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for k in range(steps):
        model.step = k
        losses.append(float(step(model, {**make_batch(rows, seed=k), "row": torch.arange(rows)})))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def full_batch_step(model, batch):
    loss = contrastive(model(batch))
    loss.backward()
    return loss.detach()


def resnet_and_dropout_transformer():
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    model = Towers(dropout=0.3, attention_dropout=0.0)
    model.image = timm.create_model("test_resnet", num_classes=8)
    # Zero-initialised last norms would hide the residual branches from the gradient.
    for module in model.image.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return RowMasked(model.double().train(), 12)


def test_five_steps_of_a_batch_norm_resnet_and_dropout_transformer_equal_the_full_batch():
    """With batch_norm="whole" and the same masks only rounding differs: 1e-11 after five float64 steps."""
    model = resnet_and_dropout_transformer()
    reference = copy.deepcopy(model)
    expected = train(reference, full_batch_step)
    losses = train(
        model, lambda m, b: cached_backward(m, contrastive, b, micro_batch_size=5, batch_norm="whole")["loss"]
    )
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-11, atol=0)
    assert_same_state(model, reference, 1e-11)


def test_micro_batches_normalised_apart_differ_from_the_full_batch_as_documented():
    """The default differs from the full batch in BatchNorm alone: frozen, it is exact."""
    model = resnet_and_dropout_transformer()
    frozen = copy.deepcopy(model)
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    step = lambda m, b: cached_backward(m, contrastive, b, micro_batch_size=5)["loss"]
    for start, same in ((frozen, True), (model, False)):
        cached, reference = copy.deepcopy(start), copy.deepcopy(start)
        train(reference, full_batch_step)
        train(cached, step)
        if same:
            assert_same_state(cached, reference, 1e-9)
        else:
            with pytest.raises(AssertionError):
                assert_same_state(cached, reference, 1e-3)


def test_running_statistics_move_once_to_those_of_the_whole_batch(model):
    """The first BatchNorm sees the images themselves, so its statistics can be computed by hand."""
    batch = make_batch(9)
    cached_backward(model, contrastive, batch, micro_batch_size=4)
    values = model.image[0](batch["image"]).transpose(0, 1).flatten(1)
    norm = model.image[1]
    torch.testing.assert_close(norm.running_mean, 0.1 * values.mean(1))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * values.var(1))
    assert int(norm.num_batches_tracked) == 1


@pytest.mark.parametrize("batch_norm", ["micro", "whole"])
def test_a_cumulative_average_and_a_layer_called_twice_follow_torch(batch_norm):
    """momentum=None averages over updates; a layer called twice in a forward moves twice, as in torch."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3, momentum=None)
            self.other = nn.BatchNorm1d(3, momentum=0.25)

        def forward(self, batch, inputs=None):
            image, text = self.norm(batch["image"]), self.norm(batch["text"])
            return {
                "image_features": self.other(self.other(image)),
                "text_features": text,
                "logit_scale": image.new_ones(()),
            }

    generator = torch.Generator().manual_seed(0)
    steps = [
        {k: torch.randn(8, 3, generator=generator).double() + 2 for k in ("image", "text")} for _ in range(3)
    ]
    cached, reference = Twice().double().train(), Twice().double().train()
    for batch in steps:
        reference(batch)
        cached_backward(cached, contrastive, batch, micro_batch_size=4, batch_norm=batch_norm)
    # `other` sees normalised inputs in its second call, which equal the whole batch's only with "whole".
    names = ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "other.num_batches_tracked"]
    names += ["other.running_mean", "other.running_var"] if batch_norm == "whole" else []
    for name in names:
        torch.testing.assert_close(
            cached.state_dict()[name], reference.state_dict()[name], rtol=1e-12, atol=1e-12
        )


def test_buffers_are_as_they_were_after_an_error(model):
    before = copy.deepcopy(model.state_dict())

    def broken(features):
        raise ArithmeticError("no loss today")

    with pytest.raises(ArithmeticError):
        cached_backward(model, broken, make_batch(8), micro_batch_size=4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not model.image[1]._forward_hooks


def test_compiled_model_gets_the_same_gradients_and_statistics(model):
    """Forward hooks do not run inside a compiled graph; statistics are then read from the buffers."""
    eager, batch = copy.deepcopy(model), make_batch(8)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        torch.manual_seed(5)
        cached_backward(eager, contrastive, batch, micro_batch_size=4)
        torch.manual_seed(5)
        cached_backward(compiled, contrastive, batch, micro_batch_size=4)
    assert_same_gradients(model, eager, 1e-9)
    for name in ("running_mean", "num_batches_tracked"):
        torch.testing.assert_close(getattr(model.image[1], name), getattr(eager.image[1], name))
    # 25 positions of 4 rows: the count taken as large overstates the batch's variance by 1 % at most.
    torch.testing.assert_close(model.image[1].running_var, eager.image[1].running_var, rtol=0.01, atol=0)


def test_whole_batch_norm_refuses_sync_batch_norm(model):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.raises(ValueError, match="SyncBatchNorm.*use batch_norm='micro'"):
        cached_backward(model, contrastive, make_batch(4), micro_batch_size=2, batch_norm="whole")
