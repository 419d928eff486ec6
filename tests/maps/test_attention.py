"""Rollout and LeGrad against numbers worked out by hand, against plain recomputation, and what they refuse."""

import threading

import pytest
import timm
import torch
from scenes import TRANSFORMERS, First, gap_net, plain, vit_net
from timm import create_model as made
from timm.models import vision_transformer
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import VisionTransformer

import whatwhere
from whatwhere.classifiers.attention import attended, handed_out
from whatwhere.classifiers.hooked import HookedClassifier
from whatwhere.classifiers.labels import Labels
from whatwhere.errors import InputError, UnsupportedError
from whatwhere.maps import METHODS
from whatwhere.maps.legrad import legrad
from whatwhere.maps.rollout import rolled_out, rollout
from whatwhere.scores import of_class

SIZE = (48, 80)


def images(count: int = 2, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1))


def small(fused: bool = True, **options) -> nn.Module:
    """A timm transformer of 3 x 5 patches whose attention is far from uniform."""
    torch.manual_seed(0)
    settings = {"img_size": SIZE, "patch_size": 16, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
    network = vision_transformer.VisionTransformer(**{**settings, **options}).eval()
    for module in network.modules():
        if isinstance(module, timm.layers.Attention):
            nn.init.normal_(module.qkv.weight, std=0.5)
            module.fused_attn = fused
    nn.init.normal_(network.head.weight)
    return network


def loaded(network: nn.Module, size: tuple[int, int] = SIZE) -> whatwhere.Classifier:
    return whatwhere.load(network, preprocess=plain(size))


class Given(nn.Module):
    """A block whose attention is given: one matrix a head, the values are the tokens, cut in as many parts."""

    def __init__(self, *heads: list[list[float]], scale: float = 1.0) -> None:
        super().__init__()
        self.scores, self.scale = torch.tensor(heads).log(), scale

    def forward(self, tokens: Tensor) -> Tensor:
        parts = tokens.unflatten(2, (len(self.scores), -1)).transpose(1, 2)
        # the softmax of logarithms gives the numbers themselves
        weights = self.scores.to(tokens).expand(len(tokens), -1, -1, -1).softmax(-1)
        return tokens + self.scale * (weights @ parts).transpose(1, 2).flatten(2)


class Pixels(nn.Module):
    """Every pixel is a token."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(2).transpose(1, 2)


class Pooled(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1)


def by_hand(*blocks: nn.Module, head: nn.Module | None = None, weight: Tensor | None = None) -> whatwhere.Classifier:
    """Pixels of 2 channels as tokens, the blocks, a head, a linear layer without a bias."""
    linear = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(2) if weight is None else weight)
    network = nn.Sequential(Pixels(), nn.Sequential(*blocks), head or Pooled(), linear)
    return HookedClassifier(network.eval(), Labels.numbered(2), plain((1, 2)), "by hand", layer="0")


TWO = torch.tensor([[[[1.0, 0]], [[0.0, 3]]]])
"""One image of two pixels: the tokens (1, 0) and (0, 3)."""


def test_rollout_by_hand():
    first, second = [[0.8, 0.2], [0.4, 0.6]], [[0.5, 0.5], [0.1, 0.9]]
    net = by_hand(Given(first), Given(second))
    # A_1 = [.9 .1; .2 .8], A_2 = [.75 .25; .05 .95]; A_2 A_1 = [.725 .275; .235 .765]
    matrix, rows = rolled_out(net.trace(TWO))
    torch.testing.assert_close(matrix, torch.tensor([[[0.725, 0.275], [0.235, 0.765]]]))
    assert rows.tolist() == [[0.5, 0.5]]
    torch.testing.assert_close(rollout(net.trace(TWO), of_class(0)), torch.tensor([[[0.48, 0.52]]]))


def test_rollout_takes_the_row_that_the_head_reads():
    net = by_hand(Given([[0.8, 0.2], [0.4, 0.6]]), Given([[0.5, 0.5], [0.1, 0.9]]), head=First())
    assert rolled_out(net.trace(TWO))[1].tolist() == [[1, 0]]
    torch.testing.assert_close(rollout(net.trace(TWO), of_class(0)), torch.tensor([[[0.725, 0.275]]]))


def test_rollout_averages_heads():
    net = by_hand(Given([[0.8, 0.2], [0.4, 0.6]], [[0.4, 0.6], [0.2, 0.8]]))
    # W = [.6 .4; .3 .7]
    torch.testing.assert_close(rolled_out(net.trace(TWO))[0], torch.tensor([[[0.8, 0.2], [0.15, 0.85]]]))


@pytest.mark.parametrize("head", [Pooled(), First()])
def test_legrad_by_hand(head):
    net = by_hand(Given([[0.8, 0.2], [0.4, 0.6]]), head=head, weight=torch.tensor([[1.0, -1], [0, 2]]))
    # the mean of the tokens is linear in A: d S_k / d A_ij = w_k v_j / 2 for each i; w_0 v = 1, -3 and w_1 v = 0, 6
    torch.testing.assert_close(legrad(net.trace(TWO), of_class(0)), torch.tensor([[[0.5, 0.0]]]))
    torch.testing.assert_close(legrad(net.trace(TWO), of_class(1)), torch.tensor([[[0.0, 3.0]]]))


def test_legrad_averages_heads_and_layers_and_keeps_each_to_itself():
    uniform = [[0.5, 0.5], [0.5, 0.5]]
    net = by_hand(Given(uniform, uniform), Given(uniform, uniform, scale=3.0))
    # Class 0 is channel 0, all of it in head 0. Layer 1: values 1 and 0, so 1/2 and 0 in one of two heads. Behind it
    # the tokens are (1.5, .), (0.5, .): with the second layer's factor 3, 4.5 / 2 and 1.5 / 2, in one of two heads.
    expected = (torch.tensor([0.25, 0]) + torch.tensor([2.25, 0.75]) / 2) / 2
    torch.testing.assert_close(legrad(net.trace(TWO), of_class(0))[0, 0], expected)


def test_uniform_attention_rolls_out_to_a_constant():
    network = small()
    for block in network.blocks:
        nn.init.zeros_(block.attn.qkv.weight[:48])  # queries and keys
    maps = rollout(loaded(network).trace(images()), of_class(0))
    # half of the class token goes on each time, the rest is spread over 16 tokens
    torch.testing.assert_close(maps, torch.full((2, 3, 5), (1 - 0.5**3) / 16))


@pytest.mark.parametrize("options", [{}, {"global_pool": "avg"}, {"reg_tokens": 4}, {"global_pool": "max"}])
def test_rows_of_a_rollout_sum_to_1(options):
    matrix, rows = rolled_out(loaded(small(**options)).trace(images()))
    n = 15 + 1 + options.get("reg_tokens", 0)
    assert matrix.shape == (2, n, n)
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(2), torch.ones(2, n))
    torch.testing.assert_close(rows.sum(1), torch.ones(2))


@pytest.mark.parametrize(
    ("options", "read"),
    [
        ({}, [0]),
        ({"reg_tokens": 4}, [0]),
        ({"global_pool": "avg"}, range(1, 16)),
        ({"global_pool": "avg", "class_token": False, "reg_tokens": 2}, range(2, 17)),
        ({"global_pool": "avg", "class_token": False, "pool_include_prefix": True, "reg_tokens": 1}, range(16)),
    ],
)
def test_what_the_head_reads_is_found(options, read):
    network = small(**options)
    for zero in (False, True):  # a new network's last layer may be all zeros
        if zero:
            nn.init.zeros_(network.head.weight)
        seen = attended(loaded(network), images(1), lambda attention: None)
        assert seen.read.nonzero()[:, 1].tolist() == list(read)
        assert seen.blocks == tuple(network.blocks)


@pytest.mark.parametrize("method", [rollout, legrad])
@pytest.mark.parametrize("options", [{}, {"global_pool": "avg", "reg_tokens": 3}, {"dynamic_img_size": True}])
def test_fused_attention_is_attention_in_steps(method, options):
    size = (64, 48) if options.get("dynamic_img_size") else SIZE
    fused, plainly = (
        method(loaded(small(fused, **options)).at("patch_embed").trace(images(2, size)), of_class(2))
        for fused in (True, False)
    )
    assert fused.shape == (2, size[0] // 16, size[1] // 16)
    torch.testing.assert_close(fused, plainly)


def torchvision_vit() -> tuple[nn.Module, tuple[int, int]]:
    torch.manual_seed(0)
    network = VisionTransformer(32, 8, 3, 2, 16, 24, num_classes=5).eval()
    for block in network.encoder.layers:
        nn.init.normal_(block.self_attention.in_proj_weight, std=0.5)
    nn.init.normal_(network.heads.head.weight)
    return network, (32, 32)


def transformers_vit(implementation: str = "sdpa") -> tuple[nn.Module, tuple[int, int]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        patch_size=8,
        image_size=(24, 40),
        num_labels=5,
        initializer_range=0.5,
        attn_implementation=implementation,
    )
    return transformers.ViTForImageClassification(config).eval(), (24, 40)


def attention_of(values: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> tuple[Tensor, Tensor]:
    """The matrices (b heads n n) of one layer, and its values (b heads n c), plainly."""
    b, n, c = values.shape
    q, k, v = functional.linear(values, weight, bias).reshape(b, n, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
    return (q @ k.transpose(2, 3) / (c // heads) ** 0.5).softmax(3), v


class Plainly:
    """LeGrad and rollout of a pre-norm transformer written out, with nothing of the package in it."""

    def __init__(self, tokens: Tensor, layers: list[tuple], head) -> None:
        self.matrices, self.maps, b, n = [], [], *tokens.shape[:2]
        self.rolled = torch.eye(n).expand(b, n, n)
        for before, weight, bias, out, after, heads in layers:
            matrix, values = attention_of(before(tokens), weight, bias, heads)
            matrix = matrix.detach().requires_grad_()
            tokens = tokens.detach() + out((matrix @ values).transpose(1, 2).flatten(2))
            tokens = tokens + after(tokens)
            (gradient,) = torch.autograd.grad(head(tokens.mean(1))[:, 2].sum(), matrix)
            self.maps.append(gradient.relu().mean((1, 2))[:, 1:])
            self.rolled = (matrix.detach().mean(1) + torch.eye(n)) / 2 @ self.rolled

    @property
    def legrad(self) -> Tensor:
        return torch.stack(self.maps).mean(0)

    @property
    def rollout(self) -> Tensor:
        return self.rolled[:, 0, 1:]


def test_timm_written_out():
    network = small()
    tokens = network._pos_embed(network.patch_embed(images()))
    layers = [
        (
            block.norm1,
            block.attn.qkv.weight,
            block.attn.qkv.bias,
            block.attn.proj,
            nn.Sequential(block.norm2, block.mlp),
            2,
        )
        for block in network.blocks
    ]
    expected = Plainly(tokens, layers, lambda mean: network.head(network.norm(mean)))
    trace = loaded(network).trace(images())
    torch.testing.assert_close(rollout(trace, of_class(2)).flatten(1), expected.rollout)
    torch.testing.assert_close(legrad(trace, of_class(2)).flatten(1), expected.legrad)


def test_torchvision_written_out():
    network, size = torchvision_vit()
    batch = images(2, size)
    tokens = torch.cat([network.class_token.expand(2, -1, -1), network._process_input(batch)], 1)
    layers = [
        (
            block.ln_1,
            block.self_attention.in_proj_weight,
            block.self_attention.in_proj_bias,
            block.self_attention.out_proj,
            nn.Sequential(block.ln_2, block.mlp),
            2,
        )
        for block in network.encoder.layers
    ]
    expected = Plainly(
        tokens + network.encoder.pos_embedding, layers, lambda mean: network.heads(network.encoder.ln(mean))
    )
    trace = loaded(network, size).trace(batch)
    torch.testing.assert_close(rollout(trace, of_class(2)).flatten(1), expected.rollout)
    torch.testing.assert_close(legrad(trace, of_class(2)).flatten(1), expected.legrad)


def test_transformers_gives_the_same_attention_itself():
    network, size = transformers_vit("eager")
    batch = images(2, size)
    seen: list[Tensor] = []
    attended(loaded(network, size), batch, seen.append)
    given = network(batch, output_attentions=True).attentions
    assert len(seen) == len(given) == 3
    for mine, theirs in zip(seen, given, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("method", [rollout, legrad])
def test_transformers_fused_or_not(method):
    eager, sdpa = (
        method(loaded(network, size).trace(images(2, size)), of_class(2))
        for network, size in (transformers_vit("eager"), transformers_vit("sdpa"))
    )
    assert eager.shape == (2, 3, 5)
    torch.testing.assert_close(eager, sdpa)


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_in_both_of_its_ways(need_weights):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(2, 2, batch_first=True)

        def forward(self, tokens: Tensor) -> Tensor:
            return tokens + self.attention(tokens, tokens, tokens, need_weights=need_weights)[0]

    torch.manual_seed(0)
    block = Block()
    nn.init.normal_(block.attention.in_proj_weight, std=2)
    matrix, _ = rolled_out(by_hand(block).trace(TWO))
    tokens = TWO.flatten(2).transpose(1, 2)
    _, weights = block.attention(tokens, tokens, tokens)
    torch.testing.assert_close(matrix, (weights.detach() + torch.eye(2)) / 2)


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize(("causal", "scale", "gqa"), [(False, None, False), (True, 0.3, True)])
def test_attention_in_steps_is_what_torch_computes(mask, causal, scale, gqa):
    if mask and causal:
        pytest.skip("torch takes one of them")
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 6, 8, generator=draw)
    k, v = torch.randn(2, 2, 2 if gqa else 4, 6, 8, generator=draw)
    given = {None: None, "bool": torch.rand(6, 6, generator=draw) < 0.8, "float": torch.randn(6, 6, generator=draw)}
    options = {"attn_mask": given[mask], "is_causal": causal, "scale": scale, "enable_gqa": gqa}
    expected = functional.scaled_dot_product_attention(q, k, v, **options)
    seen: list[Tensor] = []
    with handed_out(loaded(small()), 2, lambda attention: (seen.append(attention), attention)[1]):
        found = functional.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(seen[0].sum(3), torch.ones(2, 4, 6))


class OnePatch(nn.Module):
    """A transformer whose class 1 is how red any patch is: its class token looks for red ones and takes their red."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(1, 1, 3))
        self.blocks = nn.ModuleList([Looking(), Looking()])
        self.head = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[0.0, 0, 1], [1, 0, 0]]))

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = functional.avg_pool2d(pixels, 8).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(len(tokens), -1, -1), tokens], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens[:, 0])


