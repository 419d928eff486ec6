"""The road of a whole source: list, what is done already, the rest part by part, then the formats."""

import os
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Literal, get_args

from whatwhere.annotate.formats import FORMATS
from whatwhere.annotate.listing import Listing, write_list
from whatwhere.annotate.local import annotate_parts, cores
from whatwhere.annotate.looking import Looker, Settings, digest_of_model, settings_for
from whatwhere.annotate.parts import Annotations, Told, parts_done, refused, tidy, write_part
from whatwhere.annotate.reading import Reader
from whatwhere.annotate.rows import Row
from whatwhere.annotate.sources import digest_of, source_of
from whatwhere.classifiers.classifier import Classifier
from whatwhere.errors import DataError, InputError, extra, nearest
from whatwhere.explanation import find_method
from whatwhere.files import aside, held
from whatwhere.images import MAX_PIXELS, printable
from whatwhere.presets import Preset
from whatwhere.regions.threshold import Threshold

Engine = Literal["local", "ray"]
PART = 512
"""Pictures, all of which are done again where a run is cut off in their midst."""
Watch = Callable[[int, int, int], None]
"""Is told how many pictures are done, of how many, and how many of them could not be used."""


def annotate(
    net: Classifier,
    source: str,
    out: Path,
    *,
    method: str | None = None,
    threshold: Threshold | None = None,
    classes: Sequence[int | str] = (),
    resume: bool = False,
    engine: str = "local",
    backend: str | None = None,
    batch: int = 16,
    part: int = PART,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    address: str | None = None,
    watch: Watch = lambda done, total, failed: None,
) -> Annotations:
    """Say of every picture of a source what is in it and where, in Parquet parts that outlive any interruption.

    Args:
        net: the classifier, not compiled.
        source: a folder, a pattern, a list of paths, tar shards, on the disk or at an address that fsspec knows.
        out: folder of the run; see ``annotate.parts``.
        method: of the maps; by default "cam" where it is exact, else "gradcam".
        threshold: of the maps; by default what the model was calibrated to.
        classes: names or indices; each picture gets the most probable of them, by default of all, and of a
            classifier that knows several in a picture each of a probability of at least 1/2.
        resume: go on with what is in ``out``. The rows in the end are those of an uninterrupted run.
        engine: "local", or "ray" for Ray Data.
        backend: torch, onnxruntime or openvino; by default the fastest of them, and what was begun with.
        batch: pictures that go through the network at once.
        part: pictures a part.
        workers: processes that read, or with Ray models; by default one a core, or what the cluster holds.
        max_pixels: pictures of more are refused before they are decoded.
        address: of a Ray cluster.
        watch: progress.

    Raises:
        DataError: there is no such source, nothing in it, or ``out`` cannot be written to.
        InputError: a wrong word; ``out`` holds annotations and is not to be gone on with, or was begun otherwise,
            with the reason; another process is at work in it.
        UnsupportedError: the method does not apply to the network, or the engine does not run it.
        MissingExtraError: pyarrow, or what the engine needs, is not installed.
    """
    if engine not in get_args(Engine):
        raise InputError(f"engine is one of {', '.join(get_args(Engine))}, got {engine!r}")
    if part < 1 or part % batch:
        raise InputError(f"a part is a whole number of batches of {batch}, got {part}")
    if workers is not None and workers < 1:
        raise InputError(f"wanted at least 1 process, got {workers}")
    with extra("scale", "whatwhere annotate"):
        import pyarrow.parquet  # noqa: F401
    found = source_of(source)
    with refused(out):
        out.mkdir(parents=True, exist_ok=True)
    if found.kind in {"folder", "glob"} and os.path.realpath(out) == os.path.realpath(found.root):
        raise InputError(f"{printable(out)}: pictures that are written there would be taken for the source's")
    with locked(out):
        done = parts_done(out)
        if done and not resume:
            raise InputError(
                f"{printable(out)} holds annotations already; --resume goes on, or choose another folder"
            )
        tidy(out)
        before = Told.load(out) if done else None
        with refused(out):
            if before is None:
                images, digest = write_list(found.items(out), out, part)
            else:
                images, digest = before.images, digest_of(found.items(out))
                images = images if digest == before.list_digest else sum(1 for _ in found.items(out))
        if not images:
            raise DataError(f"{printable(source)}: no pictures in it")
        chosen = settings_for(
            net,
            method=method,
            threshold=threshold,
            classes=classes,
            batch=batch,
            backend=backend or (before.settings.get("backend") if before else None),
            images=images,
        )
        indices = chosen.classes or range(len(net.labels))
        told = Told(
            settings=asdict(chosen) | {"max_pixels": max_pixels},
            model=digest_of_model(net),
            name=net.name,
            labels={index: net.labels[index] for index in indices},
            source=source,
            root=found.root,
            images=images,
            part=part,
            list_digest=digest,
        )
        if before is not None:
            before.check_same(told, out)
        else:
            with refused(out):
                told.save(out)
        _work(net, chosen, told, out, engine=engine, workers=workers, address=address, watch=watch)
    return Annotations(out)


