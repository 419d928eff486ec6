"""The command that answers over HTTP: serve."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from whatwhere.apps.console import MODELS, DeviceOption, errors_said, stderr
from whatwhere.apps.memory import keep_freed_memory

app = typer.Typer()


@app.command()
def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help=f"Each one of {MODELS} \\[default: the embedded one]"),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for everybody.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    page: Annotated[bool, typer.Option("--page/--no-page", help="A page for people beside the API.")] = True,
    max_bytes: Annotated[int, typer.Option(min=1, help="Of a request; beyond: 413.")] = 20_000_000,
    max_pixels: Annotated[int, typer.Option(min=1, help="Of a picture; beyond: 422.")] = 25_000_000,
    queue: Annotated[int, typer.Option(min=1, help="Requests at once; beyond: 429.")] = 128,
    seconds: Annotated[float, typer.Option(min=0.001, help="For a request; beyond: 503.")] = 30.0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures that go through a network at once, at most.")] = 16,
    label_studio_root: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Label Studio's document root; it may name files in it."),
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Answer over HTTP what is in pictures and where, and open a page that shows it.

    POST /explain takes a picture (a form, or JSON with base64); /openapi.json says the rest. /predict and /setup are
    for Label Studio; /health, /ready and /metrics are for those who look after it. Pictures are not kept. Ends on
    Ctrl-C, when what waits is answered.
    """
    with errors_said():
        import whatwhere
        from whatwhere.errors import InputError, extra
        from whatwhere.server.api import Bounds, build_app
        from whatwhere.server.studio import add_studio

        with extra("serve", "a server"):
            import uvicorn

        keep_freed_memory()
        bounds = Bounds(upload=max_bytes, pixels=max_pixels, seconds=seconds, queue=queue, batch=batch)
        nets = {}
        for model in models or ["efficientnet-lite0"]:
            name = Path(model).resolve().name if Path(model).is_dir() else model
            if name in nets:
                raise InputError(f"two models are called {name!r}; clients could not tell them apart")
            nets[name] = whatwhere.load(model, device=device)
        served = build_app(nets, bounds)
        add_studio(served, label_studio_root)
        if page:
            from whatwhere.server.page import with_page

            served = with_page(served)
        shown = f"[{host}]" if ":" in host else host
        stderr.print(f"listening on {escape(f'http://{shown}:{port}')}", highlight=False, soft_wrap=True)
        uvicorn.run(served, host=host, port=port, log_level="warning", timeout_graceful_shutdown=round(seconds) + 1)
