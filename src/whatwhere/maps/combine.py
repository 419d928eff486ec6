"""Over methods: each takes methods and gives one, ``(trace, score) -> maps``."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from whatwhere.classifiers.classifier import Trace
from whatwhere.errors import InputError, UnsupportedError
from whatwhere.maps.components import signed_component
from whatwhere.maps.gradcampp import gradcampp
from whatwhere.maps.shape import positive, unit, upsample
from whatwhere.maps.weighted import Weighted
from whatwhere.types import Images, Maps, Score

if TYPE_CHECKING:
    from whatwhere.maps import Method

Merge = Literal["mean", "product", "max"]


def smooth(method: "Method", *, samples: int = 8, noise: float = 0.15, seed: int = 0) -> "Method":
    """The mean of a method's maps over noisy copies of the images (SmoothGrad, Smilkov et al. 2017, for any method).

    Args:
        method: whose maps are averaged, raw and signed.
        samples: noisy copies; as many looks.
        noise: standard deviation, as a share of the range of each image's values.
        seed: of the noise, which is the same for every image of a batch.

    Raises:
        InputError: no samples, or negative noise.
    """
    check_noise(samples, noise)

    def smoothed(trace: Trace, score: Score) -> Maps:
        maps = [method(trace.net.trace(images), score) for images in with_noise(trace.images, samples, noise, seed)]
        return torch.stack(maps).mean(0)

    return _named(smoothed, "smooth", method)


def check_noise(samples: int, noise: float) -> None:
    """Raises an InputError where ``with_noise`` would have nothing to give."""
    if samples < 1 or noise < 0:
        raise InputError(f"wanted at least 1 sample and noise of at least 0, got {samples} and {noise}")


def with_noise(images: Images, samples: int, noise: float, seed: int) -> Iterator[Images]:
    """Copies of the images with normal noise, of a share of each image's range; the same noise for every image."""
    axes = tuple(range(1, images.ndim))
    spread = noise * (images.amax(axes, keepdim=True) - images.amin(axes, keepdim=True))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(samples):
        yield images + spread * torch.randn(images.shape[1:], generator=generator).to(images)


def augment(method: "Method", *, flip: bool = True, scales: Sequence[float] = (1.0,)) -> "Method":
    """The mean of a method's maps over the images mirrored and resized, each map brought back to where it belongs.

    Args:
        method: whose maps are averaged, raw and signed, on the finest of their grids.
        flip: each also mirrored left to right.
        scales: sizes of the images, as multiples; other than 1 only for networks that take images of any size.

    Raises:
        InputError: no scales, or one that is not positive.
    """
    if not scales or min(scales) <= 0:
        raise InputError(f"scales are positive, at least one, got {scales}")

    def augmented(trace: Trace, score: Score) -> Maps:
        size = trace.images.shape[2:]
        found: list[Maps] = []
        for scale in scales:
            images = trace.images
            if scale != 1:
                scaled = tuple(max(1, round(side * scale)) for side in size)
                images = upsample(images.flatten(0, 1), scaled).reshape(*images.shape[:2], *scaled)
            for mirrored in (False, True) if flip else (False,):
                seen = trace if scale == 1 and not mirrored else _look(trace, images.flip(-1) if mirrored else images)
                maps = method(seen, score)
                found.append(maps.flip(-1) if mirrored else maps)
        finest = max((tuple(maps.shape[1:]) for maps in found), key=math.prod)
        return torch.stack([upsample(maps, finest) for maps in found]).mean(0)

    return _named(augmented, "augment", method)


def _look(trace: Trace, images: Images) -> Trace:
    try:
        return trace.net.trace(images)
    except (RuntimeError, AssertionError, InputError) as error:  # somebody else's code, or compiled for one size
        raise UnsupportedError(
            f"{trace.net.name} does not take images {tuple(images.shape[2:])}: {error}; leave scales at (1.0,)"
        ) from error


