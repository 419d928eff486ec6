"""Fully connected layers <-> 1 x 1 convolutions: a classifier becomes a predictor for every cell, and back.

Long, Shelhamer, Darrell: Fully Convolutional Networks for Semantic Segmentation, CVPR 2015, section 3.
"""

from copy import deepcopy
from typing import Any

from torch import nn

from whatwhere.classifiers.acol import AdversarialBranches
from whatwhere.classifiers.backbones import backbone_of, dilate, probe
from whatwhere.classifiers.classifier import Classifier
from whatwhere.classifiers.heads import Head, Headed
from whatwhere.classifiers.hooked import HookedClassifier
from whatwhere.classifiers.split import SplitClassifier
from whatwhere.errors import InputError, UnsupportedError
from whatwhere.types import Images


def dense(net: Classifier, stride: int | None = None) -> Classifier:
    """The same classifier with its last layer as a 1 x 1 convolution in front of the pool.

    Its network is a ``Headed``, whose ``maps(images)`` are logits of every cell (b k y x) of images of any size that
    the backbone takes; their mean over the cells is the classifier's logits. Weights are copied.

    Args:
        net: logits linear in the mean of its features.
        stride: pixels a cell, a power of two times finer than the network's own: steps are taken out, and what comes
            after them is dilated. The logits are then means over more cells, and near the classifier's.

    Raises:
        UnsupportedError: the logits are not linear in the mean of the features; the network cannot be cut or dilated.
        InputError: no such stride.
    """
    image = probe(len(net.preprocess.mean), net.preprocess.size, next(net.network.parameters(), None))
    linear = net.checked_linear(net.trace(image))
    if isinstance(net.network, AdversarialBranches):
        raise UnsupportedError("a network of two branches has two maps a cell; use its branch_maps")
    network = deepcopy(net.network)
    if isinstance(network, Headed):
        network.head.order = "linear-pool"
        return _around(net, network, {**net.options.get("head", {}), "order": "linear-pool"}, image, stride)
    backbone, channels = backbone_of(network, image, net.layer if isinstance(net, HookedClassifier) else None)
    if hasattr(network, "reset_classifier"):
        network.reset_classifier(0)  # type: ignore[operator]
    head = Head(channels, len(net.labels), order="linear-pool").to(image)
    head.linear.weight.data.copy_(linear.weight[:, :, None, None])
    assert head.linear.bias is not None
    head.linear.bias.data.copy_(linear.bias)
    return _around(net, Headed(backbone, nn.Identity(), head).eval(), {"order": "linear-pool"}, image, stride)


def _around(
    net: Classifier, network: Headed, head: dict[str, Any], image: Images, stride: int | None
) -> SplitClassifier:
    """The classifier with another network, made finer if that is asked for."""
    options = {**net.options, "head": head}
    if stride is not None:
        dilate(network.backbone, image, stride)
        options["stride"] = stride
    made = SplitClassifier(network, net.labels, net.preprocess, net.name, net.activation)
    made.options = options
    return made


def pooled(net: Classifier) -> Classifier:
    """A dense predictor as a classifier again: the pool in front, then a fully connected layer. Weights are copied.

    Raises:
        InputError: its network is none that ``dense`` gives.
    """
    if not isinstance(net.network, Headed) or (net.network.head.order, net.network.head.pool) != (
        "linear-pool",
        "mean",
    ):
        raise InputError(f"{net.name}: wanted a network whose cells are averaged behind a 1 x 1 convolution")
    network = deepcopy(net.network)
    network.head.order = "pool-linear"
    made = SplitClassifier(network, net.labels, net.preprocess, net.name, net.activation)
    made.options = net.options | {"head": net.options.get("head", {}) | {"order": "pool-linear"}}
    return made


def to_convolution(linear: nn.Linear) -> nn.Conv2d:
    """The 1 x 1 convolution of the same weights: on a grid (b c y x) what the layer is on (b c)."""
    conv = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=linear.bias is not None)
    conv = conv.to(linear.weight.device, linear.weight.dtype)
    conv.weight.data.copy_(linear.weight.data[:, :, None, None])
    if linear.bias is not None and conv.bias is not None:
        conv.bias.data.copy_(linear.bias.data)
    return conv


def to_linear(conv: nn.Conv2d) -> nn.Linear:
    """The fully connected layer of the same weights.

    Raises:
        InputError: the convolution is not 1 x 1 with step 1, or has groups.
    """
    if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.groups != 1 or conv.padding not in {(0, 0), 0}:
        raise InputError(f"wanted a 1 x 1 convolution with step 1, no padding and no groups, got {conv}")
    linear = nn.Linear(conv.in_channels, conv.out_channels, bias=conv.bias is not None)
    linear = linear.to(conv.weight.device, conv.weight.dtype)
    linear.weight.data.copy_(conv.weight.data.flatten(1))
    if conv.bias is not None:
        linear.bias.data.copy_(conv.bias.data)
    return linear
