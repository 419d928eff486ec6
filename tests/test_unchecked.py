"""As it is used: in a process of its own, without the checks of types that refuse first in the other tests."""

import subprocess
import sys

REFUSED = """
import torch
import whatwhere, whatwhere.explanation, whatwhere.apps.cli
from whatwhere.classifiers.exported import export
from whatwhere.maps import METHODS
from whatwhere.maps.combine import fuse
from whatwhere.scores import top_class

assert callable(whatwhere.explain), "the function is hidden by a module"

net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
trace = whatwhere.load(net, preprocess=whatwhere.Preprocess((24, 40))).trace(torch.zeros(1, 3, 24, 40))
for call, said in (
    (lambda: whatwhere.open_photo(7), "got"),
    (lambda: whatwhere.open_photo(None), "got"),
    (lambda: whatwhere.Preprocess(fit="stretch"), "got"),
    (lambda: whatwhere.load(net, activation="bogus"), "softmax"),
    (lambda: METHODS["scorecam"](trace, top_class, weighting="sum"), "got"),
    (lambda: METHODS["scorecam"](trace, top_class, batch="all"), "got"),
    (lambda: METHODS["occlusion"](trace, top_class, cover="black"), "got"),
    (lambda: fuse(METHODS["gradcam"], by="sum"), "got"),
    (lambda: export(trace.net, "model.onnx", "torchscript", threshold=0.3), "onnx, openvino, pt2, got"),
):
    try:
        call()
    except whatwhere.InputError as error:
        assert said in str(error), error
        print("refused:", error)
    else:
        raise AssertionError(f"not refused, in line {call.__code__.co_firstlineno}")
"""


def test_wrong_words_and_types_are_refused():
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused:") == 9
