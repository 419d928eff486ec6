"""The command line. Nothing heavy is imported before a command runs."""

import io
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from whatwhere.apps.memory import keep_freed_memory
from whatwhere.errors import DataError, InputError, WhatWhereError

if TYPE_CHECKING:
    from whatwhere.explanation import Explanation

app = typer.Typer(
    help="What is in an image, and where: classes, evidence maps, boxes, from labels alone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_err = Console(stderr=True)
# a table that goes to a file or a pipe is not folded
_out = Console() if sys.stdout and sys.stdout.isatty() else Console(width=10_000)

ModelOption = Annotated[
    str,
    typer.Option(help="efficientnet-lite0 (embedded), timm/NAME, torchvision/NAME, or a saved run's folder."),
]
MethodOption = Annotated[str, typer.Option(help="A map method; [bold]whatwhere methods[/] lists them.")]


@app.command()
def explain(
    photos: Annotated[list[str], typer.Argument(metavar="PHOTO...", help="Image files, or folders of them.")],
    model: ModelOption = "efficientnet-lite0",
    method: MethodOption = "gradcam",
    target: Annotated[
        list[str] | None,
        typer.Option(help="A class by name or index, or top5. May be given several times. \\[default: top1]"),
    ] = None,
    threshold: Annotated[
        str | None, typer.Option(help="Of the map: a share of its maximum, otsu, or p90. \\[default: 0.25]")
    ] = None,
    layer: Annotated[str | None, typer.Option(help="Split the network after this layer instead.")] = None,
    weights: Annotated[Path | None, typer.Option(help="A file of weights of your own for the model.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for pictures and index.html.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines on stdout, one an explanation.")] = False,
    max_pixels: Annotated[
        int | None, typer.Option(help="Refuse images of more pixels than this. \\[default: 178956970]")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images that go through the network at once.")] = 16,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.")] = None,
) -> None:
    """Say what is in photos and where: class, probability, box in original pixels.

    Exit code 0; 1 where some image failed (each is named on stderr, the others are done); 2 for wrong usage.
    """
    with _errors_said():
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        files = list(_files(photos, out))
        options: dict[str, Any] = {
            "target": target or "top1",
            "method": method,
            "threshold": threshold,
            "batch": batch,
        }
        if max_pixels is not None:
            options["max_pixels"] = max_pixels
        loading = {"layer": layer, "weights": weights, "device": device}
        failed = _run(model, loading, files, options, out, as_json)
    raise typer.Exit(1 if failed else 0)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for pictures, photographs and index.html.")] = Path(
        "whatwhere-demo"
    ),
) -> None:
    """Look at the photographs that came with the install, and write pictures and a page."""
    from importlib.resources import as_file, files

    with _errors_said(), as_file(files("whatwhere") / "photos") as folder:
        (out / "photos").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "boxes.csv", out / "photos" / "boxes.csv")
        photos = [shutil.copyfile(photo, out / "photos" / photo.name) for photo in sorted(folder.glob("*.jpg"))]
        _run("efficientnet-lite0", {}, [str(photo) for photo in photos], {"target": "top1"}, out, as_json=False)


DataArgument = Annotated[
    Path, typer.Argument(metavar="DATA", help="A folder of classes, or COCO, VOC, YOLO, ...: a folder or a file.")
]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="As --model of [bold]whatwhere explain[/].")]
SplitOption = Annotated[str | None, typer.Option(help="As the data set calls it. \\[default: test, or else val]")]
LayoutOption = Annotated[str | None, typer.Option(help="Of the data set, where its files do not say it.")]
MapOption = Annotated[
    Path | None,
    typer.Option("--map", help="CSV with the data set's classes and the model's: name or index. Has a first row."),
]
ImagesOption = Annotated[int | None, typer.Option(min=1, help="So many images only, always the same.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Images that go through the network at once.")]
LayerOption = Annotated[str | None, typer.Option(help="Split the network after this layer instead.")]
WeightsOption = Annotated[Path | None, typer.Option(help="A file of weights of your own for the model.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.")]
OutOption = Annotated[
    Path | None, typer.Option(help="Folder for index.html and the numbers. What is done there is not done again.")
]
ProtocolOption = Annotated[str, typer.Option(help="half-open, or wsol2020: the WSOL benchmark's own rules.")]
FaithfulOption = Annotated[
    bool, typer.Option("--faithful", help="Insertion, deletion, ROAD, ...: hundreds of forwards an image.")
]


