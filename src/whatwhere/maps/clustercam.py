"""Cluster-CAM: Score-CAM over groups of channels that look alike."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whatwhere.classifiers.classifier import Trace, full_precision
from whatwhere.errors import InputError
from whatwhere.maps.seen import Batch, scores_seen_through, varying
from whatwhere.maps.shape import unit, upsample
from whatwhere.types import Extent, Features, Maps, Score


@dataclass(frozen=True, eq=False)
class Clusters:
    """The groups of one image's channels, those that speak most for the score first.

    Attributes:
        group: (c) the group of each channel, -1 for one that is constant.
        maps: (n *yx) what each group looks at, in [0, 1].
        confidences: (n) the score of the image seen through each.
        map: (*yx) the groups merged: raw, signed.
    """

    group: Int[Tensor, "c"]
    maps: Float[Tensor, "n *yx"]
    confidences: Float[Tensor, "n"]
    map: Float[Tensor, "*yx"]


def clustercam(
    trace: Trace,
    score: Score,
    *,
    k: int = 10,
    degree: int | None = 10,
    layers: Sequence[str] = (),
    seed: int = 0,
    batch: Batch = "auto",
) -> Maps:
    """Cluster-CAM: channels in groups, each weighted by what the network says of the image seen through it.

    After Feng, Ji, Dakovic, Cui, Zhu, Stankovic: Cluster-CAM, Cluster-Weighted Visual Interpretation of CNNs'
    Decision in Image Classification (Neural Networks 2024): as many forwards as groups, instead of channels. Each
    channel that is not constant is brought to [0, 1], its values are evened out by a polynomial, and k-means puts the
    channels into groups. With ``H_g`` the unit of the mean of a group, ``w_g`` is the score of the probabilities of
    ``x * H_g``, and ``M = sum_g w_g sum_{c in g} A_c``: with a group for each channel, and no polynomial, Score-CAM.
    The paper's own merging takes the best group's map less the worst one's, with k = 10; ``clusters`` gives both.

    Args:
        trace: what the network saw.
        score: what is explained, taken as ``scorecam`` does.
        k: groups; 10 as in the paper, with which insertion and deletion are those of Score-CAM already, while 64 give
            nearer to its map (benchmarks/clusters.md).
        degree: of the polynomial, fitted by least squares from a channel's values to their ranks, and kept in [0, 1];
            None for none.
        layers: whose channels are grouped, on the finest of their grids; by default those of the trace.
        seed: of k-means.
        batch: masked images that go through the network at once; "auto" for as many as 16 of 224 x 224.

    Raises:
        InputError: k, degree or batch of less than 1; no such layer.
    """
    found = clusters(trace, score, k=k, degree=degree, layers=layers, seed=seed, batch=batch)
    return torch.stack([one.map for one in found])


def clusters(
    trace: Trace,
    score: Score,
    *,
    k: int = 10,
    degree: int | None = 10,
    layers: Sequence[str] = (),
    seed: int = 0,
    batch: Batch = "auto",
) -> list[Clusters]:
    """What ``clustercam`` finds on its way: the groups of each image, for people to look at."""
    if not isinstance(k, int) or k < 1 or (degree is not None and (not isinstance(degree, int) or degree < 1)):
        raise InputError(f"k and degree are whole numbers of at least 1, got {k} and {degree}")
    found = []
    for i, channels in enumerate(_channels(trace, layers)):
        flat, live = channels.flatten(1), varying(channels)
        values = unit(channels[live]).flatten(1)
        with full_precision(values):
            group = kmeans(values if degree is None else evened(values, degree), k, seed)
            n = int(group.max()) + 1 if len(group) else 0
            member = torch.eye(n).to(values)[:, group]
            means = (member @ values / member.sum(1, keepdim=True)).reshape(n, *channels.shape[1:])
            sums = (member @ flat[live]).reshape(means.shape)
        masks, key = partial(_masks, means, tuple(trace.images.shape[2:])), ("clustercam", k, degree, *layers, seed)
        scores = scores_seen_through(trace, score, i, masks, n, read="probability", batch=batch, key=key)
        confidences = scores.to(values)
        with full_precision(values):
            merged = torch.einsum("n,n...->...", confidences, sums)
        order = confidences.argsort(descending=True)
        rank = torch.full((len(flat),), -1, device=flat.device)
        rank[live] = order.argsort()[group]
        found.append(Clusters(rank, unit(means[order]), confidences[order], merged))
    return found


def evened(values: Float[Tensor, "c n"], degree: int) -> Float[Tensor, "c n"]:
    """Each row's values in [0, 1] through the polynomial that fits their ranks best: their range is used evenly."""
    return torch.cat([_evened(part, degree) for part in torch.split(values, max(1, 2**20 // values.shape[1]))])


def _evened(values: Float[Tensor, "c n"], degree: int) -> Float[Tensor, "c n"]:
    ordered = values.sort(1).values.contiguous()
    ranks = (torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)) / 2
    powers = torch.cos(torch.arange(degree + 1).to(values) * torch.acos(2 * values - 1)[..., None])  # Chebyshev's
    # a little of the identity, for rows of few different values
    gram = powers.transpose(1, 2) @ powers + 1e-5 * values.shape[1] * torch.eye(degree + 1).to(values)
    fitted = powers @ torch.linalg.solve(
        gram, powers.transpose(1, 2) @ (ranks / values.shape[1]).to(values)[..., None]
    )
    even: Tensor = fitted[..., 0].clamp(0, 1)
    return even


def kmeans(points: Float[Tensor, "n d"], k: int, seed: int, steps: int = 50) -> Int[Tensor, "n"]:
    """The group of each point, 0..k-1 without gaps; fewer groups where there are fewer different points.

    Lloyd's algorithm from k-means++ seeds (Arthur & Vassilvitskii 2007), with a generator of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = points[:1]
    if len(points):
        centres = points[torch.randint(len(points), (1,), generator=generator).to(points.device)]
    for _ in range(min(k, len(points)) - 1):
        distance = torch.cdist(points, centres).amin(1).square()
        if not distance.any():
            break
        drawn = torch.multinomial(distance.cpu(), 1, generator=generator).to(points.device)
        centres = torch.cat([centres, points[drawn]])
    group = torch.full((len(points),), -1, device=points.device)
    for _ in range(steps if len(points) else 0):
        nearest = torch.cdist(points, centres).argmin(1)
        if torch.equal(nearest, group):
            break
        # a centre that loses all its points is left out
        _, group = torch.unique(nearest, return_inverse=True)
        member = torch.eye(int(group.max()) + 1).to(points)[:, group]
        centres = member @ points / member.sum(1, keepdim=True)
    return group


def _channels(trace: Trace, layers: Sequence[str]) -> Features:
    if not layers:
        return trace.features.detach()
    features = [one.features.detach() for one in trace.net.traces(trace.images, layers)]
    finest = max((tuple(one.shape[2:]) for one in features), key=math.prod)
    brought = [upsample(one.flatten(0, 1), finest).reshape(*one.shape[:2], *finest) for one in features]
    return torch.cat(brought, 1)


def _masks(maps: Float[Tensor, "n *yx"], size: Extent, part: range) -> Float[Tensor, "m *hw"]:
    return unit(upsample(maps[part.start : part.stop], size))
