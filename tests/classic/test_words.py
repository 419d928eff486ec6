"""Visual words: the nearest by scikit-learn, descriptors by scikit-image, and a dictionary that is learned once."""

import builtins
from pathlib import Path

import numpy as np
import pytest
import torch
from scenes import gap_net, plain
from skimage.color import rgb2gray
from skimage.feature import daisy
from sklearn.cluster import KMeans

import whatwhere
from whatwhere.classic.words import VisualWords, Words
from whatwhere.datasets.sample import Sample
from whatwhere.errors import DataError, MissingExtraError, UnsupportedError
from whatwhere.geometry import Box
from whatwhere.images import Photo
from whatwhere.inspection.words import dictionary
from whatwhere.training.data import Pictures, split_data
from whatwhere.training.dictionary import WORDS, learn_words
from whatwhere.training.recipe import Recipe

SIZE = (32, 48)


def classifier(labels=("one", "two"), **options):
    torch.manual_seed(0)
    return whatwhere.load(VisualWords(len(labels), cell=8, **options), labels=labels, preprocess=plain(SIZE))


def pictures(count=4, high=255):
    draw = np.random.default_rng(0)
    photos = {i: Photo(draw.integers(0, high, (*SIZE, 3), dtype=np.uint8), str(i)) for i in range(count)}
    return Pictures(
        ("one", "two"), [Sample(str(i), Path(f"{i}.png"), (i % 2,)) for i in photos], photos, [""] * count
    )


def test_the_nearest_word_is_scikit_learn_s():
    points = np.random.default_rng(0).normal(size=(90, 5)).astype(np.float32)
    means = KMeans(7, n_init=1, random_state=0).fit(points)
    words = Words(7, 5, nearest=1)
    words.words.copy_(torch.from_numpy(means.cluster_centers_))
    found = words(torch.from_numpy(points[:60].T.copy()).reshape(1, 5, 6, 10))
    assert torch.equal(found.sum(1), torch.ones(1, 6, 10))
    assert found.argmax(1).flatten().tolist() == means.predict(points[:60]).tolist()


def test_several_words_by_hand():
    words = Words(3, 1, nearest=2)
    words.words.copy_(torch.tensor([[0.0], [1.0], [9.0]]))
    words.spread.fill_(0.5)
    (found,) = words(torch.tensor([[[[0.5, 1.0]]]]))[:, :, 0].permute(0, 2, 1)
    assert found[0].tolist() == [0.5, 0.5, 0.0]
    far = np.exp(-1 / 0.5)
    assert found[1].tolist() == pytest.approx([far / (1 + far), 1 / (1 + far), 0])


def test_descriptors_are_scikit_image_s_in_the_middle_of_each_cell():
    picture = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    found = classifier(colour=0.5).network.described(picture)[0]
    assert found.shape == (13 * 8 + 3, 8, 12)
    theirs = daisy(rgb2gray(picture[0].permute(1, 2, 0).numpy()), 1, 8, 2, 6, 8, normalization="l2")
    # of pixel (28, 44), the middle of cell (3, 5), so far from the border that it is not seen; the first one's is 8
    np.testing.assert_allclose(found[:-3, 3, 5], theirs[28 - 8, 44 - 8], rtol=1e-4, atol=1e-6)
    white = classifier(colour=0.5).network.described(torch.full((1, 3, *SIZE), 1.0))[0, -3:]
    np.testing.assert_allclose(white[0], 0.5, rtol=1e-4)  # L = 100, a = b = 0
    np.testing.assert_allclose(white[1:], 0, atol=1e-4)


def test_a_dictionary_is_learned_and_kept(tmp_path):
    net, again, other = (classifier(words=6) for _ in range(3))
    assert not net.network.dictionary.words.any()
    learn_words(net, pictures(), tmp_path / WORDS, seed=1)
    learn_words(again, pictures(), seed=1)
    learn_words(other, pictures(), seed=2)
    words = net.network.dictionary.words
    assert torch.equal(words, again.network.dictionary.words)
    assert not torch.equal(words, other.network.dictionary.words)
    # each word is the mean of what is nearest to it, nearly: k-means in small batches
    points = torch.cat([net.network.described(net.preprocess(pictures().photo(i))[0][None]) for i in range(4)])
    points = points.permute(0, 2, 3, 1).reshape(-1, points.shape[1])
    nearest = torch.cdist(points, words)
    assert float(net.network.dictionary.spread) == pytest.approx(float(nearest.amin(1).square().mean()), rel=0.1)
    learn_words(other, pictures(), tmp_path / WORDS, seed=2)  # what is there is taken
    assert torch.equal(other.network.dictionary.words, words)


def test_only_so_many_descriptors_are_kept():
    looked = []
    learn_words(classifier(words=2), pictures(5), kept=300, seen=lambda done, total: looked.append(total))
    assert looked == [2]  # 128 of each at least, had they as many


def test_what_cannot_be_learned(monkeypatch):
    blank = pictures(2, high=1)
    with pytest.raises(DataError, match=r"3 words wants as many descriptors that differ, the 2 pictures have 1"):
        learn_words(classifier(words=3), blank)
    with pytest.raises(UnsupportedError, match="has no dictionary"):
        learn_words(whatwhere.load(gap_net(), preprocess=plain((24, 40))), blank)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError("no module", name="sklearn")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"whatwhere\[classic\]"):
        learn_words(classifier(words=3), pictures())


def test_words_are_written_in_patches(figures):
    """Each unit is a word, so a class written in units is written in words, with the patches that are nearest."""
    data = whatwhere.datasets.open_dataset(figures, "train")
    net = classifier(("disc", "square", "stripes"), words=6)
    learn_words(net, split_data(figures, Recipe()).train)
    found = dictionary(net, data, [0, 1, 2], words=2, count=3)
    assert found.layer == "shares"
    assert (found.field.size, found.field.stride, found.field.start) == ((50, 50), (8, 8), (-20, -20))
    assert found.field.window(2, 3) == Box(4, -4, 54, 46)  # 25 pixels on either side of about (20, 28)
    assert {len(several) for several in found.words.values()} == {2}
    assert all(len(patches) == 3 for patches in found.patches)
