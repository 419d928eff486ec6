"""The last layer alone, on what the rest of the network finds: computed once, kept in a file, fitted in seconds."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from whatwhere.classifiers.classifier import Classifier, logits_of, modules_of, undisturbed
from whatwhere.classifiers.heads import Head, Headed, learned_weight
from whatwhere.classifiers.weights import write_weights
from whatwhere.errors import UnsupportedError
from whatwhere.training.data import Pictures, looks
from whatwhere.training.objective import loss_of, prior_of

DECAYS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""Of the weights, on features whose mean square is 1: what cross-validation chooses from."""
WIDE = 4096
"""Features of more numbers than this, and than twice as many as there are of them, are rotated into fewer."""
PLAIN_DECAY = 1e-4
"""Where cross-validation takes too long, or has nothing to go by."""
Found = TypeVar("Found")
FOLDS = 5
STEPS = 200
FEATURES = "features.safetensors"


def deciding(network: nn.Module) -> nn.Module:
    """The part of a network that light mode trains: its last linear layer, and the pool if one is behind that.

    Raises:
        UnsupportedError: there is none.
    """
    if isinstance(network, Headed) and (network.head.order == "linear-pool" or network.head.attention is not None):
        return network.head
    for module in modules_of(network):
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)):
            if module.bias is None:
                break
            return module
    raise UnsupportedError(
        f"{type(network).__name__} has no last linear layer with a bias; give it a head of ours, "
        "head = {pool = 'mean'} say"
    )


def features_of(
    net: Classifier,
    pictures: Pictures,
    file: Path | None = None,
    *,
    batch: int = 16,
    mirrored: bool = True,
    seen: Callable[[int, int], None] = lambda done, total: None,
) -> Float[Tensor, "n v ..."]:
    """What the deciding part reads, of each picture and of its mirror image.

    Args:
        net: the classifier, as it begins.
        pictures: n of them.
        file: where they are kept, and taken from if they are those of the same network and pictures.
        batch: images that go through at once; where memory does not suffice, half of them.
        mirrored: whether mirror images are looked at.
        seen: called with how many pictures of how many have been seen.

    Returns:
        (n v c), or (n v c y x) where grids are read; v is 2 with mirror images, or 1.

    Raises:
        UnsupportedError: the logits are not what the deciding part gives.
    """
    key = key_of(net, pictures, mirrored)
    if file is not None and file.exists():
        try:
            with safe_open(file, "pt") as stored:
                if (stored.metadata() or {}).get("key") == key:
                    seen(len(pictures), len(pictures))
                    kept: Tensor = stored.get_tensor("features")
                    return kept
        except (SafetensorError, OSError):
            pass  # half of a file from elsewhere; it is made anew
    features = in_smaller_batches(lambda at_once: _looked(net, pictures, at_once, mirrored, seen), batch)
    if file is not None:
        keep_features(features, file, key)
    return features


def keep_features(features: Float[Tensor, "n v ..."], file: Path, key: str) -> None:
    """Write them down for ``features_of``, which takes them if the key is ``key_of`` what it is asked for."""
    write_weights(file, {"features": features}, {"key": key})


def _looked(
    net: Classifier, pictures: Pictures, batch: int, mirrored: bool, seen: Callable[[int, int], None]
) -> Float[Tensor, "n v ..."]:
    part, found, done = deciding(net.network), [], 0
    passed: list[tuple[Tensor, Tensor]] = []
    with (
        undisturbed(net.network),
        torch.no_grad(),
        part.register_forward_hook(lambda module, args, output: passed.append((args[0], output))),
    ):
        for images in looks(pictures, net.preprocess, batch):
            images = images.to(net.device)
            views = []
            for view in (images, images.flip(-1))[: 1 + mirrored]:
                passed.clear()
                logits = logits_of(net.network(view))
                given = passed[0][1].flatten(1) if len(passed) == 1 else logits[:0]
                if given.shape != logits.shape or not torch.allclose(given, logits, rtol=1e-3, atol=1e-4):
                    raise UnsupportedError(
                        f"{net.name}: its logits are not what its last linear layer gives; give it a head of ours, "
                        "head = {pool = 'mean'} say, or train it with light_start = false in full mode"
                    )
                views.append(passed[0][0].float().cpu())
            found.append(torch.stack(views, 1))
            done += len(images)
            seen(done, len(pictures))
    features = torch.cat(found)
    return as_read(part, features)


