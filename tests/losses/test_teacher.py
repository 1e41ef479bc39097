"""Losses with a teacher's features: against loops written from the papers' formulas in float64, and by properties.

Over ranks and in micro-batches: test_gradient_contract and test_contract_kit.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import mse_loss, normalize

from clipkit.losses import InfoNCE, create_loss

N, D, E = 6, 4, 5
NAMES = ("distill_features", "distill_relations", "distill_contrastive")
SIDES = (["image", "text"], ["image"], ["text"])


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(0)

    def unit(width):
        return normalize(torch.randn(N, width, generator=generator, dtype=torch.float64), dim=-1)

    return {
        "image_features": unit(D),
        "text_features": unit(D),
        "dist_image_features": unit(D),
        "dist_text_features": unit(D),
        "logit_scale": torch.tensor(3.0, dtype=torch.float64),
    }


def term(name, **settings):
    torch.manual_seed(0)
    return create_loss({name: settings}).double()


def value(name, given, **settings) -> float:
    return float(term(name, **settings)(given)["loss"])


def dot(a, b) -> float:
    return sum(float(p) * float(q) for p, q in zip(a, b))


@pytest.mark.parametrize("sides", SIDES)
def test_features_are_compared_by_their_cosine(given, sides):
    """CLIP-KD's feature distillation is the mean squared error of the entries, summed over both sides."""
    expected = 0.0
    for side in sides:
        for x, u in zip(given[f"{side}_features"], given[f"dist_{side}_features"]):
            expected += (1 - dot(x, u)) / (N * len(sides))
    assert value("distill_features", given, sides=sides) == pytest.approx(expected, rel=1e-12)
    squared = sum(mse_loss(given[f"{s}_features"], given[f"dist_{s}_features"]) for s in sides)
    assert float(squared) == pytest.approx(2 * len(sides) / D * expected, rel=1e-12)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("width", [D, E])
def test_relations_are_rows_of_normalised_similarity_matrices(given, sides, width):
    """Tung and Mori 2019: G = Q Q^T, each row over its norm, squared Frobenius distance, over N^2; here over N."""
    expected = 0.0
    for side in sides:
        given[f"dist_{side}_features"] = normalize(torch.randn(N, width, dtype=torch.float64), dim=-1)
        x, u = given[f"{side}_features"], given[f"dist_{side}_features"]
        for i in range(N):
            g, h = [dot(x[i], x[j]) for j in range(N)], [dot(u[i], u[j]) for j in range(N)]
            g_norm, h_norm = math.sqrt(dot(g, g)), math.sqrt(dot(h, h))
            expected += sum((a / g_norm - b / h_norm) ** 2 for a, b in zip(g, h)) / (N * len(sides))
    assert value("distill_relations", given, sides=sides) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_the_students_features_find_the_teachers_of_the_other_kind(given, sides, impl):
    expected, scale = 0.0, float(given["logit_scale"])
    for side in sides:
        other = "text" if side == "image" else "image"
        for i, x in enumerate(given[f"{side}_features"]):
            logits = [scale * dot(x, v) for v in given[f"dist_{other}_features"]]
            expected -= (logits[i] - math.log(sum(map(math.exp, logits)))) / (N * len(sides))
    assert value("distill_contrastive", given, sides=sides, impl=impl) == pytest.approx(expected, rel=1e-12)


def test_a_teacher_that_is_the_student_leaves_nothing_to_learn(given):
    for side in ("image", "text"):
        given[f"dist_{side}_features"] = given[f"{side}_features"]
    assert value("distill_features", given) == pytest.approx(0, abs=1e-12)
    assert value("distill_relations", given) == pytest.approx(0, abs=1e-12)
    own = InfoNCE()(given["image_features"], given["text_features"], given["logit_scale"])
    assert value("distill_contrastive", given) == pytest.approx(float(own), rel=1e-12)


def test_a_turned_teacher_has_the_same_relations(given):
    turn = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0]
    turned = {**given, "dist_image_features": given["dist_image_features"] @ turn}
    assert value("distill_relations", turned) == pytest.approx(value("distill_relations", given), rel=1e-10)
    assert abs(value("distill_features", turned) - value("distill_features", given)) > 1e-3


@pytest.mark.parametrize("name", ["distill_features", "distill_contrastive"])
def test_a_map_to_the_teachers_width_is_normalised_and_learns(given, name):
    wide = {
        **given,
        "dist_image_features": normalize(torch.randn(N, E, dtype=torch.float64), dim=-1),
        "dist_text_features": normalize(torch.randn(N, E, dtype=torch.float64), dim=-1),
    }
    loss = term(name, embed_dim=D, teacher_dim=E)
    heads = loss.terms[name].heads
    mapped = {f"{s}_features": normalize(wide[f"{s}_features"] @ heads[s].weight.T, dim=-1) for s in heads}
    found = loss(wide)["loss"]
    assert found.item() == pytest.approx(value(name, {**wide, **mapped}), rel=1e-12)
    found.backward()
    assert all(parameter.grad.norm() > 0 for parameter in loss.parameters())
    with pytest.raises(ValueError, match=f"set loss.{name}.teacher_dim={E} and embed_dim={D}"):
        term(name)(wide)
    with pytest.raises(ValueError, match="built for embed_dim=4 and teacher_dim=5"):
        loss(given)
    with pytest.raises(ValueError, match=f"set loss.{name}.embed_dim"):
        term(name, teacher_dim=E)


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_gets_no_gradient_and_one_side_reads_nothing_of_the_other(given, name):
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in given.items()}
    loss = term(name, sides="text")
    assert "image_features" not in loss.inputs
    loss({key: leaves[key] for key in loss.inputs})["loss"].backward()
    assert leaves["text_features"].grad.norm() > 0
    assert all(leaves[key].grad is None for key in leaves if key.startswith("dist"))


@pytest.mark.parametrize("name", NAMES)
def test_wrong_sides_and_a_missing_teacher_say_what_to_do(given, name):
    with pytest.raises(ValueError, match="Did you mean 'image'"):
        create_loss({name: {"sides": ["imag"]}})
    for sides in ([], ["text", "text"]):
        with pytest.raises(ValueError, match="give image, text or both"):
            create_loss({name: {"sides": sides}})
    del given["dist_text_features"]
    with pytest.raises(ValueError, match=r"'dist_text_features', which is missing.*clipkit-predict teacher"):
        term(name)(given)


def test_weights_of_rows_are_those_of_a_batch_that_repeats_them(given):
    weight = torch.tensor([2.0, 1, 0, 1, 1, 1], dtype=torch.float64)
    rows = [0, 0, 1, 3, 4, 5]
    again = {key: x[rows] if x.ndim else x for key, x in given.items()}
    found = value("distill_features", {**given, "sample_weight": weight})
    assert found == pytest.approx(value("distill_features", again), rel=1e-12)
