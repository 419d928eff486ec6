"""What ``whatwhere annotate`` costs: against its parts alone, in memory, in going on, and under Ray.

    python benchmarks/annotate.py WHAT [--images N]

    rate    images a second against reading alone, looking alone, and a plain loop with grad-cam over a DataLoader
    memory  resident memory of all processes, of 500 images and of 20000
    resume  what going on costs where 90 % is done
    many    100000 small images through the real command
    kill    the real command killed at random moments, gone on with, and compared
    ray     Ray with one model and two, against local, a thread each
    node    two nodes, one of which is killed in the middle

Pictures are drawn: JPEGs of 375 x 500, or with many, memory, kill and node of 48 x 64; they are kept in --folder.
The network is the embedded one, compiled for ONNX Runtime where it is looked at for its speed; with node a tiny one.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import machine
from torch import nn

import whatwhere
from whatwhere.annotate.listing import Listing, write_list
from whatwhere.annotate.local import annotate_parts, batches_of, cores
from whatwhere.annotate.looking import Looker, digest_of_model, settings_for
from whatwhere.annotate.parts import Annotations, parts_done
from whatwhere.annotate.reading import Read, Reader
from whatwhere.annotate.run import PART, annotate
from whatwhere.annotate.sources import source_of
from whatwhere.annotate.workers import Workers
from whatwhere.apps.memory import keep_freed_memory

LARGE, SMALL = (375, 500), (48, 64)


def drawn(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """So many JPEGs of blurred noise; those that are there are kept."""
    root = folder / f"{size[0]}x{size[1]}-{count}"
    for i in range(count):
        file = root / f"{i // 1000:04}" / f"{i:07}.jpg"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(i).integers(0, 256, (size[0] // 8, size[1] // 8, 3), np.uint8)
            Image.fromarray(noise).resize(size[::-1], Image.Resampling.BICUBIC).save(file, quality=88)
    return root


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def rate(options: argparse.Namespace) -> None:
    """Reading, looking, and both, with as many processes and threads; each after it has been warmed up."""
    root, net, threads = drawn(options.folder, options.images, LARGE), whatwhere.load(), cores()
    settings, digest = settings_for(net, backend="onnxruntime"), digest_of_model(net)
    reader = Reader(str(root), net.preprocess)
    with tempfile.TemporaryDirectory() as scratch:
        count, _ = write_list(source_of(str(root)).items(), Path(scratch), PART)
        listing = Listing(Path(scratch), count, PART)
        batches = [batch for part in range(len(listing)) for batch in batches_of(listing, part, settings.batch)]
        items = [[item for _, item in batch] for batch in batches]
        torch.set_num_threads(1)
        looker = Looker(net, settings, digest)
        torch.set_num_threads(threads)
        with Workers(reader, threads) as pool:
            first = next(iter(pool.answers(items[:1])))
            reading = count / seconds(lambda: [None for _ in pool.answers(items)])
        read = [(one.resized, net.preprocess.frame(one.size)) for one in first if isinstance(one, Read)]
        inputs = torch.stack([net.preprocess.normalized(*one) for one in read])
        looking = count / seconds(lambda: looked(looker, inputs, len(items), threads))
        times: list[tuple[float, int]] = []

        def watch(rows: list) -> None:
            times.append((time.perf_counter(), len({row.image for row in rows})))

        made = annotate_parts(
            listing, range(len(listing)), reader, lambda: looker, batch=settings.batch, workers=threads, watch=watch
        )
        list(made)
        both = sum(n for _, n in times[1:]) / (times[-1][0] - times[0][0])
    plain = gradcam_loop(root, min(count, options.plain))
    slower = min(reading, looking)
    print(f"{count} images, {machine()}\n")
    print("| | images a second |\n|---|---|")
    for name, value in (("reading alone", reading), ("looking alone", looking), ("annotate", both)):
        print(f"| {name} | {value:.1f} |")
    print(f"| grad-cam over a DataLoader | {plain:.1f} |")
    print(f"\nannotate / the slower alone: {both / slower:.2f}; annotate / grad-cam: {both / plain:.1f}")


def looked(looker: Looker, inputs: torch.Tensor, times: int, threads: int) -> None:
    """The compiled forward alone, in as many threads, with class maps as it is in the pipeline."""
    from concurrent.futures import ThreadPoolExecutor

    def look() -> None:
        torch.set_num_threads(1)
        looker.net.trace(inputs)

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(look) for _ in range(times)]:
            future.result()
    torch.set_num_threads(threads)


def gradcam_loop(root: Path, count: int) -> float:
    """What one would write: a data set of files, a DataLoader, GradCAM, its map at the size of the input."""
    from pytorch_grad_cam import GradCAM

    net = whatwhere.load()
    files = sorted(root.rglob("*.jpg"))[:count]

    class Files(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, i: int) -> torch.Tensor:
            return net.preprocess(whatwhere.open_photo(files[i]))[0]

    loader = torch.utils.data.DataLoader(Files(), batch_size=16, num_workers=cores())
    with GradCAM(model=net.network, target_layers=[net.network.bn2]) as cam:
        begun, done = 0.0, 0
        for images in loader:
            cam(input_tensor=images, targets=None)
            if not begun:
                begun = time.perf_counter()
            else:
                done += len(images)
        return done / (time.perf_counter() - begun)


def command(root: Path, out: Path, *words: object) -> list[str]:
    told = ["--out", out, "--format", "none", *words]
    return [sys.executable, "-m", "whatwhere", "annotate", str(root), *map(str, told)]


def peak(words: list[str]) -> float:
    """The most that a command and its processes have resident at once, in MB; shared pages count once."""
    process, most = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL), 0.0
    while process.poll() is None:
        most = max(most, sum(map(proportional, family(process.pid))))
        time.sleep(0.2)
    if process.returncode not in {0, 1}:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")
    return most


def family(pid: int) -> list[int]:
    """A process and all that come of it."""
    found = [pid]
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            found += family(int(path.parent.name))
    return found


def proportional(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def memory(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        found = {}
        for count in (500, options.images):
            root = drawn(options.folder, count, LARGE if options.large else SMALL)
            words = command(root, Path(scratch, str(count)), "--backend", options.backend)
            found[count] = peak(words)
            print(f"{count} images: {found[count]:.0f} MB", flush=True)
        print(f"+ {found[options.images] - found[500]:.0f} MB; {machine()}")


def resume(options: argparse.Namespace) -> None:
    root, part = drawn(options.folder, options.images, LARGE), 128
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "out")
        words = command(root, out, "--part", part, "--backend", options.backend)
        full = seconds(lambda: subprocess.run(words, check=True, capture_output=True))
        parts = len(parts_done(out))
        words = command(root, Path(scratch, "cut"), "--part", part, "--backend", options.backend)
        process = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while len(done := parts_done(Path(scratch, "cut"))) < 0.9 * parts:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        done = parts_done(Path(scratch, "cut"))
        left = 1 - len(done) * part / options.images
        again = seconds(lambda: subprocess.run([*words, "--resume"], check=True, capture_output=True))
        assert table_of(Path(scratch, "cut")).equals(table_of(out))
    share = (again - left * full) / full
    print(f"all: {full:.1f} s; the last {left:.0%}: {again:.1f} s; overhead {share:.1%} of all; {machine()}")


def many(options: argparse.Namespace) -> None:
    root = drawn(options.folder, options.images, SMALL)
    with tempfile.TemporaryDirectory() as scratch:
        words = command(root, Path(scratch, "out"), "--backend", options.backend)
        start = time.perf_counter()
        most = peak(words)
        took = time.perf_counter() - start
        paths = {row.path for row in Annotations(Path(scratch, "out")).rows()}
        print(f"{len(paths)} of {options.images} files have rows; {options.images / took:.0f}/s, {most:.0f} MB")
        print(machine())


def table_of(out: Path) -> object:
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pa.concat_tables([pq.read_table(file) for file in sorted((out / "parts").glob("*.parquet"))])


def kill(options: argparse.Namespace) -> None:
    root, draw = drawn(options.folder, 2000, SMALL), random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        whole, cut = Path(scratch, "whole"), Path(scratch, "cut")
        told = ["--part", 32, "--backend", options.backend]
        took = seconds(lambda: subprocess.run(command(root, whole, *told), check=True, capture_output=True))
        killed = 0
        while killed < options.times:
            process = subprocess.Popen(command(root, cut, *told, "--resume"), stderr=subprocess.DEVNULL)
            try:
                process.wait(draw.uniform(0, took / 2))
                for number in draw.sample(parts_done(cut), k=len(parts_done(cut)) // 2):
                    (cut / "parts" / f"part-{number:06}.parquet").unlink()
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                killed += 1
                print(f"killed at {len(parts_done(cut))} parts", flush=True)
        subprocess.run(command(root, cut, *told, "--resume"), check=True, capture_output=True)
        print("equal, row for row:", table_of(cut).equals(table_of(whole)))


def spread(root: Path, out: Path, engine: str, **options: object) -> float:
    """Images a second between the first batch and the last."""
    times: list[tuple[float, int]] = []
    annotate(
        whatwhere.load(),
        str(root),
        out,
        engine=engine,
        backend="onnxruntime",
        part=128,
        watch=lambda done, total, failed: times.append((time.perf_counter(), done)),
        **options,
    )
    times = times[1:]
    return (times[-1][1] - times[0][1]) / (times[-1][0] - times[0][0])


def ray(options: argparse.Namespace) -> None:
    import ray as cluster

    root = drawn(options.folder, options.images, LARGE)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        local = spread(root, Path(scratch, "local"), "local", workers=1)
        found = {}
        for models in (1, 2):
            cluster.init(num_cpus=models + 1, include_dashboard=False, log_to_driver=False)
            found[models] = spread(root, Path(scratch, str(models)), "ray", workers=models)
            cluster.shutdown()
        same = all(table_of(Path(scratch, name)).equals(table_of(Path(scratch, "local"))) for name in ("1", "2"))
    print(f"local {local:.1f}/s, Ray {found[1]:.1f}/s ({found[1] / local:.2f}), two models {found[2]:.1f}/s")
    print(f"two over one: {found[2] / found[1]:.2f}; rows equal: {same}; {machine()}")


def tiny() -> whatwhere.Classifier:
    """A network that costs nothing: what is asked is who does the work."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    return whatwhere.load(nn.Sequential(*layers), preprocess=whatwhere.Preprocess(size=(48, 64)))


