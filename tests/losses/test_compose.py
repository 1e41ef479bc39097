import math

import pytest
import torch
from torch import nn

from clipkit.losses import InfoNCE, WeightedSum, create_loss, list_losses, register_loss
from clipkit.losses.registry import losses


@pytest.fixture
def features(unit, scale):
    return {
        "image_features": unit(4, 3, 1),
        "text_features": unit(4, 3, 2),
        "text_features_view2": unit(4, 3, 3),
        "logit_scale": scale,
    }


def test_adds_weighted_terms_and_reports_them_unweighted(features):
    loss = create_loss({"infonce": {"weight": 0.5}, "simcse": {"weight": 2}, "cyclic": None})
    out = loss(features)
    assert list(out) == ["loss", "infonce", "simcse", "cyclic"]
    alone = {name: create_loss(name)(features)[name] for name in ("infonce", "simcse", "cyclic")}
    for name, value in alone.items():
        assert out[name].item() == pytest.approx(value.item(), rel=1e-14)
    expected = 0.5 * alone["infonce"] + 2 * alone["simcse"] + alone["cyclic"]
    assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-14)
    assert all(value.shape == () for value in out.values())


def test_names_the_inputs_of_all_terms_once():
    loss = create_loss(["infonce", "cyclic", "simcse"])
    assert loss.inputs == ("image_features", "text_features", "logit_scale", "text_features_view2")
    assert loss.optional_inputs[0] == "pair_ids" and not set(loss.optional_inputs) & set(loss.inputs)
    assert create_loss({"uniformity": {"of": ["text_features"]}}).inputs == ("text_features",)


def test_a_name_a_list_and_a_mapping_are_the_same(features):
    values = [
        create_loss(spec)(features)["loss"].item()
        for spec in ("infonce", ["infonce"], {"infonce": {}}, {"infonce": {"weight": 1}})
    ]
    assert len(set(values)) == 1


def test_routes_an_optional_input_where_it_is_present(features):
    loss, plain = create_loss("infonce"), create_loss("infonce")(features)["loss"]
    assert loss({**features, "pair_ids": None})["loss"] == plain
    assert loss({**features, "pair_ids": torch.tensor([0, 0, 1, 2])})["loss"] != plain


def test_gives_settings_and_the_group_to_the_loss():
    loss = create_loss({"infonce": {"label_smoothing": 0.1}, "cyclic": {"in_modal": 0.5}}, group=None)
    assert loss.terms["infonce"].label_smoothing == 0.1 and loss.terms["cyclic"].in_modal == 0.5
    assert loss.terms["infonce"].group is None
    assert create_loss("infonce").terms["infonce"].group == "auto"


def test_a_weight_of_zero_reports_the_term_but_teaches_nothing(features):
    out = create_loss({"infonce": {"weight": 0.0}, "cyclic": {}})(features)
    assert out["infonce"] > 0 and out["loss"] == out["cyclic"]


@pytest.mark.parametrize(
    "missing, spec, source",
    [
        ("text_features_view2", "simcse", "text_tower.dropout"),
        ("premise_features", "nli_contrastive", "data.sentences.triplets"),
        ("nli_labels", {"nli_softmax": {"embed_dim": 3}}, "data.sentences.pairs"),
        ("logit_bias", "sigmoid", "init_logit_bias"),
        ("sample_index", "fastclip", "data stream"),
        ("image_features_view1", "slip", "data.augmentation"),
        ("mlm_logits", "mlm", "mlm_probability"),
        ("text_features_view2", {"matryoshka": {"loss": "simcse", "dims": [2]}}, "text_tower.dropout"),
    ],
)
def test_a_missing_input_names_the_setting_that_supplies_it(features, unit, missing, spec, source):
    loss = create_loss(spec)
    given = {**features, **{name: unit(4, 3, 9) for name in loss.inputs if name not in features}}
    del given[missing]
    with pytest.raises(ValueError, match=rf"{missing}.*{source}.*Features given: "):
        loss(given)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("infonec", "Did you mean 'infonce'.*cyclic"),
        ({"infonce": {"label_smothing": 0.1}}, "Did you mean 'label_smoothing'"),
        ({"infonce": {"wieght": 0.1}}, "Did you mean 'weight'"),
        ({}, "empty"),
        ([], "empty"),
        (["infonce", "infonce"], "twice"),
        ({"infonce": {"weight": -1.0}}, "weight of infonce"),
        ({"infonce": {"weight": float("nan")}}, "weight of infonce"),
        ({"infonce": {"weight": float("inf")}}, "weight of infonce"),
        ({"infonce": {"weight": "heavy"}}, "weight of infonce"),
        ({"infonce": 0.5}, "settings of loss 'infonce'"),
        ({"nli_softmax": {}}, "needs the setting embed_dim"),
        (3, "give a name"),
        ([{"infonce": {}}], "give a name"),
        ({"infonce": {"impl": "trition"}}, "Did you mean 'triton'"),
        (None, "give a name"),
    ],
)
def test_refuses_a_sum_it_cannot_build(spec, message):
    with pytest.raises(ValueError, match=message):
        create_loss(spec)


def test_a_registered_class_is_a_loss_by_name(features):
    class Distance(nn.Module):
        inputs = ("image_features", "text_features")

        def __init__(self, *, power: float = 2.0):
            super().__init__()
            self.power = power

        def forward(self, image_features, text_features):
            return (image_features - text_features).norm(dim=1).pow(self.power).mean()

    register_loss("distance_for_a_test")(Distance)
    try:
        assert "distance_for_a_test" in list_losses()
        x, y = features["image_features"], features["text_features"]
        out = create_loss({"distance_for_a_test": {"power": 1.0, "weight": 3.0}})(features)
        expected = sum(math.dist(a, b) for a, b in zip(x.tolist(), y.tolist())) / 4
        assert out["loss"].item() == pytest.approx(3 * expected, rel=1e-12)
        with pytest.raises(ValueError, match="taken"):
            register_loss("distance_for_a_test")(Distance)
    finally:
        losses._entries.pop("distance_for_a_test")


def test_a_class_without_inputs_and_a_term_named_loss_are_refused():
    losses._entries["nothing_for_a_test"] = nn.Identity
    try:
        with pytest.raises(ValueError, match="names no `inputs`"):
            create_loss("nothing_for_a_test")
    finally:
        losses._entries.pop("nothing_for_a_test")
    with pytest.raises(ValueError, match="cannot be called 'loss'"):
        WeightedSum({"loss": InfoNCE()})
    with pytest.raises(ValueError, match="Did you mean 'infonce'"):
        WeightedSum({"infonce": InfoNCE()}, {"infonec": 1.0})


def test_takes_the_mapping_type_of_a_config():
    config = pytest.importorskip("omegaconf").OmegaConf.create(
        {
            "embed_dim": 6,
            "loss": {
                "infonce": {"weight": 0.5},
                "matryoshka": {"dims": [2, 6], "settings": {}, "embed_dim": "${embed_dim}"},
            },
        }
    )
    loss = create_loss(config.loss)
    assert loss.weights == {"infonce": 0.5, "matryoshka": 1.0} and loss.terms["matryoshka"].dims == (2, 6)


def test_parameters_of_terms_are_parameters_of_the_sum():
    loss = create_loss({"infonce": {}, "nli_softmax": {"embed_dim": 3}})
    assert [name for name, _ in loss.named_parameters()] == ["terms.nli_softmax.classifier.weight"]
