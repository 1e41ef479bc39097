import math

import pytest
import torch

from clipkit.losses import CLOOB, InfoLOOB


def dot(a, b):
    return sum(p * q for p, q in zip(a, b))


def retrieve(query, memory, beta):
    """norm(sum_k softmax_k(beta <query, memory_k>) memory_k) in plain Python."""
    weights = [math.exp(beta * dot(query, row)) for row in memory]
    total = sum(weights)
    mean = [sum(w * row[d] for w, row in zip(weights, memory)) / total for d in range(len(query))]
    norm = math.sqrt(dot(mean, mean))
    return [value / norm for value in mean]


@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("beta, inverse_temperature", [(8.0, 30.0), (2.0, 5.0)])
def test_equals_the_papers_retrieval_and_infoloob(unit, impl, beta, inverse_temperature):
    n, x, y = 5, unit(5, 4, 1), unit(5, 4, 2)
    images, texts = x.tolist(), y.tolist()
    u_x, u_y = ([retrieve(q, images, beta) for q in queries] for queries in (images, texts))
    v_x, v_y = ([retrieve(q, texts, beta) for q in queries] for queries in (images, texts))
    total = 0.0
    for i in range(n):
        others = [j for j in range(n) if j != i]
        total -= inverse_temperature * dot(u_x[i], u_y[i])
        total += math.log(sum(math.exp(inverse_temperature * dot(u_x[i], u_y[j])) for j in others))
        total -= inverse_temperature * dot(v_x[i], v_y[i])
        total += math.log(sum(math.exp(inverse_temperature * dot(v_x[j], v_y[i])) for j in others))
    loss = CLOOB(inverse_temperature=inverse_temperature, beta=beta, impl=impl)
    assert loss(x, y).item() == pytest.approx(total / n, rel=1e-10)


def test_a_cold_memory_of_agreeing_pairs_is_infoloob_twice(unit):
    """With beta large every row retrieves itself, where images and texts agree."""
    x = torch.eye(4, dtype=torch.float64)
    expected = 2 * InfoLOOB()(x, x.clone(), torch.tensor(30.0, dtype=torch.float64))
    assert CLOOB(beta=200.0)(x, x.clone()).item() == pytest.approx(expected.item(), rel=1e-12)


def test_gradcheck(unit):
    assert torch.autograd.gradcheck(CLOOB(inverse_temperature=4.0, beta=2.0), (unit(4, 3, 1), unit(4, 3, 2)))


def test_refuses_a_pair_alone_and_a_flat_memory(unit):
    with pytest.raises(ValueError, match="at least 2 pairs"):
        CLOOB()(unit(1, 3, 1), unit(1, 3, 2))
    with pytest.raises(ValueError, match="beta"):
        CLOOB(beta=0.0)
