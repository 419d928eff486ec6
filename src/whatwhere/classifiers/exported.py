"""Classifier -> a file that other programs run: one graph, images -> logits, class maps and, if asked for, the box.

What is written is run once in its own engine on photographs, in batches of several lengths and sizes, and believed
where it says what the network says.
"""

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from whatwhere.classifiers.classifier import Classifier, undisturbed
from whatwhere.classifiers.compiled import Look, noise_of
from whatwhere.classifiers.engines import import_openvino, on_onnx, part_of, plain_mode, quiet
from whatwhere.classifiers.graph import Pixels, Whole
from whatwhere.classifiers.hooked import HookedClassifier
from whatwhere.classifiers.int8 import Pictures, Quantized, agreement_of, correlation_of, pictures_in, quantize
from whatwhere.classifiers.onnxfile import KEY, OnnxClassifier
from whatwhere.errors import InputError, UnsupportedError, WhatWhereError, extra
from whatwhere.files import together
from whatwhere.images import Photo, open_photo, printable

To = Literal["onnx", "openvino", "pt2"]
SUFFIXES: dict[To, str] = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2"}
TOLERANCE = 1e-4
"""Of the largest value, or of 1 where all are smaller."""
KEPT = ("cam", "gradcam")
"""Methods whose maps are those of the graph: what was measured of them goes along."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        file: the graph.
        sidecar: the JSON beside it, with all that belongs to the weights.
        meta: what is in that.
        errors: by the shape of a batch of photographs, the largest difference of each output from PyTorch's: of the
            largest value, or of 1 where all are smaller; of a box, in pixels. Of a quantized graph, the float one's.
        quantized: how the graph of integers differs from the float one; None where it is float.
    """

    file: Path
    sidecar: Path
    meta: dict[str, Any]
    errors: dict[tuple[int, ...], dict[str, float]]
    quantized: Quantized | None = None


def export(
    net: Classifier,
    file: str | os.PathLike[str],
    to: To = "onnx",
    *,
    threshold: float,
    uint8: bool = False,
    box: bool = False,
    features: bool = False,
    int8: str | os.PathLike[str] | None = None,
) -> Exported:
    """Write a classifier as one graph: images -> logits (b k), class maps (b k y x) and, with ``box``, box (b 4).

    Any batch. With ``uint8`` pictures of any size; without, images from half the network's size up where its layers
    allow a graph of that, and of the network's own elsewhere (the embedded one's padding depends on it). Labels,
    preprocessing, thresholds, layer and a digest of the weights go into a JSON file beside it, called as it is
    with ``.json`` behind that, and into an ONNX file's metadata.

    Args:
        net: the classifier, on the CPU.
        file: what to write; it is there whole or not at all. OpenVINO's weights go beside it, as ``.bin``.
        to: "onnx", "openvino" (its IR), or "pt2", which ``torch.export.load`` reads.
        threshold: the share of a map's maximum that is in a box.
        uint8: take 8-bit RGB pixels (b H W 3) of any size, resized and normalized in the graph, instead of (b d h w).
        box: the most probable class's box too, in pixels of what the graph takes; see ``graph.box_of``.
        features: logits and features (b c y x) instead, of networks that have no class maps.
        int8: a folder of pictures like those it will see, from which the ranges of 8-bit integers are taken; the
            float graph is checked as ever, and how far the other agrees with it is measured. For onnx and openvino.

    Raises:
        InputError: an unknown format, a file of another suffix, a threshold outside [0, 1), ``box`` with
            ``features``, or ``int8`` with pt2 or without such a folder.
        DataError: no picture in that folder, or one that cannot be read.
        MissingExtraError: what writes or runs the format is not installed.
        UnsupportedError: the logits are not linear in pooled features (without ``features``); the network cannot be
            exported; what was made of it does not say what the network says. No file is left then.
    """
    path = _checked(Path(file), to, threshold, box and features)
    if isinstance(net, OnnxClassifier):
        raise UnsupportedError(f"{net.name} is an exported file already; export the model that it was made from")
    if net.device.type != "cpu":
        raise UnsupportedError(f"files are made on the CPU, and {net.name} is on {net.device}; move it there")
    if int8 is not None and to == "pt2":
        raise InputError("int8 is for onnx and openvino; a .pt2 is float32")
    pictures = None if int8 is None else pictures_in(int8, net.preprocess, uint8)
    whole, graphed = _graph_of(net, threshold, uint8, box, features)
    with _blamed(net, to), plain_mode(), undisturbed(net.network):
        batches = batches_for(net, uint8)
        program, is_open = _program(whole, batches[0])
    if not is_open:
        batches = [batch for batch in batches if batch.shape[1:] == batches[0].shape[1:]]
    meta, quantized = _meta_of(net, to, whole, threshold, uint8, is_open), None
    sidecar = _sidecar(path)
    with together(*_others(path), path) as (*_, told, written):
        with _blamed(net, to):
            graph = program if to == "pt2" else _onnx_of(program, whole.names, meta)
            _write(graph, written, to, meta)
            run = runner(written)
            errors = {tuple(batch.shape): _errors(net, whole, graphed, run, batch) for batch in batches}
        _check(net, to, errors)
        if pictures is not None and isinstance(graph, bytes):
            with _blamed(net, to):
                meta, quantized = _quantized(graph, pictures, run, written, to, meta)
        told.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    return Exported(path, sidecar, meta, errors, quantized)


