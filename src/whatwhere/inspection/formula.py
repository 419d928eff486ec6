"""Which pixels the cells of every layer see, by the formula, in one run of the network.

    size += (kernel - 1) * dilation * stride;   start -= padding * stride;   stride *= step

(Araujo, Norris, Sim: Computing Receptive Fields of Convolutional Neural Networks, Distill 2019, eq. 2 and 3.) The
operations that run are followed, not the modules, so that functions count as layers do; where branches come together,
a cell sees what any of them does. ``receptive_field`` measures the same of one layer, and needs no formula.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from whatwhere.classifiers.classifier import undisturbed
from whatwhere.classifiers.layouts import first_tensor
from whatwhere.inspection.receptive import ReceptiveField
from whatwhere.types import Images

aten = torch.ops.aten
EVERYTHING = {
    aten.mean.dim,
    aten.amax.default,
    aten._adaptive_avg_pool2d.default,
    aten.adaptive_max_pool2d.default,
    aten.native_group_norm.default,
}
"""After these a cell sees all that there is."""
CELLWISE = {
    aten.native_batch_norm.default,
    aten._native_batch_norm_legit_no_training.default,
    aten.cudnn_batch_norm.default,
    aten.cat.default,
    aten.clone.default,
    aten._to_copy.default,
    aten.detach.default,
    aten.alias.default,
    aten.native_dropout.default,
    aten.hardswish.default,
    aten.hardswish_.default,
    aten.gelu_.default,
    aten.mish_.default,
    aten._prelu_kernel.default,
}
"""Besides what torch tags as pointwise: each cell of these sees what the same cells of what goes in do."""


def receptive_fields(network: nn.Module, images: Images) -> dict[str, ReceptiveField]:
    """What the cells of each module's grid see, in the order in which they run.

    Gates that weigh whole channels by what is seen anywhere (squeeze and excitation) are left out, since through them
    each cell would see everything. A module that runs several times counts as it does the last time.

    Args:
        network: images -> anything; run once, in evaluation mode, and left as it is.
        images: (b d h w).

    Returns:
        By name. Modules that give no grid (b c y x), or one that the formula does not know how to follow, such as
        tokens, are left out.
    """
    found: dict[str, ReceptiveField] = {}
    with ExitStack() as hooks, undisturbed(network), torch.no_grad(), Followed(images) as followed:
        for name, module in network.named_modules():

            def note(module: nn.Module, given: Any, output: Any, name: str = name) -> None:
                found.pop(name, None)
                try:
                    grid = first_tensor(output)
                except (IndexError, TypeError, ValueError):
                    return
                if (field := followed.fields.get(grid)) is not None:
                    found[name] = field

            hooks.enter_context(module.register_forward_hook(note))
        network(images)
    return found


class Followed(TorchDispatchMode):
    """While it is on, it is known of every grid what its cells see."""

    def __init__(self, images: Images) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fields: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.fields[images] = ReceptiveField((1.0, 1.0), (1, 1), (0.0, 0.0))
        self.extent = tuple(images.shape[2:])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note what its grid sees."""
        kwargs = kwargs or {}
        tensors = [one for one in _flat([*args, *kwargs.values()]) if isinstance(one, Tensor)]
        before = [(one.shape, self.fields[one]) for one in tensors if one in self.fields]
        output = func(*args, **kwargs)
        grid = output[0] if isinstance(output, tuple | list) and output else output
        if not before or not isinstance(grid, Tensor):
            return output
        if grid in self.fields:
            del self.fields[grid]  # of what works in place
        if grid.ndim != 4:
            return output
        if func in RULES:
            field = RULES[func](before[0][1], args, kwargs)
        elif func in EVERYTHING:
            same = before[0][0][2:] == grid.shape[2:] and func != aten.native_group_norm.default
            field = before[0][1] if same else self._everything(grid)
        elif func in CELLWISE or torch.Tag.pointwise in func.tags:
            field = _together([one for shape, one in before if shape[2:] == grid.shape[2:]])
        elif func in {aten.split.Tensor, aten.split_with_sizes.default} and kwargs.get("dim", (*args, 0)[2]) == 1:
            for part in output:
                self.fields[part] = before[0][1]
            return output
        else:
            field = None
        if field is not None:
            self.fields[grid] = field
        return output

    def _everything(self, grid: Tensor) -> ReceptiveField:
        y, x = (round(side / cells) for side, cells in zip(self.extent, grid.shape[2:], strict=True))
        return ReceptiveField((math.inf, math.inf), (y, x), (-math.inf, -math.inf))