@app.command()
def evaluate(
    model: ModelArgument,
    data: DataArgument,
    method: MethodOption = "gradcam",
    protocol: ProtocolOption = "half-open",
    split: SplitOption = None,
    layout: LayoutOption = None,
    mapping: MapOption = None,
    images: ImagesOption = None,
    faithful: FaithfulOption = False,
    shard: Annotated[
        str | None, typer.Option(help="2/4 for the second of four parts; [bold]whatwhere report[/] adds them.")
    ] = None,
    out: OutOption = None,
    layer: LayerOption = None,
    weights: WeightsOption = None,
    batch: BatchOption = 16,
    device: DeviceOption = None,
) -> None:
    """Measure what a model says and whether where it sees that is true; a table, and a page with --out.

    Exit code 0; 1 where some image failed (each is named on stderr, the others are counted); 2 for wrong usage.
    """
    loading = {"layer": layer, "weights": weights, "device": device}
    which = {"split": split, "layout": layout, "mapping": mapping, "images": images}
    options = {"protocol": protocol, "faithful": faithful, "batch": batch}
    with _errors_said():
        failed = _evaluate(model, loading, data, which, [method], options, out, shard)
    raise typer.Exit(1 if failed else 0)


@app.command()
def compare(
    model: ModelArgument,
    data: DataArgument,
    methods: Annotated[
        str, typer.Option(help="Names with commas between them, or all; those that do not apply are left out.")
    ] = "gradcam,layercam,hirescam,eigencam",
    protocol: ProtocolOption = "half-open",
    split: SplitOption = None,
    layout: LayoutOption = None,
    mapping: MapOption = None,
    images: ImagesOption = None,
    faithful: FaithfulOption = False,
    shard: Annotated[str | None, typer.Option(help="As of [bold]whatwhere evaluate[/].")] = None,
    out: OutOption = None,
    layer: LayerOption = None,
    weights: WeightsOption = None,
    batch: BatchOption = 16,
    device: DeviceOption = None,
) -> None:
    """Measure several map methods beside one another, on the same look at every image, and how far they agree.

    Exit codes as of [bold]whatwhere evaluate[/].
    """
    loading = {"layer": layer, "weights": weights, "device": device}
    which = {"split": split, "layout": layout, "mapping": mapping, "images": images}
    options = {"protocol": protocol, "faithful": faithful, "batch": batch}
    names = ["all"] if methods.strip() == "all" else [name.strip() for name in methods.split(",")]
    with _errors_said():
        failed = _evaluate(model, loading, data, which, names, options, out, shard)
    raise typer.Exit(1 if failed else 0)


@app.command()
def calibrate(
    model: ModelArgument,
    data: DataArgument,
    to: Annotated[
        Path, typer.Option(help="Folder for the model with its thresholds; a saved run may be given again.")
    ],
    methods: Annotated[str, typer.Option(help="Names with commas between them.")] = "gradcam",
    split: SplitOption = None,
    layout: LayoutOption = None,
    mapping: MapOption = None,
    images: ImagesOption = None,
    layer: LayerOption = None,
    weights: WeightsOption = None,
    batch: BatchOption = 16,
    device: DeviceOption = None,
) -> None:
    """Choose the threshold of boxes and masks on a small set that has them, and save it with the model."""
    with _errors_said():
        import whatwhere
        from whatwhere.evaluation.run import calibrate as chosen

        keep_freed_memory()
        net = whatwhere.load(model, layer=layer, weights=weights, device=device)
        dataset, known = _dataset(data, {"split": split, "layout": layout, "mapping": mapping, "images": images})
        found = chosen(net, dataset, [name.strip() for name in methods.split(",")], batch=batch, mapping=known)
        whatwhere.save(net, to)
        for name, share in found.items():
            _out.print(f"{name}: {share:.3f} of a map's maximum", highlight=False)
        _err.print(f"saved to {escape(str(to))}", highlight=False, soft_wrap=True)


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Of --out, with one evaluation or all its shards.")
    ],
) -> None:
    """Add the shards of an evaluation, and write its table and page."""
    with _errors_said():
        from whatwhere.evaluation.run import gathered

        keep_freed_memory()
        evaluation = gathered(folder)
        net, dataset, _ = _loaded(evaluation.settings["asked"])
        _reported(evaluation, net, dataset, folder)


