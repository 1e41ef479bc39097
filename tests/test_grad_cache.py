"""The gradient cache against one ordinary graph: values, gradients, buffers, random numbers, ranks and
memory.

"One graph" below is plain autograd: the model is called on each micro-batch (or once on all rows), everything
is kept, and a single backward runs through it. Nothing of clipkit.grad_cache but the way of splitting rows is
used for it.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from clipkit.distributed import launch
from clipkit.grad_cache import cached_backward, split_batch

ALL = ("image_features", "text_features", "premise_features", "logit_scale")


class Towers(nn.Module):
    """A convolutional image tower (BatchNorm optional) and a dropout Transformer layer over text."""

    def __init__(self, *, batch_norm=True, dropout=0.2, attention_dropout=0.2):
        super().__init__()
        norm = nn.BatchNorm2d if batch_norm else nn.Identity
        self.image = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, bias=False), norm(4), nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, 3, stride=2, bias=False), norm(6), nn.ReLU(inplace=True),
            nn.Flatten(), nn.Linear(24, 8),
        )  # fmt: skip
        self.embedding = nn.Embedding(20, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
        self.block.self_attn.dropout = attention_dropout
        self.log_logit_scale = nn.Parameter(torch.tensor([1.0]))

    def text(self, text):
        return F.normalize(self.block(self.embedding(text)).mean(1), dim=-1)

    def forward(self, batch, inputs=("image_features", "text_features", "logit_scale")):
        features = {}
        if "image_features" in inputs:
            features["image_features"] = F.normalize(self.image(batch["image"]), dim=-1)
        if "text_features" in inputs:
            features["text_features"] = self.text(batch["text"])
        if "text_features_view2" in inputs:
            features["text_features_view2"] = self.text(batch["text"])
        for name in ("premise", "entailment", "contradiction"):
            if f"{name}_features" in inputs:
                features[f"{name}_features"] = self.text(batch[name])
        if "logit_scale" in inputs:
            features["logit_scale"] = self.log_logit_scale.exp()[0]
        return features


def contrastive(features):
    """Radford et al. 2021, figure 3, in plain torch."""
    logits = features["logit_scale"] * features["image_features"] @ features["text_features"].T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def with_premises(features):
    """A second term over a second stream, of another number of rows."""
    premise = features["premise_features"]
    spread = (premise @ premise.T).square().sum()
    return {"loss": contrastive(features) + 0.3 * spread, "spread": spread}


def make_batch(rows, premises=None, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "image": torch.randn(rows, 3, 12, 12, generator=generator, dtype=dtype),
        "text": torch.randint(0, 20, (rows, 5), generator=generator),
        "key": [f"{k:03d}" for k in range(rows)],
        "epoch": 3,
    }
    if premises:
        batch["premise"] = torch.randint(0, 20, (premises, 4), generator=generator)
    return batch


@pytest.fixture
def model():
    torch.manual_seed(1)
    return Towers().double().train()


def one_graph(model, loss, batch, micro_batch_size, inputs):
    """All micro-batches' graphs at once, one backward; returns the terms."""
    parts = [model(part, inputs) for part in split_batch(batch, micro_batch_size)]
    whole = {k: torch.cat([p[k] for p in parts]) if parts[0][k].dim() else parts[0][k] for k in parts[0]}
    terms = loss(whole)
    terms = terms if isinstance(terms, dict) else {"loss": terms}
    terms["loss"].backward()
    return terms


def assert_same_gradients(model, reference, tolerance):
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        if expected.grad is None:
            assert parameter.grad is None, name
            continue
        error = (parameter.grad - expected.grad).norm()
        # The second term is for gradients that are 0 but for rounding.
        assert error <= tolerance * expected.grad.norm() + 1e-15, (name, float(error / expected.grad.norm()))


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


def test_gradients_add_to_what_is_there_and_follow_backward_scale(model):
    reference, batch = copy.deepcopy(model), make_batch(6)
    for part in (0, 1):
        torch.manual_seed(part)
        one_graph(reference, lambda f: {"loss": 0.5 * contrastive(f)}, batch, 2, ALL[:2] + ALL[3:])
    for part in (0, 1):
        torch.manual_seed(part)
        terms = cached_backward(model, contrastive, batch, micro_batch_size=2, backward_scale=0.5)
    assert_same_gradients(model, reference, 1e-12)
    assert terms["loss"] > 1  # the value itself is not scaled


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

    def forward(self, batch, inputs=ALL[:2] + ALL[3:]):
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


