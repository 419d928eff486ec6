"""The command that annotates a source of any size: annotate."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from whatwhere.apps.console import (
    BatchOption,
    DeviceOption,
    LayerOption,
    ModelOption,
    WeightsOption,
    errors_said,
    stderr,
    stdout,
)
from whatwhere.apps.memory import keep_freed_memory

app = typer.Typer()


@app.command()
def annotate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder, a pattern, a list of paths (.txt, .parquet), .tar shards; or s3://, gs://, ... of these.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the parts, the formats and index.html.")],
    model: ModelOption = "efficientnet-lite0",
    formats: Annotated[
        str,
        typer.Option(
            "--format",
            help="With commas: coco, coco-polygons, yolo, yolo-seg, voc, labelstudio, cvat, csv; or none.",
        ),
    ] = "coco",
    classes: Annotated[
        str | None, typer.Option(help="With commas, names or indices: only these. \\[default: all of the model's]")
    ] = None,
    min_trust: Annotated[
        float, typer.Option(min=0, max=1, help="Of the regions that go into the formats; the parts hold all.")
    ] = 0.5,
    engine: Annotated[str, typer.Option(help="local, or ray for a cluster.")] = "local",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in --out.")] = False,
    method: Annotated[
        str | None, typer.Option(help="A map method. \\[default: cam where it is exact, else gradcam]")
    ] = None,
    threshold: Annotated[
        str | None, typer.Option(help="As of [bold]whatwhere explain[/]. \\[default: the model's, or 0.25]")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="torch, onnxruntime or openvino. \\[default: the fastest at hand]")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that read; with ray, models. \\[default: one a core]")
    ] = None,
    batch: BatchOption = 16,
    part: Annotated[int, typer.Option(min=1, help="Pictures in a Parquet part: a whole number of batches.")] = 512,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster. \\[default: one on this machine]")] = None,
    max_pixels: Annotated[
        int | None, typer.Option(help="Refuse images of more pixels than this. \\[default: 178956970]")
    ] = None,
    layer: LayerOption = None,
    weights: WeightsOption = None,
    device: DeviceOption = None,
) -> None:
    """Say what is in thousands of pictures and where, for labelling tools, in files that outlive any interruption.

    A picture that cannot be used is a row with its error, and no stop. What was cut off goes on with --resume and
    ends as it would have.

    Exit code 0; 1 where some picture failed (the page and the parts name them), or data or disk do not do; 2 for
    wrong usage; 130 when interrupted.
    """
    with errors_said():
        import whatwhere
        from whatwhere.annotate import run
        from whatwhere.annotate.parts import Annotations
        from whatwhere.images import MAX_PIXELS
        from whatwhere.reports.annotation import summary_of, write_annotation_report

        keep_freed_memory()
        wanted = [word.strip() for word in formats.split(",") if word.strip() not in {"", "none"}]
        run.check_formats(wanted)
        asked = [word.strip() for word in classes.split(",") if word.strip()] if classes else []
        net = whatwhere.load(model, layer=layer, weights=weights, device=device)
        bar = Bar()
        try:
            with bar.progress:
                run.annotate(
                    net,
                    source,
                    out,
                    method=method,
                    threshold=threshold,
                    classes=[int(word) if word.isdecimal() and word not in net.labels else word for word in asked],
                    resume=resume,
                    engine=engine,
                    backend=backend,
                    batch=batch,
                    part=part,
                    workers=workers,
                    max_pixels=MAX_PIXELS if max_pixels is None else max_pixels,
                    address=address,
                    watch=bar,
                )
        except KeyboardInterrupt:
            stderr.print(f"interrupted; --resume --out {escape(str(out))} goes on", highlight=False, soft_wrap=True)
            raise typer.Exit(130) from None
        found = Annotations(out, min_trust)
        folders = run.write_formats(found, wanted)
        summary = summary_of(found)
        _say(summary)
        with run.locked(out):
            written = [*folders, write_annotation_report(found, summary, out)]
        for path in written:
            stderr.print(f"written to {escape(str(path))}", highlight=False, soft_wrap=True)
    raise typer.Exit(1 if summary.failed else 0)


def _say(summary: Any) -> None:
    """What was found, in a few lines."""
    table = Table(box=None, pad_edge=False)
    table.add_column("class")
    for name in ("pictures", "regions", "trusted"):
        table.add_column(name, justify="right")
    for name, pictures, regions, trusted in summary.classes()[:10]:
        table.add_row(escape(name), str(pictures), str(regions), str(trusted))
    stdout.print(table)
    for line in summary.lines():
        stderr.print(escape(line), highlight=False, soft_wrap=True)
    for why, count in summary.reasons.most_common(5):
        stderr.print(f"[red]failed[/] {count} x {escape(why)}", highlight=False, soft_wrap=True)


class Bar:
    """Progress on a terminal: rate, time that is left, and how many pictures failed."""

    def __init__(self) -> None:
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            RateColumn(),
            TimeRemainingColumn(),
            TextColumn("[red]{task.fields[failed]}[/]"),
        ]
        self.progress = Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)
        self.task = self.progress.add_task("looking", total=None, failed="")
        self.begun = False

    def __call__(self, done: int, total: int, failed: int) -> None:
        """As ``annotate`` tells it; what was done before counts for no rate."""
        said = f"{failed} failed" if failed else ""
        if not self.begun:
            self.begun = True
            self.progress.reset(self.task, total=total, completed=done, failed=said)
        self.progress.update(self.task, completed=done, failed=said)


class RateColumn(ProgressColumn):
    """Pictures a second."""

    def render(self, task: Task) -> Text:
        """The rate, once there is one."""
        return Text(f"{task.speed:.0f}/s" if task.speed else "")