Rule = Callable[[ReceptiveField, Any, Any], ReceptiveField | None]


def _slid(field: ReceptiveField, kernel: Any, step: Any, padding: Any, dilation: Any) -> ReceptiveField:
    """A window of so many cells slides over a grid."""
    per_axis = []
    for axis in (0, 1):
        k, s, p, d = (int(one[min(axis, len(one) - 1)]) for one in (kernel, step or kernel, padding, dilation))
        size, stride, start = field.size[axis], field.stride[axis], field.start[axis]
        per_axis.append((size + (k - 1) * d * stride, stride * s, start - p * stride))
    (h, y, top), (w, x, left) = per_axis
    return ReceptiveField((h, w), (y, x), (top, left))


def _convolved(field: ReceptiveField, args: Any, kwargs: Any) -> ReceptiveField | None:
    weight, _, step, padding, dilation, transposed = args[1:7]
    return None if transposed else _slid(field, weight.shape[2:], step, padding, dilation)


def _pooled(field: ReceptiveField, args: Any, kwargs: Any) -> ReceptiveField:
    kernel, step, padding, dilation = list(args[1:5]) + [[], [0], [1]][len(args) - 2 :]
    return _slid(field, kernel, step, padding, dilation)


def _average_pooled(field: ReceptiveField, args: Any, kwargs: Any) -> ReceptiveField:
    return _pooled(field, args[:4], kwargs)


def _padded(field: ReceptiveField, args: Any, kwargs: Any) -> ReceptiveField | None:
    left, _, top, _, *others = args[1] if len(args[1]) > 2 else [*args[1], 0, 0]
    if any(others):
        return None
    start = field.start[0] - top * field.stride[0], field.start[1] - left * field.stride[1]
    return ReceptiveField(field.size, field.stride, start)


def _sliced(field: ReceptiveField, args: Any, kwargs: Any) -> ReceptiveField | None:
    _, dim, begin, _, step = (*args, *(0, 0, None, None, 1)[len(args) :])[:5]
    begin, axis = begin or 0, dim - 2
    if axis < 0:
        return field if dim in {0, 1} else None
    if begin < 0:
        return None
    stride, start = list(field.stride), list(field.start)
    start[axis] += begin * stride[axis]
    stride[axis] *= step
    return ReceptiveField(field.size, (stride[0], stride[1]), (start[0], start[1]))


RULES: dict[Any, Rule] = {
    aten.convolution.default: _convolved,
    aten.max_pool2d_with_indices.default: _pooled,
    aten.avg_pool2d.default: _average_pooled,
    aten.constant_pad_nd.default: _padded,
    aten.reflection_pad2d.default: _padded,
    aten.replication_pad2d.default: _padded,
    aten.slice.Tensor: _sliced,
}
"""What an operation does to what is seen, from its arguments."""


def _together(fields: list[ReceptiveField]) -> ReceptiveField | None:
    """What some cells see that lie at the same places; None where they lie at others."""
    if not fields or any(one.stride != fields[0].stride for one in fields):
        return None
    axes = []
    for axis in (0, 1):
        start = min(one.start[axis] for one in fields)
        end = max(one.start[axis] + one.size[axis] if math.isfinite(one.size[axis]) else math.inf for one in fields)
        axes.append((end - start, start))
    (h, top), (w, left) = axes
    return ReceptiveField((h, w), fields[0].stride, (top, left))


def _flat(values: Any) -> list[Any]:
    return [x for one in values for x in (_flat(one) if isinstance(one, list | tuple) else [one])]
