"""The commands that make models: train, distill, ensemble."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import TaskID

from whatwhere.apps.console import complain, errors_said, progress_of, stderr, stdout
from whatwhere.apps.memory import keep_freed_memory
from whatwhere.errors import DataError, InputError

app = typer.Typer()


@app.command()
def train(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Labelled pictures: \\[split/]class/file, or any layout.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the run, which every command takes as --model.")] = Path(
        "run"
    ),
    model: Annotated[
        str | None, typer.Option(help="What to begin with. \\[default: efficientnet-lite0, embedded]")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Train all of the network, not only what is behind it; needs Lightning.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help="TOML with what differs from the defaults; a run's run.toml.")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="One such thing: epochs=5, head.pool=max.")
    ] = None,
    boxes: Annotated[
        Path | None, typer.Option(help="A data set with boxes, on which the threshold is chosen.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything that is drawn.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in --out.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at unreadable images, empty classes, duplicates.")
    ] = False,
    layout: Annotated[str | None, typer.Option(help="Of the data set, where its files do not say it.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    devices: Annotated[int, typer.Option(min=1, help="So many of them.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
) -> None:
    """Train a classifier from labels alone, and save it as a run.

    Without --full only the last layer is fitted, and a filter bank beside it if there is one, on features that are
    computed once: minutes on a laptop.

    Exit code 0; 1 for bad data or a training that cannot go on; 2 for wrong usage; 130 when interrupted.
    """
    with errors_said():
        from whatwhere.training.fit import train as fitted
        from whatwhere.training.folder import rank
        from whatwhere.training.recipe import Recipe, read_recipe, with_settings

        keep_freed_memory()
        given: dict[str, Any] = {"model": model, "seed": seed, "boxes": str(boxes) if boxes else None}
        given = {name: value for name, value in given.items() if value is not None} | (
            {"mode": "full"} if full else {}
        )
        recipe: Recipe | None = None
        if not resume or config is not None or setting or given:
            recipe = with_settings(read_recipe(config) if config is not None else Recipe(), setting or [], **given)
        watch = Progressing()
        try:
            with watch.progress:
                net = fitted(
                    folder,
                    out,
                    recipe,
                    layout=layout,
                    resume=resume,
                    strict=strict,
                    devices=devices,
                    accelerator=device,
                    nodes=nodes,
                    watch=watch,
                )
        except KeyboardInterrupt:
            stderr.print(f"interrupted; --resume --out {escape(str(out))} goes on", highlight=False, soft_wrap=True)
            raise typer.Exit(130) from None
    if rank():  # one of several processes says it
        return
    measured = net.about.get("measured", {})
    for name, value in measured.items():
        if name in _SAID or name.endswith(("MaxBoxAccV2", "PxAP")):
            stdout.print(f"{name}: {value if isinstance(value, str) else f'{100 * value:.1f}'}", highlight=False)
    for method, share in net.thresholds.items():
        stdout.print(f"threshold of {method}: {share:.3f} of a map's maximum", highlight=False)
    stderr.print(f"saved to {escape(str(out))}", highlight=False, soft_wrap=True)


@app.command()
def distill(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run, or as --model of the others.")],
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="Labelled pictures like those it is for; boxes are not looked at.")
    ],
    to: Annotated[
        Path | None, typer.Option(help="Folder for the model with its head. \\[default: the run itself]")
    ] = None,
    preset: Annotated[str, typer.Option(help="What it learns from: balanced or best.")] = "best",
    split: Annotated[str | None, typer.Option(help="As the data set calls it. \\[default: train, or all]")] = None,
    layout: Annotated[str | None, typer.Option(help="Of the data set, where its files do not say it.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="So many images only, always the same.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="How often it sees all pictures.")] = 40,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps.")] = None,
) -> None:
    """Teach a small head what a slow preset finds; --method distilled then gives it for one look.

    The model itself stays as it is. Exit code 0; 1 for bad data; 2 for wrong usage.
    """
    with errors_said():
        import whatwhere
        from whatwhere.classifiers.saved import RUN, check_no_other
        from whatwhere.datasets import open_splits
        from whatwhere.reports.card import write_card
        from whatwhere.training.distill import distill as taught

        keep_freed_memory()
        if to is None and not Path(model, RUN).exists():
            raise InputError(f"{model} is no run that could be written to; say with --to where it goes")
        out = to or Path(model)
        net = whatwhere.load(model, device=device)
        check_no_other(net, out)
        dataset = _unboxed(data, split, layout, open_splits)
        dataset = dataset if images is None else dataset.sampled(images)
        watch = Progressing()
        with watch.progress:
            found = taught(net, dataset, preset=preset, epochs=epochs, seed=seed, folder=out, seen=watch)
        whatwhere.save(net, out)
        write_card(net, out)
        for why in found.failed.values():
            complain("left out", DataError(why))
        stdout.print(f"learned from {found.pictures} pictures of {escape(dataset.name)}", highlight=False)
        stdout.print(f"agrees with {preset}: mean IoU of masks {100 * found.agreement:.1f}", highlight=False)
        share = net.thresholds["distilled"]
        stdout.print(f"threshold of distilled: {share:.3f} of a map's maximum", highlight=False)
        stderr.print(f"saved to {escape(str(out))}", highlight=False, soft_wrap=True)


def _unboxed(data: Path, split: str | None, layout: str | None, opened: Any) -> Any:
    """The split that is asked for, or else what is trained on, or all there is."""
    try:
        return opened(data, (split or "train",), layout)
    except InputError:
        if split is not None:
            raise
        return opened(data, (), layout)


@app.command()
def ensemble(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Runs of the same classes, as --model of the others.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the run that they are together.")],
) -> None:
    """Make one model of several, whose logits and class maps are the means of theirs."""
    with errors_said():
        import whatwhere
        from whatwhere.classifiers.ensemble import ensemble as together
        from whatwhere.classifiers.saved import RUN
        from whatwhere.reports.card import write_card

        if (out / RUN).exists():
            raise InputError(f"{out} holds a run already; choose another folder")
        net = together([whatwhere.load(model) for model in models])
        whatwhere.save(net, out)
        write_card(net, out)
        stderr.print(f"saved to {escape(str(out))}", highlight=False, soft_wrap=True)


_SAID = ("on", "top-1", "top-5", "mAP")


class Progressing:
    """A bar for each thing that is done, one after another; news above them."""

    def __init__(self) -> None:
        self.progress = progress_of(2)
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """As a training tells it."""
        if total == 0:
            self.progress.console.print(f"[yellow]note[/] {escape(what)}", highlight=False, soft_wrap=True)
            return
        if what not in self.tasks:
            for task in self.tasks.values():
                self.progress.update(task, visible=False)
            self.tasks[what] = self.progress.add_task(what, total=total)
        self.progress.update(self.tasks[what], completed=done, total=total)
