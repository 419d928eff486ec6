"""Occlusion: what is lost when a window of the image is covered."""

import math
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from whatwhere.classifiers.classifier import Trace, full_precision
from whatwhere.errors import InputError, UnsupportedError
from whatwhere.maps.seen import Batch, score_of_whole, scores_of
from whatwhere.types import Images, Maps, Score, Size

Cover = Literal["grey", "blur"]


def occlusion(
    trace: Trace,
    score: Score,
    *,
    cover: Cover = "grey",
    window: Size | None = None,
    stride: Size | None = None,
    batch: Batch = "auto",
) -> Maps:
    """Occlusion: what the score loses when a window of the image is covered (Zeiler & Fergus, ECCV 2014).

    Zeiler, Fergus: Visualizing and Understanding Convolutional Networks. A window slides over the image; each pixel
    has the mean loss over the windows that cover it. The last window of a row or column is cut off at the edge.

    Args:
        trace: what the network saw.
        score: what is explained.
        cover: "grey", 0 as the network takes it, which is the mean colour where that is subtracted, or "blur", the
            image blurred as wide as the window.
        window: (h, w) in pixels of the network's input; by default a seventh of either side, 32 x 32 of 224 x 224.
        stride: (h, w) in pixels; by default half a window. With both, 169 forwards.
        batch: covered images that go through the network at once; "auto" for as many as 16 of 224 x 224.

    Returns:
        (b h w): one value a pixel of the network's input.

    Raises:
        InputError: no such cover; a window, stride or batch of less than 1; a stride longer than the window.
        UnsupportedError: volumes.
    """
    if cover not in get_args(Cover):
        raise InputError(f"cover is one of {', '.join(get_args(Cover))}, got {cover!r}")
    if trace.images.ndim != 4:
        raise UnsupportedError("occlusion takes images (b d h w), not volumes; use gradcam or eigencam")
    h, w = trace.images.shape[2:]
    window = window or (math.ceil(h / 7), math.ceil(w / 7))
    stride = stride or (math.ceil(window[0] / 2), math.ceil(window[1] / 2))
    if not all(1 <= step <= side for step, side in zip(stride, window, strict=True)):
        raise InputError(
            f"window and stride are (h, w) of at least 1 pixel, no stride longer than its window; got {window} and "
            f"{stride}"
        )
    rows = _windows(h, window[0], stride[0]).to(trace.images)
    columns = _windows(w, window[1], stride[1]).to(trace.images)
    covers = torch.zeros_like(trace.images) if cover == "grey" else _blurred(trace.images, window)
    whole = score_of_whole(trace, score)
    lost = []
    for i, (image, under) in enumerate(zip(trace.images, covers, strict=True)):
        covered = partial(_covered, image, under, rows, columns)
        key, count = ("occlusion", cover, window, stride), len(rows) * len(columns)
        scores = scores_of(trace, score, i, covered, count, read="logit", batch=batch, key=key)
        lost.append((whole[i] - scores).reshape(len(rows), len(columns)))
    rows, columns = rows.to(whole), columns.to(whole)
    with full_precision(whole):
        return rows.T @ torch.stack(lost) @ columns / (rows.sum(0)[:, None] * columns.sum(0))


def _covered(
    image: Float[Tensor, "d h w"],
    cover: Float[Tensor, "d h w"],
    rows: Float[Tensor, "n h"],
    columns: Float[Tensor, "m w"],
    part: range,
) -> Images:
    """The image with the cover in some of its windows, which are numbered row by row."""
    numbers = torch.arange(part.start, part.stop, device=image.device)
    inside = rows[numbers // len(columns), :, None] * columns[numbers % len(columns), None, :]
    return torch.where(inside[:, None] > 0, cover, image)


def _windows(pixels: int, window: int, stride: int) -> Float[Tensor, "n pixels"]:
    """1 where the n-th window lies, until the whole side is covered."""
    starts = torch.arange(math.ceil(max(pixels - window, 0) / stride) + 1)[:, None] * stride
    at = torch.arange(pixels)
    return ((at >= starts) & (at < starts + window)).float()


def _blurred(images: Images, window: Size) -> Images:
    sigma = max(window) / 2
    # the kernel reaches no further than reflection at the edges allows
    reach = min(math.ceil(2 * sigma), min(images.shape[2:]) - 1)
    blurred: Tensor = gaussian_blur(images, [2 * reach + 1, 2 * reach + 1], [sigma, sigma])
    return blurred
