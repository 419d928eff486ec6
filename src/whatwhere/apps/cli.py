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
        photos = [shutil.copyfile(photo, out / "photos" / photo.name) for photo in sorted(folder.glob("*.jpg"))]
        _run("efficientnet-lite0", {}, [str(photo) for photo in photos], {"target": "top1"}, out, as_json=False)


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
