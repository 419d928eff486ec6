"""What folding batch normalization into convolutions saves of a forward: both networks in turn, in one process.

python benchmarks/folding.py [--threads 2] [--rounds 15] [--models efficientnet-lite0 timm/resnet50] [--batches 1 16]
"""

import argparse
import statistics
from functools import partial

import torch
from timing import in_turn, machine, ratios
from torch import nn

import whatwhere
from whatwhere.apps.memory import keep_freed_memory
from whatwhere.classifiers.folding import fold_batchnorm


def forward(network: nn.Module, images: torch.Tensor) -> None:
    with torch.inference_mode():
        network(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="+", default=["efficientnet-lite0", "timm/resnet50"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    print(f"{machine()}\n\n| model | folded | batch | ms, plain | ms, folded | ratio | error |")
    print("|---|---|---|---|---|---|---|")
    for name in options.models:
        net = whatwhere.load(name, pretrained=name == "efficientnet-lite0")
        images = torch.rand(max(options.batches), 3, *net.preprocess.size)
        found = fold_batchnorm(net.network, images[:1])
        norms = f"{len(found.folded)} of {len(found.folded) + len(found.left)}"
        with torch.inference_mode():
            said, again = (network(images[:1]) for network in (net.network, found.network))
        error = f"{float((again - said).abs().max() / said.abs().max()):.1e}"
        for batch in options.batches:
            runs = {
                "plain": partial(forward, net.network, images[:batch]),
                "folded": partial(forward, found.network, images[:batch]),
            }
            seconds = in_turn(runs, options.rounds)
            ratio, low, high = ratios(seconds, "plain")["folded"]
            times = " | ".join(f"{1000 * statistics.median(own):.1f}" for own in seconds.values())
            print(f"| {name} | {norms} | {batch} | {times} | {ratio:.2f} ({low:.2f} to {high:.2f}) | {error} |")


if __name__ == "__main__":
    main()
