import math

import pytest
import torch

from clipkit.losses import NLISoftmax


@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_papers_classifier(unit, bias):
    u, v, labels = unit(5, 3, 1), unit(5, 3, 2), [0, 2, 1, 2, 2]
    loss = NLISoftmax(embed_dim=3, bias=bias).double()
    weight = loss.classifier.weight.tolist()
    offsets = loss.classifier.bias.tolist() if bias else [0.0] * 3
    total = 0.0
    for a, b, label in zip(u.tolist(), v.tolist(), labels):
        joined = a + b + [abs(p - q) for p, q in zip(a, b)]
        logits = [sum(w * z for w, z in zip(row, joined)) + offset for row, offset in zip(weight, offsets)]
        total -= math.log(math.exp(logits[label]) / sum(math.exp(value) for value in logits))
    assert loss(u, v, torch.tensor(labels)).item() == pytest.approx(total / 5, rel=1e-12)


def test_gradcheck_of_features_and_classifier(unit):
    loss = NLISoftmax(embed_dim=3).double()
    labels = torch.tensor([0, 1, 2, 1])
    assert torch.autograd.gradcheck(
        lambda u, v, w: torch.func.functional_call(loss, {"classifier.weight": w}, (u, v, labels)),
        (unit(4, 3, 1), unit(4, 3, 2), loss.classifier.weight),
    )


def test_learns_to_separate_real_labels(unit):
    """Equal rows entail, opposite ones contradict, orthogonal ones are neutral: 30 steps find it."""
    torch.manual_seed(0)
    u = unit(30, 8, 1).detach()
    across = torch.nn.functional.normalize(
        unit(30, 8, 2).detach() - u * (unit(30, 8, 2).detach() * u).sum(1, keepdim=True), dim=1
    )
    labels = torch.arange(30) % 3
    v = torch.where((labels == 0)[:, None], u, torch.where((labels == 1)[:, None], across, -u))
    loss = NLISoftmax(embed_dim=8).double()
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    before = loss(u, v, labels).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss(u, v, labels).backward()
        optimizer.step()
    assert loss(u, v, labels).item() < before / 2


def test_refuses_labels_out_of_range_and_other_widths(unit):
    loss = NLISoftmax(embed_dim=3).double()
    with pytest.raises(ValueError, match=r"nli_labels must lie in 0\.\.2.*-1"):
        loss(unit(2, 3, 1), unit(2, 3, 2), torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="embed_dim=3.*4 wide"):
        loss(unit(2, 4, 1), unit(2, 4, 2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="nli_labels"):
        loss(unit(2, 3, 1), unit(2, 3, 2), torch.tensor([0.0, 1.0]))
