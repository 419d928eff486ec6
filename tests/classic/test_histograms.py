"""Counts of cells: numbers by hand, scikit-learn's and scikit-image's, and the law of plain CAM."""

import builtins

import numpy as np
import pytest
import torch
from scenes import plain
from skimage.feature import hog
from sklearn.kernel_approximation import AdditiveChi2Sampler

import whatwhere
from whatwhere.classic.colours import ColourCells, ColourHistogram, weights_of
from whatwhere.classic.histograms import KERNELS, Shares, mapped, regions
from whatwhere.classic.hog import Hog, OrientedCells
from whatwhere.classic.words import VisualWords
from whatwhere.errors import InputError, MissingExtraError, UnsupportedError
from whatwhere.maps import METHODS
from whatwhere.scores import of_class

SIZE = (32, 48)
MAKERS = {
    "color-histogram": lambda **o: ColourHistogram(3, bins=(4, 2, 3), **o),
    "hog": lambda **o: Hog(3, SIZE, **o),
    "visual-words": lambda **o: known(VisualWords(3, words=9, cell=8, colour=1.0, nearest=2, **o)),
}


def known(network):
    """With words, as if they had been learned."""
    words = network.dictionary.words
    words.copy_(torch.rand(words.shape, generator=torch.Generator().manual_seed(0)) / 5)
    return network


def images(count=2):
    coarse = torch.rand(count, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, SIZE, mode="bilinear")


def test_bins_by_hand():
    values = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0])
    hard = weights_of(values, 2, soft=False)
    assert hard.tolist() == [[1, 0], [1, 0], [0, 1], [0, 1], [0, 1]]
    # centres at 1/4 and 3/4
    assert weights_of(values[:3], 2, soft=True).tolist() == [[1, 0], [1, 0], [0.5, 0.5]]
    # hues go round: 0 lies between the last and the first of four, whose centres are at 7/8 and 1/8
    torch.testing.assert_close(
        weights_of(torch.tensor([0.0, 1.0, 0.125]), 4, soft=True, around=True),
        torch.tensor([[0.5, 0, 0, 0.5], [0.5, 0, 0, 0.5], [1, 0, 0, 0]]),
    )


def test_colours_are_counted_where_they_are():
    pixels = torch.zeros(1, 3, 4, 6)
    pixels[0, 0, :, 2:4] = 1  # red in the middle of three cells, and half of the last
    pixels[0, 0, :2, 4:] = 1
    counts = ColourCells("rgb", (2, 1, 1), 2, soft=False)(pixels)
    assert counts.shape == (1, 2, 2, 3)
    assert counts[0, 1].tolist() == [[0, 1, 1], [0, 1, 0]]
    assert torch.equal(counts.sum(1), torch.ones(1, 2, 3))


@pytest.mark.parametrize("space", ["rgb", "hsv", "lab"])
@pytest.mark.parametrize("soft", [True, False])
def test_every_pixel_counts_once_whatever_its_colour(space, soft):
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 0.5, 1.0])] * 3).T.reshape(1, 3, 3, 9)
    counts = ColourCells(space, (5, 3, 4), 1, soft)(corners)
    assert counts.min() >= 0
    torch.testing.assert_close(counts.sum(1), torch.ones(1, 3, 9))


