"""An ONNX graph of float32 -> the same of 8-bit integers, its ranges measured on pictures; and how far the two agree.

Post-training quantization (Jacob et al. 2018): weights by channel, symmetric; activations by tensor, from the least
to the largest value seen. Each is written as a pair of QuantizeLinear and DequantizeLinear, which engines fold into
integer kernels.
"""

import ast
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from whatwhere.classifiers.engines import quiet
from whatwhere.errors import DataError, InputError, UnsupportedError, extra
from whatwhere.images import Preprocess, image_files, open_photo, printable

PICTURES = 256
"""So many of a folder are looked at, evenly from its sorted list, so that no class is left out."""
_COMPARED_EVERY = 5
_WEIGHTED = ("Conv", "Gemm", "MatMul")
# a clip or a maximum that is not there too parts a layer from what it is folded with
_INTEGER = (*_WEIGHTED, "Add", "Relu", "Clip", "MaxPool")
_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Quantized:
    """What became of a graph, measured on pictures that its ranges were not taken from.

    Attributes:
        calibrated: pictures that gave the ranges.
        compared: other pictures, on which both graphs were run; the same ones where there is but one.
        agreement: share of these on which the most probable class is the same.
        correlation: mean over these of Pearson's, of the two maps of the float graph's most probable class; None of a
            graph without class maps.
        before: bytes of the float graph.
        after: bytes of the quantized one.
    """

    calibrated: int
    compared: int
    agreement: float
    correlation: float | None
    before: int
    after: int

    @property
    def is_close(self) -> bool:
        """Whether the quantized graph says about the same."""
        return self.agreement >= 0.9 and (self.correlation is None or self.correlation >= 0.95)


@dataclass(frozen=True)
class Pictures:
    """Pictures of a folder as a graph takes them.

    Attributes:
        calibrated: files that give the ranges.
        compared: files that the graphs are compared on.
        preprocess: the network's.
        uint8: whether the graph takes pixels (1 H W 3), or preprocessed images (1 d h w).
    """

    calibrated: Sequence[Path]
    compared: Sequence[Path]
    preprocess: Preprocess
    uint8: bool

    def read(self, file: Path) -> np.ndarray:
        """One picture, as a batch.

        Raises:
            DataError: it cannot be read.
        """
        photo = open_photo(file)
        return photo.pixels[None] if self.uint8 else self.preprocess(photo)[0][None].numpy()


def pictures_in(folder: str | os.PathLike[str], preprocess: Preprocess, uint8: bool) -> Pictures:
    """Up to ``PICTURES`` of a folder and those below it; every fifth is left for comparing.

    Raises:
        InputError: no such folder, or the network takes no photos.
        DataError: there are no image files in it.
    """
    if not Path(folder).is_dir():
        raise InputError(f"{printable(folder)}: wanted a folder of pictures to take ranges from, and there is none")
    preprocess.frame((1, 1))  # refuses what takes no photos
    found = image_files(Path(folder))
    if not found:
        raise DataError(f"{printable(folder)}: no image files in this folder to take ranges from")
    files = [found[i] for i in np.linspace(0, len(found) - 1, min(len(found), PICTURES)).round().astype(int)]
    compared = files[::_COMPARED_EVERY]
    return Pictures([file for file in files if file not in set(compared)] or files, compared, preprocess, uint8)


def quantize(model: bytes, pictures: Pictures, **options: Any) -> bytes:
    """An ONNX graph with its network in 8-bit integers; what makes pixels, logits and the box stays in float32.

    Weights are signed and activations unsigned, which processors with VNNI or its like multiply exactly; older x86
    ones may clip sums of large products.

    Args:
        model: of ``export``, in float32.
        pictures: what the ranges are taken from.
        options: of onnxruntime's ``quantize_static``, in place of what was chosen by measuring.

    Raises:
        DataError: a picture cannot be read.
        UnsupportedError: no layer of the network has a kernel of integers.
    """
    with extra("export", "int8"):
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.files = iter(pictures.calibrated)

        def get_next(self) -> dict[str, np.ndarray] | None:
            file = next(self.files, None)
            return None if file is None else {"images": pictures.read(file)}

    graph = onnx.load_from_string(model)
    nodes = [node for node in graph.graph.node if node.op_type in _INTEGER and _in_network(node)]
    if not any(node.op_type in _WEIGHTED for node in nodes):
        raise UnsupportedError(f"int8 is for networks with {', '.join(_WEIGHTED)} in their graph; this one has none")
    with tempfile.TemporaryDirectory() as scratch, quiet():
        made = Path(scratch, "int8.onnx")
        chosen = {
            "per_channel": True,
            "activation_type": QuantType.QUInt8,
            "weight_type": QuantType.QInt8,
            "op_types_to_quantize": list(_INTEGER),
            "nodes_to_quantize": [node.name for node in nodes],
        }
        quantize_static(graph, made, Reader(), **chosen | options)
        return made.read_bytes()


def agreement_of(own: Sequence[Sequence[np.ndarray]], others: Sequence[Sequence[np.ndarray]]) -> float:
    """Share of pictures with the same most probable class; each has logits (1 k) first."""
    return float(np.mean([one[0].argmax() == other[0].argmax() for one, other in zip(own, others, strict=True)]))


def correlation_of(own: Sequence[Sequence[np.ndarray]], others: Sequence[Sequence[np.ndarray]]) -> float:
    """Mean over pictures of Pearson's correlation of the two maps of the first's most probable class.

    Of a map that is constant it is 1 where both are, and else 0.

    Args:
        own: logits (1 k) and class maps (1 k y x) of each picture.
        others: the same of the other graph.
    """
    found = []
    for (logits, maps, *_), (_, again, *_) in zip(own, others, strict=True):
        one, other = (each[0, logits.argmax()].astype(float) for each in (maps, again))
        one, other = one - one.mean(), other - other.mean()
        norm = float(np.linalg.norm(one) * np.linalg.norm(other))
        found.append(float((one * other).sum()) / norm if norm else float(not one.any() and not other.any()))
    return float(np.mean(found))


def _in_network(node: Any) -> bool:
    """Whether a node is the network's own, or its class maps'; logits stay as fine as they are."""
    scopes = next((one.value for one in node.metadata_props if one.key == _SCOPES), "[]")
    return "look" in ast.literal_eval(scopes) and "logits" not in node.output