def node(options: argparse.Namespace) -> None:
    import ray as cluster
    from ray.cluster_utils import Cluster

    root = drawn(options.folder, options.images, SMALL)
    with tempfile.TemporaryDirectory() as scratch:
        local, out = Path(scratch, "local"), Path(scratch, "ray")
        told = {"backend": "torch", "part": 64, "batch": 8}
        net = tiny()
        annotate(net, str(root), local, **told)
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        second = nodes.add_node(num_cpus=2)
        cluster.init(address=nodes.address, log_to_driver=False)
        state = {"killed": False}

        def watch(done: int, total: int, failed: int) -> None:
            if not state["killed"] and done:
                state["killed"] = True
                nodes.remove_node(second, allow_graceful=False)
                print(f"a node was killed at {done} of {total}", flush=True)

        annotate(net, str(root), out, engine="ray", workers=2, watch=watch, **told)
        cluster.shutdown()
        nodes.shutdown()
        print("killed:", state["killed"], "equal, row for row:", table_of(out).equals(table_of(local)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs = {"rate": 2000, "memory": 20000, "resume": 5000, "many": 100_000, "kill": 0, "ray": 2000, "node": 4000}
    parser.add_argument("what", choices=runs)
    parser.add_argument("--images", type=int)
    parser.add_argument("--plain", type=int, default=480, help="images of the loop with grad-cam")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--large", action="store_true", help="memory with JPEGs of 375 x 500")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "whatwhere-drawn"))
    options = parser.parse_args()
    options.images = options.images or runs[options.what]
    keep_freed_memory()
    globals()[options.what](options)


if __name__ == "__main__":
    main()
