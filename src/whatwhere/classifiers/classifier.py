"""The seam: a network split in two, what finds and what decides.

    images (b c h w) -> [backbone] -> features (b c y x) -> [head] -> logits (b k)

``trace`` runs both once. Its features are a fresh leaf, so a gradient of any score reaches the features
and stops there: it never runs through the backbone, and no parameter gets a ``.grad``. ``traces`` splits at several
layers in one run; ``Trace.tail`` runs the head alone, on other features.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whatwhere.classifiers.distilled import DistilledHead
from whatwhere.classifiers.labels import Labels
from whatwhere.errors import InputError, UnsupportedError, not_one_an_image
from whatwhere.images import Preprocess
from whatwhere.types import ClassMaps, Features, Images, Logits, Score, Variants

if TYPE_CHECKING:
    import whatwhere.classifiers.compiled

Activation = Literal["softmax", "sigmoid"]
Backend = Literal["onnxruntime", "openvino", "inductor"]
"""What runs a compiled network."""


class Linear(NamedTuple):
    """The last linear layer: logits = weight @ mean(features) + bias, where the linear law holds."""

    weight: Tensor
    """(k c)"""
    bias: Tensor
    """(k)"""


@dataclass(frozen=True, eq=False)
class Trace:
    """A batch that the network has looked at once; any number of methods and scores read it.

    Attributes:
        net: the classifier that looked.
        images: (b d h w) or volumes (b d z h w), what it looked at.
        features: (b c y x) or (b c z y x), float32, or float64 where the network computes in it; a leaf, but for the
            deeper ones of several layers, which the shallowest one's gradient runs through.
        logits: (b k), of the same dtype, differentiable in the features of the layers looked at, and no further back.
        eps: relative precision that the network computed them in.
        asked: logits that methods have had of other versions of the images, for the next score.
        beside: what the layers gave that a distilled head reads (b c y x), in the same look; empty without one.
    """

    net: "Classifier"
    images: Images
    features: Features
    logits: Logits
    eps: float
    asked: dict[Hashable, Tensor] = field(default_factory=dict, repr=False)
    beside: tuple[Tensor, ...] = field(default=(), repr=False)

    def gradient(self, score: Score) -> Features:
        """D score / d features: how much each activation speaks for what is explained.

        Raises:
            InputError: the score does not give one differentiable number for each image.
        """
        return self._gradient(score, self.features)

    def gradient_and_curvature(self, score: Score) -> tuple[Features, Features]:
        """The gradient, and the Hessian of the score in the features times the features.

        Raises:
            InputError: the score does not give one differentiable number for each image.
        """
        with torch.inference_mode(False), torch.enable_grad():
            value = self._value(score)
            (gradient,) = torch.autograd.grad(value.sum(), self.features, create_graph=True)
            if not gradient.requires_grad:  # the head is linear
                return gradient, torch.zeros_like(gradient)
            (curved,) = torch.autograd.grad(
                gradient, self.features, self.features.detach(), retain_graph=True, materialize_grads=True
            )
        return gradient.detach(), curved

    def tail(self, variants: Variants, image: int) -> Float[Tensor, "n k"]:
        """What the network would say of an image if its features were others; without gradients.

        Args:
            variants: (n c *yx), in place of the image's own features.
            image: which of the batch; what a hooked network does beside its layer is done for this one.

        Returns:
            (n k): only what comes after the split runs n times.

        Raises:
            InputError: features of another shape, or no such image.
        """
        b, *shape = self.features.shape
        if not 0 <= image < b or list(variants.shape[1:]) != shape:
            raise InputError(
                f"wanted features (n, {', '.join(map(str, shape))}) for an image in 0..{b - 1}, got "
                f"{tuple(variants.shape)} for image {image}"
            )
        with undisturbed(self.net.network), torch.no_grad():
            return widened(self.net._tail(self.images[image : image + 1], variants))

    def class_gradient(self, score: Score) -> Logits:
        """D score / d logits: how much each class speaks for what is explained."""
        return self._gradient(score, self.logits)

    def _gradient(self, score: Score, of: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad(), full_precision(of):
            (gradient,) = torch.autograd.grad(self._value(score).sum(), of, retain_graph=True)
        return gradient

    def _value(self, score: Score) -> Tensor:
        value = score(self.logits)
        if value.shape != self.logits.shape[:1]:
            raise not_one_an_image(len(self.logits), tuple(value.shape))
        if not value.requires_grad:
            raise InputError("a score must be differentiable in the logits; this one is cut off from them")
        return value


class Classifier(ABC):
    """A network, where it is split, and what belongs to its weights.

    Attributes:
        network: the module; it is never changed, whatever mode it is in.
        labels: names of the classes.
        preprocess: photo -> input.
        name: what ``load`` would take, or the class of the module.
        activation: "softmax" for one class an image, "sigmoid" for any number of them.
        options: what ``build`` takes besides the name, of a network that has one.
        about: what else its run says of it: how it was trained, on what, and what was measured.
        thresholds: by the name of a map method, the share of a map's maximum that makes the best boxes, where that
            has been measured (``whatwhere calibrate``). They are of this layer.
        distilled: a head that says where things are for one look (``whatwhere distill``). It is of this layer.
        trusts: by the name of a map method, weights and bias of what its boxes are trusted (``regions.trust``), where
            that has been measured.
    """

    def __init__(
        self,
        network: nn.Module,
        labels: Labels,
        preprocess: Preprocess,
        name: str,
        activation: Activation = "softmax",
    ) -> None:
        self.network = network
        self.labels = labels
        self.preprocess = preprocess
        self.name = name
        self.activation: Activation = activation
        self.options: dict[str, Any] = {}
        self.about: dict[str, Any] = {}
        self.thresholds: dict[str, float] = {}
        self.distilled: DistilledHead | None = None
        self.trusts: dict[str, tuple[float, ...]] = {}
        if activation not in get_args(Activation):
            raise InputError(f"activation is one of {', '.join(get_args(Activation))}, got {activation!r}")

    @property
    def device(self) -> torch.device:
        """Where the network's parameters are."""
        return next((p.device for p in self.network.parameters()), torch.device("cpu"))

    @property
    def positional(self) -> bool:
        """Whether what decides has weights of its own for every cell, as a network says of itself."""
        return bool(getattr(self.network, "positional", False))

    @property
    def inner(self) -> nn.Module:
        """The network, for methods that look at more of it than the split gives.

        Raises:
            UnsupportedError: there is nothing to look at, in a compiled one; says what to use.
        """
        return self.network

    @abstractmethod
    def at(self, layer: str) -> "Classifier":
        """The same classifier split after another layer, named as in ``network.named_modules()``.

        Raises:
            InputError: there is no such layer; names the three nearest.
            UnsupportedError: when it is traced, its output is no grid of features.
        """

    def traces(self, images: Images, layers: Sequence[str]) -> list[Trace]:
        """Look at a batch once and split after several layers: one trace a layer, in their order.

        Raises:
            InputError: as ``trace``; no layers, or none of such a name.
            UnsupportedError: as ``trace``; the logits do not depend on one of the layers.
        """
        if not layers:
            raise InputError("wanted at least one layer, got none")
        return [self.at(layer).trace(images) for layer in layers]

    @abstractmethod
    def _split_run(self, images: Images) -> tuple[Tensor, Tensor, torch.dtype]:
        """Leaf features, differentiable logits, and what the features were computed in.

        The network is already in evaluation mode.
        """

    @abstractmethod
    def _tail(self, image: Images, variants: Variants) -> Tensor:
        """Logits (n k) of n variants of one image's features; mode and gradients are seen to."""

    def trace(self, images: Images) -> Trace:
        """Look at a batch once.

        Works inside ``no_grad``, ``inference_mode`` and ``autocast``, on modules in train mode, frozen or
        in half precision, and leaves the module exactly as it was.

        Args:
            images: (b d h w) or volumes (b d z h w), preprocessed, on the network's device.

        Raises:
            InputError: not a batch of images, or nan or infinite values among them (names which image).
            UnsupportedError: the network gives no features or logits that can be used.
        """
        with self._looking_at(images) as images, self._read_beside(images) as beside:
            trace = self._traced(images, *self._split_run(images))
        return replace(trace, beside=tuple(beside)) if beside else trace

    @contextmanager
    def _looking_at(self, images: Images) -> Iterator[Images]:
        """The images, checked and fit for gradients, while the network is in evaluation mode."""
        images = self._checked(images)
        with undisturbed(self.network), torch.inference_mode(False):
            yield images.clone() if images.is_inference() else images

    @contextmanager
    def _read_beside(self, images: Images) -> Iterator[list[Features]]:
        """What the layers give that the distilled head reads, filled in while the network runs."""
        from whatwhere.classifiers.layouts import as_grid, first_tensor, normalized_widths

        layers, kept, grids = self.distilled.layers if self.distilled else (), dict[str, Features](), list[Features]()

        def keeping(layer: str) -> Callable[..., None]:
            def keep(module: nn.Module, args: Any, output: Any) -> None:
                if layer not in kept:  # of the first look, where a network looks at several scales
                    grid, _ = as_grid(first_tensor(output), tuple(images.shape[2:]), normalized_widths(self.network))
                    kept[layer] = widened(grid.detach()).clone()  # the next layer may work in place

            return keep

        with ExitStack() as hooks:
            for layer in layers:
                hooks.enter_context(self.network.get_submodule(layer).register_forward_hook(keeping(layer)))
            yield grids
        grids += [kept[layer] for layer in layers]

    def _traced(self, images: Images, features: Tensor, logits: Tensor, computed: torch.dtype) -> Trace:
        if logits.shape != (len(images), len(self.labels)):
            raise UnsupportedError(
                f"{self.name}: wanted logits for {len(images)} images and {len(self.labels)} labels, "
                f"got shape {tuple(logits.shape)}"
            )
        eps = max(torch.finfo(dtype).eps for dtype in (computed, logits.dtype))
        with torch.enable_grad():
            return Trace(self, images, features, widened(logits), eps)

    def logits(self, images: Images) -> Logits:
        """The plain forward: (b k), without gradients."""
        images = self._checked(images)
        with undisturbed(self.network), torch.no_grad():
            return widened(logits_of(self.network(images)))

    def probabilities(self, logits: Logits) -> Logits:
        """Softmax over the classes, or a sigmoid for each; (b k) in [0, 1]."""
        return logits.sigmoid() if self.activation == "sigmoid" else logits.softmax(1)

    def linear(self, channels: int) -> Linear | None:
        """The last layer that turns so many channels into logits, if there is one.

        Features that have a channel a class already need none: theirs is the identity.
        """
        k = len(self.labels)
        for module in modules_of(self.network):
            weight = getattr(module, "weight", None)
            if not isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) or not isinstance(weight, Tensor):
                continue
            if weight.flatten(1).shape == (k, channels):
                bias = weight.new_zeros(k) if module.bias is None else module.bias
                return Linear(widened(weight.detach().flatten(1)), widened(bias.detach()))
        if k == channels:
            like = next(self.network.parameters(), torch.empty(0))
            return Linear(widened(torch.eye(k).to(like)), widened(torch.zeros(k).to(like)))
        return None

    def class_maps(self, trace: Trace) -> ClassMaps:
        """Plain CAM of every class at once (Zhou et al. 2016, eq. 2): one 1x1 contraction, (b k y x).

        Raises:
            UnsupportedError: the logits are not linear in the pooled features.
        """
        linear = self._linear_of(trace)
        b, c, *yx = trace.features.shape
        with full_precision(trace.features):
            # one product for the batch, without the channels that are 0 everywhere: behind a ReLU often half of them
            columns = trace.features.detach().transpose(0, 1).reshape(c, -1)
            live = columns.any(1).nonzero().flatten()
            if len(live) < 0.8 * c:
                columns, weight = columns.index_select(0, live), linear.weight.index_select(1, live)
            else:
                weight = linear.weight
            maps = (weight @ columns).reshape(-1, b, *yx).transpose(0, 1)
        self._check_law(trace, maps.flatten(2).mean(2) + linear.bias, linear.bias)
        return maps

    def checked_linear(self, trace: Trace) -> Linear:
        """The last linear layer, after measuring on this trace that the logits are linear in the pooled features.

        Raises:
            UnsupportedError: they are not; the message names the methods that need no such law.
        """
        linear = self._linear_of(trace)
        self._check_law(trace, _pooled_logits(linear, trace), linear.bias)
        return linear

    def _linear_of(self, trace: Trace) -> Linear:
        linear = self.linear(trace.features.shape[1])
        if linear is None:
            raise self._lawless(float("inf"))
        return linear

    def linear_law(self, images: Images) -> float:
        """The largest |mean(class map) + bias - logit| over images and classes: 0 where plain CAM is exact.

        Infinite where no linear layer takes the features' channels.
        """
        trace = self.trace(images)
        linear = self.linear(trace.features.shape[1])
        if linear is None:
            return float("inf")
        return float((_pooled_logits(linear, trace) - trace.logits.detach()).abs().amax())

    def compiled(
        self, backend: Backend = "onnxruntime", dtype: torch.dtype = torch.float32, *, kept: Path | None = None
    ) -> "whatwhere.classifiers.compiled.CompiledClassifier":
        """The same classifier without gradients, for speed: features, logits and class maps in one graph.

        A snapshot for images of ``preprocess.size`` in batches of any length, on as many threads as torch has now.
        For methods that need no gradient in the features: CAM, Eigen-CAM, KPCA-CAM, FEM, and those of many forwards.
        Exporting takes seconds; inductor compiles for minutes, when it first sees one image and when it sees several.

        Args:
            backend: "onnxruntime" or "openvino", on the CPU, from ``pip install 'whatwhere[export]'``; or "inductor",
                ``torch.compile``, which needs a C++ compiler, or a GPU.
            dtype: float32 for all, bfloat16 for openvino and inductor, float16 for openvino, which keeps to float32
                on a processor that has no such arithmetic.
            kept: a file for the graph of this very network, of ONNX backends: taken from there if it is there, and
                written there if not. What comes out of it is compared with the network's in any case.

        Raises:
            InputError: no such backend.
            MissingExtraError: its packages are not installed.
            UnsupportedError: the backend lacks the dtype or the device, the network cannot be exported, or what is
                made of it does not give the network's features, logits and class maps.
        """
        from whatwhere.classifiers.compiled import CompiledClassifier

        return CompiledClassifier(self, backend, dtype, kept)

    def _check_law(self, trace: Trace, predicted: Logits, bias: Tensor) -> None:
        logits = trace.logits.detach()
        error = float((predicted - logits).abs().amax())
        # what the features add to the bias must agree; what is left of large logits is rounding
        added = float(torch.stack([logits - bias, predicted - bias]).abs().amax())
        if not error <= added * max(1e-3, 8 * trace.eps) + 8 * trace.eps * float(logits.abs().amax()):
            raise self._lawless(error)

    def _lawless(self, error: float) -> UnsupportedError:
        return UnsupportedError(
            f"plain CAM needs logits that are linear in the mean of the features; on {self.name} "
            f"|mean(map) + bias - logit| is {error:.3g}. Use gradcam or layercam, which need no such law."
        )

    def _checked(self, images: Images) -> Images:
        if not isinstance(images, Tensor) or images.ndim not in {4, 5} or 0 in images.shape:
            came = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise InputError(
                f"wanted a batch of images as a tensor (b d h w), or of volumes as (b d z h w), got {came}"
            )
        if not images.sum().isfinite():
            bad = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
            if bad:
                raise InputError(f"nan or infinite values in image {', '.join(map(str, bad))} of the batch")
        return self._in_own_dtype(images)

    def _in_own_dtype(self, tensor: Tensor) -> Tensor:
        own = (p.dtype for p in self.network.parameters() if p.is_floating_point())
        return tensor.to(next(own, tensor.dtype))


