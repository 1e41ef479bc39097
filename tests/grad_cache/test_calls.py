"""Models, losses and batches of other kinds than clipkit's own, each against one plain backward.

The expected gradients are autograd's on the whole batch, through the model called by hand and the loss written out
in plain torch.
"""

from __future__ import annotations

import collections
import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clipkit.distributed import rank
from clipkit.grad_cache import cached_backward, split_batch
from clipkit.losses import InfoNCE, Sigmoid, Uniformity, create_loss
from tests.grad_cache.cases import assert_same_gradients, contrastive
from tests.processes import launch

ROWS = 7
Pair = collections.namedtuple("Pair", "image text")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Linear(nn.Module):
    """Two linear towers and a scale of shape `scale_shape`; subclasses say how they are called."""

    def __init__(self, scale_shape=()):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(5, 4), nn.Linear(3, 4)
        self.log_scale = nn.Parameter(torch.full(scale_shape, 1.5))
        self.double()

    def features(self, image, text):
        return {
            "image_features": F.normalize(self.image(image), dim=-1),
            "text_features": F.normalize(self.text(text), dim=-1),
            "logit_scale": self.log_scale.exp(),
        }


class TakesBatch(Linear):
    def forward(self, batch):
        return self.features(batch["image"], batch["text"])


class TakesNested(Linear):
    def forward(self, batch):
        assert isinstance(batch["views"], tuple) and batch["meta"]["name"] == "cc3m"
        return self.features(batch["views"][0], batch["text"]["words"]["vectors"])


class TakesFields(Linear):
    def forward(self, image, text=None):
        return self.features(image, text)


class Renamed(Linear):
    def forward(self, images, texts):
        return self.features(images, texts)


class TakesPair(Linear):
    def forward(self, batch, inputs):
        assert isinstance(batch, Pair) and inputs == InfoNCE.inputs
        return self.features(batch.image, batch.text)


IMAGE, TEXT = numbers(ROWS, 5), numbers(ROWS, 3, seed=1)
KEYS = [f"{k:03d}" for k in range(ROWS)]
BATCHES = {
    "a mapping, forward(batch)": (TakesBatch, {"image": IMAGE, "text": TEXT, "key": KEYS}),
    "a mapping by name": (TakesFields, {"image": IMAGE, "text": TEXT}),
    "a UserDict by name": (TakesFields, collections.UserDict({"image": IMAGE, "text": TEXT})),
    "a tuple": (TakesFields, (IMAGE, TEXT)),
    "a list": (TakesFields, [IMAGE, TEXT]),
    "a namedtuple, forward(batch, inputs)": (TakesPair, Pair(IMAGE, TEXT)),
    "nested": (
        TakesNested,
        {
            "views": (IMAGE, -IMAGE),
            "text": {"words": {"vectors": TEXT}, "lengths": None},
            "meta": {"name": "cc3m", "key": KEYS},
        },
    ),
}
LOSSES = {
    "InfoNCE()": (InfoNCE, contrastive),
    "a sum": (lambda: create_loss(["infonce"]), contrastive),
    "a function": (lambda: contrastive, contrastive),
    "by name": (
        lambda: (
            lambda image_features, text_features, logit_scale, missing=1.0: contrastive(
                {"image_features": image_features, "text_features": text_features, "logit_scale": logit_scale}
            )
        ),
        contrastive,
    ),
}


def plain(model, expected_loss):
    """One backward of the whole batch; the value."""
    features = model.features(IMAGE, TEXT)
    value = expected_loss({name: v.reshape(()) if v.numel() == 1 else v for name, v in features.items()})
    value.backward()
    return value.detach()


def assert_is_one_backward(model, loss, batch, expected_loss=contrastive, **settings):
    for size in (3, ROWS):
        cached, reference = copy.deepcopy(model), copy.deepcopy(model)
        expected = plain(reference, expected_loss)
        terms = cached_backward(cached, loss, batch, micro_batch_size=size, **settings)
        torch.testing.assert_close(terms["loss"], expected, rtol=1e-12, atol=0)
        assert_same_gradients(cached, reference, 1e-12)


@pytest.mark.parametrize("kind", list(BATCHES))
def test_batches_of_every_kind(kind):
    model, batch = BATCHES[kind]
    assert_is_one_backward(model(), InfoNCE(), batch)


@pytest.mark.parametrize("kind", list(LOSSES))
@pytest.mark.parametrize("scale_shape", [(), (1,)])
def test_losses_of_every_kind_and_a_scale_of_either_shape(kind, scale_shape):
    loss, expected = LOSSES[kind]
    if scale_shape == (1,) and kind in ("a function", "by name"):
        loss = loss()
        given, loss = loss, lambda f: given({**f, "logit_scale": f["logit_scale"].reshape(())})
        if kind == "by name":
            loss = lambda image_features, text_features, logit_scale: given(
                image_features, text_features, logit_scale.reshape(())
            )
    else:
        loss = loss()
    batch = {"image": IMAGE, "text": TEXT}
    assert_is_one_backward(TakesBatch(scale_shape), loss, batch, expected)


