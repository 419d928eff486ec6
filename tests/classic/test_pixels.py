"""Pixels as the grid: numbers by hand, laws, and templates."""

import pytest
import torch
from scenes import plain

import whatwhere
from whatwhere.classic.pixels import Perceptron
from whatwhere.errors import InputError, UnsupportedError
from whatwhere.inspection.layers import first_kernels
from whatwhere.maps import METHODS
from whatwhere.scores import of_class

SIZE = (2, 3)


def by_hand():
    network = Perceptron(2, SIZE)
    with torch.no_grad():
        network.classify.weight.zero_()
        network.classify.weight[1].reshape(3, *SIZE)[0, 1, 2] = 2.0  # red, at the lower right
        network.classify.weight[1].reshape(3, *SIZE)[2, 0, 0] = -1.0  # blue, at the upper left
        network.classify.bias.copy_(torch.tensor([0.0, 0.5]))
    return network


def test_weight_times_pixel_by_hand():
    net = whatwhere.load(by_hand(), labels=["no", "yes"], preprocess=plain(SIZE))
    images = torch.zeros(1, 3, *SIZE)
    images[0, 0, 1, 2], images[0, 2, 0, 0], images[0, 1] = 3.0, 4.0, 9.0
    trace = net.trace(images)
    assert trace.logits.tolist() == [[0.0, 2 * 3 - 4 + 0.5]]
    assert METHODS["hirescam"](trace, of_class(1)).tolist() == [[[-4.0, 0.0, 0.0], [0.0, 0.0, 6.0]]]


def test_what_the_pixels_add_is_the_logit():
    torch.manual_seed(0)
    net = whatwhere.load(Perceptron(4, (12, 20)), preprocess=plain((12, 20)))
    trace = net.trace(torch.randn(3, 3, 12, 20))
    for label in range(4):
        added = METHODS["hirescam"](trace, of_class(label)).sum((1, 2)) + net.network.classify.bias[label]
        torch.testing.assert_close(added, trace.logits[:, label])


def test_an_mlp_is_gradient_times_input():
    torch.manual_seed(0)
    net = whatwhere.load(Perceptron(4, (12, 20), hidden=[7, 5]), preprocess=plain((12, 20)))
    images = torch.randn(2, 3, 12, 20, requires_grad=True)
    (gradient,) = torch.autograd.grad(net.network(images)[:, 2].sum(), images)
    trace = net.trace(images.detach())
    torch.testing.assert_close(METHODS["hirescam"](trace, of_class(2)), (gradient * images).sum(1).detach())
    # ReLUs pass what is positive as it is, so without biases inside, all of it is the logit less the last bias
    for layer in (*net.network.hidden[::2], net.network.classify):
        torch.nn.init.zeros_(layer.bias)
    trace = net.trace(images.detach())
    torch.testing.assert_close(METHODS["hirescam"](trace, of_class(2)).sum((1, 2)), trace.logits[:, 2].detach())


@pytest.mark.parametrize("hidden", [(), (6,)])
def test_templates_are_laid_out_as_pictures(hidden):
    net = whatwhere.load(Perceptron(4, (12, 20), hidden=hidden), preprocess=plain((12, 20)))
    first = net.network.hidden[0] if hidden else net.network.classify
    assert torch.equal(first_kernels(net), first.weight.reshape(-1, 3, 12, 20))


def test_plain_cam_is_refused_and_grad_cam_is_hires_cam():
    net = whatwhere.load(by_hand(), labels=["no", "yes"], preprocess=plain(SIZE))
    trace = net.trace(torch.rand(2, 3, *SIZE))
    with pytest.raises(UnsupportedError, match="Use gradcam"):
        METHODS["cam"](trace, of_class(1))
    assert torch.equal(METHODS["gradcam"](trace, of_class(1)), METHODS["hirescam"](trace, of_class(1)))


def test_what_cannot_be_built():
    with pytest.raises(UnsupportedError, match=r"two cells at least, got 1 x 1"):
        Perceptron(2, (1, 1))
    with pytest.raises(InputError, match="at least one unit"):
        Perceptron(2, SIZE, hidden=[4, 0])
    with pytest.raises(InputError, match="linear has no hidden layers"):
        whatwhere.classifiers.zoo.build("linear", pretrained=False, num_classes=2, hidden=[3])