def test_the_map_of_chi_squared_is_scikit_learn_s():
    values = torch.rand(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values[0, 3] = 0
    mine = torch.cat(mapped(values, "chi2"), 1)
    np.testing.assert_allclose(mine.numpy(), AdditiveChi2Sampler(sample_steps=2).fit_transform(values.numpy()))
    x, y = values[1], values[2]
    mine = torch.stack(mapped(values, "chi2"), 2)
    torch.testing.assert_close((mine[1] * mine[2]).sum(1), 2 * x * y / (x + y), atol=0.02, rtol=0.1)


def test_shares_by_hand():
    counts = torch.tensor([[[[1.0, 0.0, 0.0, 3.0]], [[0.0, 0.0, 0.0, 0.0]]]])  # of two bins, the second empty
    # the mean is 1, its root is 1, of which the cells have a quarter and three: means of 4 cells
    assert Shares("hellinger", 1)(counts).tolist() == [[[[1, 0, 0, 3]], [[0, 0, 0, 0]]]]
    counts = counts.expand(1, 2, 2, 4) * 4
    # of the quarters, the upper left has a mean of 2 and a root of sqrt(2), the upper right one of 6
    level = Shares("hellinger", 2)(counts)[0, 2]
    torch.testing.assert_close(level, torch.tensor([[2 * 2**0.5, 0, 0, 12 / 6**0.5]] * 2))
    assert torch.equal(regions(counts, 2)[0, 0], torch.tensor([[2.0, 6.0]] * 2))


@pytest.mark.parametrize(
    ("name", "kernel", "levels"),
    [
        *(("color-histogram", kernel, 1) for kernel in KERNELS),
        ("color-histogram", "chi2", 2),
        ("hog", "chi2", None),
        ("visual-words", "hellinger", 1),
        ("visual-words", "linear", 2),
    ],
)
def test_what_the_cells_add_is_the_logit(name, kernel, levels):
    torch.manual_seed(0)
    network = MAKERS[name](kernel=kernel, **({"levels": levels} if levels else {}))
    net = whatwhere.load(network, preprocess=plain(SIZE))
    trace = net.trace(images())
    for label in (0, 2):
        bias = network.classify.bias[label]
        hires = METHODS["hirescam"](trace, of_class(label))
        torch.testing.assert_close(hires.sum((1, 2)) + bias, trace.logits[:, label], atol=1e-4, rtol=1e-4)
        if levels == 1:
            cam = METHODS["cam"](trace, of_class(label))
            torch.testing.assert_close(cam.mean((1, 2)) + bias, trace.logits[:, label], atol=1e-4, rtol=1e-4)
        else:
            assert torch.equal(METHODS["gradcam"](trace, of_class(label)), hires)
    if levels == 1:
        assert net.linear_law(images()) < 1e-4


def test_hog_is_scikit_image_s():
    picture = images(1)
    found = OrientedCells(9, 8, 2)(picture)[0].reshape(2, 2, 9, 4, 6)
    theirs = hog(picture[0].permute(1, 2, 0).numpy(), 9, (8, 8), (2, 2), feature_vector=False, channel_axis=-1)
    assert theirs.shape == (3, 5, 2, 2, 9)
    for (row, column), (i, j) in zip([(0, 0), (2, 4), (1, 3)], [(0, 1), (1, 1), (1, 0)], strict=True):
        np.testing.assert_allclose(found[i, j, :, row + i, column + j], theirs[row, column, i, j], rtol=1e-6)
    assert float(found.sum()) == pytest.approx(float(theirs.sum()), rel=1e-5)
    assert found[0, 0, :, -1].abs().sum() == found[1, 1, :, 0].abs().sum() == 0  # no block begins, or ends, there


@pytest.mark.parametrize("name", ["color-histogram", "hog", "visual-words"])
def test_features_are_of_the_picture_alone_and_of_what_it_sees(name):
    network = MAKERS[name]().eval()
    both = images(3)
    alone = torch.cat([network.forward_features(one[None]) for one in both])
    torch.testing.assert_close(network.forward_features(both), alone, atol=1e-6, rtol=1e-5)
    # what a cell sees is all that changes it; the shares of words and colours have the mean of all cells in them
    layer = {"color-histogram": "counts", "hog": "cells", "visual-words": "counts.described"}[name]
    (h, w), (step, _), (top, left) = network.get_submodule(layer).sees
    row, column = 1, 4
    changed = both[:1].flip(-1).clone()
    y, x = max(0, int(top + step * row)), max(0, int(left + step * column))
    changed[..., y : int(top + step * row + h), x : int(left + step * column + w)] = both[
        :1, :, y : int(top + step * row + h), x : int(left + step * column + w)
    ]
    one, other = (network.get_submodule(layer)(pixels)[0, :, row, column] for pixels in (both[:1], changed))
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(one, network.get_submodule(layer)(both[:1].flip(-1))[0, :, row, column])


@pytest.mark.parametrize("name", ["color-histogram", "hog", "visual-words"])
def test_pictures_that_do_not_fall_into_cells(name):
    network = MAKERS[name]()
    for size in ((4, 4), (8, 8), (20, 32)):
        with pytest.raises(UnsupportedError, match=f"multiples of 8 pixels, two cells at least, got {size[0]} x"):
            network.forward_features(torch.rand(1, 3, *size))
    with pytest.raises(UnsupportedError, match="wants as many cells"):
        Hog(2, (8, 16))(torch.rand(1, 3, 8, 16))
    with pytest.raises(UnsupportedError, match="fewer levels"):
        ColourHistogram(2, levels=3)(torch.rand(1, 3, 16, 32))


def test_options_that_nothing_has():
    for wrong in (
        lambda: ColourHistogram(2, space="cmyk"),
        lambda: ColourHistogram(2, bins=(4, 4)),
        lambda: ColourHistogram(2, kernel="rbf"),
        lambda: ColourHistogram(2, levels=0),
        lambda: Hog(2, SIZE, kernel="rbf"),
        lambda: Hog(2, SIZE, orientations=0),
        lambda: VisualWords(2, words=1),
        lambda: VisualWords(2, words=5, nearest=6),
        lambda: VisualWords(2, radius=1),
    ):
        with pytest.raises(InputError):
            wrong()


def test_without_scikit_image_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("skimage"):
            raise ImportError("no module", name="skimage")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in MAKERS:
        with pytest.raises(MissingExtraError, match=r"pip install 'whatwhere\[classic\]'"):
            whatwhere.classifiers.zoo.build(name, pretrained=False, num_classes=2)