class Looking(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        query, key = torch.full_like(tokens, 6.0), tokens * torch.tensor([1.0, 0, 0])
        return tokens + functional.scaled_dot_product_attention(query, key, tokens, scale=1.0)


@pytest.mark.parametrize("name", sorted(TRANSFORMERS))
def test_a_planted_patch_is_found(name):
    pixels = torch.zeros(24, 40, 3, dtype=torch.uint8)
    pixels[8:16, 24:32, 0] = 255
    pixels[16:24, 0:8, 1] = 255
    net = whatwhere.load(OnePatch().eval(), preprocess=plain((24, 40)), layer="blocks.0")
    (seen,) = whatwhere.explain(net, pixels.numpy(), target=1, method=name)
    assert seen.map.shape == (3, 5)
    assert seen.map.argmax() == 1 * 5 + 3
    others = sorted(seen.map.flatten())[:-1]
    assert seen.map.max() > 3 * others[-1]


def test_legrad_tells_classes_apart():
    batch = torch.zeros(1, 3, 24, 40)
    batch[:, 0, 8:16, 24:32] = 1
    batch[:, 2, 16:24, 0:8] = 1
    trace = whatwhere.load(OnePatch().eval(), preprocess=plain((24, 40)), layer="blocks.0").trace(batch)
    assert legrad(trace, of_class(1)).argmax() == 1 * 5 + 3
    assert legrad(trace, of_class(0)).argmax() == 2 * 5 + 0


def test_legrad_grows_with_the_score():
    trace = loaded(small()).trace(images())
    twice = legrad(trace, lambda logits: 2 * logits[:, 1])
    torch.testing.assert_close(twice, 2 * legrad(trace, of_class(1)))
    assert not torch.allclose(legrad(trace, lambda logits: -logits[:, 1]), twice / 2)


@pytest.mark.parametrize("score", [lambda logits: logits, lambda logits: logits.detach()[:, 0]])
def test_legrad_refuses_a_score_that_is_none(score):
    with pytest.raises(InputError):
        legrad(loaded(small()).trace(images()), score)


@pytest.mark.parametrize("name", sorted(TRANSFORMERS))
@pytest.mark.parametrize("single", [small, torchvision_vit])
def test_a_single_block(name, single):
    if single is small:
        network, size = small(depth=1), SIZE
        blocks = network.blocks
    else:
        network, size = torchvision_vit()
        blocks = network.encoder.layers = network.encoder.layers[:1]
    net = whatwhere.load(network, preprocess=plain(size), layer="patch_embed" if single is small else "conv_proj")
    maps = METHODS[name](net.trace(images(2, size)), of_class(1))
    assert maps.any()
    # the block, and not what stands around it with a norm behind
    assert attended(net, images(1, size), lambda attention: None).blocks == (blocks[0],)


@pytest.mark.parametrize("name", sorted(TRANSFORMERS))
@pytest.mark.parametrize(
    ("network", "size", "why"),
    [
        (gap_net, (24, 40), "no self-attention"),
        (lambda: made("swin_tiny_patch4_window7_224", depths=(1, 1)), (224, 224), "windows of 49 tokens"),
        (lambda: made("cait_xxs24_224", depth=1), (224, 224), "1 queries to 197 tokens"),
        (lambda: small(global_pool="map", class_token=False), SIZE, "1 queries to 15 tokens"),
        (lambda: made("pit_ti_224", depth=(1, 1, 1)), (224, 224), "between 730 tokens and then between"),
        (lambda: made("convit_tiny", depth=2), (224, 224), "one matrix a block"),
        (lambda: made("xcit_nano_12_p16_224", depth=1), (224, 224), "1 queries to 197|one matrix a block"),
        (lambda: small(block_fn=vision_transformer.ParallelThingsBlock), SIZE, "do not follow one another"),
    ],
    ids=["convolutional", "windows", "class attention", "attention pool", "stages", "gated", "channels", "parallel"],
)
def test_other_networks_are_refused(name, network, size, why):
    trace = loaded(network().eval(), size).trace(images(1, size))
    with pytest.raises(UnsupportedError, match=f"({why}).*Use gradcam or layercam"):
        METHODS[name](trace, of_class(0))


def test_nothing_is_left_behind_when_it_is_refused():
    net = loaded(gap_net(), (24, 40))
    trace = net.trace(images(1, (24, 40)))
    with pytest.raises(UnsupportedError):
        rollout(trace, of_class(0))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.network.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", sorted(TRANSFORMERS))
def test_a_backbone_under_its_own_no_grad(name):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = small(class_token=False, global_pool="avg"), nn.Linear(24, 5)

        def forward(self, batch: Tensor) -> Tensor:
            with torch.no_grad():
                tokens = self.body.forward_features(batch)
            return self.head(tokens.mean(1))

    net = loaded(Wrapped().eval())
    maps = METHODS[name](net.trace(images()), of_class(1))
    assert maps.shape == (2, 3, 5)
    assert maps.any()


@pytest.mark.parametrize("name", sorted(TRANSFORMERS))
def test_threads_do_not_see_each_other(name):
    net = loaded(vit_net(), (24, 40))
    trace = net.trace(images(2, (24, 40)))
    expected = METHODS[name](trace, of_class(1))
    found: list[Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.extend(METHODS[name](trace, of_class(1)) for _ in range(5)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 15
    assert all(torch.equal(maps, expected) for maps in found)


@pytest.mark.parametrize("name", sorted(TRANSFORMERS))
def test_from_photo_to_box(name, photos):
    seen = whatwhere.explain(loaded(small()), photos[0], target=[3, 1], method=name)
    assert [one.map.shape for one in seen] == [(3, 5), (3, 5)]
    assert all(one.box is not None for one in seen)
    assert seen[0].heat.shape == seen[0].size
    assert (seen[0].map == seen[1].map).all() == (name == "rollout")
