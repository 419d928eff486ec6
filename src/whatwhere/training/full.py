"""Full mode: Lightning's loop around a network, with what it goes on from and the best of it kept."""

import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from whatwhere.classifiers.classifier import Classifier
from whatwhere.classifiers.weights import read_weights, write_weights
from whatwhere.datasets import Dataset, open_dataset
from whatwhere.errors import DataError, TrainingError, settings_blamed
from whatwhere.evaluation.evaluate import evaluate, plan_of
from whatwhere.training.checkpoints import PlainCheckpoints
from whatwhere.training.data import Drawn, Pictures, Shown, Splits
from whatwhere.training.folder import METRICS, STATE, Watch, unwatched, write_metrics
from whatwhere.training.light import out_of_memory
from whatwhere.training.loop import Fitting
from whatwhere.training.objective import measured, prior_of
from whatwhere.training.recipe import Recipe

CHECKPOINT, BEST = "checkpoint.safetensors", "best-{}.safetensors"
SAVED_EVERY = 20.0
"""Seconds between states that are written down, at ends of epochs."""


def fit_network(
    net: Classifier,
    recipe: Recipe,
    splits: Splits,
    out: Path,
    rows: Sequence[Mapping[str, Any]] = (),
    how: Mapping[str, Any] | None = None,
    watch: Watch = unwatched,
) -> list[dict[str, Any]]:
    """Train all of a classifier's network, in place.

    Where memory does not suffice, batches go through in halves, whose gradients are summed.

    Args:
        net: as it begins.
        recipe: resolved.
        splits: of the data.
        out: folder of the run, with one for its state.
        rows: metrics of what was done before; what validation says there is to be surpassed.
        how: devices, accelerator and nodes, as Lightning's Trainer takes them.
        watch: is told how far it is.

    Returns:
        Rows of metrics, one an epoch.

    Raises:
        InputError: a setting that Lightning or an aid does not take.
        TrainingError: the loss is no number.
        OSError: the state cannot be written.
    """
    begun = {key: tensor.clone() for key, tensor in net.network.state_dict().items()}
    first = next((row["validation"] for row in rows if "validation" in row), None)
    parts = 1
    while True:
        keeper = Keeper(net, recipe, out, watch)
        if first is not None and recipe.select == "accuracy":
            keeper.best = (first, -1)
        try:
            _attempt(net, recipe, splits, keeper, parts, how or {})
            break
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or parts * 2 > recipe.batch:
                raise
        parts *= 2
        watch(f"out of memory: {recipe.batch // parts} images go through at once, {parts} times a step", 0, 0)
        net.network.load_state_dict(begun)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if keeper.best is not None:
        epoch = keeper.best[1]
        net.network.load_state_dict(begun if epoch < 0 else read_weights(out / STATE / BEST.format(epoch)))
    net.network.requires_grad_(True).eval().to(memory_format=torch.contiguous_format)
    return keeper.rows


def _attempt(
    net: Classifier, recipe: Recipe, splits: Splits, keeper: "Keeper", parts: int, how: Mapping[str, Any]
) -> None:
    """Lightning's loop, with batches in so many parts; the network is then as the last epoch left it."""
    state = keeper.out / STATE
    net.network.zero_grad(set_to_none=True)
    net.network.to(memory_format=torch.channels_last)
    dtypes = {key: tensor.dtype for key, tensor in net.network.state_dict().items()}
    fitting = Fitting(net, recipe, prior_of(splits.train.targets(), net.activation))
    logger: Any = False
    if recipe.log == "tensorboard":
        from lightning.pytorch.loggers import TensorBoardLogger

        logger = TensorBoardLogger(keeper.out, name="tensorboard", version="")
    several = how.get("devices", 1) not in {1, "1"} or how.get("num_nodes", 1) > 1
    with quiet_lightning(), torch.random.fork_rng(devices=[]), interruptible(keeper):
        with settings_blamed(f"precision {recipe.precision}, {', '.join(f'{k} {v}' for k, v in how.items())}"):
            trainer = pl.Trainer(
                **how,
                strategy="ddp_find_unused_parameters_true" if several else "auto",
                max_epochs=recipe.epochs,
                precision=recipe.precision,  # type: ignore[arg-type]
                accumulate_grad_batches=parts,
                logger=logger,
                callbacks=[keeper],
                plugins=[PlainCheckpoints()],
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                use_distributed_sampler=False,
                default_root_dir=state,
            )
        micro = max(1, recipe.batch // trainer.world_size // parts)
        order = Drawn(splits.train, recipe, trainer.global_rank, trainer.world_size)
        train = loader_of(Shown(splits.train, net.preprocess, recipe), recipe, micro, order)
        looked = None if splits.validation is None else loader_of(Looked(splits.validation, net), recipe, micro)
        kept = state / CHECKPOINT
        try:
            trainer.fit(fitting, train, looked, ckpt_path=str(kept) if kept.exists() else None)
        finally:
            for aid in fitting.aids:
                aid.release()  # type: ignore[operator]
    fitting.cpu()
    net.network.load_state_dict(fitting.average.state_dict())
    for key, tensor in net.network.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(dtypes[key])


@contextmanager
def interruptible(keeper: "Keeper") -> Iterator[None]:
    """Ctrl-C stays what it is: Lightning makes an exit of it, and lets nobody press it again."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        if keeper.interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """A while in which Lightning does not advise."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", module=r"torch\.optim\.lr_scheduler")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


