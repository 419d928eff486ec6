import math

import pytest
import torch

from whatwhere.errors import InputError
from whatwhere.scores import against, contrast, margin, of_class, of_classes, probability, similarity, top_class

LOGITS = torch.tensor([[1.0, 4, 2, -3], [0.0, 0, 5, 1]])


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (of_class(1), [4, 0]),
        (of_class(torch.tensor([0, 2])), [1, 5]),
        (of_classes([0, 2]), [1.5, 2.5]),
        (top_class, [4, 5]),
        (contrast(1, others=2, strength=0.5), [4 - 0.5 * 1.5, 0 - 0.5 * 3]),
        (margin(1), [4 - 2, 0 - 5]),
        (margin(torch.tensor([0, 2])), [1 - 4, 5 - 1]),
        (against(of_class(1)), [-4, 0]),
        (similarity(torch.tensor([0.0, 0, 2, 0])), [2 / math.sqrt(30), 5 / math.sqrt(26)]),
    ],
)
def test_by_hand(score, expected):
    torch.testing.assert_close(score(LOGITS), torch.tensor(expected, dtype=torch.float32))


def test_probability_is_the_softmax():
    torch.testing.assert_close(probability(2)(LOGITS), LOGITS.softmax(1)[:, 2])


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (of_class(4), r"in 0\.\.3, got 4"),
        (of_class(-1), r"in 0\.\.3"),
        (margin(4), r"in 0\.\.3"),
        (probability(4), r"in 0\.\.3"),
        (of_class(torch.tensor([0])), "got 1 for 2 images"),
        (of_classes([]), "at least one"),
        (contrast(0, others=4), "1 to 3 other"),
        (similarity(torch.ones(3)), "4 numbers"),
        (similarity(torch.zeros(4)), "not all 0"),
    ],
)
def test_what_is_refused(score, message):
    with pytest.raises(InputError, match=message):
        score(LOGITS)


def test_the_contrast_of_a_class_has_no_gradient_in_itself_among_the_others():
    logits = LOGITS.clone().requires_grad_()
    contrast(1, others=1, strength=1.0)(logits).sum().backward()
    assert logits.grad.tolist() == [[0, 1, -1, 0], [0, 1, -1, 0]]
