"""Batch normalization folded into the layers that feed it: the same network with fewer layers, to run it."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from copy import copy, deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from whatwhere.classifiers.backbones import probe
from whatwhere.classifiers.classifier import Classifier
from whatwhere.errors import UnsupportedError
from whatwhere.types import Images

TOLERANCES = (torch.float64, 1e-9), (torch.float32, 1e-5)
"""What counts as the same, relative to the largest output. Double precision tells a wrong fold from rounding; single
is for networks that do not run in it."""
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FEEDING = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)

Pair = tuple[str, str]
"""A layer and the normalization that it feeds, as in ``named_modules()``."""


class Folded(NamedTuple):
    """What ``fold_batchnorm`` makes."""

    network: nn.Module
    """In evaluation mode; in the place of a folded layer is what it did besides normalizing, or nothing."""
    folded: list[str]
    """The normalizations that are gone, as in ``named_modules()``."""
    left: list[str]
    """Those that stay: no convolution feeds them, or its output or its weights are used elsewhere too."""


@torch.inference_mode(False)
@torch.no_grad()
def fold_batchnorm(network: nn.Module, image: Images) -> Folded:
    """A copy of a network, its batch normalizations folded into the convolutions and linear layers that feed them.

    In evaluation mode ``g (W x + b - mean) / s + beta`` with ``s = sqrt(var + eps)`` is a layer with the weights
    ``g W / s`` and the bias ``g (b - mean) / s + beta`` (Jacob et al., Quantization and Training of Neural Networks
    for Efficient Integer-Arithmetic-Only Inference, CVPR 2018, eq. 14). Whatever keeps running statistics and is
    given the very tensor that a layer made is tried, and each fold proven: one that changes the outputs for the
    image, or for a larger one of another shape where the network takes such, is undone. The result is for running:
    its state dict has other keys.

    Args:
        network: in any mode; it is copied, and stays as it is.
        image: (b d *hw) as the network takes it, not constant.

    Raises:
        UnsupportedError: the network does not run on the image.
    """
    copied, given, tolerance = _running(network, image)
    pairs, expected = _pairs(copied, given)
    looked = [(given, expected)]
    larger = probe(given.shape[1], tuple(side + 32 * n for n, side in enumerate(given.shape[2:], 1)), given)
    with suppress(Exception):  # somebody else's code, which may take images of one size
        looked.append((larger, _tensors(copied(larger))))

    def unchanged() -> bool:
        try:
            return all(_same(_tensors(copied(images)), known, tolerance) for images, known in looked)
        except Exception:  # somebody else's code, which asks a normalization for what it no longer has
            return False

    proven = _proven(copied, pairs, unchanged)
    del copied
    result = deepcopy(network).eval()
    norms = [name for name, module in result.named_modules() if name and _keeps_statistics(module)]
    for pair in proven:
        _fold(result, pair)
    gone = {norm for _, norm in proven}
    return Folded(result, [name for name in norms if name in gone], [name for name in norms if name not in gone])


def folded(net: Classifier) -> Classifier:
    """The same classifier on a network whose batch normalizations are folded: for running, in less time.

    It is the classifier itself where there is nothing to fold, and where what it sees would be another thing, as when
    it is split behind a convolution that a normalization follows.

    Args:
        net: stays as it is.
    """
    image = probe(len(net.preprocess.mean), net.preprocess.size, next(net.network.parameters(), None))
    try:
        found = fold_batchnorm(net.network, image)
    except UnsupportedError:
        return net
    if not found.folded:
        return net
    made = copy(net)
    made.network = found.network
    with torch.no_grad():
        own, other = net.trace(image), made.trace(image)
    is_same = _same([other.features, other.logits], [own.features, own.logits], 10 * TOLERANCES[-1][1])
    return made if is_same else net


def _running(network: nn.Module, image: Images) -> tuple[nn.Module, Images, float]:
    """A copy in evaluation mode and an image in a precision that it runs in; how near to the same is the same."""
    for dtype, tolerance in TOLERANCES:
        try:
            copied, given = deepcopy(network).eval().to(dtype), image.to(dtype)
            copied(given)
            return copied, given, tolerance
        except Exception as error:  # somebody else's code
            refused = error
    raise UnsupportedError(
        f"{type(network).__name__} does not run on images {tuple(image.shape)}: {str(refused)[:200]}"
    ) from refused


def _pairs(network: nn.Module, image: Images) -> tuple[list[Pair], list[Tensor]]:
    """What may be folded, as far as modules can tell; and the network's outputs."""
    names = {module: name for name, module in network.named_modules() if name}
    owners = Counter(id(one) for module in network.modules() for one in module._parameters.values())
    ran, fed = Counter[nn.Module](), list[tuple[nn.Module, nn.Module]]()
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # with the tensor, which keeps its id from being given again

    def note(module: nn.Module, given: Any, output: Any) -> None:
        ran[module] += 1
        if isinstance(module, _FEEDING) and isinstance(output, Tensor):
            made[id(output)] = module, output
        elif _keeps_statistics(module) and given and id(given[0]) in made:
            fed.append((made[id(given[0])][0], module))

    with ExitStack() as hooks:
        for module in names:
            hooks.enter_context(module.register_forward_hook(note))
        outputs = _tensors(network(image))
    feeds = Counter(layer for layer, _ in fed)

    def fit(layer: Any, norm: Any) -> bool:
        weight, transposed = layer._parameters.get("weight"), isinstance(layer, _TRANSPOSED)
        return (
            weight is not None
            and ran[layer] == ran[norm] == feeds[layer] == 1
            and all(owners[id(one)] == 1 for one in layer._parameters.values() if one is not None)
            and len(norm.running_mean) == (weight.shape[1] if transposed else len(weight))
            and not (transposed and layer.groups > 1)
        )

    return [(names[layer], names[norm]) for layer, norm in fed if fit(layer, norm)], outputs


