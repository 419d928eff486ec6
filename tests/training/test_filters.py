"""Where a filter bank begins: peaks by hand, filters that know their class's patches, and a run that keeps them."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import whatwhere
from whatwhere.classifiers.around import around
from whatwhere.classifiers.dfl import DflNet, resized
from whatwhere.classifiers.heads import Head, Headed
from whatwhere.classifiers.zoo import build
from whatwhere.errors import DataError, InputError, TrainingError, UnsupportedError
from whatwhere.images import Preprocess
from whatwhere.training.bank import Bank, fit_bank, general_of, grids_of
from whatwhere.training.data import Pictures, looks, split_data
from whatwhere.training.filters import centres_of, initialize_filters, peaks_of
from whatwhere.training.fit import beginning, resolved, train
from whatwhere.training.light import features_of
from whatwhere.training.loop import Fitting, rates
from whatwhere.training.objective import loss_of, measured
from whatwhere.training.recipe import Recipe

SIZE = (48, 64)
OPTIONS = {"channels": [8, 8, 12, 16], "output_stride": 16}
BANK = Recipe(
    mode="full",
    model="timm/resnet10t",
    pretrained=False,
    options=OPTIONS,
    head={"filters": 2},
    size=SIZE,
    epochs=2,
    batch=6,
    ema=0.0,
    light_start=False,
)


def banked(classes=3):
    """A classifier with a bank of two filters a class, its statistics those of some noise."""
    torch.manual_seed(0)
    network, _ = build("timm/resnet10t", pretrained=False, num_classes=classes, **OPTIONS, head={"filters": 2})
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.05, 0.2)
    labels = ["disc", "square", "stripes"][:classes]
    plain = Preprocess(size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3)
    return around(network, name="timm/resnet10t", labels=labels, preprocess=plain)


def test_peaks_by_hand():
    features = torch.zeros(2, 4, 6)
    features[:, 1, 1] = torch.tensor([3.0, 4.0])  # energy 5
    features[:, 1, 2] = torch.tensor([0.0, 4.5])  # beside it, and less
    features[:, 3, 5] = torch.tensor([6.0, 0.0])  # in the corner
    found = peaks_of(features, 2)
    assert found.tolist() == [[6.0, 0.0], [3.0, 4.0]]


def test_centres_come_again_where_there_are_too_few():
    points = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    centres = centres_of(points, 5, seed=0)
    assert centres.shape == (5, 2)
    assert {tuple(one) for one in centres[:2].tolist()} == {(1.0, 0.0), (0.0, 2.0)}
    # a little apart, or they would be the same for ever
    apart = (centres[2:] - centres[[0, 1, 0]]).norm(dim=1) / centres[[0, 1, 0]].norm(dim=1)
    torch.testing.assert_close(apart, torch.full((3,), 0.01), rtol=1e-3, atol=0)


class Colours(nn.Module):
    """How red, green, blue, yellow, cyan, magenta and white each 8 x 8 pixels are."""

    def forward(self, images):
        r, g, b = nn.functional.avg_pool2d(images, 8).unbind(1)
        several = [r - g.maximum(b), g - r.maximum(b), b - r.maximum(g)]
        several += [r.minimum(g) - b, g.minimum(b) - r, r.minimum(b) - g, r.minimum(g).minimum(b)]
        return torch.stack(several, 1).relu()


@pytest.fixture
def coloured(tmp_path):
    """8 pictures of each of three classes: two spots of the class's two colours, and two white ones that all have."""
    colours = {"one": [(1, 0, 0), (0, 1, 0)], "two": [(0, 0, 1), (1, 1, 0)], "three": [(0, 1, 1), (1, 0, 1)]}
    for kind, (name, own) in enumerate(colours.items()):
        (tmp_path / name).mkdir()
        for number in range(8):
            draw = np.random.default_rng([kind, number])
            pixels = draw.uniform(0, 20, (64, 96, 3))
            places = draw.permutation(24)[:4]
            for place, colour in zip(places, [*own, (1, 1, 1), (1, 1, 1)], strict=True):
                y, x = 16 * (place // 6), 16 * (place % 6)
                pixels[y : y + 8, x : x + 8] = 230 * np.array(colour)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name / f"{number}.png")
    return split_data(tmp_path, Recipe(validation=0.0)).train


