"""The commands that measure: evaluate, compare, calibrate, report."""

from pathlib import Path
from typing import Annotated, Any

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
    progress_of,
    stderr,
    stdout,
)
from whatwhere.apps.memory import keep_freed_memory
from whatwhere.errors import DataError, InputError

app = typer.Typer()
DataArgument = Annotated[
    Path, typer.Argument(metavar="DATA", help="A folder of classes, or COCO, VOC, YOLO, ...: a folder or a file.")
]
SplitOption = Annotated[str | None, typer.Option(help="As the data set calls it. \\[default: test, or else val]")]
LayoutOption = Annotated[str | None, typer.Option(help="Of the data set, where its files do not say it.")]
MapOption = Annotated[
    Path | None,
    typer.Option("--map", help="CSV with the data set's classes and the model's: name or index. Has a first row."),
]
ImagesOption = Annotated[int | None, typer.Option(min=1, help="So many images only, always the same.")]
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
    fail_under: Annotated[
        list[str] | None,
        typer.Option("--fail-under", metavar="NAME=NUMBER", help="maxboxaccv2=60, say; for a gate on models."),
    ] = None,
) -> None:
    """Measure what a model says and whether where it sees that is true; a table, and a page with --out.

    Exit code 0; 1 where some image failed (each is named on stderr, the others are counted); 2 for wrong usage; 3
    where a number is below what --fail-under asks for.
    """
    asked = _asked(model, data, split, layout, mapping, images, layer, weights, device)
    options = {"protocol": protocol, "faithful": faithful, "batch": batch}
    with errors_said():
        from whatwhere.reports.evaluation import below, bounds_of

        bounds = bounds_of(fail_under or [])
        if bounds and shard is not None:
            raise InputError("bounds are for all of a data set; ask for them without --shard")
        evaluation = _evaluate(asked, [method], options, out, shard)
        missed = [] if evaluation is None else below(evaluation, bounds)
        for line in missed:
            stderr.print(f"[red]below[/] {escape(line)}", highlight=False, soft_wrap=True)
    raise typer.Exit(3 if missed else _failures(evaluation))


def _failures(evaluation: Any) -> int:
    return 1 if evaluation is not None and evaluation.failed else 0


@app.command()
def compare(
    model: ModelArgument,
    data: DataArgument,
    methods: Annotated[
        str,
        typer.Option(help="Names with commas between them; or all, less those that do not apply."),
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
    asked = _asked(model, data, split, layout, mapping, images, layer, weights, device)
    options = {"protocol": protocol, "faithful": faithful, "batch": batch}
    names = _names_in(methods)
    with errors_said():
        evaluation = _evaluate(asked, names, options, out, shard)
    raise typer.Exit(_failures(evaluation))


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
    with errors_said():
        import whatwhere
        from whatwhere.classifiers.saved import check_no_other
        from whatwhere.evaluation.run import calibrate as chosen
        from whatwhere.reports.card import write_card

        keep_freed_memory()
        net, dataset, known = _loaded(_asked(model, data, split, layout, mapping, images, layer, weights, device))
        check_no_other(net, to)
        found = chosen(net, dataset, _names_in(methods), batch=batch, mapping=known)
        whatwhere.save(net, to)
        write_card(net, to)
        stderr.print(f"chosen on {escape(dataset.name)}; measure on other images", highlight=False, soft_wrap=True)
        for name, share in found.items():
            stdout.print(f"{name}: {share:.3f} of a map's maximum", highlight=False)
        stderr.print(f"saved to {escape(str(to))}", highlight=False, soft_wrap=True)


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Of --out, with one evaluation or all its shards.")
    ],
    device: DeviceOption = None,
) -> None:
    """Add the shards of an evaluation, and write its table and page."""
    with errors_said():
        from whatwhere.evaluation.run import gathered

        keep_freed_memory()
        evaluation = gathered(folder)
        if "asked" not in evaluation.settings:
            raise InputError(
                f"{folder}: this evaluation was not made by the command; use write_evaluation from Python"
            )
        net, dataset, _ = _loaded(evaluation.settings["asked"] | {"device": device})
        _reported(evaluation, net, dataset, folder)


def _asked(
    model: str,
    data: Path,
    split: str | None,
    layout: str | None,
    mapping: Path | None,
    images: int | None,
    layer: str | None,
    weights: Path | None,
    device: str | None,
) -> dict[str, Any]:
    """What makes the classifier and the data set, as plain data that holds in any folder."""
    asked = {
        "model": Path(model) if Path(model).exists() else model,
        "data": data,
        "layer": layer,
        "weights": weights,
        "device": device,
        "split": split,
        "layout": layout,
        "mapping": mapping,
        "images": images,
    }
    return {key: str(value.resolve()) if isinstance(value, Path) else value for key, value in asked.items()}


