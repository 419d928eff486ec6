import pickle
import socket

import pytest
import torch
from scenes import gap_net, plain
from torch import nn

import whatwhere
from whatwhere.classifiers import zoo
from whatwhere.classifiers.labels import Labels, imagenet
from whatwhere.classifiers.split import SplitClassifier
from whatwhere.classifiers.weights import load_weights, read_weights
from whatwhere.errors import DataError, InputError, UnsupportedError


def test_labels_are_found_by_name_synonym_wordnet_id_and_index():
    labels = imagenet()
    assert len(labels) == len(set(labels)) == 1000
    for word in ("tabby", "Tabby Cat", " tabby ", "n02123045", 281, "281"):
        assert labels.find(word) == 281


def test_a_word_for_several_classes_says_which():
    with pytest.raises(InputError, match=r"134 \(crane \(n02012849\)\), 517 \(crane \(n03126707\)\)"):
        imagenet().find("crane")
    assert imagenet().find("crane (n03126707)") == 517


def test_unknown_labels_name_the_nearest():
    with pytest.raises(InputError, match="nearest: tabby"):
        imagenet().find("tabbi")
    for index in (-1, 1000, "1000"):
        with pytest.raises(InputError, match=r"in 0\.\.999"):
            imagenet().find(index)


def test_a_class_may_be_called_by_a_number():
    assert Labels(["zero", "7", "seven"]).find("7") == 1


def test_the_embedded_network(net):
    assert isinstance(net, SplitClassifier)
    assert net.name == "efficientnet-lite0"
    assert net.preprocess.size == (224, 224)
    assert len([key for key in net.network.state_dict() if not key.endswith("num_batches_tracked")]) == 247
    assert net.linear_law(torch.randn(2, 3, 192, 256)) < 1e-3


def test_unknown_models_name_the_nearest():
    with pytest.raises(InputError, match="nearest: resnet50"):
        whatwhere.load("resnet5")
    with pytest.raises(InputError, match="torchvision/vgg16"):
        whatwhere.load("torchvision/vgg61")


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18"])
def test_without_a_network_the_embedded_one_is_named(name, monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="efficientnet-lite0"):
        whatwhere.load(name)


def test_the_hub_is_put_back_as_it_was(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setattr("urllib.request.getproxies", dict)
    before = constants.HF_HUB_OFFLINE
    during = []

    def fetch():
        with zoo._hub("x"):
            during.append(constants.HF_HUB_OFFLINE)
            raise OSError("not in the cache")

    with pytest.raises(DataError, match="none could be fetched"):
        fetch()
    assert during == [True]
    assert before == constants.HF_HUB_OFFLINE


def test_weights_of_ones_own(tmp_path):
    import timm

    network = timm.create_model("resnet18", num_classes=1000)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "own.pth")
    net = whatwhere.load("timm/resnet18", weights=tmp_path / "own.pth")
    assert torch.equal(net.network.fc.weight, network.fc.weight)


def test_weights_that_do_not_fit_leave_the_network_alone():
    network = nn.Linear(3, 2)
    before = network.weight.clone()
    with pytest.raises(DataError, match=r"1 missing \['bias'\], 1 left over \['beta'\], 1 of another shape"):
        load_weights(network, {"weight": torch.zeros(2, 2), "beta": torch.zeros(1)}, "own")
    assert torch.equal(network.weight, before)


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


