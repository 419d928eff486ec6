"""The same seam without gradients: the network and its class maps as one graph that another engine runs.

    images (b d h w) -> [graph "look"]   -> features (b c y x), logits (b k), class maps (b k y x)
                     -> [graph "logits"] -> logits (b k)

Both are cut from one export and made when first needed. Where the linear law holds, "look" takes its logits from the
class maps, mean + bias, so that the last layer's product is done once.
"""

import copy
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any, get_args

import torch
from torch import Tensor, nn

from whatwhere.classifiers.classifier import (
    Backend,
    Classifier,
    Linear,
    Trace,
    logits_of,
    undisturbed,
)
from whatwhere.classifiers.engines import Run, on_inductor, on_onnxruntime, on_openvino, part_of, plain_mode, quiet
from whatwhere.classifiers.hooked import HookedClassifier
from whatwhere.classifiers.layouts import as_grid, normalized_widths
from whatwhere.classifiers.split import SplitClassifier
from whatwhere.errors import InputError, MissingExtraError, UnsupportedError, WhatWhereError
from whatwhere.files import aside
from whatwhere.types import ClassMaps, Features, Images, Score, Variants

DTYPES: dict[Backend, tuple[torch.dtype, ...]] = {
    "onnxruntime": (torch.float32,),
    "openvino": (torch.float32, torch.bfloat16, torch.float16),
    "inductor": (torch.float32, torch.bfloat16),
}
"""What each backend computes in."""

_PACKAGES = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
_ONNX_LIMIT = 2**31 - 1
"""Bytes of one protocol buffer."""


@dataclass(frozen=True, eq=False, kw_only=True)
class CompiledTrace(Trace):
    """What a compiled network saw. Its features carry no gradient; its logits are a leaf.

    Attributes:
        maps: (b k y x), every class's, or None where the linear law does not hold.
    """

    maps: ClassMaps | None

    def gradient(self, score: Score) -> Features:
        """None here.

        Raises:
            UnsupportedError: always; says what to use.
        """
        raise _gradientless(self.net)

    def gradient_and_curvature(self, score: Score) -> tuple[Features, Features]:
        """None here.

        Raises:
            UnsupportedError: always; says what to use.
        """
        raise _gradientless(self.net)


