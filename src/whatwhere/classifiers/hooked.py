"""The same seam over a network that does not split by itself: one forward hook that lives for one call.

The hook cuts the features off, hands the network a copy of the leaf, and turns gradients on for what
comes after.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from whatwhere.classifiers.classifier import Activation, Classifier, leaf_of, logits_of, modules_of, undisturbed
from whatwhere.classifiers.labels import Labels
from whatwhere.classifiers.layouts import NoGridError, as_grid, first_tensor, normalized_widths, with_tensor
from whatwhere.errors import InputError, UnsupportedError, nearest
from whatwhere.images import Preprocess
from whatwhere.types import Images, Size


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

    def _split_run(self, images: Images) -> tuple[Tensor, Tensor, torch.dtype]:
        for grad in (False, True):
            # Without gradients first. A network that runs its backbone under no_grad itself switches them off
            # again behind our hook; it is run once more with gradients on from the start.
            leaf, logits, dtype = self._run(images, grad=grad)
            if reaches(logits, leaf):
                return leaf, logits, dtype
        raise UnsupportedError(
            f"{self.name}: the logits do not depend on the features at {self.layer!r}, or cannot be traced back to "
            "them; pass a layer that the network uses, and see that neither its forward nor its parameters were "
            "made under inference_mode"
        )

    def _run(self, images: Images, *, grad: bool) -> tuple[Tensor, Tensor, torch.dtype]:
        size = (images.shape[-2], images.shape[-1])
        try:
            with cut_at(self.network, self.layer, size, grad=grad) as leaves:
                logits = logits_of(self.network(images))
        except NoGridError as error:
            raise UnsupportedError(f"{self.name}: layer {self.layer!r} gives no grid of features: {error}") from None
        if len(leaves) != 1:
            raise UnsupportedError(
                f"{self.name}: layer {self.layer!r} ran {len(leaves)} times in one forward; pass one that runs once"
            )
        leaf, dtype = leaves[0]
        return leaf, logits, dtype


@contextmanager
def cut_at(network: nn.Module, layer: str, size: Size, *, grad: bool) -> Iterator[list[tuple[Tensor, torch.dtype]]]:
    """For a while, ``layer`` hands on a copy of a fresh leaf; gradients begin there. Notes leaf and own dtype.

    Args:
        network: it has the layer.
        layer: as in ``named_modules()``.
        size: (h, w) of the network's input.
        grad: whether gradients are on before the layer too.

    Raises:
        NoGridError: the layer's output is no grid.
    """
    leaves: list[tuple[Tensor, torch.dtype]] = []

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        found = first_tensor(output)
        grid, back = as_grid(found, size, normalized_widths(network))
        leaf = leaf_of(grid)
        leaves.append((leaf, found.dtype))
        torch.set_grad_enabled(True)
        # a copy, because the next layer may work in place
        return with_tensor(output, back(leaf.to(found.dtype, copy=True)))

    # The hook turns gradients on; leaving this context puts the caller's mode back.
    with torch.set_grad_enabled(grad), network.get_submodule(layer).register_forward_hook(cut):
        yield leaves


def find_layer(network: nn.Module, image: Tensor) -> str:
    """The layer to split after: the last that still gives a grid on which the logits depend.

    Networks with convolutions are split at their last grid. Where a class token takes everything from the
    last block, the patches after it have no say; then it is the block before.

    Args:
        network: gives logits (b k).
        image: (1 c h w), anything that is not constant.

    Raises:
        UnsupportedError: no layer will do; says what to pass.
    """
    size = (image.shape[-2], image.shape[-1])
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
        if (output.ndim == 4 or _is_block(network, name)) and _patches_matter(network, name, image):
            return name
    raise UnsupportedError(
        f"{type(network).__name__}: found no layer whose grid the logits depend on; pass layer=..., one of: "
        f"{', '.join(name for name, _ in candidates[-20:])}"
    )


_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_PASSING = (*_POOLS, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten)
"""Layers that hand on or merely pool what the layer before them found."""


def _is_grid(output: Any, size: Size, widths: frozenset[int]) -> bool:
    try:
        grid, _ = as_grid(first_tensor(output), size, widths)
    except NoGridError:
        return False
    return grid.shape[2] * grid.shape[3] > 1


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
    size = (image.shape[-2], image.shape[-1])
    for grad in (False, True):
        with ExitStack() as hooks, undisturbed(network), cut_at(network, layer, size, grad=grad) as leaves:
            if linear is not None:
                hooks.enter_context(linear.register_forward_pre_hook(lambda module, args: given.append(args[0])))
            logits = logits_of(network(image))
        if len(leaves) == 1 and reaches(logits, leaves[0][0]):
            values = given[-1] if given and reaches(given[-1], leaves[0][0]) else logits
            return _changes(values, leaves[0][0])
    return False


def _changes(values: Tensor, leaf: Tensor) -> bool:
    # random weights, because the sum of a normalized layer is constant
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(0)).to(values)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad((values * weights).sum(), leaf)
    return bool(gradient.any())


def reaches(values: Tensor, leaf: Tensor) -> bool:
    """Whether a gradient of the values would arrive at the leaf."""
    waiting, known = [values.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in known:
            continue
        if getattr(node, "variable", None) is leaf:
            return True
        known.add(node)
        waiting.extend(before for before, _ in node.next_functions)
    return False
