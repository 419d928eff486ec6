"""A server under load: 64 clients, some of them wrong, in turn with the library at the same batch.

    python benchmarks/serve.py [--seconds 60] [--rounds 5] [--clients 64] [--malformed 0.01]

Writes serve.csv: a row a round (the library's rate before it, answers, errors that no document names, memory of the
server), and serve.md.
"""

import argparse
import asyncio
import csv
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from importlib.resources import files
from pathlib import Path

from timing import machine

HERE = Path(__file__).parent
DOCUMENTED = {200, 413, 415, 422, 429, 503}
BATCH = 16


def bodies():
    """Requests of the package's photographs, and those that are wrong, with the status each should have."""
    photos = [one.read_bytes() for one in (files("whatwhere") / "photos").iterdir() if one.name.endswith(".jpg")]

    def form(data, fields=""):
        part = b'--xx\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        return request(part + data + f"\r\n{fields}--xx--\r\n".encode(), "multipart/form-data; boundary=xx")

    def request(body, kind):
        head = f"POST /explain HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    field = '--xx\r\nContent-Disposition: form-data; name="method"\r\n\r\nnone\r\n'
    wrong = [
        (form(photos[0][:5000]), 422),
        (form(b"no picture"), 422),
        (form(photos[0], field), 422),
        (request(b"{", "application/json"), 422),
        (request(json.dumps({"image": "/etc/passwd"}).encode(), "application/json"), 422),
        (request(b"x", "text/plain"), 415),
    ]
    return [(form(photo), 200) for photo in photos], wrong


async def ask(reader, writer, body):
    writer.write(body)
    await writer.drain()
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    await reader.readexactly(length)
    return int(head[9:12])


async def client(port, until, share, seed, counts):
    draw, (right, wrong) = random.Random(seed), bodies()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.monotonic() < until:
        body, expected = draw.choice(wrong if draw.random() < share else right)
        try:
            status = await ask(reader, writer, body)
        except (OSError, asyncio.IncompleteReadError):
            counts["broken"] += 1
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            continue
        counts[status] += 1
        counts["unexpected"] += status != expected
    writer.close()


async def load(port, told, number):
    """What was answered within the time, and in all: the last questions are answered after it."""
    counts, begin = Counter(), time.monotonic()
    until, seeds = begin + told.seconds, range(number * told.clients, (number + 1) * told.clients)
    clients = [asyncio.create_task(client(port, until, told.malformed, seed, counts)) for seed in seeds]
    await asyncio.sleep(told.seconds)
    within = counts[200] / (time.monotonic() - begin)
    await asyncio.gather(*clients)
    return within, counts


def row_of(number, alone, within, counts, pid):
    return {
        "round": number + 1,
        "library_per_s": round(alone, 2),
        "answers_per_s": round(within, 2),
        "ratio": round(within / alone, 3),
        "answers": counts[200],
        "refusals": sum(counts[status] for status in DOCUMENTED - {200}),
        "undocumented": sum(n for status, n in counts.items() if status not in DOCUMENTED | {"unexpected"}),
        "unexpected": counts["unexpected"],
        "resident_MB": resident(pid),
    }


def resident(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return round(int(status.partition("VmRSS:")[2].split()[0]) / 1024)


def library(seconds):
    """Pictures a second of ``explain`` and ``to_dict``, from encoded bytes, in a process of its own."""
    code = f"""
import io, json, time
from importlib.resources import files
from PIL import Image
import whatwhere
from whatwhere.apps.memory import keep_freed_memory
keep_freed_memory()
net = whatwhere.load()
photos = [one.read_bytes() for one in (files("whatwhere") / "photos").iterdir() if one.name.endswith(".jpg")]
def batch():
    pictures = [Image.open(io.BytesIO(photos[i % len(photos)])) for i in range({BATCH})]
    for found in whatwhere.explain(net, pictures, batch={BATCH}):
        json.dumps([one.to_dict() for one in found]).encode()
batch()
begin = time.perf_counter()
n = 0
while time.perf_counter() - begin < {seconds}:
    batch()
    n += {BATCH}
print(n / (time.perf_counter() - begin))
"""
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def main():
    """Library, server, library, server: a machine that is slower for a while is so for both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--malformed", type=float, default=0.01)
    parser.add_argument("--out", type=Path, default=HERE)
    told = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "whatwhere", "serve", "--no-page", "--port", str(port), "--batch", str(BATCH)]
    server = subprocess.Popen(command)
    rows, counts = [], Counter()
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready").read()
                break
            except OSError:
                time.sleep(0.2)
        for number in range(told.rounds):
            alone = library(told.seconds / 2)
            within, some = asyncio.run(load(port, told, number))
            rows.append(row_of(number, alone, within, some, server.pid))
            counts += some
            print(rows[-1], flush=True)
        begin = time.monotonic()
    finally:
        server.terminate()
        server.wait()
    stopped = time.monotonic() - begin
    ratios = [row["ratio"] for row in rows]
    with (told.out / "serve.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    by_status = ", ".join(f"{n} x {status}" for status, n in sorted(counts.items(), key=str) if n)
    (told.out / "serve.md").write_text(
        f"""# A server under load

`python benchmarks/serve.py --seconds {told.seconds:g} --rounds {told.rounds} --clients {told.clients} \\
--malformed {told.malformed:g}`, {os.cpu_count()} cores, clients on the same cores; the embedded classifier, Grad-CAM,
batches of at most {BATCH}. {machine()}.

| | |
| --- | --- |
| the library alone, in turn with it | {" ".join(f"{row['library_per_s']:.1f}" for row in rows)} pictures/s |
| the server | {" ".join(f"{row['answers_per_s']:.1f}" for row in rows)} answers/s |
| ratio, median (least to most) | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |
| answers | {by_status} |
| memory of the server, after each round | {" ".join(str(row["resident_MB"]) for row in rows)} MB |
| to stop | {stopped:.1f} s, exit code {server.returncode} |
"""
    )


if __name__ == "__main__":
    main()