def _work(
    net: Classifier,
    settings: Settings,
    told: Told,
    out: Path,
    *,
    engine: str,
    workers: int | None,
    address: str | None,
    watch: Watch,
) -> None:
    """What is not done yet."""
    listing = Listing(out, told.images, told.part)
    there = set(parts_done(out))
    to_do = [number for number in range(len(listing)) if number not in there]
    done, failed = sum(listing.size_of(number) for number in there), 0
    watch(done, told.images, failed)
    graph = out / f"graph-{told.model[:16]}.onnx"
    if not to_do:
        graph.unlink(missing_ok=True)  # of a run that was cut off behind its last part
        return
    function = find_method(settings.method)
    keeps = isinstance(function, Preset) and function.refine is not None
    reader = Reader(told.root, net.preprocess, told.settings["max_pixels"], keeps)

    def seen(rows: list[Row]) -> None:
        nonlocal done, failed
        done += len({row.image for row in rows})
        failed += sum(row.error is not None for row in rows)
        watch(done, told.images, failed)

    if engine == "ray":
        from whatwhere.annotate.cluster import annotate_parts as on_ray

        found: Generator[tuple[int, list[Row]], None, None] = on_ray(
            listing, to_do, reader, net, settings, told.model, workers=workers, address=address, watch=seen
        )
    else:
        found = annotate_parts(
            listing,
            to_do,
            reader,
            lambda: Looker(net, settings, told.model, graph),
            batch=settings.batch,
            workers=workers or cores(),
            watch=seen,
        )
    with closing(found):
        for number, rows in found:
            write_part(out, number, rows)
    graph.unlink(missing_ok=True)  # all is done


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """For a while, nobody else is at work in a run's folder.

    Raises:
        InputError: somebody is.
        DataError: the folder cannot be written to.
    """
    with ExitStack() as stack:
        with refused(folder):
            stack.enter_context(held(folder / ".lock"))
        yield


def check_formats(formats: Sequence[str]) -> None:
    """Refuse wrong words before any work.

    Raises:
        InputError: there is no such format; names the three nearest.
    """
    for name in formats:
        if name not in FORMATS:
            raise InputError(f"no format is called {name!r}; nearest: {nearest(name, FORMATS)}")


def write_formats(found: Annotations, formats: Sequence[str]) -> list[Path]:
    """Write what labelling and training tools read, each format anew in a folder of its name beside the parts.

    Raises:
        InputError: there is no such format, with the three nearest; another process is at work in the folder.
        DataError: the folder cannot be written to.
    """
    check_formats(formats)
    folders = []
    for name in dict.fromkeys(formats):
        folder = found.folder / name
        with locked(found.folder), refused(found.folder), aside(folder) as written:
            written.mkdir()
            FORMATS[name](found, written)
            if folder.exists():  # a folder that holds something is not renamed over
                shutil.rmtree(folder)
        folders.append(folder)
    return folders
