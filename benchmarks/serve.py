"""A server under load: 64 clients, some of them wrong, beside the library at the same batch.

    python benchmarks/serve.py [--seconds 300] [--clients 64] [--malformed 0.01]

Writes serve.csv: a row a half minute (answers, errors that no document names, memory of the server), and serve.md.
"""

import argparse
import asyncio
import csv
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from importlib.resources import files
from pathlib import Path

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


async def load(port, pid, told, rows):
    counts, begin = Counter(), time.monotonic()
    until = begin + told.seconds
    clients = [asyncio.create_task(client(port, until, told.malformed, seed, counts)) for seed in range(told.clients)]
    before, last = Counter(), begin
    while time.monotonic() < until:
        await asyncio.sleep(min(30.0, max(0.0, until - time.monotonic())))
        now, some = time.monotonic(), Counter(counts)
        some.subtract(before)
        rows.append(
            {
                "seconds": round(now - begin),
                "answers_per_s": round(some[200] / (now - last), 2),
                "answers": counts[200],
                "refusals": sum(counts[status] for status in DOCUMENTED - {200}),
                "undocumented": sum(n for status, n in counts.items() if status not in DOCUMENTED | {"unexpected"}),
                "unexpected": counts["unexpected"],
                "resident_MB": resident(pid),
            }
        )
        print(rows[-1], flush=True)
        before, last = Counter(counts), now
    await asyncio.gather(*clients)
    return counts


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
    """Library, server, library: what the machine does meanwhile shows in the two."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--malformed", type=float, default=0.01)
    parser.add_argument("--out", type=Path, default=HERE)
    told = parser.parse_args()
    alone = [library(min(30, told.seconds / 4))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "whatwhere", "serve", "--no-page", "--port", str(port), "--batch", str(BATCH)]
    server = subprocess.Popen(command)
    rows: list[dict[str, float]] = []
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready").read()
                break
            except OSError:
                time.sleep(0.2)
        counts = asyncio.run(load(port, server.pid, told, rows))
        begin = time.monotonic()
    finally:
        server.terminate()
        server.wait()
    stopped = time.monotonic() - begin
    alone.append(library(min(30, told.seconds / 4)))
    rate = rows[-1]["answers"] / rows[-1]["seconds"]
    with (told.out / "serve.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    by_status = ", ".join(f"{n} x {status}" for status, n in sorted(counts.items(), key=str) if n)
    (told.out / "serve.md").write_text(
        f"""# A server under load

`python benchmarks/serve.py --seconds {told.seconds:g} --clients {told.clients} --malformed {told.malformed:g}`,
{os.cpu_count()} cores, clients on the same cores; the embedded classifier, Grad-CAM, batches of at most {BATCH}.

| | |
| --- | --- |
| the library alone, before and after | {alone[0]:.1f} and {alone[1]:.1f} pictures/s |
| the server | {rate:.1f} answers/s |
| ratio to the library before, and after | {rate / alone[0]:.2f} and {rate / alone[1]:.2f} |
| answers | {by_status} |
| memory of the server, first and last half minute | {rows[0]["resident_MB"]} and {rows[-1]["resident_MB"]} MB |
| to stop | {stopped:.1f} s, exit code {server.returncode} |

Where the two of the library differ much, something else had the cores, and the ratio says nothing.
"""
    )


if __name__ == "__main__":
    main()
