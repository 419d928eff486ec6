"""Each method against numbers worked out on paper, on features of 2 channels over 2 x 3 cells."""

import pytest
import torch
from scenes import tailed
from torch import nn

from whatwhere.errors import InputError, UnsupportedError
from whatwhere.maps.cam import cam
from whatwhere.maps.gradcam import gradcam
from whatwhere.maps.gradcampp import gradcampp
from whatwhere.maps.layercam import layercam
from whatwhere.scores import of_class

A = torch.tensor([[[[1.0, 2, 0], [0, 1, 3]], [[1.0, 0, 1], [2, 0, 0]]]])
GRADIENT = torch.tensor([[[0.0, 2, 0], [0, 0, 4]], [[-6.0, 0, 0], [0, 0, 0]]])


class Sums(nn.Module):
    """logit 0 has exactly GRADIENT as its gradient; logit 1 is 0."""

    def forward(self, features):
        return torch.stack([(features * GRADIENT).sum((1, 2, 3)), features.sum((1, 2, 3)) * 0], 1)


@pytest.fixture
def trace():
    return tailed(Sums(), 2, (2, 3)).trace(A)


@pytest.fixture
def pooled():
    linear = nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, -1], [2, 0]]))
        linear.bias.copy_(torch.tensor([5.0, -7]))
    return tailed(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear), 2, (2, 3)).trace(A)


def test_gradcam(trace):
    # the mean gradients are 1 and -1
    assert gradcam(trace, of_class(0)).tolist() == [[[0, 2, -1], [-2, 1, 3]]]


def test_gradcampp(trace):
    # sum A_0 = 7: alpha is 1 / (2 + 2 * 7) and 1 / (2 + 4 * 7), so w_0 = 2 / 16 + 4 / 30; w_1 = 0
    torch.testing.assert_close(gradcampp(trace, of_class(0)), A[:, 0] * (2 / 16 + 4 / 30))


def test_layercam(trace):
    assert layercam(trace, of_class(0)).tolist() == [[[0, 4, 0], [0, 0, 12]]]


def test_cam(pooled):
    assert cam(pooled, of_class(0)).tolist() == [[[0, 2, -1], [-2, 1, 3]]]
    assert cam(pooled, of_class(1)).tolist() == [[[2, 4, 0], [0, 2, 6]]]


def test_class_maps_are_the_cams_of_all_classes(pooled):
    maps = pooled.net.class_maps(pooled)
    for k in range(2):
        assert torch.equal(maps[:, k], cam(pooled, of_class(k)))


def test_cam_of_a_contrast_is_the_contrast_of_cams(pooled):
    difference = cam(pooled, lambda logits: logits[:, 1] - logits[:, 0])
    assert difference.tolist() == [[[2, 2, 1], [2, 1, 3]]]


def test_cam_refuses_and_says_what_would_do(trace):
    with pytest.raises(UnsupportedError, match="Use gradcam or layercam"):
        cam(trace, of_class(0))


def test_gradcampp_of_a_score_that_depends_on_nothing_is_zero(trace):
    assert gradcampp(trace, of_class(1)).eq(0).all()


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda logits: logits, "one number for each of 1 images"),
        (lambda logits: logits.detach()[:, 0], "differentiable"),
        (of_class(2), r"in 0\.\.1, got 2"),
        (of_class(torch.tensor([0, 1])), "got 2 for 1 images"),
    ],
)
def test_a_score_that_is_none_is_refused(trace, score, message):
    with pytest.raises(InputError, match=message):
        gradcam(trace, score)
