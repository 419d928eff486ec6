"""Where a bag of visual words gets its words: what the descriptors of the training pictures gather around."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from whatwhere.classic.words import VisualWords
from whatwhere.classifiers.classifier import Classifier, undisturbed
from whatwhere.classifiers.weights import read_weights, write_weights
from whatwhere.errors import DataError, UnsupportedError, extra
from whatwhere.training.data import Pictures, looks, seed_of
from whatwhere.training.light import in_smaller_batches

WORDS = "words.safetensors"
KEPT, EACH = 2**17, 2**7
"""Descriptors that are kept, at most, and of each picture at least, where it has as many: so many pictures do."""
AT_ONCE = 4096
"""Descriptors of a step of k-means."""


def learn_words(
    net: Classifier,
    pictures: Pictures,
    file: Path | None = None,
    *,
    seed: int = 0,
    kept: int = KEPT,
    batch: int = 16,
    seen: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Give a bag of visual words its dictionary, in place: k-means over descriptors drawn from the pictures.

    By scikit-learn's ``MiniBatchKMeans`` (Sculley: Web-scale k-means clustering, WWW 2010). The same pictures and
    seed give the same words. Memory is bounded by ``kept``.

    Args:
        net: around ``VisualWords``.
        pictures: to learn from; labels are not looked at.
        file: where the words are kept, and taken from if they are there.
        seed: of what is drawn, and of k-means.
        kept: descriptors, at most, of pictures that are drawn where there are many.
        batch: pictures that go through at once; where memory does not suffice, half of them.
        seen: called with how many pictures of how many have been looked at.

    Raises:
        UnsupportedError: the network has no dictionary.
        DataError: fewer descriptors that differ than words.
        MissingExtraError: scikit-learn is not installed.
    """
    network = net.network
    if not isinstance(network, VisualWords):
        raise UnsupportedError(f"{net.name} has no dictionary; visual-words has")
    dictionary = network.dictionary
    if file is not None and file.exists():
        dictionary.load_state_dict(read_weights(file))
        return
    with extra("classic", "learning visual words"):
        from sklearn.cluster import MiniBatchKMeans
    chosen = sorted(np.random.default_rng(seed).permutation(len(pictures))[: max(1, kept // EACH)].tolist())
    some, each = pictures.part(chosen), kept // len(chosen)
    points = in_smaller_batches(lambda at_once: _drawn(net, network, some, each, seed, at_once, seen), batch)
    count, differing = len(dictionary.words), len(np.unique(points, axis=0))
    if differing < count:
        raise DataError(
            f"a dictionary of {count} words wants as many descriptors that differ, the {len(some)} pictures have "
            f"{differing}; ask for fewer with options.words"
        )
    means = MiniBatchKMeans(count, batch_size=AT_ONCE, n_init=1, random_state=seed_of(seed, count)).fit(points)
    with torch.no_grad():
        dictionary.words.copy_(torch.from_numpy(means.cluster_centers_))
        dictionary.spread.fill_(max(float(means.inertia_) / len(points), 1e-12))
    if file is not None:
        write_weights(file, dictionary.state_dict())


def _drawn(
    net: Classifier,
    network: VisualWords,
    pictures: Pictures,
    each: int,
    seed: int,
    batch: int,
    seen: Callable[[int, int], None],
) -> np.ndarray:
    """So many descriptors of each picture (p d), or all where it has fewer."""
    found: list[np.ndarray] = []
    with undisturbed(network), torch.no_grad():
        for images in looks(pictures, net.preprocess, batch):
            for grid in network.described(images.to(net.device)):
                points = grid.flatten(1).T.float().cpu().numpy()
                draw = np.random.default_rng([seed, len(found)])
                found.append(points[draw.permutation(len(points))[:each]])
            seen(len(found), len(pictures))
    return np.concatenate(found)