def test_a_pickle_that_wants_more_is_refused(tmp_path):
    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pth", "old.pth"):
        with pytest.raises(DataError, match="refused"):
            read_weights(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 half a zip"])
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_damaged_weights(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        read_weights(tmp_path / name)


def test_missing_weights(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_weights(tmp_path / "none.pth")


def test_a_saved_run_is_the_classifier(tmp_path, net, photos):
    whatwhere.save(net, tmp_path / "run")
    again = whatwhere.load(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"model.safetensors", "run.toml"}
    assert (again.name, again.preprocess, again.activation) == (net.name, net.preprocess, net.activation)
    assert list(again.labels) == list(net.labels)
    assert again.labels.find("tabby cat") == 281
    one, two = (whatwhere.explain(each, photos[0])[0].to_dict() for each in (net, again))
    assert one == two


def test_a_saved_run_keeps_its_layer_and_can_be_saved_twice(tmp_path):
    net = whatwhere.load("timm/test_resnet", pretrained=False, layer="layer3")
    for _ in range(2):
        whatwhere.save(net, tmp_path / "run")
    assert whatwhere.load(tmp_path / "run").layer == "layer3"


def test_what_was_measured_of_a_run_is_not_said_of_it_changed(tmp_path):
    net = whatwhere.load("timm/test_resnet", pretrained=False, layer="layer3")
    net.about = {"measured": {"top-1": 0.5}, "by_class": {"shown": [1]}, "data": {"train": 3}}
    whatwhere.save(net, tmp_path / "run")
    for same in ({}, {"layer": "layer3"}, {"preprocess": net.preprocess}, {"activation": "softmax"}):
        assert whatwhere.load(tmp_path / "run", **same).about == net.about
    for other in ({"layer": "layer2"}, {"preprocess": plain((64, 96))}, {"activation": "sigmoid"}):
        assert whatwhere.load(tmp_path / "run", **other).about == {"data": {"train": 3}}


def test_a_module_of_ones_own_has_no_name_to_save_it_by(tmp_path):
    net = whatwhere.load(gap_net(), preprocess=plain((24, 40)))
    with pytest.raises(InputError, match="have a name"):
        whatwhere.save(net, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("toml", "reason"),
    [(None, "not a saved run"), ("[model", "damaged"), ("[model]\nname = 'x'", "damaged")],
)
def test_folders_that_are_no_runs(tmp_path, toml, reason):
    if toml is not None:
        (tmp_path / "run.toml").write_text(toml)
    with pytest.raises(DataError, match=reason):
        whatwhere.load(tmp_path)


def test_weights_beside_a_run_are_refused(tmp_path):
    whatwhere.save(whatwhere.load("timm/test_resnet", pretrained=False), tmp_path / "run")
    with pytest.raises(InputError, match="own weights"):
        whatwhere.load(tmp_path / "run", weights="nonexistent.pth")


def test_a_folder_of_the_same_name_does_not_hide_the_embedded_network(tmp_path, monkeypatch):
    (tmp_path / "efficientnet-lite0").mkdir()
    monkeypatch.chdir(tmp_path)
    assert whatwhere.load().name == "efficientnet-lite0"


@pytest.mark.parametrize("name", ["timm/darknet17", "timm/resnet18.nonsense"])
def test_weights_that_nobody_has(name):
    with pytest.raises(DataError, match="no such weights"):
        whatwhere.load(name)


def test_labels_of_a_configuration_are_in_the_order_of_their_numbers():
    network = gap_net(classes=12)
    network.config = type("Config", (), {"id2label": {str(i): f"kind {i}" for i in range(12)}})()
    net = whatwhere.load(network, preprocess=plain((24, 40)))
    assert net.labels[10] == "kind 10"
    assert net.labels[2] == "kind 2"


def test_weights_of_another_number_of_classes_go_with_their_labels(tmp_path):
    import timm

    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "own.pth")
    net = whatwhere.load("timm/test_resnet", weights=tmp_path / "own.pth", labels=["a", "b", "c"])
    assert list(net.labels) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("old", "new"), [('name = "', "name = 3 # "), ("size = [", "size = 224 # ["), ('"softmax"', '"foo"')]
)
def test_a_damaged_run_is_a_data_error(tmp_path, old, new):
    whatwhere.save(whatwhere.load("timm/test_resnet", pretrained=False), tmp_path)
    text = (tmp_path / "run.toml").read_text()
    assert old in text
    (tmp_path / "run.toml").write_text(text.replace(old, new))
    with pytest.raises(DataError, match="damaged"):
        whatwhere.load(tmp_path)


class Module(nn.Module):
    """What a Lightning module is like: the network, and what belongs to its training."""

    def __init__(self, network, prefix="model"):
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(3))
        setattr(self, prefix, network)


def small(classes: int = 3):
    import timm

    torch.manual_seed(5)
    return timm.create_model("test_resnet", num_classes=classes)


@pytest.mark.parametrize("prefix", ["model", "net", "backbone", "module", "DataParallel", "_orig_mod"])
def test_a_checkpoint_whose_names_have_a_prefix(tmp_path, prefix):
    network = small()
    whole = nn.DataParallel(Module(network)) if prefix == "DataParallel" else Module(network, prefix)
    plain_data = {"epoch": 3, "hyper_parameters": {"lr": 0.1}, "callbacks": {}, "loops": {"fit": [1]}}
    torch.save({"state_dict": whole.state_dict(), **plain_data}, tmp_path / "x.ckpt")
    net = whatwhere.load("timm/test_resnet", weights=tmp_path / "x.ckpt")
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(net.logits(images), network.eval()(images))
    assert list(net.labels) == ["class 0", "class 1", "class 2"]
    mine = small().apply(lambda one: one.reset_parameters() if isinstance(one, nn.Conv2d) else None)
    again = whatwhere.load(mine, weights=tmp_path / "x.ckpt")
    assert again.network is mine
    assert torch.equal(again.logits(images), net.logits(images))


