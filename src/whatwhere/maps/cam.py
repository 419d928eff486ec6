"""CAM: class activation mapping."""

from whatwhere.classifiers.classifier import Trace, full_precision
from whatwhere.maps.weighted import Weighted
from whatwhere.types import Score, Weights


@Weighted
def cam(trace: Trace, score: Score) -> Weights:
    """Class activation map: the last layer's weights laid over the features (Zhou et al., CVPR 2016).

    Zhou, Khosla, Lapedriza, Oliva, Torralba: Learning Deep Features for Discriminative Localization.

    ``M_k(y, x) = sum_c w_kc A_c(y, x)`` (eq. 2), with ``w`` the weights of the linear layer behind global
    average pooling: ``mean(M_k) + bias_k`` is the logit of class k. A score of several classes gets their
    maps in the proportion d score / d logit. All classes at once: ``trace.net.class_maps(trace)``.

    Raises:
        UnsupportedError: the logits are not linear in the pooled features.
    """
    weight, _ = trace.net.checked_linear(trace)
    with full_precision(weight):
        return trace.class_gradient(score) @ weight
