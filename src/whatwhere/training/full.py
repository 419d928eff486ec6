"""Full mode: Lightning's loop around a network, with what it goes on from and the best of it kept."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from whatwhere.classifiers.classifier import Classifier
from whatwhere.datasets import open_dataset
from whatwhere.errors import DataError
from whatwhere.evaluation.evaluate import evaluate, plan_of
from whatwhere.files import aside
from whatwhere.training.checkpoints import PlainCheckpoints
from whatwhere.training.data import Drawn, Pictures, Shown, Splits
from whatwhere.training.fit import METRICS, STATE, Watch, quiet_lightning, write_metrics
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
    *,
    devices: int | str = "auto",
    accelerator: str = "auto",
    nodes: int = 1,
    watch: Watch = lambda what, done, total: None,
) -> list[dict[str, Any]]:
    """Train all of a classifier's network, in place; rows of metrics, one an epoch.

    Where memory does not suffice, batches go through in halves, whose gradients are summed.

    Raises:
        TrainingError: the loss is no number.
    """
    state = out / STATE
    begun = {key: tensor.clone() for key, tensor in net.network.state_dict().items()}
    parts = 1
    while True:
        try:
            return _attempt(net, recipe, splits, out, state, parts, devices, accelerator, nodes, watch)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error) or parts * 2 > recipe.batch:
                raise
        parts *= 2
        watch(f"out of memory: batches of {recipe.batch} go through in {parts} parts", 0, 0)
        net.network.zero_grad(set_to_none=True)
        net.network.load_state_dict(begun)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _out_of_memory(error: BaseException) -> bool:
    words = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in words


def _attempt(
    net: Classifier,
    recipe: Recipe,
    splits: Splits,
    out: Path,
    state: Path,
    parts: int,
    devices: int | str,
    accelerator: str,
    nodes: int,
    watch: Watch,
) -> list[dict[str, Any]]:
    net.network.to(memory_format=torch.channels_last)
    fitting = Fitting(net, recipe, prior_of(splits.train.targets(), net.activation))
    keeper = Keeper(net, recipe, out, watch)
    logger: Any = False
    if recipe.log == "tensorboard":
        from lightning.pytorch.loggers import TensorBoardLogger

        logger = TensorBoardLogger(out, name="tensorboard", version="")
    with quiet_lightning(), torch.random.fork_rng(devices=[]):
        trainer = pl.Trainer(
            max_epochs=recipe.epochs,
            accelerator=accelerator,
            devices=devices,
            num_nodes=nodes,
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
        train = _loader(
            Shown(splits.train, net.preprocess, recipe),
            recipe,
            micro,
            Drawn(splits.train, recipe, trainer.global_rank, trainer.world_size),
        )
        held = None if splits.validation is None else _loader(Looked(splits.validation, net), recipe, micro)
        kept = state / CHECKPOINT
        trainer.fit(fitting, train, held, ckpt_path=str(kept) if kept.exists() else None)
    net.network.load_state_dict(fitting.average.state_dict())
    if keeper.best is not None and trainer.is_global_zero:
        net.network.load_state_dict(load_file(state / BEST.format(keeper.best[1])))
    net.network.requires_grad_(True).eval().to(memory_format=torch.contiguous_format)
    return keeper.rows


class Looked(TorchDataset[Any]):
    """Pictures as the network sees them when it is asked, and what they show."""

    def __init__(self, pictures: Pictures, net: Classifier) -> None:
        self.pictures, self.preprocess, self.targets = pictures, net.preprocess, pictures.targets()

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Any:
        return self.preprocess(self.pictures.photo(index))[0], self.targets[index]


def _loader(data: TorchDataset[Any], recipe: Recipe, batch: int, sampler: Any = None) -> DataLoader[Any]:
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
    """What is known of each epoch, the best one, and the state to go on from."""

    def __init__(self, net: Classifier, recipe: Recipe, out: Path, watch: Watch) -> None:
        self.net, self.recipe, self.out, self.watch = net, recipe, out, watch
        self.rows: list[dict[str, Any]] = []
        self.best: tuple[float, int] | None = None
        self.losses: list[float] = []
        self.saved = time.monotonic()

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"rows": self.rows, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        self.rows, self.best = state_dict["rows"], state_dict["best"]

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
            row["localization"] = self._located(module)
        chosen = self._chosen(row)
        self.rows.append(row)
        state = self.out / STATE
        if trainer.is_global_zero and chosen is not None and (self.best is None or chosen > self.best[0]):
            self.best = (chosen, epoch)
            weights = {key: t.detach().cpu().contiguous() for key, t in module.average.state_dict().items()}
            with aside(state / BEST.format(epoch)) as file:
                save_file(weights, file)
        trainer.should_stop = trainer.should_stop or self._enough(epoch + 1)
        if trainer.logger is not None:
            trainer.logger.log_metrics({k: v for k, v in row.items() if not isinstance(v, str)}, epoch)
        if trainer.is_global_zero:
            write_metrics(self.out / METRICS, self.rows)
        last = trainer.should_stop or epoch + 1 == self.recipe.epochs
        if last or time.monotonic() - self.saved > SAVED_EVERY:
            trainer.save_checkpoint(state / CHECKPOINT)
            self.saved = time.monotonic()
            for file in state.glob(BEST.format("*")) if trainer.is_global_zero else ():
                if self.best is None or file.name != BEST.format(self.best[1]):
                    file.unlink()

    def _chosen(self, row: Mapping[str, Any]) -> float | None:
        """What the best epoch is best in."""
        found: float | None = row.get("localization", row.get("validation"))
        return found

    def _enough(self, epochs: int) -> bool:
        patience = self.recipe.patience
        return bool(patience and self.best is not None and epochs - 1 - self.best[1] >= patience)

    def _located(self, module: Any) -> float:
        """MaxBoxAccV2 on the boxed set, of the network as it would be saved."""
        mine = {key: t.detach().clone() for key, t in self.net.network.state_dict().items()}
        self.net.network.load_state_dict(module.average.state_dict())
        method = self.recipe.methods[0]
        found = evaluate(self.net, open_dataset(str(self.recipe.boxes)), plan_of([method], baselines=False)).where(
            method
        )
        self.net.network.load_state_dict(mine)
        if "MaxBoxAccV2" not in found:
            raise DataError(f"{self.recipe.boxes}: it has no boxes to choose the epoch by")
        return round(float(found["MaxBoxAccV2"].value), 6)
