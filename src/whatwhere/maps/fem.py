"""FEM: rare, strong activations of every channel."""

import torch

from whatwhere.classifiers.classifier import Trace
from whatwhere.maps.weighted import weighted_sum
from whatwhere.types import Maps, Score


def fem(trace: Trace, score: Score, *, sigmas: float = 1.0) -> Maps:
    """FEM: cells where a channel is far above its own mean, the same for every class (Fuad et al., IPTA 2020).

    Fuad, Martin, Giot, Bourqui, Benois-Pineau, Zemmari: Features Understanding in 3D CNNs for Actions Recognition in
    Video. ``B_c = [A_c > mean(A_c) + k sigma(A_c)]`` and ``M = sum_c mean(A_c) B_c``. The score is not read.

    Args:
        trace: what the network saw.
        score: not read; the map is the same for every class.
        sigmas: k, standard deviations over the cells of the image (of the population).
    """
    features = trace.features.detach()
    deviation, mean = torch.std_mean(features.flatten(2), 2, correction=0, keepdim=True)
    rare = features.flatten(2) > mean + sigmas * deviation
    return weighted_sum(rare.to(features), mean[..., 0]).reshape(len(features), *features.shape[2:])
