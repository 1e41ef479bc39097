import math

import pytest
import torch

from clipkit.losses import MaskedLanguageModel


def test_is_the_mean_cross_entropy_of_masked_tokens():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels, total = [2, -100, 0, -100, 3], 0.0
    for row, label in zip(logits.tolist(), labels):
        if label != -100:
            total -= row[label] - math.log(sum(math.exp(value) for value in row))
    assert MaskedLanguageModel()(logits, torch.tensor(labels)).item() == pytest.approx(total / 3, rel=1e-12)


def test_uniform_logits_cost_log_of_the_vocabulary():
    assert MaskedLanguageModel()(torch.zeros(3, 11), torch.tensor([1, 2, 3])).item() == pytest.approx(
        math.log(11), rel=1e-6
    )


def test_gradcheck():
    logits = torch.randn(
        4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True
    )
    assert torch.autograd.gradcheck(
        lambda x: MaskedLanguageModel()(x, torch.tensor([0, -100, 2, 1])), (logits,)
    )


@pytest.mark.parametrize("logits, labels", [((3, 5), [-100] * 3), ((0, 5), [])])
def test_refuses_a_batch_without_masked_tokens(logits, labels):
    with pytest.raises(ValueError, match="no masked token"):
        MaskedLanguageModel()(torch.zeros(logits), torch.tensor(labels, dtype=torch.int64))


def test_refuses_labels_of_another_number():
    with pytest.raises(ValueError, match=r"mlm_labels must be integers of shape \(3,\)"):
        MaskedLanguageModel()(torch.zeros(3, 5), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"\(T, V\)"):
        MaskedLanguageModel()(torch.zeros(1, 3, 5), torch.tensor([1]))
