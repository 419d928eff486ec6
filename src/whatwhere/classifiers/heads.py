"""What decides, behind a backbone: features (b c y x) -> logits (b k), and how grids of evidence become one number.

A pool takes maps (b k *yx) to (b k). The multiple-instance ones read every cell as an instance of the image's label
(Dietterich et al. 1997): the image shows the class where some cell does.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from whatwhere.errors import InputError
from whatwhere.types import ClassMaps, Features, Images, Logits

Pool = Literal["mean", "max", "lse", "topk", "noisy-or", "attention"]
Order = Literal["pool-linear", "linear-pool"]
"""Whether the grid is pooled before the last linear layer or behind it."""

LSE_SHARPNESS = 4.0
TOP_SHARE = 0.2


def mean(maps: ClassMaps) -> Logits:
    """Global average pooling (Lin et al., Network in Network, 2014)."""
    return maps.flatten(2).mean(2)


def largest(maps: ClassMaps) -> Logits:
    """Global max pooling (Oquab et al., Is object localization for free?, CVPR 2015)."""
    return maps.flatten(2).amax(2)


def log_sum_exp(maps: ClassMaps, sharpness: float = LSE_SHARPNESS) -> Logits:
    """Between mean and max: log(mean(exp(r x))) / r (Pinheiro & Collobert, CVPR 2015, eq. 1)."""
    flat = maps.flatten(2)
    return (torch.logsumexp(sharpness * flat, 2) - torch.tensor(float(flat.shape[2])).log().to(flat)) / sharpness


def top_share(maps: ClassMaps, share: float = TOP_SHARE) -> Logits:
    """The mean of the highest cells, at least one (Durand et al., WILDCAT, CVPR 2017, eq. 2, without the lowest)."""
    flat = maps.flatten(2)
    return flat.topk(max(1, round(share * flat.shape[2])), 2).values.mean(2)


def noisy_or(maps: ClassMaps) -> Logits:
    """The logit of 1 - prod(1 - sigmoid(x)): some cell shows it, all of them independent.

    Zhang, Platt, Viola: Multiple Instance Boosting for Object Detection, NeurIPS 2005, section 2.
    """
    cells = maps.flatten(2).clamp(min=-30)  # below that a probability is lost in rounding, and its gradient with it
    silent = nn.functional.softplus(cells).sum(2)  # - log of the probability that none does
    return silent + torch.log(-torch.expm1(-silent))


POOLS: dict[str, Callable[[ClassMaps], Logits]] = {
    "mean": mean,
    "max": largest,
    "lse": log_sum_exp,
    "topk": top_share,
    "noisy-or": noisy_or,
}
"""By name; attention has weights of its own."""


class Head(nn.Module):
    """A last linear layer and a pool, in either order.

    With the mean the two orders are the same function. Behind the layer a pool reads logits of cells, and is what
    multiple-instance learning means; before it, it reads features.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        pool: str = "mean",
        order: str = "pool-linear",
        dropout: float = 0.0,
        scaled: bool = False,
    ) -> None:
        """A head with fresh weights.

        Args:
            channels: c, of the features.
            classes: k.
            pool: how cells become one.
            order: before the linear layer or behind it; "noisy-or" only behind it, where there are logits.
            dropout: of what goes into the linear layer.
            scaled: learn a scale and an offset of each class's map besides its weights: logits = pool(s * w . f) + o.

        Raises:
            InputError: no such pool or order, or one that goes only with the other.
        """
        super().__init__()
        if pool not in get_args(Pool) or order not in get_args(Order):
            raise InputError(
                f"a pool is one of {', '.join(get_args(Pool))} and an order one of {', '.join(get_args(Order))}, "
                f"got {pool!r} and {order!r}"
            )
        if pool == "noisy-or" and order != "linear-pool":
            raise InputError("noisy-or reads the logits of cells; use order='linear-pool'")
        self.pool, self.order, self.scaled = pool, order, scaled
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Conv2d(channels, classes, 1)
        if scaled:
            parametrize.register_parametrization(self.linear, "weight", Scale(classes))
        self.attention = Attention(channels) if pool == "attention" else None

    def forward(self, features: Features) -> Logits:
        """Logits (b k)."""
        if self.order == "linear-pool":
            return self._pooled(self.maps(features), features)
        pooled = self._pooled(features, features)[:, :, None, None]
        logits: Tensor = self.linear(self.dropout(pooled)).flatten(1)
        return logits

    def maps(self, features: Features) -> ClassMaps:
        """Logits of every cell (b k y x), of what the linear layer alone makes of it."""
        maps: ClassMaps = self.linear(self.dropout(features))
        return maps

    def _pooled(self, values: Tensor, features: Features) -> Tensor:
        if self.attention is None:
            return POOLS[self.pool](values)
        pooled: Tensor = (values * self.attention(features)).flatten(2).sum(2)
        return pooled


def learned_weight(layer: Any) -> Tensor:
    """The weights that a linear layer learns: those behind its scale, where it has one."""
    found: Tensor = layer.parametrizations.weight.original if hasattr(layer, "parametrizations") else layer.weight
    return found


class Scale(nn.Module):
    """One factor a class, learned beside the weights that it multiplies."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(classes))

    def forward(self, weight: Tensor) -> Tensor:
        """The weights (k c 1 1), scaled."""
        return weight * self.factor[:, None, None, None]


class Attention(nn.Module):
    """Weights of the cells, which sum to 1: softmax of w . (tanh(V h) * sigmoid(U h)).

    Ilse, Tomczak, Welling: Attention-based Deep Multiple Instance Learning, ICML 2018, eq. 9.
    """

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        self.value, self.gate = nn.Conv2d(channels, width, 1), nn.Conv2d(channels, width, 1)
        self.weight = nn.Conv2d(width, 1, 1, bias=False)

    def forward(self, features: Features) -> Float[Tensor, "b 1 y x"]:
        """One weight a cell."""
        scores = self.weight(self.value(features).tanh() * self.gate(features).sigmoid())
        weights: Tensor = scores.flatten(2).softmax(2).reshape(scores.shape)
        return weights


class Headed(nn.Module):
    """A backbone, what may stand between, and a head: a network that splits by itself.

    Attributes:
        backbone: images -> features (b c y x).
        neck: features -> features, of other channels perhaps.
        head: features -> logits.
        num_features: channels that the head takes.
    """

    def __init__(self, backbone: nn.Module, neck: nn.Module, head: Head) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = backbone, neck, head
        self.num_features = head.linear.in_channels

    def forward_features(self, images: Images) -> Features:
        """What the head reads."""
        features: Tensor = self.neck(self.backbone(images))
        return features

    def maps(self, images: Images) -> ClassMaps:
        """Logits of every cell (b k y x), of images of any size that the backbone takes."""
        return self.head.maps(self.forward_features(images))

    def forward_head(self, features: Features) -> Logits:
        """Logits (b k)."""
        logits: Tensor = self.head(features)
        return logits

    def forward(self, images: Images) -> Logits:
        """Logits (b k)."""
        return self.forward_head(self.forward_features(images))


def convolution(channels: int, units: int) -> nn.Module:
    """A 3 x 3 convolution and a ReLU: what Zhou et al. 2016 (section 3.1) put before the pool."""
    conv = nn.Conv2d(channels, units, 3, padding=1)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    nn.init.zeros_(conv.bias if conv.bias is not None else torch.empty(0))
    return nn.Sequential(conv, nn.ReLU())