def colour_net():
    """A filter bank over ``Colours``, four filters a class."""
    torch.manual_seed(0)
    plain = Preprocess(size=(64, 96), mean=(0.0,) * 3, std=(1.0,) * 3)
    general = Headed(Colours(), nn.Identity(), Head(7, 3))
    network = DflNet(general, "backbone", torch.rand(1, 3, 64, 96), filters=4)
    return around(network, labels=["one", "three", "two"], preprocess=plain)


@pytest.mark.parametrize("unit", [False, True])
def test_filters_are_the_patches_of_their_class(coloured, unit):
    net = colour_net()
    before = {key: tensor.clone() for key, tensor in net.network.state_dict().items()}
    initialize_filters(net, coloured, unit=unit)
    after = net.network.state_dict()
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    assert changed == {"bank.weight", "bank.bias", "patches.weight", "patches.bias"}
    labels, weight, said = coloured.targets().argmax(1), net.network.bank.weight.flatten(1), []
    with torch.no_grad():
        for x in looks(coloured, net.preprocess, 1):
            said.append(peaks_of(net.network.tapped(x)[1][0]) @ weight.T + net.network.bank.bias)
    strongest = torch.stack([one.amax(0) for one in said])
    torch.testing.assert_close(strongest.mean(0), torch.zeros(12), atol=1e-3, rtol=0)
    of_class = torch.stack([strongest[labels == label].mean(0).unflatten(0, (3, 4)).mean(1) for label in range(3)])
    # to the peaks of a class its filters respond more than the others, and more than to those of other classes
    assert (of_class.argmax(0) == torch.arange(3)).all()
    assert (of_class.argmax(1) == torch.arange(3)).all()
    # among them those of the class's two colours
    colours = {"one": {0, 1}, "two": {2, 3}, "three": {4, 5}}
    for label, name in enumerate(coloured.classes):
        assert colours[name] <= set(weight[4 * label : 4 * label + 4].argmax(1).tolist())
    # what all have in common is not made loud
    spread = strongest.std(0, correction=0)
    assert spread.max() < 1.001
    assert spread.median() > 0.999
    # P begins with what the side branch says
    with torch.no_grad():
        torch.testing.assert_close(net.network.patches(strongest), net.network.side(strongest))


def test_pictures_may_show_several_classes_and_none(coloured):
    first = coloured.samples
    samples = [replace(one, labels=(0, 1)) for one in first[:8]] + [replace(one, labels=()) for one in first[8:12]]
    samples += [replace(one, labels=(2,)) for one in first[16:]]
    places = [*range(12), *range(16, 24)]
    kept = {new: coloured.kept[old] for new, old in enumerate(places)}
    several = Pictures(coloured.classes, samples, kept, [coloured.digests[old] for old in places])
    net = colour_net()
    initialize_filters(net, several)
    weight = net.network.bank.weight.flatten(1)
    assert {0, 1} <= set(weight[:4].argmax(1).tolist())  # those of the first class, which the second has as well
    assert {0, 1} <= set(weight[4:8].argmax(1).tolist())
    without = Pictures(coloured.classes, samples[:12], kept, several.digests[:12])
    with pytest.raises(DataError, match="two: there is no picture"):
        initialize_filters(colour_net(), without)


def test_one_picture_of_a_class_will_do(coloured):
    net = colour_net()
    initialize_filters(net, coloured.part([0, 8, 16]))
    assert all(tensor.isfinite().all() for tensor in net.network.state_dict().values())


