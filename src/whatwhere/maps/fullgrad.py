"""FullGrad: the gradient at the input and at every bias, brought together at the input's resolution."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from whatwhere.classifiers.classifier import Classifier, Trace, logits_of, undisturbed, widened
from whatwhere.errors import UnsupportedError
from whatwhere.maps.seen import Batch, parts, per_batch
from whatwhere.maps.shape import upsample
from whatwhere.types import Extent, Features, Images, Logits, Maps, Score

AUTO_PIXELS = 4 * 224 * 224
"""Of the network's input, that go through it and back at once where ``batch`` is "auto"; at least one image."""

Take = Callable[[Tensor], None]
"""Is given ``dS / dz b`` of one use of a bias: (b c), or (b c ...) where it has cells."""


def fullgrad(trace: Trace, score: Score, *, batch: Batch = "auto") -> Maps:
    """FullGrad: the gradient at the input and at every bias, at the input's resolution (Srinivas & Fleuret 2019).

    Srinivas, Fleuret: Full-Gradient Representation for Neural Network Visualization, NeurIPS 2019. A network of
    convolutions, linear layers, batch norms, ReLUs and max pooling is
    ``S(x) = <dS / dx, x> + sum_l <dS / dz_l, b_l>``, with ``z_l`` what bias ``b_l`` was added to; a batch norm's is
    ``beta - mean gamma / sqrt(var + eps)``. The map is
    ``sum_d psi(dS / dx_d x_d) + sum_l sum_c psi(dS / dz_lc b_lc)``, where ``psi`` takes the absolute value, scales it
    to [0, 1] and resizes it bilinearly to the input. It is not negative; the score's scale and sign cancel.

    As in the authors' code, the scale is each layer's smallest and largest value in an image, over all its channels
    (pytorch-grad-cam: each channel's own, so that the weakest channel counts as much as the strongest), and layers
    without rows and columns are left out, here those of a single cell too. Unlike there, nothing is added to the
    denominator (1e-6 would weigh layers by the scale of their gradients; constant layers are 0), and cells are areas
    as everywhere here (``align_corners=False``). Biases that depend on the image (of ReLU6, SiLU, layer norms) are
    not counted.

    It looks at the images again, with the gradient through the whole network.

    Args:
        trace: what the network saw; its ``net`` and ``images`` are used.
        score: what is explained.
        batch: images that go through the network at once, which bounds the memory; "auto" for as many as have
            4 x 224 x 224 pixels.

    Returns:
        (b *hw): one value a pixel of the network's input, not negative.

    Raises:
        InputError: ``batch`` is less than 1.
        UnsupportedError: no gradient arrives at the images.
    """
    images = trace.images
    at_once = per_batch(images[0, 0].numel(), AUTO_PIXELS, batch)
    direction = trace.class_gradient(score)
    of = [slice(part.start, part.stop) for part in parts(len(images), at_once)]
    return torch.cat([_maps(trace.net, images[part], direction[part]) for part in of])


def _maps(net: Classifier, images: Images, direction: Logits) -> Maps:
    by_size: dict[Extent, Maps] = {}  # resizing is linear: what has the same size is summed before

    def take(products: Tensor) -> None:
        if products.ndim != images.ndim or len(products) != len(images) or products[0, 0].numel() == 1:
            return
        size = tuple(products.shape[2:])
        maps = _rescaled(products)
        by_size[size] = by_size[size] + maps if size in by_size else maps

    take(widened(full_gradient(net, images, direction, take) * images))
    whole = tuple(images.shape[2:])
    return torch.stack([upsample(maps, whole) for maps in by_size.values()]).sum(0).clamp(min=0)


def _rescaled(products: Features) -> Maps:
    """Absolute values scaled to [0, 1] in each image, then summed over channels."""
    strength = products.abs()
    low, high = strength.flatten(1).amin(1), strength.flatten(1).amax(1)
    span = high - low
    varies = span > 8 * torch.finfo(span.dtype).eps * high
    factor = torch.where(varies, 1 / torch.where(varies, span, 1), 0)
    ranged = (strength.sum(1).flatten(1) - strength.shape[1] * low[:, None]) * factor[:, None]
    return ranged.reshape(len(strength), *strength.shape[2:])


def full_gradient(net: Classifier, images: Images, direction: Logits, take: Take) -> Images:
    """The full gradient of ``S = sum(direction * logits)``: that in the images is returned, that in the biases taken.

    Args:
        net: the classifier; its network is run once, in evaluation mode.
        images: (b d *hw)
        direction: (b k), d score / d logits.
        take: called for every use of a bias while the gradient passes it, so that none is kept.

    Raises:
        UnsupportedError: no gradient arrives at the images.
    """
    network = net.inner
    with undisturbed(network), torch.inference_mode(False), torch.enable_grad():
        leaf = images.detach().requires_grad_()
        # A copy, because the first layer may work in place. Channels last is what convolutions on a CPU work in:
        # they need not turn every gradient and activation there and back.
        last = leaf.device.type == "cpu" and leaf.ndim == 4
        layout = torch.channels_last if last else torch.preserve_format
        with _Biases(take):
            logits = widened(logits_of(network(leaf.clone(memory_format=layout))))
        gradient = None
        if logits.requires_grad:
            (gradient,) = torch.autograd.grad(logits, leaf, direction, allow_unused=True)
    if gradient is None:
        raise UnsupportedError(
            f"{net.name}: fullgrad needs a gradient that arrives at the images, and none does; see that the forward "
            "does not detach them, or use gradcam or layercam, which need it at the features only"
        )
    return gradient


class _Biases(TorchFunctionMode):
    """While it is on, every bias that is added will be taken together with its gradient.

    It stands where the functions are called and not at the modules, since a module may do more than its name says:
    timm's batch norms have the activation in them. The gradient is asked for before any later operation in place.
    """

    def __init__(self, take: Take) -> None:
        super().__init__()
        self.take = take

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled:  # a network that runs its backbone under no_grad itself
            return None
        try:
            output = func(*args, **kwargs)
        except RuntimeError:
            if func not in {Tensor.view, Tensor.view_as}:
                raise
            output = func(args[0].contiguous(), *args[1:], **kwargs)  # channels last cannot always be viewed
        if func in _BIASES and output.requires_grad:
            with torch.no_grad():
                bias = _BIASES[func](*args, **kwargs)
            if bias is not None:
                output.register_hook(partial(self._passed, bias, func is functional.linear))
        return output

    def _passed(self, bias: Tensor, last: bool, gradient: Tensor) -> None:
        """A gradient arrives at what the bias was added to."""
        gradient = gradient.movedim(-1, 1) if last else gradient
        self.take(gradient * bias.reshape(-1, *[1] * (gradient.ndim - 2)))


def _own(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor | None:
    return None if bias is None else widened(bias.detach())


def _batch_norms(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if training or running_mean is None or running_var is None:
        return _own(input, input, bias)
    shift = -widened(running_mean) / (widened(running_var) + eps).sqrt()
    shift = shift if weight is None else shift * widened(weight)
    return shift if bias is None else shift + widened(bias)


_BIASES: dict[Any, Callable[..., Tensor | None]] = {
    functional.batch_norm: _batch_norms,
    functional.linear: _own,
    functional.conv1d: _own,
    functional.conv2d: _own,
    functional.conv3d: _own,
    functional.conv_transpose1d: _own,
    functional.conv_transpose2d: _own,
    functional.conv_transpose3d: _own,
}
"""Function -> the bias that it adds, of the same arguments."""
