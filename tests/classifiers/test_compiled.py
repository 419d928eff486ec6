"""A compiled network says what the eager one says, and refuses what it cannot do."""

import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from threading import Thread

import pytest
import torch
from scenes import MANY_FORWARDS, deep_head_net, gap_net, plain
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import whatwhere
from whatwhere.classifiers.engines import plain_mode
from whatwhere.classifiers.split import SplitClassifier
from whatwhere.errors import InputError, MissingExtraError, UnsupportedError
from whatwhere.maps import METHODS
from whatwhere.scores import of_class, top_class

SIZE = (24, 40)
needs_gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
BACKENDS = ["onnxruntime", "openvino", pytest.param("inductor", marks=needs_gcc)]
ENGINES = BACKENDS[:2]


for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)
if find_spec("openvino") is None:  # not imported here, because the package does so without its telemetry
    pytest.skip("could not import 'openvino'", allow_module_level=True)


def noise(count: int, size: tuple[int, int] = SIZE, seed: int = 5) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def small(network: nn.Module | None = None):
    return whatwhere.load(network or gap_net(), preprocess=plain(SIZE))


def check(eager, compiled, *, batches=(1, 2, 3), lawful=True, tolerance=1e-4) -> None:
    """Features, logits and class maps are those of the eager network, at every batch size."""
    for count in batches:
        images = noise(count, eager.preprocess.size)
        wanted, got = eager.trace(images), compiled.trace(images)
        close = {"atol": tolerance * float(wanted.logits.detach().abs().amax().clamp(min=1)), "rtol": tolerance}
        torch.testing.assert_close(got.features, wanted.features.detach(), **close)
        torch.testing.assert_close(got.logits.detach(), wanted.logits.detach(), **close)
        torch.testing.assert_close(compiled.logits(images), wanted.logits.detach(), **close)
        if lawful:
            torch.testing.assert_close(compiled.class_maps(got), eager.class_maps(wanted), **close)
            continue
        complaints = []
        for one, trace in ((eager, wanted), (compiled, got)):
            with pytest.raises(UnsupportedError, match="linear in the mean") as refusal:
                one.class_maps(trace)
            complaints.append(str(refusal.value).partition("| is ")[0])
        assert complaints[0] == complaints[1]


@cache
def ready(backend: str = "onnxruntime"):
    """A small network and what is compiled of it, for tests that change neither."""
    eager = small()
    return eager, eager.compiled(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_network(backend):
    check(*ready(backend))


@pytest.mark.parametrize("backend", ENGINES)
def test_a_graph_that_was_kept_is_not_made_again(backend, tmp_path, monkeypatch):
    eager, kept = small(), tmp_path / "graph.onnx"
    first = eager.compiled(backend, kept=kept)
    wanted = first.trace(noise(2))
    assert [file.name for file in tmp_path.iterdir()] == ["graph.onnx"]
    whole = kept.read_bytes()

    def refuse(*args, **kwargs):
        raise AssertionError("exported again")

    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx, "export", refuse)
        found = eager.compiled(backend, kept=kept).trace(noise(2))
    assert found.features.equal(wanted.features)
    assert found.logits.equal(wanted.logits)
    assert found.maps.equal(wanted.maps)
    kept.write_bytes(whole[:100])
    check(eager, eager.compiled(backend, kept=kept))
    assert kept.stat().st_size > 100
    other = small()
    with torch.no_grad():
        other.network[-1].bias += 1
    with pytest.raises(UnsupportedError, match="gives other logits"):
        other.compiled(backend, kept=kept).trace(noise(1))


def test_a_graph_that_was_kept_of_another_layer_is_not_taken(tmp_path):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Sigmoid(), nn.Linear(4, 2)).eval()
    one, other = (small(network).at(layer) for layer in "01")
    kept = tmp_path / "graph.onnx"
    one.compiled(kept=kept).trace(noise(1))
    with pytest.raises(UnsupportedError, match="gives other features: they differ by"):
        other.compiled(kept=kept).trace(noise(1))