def as_read(part: nn.Module, features: Float[Tensor, "n v ..."]) -> Float[Tensor, "n v ..."]:
    """What goes into a deciding part, (n v c) where it is a linear layer."""
    return features.flatten(2) if isinstance(part, nn.Linear | nn.Conv2d) else features


def in_smaller_batches(work: Callable[[int], Found], batch: int) -> Found:
    """What is done with so many images at once, or if memory does not suffice, with half of them, and so on."""
    while True:
        try:
            return work(batch)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or batch == 1:
                raise
        batch //= 2


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, of a device or of the machine."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def key_of(net: Classifier, pictures: Pictures, mirrored: bool) -> str:
    """Changes with all that features depend on."""
    own = {id(tensor) for tensor in deciding(net.network).state_dict(keep_vars=True).values()}
    digest = hashlib.sha256(json.dumps([asdict(net.preprocess), mirrored]).encode())
    for name, tensor in net.network.state_dict(keep_vars=True).items():
        if id(tensor) not in own:
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    digest.update("".join(pictures.digests).encode())
    return digest.hexdigest()


class Choice(NamedTuple):
    """What cross-validation found."""

    decay: float
    accuracy: float
    """Mean over the classes, on images that were left out; nan where nothing was chosen."""


def fit_last_layer(
    net: Classifier,
    features: Float[Tensor, "n v ..."],
    targets: Float[Tensor, "n k"],
    *,
    decay: float = 0.0,
    adjustment: float = 1.0,
    smoothing: float = 0.0,
    seed: int = 0,
    seen: Callable[[int, int], None] = lambda done, total: None,
) -> Choice:
    """Fit the deciding part of the network to features: logistic regression by L-BFGS, in place.

    Args:
        net: its activation says whether classes exclude one another.
        features: from ``features_of``.
        targets: 1 for each class that an image shows.
        decay: L2 on the weights, of features whose mean square is 1; 0 for the best of ``DECAYS`` in 5 folds, or for
            ``PLAIN_DECAY`` where grids are read or most classes have a single image.
        adjustment: as of a recipe.
        smoothing: of the labels.
        seed: of the folds.
        seen: called with how many fits of how many are done.

    Raises:
        UnsupportedError: the last linear layer has no bias.
    """
    part = deciding(net.network)
    # grids are not centred, since a pool behind the layer is not linear
    middle = features.mean((0, 1)) if features.ndim == 3 else torch.zeros(())
    scale = (features - middle).square().sum(2).mean().sqrt().clamp(min=1e-12)
    read = (features - middle) / scale
    narrow: Tensor | None = None
    if features.ndim == 3 and features.shape[2] > max(WIDE, 2 * features.shape[:2].numel()):
        read, narrow = rotated(read)
    labels = targets.argmax(1)
    enough = float((targets.sum(0) > 1).float().mean()) >= 0.5
    candidates = DECAYS if decay == 0 and enough and features.ndim == 3 else ()
    choice = Choice(decay or PLAIN_DECAY, float("nan"))
    if candidates:
        folds, scores = _folds(labels, seed), []
        for number, one in enumerate(candidates):
            logits = torch.zeros_like(targets)
            for fold in range(FOLDS):
                inside = folds != fold
                found = _fitted(part, read[inside], targets[inside], one, adjustment, smoothing, net.activation)
                with torch.no_grad():
                    logits[~inside] = found(read[~inside][:, 0])
            scores.append((*_judged(logits, targets, net.activation), one))
            seen(number + 1, len(candidates) + 1)
        accuracy, _, best = max(scores)
        choice = Choice(best, accuracy)
    found = _fitted(part, read, targets, choice.decay, adjustment, smoothing, net.activation)
    seen(1, 1)
    if narrow is not None:
        assert isinstance(found, nn.Linear)
        wide = nn.Linear(len(narrow), targets.shape[1])
        wide.weight.data, wide.bias.data = found.weight.detach() @ narrow.T, found.bias.detach()
        found = wide
    _put_back(part, found, middle, scale)
    return choice