class CompiledClassifier(Classifier):
    """A classifier whose forward, class maps included, runs in another engine. ``Classifier.compiled`` makes it.

    It is a snapshot: what happens to the network it was compiled from no longer changes it, but for ``Trace.tail``,
    which runs that one.

    Attributes:
        network: runs the graph that gives the logits alone; it has no parameters.
        eager: the classifier that was compiled.
        backend: the engine.
        dtype: what was asked for. OpenVINO computes in float32 on processors without it.
    """

    network: "Graphs"

    def __init__(
        self,
        eager: Classifier,
        backend: Backend = "onnxruntime",
        dtype: torch.dtype = torch.float32,
        kept: Path | None = None,
    ) -> None:
        _check_choice(eager, backend, dtype)
        self.eager, self.backend, self.dtype = eager, backend, dtype
        self._device = eager.device
        self._others: dict[str, CompiledClassifier] = {}
        images = noise_of(eager)
        trace = eager.trace(images)
        linear = eager.linear(trace.features.shape[1])
        self._linear = linear and Linear(linear.weight.clone(), linear.bias.clone())
        self._lawless_because: str | None = None
        try:
            eager.checked_linear(trace)
        except UnsupportedError as error:
            self._lawless_because, linear = str(error), None
        graphs = Graphs(eager, linear, backend, dtype, images, trace, kept)
        super().__init__(graphs, eager.labels, eager.preprocess, eager.name, eager.activation)
        self.thresholds, self.trusts = dict(eager.thresholds), dict(eager.trusts)

    @property
    def device(self) -> torch.device:
        """Where the graph takes its images."""
        return self._device

    @property
    def inner(self) -> nn.Module:
        """None here.

        Raises:
            UnsupportedError: always; says what to use.
        """
        raise _gradientless(self)

    def at(self, layer: str) -> "CompiledClassifier":
        """The classifier it was compiled from, split after another layer and compiled in the same way, once a layer.

        Raises:
            InputError: there is no such layer; names the three nearest.
            UnsupportedError: its output is no grid of features.
        """
        if layer not in self._others:
            self._others[layer] = self.eager.at(layer).compiled(self.backend, self.dtype)
        return self._others[layer]

    def compiled(  # noqa: D102
        self, backend: Backend = "onnxruntime", dtype: torch.dtype = torch.float32, *, kept: Path | None = None
    ) -> "CompiledClassifier":
        return self.eager.compiled(backend, dtype, kept=kept)

    def trace(self, images: Images) -> CompiledTrace:
        """Look at a batch once: features, logits and class maps come out of one graph.

        Args:
            images: (b d h w), preprocessed, of the size in ``preprocess``; any batch.

        Raises:
            InputError: not such a batch of images, or nan or infinite values among them (names which image).
        """
        images = self._checked(images)
        with torch.inference_mode(False):
            features, logits, *maps = self.network.look(images)
            leaf, eps = logits.requires_grad_(), torch.finfo(self.network.computed).eps
            return CompiledTrace(self, images, features, leaf, eps, maps=maps[0] if maps else None)

    def linear(self, channels: int) -> Linear | None:
        """The last layer as it was compiled, if it takes so many channels."""
        return self._linear if self._linear and self._linear.weight.shape[1] == channels else None

    def class_maps(self, trace: Trace) -> ClassMaps:
        """Plain CAM of every class at once (Zhou et al. 2016, eq. 2), as the graph gave it: (b k y x).

        Raises:
            UnsupportedError: the logits are not linear in the pooled features.
        """
        if not isinstance(trace, CompiledTrace):
            return super().class_maps(trace)
        if trace.maps is None:
            raise UnsupportedError(self._lawless_because)
        return trace.maps

    def checked_linear(self, trace: Trace) -> Linear:
        """The last linear layer; the law was measured when it was compiled, and the graph's logits come from it.

        Raises:
            UnsupportedError: the logits are not linear in the pooled features.
        """
        if not isinstance(trace, CompiledTrace):
            return super().checked_linear(trace)
        if self._linear is None or self._lawless_because is not None:
            raise UnsupportedError(self._lawless_because)
        return self._linear

    def _split_run(self, images: Images) -> tuple[Tensor, Tensor, torch.dtype]:
        features, logits, *_ = self.network.look(images)
        return features, logits.requires_grad_(), self.network.computed

    def _tail(self, image: Images, variants: Variants) -> Tensor:
        with undisturbed(self.eager.network):
            return self.eager._tail(self.eager._in_own_dtype(image), variants)

    def _checked(self, images: Images) -> Images:
        images = super()._checked(images)
        wanted = (len(self.preprocess.mean), *self.preprocess.size)
        if images.shape[1:] != wanted:
            raise InputError(
                f"{self.name} is compiled for images (b, {', '.join(map(str, wanted))}), got {tuple(images.shape)}; "
                "compile a classifier whose preprocess has that size"
            )
        if images.device != self._device:
            raise InputError(f"{self.name} is compiled for {self._device}, got images on {images.device}")
        return images


