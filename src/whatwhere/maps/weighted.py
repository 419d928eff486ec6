"""Most methods differ only in what a channel, or an activation, counts for: the map is the weighted sum."""

from collections.abc import Callable
from functools import update_wrapper
from inspect import signature
from typing import Concatenate, Generic, ParamSpec

from whatwhere.classifiers.classifier import Trace, full_precision
from whatwhere.types import Features, Maps, Score, Weights

Options = ParamSpec("Options")


class Weighted(Generic[Options]):
    """The method ``M = sum_c w_c A_c``, of the function that gives its weights; decorates that function.

    Attributes:
        weights: (trace, score, **options) -> (b c), or (b c *yx) where each activation has its own.
    """

    __name__: str

    def __init__(self, weights: Callable[Concatenate[Trace, Score, Options], Weights]) -> None:
        self.weights = weights
        update_wrapper(self, weights)
        self.__signature__ = signature(weights).replace(return_annotation=Maps)

    def __reduce__(self) -> str:
        return self.__name__

    def __call__(self, trace: Trace, score: Score, *args: Options.args, **options: Options.kwargs) -> Maps:
        """The map, raw and signed."""
        return weighted_sum(trace.features, self.weights(trace, score, *args, **options))


def weighted_sum(features: Features, weights: Weights) -> Maps:
    """``sum_c w_c A_c``: one map an image, of weights (b c) or (b c *yx)."""
    features = features.detach()
    if weights.ndim > 2:
        return (weights * features).sum(1)
    b, _, *yx = features.shape
    with full_precision(features):
        return (weights[:, None] @ features.flatten(2)).reshape(b, *yx)