class Looked(TorchDataset[Any]):
    """Pictures as the network sees them when it is asked, and what they show."""

    def __init__(self, pictures: Pictures, net: Classifier) -> None:
        self.pictures, self.preprocess, self.targets = pictures, net.preprocess, pictures.targets()

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Any:
        return self.preprocess(self.pictures.photo(index))[0], self.targets[index]


def loader_of(data: TorchDataset[Any], recipe: Recipe, batch: int, sampler: Any = None) -> DataLoader[Any]:
    """Batches of so many, in the sampler's order."""
    workers = recipe.workers
    if workers < 0:
        cores = os.cpu_count() or 1
        workers = 0 if cores <= 2 else min(8, cores - 1)
    short = sampler is not None and len(sampler) >= batch  # an odd last batch is too small for its statistics
    return DataLoader(
        data,
        batch,
        sampler=sampler,
        num_workers=workers,
        drop_last=short,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


class Keeper(pl.Callback):
    """What is known of each epoch, the best one, and the state to go on from.

    Attributes:
        rows: metrics, one an epoch.
        best: what it is best in, and the epoch; -1 for what was there before the first.
        interrupted: whether somebody pressed Ctrl-C.
    """

    def __init__(self, net: Classifier, recipe: Recipe, out: Path, watch: Watch) -> None:
        self.net, self.recipe, self.out, self.watch = net, recipe, out, watch
        self.rows: list[dict[str, Any]] = []
        self.best: tuple[float, int] | None = None
        self.interrupted = False
        self.losses: list[float] = []
        self.saved = time.monotonic()

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"rows": self.rows, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        self.rows, self.best = state_dict["rows"], state_dict["best"]

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Remember whether it was somebody at the keyboard."""
        self.interrupted = isinstance(exception, KeyboardInterrupt)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """A training that had stopped by itself does not go on."""
        trainer.should_stop = self._enough(len(self.rows))

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The loss is kept, and somebody is told."""
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        self.losses.append(float(loss) * trainer.accumulate_grad_batches)
        steps = int(trainer.num_training_batches)
        done = trainer.current_epoch * steps + batch_idx + 1
        self.watch("training", done, self.recipe.epochs * steps)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Measure, keep the best, write down the state."""
        epoch = trainer.current_epoch
        broken = next((key for key, t in module.network.state_dict().items() if not t.isfinite().all()), None)
        if broken is not None:
            raise TrainingError(
                f"{broken} is no number at the end of epoch {epoch}; a smaller lr may help, in another run"
            )
        row: dict[str, Any] = {
            "phase": "full",
            "epoch": epoch,
            "lr": max(group["lr"] for group in trainer.optimizers[0].param_groups),
            "loss": sum(self.losses) / max(1, len(self.losses)),
        }
        self.losses.clear()
        if module.seen:
            logits, targets = (torch.cat(parts) for parts in zip(*module.seen, strict=True))
            module.seen.clear()
            row["validation"] = measured(logits, targets, self.net.activation)
        if self.recipe.select == "localization":
            row["localization"] = self._located(module.average)
        self.rows.append(row)
        chosen = self._chosen(row)
        if chosen is not None and chosen == chosen and (self.best is None or chosen > self.best[0]):
            self.best = (chosen, epoch)
            if trainer.is_global_zero:
                write_weights(self.out / STATE / BEST.format(epoch), module.average.state_dict())
        trainer.should_stop = trainer.should_stop or self._enough(epoch + 1)
        if trainer.logger is not None:
            trainer.logger.log_metrics({k: v for k, v in row.items() if not isinstance(v, str)}, epoch)
        last = trainer.should_stop or epoch + 1 == self.recipe.epochs
        # clocks differ, and all devices write together
        if trainer.strategy.broadcast(last or time.monotonic() - self.saved > SAVED_EVERY):
            self._keep(trainer)

    def _keep(self, trainer: pl.Trainer) -> None:
        """The state, and of the best epochs the one that it names."""
        state = self.out / STATE
        trainer.save_checkpoint(state / CHECKPOINT)
        self.saved = time.monotonic()
        if not trainer.is_global_zero:
            return
        write_metrics(self.out / METRICS, self.rows)
        for file in state.glob(BEST.format("*")):
            if self.best is None or file.name != BEST.format(self.best[1]):
                file.unlink()

    def _chosen(self, row: Mapping[str, Any]) -> float | None:
        """What the best epoch is best in."""
        found: float | None = row.get("localization", row.get("validation"))
        return found

    def _enough(self, epochs: int) -> bool:
        patience = self.recipe.patience
        return bool(patience and self.best is not None and epochs - 1 - self.best[1] >= patience)

    @cached_property
    def _boxed(self) -> Dataset:
        return open_dataset(str(self.recipe.boxes))

    def _located(self, network: torch.nn.Module) -> float:
        """MaxBoxAccV2 on the boxed set, of the network as it would be saved."""
        net, method = copy(self.net), self.recipe.methods[0]
        net.network = network
        found = evaluate(net, self._boxed, plan_of([method], baselines=False)).where(method)
        if "MaxBoxAccV2" not in found:
            raise DataError(f"{self.recipe.boxes}: it has no boxes to choose the epoch by")
        return round(float(found["MaxBoxAccV2"].value), 6)