class Graphs(nn.Module):
    """The exported network and the graphs cut from it, each made and compared with eager when first needed."""

    def __init__(
        self,
        eager: Classifier,
        linear: Linear | None,
        backend: Backend,
        dtype: torch.dtype,
        images: Images,
        trace: Trace,
        kept: Path | None = None,
    ) -> None:
        """Exports the network, unless its graph was kept.

        Args:
            eager: the classifier.
            linear: its last layer where the linear law holds, for the class maps.
            backend: the engine.
            dtype: what it computes in.
            images: a sample.
            trace: what eager sees in it.
            kept: a file for the graph that looks.

        Raises:
            UnsupportedError: it cannot be exported.
        """
        super().__init__()
        self.name, self.backend, self.dtype = eager.name, backend, dtype
        self.computed = dtype
        """What the engine really computes in, once a graph is made."""
        self._images, self._eps = images.float(), trace.eps
        maps = [] if linear is None else [eager.class_maps(trace), trace.logits]
        self._expected = [one.detach().clone() for one in (trace.features, trace.logits, *maps)]
        self._shapes = [tuple(one.shape[1:]) for one in self._expected]
        self._threads = torch.get_num_threads()
        self._lock = RLock()
        self._runs: dict[str, Run] = {}
        self._kept = None if backend == "inductor" else kept
        self._export: Callable[[], Any] = lambda: self._exported(eager, linear)
        self._program = None if self._kept is not None and self._kept.is_file() else self._export()
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """The logits alone: (b k)."""
        (logits,) = self._run("logits")(images.float())
        return logits

    def look(self, images: Tensor) -> list[Tensor]:
        """Features, logits and, where the linear law holds, class maps."""
        return self._run("look")(images.float())

    def _run(self, kind: str) -> Run:
        if kind not in self._runs:
            with self._lock, plain_mode():
                if kind not in self._runs:
                    self._runs[kind] = self._made(kind)
        return self._runs[kind]

    def _exported(self, eager: Classifier, linear: Linear | None) -> Any:
        """The snapshot: an ONNX model in memory, or torch's own exported program."""
        dtype = self.dtype if self.backend == "inductor" else torch.float32
        with self._named_failure(), plain_mode(), quiet():
            with undisturbed(eager.network):
                network = copy.deepcopy(eager.network)
            look = Look(eager, network.requires_grad_(False), linear, self._images, dtype).to(dtype)
            size = sum(tensor.nbytes for tensor in (*look.parameters(), *look.buffers()))
            if self.backend != "inductor" and size > _ONNX_LIMIT:
                raise UnsupportedError(
                    f"{self.name} is {size / 2**30:.1f} GB in float32, and an ONNX model ends at 2 GB; "
                    "compile it with inductor"
                )
            batch = ({0: torch.export.Dim("b")},)
            program = torch.export.export(look, (self._images,), dynamic_shapes=batch, strict=False)
            if self.backend == "inductor":
                return program
            exported = torch.onnx.export(program, dynamo=True, verbose=False)
            assert exported is not None
            return exported.model

    def _made(self, kind: str) -> Run:
        last = len(self._shapes) - 1
        wanted = [last] if kind == "logits" else list(range(max(last, 2)))
        shapes = [self._shapes[i] for i in wanted]
        with self._named_failure(), quiet():
            if self.backend == "inductor":
                run = on_inductor(self._program, wanted)
            else:
                run = self._of_kept(kind, shapes) or self._on_engine(self._onnx(kind, wanted), shapes)
            outputs = run(self._images)
        for number, output in zip(wanted, outputs, strict=True):
            self._compare(number, output)
        if {*self._runs, kind} == {"look", "logits"}:
            self._program, self._export = None, lambda: None
        return run

    def _on_engine(self, model: bytes, shapes: list[tuple[int, ...]]) -> Run:
        if self.backend == "onnxruntime":
            return on_onnxruntime(model, shapes, self._threads)
        run, self.computed = on_openvino(model, shapes, self._threads, self.dtype)
        return run

    def _of_kept(self, kind: str, shapes: list[tuple[int, ...]]) -> Run | None:
        """The graph that was kept, if there is one that the engine takes."""
        if kind != "look" or self._kept is None or not self._kept.is_file():
            return None
        try:
            return self._on_engine(self._kept.read_bytes(), shapes)
        except Exception:  # a damaged file; engines raise whatever comes to hand
            return None

    def _onnx(self, kind: str, wanted: list[int]) -> bytes:
        if self._program is None:
            self._program = self._export()
        model = part_of(self._program, wanted)
        if kind == "look" and self._kept is not None:
            with suppress(OSError), aside(self._kept) as place:  # it only saves time
                place.write_bytes(model)
        return model

    def _compare(self, number: int, output: Tensor) -> None:
        """Exporters err; what they made is believed once it has said what the network says."""
        name, expected = ("features", "logits", "maps", "logits")[number], self._expected[number]
        error = float((output - expected).abs().amax())
        scale = float(expected.abs().amax().clamp(min=1 if name == "logits" else 0))
        eps = max(self._eps, torch.finfo(self.computed).eps)
        if not error <= scale * max(1e-3, 32 * eps):
            hint = "" if self.computed == torch.float32 else "; use dtype=torch.float32"
            raise UnsupportedError(
                f"{self.name} compiled for {self.backend} in {_dtype_name(self.computed)} gives other {name}: they "
                f"differ by {error:.3g} where they are up to {scale:.3g}{hint}"
            )

    @contextmanager
    def _named_failure(self) -> Iterator[None]:
        try:
            yield
        except WhatWhereError:
            raise
        except Exception as error:  # exporters and engines raise whatever comes to hand
            lines = str(error).strip().splitlines() or [""]
            raise UnsupportedError(
                f"{self.name} cannot be compiled for {self.backend}: {type(error).__name__}: {lines[0]}"
            ) from error


