"""Distilled: what a small head that learned from sharper maps says of each cell."""

import torch

from whatwhere.classifiers.classifier import Trace, full_precision, undisturbed
from whatwhere.errors import UnsupportedError
from whatwhere.maps.cam import cam
from whatwhere.maps.combine import first_of, root
from whatwhere.maps.gradcam import gradcam
from whatwhere.types import Maps, Score

told = root(first_of(cam, gradcam))
"""What the head is told of the class."""


def distilled(trace: Trace, score: Score) -> Maps:
    """What a preset's maps taught a small head, for one look: in [0, 1], on the finest grid that the head reads.

    Pseudo masks teach a head that is the same for all classes (after Zhang, Cao, Wu: Rethinking the Route Towards
    Weakly Supervised Object Localization, CVPR 2020, where pseudo boxes do). Zeros where nothing speaks for the
    score.

    Raises:
        UnsupportedError: the network has no such head; says how it gets one.
    """
    head = trace.net.distilled
    if head is None:
        _ = trace.net.inner  # a compiled one, or a file, says that there is nothing to read in it
        raise UnsupportedError(f"{trace.net.name} has no distilled head; whatwhere distill trains one. Use gradcam")
    maps = told(trace, score).detach()
    with undisturbed(head), torch.no_grad(), full_precision(maps):
        there = maps.flatten(1).any(1)[:, None, None]
        seen: Maps = head(trace.beside, maps).sigmoid() * there
    return seen
