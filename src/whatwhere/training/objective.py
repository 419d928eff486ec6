"""What is made small: logits and labels -> one number."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from whatwhere.types import ClassMaps, Logits


def loss_of(
    logits: Logits, targets: Float[Tensor, "b k"], activation: str = "softmax", smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Cross-entropy, of the softmax or of each class's sigmoid, the mean over images.

    Args:
        logits: (b k).
        targets: (b k) in [0, 1]; of images that are mixed, shares.
        activation: as of a classifier.
        smoothing: share of the target that is spread evenly (Szegedy et al. 2016, section 7).
    """
    if activation == "sigmoid":
        smooth = targets * (1 - smoothing) + smoothing / 2
        return functional.binary_cross_entropy_with_logits(logits, smooth)
    return functional.cross_entropy(logits, targets, label_smoothing=smoothing)


def dense_loss(
    maps: ClassMaps, targets: Float[Tensor, "b k"], activation: str = "softmax", smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """The same, where each cell is an instance that carries its image's label; the mean over cells and images."""
    cells = maps.flatten(2).transpose(1, 2).flatten(0, 1)
    several = targets.repeat_interleave(maps[0, 0].numel(), 0)
    return loss_of(cells, several, activation, smoothing)


def prior_of(targets: Float[Tensor, "n k"], activation: str = "softmax") -> Float[Tensor, "k"]:
    """The log frequency of each class among images: what is added to the logits in training, and left out after it.

    Menon et al., Long-tail learning via logit adjustment, ICLR 2021, eq. 10. Zeros where classes do not exclude one
    another.
    """
    if activation == "sigmoid":
        return torch.zeros(targets.shape[1])
    return (targets.sum(0).clamp(min=0.5) / len(targets)).log()


def measured(logits: Logits, targets: Float[Tensor, "b k"], activation: str = "softmax") -> float:
    """Accuracy, or where classes do not exclude one another the mean average precision of those that are shown."""
    if activation == "softmax":
        return round(float((logits.argmax(1) == targets.argmax(1)).float().mean()), 6)
    shown = targets.any(0)
    order = logits[:, shown].argsort(0, descending=True)
    right = targets[:, shown].gather(0, order)
    precision = right.cumsum(0) / torch.arange(1, len(right) + 1)[:, None]
    return round(float(((precision * right).sum(0) / right.sum(0)).mean()), 6)