class Look(nn.Module):
    """What is exported: images -> features, logits from the class maps, class maps, logits; or features, logits."""

    weight: Tensor
    bias: Tensor

    def __init__(
        self, net: Classifier, network: nn.Module, linear: Linear | None, images: Images, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.network, self.dtype, self.has_maps = network, dtype, linear is not None
        if isinstance(net, HookedClassifier):
            self.layer: str | None = net.layer
        elif isinstance(net, SplitClassifier):
            self.layer = None
        else:
            raise UnsupportedError(f"{net.name}: a {type(net).__name__} cannot be compiled")
        self.size = (images.shape[-2], images.shape[-1])
        self.widths = normalized_widths(network)
        self.is_identity = False
        if linear is not None:
            self.register_buffer("weight", linear.weight[:, :, None, None].clone())
            self.register_buffer("bias", linear.bias.clone())
            k, c = linear.weight.shape
            self.is_identity = k == c and torch.equal(linear.weight, torch.eye(k).to(linear.weight))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The outputs."""
        features, logits = self._both(images.to(self.dtype))
        if not self.has_maps:
            return features.float(), logits.float()
        maps = features.clone() if self.is_identity else nn.functional.conv2d(features, self.weight)
        pooled = maps.mean((2, 3)) + self.bias
        return features.float(), pooled.float(), maps.float(), logits.float()

    def _both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.layer is None:
            features: Tensor = self.network.forward_features(images)  # type: ignore[operator]
            noted = features.clone()  # the head may begin with an operation in place
            return noted, self.network.forward_head(features)  # type: ignore[operator]
        grids: list[Tensor] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            found = output if isinstance(output, Tensor) else output[0]
            as_is = found.ndim == 4 and not self.widths  # whatever the size, which may be left open
            grids.append((found if as_is else as_grid(found, self.size, self.widths)[0]).clone())

        with self.network.get_submodule(self.layer).register_forward_hook(note):
            logits = logits_of(self.network(images))
        return grids[0], logits


def _gradientless(net: Classifier) -> UnsupportedError:
    return UnsupportedError(
        f"this method needs gradients in the network, or what passes inside it, and the compiled {net.name} has "
        "neither; use cam, eigencam or scorecam, or trace with `.eager`, the classifier it was compiled from"
    )


def _check_choice(eager: Classifier, backend: Backend, dtype: torch.dtype) -> None:
    if backend not in get_args(Backend):
        raise InputError(f"backend is one of {', '.join(get_args(Backend))}, got {backend!r}")
    if dtype not in DTYPES[backend]:
        others = [name for name, dtypes in DTYPES.items() if dtype in dtypes]
        hint = f"use {' or '.join(others)} for that" if others else "no backend computes in that"
        known = ", ".join(map(_dtype_name, DTYPES[backend]))
        raise UnsupportedError(f"{backend} computes in {known}, got {_dtype_name(dtype)}; {hint}")
    missing = [name for name in _PACKAGES.get(backend, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"{backend} needs {', '.join(missing)}; run: pip install 'whatwhere[export]'")
    if backend != "inductor" and eager.device.type != "cpu":
        raise UnsupportedError(
            f"{backend} runs on the CPU here, and {eager.name} is on {eager.device}; move the network to the CPU or "
            "use inductor"
        )


def noise_of(eager: Classifier) -> Images:
    """Two images of noise, of everyday and of large contrast."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, len(eager.preprocess.mean), *eager.preprocess.size, generator=generator)
    return (noise * torch.tensor([1.0, 3.0])[:, None, None, None]).to(eager.device)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
