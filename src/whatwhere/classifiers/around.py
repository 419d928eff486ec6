"""A module -> a Classifier: where it splits, what its classes are called, how photos become its input."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import nn

from whatwhere.classifiers.backbones import probe
from whatwhere.classifiers.classifier import Activation, Classifier, logits_of, undisturbed
from whatwhere.classifiers.dfl import DflNet
from whatwhere.classifiers.hooked import HookedClassifier, find_layer
from whatwhere.classifiers.labels import Labels, imagenet
from whatwhere.classifiers.split import SplitClassifier, has_halves
from whatwhere.classifiers.zoo import timm_preprocess
from whatwhere.errors import InputError, UnsupportedError
from whatwhere.images import Preprocess


@torch.inference_mode(False)
def around(
    network: nn.Module,
    *,
    name: str | None = None,
    labels: Sequence[str] | None = None,
    preprocess: Preprocess | None = None,
    activation: Activation | None = None,
    layer: str | None = None,
) -> Classifier:
    """A classifier around a module, split where it splits by itself or where a layer is found.

    Raises:
        UnsupportedError: the module does not run on an image of that size, or no layer will do.
        InputError: another number of labels than logits, or no such layer.
    """
    network = getattr(network, "_orig_mod", network)  # of torch.compile, whose layers cannot be reached
    if any(parameter.is_inference() for parameter in network.parameters()):
        raise UnsupportedError(f"{type(network).__name__} was made under inference_mode; make it outside of it")
    from_timm = has_halves(network)
    if preprocess is None:
        preprocess = timm_preprocess(network) if from_timm else Preprocess()
    name = name or type(network).__name__
    like = next(chain(network.parameters(), network.buffers()), torch.empty(0))
    image = probe(len(preprocess.mean), preprocess.size, like)
    try:
        with undisturbed(network), torch.no_grad():
            logits = logits_of(network(image))
    except UnsupportedError:
        raise
    except Exception as error:  # somebody else's code
        raise UnsupportedError(
            f"{name} does not run on a batch of images {tuple(image.shape)}: {type(error).__name__}: {error}; "
            "pass preprocess=Preprocess(size=(h, w), mean=..., std=...) that fits it, or wrap it in a module that "
            "takes the images alone"
        ) from error
    if layer is None and isinstance(network, DflNet):
        layer = "general.neck"  # the grid that the filters read is the worse one to look at
    if layer is None and not (from_timm and _splits(network, image, logits)):
        layer = find_layer(network, image)
    k = logits.shape[1]
    if labels is None:
        labels = _labels(network, k)
    elif not isinstance(labels, Labels):
        labels = Labels(labels)
    if len(labels) != k:
        raise InputError(f"{name} gives {k} logits, got {len(labels)} labels")
    told = getattr(getattr(network, "config", None), "problem_type", None)  # of transformers
    activation = activation or ("sigmoid" if k == 1 or told == "multi_label_classification" else "softmax")
    if layer is None:
        return SplitClassifier(network, labels, preprocess, name, activation)
    return HookedClassifier(network, labels, preprocess, name, activation, layer=layer)


def _splits(network: nn.Module, image: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether timm's two halves are the whole network, with a grid (b c y x) of several cells between them.

    Tokens and channels-last layouts are not; nor is a subclass whose ``forward`` does more than the halves.
    """
    with undisturbed(network), torch.no_grad():
        features = network.forward_features(image)  # type: ignore[operator]
        channels = getattr(network, "num_features", None)
        if not isinstance(features, torch.Tensor) or features.ndim != 4 or features.shape[1] != channels:
            return False
        if features[0, 0].numel() == 1:
            return False
        again = network.forward_head(features)  # type: ignore[operator]
    return isinstance(again, torch.Tensor) and again.shape == logits.shape and torch.allclose(again, logits)


def _labels(network: nn.Module, k: int) -> Labels:
    """Names that the network carries, ImageNet's for the zoos' networks of 1000 classes, or numbers."""
    carried = getattr(getattr(network, "config", None), "id2label", None)
    if isinstance(carried, dict) and len(carried) == k:
        return Labels([str(carried[index]) for index in sorted(carried, key=int)])
    home = type(network).__module__
    if k == 1000 and home.startswith(("timm.", "torchvision.")):
        return imagenet()
    return Labels.numbered(k)