def test_a_loss_of_named_features_alone():
    """uniformity takes any names; Wang and Isola 2020: log mean exp(-2 ||x - y||^2) over ordered pairs."""

    def spread(features):
        value = 0
        for name in ("image_features", "text_features"):
            distances = torch.pdist(features[name]).square()
            value = value + (-2 * distances).exp().mean().log() / 2
        return value

    class WithoutScale(TakesBatch):
        def features(self, image, text):
            return {k: v for k, v in super().features(image, text).items() if k != "logit_scale"}

    assert_is_one_backward(WithoutScale(), Uniformity(), {"image": IMAGE, "text": TEXT}, spread)


def test_a_call_of_ones_own():
    def forward(model, part):
        image, text, scale = model.features(part["x"], part["y"]).values()
        return {"image_features": image, "text_features": text, "logit_scale": scale}

    assert_is_one_backward(Linear(), InfoNCE(), {"x": IMAGE, "y": TEXT, "z": KEYS}, forward=forward)


def test_optional_features_go_to_a_bare_loss():
    ids = torch.tensor([0, 1, 0, 2, 3, 3, 4])

    class WithIds(TakesBatch):
        def forward(self, batch):
            return {**super().forward(batch), "pair_ids": batch["pair_ids"]}

    def masked(features):
        logits = features["logit_scale"] * features["image_features"] @ features["text_features"].T
        same = (ids[:, None] == ids[None]) & ~torch.eye(ROWS, dtype=torch.bool)
        logits, labels = logits.masked_fill(same, -torch.inf), torch.arange(ROWS)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    batch = {"image": IMAGE, "text": TEXT, "pair_ids": ids}
    assert_is_one_backward(WithIds(), InfoNCE(same_ids="mask"), batch, masked)