def rotated(features: Float[Tensor, "n v c"]) -> tuple[Float[Tensor, "n v r"], Float[Tensor, "c r"]]:
    """Long features in the space of their own rows, and the rotation: as many numbers as there are rows, at most.

    Weights under an L2 penalty lie in that space (the representer theorem), so what is fitted there is what would
    have been fitted to the features themselves.
    """
    rows = features.flatten(0, 1)
    values, vectors = torch.linalg.eigh((rows @ rows.T).double())
    kept = values > 1e-6 * values[-1].clamp(min=1e-30)  # below that the product has no digits
    rotation = (rows.T @ (vectors[:, kept] / values[kept].sqrt()).to(rows)).contiguous()
    return (rows @ rotation).unflatten(0, features.shape[:2]), rotation


def _fitted(
    part: nn.Module,
    read: Tensor,
    targets: Tensor,
    decay: float,
    adjustment: float,
    smoothing: float,
    activation: str,
) -> nn.Module:
    """A copy of the part, or a linear layer in place of one, fitted to features (n v ...)."""
    k = targets.shape[1]
    found: nn.Module
    if read.ndim == 3:
        found = nn.Linear(read.shape[2], k)
        nn.init.zeros_(found.weight)
        nn.init.zeros_(found.bias)
    else:
        assert isinstance(part, Head)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = Head(read.shape[2], k, pool=part.pool, order=part.order, scaled=part.scaled)
        nn.init.zeros_(found.linear.bias if found.linear.bias is not None else torch.empty(0))
    rows, wanted = read.flatten(0, 1), targets.repeat_interleave(read.shape[1], 0)
    prior = prior_of(targets, activation) * adjustment
    weights = [p for p in found.parameters() if p.ndim > 1]
    optimizer = torch.optim.LBFGS(
        found.parameters(),
        max_iter=STEPS,
        history_size=10,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(found(rows) + prior, wanted, activation, smoothing)
        loss = loss + 0.5 * decay * torch.stack([weight.square().sum() for weight in weights]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return found


def _folds(labels: Tensor, seed: int) -> Tensor:
    """A fold for each image, those of a class spread evenly."""
    draw, folds = np.random.default_rng(seed), torch.zeros(len(labels), dtype=torch.int64)
    for label in set(labels.tolist()):
        members = (labels == label).nonzero().flatten().numpy()
        numbers = (np.arange(len(members)) + draw.integers(FOLDS)) % FOLDS
        folds[torch.from_numpy(draw.permutation(members))] = torch.from_numpy(numbers)
    return folds


def _judged(logits: Tensor, targets: Tensor, activation: str) -> tuple[float, float]:
    """Mean accuracy over the classes, and minus the loss, to tell those apart that are the same in the first."""
    if activation == "sigmoid":
        said = -functional.binary_cross_entropy_with_logits(logits, targets)
        return float(said), float(said)
    labels = targets.argmax(1)
    right = (logits.argmax(1) == labels).float()
    accuracy = np.mean([float(right[labels == label].mean()) for label in set(labels.tolist())])
    return round(float(accuracy), 6), -float(functional.cross_entropy(logits, labels))


def _put_back(part: nn.Module, found: nn.Module, middle: Tensor, scale: Tensor) -> None:
    """Weights of centred and scaled features, as those of features as they are."""
    with torch.no_grad():
        if isinstance(found, Head):
            assert isinstance(part, Head)
            readers = [found.linear]
            if found.attention is not None:
                readers += [found.attention.value, found.attention.gate]
            for conv in readers:
                learned_weight(conv).div_(scale)
            part.load_state_dict(found.state_dict())
            return
        assert isinstance(found, nn.Linear)
        assert isinstance(part, nn.Linear | nn.Conv2d)
        assert part.bias is not None
        for factor in (p for name, p in part.named_parameters() if name.endswith("factor")):
            factor.fill_(1)
        weight, mine = found.weight / scale, learned_weight(part)
        mine.copy_(weight.reshape(mine.shape))
        part.bias.copy_(found.bias - weight @ middle)