def runner(file: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    """What runs an exported file, chosen by its suffix: images -> the outputs.

    Raises:
        MissingExtraError: the engine is not installed.
    """
    if file.suffix == ".pt2":
        program = torch.export.load(file).module()

        def by_torch(images: np.ndarray) -> list[np.ndarray]:
            with plain_mode():
                return [output.numpy() for output in program(torch.from_numpy(images))]

        return by_torch
    if file.suffix == ".xml":
        with extra("export", "running an OpenVINO file"):
            openvino = import_openvino()
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        model = openvino.Core().compile_model(str(file), "CPU", settings)
        return lambda images: [np.array(output) for output in model(images).values()]
    return on_onnx(file)


def photographs() -> list[Photo]:
    """Those that come with the package."""
    with as_file(files("whatwhere") / "photos") as folder:
        return [open_photo(photo) for photo in sorted(folder.glob("*.jpg"))]


def batches_for(net: Classifier, uint8: bool) -> list[Tensor]:
    """The package's photographs as a graph takes them: three, one, and both again in another size.

    Of networks that take no photographs, noise.
    """
    try:
        net.preprocess.frame((1, 1))
    except InputError:
        return [noise_of(net), noise_of(net)[:1]]
    photos = photographs()
    if uint8:
        return [*(_sized(photos, size) for size in ((210, 300), (300, 190))), torch.tensor(photos[0].pixels)[None]]
    h, w = net.preprocess.size[-2:]
    batches = []
    for size in ((h, w), (h + h // 4, w + w // 2)):
        three = torch.stack([replace(net.preprocess, size=size)(photo)[0] for photo in photos])
        batches += [three, three[:1].contiguous()]
    return batches


def _sized(photos: Sequence[Photo], size: tuple[int, int]) -> Tensor:
    return torch.stack([torch.tensor(np.array(Image.fromarray(one.pixels).resize(size[::-1]))) for one in photos])


def _checked(path: Path, to: To, threshold: float, both: bool) -> Path:
    if to not in get_args(To):
        raise InputError(f"a format is one of {', '.join(get_args(To))}, got {to!r}")
    if path.suffix != SUFFIXES[to]:
        raise InputError(f"a file of {to} ends with {SUFFIXES[to]}, got {printable(path)}")
    if not path.parent.is_dir():
        raise InputError(f"{printable(path.parent)}: no such folder to write {path.name} to")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{printable(path.parent)}: this folder cannot be written to")
    for one in (path, *_others(path)):
        if one.is_dir():
            raise InputError(f"{printable(one)}: a folder has this name; choose another")
    if not 0 <= threshold < 1:
        raise InputError(f"in a graph a threshold is a share of the maximum in [0, 1), got {threshold}")
    if both:
        raise InputError("a box is cut from class maps, and with features there are none; choose one of the two")
    if to != "pt2":
        with extra("export", f"exporting to {to}"):
            import onnxscript  # noqa: F401

            if to == "openvino":
                import_openvino()
            else:
                import onnxruntime  # noqa: F401
    return path


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _others(path: Path) -> list[Path]:
    """What is written beside a graph; the sidecar is last."""
    weights = [path.with_suffix(".bin")] if path.suffix == SUFFIXES["openvino"] else []
    return [*weights, _sidecar(path)]


def _graph_of(
    net: Classifier, threshold: float, uint8: bool, box: bool, features: bool
) -> tuple[Whole, Callable[[Tensor], tuple[Tensor, ...]]]:
    """What is exported, and the same by the classifier: preprocessed images -> logits, and maps or features."""
    noise = noise_of(net)
    trace = net.trace(noise)
    linear = None
    if not features:
        try:
            linear = net.checked_linear(trace)
        except UnsupportedError as error:
            raise UnsupportedError(
                f"{net.name} has no class maps that a graph could give: its logits are not linear in the mean of its "
                f"features, and maps by gradients are no part of a graph. With features (--features) the file gives "
                f"logits and features; with another layer, or one linear layer behind the mean, it gives maps. "
                f"({error})"
            ) from error
    if box and noise.ndim != 4:
        raise UnsupportedError(f"boxes are of pictures, and {net.name} takes volumes")
    with undisturbed(net.network):
        network = copy.deepcopy(net.network)
    look = Look(net, network.requires_grad_(False), linear, noise, torch.float32).float()

    def own(images: Tensor) -> tuple[Tensor, ...]:
        seen = net.trace(images)
        return seen.logits.detach(), seen.features.detach() if features else net.class_maps(seen)

    return Whole(look, Pixels(net.preprocess) if uint8 else None, threshold if box else None).eval(), own


def _program(whole: Whole, batch: Tensor) -> tuple[torch.export.ExportedProgram, bool]:
    """The graph, and whether the size of images is open in it."""
    names = (
        {0: "batch", 1: "height", 2: "width"} if whole.pixels is not None else {0: "batch", 2: "height", 3: "width"}
    )
    if batch.ndim != 4:
        names = {0: "batch"}
    # a network may have guards against inputs that vanish in it; half of its own size is far from there
    least = {axis: 1 if axis == 0 or whole.pixels is not None else batch.shape[axis] // 2 for axis in names}
    opened = {axis: torch.export.Dim(name, min=least[axis]) for axis, name in names.items()}
    closed = {0: opened[0]}
    with quiet():
        # layers that pad by the size of what they are given make formulas of it that take hours to simplify
        if len(opened) > 1 and (whole.pixels is not None or not _pads_by_size(whole)):
            try:
                return torch.export.export(whole, (batch,), dynamic_shapes=(opened,), strict=False), True
            except Exception:  # exporters raise whatever comes to hand where a network is of one size
                if whole.pixels is not None:
                    raise
        return torch.export.export(whole, (batch,), dynamic_shapes=(closed,), strict=False), False


def _axes_of(meta: dict[str, Any]) -> dict[int, str]:
    """What the open axes of the images are called."""
    if not meta["any_size"]:
        return {0: "batch"}
    return {0: "batch", 1: "height", 2: "width"} if meta["uint8"] else {0: "batch", 2: "height", 3: "width"}


def _name_axes(graph: Any, names: dict[int, str]) -> None:
    """Names instead of the exporter's symbols, wherever they stand alone."""
    (images,) = graph.inputs
    known = {str(images.shape[axis]): name for axis, name in names.items()}
    for value in (images, *graph.outputs):
        for axis, length in enumerate(value.shape):
            if str(length) in known:
                value.shape[axis] = known[str(length)]


def _pads_by_size(whole: Whole) -> bool:
    return any(type(module).__name__.endswith("Same") for module in whole.modules())


def _onnx_of(program: torch.export.ExportedProgram, names: Sequence[str], meta: dict[str, Any]) -> bytes:
    with plain_mode(), quiet():
        made = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["images"], output_names=[*names])
        assert made is not None
        made.model.metadata_props[KEY] = json.dumps(meta)
        _name_axes(made.model.graph, _axes_of(meta))
        return part_of(made.model, range(len(names)))


def _write(graph: Any, file: Path, to: To, meta: dict[str, Any]) -> None:
    """An exported program, or an ONNX model's bytes, as a file."""
    with plain_mode(), quiet():
        if to == "pt2":
            torch.export.save(graph, file, extra_files={f"{KEY}.json": json.dumps(meta)})
        elif to == "onnx":
            file.write_bytes(graph)
        else:
            openvino = import_openvino()
            model = openvino.Core().read_model(graph, b"")
            model.set_rt_info(json.dumps(meta), KEY)
            openvino.save_model(model, str(file), compress_to_fp16=False)


def _quantized(
    graph: bytes,
    pictures: Pictures,
    run: Callable[[np.ndarray], list[np.ndarray]],
    file: Path,
    to: To,
    meta: dict[str, Any],
) -> tuple[dict[str, Any], Quantized]:
    """Write over a float file what becomes of it in integers; what goes along with that, and how far they agree."""
    import onnx

    own, before = [run(pictures.read(one)) for one in pictures.compared], _bytes_of(file)
    model = onnx.load_from_string(quantize(graph, pictures))
    meta = meta | {"digest": f"sha256:{hashlib.sha256(model.graph.SerializeToString()).hexdigest()}"}

    def write() -> None:
        for one in (file, *_others(file)):
            one.unlink(missing_ok=True)  # an engine that runs the old one may have it in its memory's map
        onnx.helper.set_model_props(model, {KEY: json.dumps(meta)})
        _write(model.SerializeToString(), file, to, meta)

    write()
    again = runner(file)
    others = [again(pictures.read(one)) for one in pictures.compared]
    found = Quantized(
        len(pictures.calibrated),
        len(pictures.compared),
        agreement_of(own, others),
        correlation_of(own, others) if "maps" in meta["outputs"] else None,
        before,
        _bytes_of(file),
    )
    meta = meta | {"int8": asdict(found)}
    write()
    return meta, found


def _bytes_of(file: Path) -> int:
    return sum(one.stat().st_size for one in (file, file.with_suffix(".bin")) if one.is_file())


def _meta_of(net: Classifier, to: To, whole: Whole, threshold: float, uint8: bool, is_open: bool) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name, tensor in sorted(net.network.state_dict().items()):
        digest.update(
            name.encode() + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return {
        "model": net.name,
        "to": to,
        "input": "uint8 RGB (b H W 3)" if uint8 else "float32, preprocessed (b d h w)",
        "uint8": uint8,
        "any_size": is_open,
        "outputs": whole.names,
        "activation": net.activation,
        "layer": net.layer if isinstance(net, HookedClassifier) else None,
        "threshold": threshold,
        "thresholds": {name: net.thresholds[name] for name in KEPT if name in net.thresholds},
        "trusts": {name: list(net.trusts[name]) for name in KEPT if name in net.trusts},
        "preprocess": asdict(net.preprocess),
        "labels": list(net.labels),
        "synonyms": [list(words) for words in net.labels.synonyms],
        "digest": f"sha256:{digest.hexdigest()}",
    }


def _errors(
    net: Classifier,
    whole: Whole,
    own: Callable[[Tensor], tuple[Tensor, ...]],
    run: Callable[[np.ndarray], list[np.ndarray]],
    batch: Tensor,
) -> dict[str, float]:
    outputs = run(batch.numpy())
    with plain_mode():
        inputs = batch if whole.pixels is None else whole.pixels(batch)[0]
        wanted = [output.numpy() for output in own(inputs)]
        if whole.share is not None:
            wanted.append(whole(batch)[2].numpy())
    found = {}
    for name, got, want in zip(whole.names, outputs, wanted, strict=True):
        if got.shape != want.shape:
            raise UnsupportedError(f"its {name} have the shape {got.shape} where the network's have {want.shape}")
        error = float(np.abs(got - want).max())
        found[name] = error if name == "box" else error / max(1.0, float(np.abs(want).max()))
    return found


def _check(net: Classifier, to: To, errors: dict[tuple[int, ...], dict[str, float]]) -> None:
    for shape, found in errors.items():
        for name, error in found.items():
            bound = 1.0 if name == "box" else TOLERANCE  # a pixel on the threshold may fall to either side
            if not error <= bound:
                raise UnsupportedError(
                    f"{net.name} in {to} gives other {name}: on photographs {shape} they differ from PyTorch's by "
                    f"{error:.3g} where {bound:g} is allowed; no file was written"
                )


@contextmanager
def _blamed(net: Classifier, to: To) -> Iterator[None]:
    try:
        yield
    except (WhatWhereError, OSError):
        raise
    except Exception as error:  # exporters and engines raise whatever comes to hand
        lines = str(error).strip().splitlines() or [""]
        raise UnsupportedError(
            f"{net.name} cannot be exported to {to}: {type(error).__name__}: {lines[0]}"
        ) from error