def tiny(transformers, kind):
    """transformers' CLIP or SigLIP of one small layer a side, with a batch as their processors give it."""
    text = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 6,
        "bos_token_id": 0,
        "eos_token_id": 39,
        "pad_token_id": 1,
    }
    image = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    torch.manual_seed(0)
    names = {"clip": ("CLIPConfig", "CLIPModel"), "siglip": ("SiglipConfig", "SiglipModel")}[kind]
    config = getattr(transformers, names[0])(text_config=text, vision_config=image)
    model = getattr(transformers, names[1])(config).double().train()
    ids = torch.randint(2, 39, (ROWS, 6), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 39
    batch = transformers.BatchEncoding({"input_ids": ids, "pixel_values": numbers(ROWS, 3, 16, 16)})
    if kind == "clip":
        batch["attention_mask"] = torch.ones_like(ids)
    return model, batch


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_transformers_models_as_they_are(kind):
    """Expected: transformers' own loss (return_loss=True) and its backward on the whole batch."""
    transformers = pytest.importorskip("transformers")
    model, batch = tiny(transformers, kind)
    reference = copy.deepcopy(model)
    loss = InfoNCE() if kind == "clip" else Sigmoid()
    for size in (3, ROWS):
        reference.zero_grad()
        model.zero_grad()
        expected = reference(**batch, return_loss=True).loss
        expected.backward()
        terms = cached_backward(model, loss, batch, micro_batch_size=size)
        torch.testing.assert_close(terms["loss"], expected.detach(), rtol=1e-10, atol=0)
        assert_same_gradients(model, reference, 1e-9)


def _ranks():
    """transformers' CLIP under DDP, each rank with its share in two micro-batches."""
    import transformers

    model, batch = tiny(transformers, "clip")
    share = slice(3 * rank(), 3 * rank() + 3)
    own = {name: value[share] for name, value in batch.items()}
    wrapped = DistributedDataParallel(model)
    terms = cached_backward(wrapped, InfoNCE(), own, micro_batch_size=2)
    return terms["loss"], {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_transformers_model_under_ddp_has_one_process_gradients():
    transformers = pytest.importorskip("transformers")
    model, batch = tiny(transformers, "clip")
    expected = model(**{name: value[:6] for name, value in batch.items()}, return_loss=True).loss
    expected.backward()
    for value, gradients in launch(_ranks, 2):
        torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=0)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                error = (gradients[name] - parameter.grad).norm()
                assert error <= 1e-9 * parameter.grad.norm() + 1e-15, name


def test_open_clips_model_and_its_own_loss():
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=8,
        vision_cfg={"image_size": 16, "patch_size": 8, "layers": 1, "width": 16, "head_width": 8},
        text_cfg={"context_length": 4, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
        output_dict=True,
    ).double()
    image, text = numbers(ROWS, 3, 16, 16), torch.randint(0, 20, (ROWS, 4))
    reference = copy.deepcopy(model)
    expected = open_clip.ClipLoss()(**reference(image, text))
    expected.backward()
    for loss in (open_clip.ClipLoss(), InfoNCE(), create_loss(["infonce"])):
        for batch in ((image, text), [image, text], {"image": image, "text": text}):
            model.zero_grad()
            terms = cached_backward(model, loss, batch, micro_batch_size=3)
            torch.testing.assert_close(terms["loss"], expected.detach(), rtol=1e-10, atol=0)
            assert_same_gradients(model, reference, 1e-9)


def test_a_list_in_the_batch_is_its_rows_or_an_error():
    crops = [numbers(k + 1, 5) for k in range(ROWS)]
    parts = split_batch({"text": TEXT, "crops": crops}, 3)
    assert [len(part["crops"]) for part in parts] == [2, 2, 3]
    assert [crop for part in parts for crop in part["crops"]] == crops
    with pytest.raises(
        ValueError, match=r"entry views is a list of 2 Tensors where the batch has 7 rows: .*tuple"
    ):
        split_batch({"views": [IMAGE, IMAGE], "text": TEXT}, 3)
    with pytest.raises(ValueError, match=r"entry text.columns is a list of 3 dicts"):
        split_batch({"image": IMAGE, "text": {"columns": [{}, {}, {}]}}, 3)


def test_split_goes_into_every_depth_and_keeps_the_kinds():
    batch = (Pair(IMAGE, {"text": TEXT, "key": KEYS}), [numbers(2, 3), "name"], 3, None)
    # A list inside is rows, and these two are neither rows of seven nor fields.
    with pytest.raises(ValueError, match=r"entry \[1\] is a list of 2"):
        split_batch(batch, 4)
    parts = split_batch((batch[0], tuple(batch[1]), 3, None), 4)
    assert [type(part) for part in parts] == [tuple, tuple] and type(parts[0][0]) is Pair
    assert torch.equal(torch.cat([part[0].text["text"] for part in parts]), TEXT)
    assert sum((part[0].text["key"] for part in parts), []) == KEYS
    assert [len(part[1][0]) for part in parts] == [1, 1]
    assert all(part[1][1] == "name" and part[2:] == (3, None) for part in parts)


def run(model=None, loss=None, batch=None, **settings):
    batch = {"image": IMAGE, "text": TEXT} if batch is None else batch
    return cached_backward(
        TakesBatch() if model is None else model, loss or InfoNCE(), batch, micro_batch_size=3, **settings
    )


class Returns(Linear):
    """forward(batch) whose output `change` makes of the features."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, batch):
        return self.change(self.features(batch["image"], batch["text"]))


def without_scale(features):
    return {name: value for name, value in features.items() if name != "logit_scale"}


def with_logits(features):
    logits = features["logit_scale"] * features["image_features"] @ features["text_features"].T
    return {**features, "logits_per_image": logits, "inner": {"state": features["image_features"]}}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model": TakesFields(), "batch": {"image": IMAGE, "words": TEXT}}, r"forward\(image, text\).*\['image', 'words'\]"),
        ({"model": TakesFields(), "batch": {"image": IMAGE, "text": TEXT, "key": KEYS}}, "its arguments and nothing else"),
        ({"model": Renamed()}, r"forward\(images, texts\) with a batch of \['image', 'text'\]"),
        ({"batch": IMAGE}, "the batch is a Tensor: give a mapping"),
        ({"batch": SimpleNamespace(image=IMAGE)}, "the batch is a SimpleNamespace"),
        ({"model": Returns(lambda f: tuple(f.values()))}, r"returned a tuple: set output_dict=True"),
        ({"model": Returns(without_scale)}, "InfoNCE needs logit_scale, which the model did not give"),
        ({"model": Returns(without_scale), "loss": contrastive}, "asks for 'logit_scale', but the model returned no such"),
        (
            {"model": Returns(lambda f: {**f, "logit_scale": f["logit_scale"].expand(2)})},
            r"logit_scale must be one number, shape \(\), but the model gave shape \(2,\)",
        ),
        (
            {"model": Returns(lambda f: {**f, "temperature": f["logit_scale"].reshape(1)}), "loss": contrastive},
            r"temperature of shape \(1,\) for micro-batches of 2 rows",
        ),
        (
            {"model": Returns(with_logits), "loss": lambda f: f["logits_per_image"].logsumexp(1).mean()},
            "asks for 'logits_per_image', but the model's is of one micro-batch alone",
        ),
        ({"model": Returns(with_logits), "loss": lambda f: f["inner"]["state"].sum()}, "asks for 'inner', but"),
        ({"loss": lambda image_features, words: words.sum()}, "needs words, which the model did not give"),
        ({"loss": lambda features: None}, 'the loss must return .* it returned NoneType'),
    ],
)  # fmt: skip
def test_what_fits_nothing_says_so(settings, message):
    with pytest.raises(ValueError, match=message):
        run(**settings)
