"""The commands that look inside a model, or at a data set through one: inspect, patches, groups."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from whatwhere.apps.console import (
    BatchOption,
    DeviceOption,
    LayerOption,
    MethodOption,
    ModelArgument,
    WeightsOption,
    complain,
    errors_said,
    files_in,
    progress_of,
    stderr,
    stdout,
)
from whatwhere.apps.memory import keep_freed_memory
from whatwhere.errors import DataError, InputError

if TYPE_CHECKING:
    from whatwhere.classifiers.classifier import Classifier
    from whatwhere.datasets.sample import Dataset
    from whatwhere.images import Photo

MANY = 20
"""Classes that are shown where nothing says which."""

app = typer.Typer()


@app.command()
def inspect(
    model: ModelArgument,
    photos: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PHOTO...]", help="Image files, or folders of them, to follow through the network."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="A data set in which each unit's best patches are found.")] = None,
    split: Annotated[str | None, typer.Option(help="Of that. \\[default: train, where there is one]")] = None,
    layout: Annotated[str | None, typer.Option(help="Of that, where its files do not say it.")] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="As words, with commas. \\[default: those of the data, or the first 20]"),
    ] = None,
    layer: LayerOption = None,
    words: Annotated[int, typer.Option(min=1, help="Units of each class.")] = 5,
    count: Annotated[int, typer.Option(min=1, help="Patches of each unit.")] = 4,
    pictures: Annotated[
        int, typer.Option(min=0, help="Pictures of the data, or photos, that are shifted, resized, turned and lit.")
    ] = 8,
    out: Annotated[Path, typer.Option(help="Folder for index.html and stability.csv.")] = Path("inspection"),
    batch: BatchOption = 16,
    device: DeviceOption = None,
) -> None:
    """Show what a model is made of and looks for, how a photo goes through it, and what it says when that changes.

    Exit code 0; 1 where some image cannot be read (each is named on stderr); 2 for wrong usage.
    """
    with errors_said():
        import whatwhere
        from whatwhere.inspection.words import dictionary
        from whatwhere.reports.inspection import write_inspection
        from whatwhere.training.data import training_set

        keep_freed_memory()
        net = whatwhere.load(model, layer=layer, device=device)
        files, failed, found = list(files_in(photos or [], out)), list[Exception](), None
        if data is not None:
            dataset = training_set(data, split, layout)
            labels = _shown(net, dataset, classes)
            with progress_of(len(dataset)) as progress:
                task = progress.add_task("looking", total=len(dataset))
                seen = dictionary(
                    net,
                    dataset,
                    labels,
                    words=words,
                    count=count,
                    batch=batch,
                    seen=lambda done, total: progress.update(task, completed=done),
                )
            failed += [DataError(why) for why in seen.failed.values()]
            found = seen, dataset
        some = _sampled(found[1], pictures) if found else islice(_opened(files, []), pictures)
        page = write_inspection(net, out, _opened(files, failed), found, list(some), batch=batch)
        for error in failed:
            complain("failed", error)
        stderr.print(f"written to {escape(str(page))}", highlight=False, soft_wrap=True)
    raise typer.Exit(1 if failed else 0)


def _sampled(dataset: "Dataset", count: int) -> "Iterator[Photo]":
    """Some pictures of a data set; those that cannot be read have been said."""
    for sample in dataset.sampled(count) if count else ():
        with suppress(DataError):
            yield sample.photo()


def _shown(net: "Classifier", dataset: "Dataset", classes: str | None) -> list[int]:
    """The classes that are named, or those of the data, or the first."""
    if classes is not None:
        return [net.labels.find(name.strip()) for name in classes.split(",") if name.strip()]
    try:
        return sorted(set(dataset.indices_in(net.labels).values()))
    except InputError:
        return list(range(min(MANY, len(net.labels))))


@app.command()
def patches(
    model: Annotated[str, typer.Argument(metavar="RUN", help="A run with a filter bank: --set head.filters=10.")],
    photos: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PHOTO...]", help="Image files, or folders of them, for which it is said what decided."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Where the patches are looked for. \\[default: what the run was trained on]")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of that. \\[default: train, where there is one]")] = None,
    layout: Annotated[str | None, typer.Option(help="Of that, where its files do not say it.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Patches of each filter.")] = 4,
    out: Annotated[Path, typer.Option(help="Folder for index.html and patches.json.")] = Path("patches"),
    batch: BatchOption = 16,
    device: DeviceOption = None,
) -> None:
    """Show the patches that a filter bank looks for, class by class, and those that decided in some photos.

    Exit code 0; 1 where some image cannot be read (each is named on stderr); 2 for wrong usage.
    """
    with errors_said():
        import whatwhere
        from whatwhere.inspection.patches import bank_of, best_patches, field_of
        from whatwhere.reports.patches import write_patches
        from whatwhere.training.data import training_set

        keep_freed_memory()
        net = whatwhere.load(model, device=device)
        network, files, failed = bank_of(net), list(files_in(photos or [], out)), list[Exception]()
        root, its_split, its_layout = _trained_on(model, net.about) if data is None else (data, None, None)
        dataset = training_set(root, split or its_split, layout or its_layout)
        field = field_of(net, network.read, dataset)
        with progress_of(len(dataset)) as progress:
            task = progress.add_task("looking", total=len(dataset))
            best = best_patches(
                net,
                dataset,
                network.responses,
                field,
                count=count,
                batch=batch,
                seen=lambda done, total: progress.update(task, completed=done),
            )
        failed += [DataError(why) for why in best.failed.values()]
        page = write_patches(net, dataset, best, field, out, _opened(files, failed))
        for error in failed:
            complain("failed", error)
        stderr.print(f"written to {escape(str(page))}", highlight=False, soft_wrap=True)
    raise typer.Exit(1 if failed else 0)


@app.command()
def groups(
    model: ModelArgument,
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A folder of classes, or COCO, VOC, YOLO, ...: a folder or a file.")
    ],
    split: Annotated[
        list[str] | None, typer.Option(help="As the data set calls it; may be given several times. \\[default: all]")
    ] = None,
    layout: Annotated[str | None, typer.Option(help="Of the data set, where its files do not say it.")] = None,
    mapping: Annotated[
        Path | None, typer.Option("--map", help="CSV with the data set's classes and the model's. Has a first row.")
    ] = None,
    method: MethodOption = "gradcam",
    by: Annotated[str, typer.Option(help="kmeans, or hdbscan, which leaves pictures out.")] = "kmeans",
    seeds: Annotated[
        Path | None,
        typer.Option(
            help="CSV with pictures, as groups.csv names them, and their groups, for kmeans. Has a first row."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for index.html and groups.csv.")] = Path("groups"),
    layer: LayerOption = None,
    weights: WeightsOption = None,
    batch: BatchOption = 16,
    device: DeviceOption = None,
) -> None:
    """Look through labelled pictures: labels to doubt, near-duplicates, and the groups in each class.

    The model's classes need not be those of the pictures. Needs the extra classic.

    Exit code 0; 1 where some image cannot be read (each is named on stderr); 2 for wrong usage.
    """
    with errors_said():
        import whatwhere
        from whatwhere.curation.groups import find_groups
        from whatwhere.datasets import open_splits, read_mapping, read_pairs
        from whatwhere.reports.groups import doubted_of, write_groups

        keep_freed_memory()
        net = whatwhere.load(model, layer=layer, weights=weights, device=device)
        dataset = open_splits(data, split or (), layout)
        with progress_of(len(dataset)) as progress:
            task = progress.add_task("looking", total=len(dataset))
            found = find_groups(
                net,
                dataset,
                method=method,
                mapping=read_mapping(mapping) if mapping else None,
                by=by,
                seeds=read_pairs(seeds, "a picture and its group") if seeds else None,
                seed=seed,
                batch=batch,
                seen=lambda done, total: progress.update(task, completed=done),
            )
        page = write_groups(found, out, model=net.name, data=dataset.name)
        doubted, pooled = doubted_of(found), found.pooled
        table = Table(box=None, pad_edge=False)
        for name in ("picture", "label", "likelier", "doubt"):
            table.add_column(name, justify="right" if name == "doubt" else "left", overflow="fold")
        for entry in doubted[:10]:
            sample, words = (
                pooled.samples[pooled.pictures[entry]],
                (pooled.labels[entry], found.doubts.likelier[entry]),
            )
            named = [escape(pooled.classes[one]) for one in words]
            table.add_row(escape(sample.name), *named, f"{found.doubts.doubt[entry]:.2f}")
        if doubted:
            stdout.print(table)
        several = sum(len(one.names) > 1 for one in found.groupings)
        stderr.print(
            f"{len(doubted)} labels to doubt, {len(found.pairs)} pairs of near-duplicates, "
            f"{several} of {len(found.groupings)} classes in several groups",
            highlight=False,
        )
        for why in pooled.failed.values():
            complain("failed", DataError(why))
        stderr.print(f"written to {escape(str(page))}", highlight=False, soft_wrap=True)
    raise typer.Exit(1 if pooled.failed else 0)


def _trained_on(model: str, about: dict[str, Any]) -> tuple[Path, str | None, str | None]:
    """Root, split and layout of what a run was trained on."""
    data, training = about.get("data", {}), about.get("training", {})
    root = data.get("root")
    if root is None or not Path(root).exists():
        raise InputError(f"{model}: what it was trained on is not at {root}; say with --data where pictures are")
    return Path(root), training.get("split"), data.get("layout")


def _opened(files: Iterable[str], failed: list[Exception]) -> "Iterator[Photo]":
    from whatwhere.images import open_photo

    for file in files:
        try:
            yield open_photo(file)
        except DataError as error:
            failed.append(error)