@pytest.mark.parametrize("backend", ENGINES)
def test_a_network_without_the_linear_law(backend):
    eager = small(deep_head_net())
    compiled = eager.compiled(backend)
    check(eager, compiled, lawful=False)
    trace = compiled.trace(noise(2))
    assert trace.maps is None
    with pytest.raises(UnsupportedError, match="linear in the mean"):
        METHODS["cam"](trace, of_class(0))
    torch.testing.assert_close(
        METHODS["eigencam"](trace, of_class(0)), METHODS["eigencam"](eager.trace(noise(2)), of_class(0))
    )


def test_the_embedded_network(net, photos):
    compiled = net.compiled()
    assert isinstance(net, SplitClassifier)
    check(net, compiled, batches=(1, 3))
    assert compiled.labels is net.labels
    assert compiled.preprocess is net.preprocess
    assert (compiled.name, compiled.activation, compiled.eager) == (net.name, net.activation, net)
    (got,), (wanted,) = (whatwhere.explain(one, photos[0], method="cam") for one in (compiled, net))
    assert (got.label, got.box) == (wanted.label, wanted.box)


def test_a_network_that_splits_by_itself_in_openvino():
    eager = whatwhere.load("timm/test_efficientnet", pretrained=False, preprocess=plain((64, 96)))
    assert isinstance(eager, SplitClassifier)
    check(eager, eager.compiled("openvino"), batches=(1, 3))


def test_a_hooked_network_of_torchvision():
    eager = whatwhere.load(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7), preprocess=plain((96, 160)))
    compiled = eager.compiled()
    check(eager, compiled)
    assert compiled.trace(noise(1, (96, 160))).features.shape == (1, 512, 3, 5)


def test_tokens_become_a_grid():
    options = {"img_size": (48, 80), "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
    eager = whatwhere.load(VisionTransformer(**options), preprocess=plain((48, 80)))
    nn.init.normal_(eager.network.head.weight)
    assert eager.trace(noise(1, (48, 80))).features.shape == (1, 24, 3, 5)
    check(eager, eager.compiled(), batches=(1, 2), lawful=False)


def test_features_are_noted_before_the_next_layer_works_in_place():
    eager = small().at("3")  # a convolution, a ReLU in place behind it
    trace = eager.trace(noise(2))
    assert (trace.features < 0).any()
    check(eager, eager.compiled(), lawful=False)


def test_a_channel_for_each_class_is_its_own_class_map():
    eager = small(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    compiled = eager.compiled()
    check(eager, compiled)
    trace = compiled.trace(noise(2))
    assert torch.equal(compiled.class_maps(trace), trace.features)


@pytest.mark.parametrize("backend", ["openvino", pytest.param("inductor", marks=needs_gcc)])
def test_bfloat16_is_nearly_the_same(backend):
    eager = small()
    compiled = eager.compiled(backend, torch.bfloat16)
    images = noise(3)
    got, wanted = compiled.trace(images), eager.trace(images)
    assert got.features.dtype == got.logits.dtype == got.maps.dtype == torch.float32
    for one, other in [
        (got.features, wanted.features.detach()),
        (got.logits.detach(), wanted.logits.detach()),
        (compiled.class_maps(got), eager.class_maps(wanted)),
    ]:
        assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1] > 0.999
        torch.testing.assert_close(one, other, atol=0.03 * float(other.abs().amax()), rtol=0.03)
    assert got.eps == torch.finfo(compiled.network.computed).eps
    if backend == "inductor":
        assert compiled.network.computed == torch.bfloat16


def test_logits_of_the_graph_are_the_mean_of_its_maps():
    _, compiled = ready()
    trace = compiled.trace(noise(2))
    bias = compiled.eager.network[8].bias.detach()
    torch.testing.assert_close(trace.maps.mean((2, 3)) + bias, trace.logits.detach())
    assert compiled.linear_law(noise(2)) < 1e-5


WITHOUT_GRADIENTS = {"cam", "eigencam", "kpcacam", "fem", *MANY_FORWARDS}


@pytest.mark.parametrize("method", sorted(WITHOUT_GRADIENTS))
def test_methods_without_gradients_are_the_same(method):
    eager, compiled = ready()
    images, score = noise(3), of_class(torch.tensor([3, 0, 2]))
    options = {"samples": 40} if method == "rise" else {}
    got = METHODS[method](compiled.trace(images), score, **options)
    expected = METHODS[method](eager.trace(images), score, **options)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - WITHOUT_GRADIENTS - {"distilled"}))
