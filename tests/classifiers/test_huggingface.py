import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import scene
from torch import nn

import whatwhere
from whatwhere.errors import DataError, InputError, UnsupportedError
from whatwhere.maps import METHODS
from whatwhere.scores import of_class

transformers = pytest.importorskip("transformers")

TOKENS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
SIZES = {"height": 64, "width": 64}
CUT = {"size": {"shortest_edge": 72}, "crop_size": SIZES}
KINDS = {
    "resnet": (
        "ResNet",
        {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "layer_type": "basic"},
        "ConvNext",
        {"size": {"shortest_edge": 56}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]},
    ),
    "convnext": ("ConvNext", {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4}, "ConvNext", {}),
    "vit": ("ViT", {**TOKENS, "image_size": 64}, "ViT", {"size": SIZES}),
    "deit": ("DeiT", {**TOKENS, "image_size": 64}, "DeiT", {"size": {"height": 72, "width": 72}, "crop_size": SIZES}),
    "swin": (
        "Swin",
        {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": 64},
        "ViT",
        {"size": SIZES},
    ),
    "dinov2": (
        "Dinov2",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16, "image_size": 64},
        "Bit",
        CUT,
    ),
    "efficientnet": (
        "EfficientNet",
        {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
        "EfficientNet",
        {"size": SIZES},
    ),
    "mobilevit": (
        "MobileViT",
        {
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
            "num_attention_heads": 2,
            "image_size": 64,
        },
        "MobileViT",
        CUT,
    ),
}


def made(kind, folder, **config):
    """A network of random weights and its image processor, as their own library writes them."""
    torch.manual_seed(0)
    family, told, processor, settings = KINDS[kind]
    names = {index: f"kind {index}" for index in range(7)}
    config = getattr(transformers, f"{family}Config")(**told, id2label=names, **config)
    network = getattr(transformers, f"{family}ForImageClassification")(config).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.15)  # some families begin with zeros
    network.save_pretrained(folder)
    processor = getattr(transformers, f"{processor}ImageProcessor")(**settings)
    processor.save_pretrained(folder)
    return network, processor


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_model_and_its_processor(kind, tmp_path):
    network, processor = made(kind, tmp_path)
    net = whatwhere.load(f"hf:{tmp_path}")
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*net.preprocess.size, 3), dtype=np.uint8))
    given = processor(images=pixels, return_tensors="pt", do_resize=False, do_center_crop=False)["pixel_values"]
    with torch.no_grad():
        wanted = network(given).logits
    ours, _ = net.preprocess(whatwhere.open_photo(pixels))
    torch.testing.assert_close(ours, given[0].flip(0) if kind == "mobilevit" else given[0], atol=1e-6, rtol=1e-5)
    assert wanted.std() > 1e-3
    torch.testing.assert_close(net.logits(ours[None]), wanted, atol=1e-4, rtol=1e-4)
    assert net.labels[3] == "kind 3"


NARROW = {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 32}}
LEVIT = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}  # it resizes to 8 / 7 of that


@pytest.mark.parametrize(
    ("kind", "other"),
    [("resnet", None), ("deit", None), ("dinov2", None), ("resnet", ("Bit", NARROW)), ("resnet", ("Levit", LEVIT))],
)
def test_a_crop_is_that_of_the_processor(kind, other, tmp_path):
    _, processor = made(kind, tmp_path)
    if other is not None:
        processor = getattr(transformers, f"{other[0]}ImageProcessor")(**other[1])
        processor.save_pretrained(tmp_path)
    preprocess = whatwhere.load(f"hf:{tmp_path}").preprocess
    y, x = np.mgrid[:150, :150] / 150
    smooth = np.stack([x, y, (np.sin(9 * x) + 1) / 2], -1)  # on which two antialiased resizings agree
    photo = Image.fromarray((255 * smooth).astype(np.uint8))
    given = processor(images=photo, return_tensors="pt")["pixel_values"][0]
    ours, _ = replace(preprocess, fit="crop")(whatwhere.open_photo(photo))
    levels = (ours - given).abs() * torch.tensor(preprocess.std)[:, None, None] * 255
    assert levels.max() < 3, levels.max()
    uncropped, _ = preprocess(whatwhere.open_photo(photo))
    assert ((uncropped - given).abs() * torch.tensor(preprocess.std)[:, None, None] * 255).max() > 10


def test_the_processor_is_measured(tmp_path):
    made("resnet", tmp_path)
    preprocess = whatwhere.load(f"hf:{tmp_path}").preprocess
    assert (preprocess.mean, preprocess.std) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert (preprocess.size, preprocess.interpolation, preprocess.crop_fraction) == ((56, 56), "bicubic", 0.875)


def test_cam_of_a_resnet_is_weights_times_features(tmp_path):
    network, _ = made("resnet", tmp_path)
    net = whatwhere.load(f"hf:{tmp_path}")
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features = network.resnet(images).last_hidden_state
        wanted = torch.einsum("c,bcyx->byx", network.classifier[1].weight[4], features)
    torch.testing.assert_close(METHODS["cam"](net.trace(images), of_class(4)), wanted, atol=1e-4, rtol=1e-4)


