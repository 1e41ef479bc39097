import pytest
import torch

from clipkit.losses import InfoNCE, Matryoshka, NLISoftmax


def prefix(x, m):
    """The first m coordinates over their norm."""
    cut = x[:, :m]
    return cut / (cut**2).sum(1, keepdim=True).sqrt()


def test_adds_the_loss_of_each_normalised_prefix(unit, scale):
    x, y = unit(5, 6, 1), unit(5, 6, 2)
    expected = sum(
        c * InfoNCE()(prefix(x, m), prefix(y, m), scale) for m, c in ((2, 0.5), (4, 1.0), (6, 3.0))
    )
    loss = Matryoshka(loss="infonce", dims=[2, 4, 6], dim_weights=[0.5, 1.0, 3.0])
    found = loss(image_features=x, text_features=y, logit_scale=scale)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    inputs = (x, y, scale)
    for a, b in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs)):
        assert (a - b).norm() < 1e-12 * b.norm()


def test_the_whole_embedding_alone_is_the_loss_itself(unit, scale):
    x, y = unit(5, 6, 1), unit(5, 6, 2)
    found = Matryoshka(dims=[6])(image_features=x, text_features=y, logit_scale=scale)
    assert found.item() == pytest.approx(InfoNCE()(x, y, scale).item(), rel=1e-12)


def test_passes_settings_and_optional_inputs_on(unit, scale):
    x, y, ids = unit(5, 6, 1), unit(5, 6, 2), torch.tensor([0, 0, 1, 2, 1])
    loss = Matryoshka(dims=[6], settings={"same_ids": "mask", "label_smoothing": 0.1})
    found = loss(image_features=x, text_features=y, logit_scale=scale, pair_ids=ids)
    expected = InfoNCE(same_ids="mask", label_smoothing=0.1)(x, y, scale, pair_ids=ids)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert loss.inputs == InfoNCE.inputs and loss.optional_inputs == InfoNCE.optional_inputs


def test_a_loss_with_parameters_gets_one_of_each_width():
    loss = Matryoshka(loss="nli_softmax", dims=[2, 6])
    assert all(isinstance(inner, NLISoftmax) for inner in loss.losses)
    assert [inner.classifier.in_features for inner in loss.losses] == [6, 18]


def test_by_default_takes_an_eighth_to_the_whole():
    assert Matryoshka(embed_dim=64).dims == (8, 16, 32, 64)
    assert Matryoshka(embed_dim=4).dims == (1, 2, 4)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"loss": "infonec", "dims": [2]}, "Did you mean 'infonce'"),
        ({"dims": [2], "settings": {"smoothing": 0.1}}, "label_smoothing"),
        ({"dims": [0]}, "dims"),
        ({"dims": [128], "embed_dim": 64}, "at most 64"),
        ({"dims": [2, 2]}, "different"),
        ({"dims": [2, 4], "dim_weights": [1.0]}, "one for each"),
        ({}, "embed_dim"),
    ],
)
def test_refuses_what_it_cannot_build(settings, message):
    with pytest.raises(ValueError, match=message):
        Matryoshka(**settings)


def test_refuses_features_narrower_than_a_prefix(unit, scale):
    with pytest.raises(ValueError, match="prefix of 8"):
        Matryoshka(dims=[8])(image_features=unit(4, 6, 1), text_features=unit(4, 6, 2), logit_scale=scale)
