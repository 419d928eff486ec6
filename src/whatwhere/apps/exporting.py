"""The command that writes models for other programs: export."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from whatwhere.apps.console import LayerOption, ModelArgument, WeightsOption, errors_said, stderr, stdout
from whatwhere.apps.memory import keep_freed_memory

app = typer.Typer()


@app.command()
def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="The file: .onnx, .xml for openvino, or .pt2.")],
    to: Annotated[str, typer.Option(help="onnx, openvino, or pt2, which torch.export.load reads.")] = "onnx",
    uint8: Annotated[
        bool, typer.Option("--uint8", help="Take 8-bit RGB pixels of any size; resize and normalize in the graph.")
    ] = False,
    box: Annotated[bool, typer.Option("--box", help="Give the most probable class's box too.")] = False,
    features: Annotated[
        bool, typer.Option("--features", help="Give logits and features, of models that have no class maps.")
    ] = False,
    int8: Annotated[
        Path | None,
        typer.Option(help="8-bit integers, their ranges from the pictures in this folder; for onnx and openvino."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="The share of a map's maximum that is in a box. \\[default: the model's]")
    ] = None,
    layer: LayerOption = None,
    weights: WeightsOption = None,
) -> None:
    """Write a model as one graph: images -> logits, class maps and, with --box, the box.

    What was written is run on photographs beside PyTorch; where it says anything else, there is no file. With --int8,
    what becomes of that is compared with it on every fifth of those pictures, which gave no ranges.

    Exit code 0; 1 where the file cannot be written; 2 for wrong usage and models that cannot be exported.
    """
    with errors_said():
        import whatwhere
        from whatwhere.classifiers.exported import export as written
        from whatwhere.explanation import threshold_of

        keep_freed_memory()
        net = whatwhere.load(model, layer=layer, weights=weights)
        share = threshold_of(net.thresholds, "gradcam" if "gradcam" in net.thresholds else "cam")
        options: dict[str, Any] = {"uint8": uint8, "box": box, "features": features, "int8": int8}
        made = written(net, out, to, threshold=share if threshold is None else threshold, **options)  # type: ignore[arg-type]
    if net.distilled is not None:
        note = "the graph gives plain class maps, not what the distilled head says"
        stderr.print(f"[yellow]note[/] {note}", highlight=False, soft_wrap=True)
    for shape, errors in made.errors.items():
        said = ", ".join(f"{name} {error:.1e}{' px' if name == 'box' else ''}" for name, error in errors.items())
        stdout.print(f"differs from PyTorch on {' x '.join(map(str, shape))}: {said}", highlight=False)
    if not made.meta["any_size"]:
        size = " x ".join(map(str, net.preprocess.size))
        note = f"takes images of {size} alone, as its layers depend on the size; with --uint8, pictures of any size"
        stderr.print(f"[yellow]note[/] {note}", highlight=False, soft_wrap=True)
    if found := made.quantized:
        sizes = f"{found.before / 1e6:.1f} MB -> {found.after / 1e6:.1f} MB"
        maps = "" if found.correlation is None else f", map correlation {found.correlation:.3f}"
        said = f"same class as float on {found.agreement:.1%} of {found.compared} pictures{maps}"
        stdout.print(f"int8 from {found.calibrated} pictures: {sizes}; {said}", highlight=False)
        if not found.is_close:
            note = "int8 changes what this model says; more pictures like those it will see may help"
            stderr.print(f"[yellow]note[/] {note}", highlight=False, soft_wrap=True)
    stderr.print(
        f"written to {escape(str(made.file))} and {escape(str(made.sidecar))}", highlight=False, soft_wrap=True
    )
