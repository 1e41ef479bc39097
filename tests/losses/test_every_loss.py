"""What holds for every registered loss: precision, odd inputs, compilation, its YAML."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

from clipkit.kernels import pairs
from clipkit.losses import create_loss, list_losses

D, SCALES, INTEGERS = (
    6,
    ("logit_scale", "logit_bias", "dist_logit_scale"),
    ("nli_labels", "mlm_labels", "sample_index", "pair_ids"),
)
SETTINGS = {
    "nli_softmax": {"embed_dim": D},
    "matryoshka": {"dims": [3, D]},
    "fastclip": {"num_samples": 50},
    "simcse": {"head": True, "embed_dim": D},
    "slip": {"head": True, "embed_dim": D, "hidden_dim": 5, "output_dim": 4},
    "queue": {"embed_dim": D, "size": 7},
}
NEED_TWO = {"cloob", "fastclip", "infoloob", "uniformity"}


def build(name: str):
    torch.manual_seed(0)
    return create_loss({name: SETTINGS.get(name, {})})


def make(
    loss, rows: int = 5, dtype: torch.dtype = torch.float32, grad: bool = True
) -> dict[str, torch.Tensor]:
    """A value for each of the loss's inputs, by kind."""
    generator, features = torch.Generator().manual_seed(0), {}
    for name in loss.inputs:
        if name in INTEGERS:
            features[name] = torch.arange(rows) % 3
        elif name in SCALES:
            features[name] = torch.tensor(
                -4.0 if name == "logit_bias" else 8.0, requires_grad=grad and "dist" not in name
            )
        else:
            x = torch.randn(rows, D, generator=generator, dtype=torch.float64)
            x = x if name == "mlm_logits" else torch.nn.functional.normalize(x, dim=-1)
            features[name] = x.to(dtype).requires_grad_(grad and "dist" not in name)
    return features


def gradients(loss, features) -> dict[str, torch.Tensor]:
    wanted = [name for name, value in features.items() if value.requires_grad]
    return dict(zip(wanted, torch.autograd.grad(loss(features)["loss"], [features[name] for name in wanted])))


@pytest.mark.parametrize("name", list_losses())
def test_names_real_inputs_and_gives_one_number(name):
    loss = build(name)
    assert loss.inputs and all(isinstance(key, str) for key in loss.inputs)
    value = loss(make(loss))["loss"]
    assert value.shape == () and value.dtype == torch.float32 and value.isfinite()
    for key, grad in gradients(build(name), make(loss)).items():
        assert grad.isfinite().all() and grad.norm() > 0, key


@pytest.mark.parametrize("name", list_losses())
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 3e-3), (torch.bfloat16, 3e-2)])
def test_half_precision_features_give_an_fp32_loss_near_the_exact_one(name, dtype, tolerance):
    loss = build(name)
    exact = build(name).double()(make(loss, dtype=torch.float64))["loss"].item()
    features = make(loss, dtype=dtype)
    value = loss(features)["loss"]
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact, rel=tolerance, abs=tolerance)
    assert all(grad.isfinite().all() for grad in gradients(build(name), features).values())