def _keeps_statistics(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), Tensor) for name in ("running_mean", "running_var"))


def _proven(network: nn.Module, pairs: Sequence[Pair], unchanged: Callable[[], bool]) -> list[Pair]:
    """The pairs that can be folded, and then are: all, or by halves those that leave the outputs as they are."""
    undo = [_fold(network, pair) for pair in pairs]
    if not pairs or unchanged():
        return list(pairs)
    for back in reversed(undo):
        back()
    if len(pairs) == 1:
        return []
    half = len(pairs) // 2
    return _proven(network, pairs[:half], unchanged) + _proven(network, pairs[half:], unchanged)


def _fold(network: nn.Module, pair: Pair) -> Callable[[], None]:
    """Fold a pair, in place; gives the way back."""
    layer, norm = (network.get_submodule(name) for name in pair)
    weight: Any = layer.weight
    bias: Any = layer.bias

    def wide(tensor: Any) -> Any:
        """In more precision than what comes out."""
        return None if tensor is None else tensor.to("cpu", torch.float64)

    folded = fuse_conv_bn_weights(
        wide(weight),
        wide(bias),
        wide(norm.running_mean),
        wide(norm.running_var),
        norm.eps,  # type: ignore[arg-type]
        wide(norm.weight),
        wide(norm.bias),
        isinstance(layer, _TRANSPOSED),
    )
    layer.weight, layer.bias = (nn.Parameter(one.to(weight), weight.requires_grad) for one in folded)
    # what a normalization does afterwards are its children: timm's drop and activate
    rest = [child for child in norm.children() if not isinstance(child, nn.Identity)]
    network.set_submodule(pair[1], (nn.Sequential(*rest) if rest else nn.Identity()).eval())

    def back() -> None:
        layer.weight, layer.bias = weight, bias
        network.set_submodule(pair[1], norm)

    return back


def _tensors(output: Any) -> list[Tensor]:
    """All tensors in what a network returns."""
    if isinstance(output, Tensor):
        return [output]
    inner = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return [tensor for one in inner for tensor in _tensors(one)]


def _same(found: list[Tensor], known: list[Tensor], tolerance: float) -> bool:
    return len(found) == len(known) and all(
        one.shape == other.shape and bool(((one - other).abs() <= tolerance * other.abs().amax()).all())
        for one, other in zip(found, known, strict=True)
    )
