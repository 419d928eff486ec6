"""The same seam over a network that does not split by itself: one forward hook that lives for one call.

The hook cuts the features off, hands the network a copy of the leaf, and turns gradients on for what
comes after.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from whatwhere.classifiers.classifier import (
    Activation,
    Classifier,
    Trace,
    leaf_of,
    logits_of,
    modules_of,
    undisturbed,
    widened,
)
from whatwhere.classifiers.dfl import DflNet
from whatwhere.classifiers.labels import Labels
from whatwhere.classifiers.layouts import NoGridError, as_grid, first_tensor, normalized_widths, with_tensor
from whatwhere.errors import InputError, UnsupportedError, nearest
from whatwhere.images import Preprocess
from whatwhere.types import Extent, Images, Variants


class HookedClassifier(Classifier):
    """Splits any module after a layer named as in ``named_modules()``."""

    def __init__(
        self,
        network: nn.Module,
        labels: Labels,
        preprocess: Preprocess,
        name: str,
        activation: Activation = "softmax",
        *,
        layer: str,
    ) -> None:
        super().__init__(network, labels, preprocess, name, activation)
        layers = dict(network.named_modules())
        if layer not in layers or not layer:
            raise InputError(f"{name} has no layer {layer!r}; nearest: {nearest(layer, layers)}")
        self.layer = layer

    def at(self, layer: str) -> "HookedClassifier":  # noqa: D102
        return HookedClassifier(self.network, self.labels, self.preprocess, self.name, self.activation, layer=layer)

    def traces(self, images: Images, layers: Sequence[str]) -> list[Trace]:  # noqa: D102
        if not layers:
            return super().traces(images, layers)
        nets = [self.at(layer) for layer in layers]
        with self._looking_at(images) as images:
            cuts, logits = self._run(images, layers)
            return [net._traced(images, cut.features, logits, cut.dtype) for net, cut in zip(nets, cuts, strict=True)]

    def _split_run(self, images: Images) -> tuple[Tensor, Tensor, torch.dtype]:
        (cut,), logits = self._run(images, [self.layer])
        return cut.features, logits, cut.dtype

    def _run(self, images: Images, layers: Sequence[str]) -> "tuple[list[Cut], Tensor]":
        size = tuple(images.shape[2:])
        for grad in (False, True):
            # Without gradients first. A network that runs its backbone under no_grad itself switches them off
            # again behind our hook; it is run once more with gradients on from the start.
            with cut_at(self.network, layers, size, grad=grad) as cuts:
                try:
                    logits = logits_of(self.network(images))
                except NoGridError as error:
                    raise UnsupportedError(f"{self.name}: {error}") from None
            for layer in layers:
                if len(cuts[layer]) != 1:
                    raise UnsupportedError(
                        f"{self.name}: layer {layer!r} ran {len(cuts[layer])} times in one forward; pass one that "
                        "runs once"
                    )
            idle = [layer for layer in layers if not reaches(logits, cuts[layer][0].features)]
            if not idle:
                return [cuts[layer][0] for layer in layers], logits
        raise UnsupportedError(
            f"{self.name}: the logits do not depend on the features at {idle[0]!r}, or cannot be traced back to "
            "them; pass a layer that the network uses, and see that neither its forward nor its parameters were "
            "made under inference_mode"
        )

    def _tail(self, image: Images, variants: Variants) -> Tensor:
        size = tuple(image.shape[2:])
        wanted = (len(variants), len(self.labels))
        with replaced(self.network, self.layer, size, variants):
            try:  # one image up to the layer, so many from there on
                logits = logits_of(self.network(image))
                if logits.shape == wanted:
                    return logits
            except torch.OutOfMemoryError:
                raise
            except Exception:  # somebody else's code, which has counted its images before the layer
                if len(variants) == 1:
                    raise
            return logits_of(self.network(image.expand(len(variants), *image.shape[1:])))


class Cut(NamedTuple):
    """What a layer gave, as features, and the dtype in which it did."""

    features: Tensor
    dtype: torch.dtype


@contextmanager
def cut_at(network: nn.Module, layers: Sequence[str], size: Extent, *, grad: bool) -> Iterator[dict[str, list[Cut]]]:
    """For a while, the first of the layers to run hands on a copy of a fresh leaf, where gradients begin.

    The others hand on copies of what they give, through which those gradients run.

    Args:
        network: it has the layers.
        layers: as in ``named_modules()``.
        size: (h, w) or (z, h, w) of the network's input.
        grad: whether gradients are on before the first layer too.

    Yields:
        What each layer gave, once for each time that it ran.

    Raises:
        NoGridError: a layer's output is no grid.
    """
    cuts: dict[str, list[Cut]] = {layer: [] for layer in layers}
    widths, again = normalized_widths(network), looks_again(network)

    def cutting(layer: str) -> Callable[..., Any]:
        def cut(module: nn.Module, args: Any, output: Any) -> Any:
            if again and cuts[layer]:
                return output
            found, grid, back = _grid_in(output, size, widths, layer, detached=not any(cuts.values()))
            features = widened(grid) if found.requires_grad else leaf_of(grid)
            cuts[layer].append(Cut(features, found.dtype))
            torch.set_grad_enabled(True)
            # a copy, because the next layer may work in place
            return with_tensor(output, back(features.to(found.dtype, copy=True)))

        return cut

    with ExitStack() as hooks:
        # The hooks turn gradients on; leaving this context puts the caller's mode back.
        hooks.enter_context(torch.set_grad_enabled(grad))
        for layer in cuts:
            hooks.enter_context(network.get_submodule(layer).register_forward_hook(cutting(layer)))
        yield cuts


@contextmanager
def replaced(network: nn.Module, layer: str, size: Extent, features: Variants) -> Iterator[None]:
    """For a while, a layer hands on these features, of any number of images, instead of its own."""
    widths, again = normalized_widths(network), looks_again(network)
    waiting = [True]  # for the first look of a forward

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        if again and not waiting:
            return output
        waiting.clear()
        found, _, back = _grid_in(output, size, widths, layer)
        return with_tensor(output, back(features.to(found.dtype, copy=True)))

    with ExitStack() as hooks:
        hooks.enter_context(network.register_forward_pre_hook(lambda module, args: waiting.append(True)))
        hooks.enter_context(network.get_submodule(layer).register_forward_hook(replace))
        yield


def looks_again(network: nn.Module) -> bool:
    """Whether a network looks at an image at several scales, of which the first is where it is split."""
    return isinstance(network, DflNet) and len(network.scales) > 1


def _grid_in(
    output: Any, size: Extent, widths: frozenset[int], layer: str, *, detached: bool = False
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """The tensor in what a layer gave, as a grid, and the way back."""
    try:
        found = first_tensor(output)
        found = found.detach() if detached else found
        return found, *as_grid(found, size, widths)
    except NoGridError as error:
        raise NoGridError(f"layer {layer!r} gives no grid of features: {error}") from None


def find_layer(network: nn.Module, image: Tensor) -> str:
    """The layer to split after: the last that still gives a grid on which the logits depend.

    Networks with convolutions are split at their last grid. Where a class token takes everything from the
    last block, the patches after it have no say; then it is the block before.

    Args:
        network: gives logits (b k).
        image: (1 d h w) or (1 d z h w), anything that is not constant.

    Raises:
        UnsupportedError: no layer will do; says what to pass.
    """
    size = tuple(image.shape[2:])
    seen: list[tuple[str, nn.Module, Any]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.append((name, module, output))

    with ExitStack() as hooks, undisturbed(network), torch.no_grad():
        for name, module in network.named_modules():
            if name:
                hooks.enter_context(module.register_forward_hook(note(name)))
        network(image)

    names, widths = [name for name, _, _ in seen], normalized_widths(network)
    candidates = [
        (name, first_tensor(output))
        for name, module, output in seen
        if names.count(name) == 1 and not isinstance(module, _PASSING) and _is_grid(output, size, widths)
    ]
    if not candidates:
        raise UnsupportedError(
            f"{type(network).__name__}: no layer gives a grid of features; pass layer=..., one of: "
            f"{', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
        )
    (last, _), *earlier = reversed(candidates)
    if _patches_matter(network, last, image):
        return last
    for name, output in earlier:
        # A block of a transformer has grids inside it too; what it gives as a whole is meant.
        if (output.ndim > 3 or _is_block(network, name)) and _patches_matter(network, name, image):
            return name
    raise UnsupportedError(
        f"{type(network).__name__}: found no layer whose grid the logits depend on; pass layer=..., one of: "
        f"{', '.join(name for name, _ in candidates[-20:])}"
    )


_POOLS = tuple(getattr(nn, f"Adaptive{kind}Pool{n}d") for kind in ("Avg", "Max") for n in (1, 2, 3))
_PASSING = (*_POOLS, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten)
"""Layers that hand on or merely pool what the layer before them found."""


def _is_grid(output: Any, size: Extent, widths: frozenset[int]) -> bool:
    try:
        grid, _ = as_grid(first_tensor(output), size, widths)
    except NoGridError:
        return False
    return grid[0, 0].numel() > 1


def _is_block(network: nn.Module, name: str) -> bool:
    """Whether a layer is one of several of its kind in a list: a block of a transformer."""
    parent = network.get_submodule(name.rpartition(".")[0])
    kind = type(network.get_submodule(name))
    return isinstance(parent, nn.ModuleList | nn.Sequential) and sum(type(m) is kind for m in parent) > 1


def _patches_matter(network: nn.Module, layer: str, image: Tensor) -> bool:
    """Whether the logits hang on the grid behind ``layer``, and what the last linear layer is given changes with it.

    Asked of what it is given, since its own weights may be zero in a new network.
    """
    linear = next((module for module in modules_of(network) if isinstance(module, nn.Linear)), None)
    given: list[Tensor] = []
    size = tuple(image.shape[2:])
    for grad in (False, True):
        with ExitStack() as hooks, undisturbed(network), cut_at(network, [layer], size, grad=grad) as cuts:
            if linear is not None:
                hooks.enter_context(linear.register_forward_pre_hook(lambda module, args: given.append(args[0])))
            logits = logits_of(network(image))
        if len(cuts[layer]) == 1 and reaches(logits, leaf := cuts[layer][0].features):
            return _changes(given[-1] if given and reaches(given[-1], leaf) else logits, leaf)
    return False


def _changes(values: Tensor, leaf: Tensor) -> bool:
    # random weights, because the sum of a normalized layer is constant
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(0)).to(values)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad((values * weights).sum(), leaf)
    return bool(gradient.any())


def reaches(values: Tensor, features: Tensor) -> bool:
    """Whether a gradient of the values would arrive at the features."""
    waiting, known = [values.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in known:
            continue
        if node is features.grad_fn or getattr(node, "variable", None) is features:
            return True
        known.add(node)
        waiting.extend(before for before, _ in node.next_functions)
    return False
