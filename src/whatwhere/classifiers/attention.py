"""The attention matrices of a vision transformer, whoever wrote it, while it runs.

Fused attention keeps no matrix: for one call it is computed in its steps instead, and each matrix is handed out.
Nothing of the network or of torch is replaced; the mode and the hooks live in one thread for that call.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from whatwhere.classifiers.classifier import Classifier, logits_of, modules_of, undisturbed, widened
from whatwhere.classifiers.hooked import reaches
from whatwhere.classifiers.layouts import NoGridError, as_grid, first_tensor, with_tensor
from whatwhere.errors import UnsupportedError
from whatwhere.types import Images, Maps, Size

Attention = Float[Tensor, "b heads n n"]
"""How much of each token (last axis) goes into each token: rows sum to 1."""
Handed = Callable[[Attention], Attention]
"""Gets a matrix, gives what the network is to go on with."""

_SOFTMAXES = (functional.softmax, torch.softmax, Tensor.softmax)


@dataclass(frozen=True, eq=False)
class Transformer:
    """What a run has shown of a transformer.

    Attributes:
        blocks: the modules that hold one attention each, in the order of their runs; they hand on tokens (b n c).
        read: (b n), which tokens behind the last block the logits depend on: the class token, or all that are pooled.
    """

    blocks: tuple[nn.Module, ...]
    read: Bool[Tensor, "b n"]


def attended(net: Classifier, images: Images, see: Callable[[Attention], None]) -> Transformer:
    """Run the network once and see each attention matrix, first layer first; none is kept.

    Args:
        net: its network is a transformer with global self-attention, one block after another.
        images: as a trace has them.
        see: gets each matrix.

    Raises:
        UnsupportedError: the network has no self-attention, or not over all tokens of the image in every layer.
    """
    network, b = net.inner, len(images)
    found: list[list[tuple[nn.Module, bool]]] = []  # for each attention, the modules around it alone, outermost last
    tokens: list[int] = []
    running: list[tuple[int, bool]] = []
    leaf = handed = images.new_empty(0)
    given: list[Tensor] = []
    last = next((module for module in modules_of(network) if isinstance(module, nn.Linear)), None)

    def hand(attention: Attention) -> Attention:
        tokens.append(attention.shape[-1])
        if tokens[-1] != tokens[0]:
            raise _unsupported(net, f"its attention is between {tokens[0]} tokens and then between {tokens[-1]}")
        found.append([])
        see(attention.detach())
        torch.set_grad_enabled(False)
        return attention

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        came = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        running.append((len(found), came is not None and came.data_ptr() == handed.data_ptr()))
        if module is last and came is not None:
            given.append(came)

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        # Cut behind every module that could be a block: behind the last one begins what the head reads.
        nonlocal leaf, handed
        before, follows = running.pop()
        if len(found) != before + 1 or not _is_tokens(output, b, tokens[before]):
            return None
        found[before].append((module, follows))
        leaf = first_tensor(output).detach().requires_grad_()
        torch.set_grad_enabled(True)
        handed = leaf.clone()  # because the next layer may work in place
        return with_tensor(output, handed)

    with ExitStack() as stack:
        for context in (undisturbed(network), torch.inference_mode(False), torch.enable_grad()):
            stack.enter_context(context)
        for module in network.modules():
            stack.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            stack.enter_context(module.register_forward_hook(leave))
        stack.enter_context(handed_out(net, b, hand))
        logits = logits_of(network(images))
        if not found:
            raise _unsupported(net, "it has no self-attention")
        if not all(found):
            raise _unsupported(net, "its attention is not over all tokens of the image, one matrix a block")
        if not all(modules[-1][1] for modules in found[1:]):
            raise _unsupported(net, "its blocks of attention do not follow one another directly")
        read = _read(leaf, (logits, *given[-1:]))
        if read is None:
            raise _unsupported(net, "its logits do not depend on the tokens behind the last block")
    if len(found) > 1:
        return Transformer(tuple(modules[-1][0] for modules in found), read)
    # around a single block there may be a whole encoder
    listed = {child for m in network.modules() if isinstance(m, nn.ModuleList | nn.Sequential) for child in m}
    modules = [module for module, _ in found[0]]
    return Transformer((next((m for m in reversed(modules) if m in listed), modules[-1]),), read)


@contextmanager
def handed_out(net: Classifier, b: int, hand: Handed) -> Iterator[None]:
    """For a while, in this thread, every attention matrix of the network goes through ``hand``.

    Args:
        net: whose network is going to run.
        b: images in the batch.
        hand: gets each matrix and gives what the network goes on with; the order is that of the layers.

    Raises:
        UnsupportedError: while the network runs: an attention is not between all tokens of an image, all of them
            queries.
    """

    def checked(values: Tensor) -> Tensor:
        n = values.shape[-1]
        if values.shape[-2] != n:
            raise _unsupported(net, f"it has an attention of {values.shape[-2]} queries to {n} tokens")
        if values.shape[0] != b and (values.ndim == 4 or values.shape[0] % b):
            raise _unsupported(net, f"its attention is within windows of {n} tokens")
        return hand(values.reshape(b, -1, n, n)).reshape(values.shape)

    with _HandedOut(checked):
        yield


class _HandedOut(TorchFunctionMode):
    """``nn.MultiheadAttention`` leaves its own fast path where it sees a mode."""

    def __init__(self, hand: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.hand = hand

    def __torch_function__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            return self.multi_head(*args, **kwargs)
        if func in _SOFTMAXES:
            return self.softmax(func, args, kwargs)
        return func(*args, **kwargs)

    def softmax(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        weights = func(*args, **kwargs)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        square = weights.ndim == 3 and weights.shape[1] == weights.shape[2]
        return self.hand(weights) if dim in {-1, weights.ndim - 1} and (square or weights.ndim == 4) else weights

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """``softmax(q k' scale + mask) v``, as ``F.scaled_dot_product_attention`` is documented."""
        if enable_gqa:
            key, value = (part.repeat_interleave(query.shape[-3] // part.shape[-3], -3) for part in (key, value))
        scores = widened(query @ key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        weights = self.hand(scores.softmax(-1)).to(value.dtype)
        return (functional.dropout(weights, dropout_p) if dropout_p else weights) @ value

    def multi_head(self, *args: Any, **kwargs: Any) -> Any:
        # Torch's own function over names of ours: while a mode handles it, it sees no mode inside.
        own = functional.multi_head_attention_forward
        names = {
            **vars(functional),
            "scaled_dot_product_attention": self.attention,
            "softmax": lambda *args, **kwargs: self.softmax(functional.softmax, args, kwargs),
        }
        return FunctionType(own.__code__, names, own.__name__, own.__defaults__)(*args, **kwargs)


def patches(values: Float[Tensor, "b n"], net: Classifier, size: Size) -> Maps:
    """One value a token -> those of the patches on their grid; class and register tokens fall away.

    Args:
        values: one for each token.
        net: named in the error.
        size: (h, w) of the network's input.

    Raises:
        UnsupportedError: so many tokens are no grid over that input.
    """
    try:
        grid, _ = as_grid(values[..., None], size, frozenset())
    except NoGridError as error:
        raise _unsupported(net, str(error)) from None
    return grid[:, 0]


def _is_tokens(output: Any, b: int, n: int) -> bool:
    try:
        found = first_tensor(output)
    except NoGridError:
        return False
    return found.ndim == 3 and found.shape[:2] == (b, n)


def _read(leaf: Tensor, heads: tuple[Tensor, ...]) -> Tensor | None:
    """Which tokens a gradient arrives at: from the logits or, its weights being 0, what the last layer is given."""
    for values in heads:
        if reaches(values, leaf):
            # random weights, because the sum of a normalized layer is constant
            weights = torch.randn(values.shape[1:], generator=torch.Generator().manual_seed(0)).to(values)
            (gradient,) = torch.autograd.grad((values * weights).sum(), leaf, retain_graph=True)
            read: Tensor = gradient.ne(0).any(-1)
            if read.any(1).all():
                return read
    return None


def _unsupported(net: Classifier, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{net.name}: {why}; rollout and legrad are for vision transformers in which every token attends to every "
        "token. Use gradcam or layercam."
    )
