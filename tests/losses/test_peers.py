"""What lightly, pytorch-metric-learning, sentence-transformers and open_clip ask of their own losses, asked of ours.

The inputs are those of their tests, the expected values their formulas in plain Python. The slow tests call their
losses too: `pip install 'clipkit[peers]'`. What they define otherwise is listed in clipkit/losses/README.md;
open_clip's loop is in tests/recipes/test_open_clip_loop.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from clipkit.grad_cache import cached_backward
from clipkit.losses import SLIP, InfoLOOB, InfoNCE, Matryoshka, NLIContrastive, NLISoftmax, SimCSE

# pytorch-metric-learning's test_ntxent_loss and test_supcon_loss: points on a circle, in degrees.
ANGLES, LABELS, TEMPERATURE = (0, 10, 20, 50, 60, 80), (0, 0, 0, 1, 1, 2), 0.1
# sentence-transformers' tests/losses/test_loss.py.
ANCHORS = ("It's very sunny outside", "I love playing soccer", "I am a student")
POSITIVES = ("The sun is out today", "I like playing soccer", "I am studying at university")
NEGATIVES = ("Data science is fun", "Cacti are beautiful", "Speakers are loud")
# sentence-transformers' tests/test_cmnrl.py.
TRIPLETS = (
    ("aaa", "bbb", "ccc", "ddd", "eee"),
    ("aas", "bbs", "ccs", "dds", "ees"),
    ("xxx", "yyy", "zzz", "kkk", "fff"),
)


def gaussian(rows, dim, seed):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_circle(shift=0.0):
    radians = [math.radians(angle + shift) for angle in ANGLES]
    points = [[math.cos(angle), math.sin(angle)] for angle in radians]
    return torch.tensor(points, dtype=torch.float64)


def nt_xent(first, second, temperature):
    """Chen et al. 2020, algorithm 1, in loops over floats."""
    z = [*normalize(first, dim=1).tolist(), *normalize(second, dim=1).tolist()]
    n, total = len(first), 0.0
    for i in range(2 * n):
        logits = {k: sum(a * b for a, b in zip(z[i], z[k])) / temperature for k in range(2 * n) if k != i}
        partner = (i + n) % (2 * n)
        total += math.log(math.fsum(math.exp(logit) for logit in logits.values())) - logits[partner]
    return total / (2 * n)


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("dim", [1, 2, 16, 64])
@pytest.mark.parametrize("temperature", [0.1, 1, 10])
def test_lightly_ntxent_with_values(rows, dim, temperature):
    first, second = gaussian(rows, dim, 1), gaussian(rows, dim, 2)
    x, y = (normalize(features, dim=1).float() for features in (first, second))
    loss = SLIP(temperature=temperature)
    if torch.equal(x, y):
        # In one dimension a row is 1 or -1; two views that are one are refused here.
        with pytest.raises(ValueError, match="identical"):
            loss(x, y)
        return
    assert loss(x, y).item() == pytest.approx(nt_xent(first, second, temperature), abs=1e-5)
    assert loss(x, y).item() == pytest.approx(loss(y, x).item(), abs=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 8, 16])
@pytest.mark.parametrize("temperature", [0.1, 1, 7])
def test_lightly_ntxent_of_features_on_one_line(rows, temperature):
    """(a, 2a) with a > 0: all directions are one, and the partner is one of 2 N - 1 equals."""
    positions = torch.rand(2, rows, 1, generator=torch.Generator().manual_seed(0))
    # Off the line by less than matters, since identical views are refused.
    x, y = normalize(
        torch.cat([positions, 2 * positions + torch.tensor([0.0, 1e-4])[:, None, None]], 2), dim=2
    )
    assert SLIP(temperature=temperature)(x, y).item() == pytest.approx(math.log(2 * rows - 1), abs=1e-4)


@pytest.mark.parametrize("rows", range(1, 20, 3))
@pytest.mark.parametrize("dim", [1, 32])
def test_lightly_ntxent_is_symmetric(rows, dim):
    x, y = (normalize(gaussian(rows, dim, seed), dim=1) for seed in (3, 4))
    assert SLIP()(x, y).item() == pytest.approx(SLIP()(y, x).item(), rel=1e-12, abs=1e-12)


def supcon(anchors, others):
    """Khosla et al. 2020, equation 2, anchors of one set and others of another: mean over the positives."""
    total = 0.0
    for i, anchor in enumerate(anchors.tolist()):
        logits = [sum(a * b for a, b in zip(anchor, other)) / TEMPERATURE for other in others.tolist()]
        log_sum = math.log(math.fsum(math.exp(logit) for logit in logits))
        positives = [log_sum - logits[p] for p in range(len(logits)) if LABELS[p] == LABELS[i]]
        total += sum(positives) / len(positives)
    return total / len(anchors)


def ntxent_of_pairs(anchors, others):
    """As pytorch-metric-learning has NT-Xent: each pair against its anchor's negatives alone; pairs (i, i)."""
    total = 0.0
    for i, anchor in enumerate(anchors.tolist()):
        logits = [sum(a * b for a, b in zip(anchor, other)) / TEMPERATURE for other in others.tolist()]
        kept = [logits[j] for j in range(len(logits)) if j == i or LABELS[j] != LABELS[i]]
        total += math.log(math.fsum(math.exp(logit) for logit in kept)) - logits[i]
    return total / len(anchors)


