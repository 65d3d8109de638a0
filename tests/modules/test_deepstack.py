import copy

import pytest
import torch
from support import WIDTH, tiny_decoder
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from torchfuse import get_fusion_params
from torchfuse.errors import ModelError
from torchfuse.modules.deepstack import DeepStackLayer, FeatureMap
from torchfuse.modules.experts.routing import Routing

ROWS, LENGTH, DIM, HIDDEN = 2, 13, 5, 7
SLOTS = {"image": 4, "audio": 3}


class Plain(nn.Module):
    """A layer that only needs to have a weight."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x, **kwargs):
        return x + torch.tanh(self.linear(x))


def layer64(seed=5):
    torch.manual_seed(seed)
    layer = DeepStackLayer(Plain(), list(SLOTS), DIM, HIDDEN).double()
    with torch.no_grad():  # what begins at zero would hide problems
        for part in layer.fusion_layer.values():
            part.w2.weight.normal_(std=0.5)
            part.w2.bias.normal_(std=0.5)
    return layer


def hidden(length=LENGTH, dim=DIM, seed=9, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, length, dim, generator=generator, dtype=dtype)


def interleaved():
    image, audio = (torch.zeros(ROWS, LENGTH, dtype=torch.bool) for _ in range(2))
    image[0, [1, 2, 6, 7]] = True
    image[1, [3, 9]] = True
    audio[1, [4, 5, 12]] = True
    return Routing(SLOTS, {"image": image, "audio": audio})


LAYOUTS = {"prefix": lambda: Routing(SLOTS), "interleaved": interleaved}


def whose(routing, row, position):
    if routing.places is None:
        return "image" if position < 4 else "audio" if position < 7 else None
    return next((name for name, place in routing.places.items() if place[row, position]), None)


def reference(layer, x, first, routing):
    """Token by token."""
    h = layer.wrapped(x)
    out = h.clone()
    for row in range(ROWS):
        for position in range(LENGTH):
            name = whose(routing, row, position)
            if name is not None:
                added, feature = layer.fusion_layer[name], first[row, position]
                inner = torch.einsum("hd,d->h", added.w1.weight, feature) + added.w1.bias
                inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
                more = torch.einsum("dh,h->d", added.w2.weight, inner) + added.w2.bias
                out[row, position] = h[row, position] + more
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_a_loop_over_tokens(layout):
    layer, routing = layer64(), LAYOUTS[layout]()
    first, x = hidden(seed=2).requires_grad_(), hidden().requires_grad_()
    routing.keep_features(first)
    out, expected = layer(x, routing=routing), reference(layer, x, first, routing)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(out, layer.wrapped(x))
    learned = [x, first, *layer.parameters()]
    sought = hidden(seed=1)
    gradients = torch.autograd.grad((out * sought).sum(), learned, retain_graph=True)
    expected_gradients = torch.autograd.grad((expected * sought).sum(), learned)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert wanted.any()
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout):
    layer = layer64()
    learned = list(layer.fusion_layer["audio"].parameters())

    def run(x, first, *_):
        routing = LAYOUTS[layout]()
        routing.keep_features(first)
        return layer(x, routing=routing)

    inputs = (hidden().requires_grad_(), hidden(seed=2).requires_grad_(), *learned)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def decoder_layer(seed=0):
    return tiny_decoder(seed).layers[0]


def test_it_begins_as_the_layer_and_text_never_passes_a_map():
    layer, x = DeepStackLayer(decoder_layer(), ["image"], WIDTH), hidden(dim=WIDTH, dtype=torch.float32)
    expected = decoder_layer()(x)
    routing = Routing({"image": 4})
    routing.keep_features(hidden(dim=WIDTH, seed=3, dtype=torch.float32))
    assert torch.equal(layer(x, routing=routing), expected)
    nn.init.normal_(layer.fusion_layer["image"].w2.weight)
    out = layer(x, routing=routing)
    assert torch.equal(out[:, 4:], expected[:, 4:])
    assert not torch.isclose(out[:, :4], expected[:, :4]).all(dim=-1).any()
    assert torch.equal(layer(x, encoder_input=None), expected)
    mask = torch.eye(LENGTH, dtype=torch.bool).expand(ROWS, -1, -1)
    assert torch.equal(
        layer(x, mask=mask, input_pos=torch.arange(LENGTH)), decoder_layer()(x, mask=mask)
    )


def test_stand_ins_change_no_bit_and_reach_every_new_weight():
    layer, x = layer64(), hidden().requires_grad_()
    routing = Routing({"image": 4}, stand_ins={"audio": hidden(1, seed=3)[:1]})
    plain = Routing({"image": 4})
    for each in (routing, plain):
        each.keep_features(hidden(seed=2))
    out = layer(x, routing=routing)
    assert torch.equal(out, layer(x, routing=plain))
    out.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.any() == (".audio." not in name), name


@pytest.mark.parametrize("around", ["layer", "pretrained"])
def test_activation_checkpointing_equals_eager(around):
    plain = layer64()
    layer = wrapped = copy.deepcopy(plain)
    if around == "pretrained":
        layer.layer = checkpoint_wrapper(layer.layer)
    else:
        wrapped = checkpoint_wrapper(layer)
    ran, results = [], []
    layer.fusion_layer["image"].w1.register_forward_hook(lambda *_: ran.append(1))
    for one in (plain, wrapped):
        first, x = hidden(seed=2).requires_grad_(), hidden().requires_grad_()
        routing = Routing(SLOTS)
        routing.keep_features(first)
        out = one(x, routing=routing)
        out.square().sum().backward()
        results.append([out, x.grad, first.grad, *(p.grad for p in one.parameters())])
    assert len(ran) == 2  # forward, and again for backward
    for gradients, expected_gradients in zip(*results, strict=True):
        assert torch.equal(gradients, expected_gradients)


def test_names_agree_in_every_view():
    base = decoder_layer()
    own = [name for name, _ in base.named_parameters()]
    layer = DeepStackLayer(base.bfloat16(), ["eye", "ear"], WIDTH, 7)
    new = [
        f"fusion_layer.{n}.w{w}.{p}" for n in ("eye", "ear") for w in (1, 2) for p in ("weight", "bias")
    ]
    assert [name for name, _ in layer.named_parameters()] == list(layer.state_dict()) == [*own, *new]
    assert layer.fusion_params() == new
    assert list(get_fusion_params(nn.Sequential(base, layer))) == [f"1.{name}" for name in new]
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer.fusion_layer["eye"].w1.weight.shape == (7, WIDTH)
    assert DeepStackLayer(decoder_layer(), ["eye"], WIDTH).fusion_layer["eye"].w1.out_features == WIDTH


def test_what_cannot_serve_is_refused():
    with pytest.raises(ModelError, match="needs the name of a modality"):
        DeepStackLayer(decoder_layer(), [], WIDTH)
    with pytest.raises(ModelError, match="fusion_layer would be hidden"):
        DeepStackLayer(DeepStackLayer(decoder_layer(), ["eye"], WIDTH), ["ear"], WIDTH)


def test_a_map_begins_at_zero_and_its_first_half_does_not():
    added = FeatureMap(DIM, HIDDEN)
    assert not added(hidden(dtype=torch.float32)).any()
    assert added.w1.weight.any()