_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()


@contextmanager
def undisturbed(network: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, for one thread at a time; every submodule gets its own mode back.

    Flags are set one by one, because a module's own ``train()`` may do more than that. The lock is there because
    modes and hooks belong to the module, whoever runs it.
    """
    with _locks.setdefault(network, RLock()):
        training = [module for module in modules_of(network) if module.training]
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True


def _pooled_logits(linear: Linear, trace: Trace) -> Logits:
    """What the logits would be by the linear law."""
    with full_precision(trace.features):
        return trace.features.detach().flatten(2).mean(2) @ linear.weight.T + linear.bias


def modules_of(network: nn.Module) -> Iterator[nn.Module]:
    """All modules, last ones first, shared ones as often as they are used; several times as fast as ``modules()``."""
    waiting = [network]
    while waiting:
        module = waiting.pop()
        yield module
        if module._modules:
            waiting.extend(child for child in module._modules.values() if child is not None)


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context in which autocast, if it is on, does not lower the precision of a map."""
    return torch.autocast(tensor.device.type, enabled=False)


def leaf_of(features: Tensor) -> Tensor:
    """The features cut off from what made them, at least float32, ready for a gradient."""
    return widened(features.detach()).requires_grad_()


def widened(tensor: Tensor) -> Tensor:
    """Half precision to float32; the others as they are."""
    return tensor.float() if tensor.dtype in {torch.float16, torch.bfloat16} else tensor


def logits_of(output: object) -> Tensor:
    """The logits in what a network returns: a tensor, or a tuple, dict or object that holds them.

    Raises:
        UnsupportedError: nothing in it is a (b k) tensor.
    """
    found = getattr(output, "logits", output)
    if isinstance(found, dict):
        found = found.get("logits", found)
    if isinstance(found, dict | tuple | list):
        values = found.values() if isinstance(found, dict) else found
        flat = [value for value in values if isinstance(value, Tensor) and value.ndim == 2]
        if len(flat) != 1:
            raise _no_logits(f"a {type(found).__name__} with {len(flat)} such tensors")
        found = flat[0]
    if not isinstance(found, Tensor):
        raise _no_logits(str(type(found)))
    found = found.flatten(1) if found.ndim > 2 and set(found.shape[2:]) == {1} else found
    if found.ndim != 2:
        raise _no_logits(f"shape {tuple(found.shape)}")
    return found


def _no_logits(came: str) -> UnsupportedError:
    return UnsupportedError(f"wanted logits (b k) from the network, got {came}; wrap it so that it gives them alone")
