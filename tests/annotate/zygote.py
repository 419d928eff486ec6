"""Runs of ``annotate`` that are killed: everything is imported once, and each run is a fork of that.

    python zygote.py SOURCE WHOLE CUT RUNS SEED

Lets a run end in WHOLE. Starts one in CUT, kills it at a random moment, goes on with it, and so on, so many times;
then lets it end. Prints how many were killed at work, and at how many different numbers of parts.
"""

import gc
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from scenes import plain, red_net

import whatwhere
from whatwhere.annotate import workers
from whatwhere.annotate.parts import part_file, parts_done
from whatwhere.annotate.run import annotate
from whatwhere.errors import InputError
from whatwhere.files import held

BATCH, PART = 4, 8


def run(source: str, out: Path) -> None:
    net = whatwhere.load(red_net(), preprocess=plain((20, 30)), labels=["blue", "red"])
    annotate(net, source, out, resume=True, batch=BATCH, part=PART, workers=1 + os.getpid() % 2)


def forked(source: str, out: Path) -> int:
    if child := os.fork():
        return child
    os.setpgid(0, 0)
    try:
        run(source, out)
        os._exit(0)
    except BaseException as error:
        sys.stderr.write(f"{error!r}\n")
        os._exit(1)


def waited(child: int, out: Path, wanted: int, delay: float) -> int:
    """Wait for so many parts and a little longer, then kill; the status in the end."""
    while len(parts_done(out)) < wanted:
        if (found := os.waitpid(child, os.WNOHANG))[0]:
            return found[1]
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)  # its readers are to notice by themselves
    status = os.waitpid(child, 0)[1]
    while out.exists():  # being forks, they hold the lock as long as they live
        with suppress(InputError), held(out / ".lock"):
            return status
        time.sleep(0.002)
    return status


def main() -> None:
    source, whole, out, runs = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    workers.START = "fork"  # what starts them is imported already
    draw = random.Random(int(sys.argv[5]))
    run(source, whole)
    gc.freeze()
    killed, seen = 0, set()
    while killed < runs:
        more, delay = draw.choice((0, 0, 1, 1, 2, 3)), draw.uniform(0, 0.1)
        wanted, child = len(parts_done(out)) + more, forked(source, out)
        status = waited(child, out, wanted, delay if more else 3 * delay)
        there = parts_done(out)
        if os.WIFSIGNALED(status):
            killed += 1
            seen.add(len(there))
        elif os.WEXITSTATUS(status):
            sys.exit("a run failed by itself")
        else:  # it was done before it was killed: what follows begins in its midst
            for number in draw.sample(there, k=len(there) * 2 // 3):
                part_file(out, number).unlink()
    _, status = os.waitpid(forked(source, out), 0)
    print(killed, len(seen), os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
