"""Where a filter bank begins: at what stands out in the images of each class.

Wang, Morariu, Davis, CVPR 2018, section 3.3: the norm over channels is an energy map; what is largest in its own
neighbourhood is a peak; features at the peaks of a class's images fall into groups, whose centres are its filters.
Here they are measured from the mean of all peaks, since what all patches have in common tells no class.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from whatwhere.classifiers.classifier import Classifier, undisturbed
from whatwhere.classifiers.dfl import DflNet
from whatwhere.classifiers.weights import read_weights, write_weights
from whatwhere.errors import DataError, UnsupportedError
from whatwhere.maps.clustercam import kmeans
from whatwhere.training.data import Pictures, looks, seed_of
from whatwhere.training.light import in_smaller_batches
from whatwhere.types import Features

FILTERS = "filters.safetensors"
PEAKS = 16
"""Of an image, at most."""
KEPT_PEAKS, KEPT_VALUES = 2000, 2**28
"""Peaks of a class, and numbers of all of them together, at most: those that a draw of so many images has."""
LEAST = 0.1
"""Of the middle filter's deviation: one that says nearly the same of all images is not made louder than that."""
APART = 0.01
"""Share of its length by which a centre differs from the other when it comes again."""


def initialize_filters(
    net: Classifier,
    pictures: Pictures,
    file: Path | None = None,
    *,
    unit: bool = False,
    seed: int = 0,
    batch: int = 16,
    read: Callable[[int], Features] | None = None,
    seen: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Give a network's filter bank the patches of each class to begin with, in place.

    Filters are the centres of a class's peaks; their scale and offset are such that over all images the largest
    response of each to a peak has mean 0 and deviation 1. P begins with what the side branch says.

    Args:
        net: around a ``DflNet``.
        pictures: of its classes; one that shows several has the peaks of each.
        file: where what was found is kept, and taken from if it is there.
        unit: peaks are compared by direction, however far from the mean they are.
        seed: of the groups, and of the images that are left out where a class has many.
        batch: images that go through at once; where memory does not suffice, half of them.
        read: what the filters read of the picture of an index (c y x), where that is known.
        seen: called with how many pictures of how many have been looked at.

    Raises:
        UnsupportedError: the network has no filter bank.
        DataError: a class has no picture.
    """
    network = net.network
    if not isinstance(network, DflNet):
        raise UnsupportedError(f"{net.name} has no filter bank to begin with; head = {{filters = 10}} gives it one")
    if file is not None and file.exists():
        network.load_state_dict(read_weights(file), strict=False)
        return
    k, channels = len(pictures.classes), network.bank.in_channels
    peaks = min(KEPT_PEAKS, KEPT_VALUES // (k * channels))
    few = _few(pictures, max(1, peaks // PEAKS), seed)
    chosen = pictures.part(few)
    if read is None:
        found = in_smaller_batches(lambda at_once: _peaks(net, network, chosen, at_once, seen), batch)
    else:
        found = [peaks_of(read(index)) for index in few]
    _begin(network, found, [sample.labels for sample in chosen.samples], unit=unit, seed=seed)
    if file is not None:
        own_names = ("bank.", "patches.")
        write_weights(file, {key: t for key, t in network.state_dict().items() if key.startswith(own_names)})


def _begin(
    network: DflNet,
    found: Sequence[Float[Tensor, "_ c"]],
    labels: Sequence[Sequence[int]],
    *,
    unit: bool = False,
    seed: int = 0,
) -> None:
    """Give them the groups of peaks that have been found.

    Args:
        network: with the filters.
        found: of each picture, the features at its peaks.
        labels: of each picture, the classes that it shows; each class is shown by one at least.
        unit: as of ``initialize_filters``.
        seed: of the groups.
    """
    k = network.patches.out_features
    middle = torch.stack([vectors.mean(0) for vectors in found]).mean(0)
    filters = []
    for label in range(k):
        own = [vectors for vectors, shown in zip(found, labels, strict=True) if label in shown]
        points = torch.cat(own) - middle
        points = functional.normalize(points, dim=1) if unit else points
        filters.append(centres_of(points, network.filters, seed_of(seed, label)))
    bank = torch.cat(filters)
    strongest = [(vectors @ bank.T).amax(0).double() for vectors in found]
    mean, square = (sum(one**power for one in strongest) / len(found) for power in (1, 2))
    assert isinstance(mean, Tensor)
    spread = (square - mean**2).clamp(min=0).sqrt()
    scale = spread.clamp(min=max(1e-6, LEAST * float(spread.median())))
    with torch.no_grad():
        network.bank.weight.copy_((bank / scale[:, None])[..., None, None])
        assert network.bank.bias is not None
        network.bank.bias.copy_(-mean / scale)
        network.patches.weight.copy_(torch.eye(k).repeat_interleave(network.filters, 1) / network.filters)
        network.patches.bias.zero_()


def _peaks(
    net: Classifier, network: DflNet, pictures: Pictures, batch: int, seen: Callable[[int, int], None]
) -> list[Float[Tensor, "n c"]]:
    """Of each picture its peaks."""
    found: list[Tensor] = []
    with undisturbed(network), torch.no_grad():
        for batched in looks(pictures, net.preprocess, batch):
            _, features = network.tapped(batched.to(net.device))
            found += [peaks_of(one) for one in features.cpu().float()]
            seen(len(found), len(pictures))
    return found


def peaks_of(features: Float[Tensor, "c y x"], count: int = PEAKS) -> Float[Tensor, "n c"]:
    """The features at the peaks of the energy, the largest first: cells that are the largest of their 3 x 3.

    Of neighbours with the same energy only the first is one, so that what is even everywhere has few.
    """
    energy = features.square().sum(0).sqrt()
    y, x = energy.shape
    around = functional.unfold(functional.pad(energy[None, None], (1, 1, 1, 1), value=-1.0), 3)[0].reshape(9, y, x)
    peak = (around[:4] < energy).all(0) & (around[5:] <= energy).all(0)
    cells = peak.flatten().nonzero().flatten()
    order = energy.flatten()[cells].argsort(descending=True, stable=True)[:count]
    return features.flatten(1)[:, cells[order]].T


def centres_of(points: Float[Tensor, "n c"], count: int, seed: int) -> Float[Tensor, "count c"]:
    """Centres of so many groups; where there are fewer they come again, a little apart, so that they can part."""
    group = kmeans(points, count, seed)
    member = functional.one_hot(group).to(points).T
    centres = member @ points / member.sum(1, keepdim=True)
    again = centres[torch.arange(count) % len(centres)]
    noise = torch.randn(again.shape, generator=torch.Generator().manual_seed(seed))
    noise *= APART * again.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    noise[: len(centres)] = 0
    return again + noise


def _few(pictures: Pictures, count: int, seed: int) -> list[int]:
    """Indices of all images that show a class, or of a draw of so many of each.

    Raises:
        DataError: a class has none.
    """
    draw, chosen = np.random.default_rng(seed), set[int]()
    for label, name in enumerate(pictures.classes):
        members = [index for index, sample in enumerate(pictures.samples) if label in sample.labels]
        if not members:
            raise DataError(f"{name}: there is no picture of this class to find patches in")
        chosen |= {int(i) for i in draw.permutation(members)[:count]}
    return sorted(chosen)
