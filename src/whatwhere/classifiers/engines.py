"""The engines that run a compiled network: an exported graph, and which of its outputs, -> a function of images."""

import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whatwhere.errors import extra

Run = Callable[[Tensor], list[Tensor]]
"""A graph that is ready: images, float32 and contiguous -> its outputs, float32."""

_QUIET = RLock()


def part_of(model: Any, wanted: Sequence[int]) -> bytes:
    """An ONNX model with these outputs alone and what they need, as bytes."""
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    part = model.clone()
    part.graph.outputs[:] = [part.graph.outputs[i] for i in wanted]
    RemoveUnusedNodesPass()(part)
    model_bytes: bytes = onnx_ir.to_proto(part).SerializeToString()
    return model_bytes


def session_of(model: bytes | Path, threads: int) -> Any:
    """An ONNX model in ONNX Runtime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    # its threads must not go on spinning while torch works on what they gave
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def on_onnxruntime(model: bytes, shapes: Sequence[tuple[int, ...]], threads: int) -> Run:
    """An ONNX model in ONNX Runtime, on the CPU; ``shapes`` are those of one image's outputs."""
    session = session_of(model, threads)
    (given,), names = session.get_inputs(), [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> list[Tensor]:
        images, outputs = images.detach().contiguous(), _room(images, shapes)
        binding = session.io_binding()
        binding.bind_input(given.name, "cpu", 0, np.float32, tuple(images.shape), images.data_ptr())
        for name, output in zip(names, outputs, strict=True):
            binding.bind_output(name, "cpu", 0, np.float32, tuple(output.shape), output.data_ptr())
        session.run_with_iobinding(binding)
        return outputs

    return run


def on_onnx(model: Path | bytes) -> Callable[[np.ndarray], list[np.ndarray]]:
    """An ONNX model in ONNX Runtime, on as many threads as torch has now: images -> the outputs.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
    """
    with extra("export", "running an ONNX file"):
        session = session_of(model, torch.get_num_threads())
    (given,) = session.get_inputs()
    return lambda images: list(session.run(None, {given.name: images}))


def on_openvino(
    model: bytes, shapes: Sequence[tuple[int, ...]], threads: int, dtype: torch.dtype
) -> tuple[Run, torch.dtype]:
    """The graph, and what it computes in on this processor."""
    openvino = import_openvino()
    core, lock = openvino.Core(), RLock()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype],
    }
    graph = core.compile_model(core.read_model(model, b""), "CPU", settings)
    computed = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[
        graph.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    ]
    request = graph.create_infer_request()

    def run(images: Tensor) -> list[Tensor]:
        images, outputs = images.detach().contiguous(), _room(images, shapes)
        with lock:  # a request is one call's at a time
            request.set_input_tensor(openvino.Tensor(images.numpy(), shared_memory=True))
            for i, output in enumerate(outputs):
                request.set_output_tensor(i, openvino.Tensor(output.numpy(), shared_memory=True))
            request.infer()
        return outputs

    return run, computed


def import_openvino() -> Any:
    """OpenVINO without its telemetry, which would write to the home folder and call out when imported."""
    hidden = "openvino_telemetry"
    if hidden in sys.modules or "openvino" in sys.modules:
        import openvino

        return openvino
    sys.modules[hidden] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        del sys.modules[hidden]
    return openvino


def on_inductor(program: Any, wanted: Sequence[int]) -> Run:
    """An exported program's outputs of these numbers, compiled by torch itself where it is."""
    module = program.module()
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    output.args = (tuple(output.args[0][i] for i in wanted),)
    module.graph._codegen.pytree_info = module.graph._codegen.pytree_info._replace(out_spec=None)
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        module.graph.erase_node(node)  # checks that keep alive what nothing else needs
    module.graph.eliminate_dead_code()
    module.recompile()
    graph: Callable[[Tensor], tuple[Tensor, ...]] = torch.compile(module, options={"freezing": True})
    known: set[int] = set()

    def run(images: Tensor) -> list[Tensor]:
        with plain_mode():
            images = images.detach().view_as(images)  # to be marked, without a mark on the caller's
            if len(images) > 1:
                torch._dynamo.mark_dynamic(images, 0)
            if len(images) in known:
                return list(graph(images))
            with quiet():  # it may compile
                outputs = list(graph(images))
            known.add(len(images))
            return outputs

    return run


def _room(images: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    with torch.inference_mode(False):
        return [torch.empty(len(images), *shape) for shape in shapes]


@contextmanager
def plain_mode() -> Iterator[None]:
    """No gradients, no inference mode, no autocast, whatever the caller is in."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters warn, log and print about themselves; what fails raises.

    What is quietened is the whole process's, so one thread at a time does it.
    """
    with _QUIET:
        below = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.disable(below)
