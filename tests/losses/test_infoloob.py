import math

import pytest
import torch

from clipkit.losses import InfoLOOB, InfoNCE


@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("rows", [2, 5])
def test_leaves_the_positive_out_of_both_denominators(unit, dots, scale, impl, rows):
    x, y = unit(rows, 4, 1), unit(rows, 4, 2)
    s, total = dots(x, y), 0.0
    for i in range(rows):
        others = [j for j in range(rows) if j != i]
        total -= math.log(math.exp(7 * s[i][i]) / sum(math.exp(7 * s[i][j]) for j in others))
        total -= math.log(math.exp(7 * s[i][i]) / sum(math.exp(7 * s[j][i]) for j in others))
    assert InfoLOOB(impl=impl)(x, y, scale).item() == pytest.approx(total / (2 * rows), rel=1e-12)


def test_gradient_does_not_fade_as_the_positive_wins():
    """Orthogonal pairs at scale 20: nothing left for InfoNCE; InfoLOOB pulls as before."""
    x = torch.eye(4, dtype=torch.float64).requires_grad_()
    y, scale = torch.eye(4, dtype=torch.float64), torch.tensor(20.0, dtype=torch.float64)
    faded, kept = (
        torch.autograd.grad(loss(x, y, scale), x)[0].diagonal() for loss in (InfoNCE(), InfoLOOB())
    )
    assert faded.abs().max() < 1e-6
    # -1/(2N) scale from each direction.
    assert torch.allclose(kept, torch.full_like(kept, -20 / 4))


def test_gradcheck(unit, scale):
    assert torch.autograd.gradcheck(InfoLOOB(), (unit(4, 3, 1), unit(4, 3, 2), scale))


def test_refuses_a_pair_alone(unit, scale):
    with pytest.raises(ValueError, match="at least 2 pairs"):
        InfoLOOB()(unit(1, 3, 1), unit(1, 3, 2), scale)