@pytest.mark.parametrize("name", sorted(set(list_losses()) - {"simcse", "slip"}))
def test_autocast_does_not_reach_the_similarities(name):
    """Heads (simcse, slip) are network layers, which autocast may round; similarities and softmax are not."""
    loss = build(name)
    outside = build(name)(make(loss))["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(make(loss))["loss"]
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("name", list_losses())
def test_one_pair_works_or_is_refused_by_name(name):
    loss = build(name)
    features = make(loss, rows=1)
    if name in NEED_TWO:
        with pytest.raises(ValueError, match=f"{name} needs at least 2"):
            loss(features)
        return
    assert loss(features)["loss"].isfinite()
    assert all(grad.isfinite().all() for grad in gradients(build(name), features).values())


@pytest.mark.parametrize("name", list_losses())
def test_a_view_with_other_strides_changes_nothing(name):
    loss = build(name)
    plain = make(loss)
    strided = {
        key: value.detach().T.contiguous().T.requires_grad_(value.requires_grad) if value.ndim == 2 else value
        for key, value in plain.items()
    }
    assert any(not value.is_contiguous() for value in strided.values())
    found, expected = gradients(build(name), strided), gradients(build(name), plain)
    for key in expected:
        assert torch.allclose(found[key], expected[key], rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("name", list_losses())
def test_frozen_inputs_get_no_gradient_and_the_others_the_same(name):
    loss = build(name)
    features = make(loss)
    expected = gradients(build(name), features)
    frozen = next(key for key, value in features.items() if value.ndim == 2)
    features[frozen] = features[frozen].detach()
    found = gradients(build(name), features) if len(expected) > 1 else {}
    assert frozen not in found
    for key, grad in found.items():
        assert torch.allclose(grad, expected[key], rtol=1e-5, atol=1e-7), key
    nothing = make(loss, grad=False)
    with torch.no_grad():
        assert build(name)(nothing)["loss"].isfinite()


@pytest.mark.parametrize("name", list_losses())
def test_a_nan_in_any_input_is_a_nan_loss(name):
    loss = build(name)
    for key in (key for key in loss.inputs if key not in INTEGERS):
        features = make(loss, grad=False)
        features[key] = features[key].clone()
        features[key].view(-1)[-1] = float("nan")
        assert build(name)(features)["loss"].isnan(), key


# In the gate each compiles on four ranks, which is this and more: test_collectives.
@pytest.mark.parametrize(
    "name",
    [n if n in ("infonce", "cyclic") else pytest.param(n, marks=pytest.mark.slow) for n in list_losses()],
)
def test_compiles_without_a_graph_break_to_the_same_loss_and_gradient(name):
    torch._dynamo.reset()
    eager, compiled = build(name), build(name)
    compiled = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    features = make(eager)
    expected, found = gradients(eager, features), gradients(compiled, features)
    for key in expected:
        assert torch.allclose(found[key], expected[key], rtol=1e-5, atol=1e-7), key


@pytest.mark.parametrize("name", ["infonce", "sigmoid"])
def test_compiles_in_chunks_too(name):
    torch._dynamo.reset()
    settings = {
        "impl": "chunked",
        **({"same_ids": "mask", "label_smoothing": 0.1} if name == "infonce" else {}),
    }
    eager, compiled = create_loss({name: settings}), create_loss({name: settings})
    features = {**make(eager), "pair_ids": torch.tensor([0, 1, 0, 2, 3])}
    expected = gradients(eager, features)
    found = gradients(torch.compile(compiled, fullgraph=True, backend="aot_eager"), features)
    for key in expected:
        assert torch.allclose(found[key], expected[key], rtol=1e-5, atol=1e-7), key


@pytest.mark.parametrize("name", list_losses())
def test_features_that_are_no_matrix_are_refused_by_name(name):
    loss = build(name)
    key = next(key for key in loss.inputs if key not in INTEGERS + SCALES)
    for bad in (torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(3, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=key):
            build(name)({**make(loss), key: bad})


def test_every_loss_has_a_config_that_builds_it():
    omegaconf = pytest.importorskip("omegaconf")
    folder = Path(__file__).resolve().parents[2] / "conf" / "loss"
    for name in list_losses():
        config = omegaconf.OmegaConf.create(
            {"embed_dim": 16, "loss": omegaconf.OmegaConf.load(folder / f"{name}.yaml")}
        )
        assert list(config.loss) == [name]
        loss = create_loss(config.loss)
        assert list(loss.terms) == [name] and loss.weights[name] > 0
        settings = set(config.loss[name]) - {"weight"}
        accepted = set(type(loss.terms[name]).__init__.__kwdefaults__ or {}) | {"embed_dim"}
        missing = accepted - settings - {"group"} - (set() if "embed_dim" in settings else {"embed_dim"})
        assert not missing, f"{name}.yaml leaves out {missing}"


def test_every_loss_says_formula_source_and_arguments():
    for name in list_losses():
        text = type(build(name).terms[name]).__doc__
        assert " = " in text and ("et al." in text or "Isola" in text or "Gurevych" in text), name
        assert "Args:" in text and any(str(year) in text for year in range(2016, 2026)), name


@pytest.mark.parametrize("name", ["cloob", "fastclip", "infoloob", "infonce", "matryoshka", "sigmoid"])
def test_training_teaches_images_to_find_their_texts(name):
    """A linear image tower over 32 pairs, each image a fixed rotation of its text; chance is 0.03."""
    generator = torch.Generator().manual_seed(1)
    texts = torch.nn.functional.normalize(torch.randn(32, D, generator=generator), dim=-1)
    images = texts @ torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
    tower = torch.nn.Parameter(torch.randn(D, D, generator=generator))
    loss, index = build(name), torch.arange(32)
    scalars = {"logit_scale": torch.tensor(10.0), "logit_bias": torch.tensor(-5.0), "sample_index": index}

    def step() -> torch.Tensor:
        return torch.nn.functional.normalize(images @ tower, dim=-1)

    def recall() -> float:
        return float(((step() @ texts.T).argmax(1) == index).float().mean())

    before = recall()
    optimizer = torch.optim.Adam([tower], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        loss({"image_features": step(), "text_features": texts, **scalars})["loss"].backward()
        optimizer.step()
    assert before < 0.1 and recall() > 0.5


@pytest.mark.parametrize("name", sorted(set(list_losses()) - {"mlm"}))
def test_an_empty_batch_is_refused(name):
    loss = build(name)
    with pytest.raises(ValueError, match="empty"):
        loss({key: value[:0] if value.ndim else value for key, value in make(loss).items()})


@pytest.mark.parametrize("name", [n for n in list_losses() if "sample_weight" in build(n).optional_inputs])
def test_sample_weights_make_a_weighted_mean_of_the_rows(name):
    loss = build(name).double().eval()
    given = make(loss, dtype=torch.float64, grad=False)

    def value(weight, **call):
        return loss.terms[name](**given, sample_weight=torch.as_tensor(weight), **call)

    rows = [float(value(row)) for row in torch.eye(5)]
    weights = [0.5, 0.0, 2.0, 1.0, 0.25]
    weighted = [w * row for w, row in zip(weights, rows)]
    assert max(rows) - min(rows) > 1e-3
    assert float(value(weights)) == pytest.approx(sum(weighted) / sum(weights), rel=1e-12)
    assert float(loss(given)["loss"]) == pytest.approx(sum(rows) / 5, rel=1e-12)
    if "reduction" in inspect.signature(loss.terms[name].forward).parameters:
        assert value(weights, reduction="none").tolist() == pytest.approx(weighted, rel=1e-12)


@pytest.mark.parametrize("name", list_losses())
def test_a_sum_hands_a_loss_all_that_its_forward_takes(name):
    loss = build(name).terms[name]
    taken = inspect.signature(loss.forward).parameters.values()
    if any(value.kind is value.VAR_KEYWORD for value in taken):
        return
    needed = tuple(value.name for value in taken if value.default is value.empty)
    optional = {value.name for value in taken if value.default is None} - {"ranks"}
    # What a loss of some sides alone needs is said by its settings, not by forward.
    some = set(loss.inputs) - set(needed)
    assert needed == tuple(loss.inputs)[: len(needed)] and some <= optional
    assert optional - some == set(getattr(loss, "optional_inputs", ()))


@pytest.mark.parametrize("name", [n for n in list_losses() if build(n).optional_inputs])
def test_optional_inputs_that_do_not_fit_are_refused_by_name(name):
    few, zeros = torch.zeros(4, dtype=torch.int64), torch.zeros(5, D)
    bad = {
        "pair_ids": few, "text_index": few, "sample_weight": few, "content_features": zeros,
        "hard_negative_features": zeros, "hard_negative_image_features": zeros,
    }  # fmt: skip
    for key in build(name).optional_inputs:
        given = {**make(build(name)), key: bad[key]}
        for call in (build(name), lambda given: build(name).terms[name](**given)):
            with pytest.raises(ValueError, match=key):
                call(given)


# CLOOB's rows are averages, in fp32 whatever was given.
@pytest.mark.parametrize(
    "name", [n for n in list_losses() if hasattr(build(n).terms[n], "impl") and n != "cloob"]
)
@pytest.mark.parametrize("dtype, precision", [(torch.float32, "auto"), (torch.bfloat16, "half")])
def test_the_kernels_get_the_impl_and_the_precision_of_what_was_given(name, dtype, precision, monkeypatch):
    choose, seen = pairs.choose_implementation, set()

    def spy(impl, precision, *rest):
        seen.add((impl, precision))
        return choose(impl, precision, *rest)

    monkeypatch.setattr(pairs, "choose_implementation", spy)
    loss = create_loss({name: {"impl": "chunked"}})
    loss(make(loss, dtype=dtype))
    assert seen == {("chunked", precision)}
