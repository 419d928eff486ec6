"""LeGrad: the positive gradient of every layer's attention."""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from whatwhere.classifiers.attention import Attention, attended, handed_out, patches
from whatwhere.classifiers.classifier import Trace, logits_of, undisturbed, widened
from whatwhere.classifiers.layouts import first_tensor, with_tensor
from whatwhere.errors import UnsupportedError
from whatwhere.types import Maps, Score


def legrad(trace: Trace, score: Score) -> Maps:
    """LeGrad: where more attention would raise each layer's own score (Bousselham et al., ICCV 2025).

    Bousselham, Boggust, Chaybouti, Strobelt, Kuehne: LeGrad, An Explainability Method for Vision Transformers via
    Feature Formation Sensitivity. With ``Z_l`` the n tokens behind layer l, class and register tokens among them, and
    ``A_l`` (heads n n) its attention: ``z_l = mean_i Z_l,i``, ``S_l`` is the score of what the head (final norm,
    pooling, classifier) makes of ``z_l``, and ``E_l,j = mean_h mean_i relu(dS_l / dA_l,h,i,j)``. The map is the mean
    of ``E_l`` over all layers, its columns the patches; not scaled to [0, 1], which is ``unit``. As in the authors'
    code the mean of all tokens is taken whatever the head pools: from a class token alone only its own row of ``A_l``
    would get a gradient. Each gradient stays within its layer.

    The network runs once more, and on one image once before, to find its layers. What lies between every layer's
    attention and its score is held: 2.4 GB for a ViT-B/16 and 16 images, of which 8 b L heads n^2 bytes (0.7 GB) are
    the attention matrices and their gradients.

    Args:
        trace: what the network saw; where it was split does not matter.
        score: is given each layer's logits.

    Raises:
        UnsupportedError: the network is no transformer in which every token attends to every token.
        InputError: the score does not give one differentiable number for each image.
    """
    net, images = trace.net, trace.images
    blocks = attended(net, images[:1], lambda attention: None).blocks
    b, depth = len(images), len(blocks)
    leaves: list[Tensor] = []
    pooled: list[Tensor] = []

    def begin(attention: Attention) -> Attention:
        leaves.append(widened(attention.detach()).requires_grad_())
        torch.set_grad_enabled(True)
        return leaves[-1].to(attention.dtype)

    def end(module: nn.Module, args: Any, output: Any) -> Any:
        tokens = first_tensor(output)
        pooled.append(tokens.mean(1, keepdim=True))
        if len(pooled) < depth:
            torch.set_grad_enabled(False)
            return with_tensor(output, tokens.detach())
        # The head gets the layers as a batch in which each token is the mean: whatever it pools, it is that.
        return with_tensor(output, torch.cat(pooled).repeat(1, tokens.shape[1], 1))

    with ExitStack() as stack:
        for context in (undisturbed(net.inner), torch.inference_mode(False), torch.enable_grad()):
            stack.enter_context(context)
        for block in set(blocks):
            stack.enter_context(block.register_forward_hook(end))
        stack.enter_context(handed_out(net, b, begin))
        logits = widened(logits_of(net.inner(images)))

    if logits.shape != (b * depth, trace.logits.shape[1]) or not logits.requires_grad:
        raise UnsupportedError(
            f"{net.name}: its head does not take the tokens of {depth} layers as one batch, or cannot be traced "
            "back to them; legrad needs that. Use gradcam or layercam."
        )
    with torch.inference_mode(False), torch.enable_grad():
        rows = (part.detach().requires_grad_() for part in torch.chunk(logits, depth))
        wanted = [replace(trace, logits=part).class_gradient(score) for part in rows]
        gradients = torch.autograd.grad(logits, leaves, torch.cat(wanted))
    layers = torch.stack([gradient.clamp(min=0).mean((1, 2)) for gradient in gradients])
    return patches(layers.mean(0), net, (images.shape[-2], images.shape[-1]))
