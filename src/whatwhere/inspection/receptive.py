"""Which pixels a cell of a grid sees: its receptive field, of any network.

A value into which something goes that is no number is no number itself: so where the first pixels of a row are none,
the cells that see one of them show it, and a search over how many there are finds the edge of what a cell sees. That
is exact, and needs no knowledge of the layers: the same as, layer for layer, ``r += (kernel - 1) * step``
and ``step *= stride`` (Araujo et al., Computing Receptive Fields of Convolutional Neural Networks, Distill 2019).
Where padding depends on the size of the image, as TensorFlow's does, it is that of sizes which every step divides.
"""

import math
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whatwhere.classifiers.backbones import Reached, stop
from whatwhere.classifiers.classifier import undisturbed
from whatwhere.classifiers.layouts import NoGridError, as_grid, first_tensor, normalized_widths
from whatwhere.errors import UnsupportedError
from whatwhere.geometry import Box
from whatwhere.types import Images, Size

NARROW, LONG, LONGEST = (32, 96), 256, 2048
"""Pixels of the images that are looked at: across, of which some networks need more, and along; a cell that sees more
than the longest is taken to see everything."""


@dataclass(frozen=True)
class ReceptiveField:
    """What the cells of a grid see, in pixels of the network's input.

    A cell sees the pixels from ``start + stride * cell`` on, ``size`` of them; near a border, some of them are
    padding. Where each cell sees everything, the size is infinite.

    Attributes:
        size: (h, w).
        stride: (h, w), from one cell to the next.
        start: (h, w), of the first cell: negative where there is padding.
    """

    size: tuple[float, float]
    stride: Size
    start: tuple[float, float]

    def window(self, row: int, column: int) -> Box:
        """What a cell sees; its edges may lie outside of the image."""
        (y0, y1), (x0, x1) = (
            (s + t * i, s + t * i + r if math.isfinite(r) else r)
            for r, t, s, i in zip(self.size, self.stride, self.start, (row, column), strict=True)
        )
        return Box(x0, y0, x1, y1)

    def centre(self, row: int, column: int) -> tuple[float, float]:
        """(x, y) of the middle of what a cell sees; of the cell's own pixels, where each sees everything."""
        y, x = (
            t * (i + 0.5) if math.isinf(r) else s + t * i + r / 2
            for r, t, s, i in zip(self.size, self.stride, self.start, (row, column), strict=True)
        )
        return x, y


def receptive_field(network: nn.Module, layer: str, channels: int = 3) -> ReceptiveField:
    """What the cells of a layer's grid see, in theory: every pixel that can change them.

    Gates that weigh whole channels by what is seen anywhere (squeeze and excitation) are left out, since through them
    each cell would see everything.

    Args:
        network: images (b d h w) -> anything, of any size. It is copied, and stays as it is.
        layer: as in ``named_modules()``.
        channels: d.

    Raises:
        UnsupportedError: the layer gives no grid, its cells do not look at windows at even steps, or the network
            takes images of one size only.
    """
    if sees := getattr(network.get_submodule(layer), "sees", None):  # it counts with libraries that no number passes
        return ReceptiveField(*sees)
    copied = deepcopy(network).to("cpu", torch.float32)
    for narrow in NARROW:
        try:
            return _field(Layer(copied, layer, channels, narrow))
        except UnsupportedError as error:
            refused = error
    raise refused


def _field(layer: "Layer") -> ReceptiveField:
    with ExitStack() as hooks:
        for gate in _gates(layer):
            hooks.enter_context(gate.register_forward_hook(lambda module, given, output: given[0]))
        (h, y, top), (w, x, left) = (_along(layer, axis) for axis in (0, 1))
    return ReceptiveField((h, w), (y, x), (top, left))