def test_a_checkpoint_that_lightning_wrote(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Learner(lightning.LightningModule):
        def __init__(self, lr):
            super().__init__()
            self.save_hyperparameters()
            self.net = small()

    trainer = lightning.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, barebones=False)
    trainer.strategy.connect(learner := Learner(0.1))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    net = whatwhere.load("timm/test_resnet", weights=tmp_path / "x.ckpt", labels=["a", "b", "c"])
    for key, tensor in learner.net.state_dict().items():
        assert torch.equal(net.network.state_dict()[key], tensor)


def test_checkpoints_that_do_not_fit(tmp_path):
    state = Module(small()).state_dict()
    del state["model.fc.bias"]
    torch.save({"state_dict": {**state, "model.extra": torch.zeros(1)}}, tmp_path / "x.ckpt")
    with pytest.raises(
        DataError, match=r"x.ckpt for timm/test_resnet.*1 missing \['fc.bias'\], 1 left over \['extra'\]"
    ):
        whatwhere.load("timm/test_resnet", weights=tmp_path / "x.ckpt")
    both = Module(small()).state_dict() | Module(small(), "ema").state_dict()
    torch.save({"state_dict": both}, tmp_path / "two.ckpt")
    with pytest.raises(DataError, match=r"several networks fit, under ema\., model\."):
        whatwhere.load("timm/test_resnet", weights=tmp_path / "two.ckpt")
    with pytest.raises(InputError, match=r"two\.ckpt has weights alone"):
        whatwhere.load(tmp_path / "two.ckpt")


def test_torchvisions_names_of_weights(monkeypatch):
    import torchvision
    from torchvision.models import ResNet18_Weights, ResNet50_Weights
    from torchvision.models._api import WeightsEnum

    torch.manual_seed(3)
    network = torchvision.models.resnet50().eval()
    asked = []
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: asked.append(self) or network.state_dict())
    weights = ResNet50_Weights.IMAGENET1K_V2
    photo = whatwhere.Photo(torch.randint(0, 256, (224, 224, 3)).to(torch.uint8).numpy(), "noise")
    for name in (weights, str(weights), "torchvision/resnet50.IMAGENET1K_V2"):
        net = whatwhere.load(name)
        assert asked.pop() is weights
        assert net.name == "torchvision/resnet50.IMAGENET1K_V2"
        own = weights.transforms(resize_size=224)  # nothing is cut away
        given = own(torch.from_numpy(photo.pixels).permute(2, 0, 1))
        images, _ = net.preprocess(photo)
        torch.testing.assert_close(images, given, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(net.logits(images[None]), network(given[None]), atol=1e-4, rtol=1e-4)
        assert net.preprocess.crop_fraction == 224 / 232
        words = [one.partition(" (")[0] for one in net.labels]
        assert all(one.startswith(word) for one, word in zip(weights.meta["categories"], words, strict=True))
        assert net.labels.find("n02123045") == net.labels.find("tabby cat") == 281
    monkeypatch.setitem(ResNet18_Weights.IMAGENET1K_V1.meta, "categories", [f"kind {i}" for i in range(1000)])
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: torchvision.models.resnet18().state_dict())
    assert whatwhere.load(ResNet18_Weights.IMAGENET1K_V1).labels[7] == "kind 7"


def test_weights_that_torchvision_does_not_have_for_it():
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
    from torchvision.models.quantization import ResNet50_QuantizedWeights

    with pytest.raises(InputError, match="one of IMAGENET1K_V1, IMAGENET1K_V2, got 'V3'"):
        whatwhere.load("torchvision/resnet50.V3")
    with pytest.raises(InputError, match=r"no weights 'ResNet50_Weights\.V3'"):
        whatwhere.load("ResNet50_Weights.V3")
    for weights in (FasterRCNN_ResNet50_FPN_Weights.DEFAULT, ResNet50_QuantizedWeights.DEFAULT):
        with pytest.raises(UnsupportedError, match="wanted weights of an image classifier"):
            whatwhere.load(weights)
