"""DFL: what the filter bank of a DFL-CNN says of each cell."""

import torch

from whatwhere.classifiers.classifier import Trace, full_precision, undisturbed, widened
from whatwhere.classifiers.dfl import DflNet
from whatwhere.errors import UnsupportedError
from whatwhere.types import Maps, Score


def dfl(trace: Trace, score: Score) -> Maps:
    """A class's filters, averaged: where the patches are that tell it from others (Wang et al., CVPR 2018).

    Wang, Morariu, Davis: Learning a Discriminative Filter Bank within a CNN for Fine-grained Recognition.

    ``M_k = mean_n sum_c w_knc A_c``: the cross-channel average of the side branch (section 3.2) before its max and
    without offsets. A score of several classes gets their maps in the proportion d score / d logit.

    It looks at the images again, and its maps are on the grid that the filters read.

    Raises:
        UnsupportedError: the network has no filter bank.
    """
    network = trace.net.inner
    if not isinstance(network, DflNet):
        raise UnsupportedError(
            f"{trace.net.name} has no filter bank, as head = {{filters = 10}} gives it. Use gradcam or layercam"
        )
    with undisturbed(network), torch.no_grad():
        assert network.bank.bias is not None
        offsets = network.side(network.bank.bias[None])[0]
        maps = widened(network.maps(trace.images) - offsets[:, None, None])
    with full_precision(maps):
        seen: Maps = torch.einsum("bk,bkyx->byx", trace.class_gradient(score).to(maps), maps)
    return seen
