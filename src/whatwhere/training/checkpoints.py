"""A training's state in one file without a pickle: tensors as safetensors, all else as JSON in its header."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO
from safetensors import SafetensorError, safe_open
from torch import Tensor

from whatwhere.classifiers.weights import write_weights
from whatwhere.errors import DataError
from whatwhere.images import printable


class PlainCheckpoints(CheckpointIO):
    """What Lightning keeps, written so that reading it executes nothing, and never half."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the state.

        Raises:
            TypeError: something in it is neither a tensor nor plain data.
            OSError: it cannot be written; the one before stays.
        """
        tensors: dict[str, Tensor] = {}
        plain = json.dumps(_packed(checkpoint, tensors))
        write_weights(Path(path), tensors, {"state": plain})

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the state.

        Raises:
            DataError: there is none, or it is damaged.
        """
        try:
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                found: dict[str, Any] = _unpacked(json.loads(file.metadata()["state"]), tensors)
                return found
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{printable(path)}: no state that a training can go on from: {error}") from error

    def remove_checkpoint(self, path: Any) -> None:
        """Delete the file."""
        Path(path).unlink(missing_ok=True)


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Plain data, with a number in place of each tensor."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):  # keys may be numbers, and JSON's are not
        return {"dict": [[_key(key), _packed(inner, tensors)] for key, inner in value.items()]}
    if isinstance(value, list | tuple | set):
        return {type(value).__name__: [_packed(inner, tensors) for inner in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a training's state holds {type(value).__name__}, which is no plain data")


def _key(key: Any) -> Any:
    if isinstance(key, bool | int | float | str):
        return key
    raise TypeError(f"a training's state has a key {key!r}, which is no plain data")


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {key: _unpacked(one, tensors) for key, one in inner}
    return {"list": list, "tuple": tuple, "set": set}[kind](_unpacked(one, tensors) for one in inner)
