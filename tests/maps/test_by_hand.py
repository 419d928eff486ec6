"""Each method against numbers worked out on paper, on features of 2 channels over 2 x 3 cells."""

import pytest
import torch
from scenes import tailed
from torch import nn

from whatwhere.errors import InputError, UnsupportedError
from whatwhere.maps.cam import cam
from whatwhere.maps.eigencam import eigencam, eigengradcam
from whatwhere.maps.fem import fem
from whatwhere.maps.gradcam import gradcam
from whatwhere.maps.gradcam_elementwise import gradcam_elementwise
from whatwhere.maps.gradcampp import gradcampp
from whatwhere.maps.hirescam import hirescam
from whatwhere.maps.kpcacam import kpcacam
from whatwhere.maps.layercam import layercam
from whatwhere.maps.shapleycam import shapleycam
from whatwhere.maps.smoothgradcampp import smoothgradcampp
from whatwhere.maps.xgradcam import xgradcam
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


class Squares(nn.Module):
    """logit 0 is the sum of squares, whose gradient is 2 A and whose Hessian is 2; logit 1 is 0."""

    def forward(self, features):
        return torch.stack([features.square().sum((1, 2, 3)), features.sum((1, 2, 3)) * 0], 1)


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


def test_xgradcam(trace):
    # w_0 = (2 * 2 + 3 * 4) / 7, w_1 = (1 * -6) / 4
    torch.testing.assert_close(xgradcam(trace, of_class(0)), A[:, 0] * (16 / 7) - A[:, 1] * 1.5)


def test_xgradcam_of_a_channel_that_sums_to_zero():
    features = torch.tensor([[[[1.0, -1, 0]], [[2.0, 1, 0]]]])
    net = tailed(Squares(), 2, (1, 3))
    # w_0 = 0 by definition, w_1 = (2 * 4 + 1 * 2) / 3
    torch.testing.assert_close(xgradcam(net.trace(features), of_class(0)), features[:, 1] * (10 / 3))


def test_hirescam(trace):
    assert hirescam(trace, of_class(0)).tolist() == [[[-6, 4, 0], [0, 0, 12]]]


def test_gradcam_elementwise_counts_what_two_negatives_make():
    features = torch.tensor([[[[-1.0, 2, 3]], [[1.0, 1, -2]]]])

    def head(x):
        return torch.stack(
            [(x * torch.tensor([[[-2.0, 1, -1]], [[1.0, -1, -1]]])).sum((1, 2, 3)), x.sum((1, 2, 3))], 1
        )

    trace = tailed(head, 2, (1, 3)).trace(features)
    # products are 2 2 -3 and 1 -1 2
    assert gradcam_elementwise(trace, of_class(0)).tolist() == [[[3, 2, 2]]]
    assert hirescam(trace, of_class(0)).tolist() == [[[3, 1, -1]]]
    assert layercam(trace, of_class(0)).tolist() == [[[1, 2, 0]]]


def test_shapleycam():
    # g - H A / 2 = 2 A - A; the means of A are 7 / 6 and 4 / 6
    trace = tailed(Squares(), 2, (2, 3)).trace(A)
    torch.testing.assert_close(shapleycam(trace, of_class(0)), A[:, 0] * (7 / 6) + A[:, 1] * (4 / 6))


def test_shapleycam_of_a_linear_head_is_gradcam(trace):
    assert torch.equal(shapleycam(trace, of_class(0)), gradcam(trace, of_class(0)))


def test_eigencam():
    # every cell is a multiple of (3, 4), whose length is 5
    features = torch.tensor([[[[3.0, 0, 6]], [[4.0, 0, 8]]]])
    net = tailed(Squares(), 2, (1, 3))
    torch.testing.assert_close(eigencam(net.trace(features), of_class(0)), torch.tensor([[[5.0, 0, 10]]]))


def test_eigencam_is_the_singular_value_decomposition():
    features = torch.rand(2, 7, 3, 4, generator=torch.Generator().manual_seed(0))
    found = eigencam(tailed(Squares(), 2, (3, 4)).trace(features), of_class(0))
    for i in range(2):
        cells = features[i].flatten(1).T
        _, _, right = torch.linalg.svd(cells)
        expected = (cells @ right[0]).reshape(3, 4)
        torch.testing.assert_close(found[i], expected * expected.sum().sign(), atol=1e-5, rtol=1e-5)


def test_eigengradcam(trace):
    # one nonzero product a cell: 4 and 12 in channel 0, -6 in channel 1, so the first axis is channel 0
    torch.testing.assert_close(eigengradcam(trace, of_class(0)), torch.tensor([[[0.0, 4, 0], [0, 0, 12]]]))


def test_eigengradcam_turns_with_the_score(trace):
    against = eigengradcam(trace, lambda logits: -logits[:, 0])
    torch.testing.assert_close(against, -eigengradcam(trace, of_class(0)))


@pytest.mark.parametrize("gamma", [None, 0.7])
def test_kpcacam_is_scikit_learns(gamma):
    from sklearn.decomposition import KernelPCA

    features = torch.rand(2, 7, 3, 4, generator=torch.Generator().manual_seed(0))
    found = kpcacam(tailed(Squares(), 2, (3, 4)).trace(features), of_class(0), gamma=gamma)
    for i in range(2):
        cells = features[i].flatten(1).T.double()
        centred = (cells - cells.mean(0)).numpy()
        expected = KernelPCA(n_components=1, kernel="sigmoid", gamma=gamma).fit_transform(centred)
        expected = torch.from_numpy(expected).reshape(3, 4).float()
        sign = (expected * features[i].square().sum(0)).sum().sign()
        torch.testing.assert_close(found[i], expected * sign, atol=1e-5, rtol=1e-4)


def test_fem(trace):
    # means 7/6 and 4/6, deviations 1.07 and 0.75: only the 3 and the 2 are above
    torch.testing.assert_close(fem(trace, of_class(0)), torch.tensor([[[0.0, 0, 0], [4 / 6, 0, 7 / 6]]]))


def test_smoothgradcampp_without_noise_is_gradcampp(trace):
    for samples in (1, 3):
        smooth = smoothgradcampp(trace, of_class(0), samples=samples, noise=0.0)
        torch.testing.assert_close(smooth, gradcampp(trace, of_class(0)))


def test_smoothgradcampp_averages_the_derivatives():
    features = torch.tensor([[[[1.0, 3]], [[0.0, 2]]]])
    net = tailed(Squares(), 2, (1, 2))
    noise = 0.5 * 3 * torch.randn(2, 2, 1, 2, generator=torch.Generator().manual_seed(5))
    g = 2 * (features + noise)  # one gradient a sample
    d1, d2, d3 = g.mean(0), g.square().mean(0), (g**3).mean(0)
    alpha = d2 / (2 * d2 + d3 * features[0].sum((-2, -1), keepdim=True))
    expected = ((alpha * d1.relu()).sum((-2, -1))[:, None, None] * features[0]).sum(0)
    found = smoothgradcampp(net.trace(features), of_class(0), samples=2, noise=0.5, seed=5)
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("options", [{"samples": 0}, {"noise": -0.1}])
def test_smoothgradcampp_says_what_it_takes(trace, options):
    with pytest.raises(InputError, match="got"):
        smoothgradcampp(trace, of_class(0), **options)


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
