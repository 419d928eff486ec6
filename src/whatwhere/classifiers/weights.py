"""Files of weights -> a network's parameters. Nothing that is read is ever executed."""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from whatwhere.errors import DataError
from whatwhere.files import aside
from whatwhere.images import printable


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a safetensors file, or from a checkpoint of tensors and plain data, as Lightning writes it.

    Raises:
        DataError: missing, broken, or a pickle that wants to run code.
    """
    name = printable(path)
    if not path.is_file():
        raise DataError(f"{name}: no such file of weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of old pickles; they load or they are refused
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{name}: refused, because it is not a plain state dict: reading it would run code from the file, or it "
            "is damaged. Save model.state_dict() again, or convert it to safetensors where it is trusted"
        ) from error
    except (safetensors.SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise DataError(f"{name}: cannot be read as weights: {error}") from error
    if isinstance(found, Mapping):
        found = found.get("state_dict", found.get("model", found))
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise DataError(f"{name}: wanted a state dict of tensors, got {type(found).__name__}")
    return dict(found)


def fitting(weights: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The part of a checkpoint that is the network's, without what stands before its names there.

    Lightning modules, DataParallel and wrappers of one's own put ``model.``, ``net.``, ``module.`` before them, and
    keep other tensors beside: of losses, metrics, averages.

    Args:
        weights: a state dict.
        network: whose weights they are to be.

    Returns:
        Its weights by its own names; all of them as they were if no prefix gives all names of the network.

    Raises:
        DataError: several prefixes do, and it is not said which is meant.
    """
    own = [key for key in network.state_dict() if not key.endswith("num_batches_tracked")]
    if not own or all(key in weights for key in own):
        return dict(weights)
    ends = {key.removesuffix(own[0]) for key in weights if key.endswith(f".{own[0]}")}
    # what names most of the network, so that an error speaks of the rest
    known = {prefix: sum(prefix + key in weights for key in own) for prefix in ends}
    whole = sorted(prefix for prefix, count in known.items() if count == len(own))
    if len(whole) > 1:
        raise DataError(f"several networks fit, under {', '.join(whole)}; keep the tensors of one in the file")
    best = max(known, key=known.__getitem__, default="")
    if not best:
        return dict(weights)
    return {key.removeprefix(best): tensor for key, tensor in weights.items() if key.startswith(best)}


def write_weights(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Tensors as safetensors; the file is whole or not there.

    Raises:
        OSError: it cannot be written, for want of room say.
    """
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with aside(file) as place:
        try:
            save_file(plain, place, metadata)
        except safetensors.SafetensorError as error:
            raise OSError(f"{printable(file)}: cannot be written: {error}") from error


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    """Put a state dict into a network by name, all of it, shapes equal; counters of batches may be missing.

    Raises:
        DataError: tensors are missing, left over or of another shape; the network is then untouched.
    """
    own = network.state_dict()
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    extra = [key for key in weights if key not in own and not key.endswith("num_batches_tracked")]
    wrong = [
        f"{key} {tuple(weights[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    if missing or extra or wrong:
        raise DataError(
            f"{name}: the weights do not fit the network: {len(missing)} missing {missing[:3]}, "
            f"{len(extra)} left over {extra[:3]}, {len(wrong)} of another shape {wrong[:3]}"
        )
    network.load_state_dict(weights, strict=False)