def test_gradcam_of_a_vit_by_autograd(tmp_path):
    network, _ = made("vit", tmp_path)
    net = whatwhere.load(f"hf:{tmp_path}")
    images = torch.randn(2, 3, 64, 64)
    output = network(images, output_hidden_states=True)
    tokens, score = output.hidden_states[2], output.logits[:, 5].sum()  # behind the last block but one
    (gradient,) = torch.autograd.grad(score, tokens)
    weights = gradient[:, 1:].mean(1)  # of the patches; the class token stands before them
    wanted = torch.einsum("bc,bnc->bn", weights, tokens[:, 1:].detach()).unflatten(1, (4, 4))
    ours = METHODS["gradcam"](net.trace(images), of_class(5))
    assert wanted.abs().max() > 1e-6
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))


def test_a_run_of_it_needs_the_folder_no_more(tmp_path):
    made("vit", tmp_path / "hf")
    net = whatwhere.load(f"hf:{tmp_path / 'hf'}")
    whatwhere.save(net, tmp_path / "run")
    (tmp_path / "hf").rename(tmp_path / "gone")
    again, images = whatwhere.load(tmp_path / "run"), torch.randn(1, 3, 64, 64)
    assert torch.equal(again.logits(images), net.logits(images))
    assert (list(again.labels), again.preprocess) == (list(net.labels), net.preprocess)


def test_classes_of_which_an_image_has_several(tmp_path):
    made("vit", tmp_path, problem_type="multi_label_classification")
    assert whatwhere.load(f"hf:{tmp_path}").activation == "sigmoid"


def test_an_explanation(tmp_path):
    made("swin", tmp_path)
    pixels, _ = scene(0)
    (one,) = whatwhere.explain(whatwhere.load(f"hf:{tmp_path}"), pixels, method="layercam")
    assert one.heat.shape == pixels.shape[:2]


def test_light_training_begins_with_it(tmp_path):
    from whatwhere.training.fit import train
    from whatwhere.training.recipe import Recipe

    made("resnet", tmp_path / "hf")
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(4):
            shade = tuple(value + 5 * index for value in colour)
            Image.new("RGB", (80, 70), shade).save(tmp_path / "data" / name / f"{index}.png")
    net = train(tmp_path / "data", tmp_path / "run", Recipe(model=f"hf:{tmp_path / 'hf'}", size=(64, 64)))
    again, images = whatwhere.load(tmp_path / "run"), torch.randn(1, 3, 64, 64)
    assert list(again.labels) == ["blue", "red"]
    torch.testing.assert_close(again.logits(images), net.logits(images))


def test_what_cannot_be_loaded(tmp_path):
    network, _ = made("vit", tmp_path / "whole")
    for name in ("hf:", f"hf:{tmp_path / 'none'}", "hf:./none"):
        with pytest.raises(DataError, match="wanted a folder"):
            whatwhere.load(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no config.json and no preprocessor_config.json"):
        whatwhere.load(f"hf:{tmp_path / 'empty'}")
    with pytest.raises(DataError, match="load one of transformers as hf:FOLDER"):
        whatwhere.load(tmp_path / "whole")
    network.save_pretrained(tmp_path / "alone")
    with pytest.raises(DataError, match=r"has no preprocessor_config\.json"):
        whatwhere.load(f"hf:{tmp_path / 'alone'}")
    net = whatwhere.load(f"hf:{tmp_path / 'alone'}", preprocess=whatwhere.Preprocess(size=(64, 64)))
    assert net.preprocess.size == (64, 64)


def test_weights_without_a_head_are_no_classifier(tmp_path):
    network, _ = made("vit", tmp_path)
    network.vit.save_pretrained(tmp_path)
    with pytest.raises(
        DataError,
        match=r"2 are missing, or of another shape, \['classifier.bias', 'classifier.weight'\]; it holds ViTM",
    ):
        whatwhere.load(f"hf:{tmp_path}")


def test_a_detector_is_no_classifier(tmp_path):
    made("vit", tmp_path)
    transformers.YolosConfig(architectures=["YolosForObjectDetection"]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="got YolosForObjectDetection"):
        whatwhere.load(f"hf:{tmp_path}")


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_damaged_files(tmp_path, file):
    made("vit", tmp_path)
    (tmp_path / file).write_bytes(b"{ half")
    with pytest.raises(DataError, match=str(tmp_path)):
        whatwhere.load(f"hf:{tmp_path}")


def test_no_code_of_a_folder_is_run(tmp_path):
    made("vit", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Net"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "evil"}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError):
        whatwhere.load(f"hf:{tmp_path}")
    assert not (tmp_path / "ran").exists()


def test_a_processor_that_does_more_is_refused(tmp_path):
    made("vit", tmp_path)
    processor = transformers.ViTImageProcessor(size=SIZES, do_normalize=False, do_rescale=False, do_resize=False)
    processor.save_pretrained(tmp_path)
    with pytest.raises((UnsupportedError, InputError)):
        whatwhere.load(f"hf:{tmp_path}")


def test_weights_of_other_classes_are_said(tmp_path):
    made("vit", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"], config["label2id"] = {str(i): str(i) for i in range(9)}, {str(i): i for i in range(9)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"of another shape, .*classifier\.bias"):
        whatwhere.load(f"hf:{tmp_path}")


def test_blue_first_is_not_forgotten(tmp_path):
    network, _ = made("mobilevit", tmp_path)
    preprocess = whatwhere.Preprocess(size=(64, 64), mean=(0.0,) * 3, std=(1.0,) * 3)
    net, images = whatwhere.load(f"hf:{tmp_path}", preprocess=preprocess), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(net.logits(images), network(images.flip(1)).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(UnsupportedError, match="takes blue first"):
        whatwhere.load(f"hf:{tmp_path}", pretrained=False)
