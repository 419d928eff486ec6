"""An exported ONNX file -> a Classifier again, split behind its class maps: what is run is the file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whatwhere.classifiers.classifier import Backend, Linear
from whatwhere.classifiers.compiled import CompiledClassifier
from whatwhere.classifiers.engines import on_onnx
from whatwhere.classifiers.hooked import HookedClassifier
from whatwhere.classifiers.labels import Labels
from whatwhere.classifiers.split import SplitClassifier
from whatwhere.errors import DataError, InputError, UnsupportedError, WhatWhereError, extra
from whatwhere.images import Preprocess, printable
from whatwhere.types import ClassMaps, Images, Logits

KEY = "whatwhere"
"""Under which an ONNX file's metadata, and a .pt2's extra files, hold what the sidecar holds."""


class OnnxClassifier(SplitClassifier):
    """A classifier whose network is a file. Its features are its class maps; no gradient goes further back."""

    def at(self, layer: str) -> HookedClassifier:
        """None here.

        Raises:
            UnsupportedError: always; says what to do.
        """
        raise UnsupportedError(f"{self.name} is split where it was exported; export it again with layer {layer!r}")

    def linear(self, channels: int) -> Linear | None:
        """What turns class maps into logits: the identity, and the bias of the layer that made them."""
        bias = self.network.bias
        return Linear(torch.eye(len(bias)), bias) if channels == len(bias) else None  # type: ignore[arg-type]

    def compiled(
        self, backend: Backend = "onnxruntime", dtype: torch.dtype = torch.float32, *, kept: Path | None = None
    ) -> CompiledClassifier:
        """None here.

        Raises:
            UnsupportedError: always; says what to do.
        """
        raise UnsupportedError(f"{self.name} is a file, which ONNX Runtime runs as it is; choose no other engine")

    @property
    def inner(self) -> nn.Module:
        """None here.

        Raises:
            UnsupportedError: always; says what to use.
        """
        raise UnsupportedError(f"this method looks inside the network, and {self.name} is a file; use cam or gradcam")


class OnnxNet(nn.Module):
    """Images -> class maps by the file; their mean and a bias -> logits."""

    bias: Tensor

    def __init__(self, file: Path, meta: dict[str, object], preprocess: Preprocess) -> None:
        super().__init__()
        self.model = file.read_bytes()
        self.run, self.uint8, self.preprocess = on_onnx(self.model), bool(meta["uint8"]), preprocess
        self.any_size = bool(meta["any_size"]) and not self.uint8
        noise = torch.rand(1, len(preprocess.mean), *preprocess.size, generator=torch.Generator().manual_seed(0))
        logits, maps = self._outputs(noise)
        # of the file, so that a fingerprint of the weights tells two files apart
        self.register_buffer("bias", (logits - maps.flatten(2).mean(2))[0])
        self.register_buffer("digest", torch.tensor(list(str(meta["digest"]).encode()), dtype=torch.uint8))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "run": None}  # an engine stays where it is

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.run = on_onnx(self.model)

    def forward(self, images: Images) -> Logits:
        """As the file says them: (b k)."""
        return self._outputs(images)[0].to(images.device)

    def forward_features(self, images: Images) -> ClassMaps:
        """Class maps (b k y x)."""
        return self._outputs(images)[1].to(images.device)

    def forward_head(self, maps: ClassMaps) -> Logits:
        """Logits (b k), linear in the maps."""
        return maps.flatten(2).mean(2) + self.bias

    def _outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.detach().cpu().float()
        size, own = tuple(images.shape[2:]), tuple(self.preprocess.size)
        if size != own and not self.any_size:  # pixels would be resized to that, unseen
            raise InputError(f"this file takes images of {own} alone, got {size}")
        if self.uint8:  # an input that was a picture is whole levels; resized to its own size it stays as it is
            mean, std = torch.tensor(self.preprocess.mean), torch.tensor(self.preprocess.std)
            levels = (images * std[:, None, None] + mean[:, None, None]).mul(255).round().clamp(0, 255)
            given = levels.byte().permute(0, 2, 3, 1).contiguous().numpy()
        else:
            given = np.ascontiguousarray(images.numpy())
        logits, maps, *_ = self.run(given)
        return torch.from_numpy(logits), torch.from_numpy(maps)


def load_onnx(file: Path) -> OnnxClassifier:
    """The classifier in a file of ``whatwhere export --to onnx``.

    CAM and Grad-CAM are the exported ones; methods of many forwards ask the file.

    Raises:
        DataError: no such file, or none of ours.
        MissingExtraError: ONNX Runtime is not installed.
        UnsupportedError: it gives features instead of class maps, or takes pixels that it crops or pads.
    """
    name = printable(file)
    if not file.is_file():
        raise DataError(f"{name}: no such file")
    with extra("export", "reading an ONNX file"):
        import onnxruntime
    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        meta = json.loads(session.get_modelmeta().custom_metadata_map[KEY])
        settings: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in meta["preprocess"].items()
        }
        preprocess = Preprocess(**settings)
        labels = Labels(meta["labels"], meta["synonyms"])
        thresholds = {str(method): float(share) for method, share in meta["thresholds"].items()}
        trusts = {str(method): tuple(map(float, numbers)) for method, numbers in meta["trusts"].items()}
        if "maps" not in meta["outputs"]:
            raise UnsupportedError(
                f"{name} gives features and no class maps; explain the model that it was made from"
            )
        if meta["uint8"] and (preprocess.fit != "whole" or len(preprocess.mean) != 3):
            raise UnsupportedError(
                f"{name} crops, pads or greys its pixels itself; export it without --uint8 for this"
            )
        network = OnnxNet(file, meta, preprocess)
    except WhatWhereError:
        raise
    except Exception as error:  # the engine raises whatever comes to hand on broken files
        raise DataError(f"{name}: not a file of whatwhere export: {type(error).__name__}: {error}") from error
    net = OnnxClassifier(network, labels, preprocess, name, meta["activation"])
    net.thresholds, net.trusts = thresholds, trusts
    return net