def test_pytorch_metric_learning_supcon_and_ntxent_on_a_circle():
    x, y, ids = on_circle(), on_circle(7.0), torch.tensor(LABELS)
    for same_ids, formula in (("positive", supcon), ("mask", ntxent_of_pairs)):
        found = InfoNCE(same_ids=same_ids)(x, y, 1 / TEMPERATURE, pair_ids=ids).item()
        assert found == pytest.approx((formula(x, y) + formula(y, x)) / 2, rel=1e-12)


@pytest.mark.parametrize("angles", [1, 3])
def test_pytorch_metric_learning_without_negatives_is_zero(angles):
    x = on_circle()[:angles].requires_grad_()
    loss = InfoNCE(same_ids="mask")(x, on_circle(3.0)[:angles], 10.0, pair_ids=[0] * angles)
    loss.backward()
    assert loss.item() == 0 and not x.grad.any()


def bags(sentences):
    """Counts of words, unit norm: a model that needs no training."""
    every = sorted(
        {word for group in (ANCHORS, POSITIVES, NEGATIVES) for text in group for word in text.split()}
    )
    counts = [[text.split().count(word) for word in every] for text in sentences]
    return normalize(torch.tensor(counts, dtype=torch.float32), dim=1)


def test_sentence_transformers_correct_triplets_cost_less_than_swapped_ones():
    anchors, positives, negatives = bags(ANCHORS), bags(POSITIVES), bags(NEGATIVES)
    loss = NLIContrastive(temperature=1 / 20)
    correct, swapped = loss(anchors, positives, negatives), loss(anchors, negatives, positives)
    assert correct.shape == () and 0 < correct < swapped