def test_the_seed_says_it_all_and_the_batch_nothing(figures):
    pictures = split_data(figures, Recipe(validation=0.0)).train
    nets = [banked() for _ in range(4)]
    for net, how in zip(nets, ({}, {"batch": 5}, {"seed": 1}, {"unit": True}), strict=True):
        initialize_filters(net, pictures, **how)
    first, batched, other, plain = (net.network.bank.weight for net in nets)
    torch.testing.assert_close(first, batched, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first, other, atol=1e-3)
    assert not torch.equal(first, plain)


def test_what_has_no_bank_has_nothing_to_begin_with(figures):
    pictures = split_data(figures, Recipe()).train
    with pytest.raises(UnsupportedError, match="no filter bank"):
        initialize_filters(whatwhere.load(), pictures)


def test_each_stream_has_its_loss(figures):
    recipe = resolved(BANK)
    splits = split_data(figures, recipe)
    net = beginning(recipe, splits)
    fitting = Fitting(net, recipe, torch.zeros(3))
    images, targets = torch.rand(4, 3, *SIZE), torch.eye(3)[[0, 1, 2, 0]]
    net.network.eval()
    general, features = net.network.tapped(images)
    strongest = net.network.bank(features).amax((2, 3))
    losses = [
        loss_of(logits, targets, smoothing=recipe.smoothing)
        for logits in (general, net.network.patches(strongest), net.network.side(strongest))
    ]
    torch.testing.assert_close(fitting.loss(images, targets), losses[0] + losses[1] + 0.1 * losses[2])
    groups = rates(net.network, recipe)
    trained = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(trained) == sum(1 for _ in net.network.parameters())
    assert {trained[id(p)] for p in net.network.bank.parameters()} == {recipe.lr}
    groups = rates(net.network, replace(recipe, filter_lr=0.5))
    trained = {id(p): group["lr"] for group in groups for p in group["params"]}
    for part, rate in ((net.network.bank, 0.5), (net.network.patches, 0.5), (net.network.general.head, 1.0)):
        assert {trained[id(p)] for p in part.parameters()} == {rate * recipe.lr}