def test_methods_with_gradients_say_what_to_use(method):
    trace = ready()[1].trace(noise(1))
    assert not trace.features.requires_grad
    with pytest.raises(UnsupportedError, match=r"compiled Sequential.*use cam, eigencam.*\.eager"):
        METHODS[method](trace, top_class)


def test_other_layers_are_compiled_once():
    compiled = ready()[1]
    one, other = compiled.traces(noise(2), ["2", "4"])
    assert one.net is compiled.at("2")
    assert other.features.shape[1] == 12
    with pytest.raises(InputError, match="at least one layer"):
        compiled.traces(noise(1), [])


def test_ablation_through_the_tail_of_a_half_precision_network():
    eager = small(deep_head_net().half())
    trace = eager.compiled().trace(noise(1))
    assert METHODS["ablationcam"](trace, of_class(1)).isfinite().all()


def test_ablation_through_the_tail_is_the_eager_networks():
    eager = small(deep_head_net())
    got = METHODS["ablationcam"](eager.compiled().trace(noise(2)), of_class(1))
    torch.testing.assert_close(got, METHODS["ablationcam"](eager.trace(noise(2)), of_class(1)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ENGINES)
def test_what_is_done_elsewhere_later_changes_nothing(backend):
    eager = small()
    compiled = eager.compiled(backend)
    images = noise(2)
    before = eager.trace(images)
    first = compiled.trace(images)
    kept = first.features.clone(), first.maps.clone(), first.logits.detach().clone()
    with torch.no_grad():
        for parameter in eager.network.parameters():
            parameter.mul_(-2)
    # the graph of the logits is made only now
    torch.testing.assert_close(compiled.logits(images), before.logits.detach())
    torch.testing.assert_close(compiled.checked_linear(first).weight, eager.network[8].weight.detach() / -2)
    compiled.trace(noise(2, seed=6))
    for now, then in zip((first.features, first.maps, first.logits.detach()), kept, strict=True):
        assert torch.equal(now, then)
    assert torch.equal(compiled.trace(images).maps, kept[1])


def test_the_eager_network_is_left_as_it_was():
    eager = small()
    network = eager.network
    network[1].train()
    network[3].requires_grad_(False)
    weights = {key: tensor.clone() for key, tensor in network.state_dict().items()}

    def state() -> list[object]:
        hooks = [
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in network.modules()
        ]
        modes = [module.training for module in network.modules()]
        return [modes, hooks, [(p.requires_grad, p.grad) for p in network.parameters()]]

    before, random = state(), torch.get_rng_state()
    compiled = eager.compiled()
    compiled.trace(noise(1))
    compiled.logits(noise(1))
    assert state() == before
    assert all(torch.equal(weights[key], tensor) for key, tensor in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_graphs_run_without_the_callers_autocast(kind):
    before = torch.is_autocast_enabled(kind)
    torch.set_autocast_enabled(kind, True)  # of a GPU that need not be there
    try:
        with plain_mode():
            assert not torch.is_autocast_enabled(kind)
        assert torch.is_autocast_enabled(kind)
    finally:
        torch.set_autocast_enabled(kind, before)


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_the_same_in_any_mode(context):
    eager = small()
    expected = METHODS["cam"](eager.trace(noise(2)), of_class(1))
    with context():
        compiled = eager.compiled()
        inside = METHODS["cam"](compiled.trace(noise(2)), of_class(1))
        logits = compiled.logits(noise(2))
    torch.testing.assert_close(inside, expected)
    torch.testing.assert_close(logits, eager.logits(noise(2)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_of_another_precision_is_compiled_in_float32(dtype):
    network = gap_net()
    expected = small(network).logits(noise(2))
    compiled = small(network.to(dtype)).compiled()
    assert compiled.logits(noise(2).to(dtype)).dtype == torch.float32
    torch.testing.assert_close(compiled.logits(noise(2)), expected, atol=1e-2, rtol=1e-2)
    assert compiled.trace(noise(2).to(dtype)).features.dtype == torch.float32


def test_images_that_lie_otherwise_in_memory():
    _, compiled = ready()
    images = noise(4)
    expected = compiled.logits(images)
    for other in (images.to(memory_format=torch.channels_last), images.clone().requires_grad_()):
        torch.testing.assert_close(compiled.logits(other), expected)
    torch.testing.assert_close(compiled.logits(images[::2]), expected[::2])
    torch.testing.assert_close(compiled.trace(images.flip(3).flip(3)[1:]).logits.detach(), expected[1:])


@pytest.mark.parametrize("backend", ENGINES)
def test_threads_share_one(backend):
    _, compiled = ready(backend)
    batches = [noise(1 + i % 3, seed=i) for i in range(6)]
    expected = [compiled.trace(batch).maps for batch in batches]
    wrong: list[int] = []

    def look(i: int) -> None:
        for _ in range(20):
            if not torch.allclose(compiled.trace(batches[i]).maps, expected[i], atol=1e-6):
                wrong.append(i)

    threads = [Thread(target=look, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_at_another_layer():
    eager = small()
    compiled = eager.compiled("openvino").at("1")
    assert (compiled.backend, compiled.eager.layer) == ("openvino", "1")
    check(eager.at("1"), compiled, lawful=False)
    again = compiled.compiled("onnxruntime")
    assert again.eager is compiled.eager
    with pytest.raises(InputError, match="nearest"):
        compiled.at("nowhere")


def test_inputs_are_checked():
    _, compiled = ready()
    with pytest.raises(InputError, match=r"compiled for images \(b, 3, 24, 40\), got \(1, 3, 40, 24\)"):
        compiled.trace(noise(1, (40, 24)))
    images = noise(3)
    images[1, 0, 2, 3] = float("nan")
    for look in (compiled.trace, compiled.logits):
        with pytest.raises(InputError, match="image 1 of the batch"):
            look(images)


def test_a_dtype_that_a_backend_lacks():
    with pytest.raises(
        UnsupportedError, match="onnxruntime computes in float32, got bfloat16; use openvino or inductor"
    ):
        small().compiled(dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="no backend"):
        small().compiled("openvino", torch.float64)


@pytest.mark.parametrize(("backend", "package"), [("onnxruntime", "onnxruntime"), ("openvino", "onnxscript")])
def test_a_missing_package_names_the_extra(monkeypatch, backend, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"needs {package}; run: pip install 'whatwhere\[export\]'"):
        small().compiled(backend)


class Odd(nn.Module):
    """Its path depends on what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = gap_net()[:5], gap_net()[5:]

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        return self.head(features) if float(features.detach().mean()) > -1 else self.head(features * 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_network_that_cannot_be_exported(backend, capfd):
    with pytest.raises(UnsupportedError, match=rf"Odd cannot be compiled for {backend}: \w+: \w+") as refusal:
        small(Odd()).compiled(backend)
    assert "\n" not in str(refusal.value)
    assert capfd.readouterr() == ("", "")


class Restless(nn.Module):
    """It says something else once it is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.net = gap_net()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images) * (3 if torch.compiler.is_exporting() else 1)


def test_what_an_export_says_is_compared():
    compiled = small(Restless()).at("net.4").compiled()
    with pytest.raises(UnsupportedError, match="gives other logits: they differ by"):
        compiled.logits(noise(1))


def test_a_model_beyond_the_limit_of_onnx(monkeypatch):
    monkeypatch.setattr("whatwhere.classifiers.compiled._ONNX_LIMIT", 1000)
    with pytest.raises(UnsupportedError, match="an ONNX model ends at 2 GB; compile it with inductor"):
        small().compiled()


def test_quiet_and_without_a_trace(capfd, tmp_path):
    code = """
import sys
import torch, whatwhere, whatwhere.classifiers.classifier
net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
net = whatwhere.load(net, preprocess=whatwhere.Preprocess(size=(24, 40)))
assert not {"onnx", "onnxscript", "onnxruntime", "openvino", "torch._inductor.compile_fx"} & set(sys.modules)
try:
    net.compiled("bogus")
except whatwhere.InputError as error:
    assert "onnxruntime, openvino, inductor" in str(error)
else:
    raise AssertionError("not refused")
for backend in ("onnxruntime", "openvino"):
    net.compiled(backend).trace(torch.ones(1, 3, 24, 40))
assert "openvino_telemetry" not in sys.modules
"""
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(next(iter(whatwhere.__path__)) + "/..")
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=tmp_path, env=environment)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert not (tmp_path / "intel").exists()
    assert not list(tmp_path.rglob("*.onnx"))
