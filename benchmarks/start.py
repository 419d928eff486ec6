"""What the commands cost as whole processes, against the imports and the one forward that they need.

python benchmarks/start.py
"""

import statistics
import subprocess
import sys
from pathlib import Path

from timing import in_turn, machine, ratios

import whatwhere

PHOTO = Path(whatwhere.__path__[0], "photos", "chelsea.jpg")
FLOOR = """
import torch, timm
network = timm.create_model("tf_efficientnet_lite0").eval()
with torch.no_grad():
    network(torch.zeros(1, 3, 224, 224))
"""


def command(*words: str) -> None:
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    seconds = in_turn(
        {
            "python -c 'import torch, timm' and one forward": lambda: command("-c", FLOOR),
            "whatwhere explain, one photograph": lambda: command("-m", "whatwhere", "explain", str(PHOTO)),
            "whatwhere --help": lambda: command("-m", "whatwhere", "--help"),
        },
        rounds=9,
        warmup=1,
    )
    print(f"{machine()}\n\n| whole process | seconds, median | ratio |\n|---|---|---|")
    for name, (ratio, low, high) in ratios(seconds, next(iter(seconds))).items():
        print(f"| {name} | {statistics.median(seconds[name]):.2f} | {ratio:.2f} ({low:.2f} to {high:.2f}) |")


if __name__ == "__main__":
    main()
