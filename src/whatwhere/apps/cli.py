"""The command line. Nothing heavy is imported before a command runs."""

import io
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

import whatwhere
from whatwhere.apps import annotating, exporting, inspecting, measuring, serving, training
from whatwhere.apps.console import (
    METHOD,
    BatchOption,
    DeviceOption,
    LayerOption,
    ModelOption,
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
    from whatwhere.explanation import Explanation

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _say_version(wanted: bool) -> bool:
    if wanted:
        print(f"whatwhere {whatwhere.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Say which version this is.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """What is in an image, and where: classes, evidence maps, boxes, from labels alone."""


@app.command()
def explain(
    photos: Annotated[list[str], typer.Argument(metavar="PHOTO...", help="Image files, or folders of them.")],
    model: ModelOption = "efficientnet-lite0",
    method: Annotated[str | None, typer.Option(help=f"{METHOD} \\[default: gradcam]")] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Instead of --method: fast, balanced or best; [bold]whatwhere methods[/] says more."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="A class by name or index, or top5. May be given several times. \\[default: top1]"),
    ] = None,
    threshold: Annotated[
        str | None,
        typer.Option(
            help="Of the map: a share of its maximum, otsu, or p90. \\[default: the model's, the preset's, or 0.25]"
        ),
    ] = None,
    layer: LayerOption = None,
    weights: WeightsOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder for pictures and index.html.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines on stdout, one an explanation.")] = False,
    max_pixels: Annotated[
        int | None, typer.Option(help="Refuse images of more pixels than this. \\[default: 178956970]")
    ] = None,
    batch: BatchOption = 16,
    device: DeviceOption = None,
) -> None:
    """Say what is in photos and where: class, probability, box in original pixels.

    Exit code 0; 1 where some image failed (each is named on stderr, the others are done); 2 for wrong usage.
    """
    with errors_said():
        if method is not None and preset is not None:
            raise InputError("wanted --method or --preset, got both")
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        files = list(files_in(photos, out))
        options: dict[str, Any] = {
            "target": target or "top1",
            "method": method or "gradcam",
            "preset": preset,
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

    with errors_said(), as_file(files("whatwhere") / "photos") as folder:
        (out / "photos").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "boxes.csv", out / "photos" / "boxes.csv")
        photos = [shutil.copyfile(photo, out / "photos" / photo.name) for photo in sorted(folder.glob("*.jpg"))]
        _run("efficientnet-lite0", {}, [str(photo) for photo in photos], {"target": "top1"}, out, as_json=False)


@app.command()
def methods() -> None:
    """List the map methods, and the presets, which any --method takes too."""
    from whatwhere.maps import METHODS
    from whatwhere.presets import PRESETS

    table = Table(box=None, pad_edge=False)
    table.add_column("method", style="bold")
    table.add_column("what it is")
    for name, function in METHODS.items():
        table.add_row(name, escape((function.__doc__ or "").splitlines()[0]))
    for one in PRESETS.values():
        table.add_row(one.name, escape(f"preset, {one.cost:g} times a forward: {one.about}"))
    stdout.print(table)


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
        ("trust", "right"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]

    def said(results: Iterable["list[Explanation] | DataError"]) -> Iterator["list[Explanation]"]:
        for result in results:
            if isinstance(result, DataError):
                failures.append(result)
                complain("failed", result)
                continue
            for one in result:
                if as_json:
                    sys.stdout.write(json.dumps(one.to_dict()) + "\n")
                else:
                    where = " ".join(f"{edge:.0f}" for edge in one.box.to_list()) if one.box else "nowhere"
                    table.add_row(
                        escape(one.source), escape(one.label), f"{one.probability:.1%}", where, f"{one.trust:.2f}"
                    )
            yield result

    with progress_of(len(files)) as progress:
        task = progress.add_task("looking", total=len(files))
        seen = said(_counted(explain_each(net, files, **options), progress, task))
        if out is None:
            for _ in seen:
                pass
        else:
            write_report(seen, out, net.name, keep=[Path(file) for file in files])
    if not as_json and table.row_count:
        stdout.print(table)
    if out is not None:
        stderr.print(f"written to {escape(str(out / 'index.html'))}", highlight=False, soft_wrap=True)
    return len(failures)


def _counted(results: Iterable[Any], progress: Progress, task: Any) -> Iterator[Any]:
    for result in results:
        yield result
        progress.advance(task)


app.add_typer(measuring.app)
app.add_typer(training.app)
app.add_typer(inspecting.app)
app.add_typer(annotating.app)
app.add_typer(exporting.app)
app.add_typer(serving.app)


def main() -> None:
    """The ``whatwhere`` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may hold what the terminal's encoding does not
            stream.reconfigure(errors="backslashreplace")
    app()