class Letters(nn.Module):
    """Averaged letters, unit norm; forward(batch, inputs) on rows of three letters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(42)
        self.letters = nn.EmbeddingBag(26, 8).double()

    def forward(self, batch, inputs):
        return {name: normalize(self.letters(batch[name]), dim=1) for name in inputs}


@pytest.mark.parametrize("scaler", [1.0, 1000.0])
def test_sentence_transformers_cached_loss_has_the_same_gradient(scaler):
    names = NLIContrastive.inputs
    batch = {
        name: torch.tensor([[ord(letter) - ord("a") for letter in word] for word in words])
        for name, words in zip(names, TRIPLETS, strict=True)
    }
    plain, cached, loss = Letters(), Letters(), NLIContrastive()
    value = loss(**plain(batch, names))
    (scaler * value).backward()
    terms = cached_backward(cached, loss, batch, micro_batch_size=2, backward_scale=scaler)
    assert terms["loss"].item() == pytest.approx(value.item(), rel=1e-12)
    torch.testing.assert_close(cached.letters.weight.grad, plain.letters.weight.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {"dims": []},
        {"dims": [512, 0, 256]},
        {"dims": [512, -100, 256]},
        {"dims": [512, 256, 128], "dim_weights": [1.0, 0.5]},
        {"dims": [512, 1024, 2048, 256], "embed_dim": 1024},
    ],
)
def test_sentence_transformers_matryoshka_refusals(settings):
    with pytest.raises(ValueError, match="dim"):
        Matryoshka(**settings)


def test_sentence_transformers_matryoshka_has_weights_of_one_and_any_order():
    x, y = (normalize(gaussian(4, 8, seed), dim=1) for seed in (1, 2))
    assert Matryoshka(dims=[8, 4, 2]).dim_weights == (1, 1, 1)
    one = Matryoshka(dims=[2, 8, 4], dim_weights=[0.4, 1.0, 0.6])(
        image_features=x, text_features=y, logit_scale=5.0
    )
    other = Matryoshka(dims=[8, 4, 2], dim_weights=[1.0, 0.6, 0.4])(
        image_features=x, text_features=y, logit_scale=5.0
    )
    assert one.item() == pytest.approx(other.item(), rel=1e-12)


# The peers themselves.


class Given(nn.Module):
    """A sentence-transformers model that has embedded already."""

    def forward(self, features):
        return features

    def get_sentence_embedding_dimension(self):
        return None

    get_embedding_dimension = get_sentence_embedding_dimension
    device = "cpu"


def assert_same(ours, theirs, tensors, tolerance=1e-9):
    """Value and gradients of two functions of the same leaves."""
    for tensor in tensors:
        tensor.requires_grad_()
    found, expected = ours(*tensors), theirs(*tensors)
    assert found.item() == pytest.approx(expected.item(), rel=tolerance)
    for a, b in zip(torch.autograd.grad(found, tensors), torch.autograd.grad(expected, tensors)):
        assert (a - b).norm() <= tolerance * b.norm()


def units(count, rows=6, dim=8):
    return [normalize(gaussian(rows, dim, seed), dim=1) for seed in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_lightly_ntxent_itself(temperature):
    peers = pytest.importorskip("lightly.loss")
    # Theirs normalises in its forward: its gradient is the tangential part of ours.
    ours = lambda x, y: SLIP(temperature=temperature)(normalize(x, dim=1), normalize(y, dim=1))
    assert_same(ours, peers.NTXentLoss(temperature=temperature), units(2))


@pytest.mark.slow
def test_lightly_dcl_is_another_loss_than_infoloob():
    """It has a view's own rows among the negatives, as NT-Xent has; InfoLOOB has the other modality's alone."""
    peers = pytest.importorskip("lightly.loss")
    x, y = units(2)
    assert abs(peers.DCLLoss(temperature=0.1)(x, y) - InfoLOOB()(x, y, 10.0)) > 0.1


@pytest.mark.slow
def test_pytorch_metric_learning_itself():
    peers = pytest.importorskip("pytorch_metric_learning.losses")
    ids = torch.tensor(LABELS)
    inner = peers.NTXentLoss(temperature=TEMPERATURE)
    both_ways = _tangential(SLIP(temperature=TEMPERATURE))
    assert_same(both_ways, _tangential(peers.SelfSupervisedLoss(inner)), units(2))
    one_way = peers.SelfSupervisedLoss(inner, symmetric=False)
    assert_same(_tangential(SimCSE(temperature=TEMPERATURE)), _tangential(one_way), units(2))

    supervised = peers.SupConLoss(temperature=TEMPERATURE)
    # Were it the same tensor as labels, the pairs (i, i) would be left out.
    refs = ids.clone()
    theirs = lambda x, y: (
        (supervised(x, ids, ref_emb=y, ref_labels=refs) + supervised(y, ids, ref_emb=x, ref_labels=refs)) / 2
    )
    ours = lambda x, y: InfoNCE()(x, y, 1 / TEMPERATURE, pair_ids=ids)
    assert_same(_tangential(ours), _tangential(theirs), units(2))

    same = torch.arange(6)
    anchors, others = torch.nonzero(ids[:, None] != ids[None], as_tuple=True)
    pairs = (same, same, anchors, others)
    theirs = lambda x, y: (
        (inner(x, ids, pairs, ref_emb=y, ref_labels=ids) + inner(y, ids, pairs, ref_emb=x, ref_labels=ids))
        / 2
    )
    ours = lambda x, y: InfoNCE(same_ids="mask")(x, y, 1 / TEMPERATURE, pair_ids=ids)
    assert_same(_tangential(ours), _tangential(theirs), units(2))


def _tangential(loss):
    """The loss of normalised rows: what a library that normalises by itself differentiates."""
    return lambda *tensors: loss(*(normalize(tensor, dim=1) for tensor in tensors))


@pytest.mark.slow
def test_sentence_transformers_itself():
    peers = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    columns = lambda tensors: [{"sentence_embedding": tensor} for tensor in tensors]
    ranking = peers.MultipleNegativesRankingLoss(Given(), scale=20.0)
    theirs = lambda *tensors: ranking(columns(tensors), None)
    assert_same(_tangential(NLIContrastive(temperature=1 / 20)), theirs, units(3))
    symmetric = peers.MultipleNegativesSymmetricRankingLoss(Given(), scale=20.0)
    ours = lambda x, y: InfoNCE()(x, y, 20.0)
    assert_same(_tangential(ours), lambda *tensors: symmetric(columns(tensors), None), units(2))

    softmax = peers.SoftmaxLoss(Given(), embedding_dimension=8, num_labels=3).double()
    own, labels = NLISoftmax(embed_dim=8, bias=True).double(), torch.tensor([0, 1, 2, 2, 1, 0])
    own.classifier.load_state_dict(softmax.classifier.state_dict())
    ours = lambda u, v: own(u, v, labels)
    assert_same(ours, lambda *tensors: softmax(columns(tensors), labels), units(2))
