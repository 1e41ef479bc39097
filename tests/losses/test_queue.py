import pytest
import torch

from clipkit.losses import InfoNCE, MemoryQueue, Sigmoid, create_loss

D = 4


def test_the_last_pairs_are_negatives_and_the_oldest_leave(unit, scale):
    loss = MemoryQueue(size=7, embed_dim=D).double()
    images, texts = loss.images, loss.texts
    assert torch.allclose(images.norm(dim=1), torch.ones(7, dtype=torch.float64), rtol=1e-6)
    for step in range(4):
        x, y = unit(3, D, 2 * step), unit(3, D, 2 * step + 1)
        expected = InfoNCE()(x, y, scale, hard_negative_features=texts, hard_negative_image_features=images)
        found = loss(image_features=x, text_features=y, logit_scale=scale)
        assert torch.allclose(found, expected, rtol=1e-12)
        images, texts = torch.cat([images, x.detach()])[-7:], torch.cat([texts, y.detach()])[-7:]
        assert torch.equal(loss.images, images) and torch.equal(loss.texts, texts)
        # After the next batch has joined, the gradient is still that of this one.
        assert torch.allclose(*(torch.autograd.grad(v, x)[0] for v in (found, expected)), rtol=1e-10)


def test_a_batch_larger_than_the_queue_leaves_its_last_pairs(unit, scale):
    loss = MemoryQueue(size=2, embed_dim=D).double()
    x, y = unit(3, D, 1), unit(3, D, 2)
    loss(image_features=x, text_features=y, logit_scale=scale)
    assert torch.equal(loss.texts, y[1:])


def test_evaluation_and_a_nan_leave_it_as_it_was(unit, scale):
    loss = MemoryQueue(loss="sigmoid", size=5, embed_dim=D).double()
    before = loss.state_dict()
    x, y = unit(3, D, 1).detach(), unit(3, D, 2).detach()
    given = {"logit_scale": scale, "logit_bias": -1.0}
    loss.eval()(image_features=x, text_features=y, **given)
    loss.train()(image_features=x * torch.nan, text_features=y, **given)
    assert all(torch.equal(before[name], value) for name, value in loss.state_dict().items())
    loss(image_features=x, text_features=y, **given)
    other = MemoryQueue(loss="sigmoid", size=5, embed_dim=D).double()
    other.load_state_dict(loss.state_dict())
    assert torch.equal(*(m(image_features=x, text_features=y, **given) for m in (loss, other)))


def test_a_loss_without_negatives_of_the_group_is_refused():
    for settings in ({"loss": "cyclic"}, {"loss": "infonce", "settings": {"hard_negatives": "own"}}):
        with pytest.raises(ValueError, match="queue's inner loss"):
            MemoryQueue(size=4, embed_dim=D, **settings)
    with pytest.raises(ValueError, match="5 wide"):
        x = torch.eye(5)
        create_loss({"queue": {"embed_dim": D}})(
            {"image_features": x, "text_features": x, "logit_scale": 3.0}
        )


def test_the_same_loss_twice_takes_other_features(unit, scale):
    features = {
        "image_features": unit(3, D, 1),
        "text_features": unit(3, D, 2),
        "audio_features": unit(3, D, 3),
        "audio_scale": scale * 2,
        "logit_scale": scale,
        "logit_bias": torch.tensor(-1.0),
    }
    inputs = {"image_features": "audio_features", "logit_scale": "audio_scale"}
    loss = create_loss({"sigmoid": {}, "audio": {"name": "sigmoid", "inputs": inputs, "weight": 0.5}})
    assert loss.inputs == (
        "image_features", "text_features", "logit_scale", "logit_bias", "audio_features", "audio_scale",
    )  # fmt: skip
    terms = loss(features)
    x, y, audio, twice, once, bias = features.values()
    assert torch.equal(terms["sigmoid"], Sigmoid()(x, y, once, bias))
    assert torch.equal(terms["audio"], Sigmoid()(audio, y, twice, bias))
    assert torch.allclose(terms["loss"], terms["sigmoid"] + 0.5 * terms["audio"])
    with pytest.raises(ValueError, match="'audio' needs the feature 'audio_features'"):
        loss({name: value for name, value in features.items() if name != "audio_features"})
    with pytest.raises(ValueError, match="image_featurs.*Did you mean 'image_features'"):
        create_loss({"infonce": {"inputs": {"image_featurs": "audio_features"}}})
    with pytest.raises(ValueError, match="inputs of loss 'infonce'"):
        create_loss({"infonce": {"inputs": ["audio_features"]}})