def root(method: "Method") -> "Method":
    """The square root of the positive part of a method's maps, each from 0 to 1: less of the peak, more of the thing.

    Maps of several looks or layers that are averaged count the same then.
    """

    def rooted(trace: Trace, score: Score) -> Maps:
        return unit(positive(method(trace, score)).sqrt())

    return _named(rooted, "root", method)


def first_of(*methods: "Method") -> "Method":
    """The first of several methods that applies to the network.

    Raises:
        InputError: no method.
        UnsupportedError: when it is used: none of them applies; what the last one says.
    """
    if not methods:
        raise InputError("wanted at least one method to choose from, got none")

    def chosen(trace: Trace, score: Score) -> Maps:
        for method in methods[:-1]:
            try:
                return method(trace, score)
            except UnsupportedError:
                pass
        return methods[-1](trace, score)

    return _named(chosen, "first_of", *methods)


def fuse(*methods: "Method", layers: Sequence[str] = (), by: Merge = "mean") -> "Method":
    """Several methods, at several layers, merged into one map.

    Each map goes through ``positive``, ``upsample`` to the network's input, and ``unit``; there they are merged pixel
    by pixel.

    Args:
        methods: at least one.
        layers: as in ``network.named_modules()``, looked at in one run; by default the layer of the trace.
        by: "mean", "product" (what all of them say) or "max" (what any of them says).

    Raises:
        InputError: no method, or no such merge; when it is used: no such layer.
    """
    if not methods:
        raise InputError("wanted at least one method to fuse, got none")
    if by not in get_args(Merge):
        raise InputError(f"by is one of {', '.join(get_args(Merge))}, got {by!r}")

    def fused(trace: Trace, score: Score) -> Maps:
        size = tuple(trace.images.shape[2:])
        traces = trace.net.traces(trace.images, layers) if layers else [trace]
        found = [unit(upsample(positive(method(one, score)), size)) for one in traces for method in methods]
        maps = torch.stack(found)
        merged: Tensor = maps.mean(0) if by == "mean" else maps.prod(0) if by == "product" else maps.amax(0)
        return merged

    return _named(fused, "fuse", *methods)


def refine(layers: Sequence[str], method: "Method" = gradcampp) -> "Method":
    """RefineCAM: the product of a method's maps at several layers, from coarse to fine (Domeniconi et al. 2026).

    Domeniconi, Stramiglio, Lombardi, Salti: How to Evaluate and Refine your CAM. Deep layers say what belongs to the
    class, shallow ones where its edges are. All layers are looked at in one run. Equal to pytorch-grad-cam's.

    Args:
        layers: as in ``network.named_modules()``, of the network's stages say.
        method: by default Grad-CAM++, as in the paper.

    Raises:
        InputError: no layers; when it is used: no such layer.
    """
    if not layers:
        raise InputError("wanted the layers to refine over, got none")
    return _named(fuse(method, layers=layers, by="product"), "refine", method)


def eigen_smooth(method: "Method") -> "Method":
    """The first principal component of a method's weighted features, instead of their sum (as pytorch-grad-cam's).

    Not centred, and with the sign on which it and the sum agree most.

    Args:
        method: one that weighs features: "gradcam", "layercam", "scorecam", ...

    Raises:
        UnsupportedError: the method weighs no features.
    """
    if not isinstance(method, Weighted):
        name = getattr(method, "__name__", type(method).__name__)
        raise UnsupportedError(
            f"{name} weighs no features; eigen_smooth takes methods that do, gradcam or scorecam say"
        )

    def smoothed(trace: Trace, score: Score) -> Maps:
        weights, features = method.weights(trace, score), trace.features.detach()
        return signed_component(features * weights.reshape(*weights.shape, *[1] * (features.ndim - weights.ndim)))

    return _named(smoothed, "eigen_smooth", method)


def _named(method: "Method", name: str, *of: "Method") -> "Method":
    names = ", ".join(getattr(one, "__name__", type(one).__name__) for one in of)
    method.__name__ = f"{name}({names})"
    return method
