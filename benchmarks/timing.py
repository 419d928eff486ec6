"""Times taken in turn in one process, and ratios of them: what drifts on the machine drifts for all."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path


def in_turn(runs: dict[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of every run, round by round: A B C A B C ..."""
    for run in runs.values():
        for _ in range(warmup):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: dict[str, list[float]], base: str) -> dict[str, tuple[float, float, float]]:
    """Median, lower and upper quartile of each run's time over the base's of the same round."""
    found = {}
    for name, times in seconds.items():
        shares = [one / other for one, other in zip(times, seconds[base], strict=True)]
        low, middle, high = statistics.quantiles(shares, n=4)
        found[name] = (middle, low, high)
    return found


def machine() -> str:
    """What was measured on, and when."""
    import torch

    model = "unknown processor"
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return (
        f"{date.today()}, {model}, {torch.get_num_threads()} of {os.cpu_count()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