@app.command()
def methods() -> None:
    """List the map methods."""
    from whatwhere.maps import METHODS

    table = Table(box=None, pad_edge=False)
    table.add_column("method", style="bold")
    table.add_column("what it is")
    for name, function in METHODS.items():
        table.add_row(name, escape((function.__doc__ or "").splitlines()[0]))
    _out.print(table)


def _run(
    model: str,
    loading: dict[str, Any],
    files: list[str],
    options: dict[str, Any],
    out: Path | None,
    as_json: bool,
) -> int:
    """Explain the files, print and write what is found; how many failed."""
    import whatwhere
    from whatwhere.explanation import explain_each
    from whatwhere.reports.page import write_report

    keep_freed_memory()
    net = whatwhere.load(model, **loading)
    failures: list[DataError] = []
    table = Table(box=None, pad_edge=False)
    for name, justify in (
        ("image", "left"),
        ("what", "left"),
        ("probability", "right"),
        ("where: x0 y0 x1 y1", "right"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]

    def said(results: Iterable["list[Explanation] | DataError"]) -> Iterator["list[Explanation]"]:
        for result in results:
            if isinstance(result, DataError):
                failures.append(result)
                _complain("failed", result)
                continue
            for one in result:
                if as_json:
                    sys.stdout.write(json.dumps(one.to_dict()) + "\n")
                else:
                    where = " ".join(f"{edge:.0f}" for edge in one.box.to_list()) if one.box else "nowhere"
                    table.add_row(escape(one.source), escape(one.label), f"{one.probability:.1%}", where)
            yield result

    with _progress(len(files)) as progress:
        task = progress.add_task("looking", total=len(files))
        seen = said(_counted(explain_each(net, files, **options), progress, task))
        if out is None:
            for _ in seen:
                pass
        else:
            write_report(seen, out, net.name, keep=[Path(file) for file in files])
    if not as_json and table.row_count:
        _out.print(table)
    if out is not None:
        _err.print(f"written to {escape(str(out / 'index.html'))}", highlight=False, soft_wrap=True)
    return len(failures)


def _evaluate(
    model: str,
    loading: dict[str, Any],
    data: Path,
    which: dict[str, Any],
    methods: list[str],
    options: dict[str, Any],
    out: Path | None,
    shard: str | None,
) -> int:
    """Evaluate, print and write; how many images failed."""
    from whatwhere.evaluation.evaluate import CHUNK, plan_of
    from whatwhere.evaluation.run import run

    keep_freed_memory()
    asked = {"model": model, "data": str(data), **loading, **which}
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in asked.items()}
    net, dataset, known = _loaded(asked)
    if methods == ["all"]:
        methods = _applying(net)
    plan = plan_of(methods, mapping=known, notes={"asked": asked}, **options)
    part = _shard(shard)
    evaluation = None
    with _progress(-(-len(dataset) // CHUNK) // part[1]) as progress:
        task = progress.add_task("looking", total=-(-len(dataset) // CHUNK) // part[1])
        for evaluation in run(net, dataset, plan, out, part):
            progress.update(task, completed=len(evaluation.chunks))
    if evaluation is None:
        raise InputError(f"there are no images in shard {shard}")
    if part[1] > 1 and out is not None:
        _err.print(
            f"part {shard} is in {escape(str(out))}; whatwhere report adds them", highlight=False, soft_wrap=True
        )
        return len(evaluation.failed)
    _reported(evaluation, net, dataset, out)
    return len(evaluation.failed)


def _loaded(asked: dict[str, Any]) -> tuple[Any, Any, dict[str, int | str] | None]:
    """The classifier and the data set of an evaluation, and how their classes go together."""
    import whatwhere

    net = whatwhere.load(asked["model"], **{key: asked[key] for key in ("layer", "weights", "device")})
    dataset, known = _dataset(Path(asked["data"]), asked)
    return net, dataset, known


def _dataset(data: Path, which: dict[str, Any]) -> tuple[Any, dict[str, int | str] | None]:
    from whatwhere.datasets import open_dataset, read_mapping

    dataset = open_dataset(data, which["split"], which["layout"])
    known = read_mapping(Path(which["mapping"])) if which["mapping"] else None
    return dataset if which["images"] is None else dataset.sampled(which["images"]), known


def _applying(net: Any) -> list[str]:
    """The methods that give something on this network, tried on an image of noise; the others are named."""
    import torch

    from whatwhere.errors import UnsupportedError
    from whatwhere.maps import METHODS
    from whatwhere.scores import top_class

    noise = torch.randn(1, len(net.preprocess.mean), *net.preprocess.size, generator=torch.Generator().manual_seed(0))
    trace, found = net.trace(noise.to(net.device)), []
    for name, method in METHODS.items():
        try:
            method(trace, top_class)
            found.append(name)
        except UnsupportedError as error:
            _complain("left out", error)
    return found


def _shard(shard: str | None) -> tuple[int, int]:
    which, slash, of = (shard or "1/1").partition("/")
    if not (slash and which.isdecimal() and of.isdecimal()):
        raise InputError(f"a shard is written 2/4, got {shard!r}")
    return int(which), int(of)


def _reported(evaluation: Any, net: Any, dataset: Any, out: Path | None) -> None:
    """The table on stdout, failures on stderr, the page in the folder."""
    from whatwhere.evaluation.run import missing
    from whatwhere.reports.evaluation import columns_of, rows_of, said, write_evaluation

    for why in evaluation.failed.values():
        _complain("failed", DataError(why))
    if evaluation.left_out:
        _err.print(f"{evaluation.left_out} images show none of the model's classes", highlight=False)
    if parts := missing(evaluation):
        _err.print(f"{parts} parts of the data set are not in it yet", highlight=False)
    rows = rows_of(evaluation)
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name, _ in rows:
        table.add_column(name, justify="right")
    for column in columns_of(rows):
        table.add_row(column, *(said(column, found.get(column), interval=True) for _, found in rows))
    thresholds = [evaluation.threshold(name) for name, _ in rows]
    if any(one is not None for one in thresholds):
        table.add_row("threshold", *("" if one is None else f"{one:.3f}" for one in thresholds))
    for name, one in evaluation.classification.items():
        _out.print(f"{name}: {said(name, one, interval=True)}", highlight=False)
    if table.row_count:
        _out.print(table)
    if evaluation.rows:
        first = rows[0][0]
        for one in [one for one in evaluation.shortcuts(first) if one.reasons][:10]:
            name = evaluation.settings["classes"][one.label]
            _err.print(
                f"[yellow]shortcut?[/] {escape(name)}: {'; '.join(one.reasons)}", highlight=False, soft_wrap=True
            )
    if out is not None:
        page = write_evaluation(evaluation, net, dataset, out)
        _err.print(f"written to {escape(str(page))}", highlight=False, soft_wrap=True)


def _counted(results: Iterable[Any], progress: Progress, task: Any) -> Iterator[Any]:
    for result in results:
        yield result
        progress.advance(task)


def _progress(total: int) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=_err, transient=True, disable=total < 2 or not _err.is_terminal)


def _files(photos: list[str], out: Path | None) -> Iterator[str]:
    """The files named and those in the folders named, but not what we wrote ourselves."""
    from whatwhere.images import image_files, printable

    for photo in photos:
        if not photo:
            raise InputError("wanted the name of a photo or a folder, got an empty one")
        if not Path(photo).is_dir():
            yield photo
            continue
        found = image_files(Path(photo))
        if out is not None and Path(photo).resolve() in out.resolve().parents:
            found = [file for file in found if out.resolve() not in file.resolve().parents]
        if not found:
            raise DataError(f"{printable(photo)}: no image files in this folder")
        yield from map(str, found)


@contextmanager
def _errors_said() -> Iterator[None]:
    try:
        yield
    except WhatWhereError as error:
        _complain("error", error)
        raise typer.Exit(1 if isinstance(error, DataError) else 2) from None
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except OSError as error:  # of what is written; what is read has errors of its own
        _complain("error", error)
        raise typer.Exit(1) from None


def _complain(word: str, error: Exception) -> None:
    _err.print(f"[red]{word}[/] {escape(str(error))}", highlight=False, soft_wrap=True)


def main() -> None:
    """The ``whatwhere`` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may hold what the terminal's encoding does not
            stream.reconfigure(errors="backslashreplace")
    app()