def assert_same_state(model, reference, tolerance):
    for (name, value), expected in zip(
        model.state_dict().items(), reference.state_dict().values(), strict=True
    ):
        if not value.is_floating_point():
            assert torch.equal(value, expected), name
            continue
        error = float((value - expected).norm() / expected.norm().clamp_min(1e-3))
        assert error <= tolerance, (name, error)


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
    """With batch_norm="whole" and the same masks only rounding differs: 1e-9 after five float64 steps."""
    model = resnet_and_dropout_transformer()
    reference = copy.deepcopy(model)
    expected = train(reference, full_batch_step)
    losses = train(
        model, lambda m, b: cached_backward(m, contrastive, b, micro_batch_size=5, batch_norm="whole")["loss"]
    )
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-9, atol=0)
    assert_same_state(model, reference, 1e-9)


def test_micro_batches_normalised_apart_differ_from_the_full_batch_as_documented():
    """The default differs from the full batch in BatchNorm alone: frozen, it is exact."""
    model = resnet_and_dropout_transformer()
    frozen = copy.deepcopy(model)
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    step = lambda m, b: cached_backward(m, contrastive, b, micro_batch_size=5)["loss"]  # noqa: E731
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


@pytest.mark.parametrize("outer", [False, True])
def test_autocast_gives_every_weight_the_full_batch_gradient(outer):
    """bf16 rounding of another batch size is all that differs, also inside an autocast of the caller's."""
    torch.manual_seed(1)
    model = Towers(batch_norm=False, dropout=0.0, attention_dropout=0.0).train()
    reference, batch = copy.deepcopy(model), make_batch(8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        features = reference(batch)
    contrastive({name: value.float() for name, value in features.items()}).backward()
    in_fp32 = lambda f: contrastive({name: value.float() for name, value in f.items()})  # noqa: E731
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


def test_whole_batch_norm_refuses_sync_batch_norm(model):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.raises(ValueError, match="SyncBatchNorm.*use batch_norm='micro'"):
        cached_backward(model, contrastive, make_batch(4), micro_batch_size=2, batch_norm="whole")


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


def _ranks(kind):
    """On each of two ranks: gradients reduced by DDP or FSDP2, buffers, and the number of reductions."""
    from torch.nn.parallel import DistributedDataParallel

    from clipkit.distributed import rank
    from clipkit.losses import create_loss

    torch.manual_seed(1)
    model = Towers(batch_norm=kind == "ddp", dropout=0.2).double().train()
    batch = {
        k: v[4 * rank() : 4 * rank() + 4] if k in ("image", "text") else v for k, v in make_batch(8).items()
    }
    batch.pop("key")
    loss, buckets = create_loss("infonce"), []
    if kind == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model.block, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    else:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        wrapped = DistributedDataParallel(model)

        def counted(state, bucket):
            buckets.append(bucket.index())
            return allreduce_hook(state, bucket)

        wrapped.register_comm_hook(None, counted)
    torch.manual_seed(10 + rank())
    terms = cached_backward(wrapped, loss, batch, micro_batch_size=2)
    full = {n: p.grad.full_tensor() if kind == "fsdp" else p.grad for n, p in model.named_parameters()}
    return float(terms["loss"]), full, dict(model.named_buffers()), len(buckets)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_with_micro_batches_give_one_process_gradients(kind):
    """Two ranks of two micro-batches are one process with four, under the same masks; DDP reduces once."""
    ranks = launch(_ranks, 2, kind)
    torch.manual_seed(1)
    reference = Towers(batch_norm=kind == "ddp", dropout=0.2).double().train()
    parts = split_batch(make_batch(8), 2)
    features, inputs = [], ("image_features", "text_features", "logit_scale")
    for r in range(2):
        torch.manual_seed(10 + r)
        features += [reference(part, inputs) for part in parts[2 * r : 2 * r + 2]]
    whole = {
        k: torch.cat([f[k] for f in features]) if features[0][k].dim() else features[0][k] for k in inputs
    }
    loss = contrastive(whole)
    loss.backward()
    for value, gradients, _, _ in ranks:
        assert math.isclose(value, loss.item(), rel_tol=1e-12)
        for name, parameter in reference.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-15, msg=name)
    if kind == "ddp":
        assert [buckets for *_, buckets in ranks] == [1, 1]
        assert all(int(buffers["image.1.num_batches_tracked"]) == 1 for _, _, buffers, _ in ranks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_masks_are_replayed_and_the_generator_goes_on(model):
    model = model.cuda()
    reference, batch = copy.deepcopy(model), make_batch(9)
    on_device = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    torch.manual_seed(7)
    one_graph(reference, contrastive, on_device, 4, ALL[:2] + ALL[3:])
    end = torch.cuda.get_rng_state()
    torch.manual_seed(7)
    cached_backward(model, contrastive, batch, micro_batch_size=4, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), end)
    assert_same_gradients(model, reference, 1e-10)