def test_a_bank_is_trained_saved_and_taken_up_again(figures, tmp_path):
    net = train(figures, tmp_path / "run", BANK)
    again = whatwhere.load(tmp_path / "run")
    images = torch.rand(2, 3, *SIZE)
    assert torch.equal(net.logits(images), again.logits(images))
    (seen,) = whatwhere.explain(again, figures / "test/disc/000.png", target="disc", method="dfl")
    assert seen.heat.shape == (44, 60)
    # one that was cut off after the patches were found goes on with the same
    from whatwhere.training import fit

    def cut(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("whatwhere.training.full.fit_network", cut)
        with pytest.raises(KeyboardInterrupt):
            fit.train(figures, tmp_path / "cut", BANK)
    assert (tmp_path / "cut/state/filters.safetensors").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("whatwhere.training.filters.peaks_of", cut)  # they are not looked for again
        resumed = train(figures, tmp_path / "cut", resume=True)
    assert torch.equal(resumed.logits(images), net.logits(images))


def test_filters_that_have_learned_stay(figures, tmp_path):
    first = train(figures, tmp_path / "run", BANK)
    still = replace(BANK, model=str(tmp_path / "run"), options={}, head={}, epochs=1, lr=0.0, frozen_norm=1.0)
    again = train(figures, tmp_path / "again", still)
    images = torch.rand(2, 3, *SIZE)
    torch.testing.assert_close(again.logits(images), first.logits(images))
    # of other classes they begin anew
    for name in ("disc", "square"):
        for split in ("train", "test"):
            (figures / split / name).rename(figures / split / f"a {name}")
    other = train(figures, tmp_path / "other", still)
    assert not torch.allclose(other.network.bank.weight, first.network.bank.weight, atol=1e-2)


def test_what_was_there_before_the_first_epoch_is_measured_as_a_whole(figures, tmp_path):
    still = replace(BANK, light_start=True, validation=0.3, epochs=1, lr=0.0, frozen_norm=1.0)
    train(figures, tmp_path / "run", still)
    with (tmp_path / "run/metrics.csv").open() as file:
        light, full = csv.DictReader(file)
    assert light["phase"] == "light"
    assert light["validation"] == full["validation"]


def test_random_filters_are_a_choice(figures, tmp_path):
    recipe = resolved(replace(BANK, filter_start="random"))
    assert recipe.filter_start == "random"
    net = train(figures, tmp_path / "run", replace(BANK, filter_start="random", epochs=1))
    begun = train(figures, tmp_path / "other", replace(BANK, epochs=1))
    assert not torch.allclose(net.network.bank.weight, begun.network.bank.weight, atol=1e-2)


def test_a_bank_s_loss_is_its_own(figures, tmp_path):
    with pytest.raises(InputError, match="loss of its own, and so has spg"):
        train(figures, tmp_path / "run", replace(BANK, aids=("spg",)))
    net = train(figures, tmp_path / "cut", replace(BANK, aids=("cutmix", "adl"), epochs=1))
    assert not any(len(module._forward_hooks) for module in net.network.modules())


LIGHT = replace(BANK, mode="light", epochs=6, lr=5e-3, validation=0.3)


def test_grids_are_what_the_filters_read(figures, tmp_path):
    net, pictures = banked(), split_data(figures, Recipe(validation=0.0)).train
    net.network.scales = (1.0, 1.5)
    grids = grids_of(net, pictures, tmp_path / "grids", batch=5, features=tmp_path / "features.safetensors")
    images = torch.cat(list(looks(pictures, net.preprocess, 8)))
    with torch.no_grad():
        logits, plain = net.network.tapped(images)
        other, larger = net.network.tapped(resized(images.flip(-1), 1.5))
        also, _ = net.network.tapped(resized(images, 1.5))
    few = [2, 0, 7]
    torch.testing.assert_close(grids.at(0, few), plain[few], rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(grids.at(1, few, [1, 1, 1]), larger[few], rtol=2e-3, atol=1e-4)
    assert not torch.equal(other, also)
    torch.testing.assert_close(grids.general, (logits + also) / 2, rtol=1e-4, atol=1e-5)
    # what the last layer reads is what light mode would have computed for itself
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("whatwhere.training.light._looked", None)
        kept = features_of(general_of(net), pictures, tmp_path / "features.safetensors")
    torch.testing.assert_close(kept, features_of(general_of(net), pictures), rtol=1e-4, atol=1e-5)


def test_light_mode_trains_a_bank_and_leaves_the_backbone(figures, tmp_path):
    net = train(figures, tmp_path / "run", LIGHT)
    begun = beginning(resolved(LIGHT), split_data(figures, LIGHT))
    for one, other in zip(net.network.backbone.parameters(), begun.network.backbone.parameters(), strict=True):
        assert torch.equal(one, other)
    with (tmp_path / "run/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["phase"] for row in rows] == ["light", *["bank"] * 6]
    # what validation says is what the network says of these pictures, but for half precision
    held = split_data(figures, LIGHT).validation
    logits = torch.cat([net.logits(x) for x in looks(held, net.preprocess, 8)])
    assert float(rows[-1]["validation"]) == pytest.approx(measured(logits, held.targets()), abs=1 / len(held) + 1e-6)
    # the same seed gives the same bits, and one that was cut off ends as it would have
    from whatwhere.training import fit

    def cut(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("whatwhere.training.fit.fit_bank", cut)
        with pytest.raises(KeyboardInterrupt):
            fit.train(figures, tmp_path / "cut", LIGHT)
    again = train(figures, tmp_path / "cut", resume=True)
    for key, tensor in net.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[key]), key


def test_a_bank_learns_what_its_loss_asks(coloured, tmp_path):
    recipe = Recipe(epochs=30, batch=4, lr=0.02, ema=0.0, smoothing=0.0, weight_decay=0.0)
    net = colour_net()
    net.network.weights = (0.0, 1.0, 0.0)
    grids, targets = grids_of(net, coloured, tmp_path), coloured.targets()

    @torch.no_grad()
    def lost():
        strongest = net.network.bank(grids.at(0, slice(None))).amax((2, 3))
        return float(loss_of(net.network.patches(strongest), targets))

    before, general = lost(), net.network.general.head.linear.weight.clone()
    rows = fit_bank(net, grids, targets, recipe)
    assert lost() < 0.1 * before
    assert rows[-1] == {"phase": "bank", "epoch": 29}
    assert measured(Bank(net.network).said(grids, 0.0), targets) == 1
    assert torch.equal(net.network.general.head.linear.weight, general)
    # without a rate nothing moves, and an average of what does not move is that
    still = {key: tensor.clone() for key, tensor in net.network.state_dict().items()}
    fit_bank(net, grids, targets, replace(recipe, lr=0.0, ema=0.9))
    for key, tensor in net.network.state_dict().items():
        torch.testing.assert_close(tensor, still[key], msg=key)
    # nor where it has no say
    net.network.weights = (1.0, 0.0, 0.0)
    assert fit_bank(net, grids, targets, recipe) == []
    with pytest.raises(TrainingError, match="a smaller lr"):
        fit_bank(colour_net(), grids, targets, replace(recipe, lr=1e30))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_alone_the_streams_have_the_losses_that_they_have_together(figures, tmp_path, activation):
    pictures = split_data(figures, Recipe(validation=0.0)).train.part([0, 1, 2, 10, 11, 20])
    net = banked()
    net.activation, net.network.scales, net.network.weights = activation, (1.0, 1.5), (1.0, 0.7, 0.3)
    recipe, targets = Recipe(smoothing=0.2, ema=0.0), pictures.targets()
    if activation == "sigmoid":
        targets[0, 1], targets[1] = 1, 0
    prior = torch.tensor([0.5, -1.0, 2.0])
    fitting = Fitting(net, recipe, prior)
    images = torch.cat(list(looks(pictures, net.preprocess, 8))).flip(-1)  # the second view
    net.network.eval()
    with torch.no_grad():
        whole = fitting.loss(images, targets)
        general = torch.stack([net.network.general(x) for x in (images, resized(images, 1.5))])
        of_general = [loss_of(logits + prior, targets, activation, 0.2) for logits in general]
        grids = grids_of(net, pictures, tmp_path)
        bank = Bank(net.network)
        found = bank.loss([grids.at(scale, slice(None), 1) for scale in (0, 1)], targets, prior, activation, 0.2)
        torch.testing.assert_close(found + torch.stack(of_general).mean(), whole, rtol=1e-3, atol=1e-4)
        # and together they say what the network says
        torch.testing.assert_close(bank.said(grids, 1.0), net.network(images.flip(-1)), rtol=0.02, atol=0.02)


def test_the_best_epoch_on_other_pictures_is_kept(coloured, tmp_path, monkeypatch):
    net, states, said = colour_net(), [], iter([0.2, 0.9, 0.5, 0.9])
    grids, targets = grids_of(net, coloured, tmp_path), coloured.targets()

    def noted(bank, *given):
        states.append({key: tensor.clone() for key, tensor in bank.state_dict().items()})
        return targets

    monkeypatch.setattr(Bank, "said", noted)
    monkeypatch.setattr("whatwhere.training.bank.measured", lambda *given: next(said))
    rows = fit_bank(net, grids, targets, Recipe(epochs=4, batch=4, ema=0.5), (grids, targets))
    assert [row["validation"] for row in rows] == [0.2, 0.9, 0.5, 0.9]
    assert torch.equal(net.network.bank.weight, states[1]["filters.weight"])
    assert not torch.equal(net.network.bank.weight, states[3]["filters.weight"])


def test_the_layer_that_filters_read_is_written_down(figures, tmp_path):
    train(figures, tmp_path / "run", replace(LIGHT, epochs=1))
    net = whatwhere.load(tmp_path / "run")
    assert net.network.tap == f"backbone.network.{net.options['head']['tap']}"
