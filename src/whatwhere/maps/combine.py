"""Over methods: each takes methods and gives one, ``(trace, score) -> maps``."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from whatwhere.classifiers.classifier import Trace
from whatwhere.errors import InputError, UnsupportedError
from whatwhere.maps.components import signed_component
from whatwhere.maps.gradcampp import gradcampp
from whatwhere.maps.shape import positive, unit, upsample
from whatwhere.maps.weighted import Weighted
from whatwhere.types import Images, Maps, Score, Size

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
    looks = looks_at(method, flip=flip, scales=scales)
    return _named(lambda trace, score: mean_of(looks(trace, score)), "augment", method)


def looks_at(
    method: "Method", *, flip: bool = False, scales: Sequence[float] = (1.0,)
) -> Callable[[Trace, Score], list[Tensor]]:
    """A method's maps of the images mirrored and resized, each brought back to where it belongs: of each scale one.

    Takes and raises what ``augment`` does; with ``flip`` two of each scale.
    """
    if not scales or min(scales) <= 0:
        raise InputError(f"scales are positive, at least one, got {scales}")

    def looks(trace: Trace, score: Score) -> list[Tensor]:
        size = trace.images.shape[2:]
        found: list[Tensor] = []
        for scale in scales:
            images = trace.images
            if scale != 1:
                scaled = tuple(max(1, round(side * scale)) for side in size)
                images = upsample(images.flatten(0, 1), scaled).reshape(*images.shape[:2], *scaled)
            for mirrored in (False, True) if flip else (False,):
                seen = trace if scale == 1 and not mirrored else _look(trace, images.flip(-1) if mirrored else images)
                maps = method(seen, score)
                found.append(maps.flip(-1) if mirrored else maps)
        return found

    return looks


def mean_of(looks: Sequence[Tensor]) -> Maps:
    """The mean of maps, on the finest of their grids."""
    finest = max((tuple(maps.shape[1:]) for maps in looks), key=math.prod)
    return torch.stack([upsample(maps, finest) for maps in looks]).mean(0)


def _look(trace: Trace, images: Images) -> Trace:
    try:
        return trace.net.trace(images)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # somebody else's code, or made for one size
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


def zoom(
    first: "Method",
    then: "Method",
    *,
    above: float = 0.5,
    margin: float = 1.3,
    scale: float = 2.0,
    weight: float = 1 / 3,
) -> "Method":
    """A method's map of the whole, and where that found something another's of a second, larger look.

    The window has the image's shape, holds all above a share of the first map's maximum with a margin, and is moved
    into the image. Inside it the map is ``(1 - weight) * first + weight * then``, with ``then`` times the first map's
    maximum; outside ``(1 - weight) * first``.

    Args:
        first: of the whole image.
        then: of what is in the window; maps from 0 to 1.
        above: share of the first map's maximum.
        margin: the window's size, as a multiple of the least that holds what is above.
        scale: the second look's size, as a multiple of the image's; other than 1 only for networks that take images
            of any size.
        weight: of the second look.

    Returns:
        Maps on the grid of the images' pixels, without what speaks against the score.

    Raises:
        InputError: numbers that are not 0 <= above < 1, margin >= 1, scale > 0 and 0 <= weight <= 1.
        UnsupportedError: when it is used: the images are volumes, or the network takes none of another size.
    """
    if not (0 <= above < 1 and margin >= 1 and scale > 0 and 0 <= weight <= 1):
        raise InputError(
            "wanted 0 <= above < 1, margin >= 1, scale > 0 and 0 <= weight <= 1, got "
            f"{above}, {margin}, {scale} and {weight}"
        )

    def zoomed(trace: Trace, score: Score) -> Maps:
        h, w = _plane_of(trace)
        maps = upsample(positive(first(trace, score)), (h, w))
        windows = [_window(one > above * one.max(), margin) for one in maps]
        size = max(1, round(scale * h)), max(1, round(scale * w))
        shown = [upsample(image[:, *part], size) for image, part in zip(trace.images, windows, strict=True)]
        again = then(_look(trace, torch.stack(shown)), score)
        merged = (1 - weight) * maps
        for one, whole, part, close in zip(merged, maps, windows, again, strict=True):
            rows, columns = part
            seen = upsample(close[None], (rows.stop - rows.start, columns.stop - columns.start))[0]
            one[part] += weight * whole.max() * seen
        return merged

    return _named(zoomed, "zoom", first, then)


def _plane_of(trace: Trace) -> Size:
    """(h, w) of the images."""
    if trace.images.ndim != 4:
        raise UnsupportedError(f"a second look is at images (b d h w), got {tuple(trace.images.shape)}")
    h, w = trace.images.shape[2:]
    return h, w


def _window(there: Bool[Tensor, "h w"], margin: float) -> tuple[slice, slice]:
    """The rows and columns of a window of the image's shape, all of it where there is nothing."""
    h, w = there.shape
    sides = [there.any(axis).nonzero().flatten().tolist() or [0, side - 1] for axis, side in ((1, h), (0, w))]
    extents = [(found[0], found[-1] + 1) for found in sides]
    share = min(1.0, margin * max((stop - start) / side for (start, stop), side in zip(extents, (h, w), strict=True)))
    parts = []
    for (start, stop), side in zip(extents, (h, w), strict=True):
        length = max(1, round(share * side))
        begin = min(max(0, round((start + stop - length) / 2)), side - length)
        parts.append(slice(begin, begin + length))
    return parts[0], parts[1]


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
