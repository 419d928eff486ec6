"""Smooth Grad-CAM++: Grad-CAM++ with derivatives averaged over noise."""

import torch

from whatwhere.classifiers.classifier import Trace
from whatwhere.maps.combine import check_noise, with_noise
from whatwhere.maps.weighted import Weighted
from whatwhere.types import Score, Weights


@Weighted
def smoothgradcampp(trace: Trace, score: Score, *, samples: int = 4, noise: float = 0.15, seed: int = 0) -> Weights:
    """Smooth Grad-CAM++: Grad-CAM++ with its derivatives averaged over noisy images (Omeiza et al. 2019).

    Omeiza, Speakman, Cintas, Weldemariam: Smooth Grad-CAM++. With ``D_i`` the mean over the samples of ``g^i``:
    ``alpha = D_2 / (2 D_2 + D_3 sum_yx A_c)``, 0 where the denominator is not positive;
    ``w_c = sum_yx alpha relu(D_1)`` (eqs. 4 to 9) and ``M = sum_c w_c A_c``, with the features of the image
    without noise.

    Args:
        trace: what the network saw.
        score: what is explained.
        samples: noisy images; as many forwards.
        noise: standard deviation, as a share of the range of each image's values.
        seed: of the noise, which is the same for every image of a batch.

    Raises:
        InputError: no samples, or negative noise.
    """
    check_noise(samples, noise)
    features = trace.features.detach().flatten(2)
    first, second, third = (torch.zeros_like(features) for _ in range(3))
    for noisy in with_noise(trace.images, samples, noise, seed):
        gradient = trace.net.trace(noisy).gradient(score).flatten(2)
        first += gradient
        second += gradient.square()
        third += gradient**3
    # the number of samples cancels in alpha
    denominator = 2 * second + third * features.sum(2, keepdim=True)
    alpha = torch.where(denominator > 0, second / torch.where(denominator > 0, denominator, 1), 0)
    return (alpha * first.relu()).sum(2) / samples