def effective_field(network: nn.Module, layer: str, images: Images, share: float = 0.9) -> ReceptiveField:
    """What the cells of a layer's grid see in practice: far less than what they could.

    After Luo, Li, Urtasun, Zemel: Understanding the Effective Receptive Field in Deep Convolutional Neural Networks,
    NeurIPS 2016: the gradient of the middle cell in the pixels, its channels added up with random signs, falls off
    from the centre. The field is as high and wide as the middle rows, and columns, that hold a share of its square;
    centre and stride are those of ``receptive_field``, or where there is none, those of even cells.

    Args:
        network: images (b d h w) -> anything.
        layer: as in ``named_modules()``.
        images: (b d h w), real ones, since the gradient depends on what is seen; it is averaged over them.
        share: of the gradient's energy.

    Raises:
        UnsupportedError: the layer gives no grid, no gradient reaches the pixels, or the network does not take the
            images.
    """
    with torch.inference_mode(False), torch.enable_grad():
        copied = deepcopy(network).cpu().float().requires_grad_(False)
        pixels = images.detach().cpu().float().clone().requires_grad_()
        grid = Layer(copied, layer, images.shape[1]).grid(pixels)
        row, column = (side // 2 for side in grid.shape[2:])
        signs = torch.randn(grid.shape[:2], generator=torch.Generator().manual_seed(0)).sign()
        if not grid.requires_grad:
            raise UnsupportedError(f"layer {layer!r} counts pixels with a library that no gradient passes")
        (gradient,) = torch.autograd.grad((signs * grid[:, :, row, column]).sum(), pixels)
    try:
        field = receptive_field(network, layer, images.shape[1])
    except UnsupportedError:
        y, x = (round(side / cells) for side, cells in zip(images.shape[2:], grid.shape[2:], strict=True))
        field = ReceptiveField((math.inf, math.inf), (y, x), (-math.inf, -math.inf))
    energy = gradient.square().sum(1)
    energy = (energy / energy.sum((1, 2), keepdim=True).clamp(min=1e-30)).mean(0)
    centre = field.centre(row, column)[::-1]
    h, w = (2 * _half(energy.sum(1 - axis), middle, share) for axis, middle in enumerate(centre))
    start = centre[0] - h / 2 - field.stride[0] * row, centre[1] - w / 2 - field.stride[1] * column
    return ReceptiveField((h, w), field.stride, start)


def _half(energy: Float[Tensor, "n"], middle: float, share: float) -> float:
    """Half of the length around the middle that holds a share of the energy."""
    distance = (torch.arange(len(energy)) + 0.5 - middle).abs()
    order = distance.argsort()
    enough = int((energy[order].cumsum(0) < share * energy.sum()).sum())
    return float(distance[order[min(enough, len(order) - 1)]]) + 0.5


@dataclass(frozen=True)
class Layer:
    """A layer of a network, as a function from images to a grid."""

    network: nn.Module
    name: str
    channels: int
    narrow: int = NARROW[0]

    def blind(self, axis: int, extent: int, spans: list[tuple[int, int]]) -> list[list[bool]]:
        """For each span of pixels along an axis that are no numbers, the cells along it that show it."""
        shape = (extent, self.narrow) if axis == 0 else (self.narrow, extent)
        images = torch.zeros(len(spans), self.channels, *shape)
        for image, (start, end) in zip(images, spans, strict=True):
            image.narrow(axis + 1, start, end - start).fill_(math.nan)
        with torch.no_grad():
            grid = self.grid(images)
        cells: list[list[bool]] = grid.isnan().any(1).any(2 - axis).tolist()
        return cells

    def grid(self, images: Tensor) -> Tensor:
        """What the layer gives (b c y x); what comes after it does not run."""
        with (
            undisturbed(self.network),
            self.network.get_submodule(self.name).register_forward_hook(stop),
        ):
            try:
                self.network(images)
            except Reached as reached:
                try:
                    size = tuple(images.shape[2:])
                    return as_grid(first_tensor(reached.output), size, normalized_widths(self.network))[0]
                except NoGridError as error:
                    raise UnsupportedError(f"layer {self.name!r} gives no grid of features: {error}") from None
            except Exception as error:  # somebody else's code
                raise UnsupportedError(
                    f"{type(self.network).__name__} takes no images of {tuple(images.shape[2:])} pixels, so what "
                    f"its cells see cannot be found: {str(error)[:200]}"
                ) from error
        raise UnsupportedError(f"{type(self.network).__name__}: layer {self.name!r} did not run")


def _along(layer: Layer, axis: int) -> tuple[float, int, float]:
    """Size, stride and start along an axis."""
    extent = LONG
    while True:
        first, last = layer.blind(axis, extent, [(0, 1), (extent - 1, extent)])
        middle = (len(first) - 1) // 2
        inside = len(first) > 1 and not any(cells[cell] for cells in (first, last) for cell in (middle, middle + 1))
        if inside or extent >= LONGEST:
            break
        extent *= 2
    if not inside:
        return math.inf, round(extent / len(first)), -math.inf
    # a span of this length is seen by so many cells: between theirs and the next one's edges it is cut finer
    step, span = -(-extent // len(first)), extent // 2
    left, right = layer.blind(axis, extent, [(0, span), (extent - span, extent)])
    seeing, from_right = len(left) - 1 - left[::-1].index(True), right.index(True)
    low, high = [span - 2 * step] * 3, [span, span + 2 * step, span]
    low[1] = span - 1
    while any(b - a > 1 for a, b in zip(low, high, strict=True)):
        one, other, back = ((a + b) // 2 for a, b in zip(low, high, strict=True))
        found = layer.blind(axis, extent, [(0, one), (0, other), (extent - back, extent)])
        for which, (cell, tried) in enumerate(
            ((seeing, one), (min(seeing + 1, len(left) - 1), other), (from_right, back))
        ):
            if found[which][cell]:
                high[which] = tried
            else:
                low[which] = tried
    start, following, end = high[0] - 1, high[1] - 1, extent - high[2] + 1
    stride = following - start
    size, begin = end - start - (from_right - seeing) * stride, start - seeing * stride
    windows = [(begin + stride * cell, begin + stride * cell + size, cell) for cell in range(len(first))]
    within = [window for window in windows if window[0] >= 0 and window[1] <= extent]
    elsewhere = [(0, extent // 4), (0, 3 * extent // 4), (extent // 3, extent), (extent // 3, extent // 3 + 1)]
    for (a, b), cells in zip(elsewhere, layer.blind(axis, extent, elsewhere), strict=True):
        if size < 1 or stride < 1 or any((lo < b and hi > a) != cells[cell] for lo, hi, cell in within):
            raise UnsupportedError(
                f"the cells of layer {layer.name!r} do not look at windows of one size at even steps, so that no one "
                "size and step can be given"
            )
    return float(size), stride, float(begin)


def _gates(layer: Layer) -> list[nn.Module]:
    """Modules that do nothing but multiply a grid by what they make of its mean."""
    parents = {child: module for module in layer.network.modules() for child in module.children()}
    pooled, spatial = set[nn.Module](), set[nn.Module]()
    kept: list[nn.Module] = []

    def note(module: nn.Module, given: Any, output: Any) -> None:
        if not given or not isinstance(given[0], Tensor) or not isinstance(output, Tensor) or given[0].ndim != 4:
            return
        if isinstance(module, nn.Conv2d):
            (pooled if given[0].shape[2:].numel() == 1 else spatial).add(parents[module])
        elif module in pooled - spatial and output.shape == given[0].shape and output.shape[2:].numel() > 1:
            kept.append(module)

    with ExitStack() as hooks, torch.no_grad():
        for module in layer.network.modules():
            hooks.enter_context(module.register_forward_hook(note))
        layer.grid(torch.zeros(1, layer.channels, 2 * layer.narrow, 4 * layer.narrow))
    return kept