def _evaluate(
    asked: dict[str, Any], methods: list[str], options: dict[str, Any], out: Path | None, shard: str | None
) -> Any:
    """Evaluate, print and write; the evaluation, or None of a shard without images."""
    from whatwhere.evaluation.evaluate import plan_of
    from whatwhere.evaluation.run import chunks_of, run

    keep_freed_memory()
    net, dataset, known = _loaded(asked)
    if methods == ["all"]:
        methods = _applying(net)
    plan = plan_of(methods, mapping=known, notes={"asked": asked}, **options)
    part = _shard(shard)
    evaluation = None
    chunks = len(chunks_of(dataset, part))
    with progress_of(chunks) as progress:
        task = progress.add_task("looking", total=chunks)
        for evaluation in run(net, dataset, plan, out, part):
            progress.update(task, completed=len(evaluation.chunks))
    if evaluation is None:
        stderr.print(f"there are no images in shard {shard}", highlight=False)
        return None
    if part[1] > 1 and out is not None:
        _name_failed(evaluation)
        stderr.print(
            f"part {shard} is in {escape(str(out))}; whatwhere report adds them", highlight=False, soft_wrap=True
        )
        return evaluation
    _reported(evaluation, net, dataset, out)
    return evaluation


def _loaded(asked: dict[str, Any]) -> tuple[Any, Any, dict[str, int | str] | None]:
    """The classifier and the data set of an evaluation, and how their classes go together."""
    import whatwhere
    from whatwhere.datasets import open_dataset, read_mapping

    net = whatwhere.load(asked["model"], **{key: asked[key] for key in ("layer", "weights", "device")})
    dataset = open_dataset(asked["data"], asked["split"], asked["layout"])
    known = read_mapping(Path(asked["mapping"])) if asked["mapping"] else None
    return net, dataset if asked["images"] is None else dataset.sampled(asked["images"]), known


def _applying(net: Any) -> list[str]:
    """The methods that give something on this network, tried on an image of noise; the others are named."""
    from whatwhere.classifiers.backbones import probe
    from whatwhere.errors import UnsupportedError
    from whatwhere.maps import METHODS
    from whatwhere.scores import top_class

    noise = probe(len(net.preprocess.mean), net.preprocess.size)
    trace, found = net.trace(noise.to(net.device)), []
    for name, method in METHODS.items():
        try:
            method(trace, top_class)
            found.append(name)
        except UnsupportedError as error:
            complain("left out", error)
    return found


def _names_in(methods: str) -> list[str]:
    return [name for part in methods.split(",") if (name := part.strip())]


def _shard(shard: str | None) -> tuple[int, int]:
    which, slash, of = (shard or "1/1").partition("/")
    if not (slash and which.isdecimal() and of.isdecimal() and int(of)):
        raise InputError(f"a shard is written 2/4, got {shard!r}")
    return int(which), int(of)


def _name_failed(evaluation: Any) -> None:
    for why in evaluation.failed.values():
        complain("failed", DataError(why))


def _reported(evaluation: Any, net: Any, dataset: Any, out: Path | None) -> None:
    """The table on stdout, failures on stderr, the page in the folder."""
    from whatwhere.evaluation.run import missing
    from whatwhere.reports.evaluation import columns_of, rows_of, said, write_evaluation

    _name_failed(evaluation)
    stderr.print(f"on {escape(dataset.name)}: {len(dataset)} images", highlight=False, soft_wrap=True)
    if evaluation.left_out:
        stderr.print(f"{evaluation.left_out} images show none of the model's classes", highlight=False)
    if parts := missing(evaluation):
        stderr.print(f"{parts} parts of the data set are not in it yet", highlight=False)
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
        stdout.print(f"{name}: {said(name, one, interval=True)}", highlight=False)
    if table.row_count:
        stdout.print(table)
    if evaluation.rows:
        first = rows[0][0]
        for one in [one for one in evaluation.shortcuts(first) if one.reasons][:10]:
            name = evaluation.settings["classes"][one.label]
            stderr.print(
                f"[yellow]shortcut?[/] {escape(name)}: {'; '.join(one.reasons)}", highlight=False, soft_wrap=True
            )
    if out is not None:
        page = write_evaluation(evaluation, net, dataset, out)
        stderr.print(f"written to {escape(str(page))}", highlight=False, soft_wrap=True)
