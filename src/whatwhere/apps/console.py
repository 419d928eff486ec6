"""What all commands share: where they print, how errors are said, options of the same name."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from whatwhere.errors import DataError, InputError, TrainingError, WhatWhereError

stderr = Console(stderr=True)
# a table that goes to a file or a pipe is not folded
stdout = Console() if sys.stdout and sys.stdout.isatty() else Console(width=10_000)

MODELS = (
    "efficientnet-lite0 (embedded), timm/NAME, torchvision/NAME, hf:FOLDER or hf:NAME (transformers), a saved run's "
    "folder, or an exported .onnx."
)
ModelOption = Annotated[str, typer.Option(help=MODELS)]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODELS)]
METHOD = "A map method; [bold]whatwhere methods[/] lists them."
MethodOption = Annotated[str, typer.Option(help=METHOD)]
LayerOption = Annotated[str | None, typer.Option(help="Split the network after this layer instead.")]
WeightsOption = Annotated[
    Path | None, typer.Option(help="A file of weights of your own for the model, or a Lightning checkpoint.")
]
BatchOption = Annotated[int, typer.Option(min=1, help="Images that go through the network at once.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.")]


def progress_of(total: int) -> Progress:
    """A bar on stderr, where that is a terminal."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=stderr, transient=True, disable=total < 2 or not stderr.is_terminal)


@contextmanager
def errors_said() -> Iterator[None]:
    """Errors of ours become a line on stderr and an exit code: 1 for data and trainings, 2 for wrong usage."""
    try:
        yield
    except WhatWhereError as error:
        complain("error", error)
        raise typer.Exit(1 if isinstance(error, DataError | TrainingError) else 2) from None
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except FileExistsError as error:
        complain("error", DataError(f"{error.filename}: wanted a folder to write to, and this is a file"))
        raise typer.Exit(1) from None
    except OSError as error:  # of what is written; what is read has errors of its own
        complain("error", error)
        raise typer.Exit(1) from None


def complain(word: str, error: Exception) -> None:
    """A line on stderr."""
    stderr.print(f"[red]{word}[/] {escape(str(error))}", highlight=False, soft_wrap=True)


def files_in(photos: list[str], out: Path | None) -> Iterator[str]:
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
