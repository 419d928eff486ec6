"""A network layer by layer: what there is, what its cells see, its first kernels, what it makes of a picture."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whatwhere.classifiers.backbones import probe
from whatwhere.classifiers.classifier import Classifier, undisturbed
from whatwhere.classifiers.layouts import NoGridError, as_grid, first_tensor, normalized_widths
from whatwhere.errors import UnsupportedError
from whatwhere.inspection.formula import receptive_fields
from whatwhere.inspection.receptive import ReceptiveField
from whatwhere.types import Images, Size


@dataclass(frozen=True)
class Layer:
    """A layer that computes or pools.

    Attributes:
        name: as in ``named_modules()``.
        kind: of module.
        parameters: how many.
        grid: (y, x) of what it gives; None for what is no grid.
        field: what its cells see; None where that is not known.
    """

    name: str
    kind: str
    parameters: int
    grid: Size | None
    field: ReceptiveField | None


def layers(net: Classifier) -> list[Layer]:
    """All layers with parameters, and pools, in the order in which they run on an image of the classifier's size.

    Normalizations and activations, which change no cell's view, are left out.
    """
    image = _probe(net)
    outputs = _outputs(net.inner, image, [name for name, module in net.inner.named_modules() if _counts(module)])
    fields, found = receptive_fields(net.inner, image), []
    for name, output in outputs.items():
        module = net.inner.get_submodule(name)
        grid = (output.shape[2], output.shape[3]) if output.ndim == 4 else None
        many = sum(parameter.numel() for parameter in module.parameters())
        found.append(Layer(name, type(module).__name__, many, grid, fields.get(name)))
    return found


def first_kernels(net: Classifier) -> Float[Tensor, "n d h w"]:
    """The weights that meet the pixels: kernels of the first convolution, or templates of a linear layer.

    Raises:
        UnsupportedError: the network begins with neither.
    """
    image = _probe(net)
    kinds = {name: module for name, module in net.inner.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    first = next(iter(_outputs(net.inner, image, list(kinds))), None)
    weight = kinds[first].weight.detach().float().cpu() if first is not None else torch.empty(0)
    if weight.ndim == 2 and weight.shape[1] == image[0].numel():
        return weight.reshape(-1, *image.shape[1:])
    if weight.ndim == 4 and weight.shape[1] == image.shape[1]:
        return weight
    raise UnsupportedError(f"{net.name} begins with no convolution or linear layer of its pixels")


def activations(net: Classifier, images: Images, names: Sequence[str]) -> dict[str, Float[Tensor, "b c y x"]]:
    """What layers make of images.

    Args:
        net: the classifier.
        images: (b d h w), preprocessed.
        names: of layers, as in ``named_modules()``.

    Returns:
        By name, in the order in which they run.

    Raises:
        UnsupportedError: one of them gives no grid.
    """
    widths, found = normalized_widths(net.inner), {}
    for name, output in _outputs(net.inner, images, names).items():
        try:
            found[name] = as_grid(output, tuple(images.shape[2:]), widths)[0].float()
        except NoGridError as error:
            raise UnsupportedError(f"layer {name!r} gives no grid of features: {error}") from None
    return found


def _outputs(network: nn.Module, images: Images, names: Sequence[str]) -> dict[str, Tensor]:
    """What modules give, in the order in which they run."""
    found: dict[str, Tensor] = {}
    with ExitStack() as hooks, undisturbed(network), torch.no_grad():
        for name in names:

            def note(module: nn.Module, given: Any, output: Any, name: str = name) -> None:
                try:
                    found[name] = first_tensor(output).clone()  # the next layer may work in place
                except NoGridError:
                    found[name] = torch.empty(0)

            hooks.enter_context(network.get_submodule(name).register_forward_hook(note))
        network(images)
    return found


def _counts(module: nn.Module) -> bool:
    if any(True for _ in module.children()):
        return False
    kind = type(module).__name__
    quiet = "Norm" in kind or isinstance(module, nn.PReLU)
    return "Pool" in kind or (not quiet and any(True for _ in module.parameters(recurse=False)))


def _probe(net: Classifier) -> Images:
    like = next(net.inner.parameters(), None)
    return probe(len(net.preprocess.mean), net.preprocess.size, like)
