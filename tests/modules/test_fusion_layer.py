import copy
import pickle

import pytest
import torch
from support import TinyEncoder, tiny_decoder
from torch import nn

from torchfuse import FusionLayer, fuse, get_fusion_params
from torchfuse.errors import ModelError


class Block(nn.Module):
    """A pretrained layer with what can go wrong with names: parameter, buffer, nested `layer`."""

    def __init__(self, dim=3):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim))
        self.register_buffer("steps", torch.tensor(5))
        self.inner = nn.ModuleDict({"layer": nn.Linear(dim, dim), "mylayer": nn.Linear(dim, dim)})
        self.seen = {}

    def forward(self, x, **kwargs):
        self.seen = kwargs
        return self.inner["mylayer"](self.inner["layer"](x)) * self.weight


class Add(nn.Module):
    """A new layer that moves what it gets."""

    def __init__(self, dim=3, amount=2.0):
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), amount))
        self.seen = {}

    def forward(self, x, **kwargs):
        self.seen = kwargs
        return x + self.scale


def keys_of(model):
    return list(model.state_dict())


@pytest.mark.parametrize("fusion_first", [True, False])
def test_runs_both_in_the_order_asked_for(fusion_first):
    block, new, x = Block(), Add(), torch.randn(2, 5, 3)
    fused = FusionLayer(block, new, fusion_first)
    expected = block(new(x)) if fusion_first else new(block(x))
    assert torch.equal(fused(x), expected)
    assert not torch.equal(new(block(x)), block(new(x)))


def test_every_keyword_reaches_both():
    block, new = Block(), Add()
    FusionLayer(block, new)(torch.randn(1, 2, 3), mask=None, anything=7)
    assert block.seen == new.seen == {"mask": None, "anything": 7}


def test_names_and_their_order_are_the_pretrained_layers():
    block = Block()
    fused = FusionLayer(block, Add())
    assert keys_of(fused) == [*keys_of(block), "fusion_layer.scale"]
    own = [name for name, _ in block.named_parameters()]
    assert [name for name, _ in fused.named_parameters()] == [*own, "fusion_layer.scale"]
    assert [name for name, _ in fused.named_buffers()] == ["steps"]
    assert fused.get_submodule("inner.layer") is block.inner["layer"]
    assert fused.get_parameter("weight") is block.weight


def test_only_keys_below_its_own_prefix_are_touched():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.ModuleDict({"layer": nn.ModuleList([nn.Linear(3, 3)])})
            self.layers = nn.ModuleList([FusionLayer(Block(), Add()), Block()])
            self.layer = nn.Linear(3, 3)

    model = Model()
    expected = [name for name, _ in model.named_parameters()]
    assert [k for k in model.state_dict() if not k.endswith("steps")] == expected
    assert "backbone.layer.0.weight" in expected
    other = Model()
    other.load_state_dict(model.state_dict())
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_a_pretrained_checkpoint_fits():
    block, fused = Block(), FusionLayer(Block(), Add())
    result = fused.load_state_dict(block.state_dict(), strict=False)
    assert result.missing_keys == ["fusion_layer.scale"]
    assert result.unexpected_keys == []
    assert torch.equal(fused.weight, block.weight)


def test_messages_have_the_names_that_users_know():
    fused = FusionLayer(Block(), Add())
    wrong = {
        "weight": torch.zeros(4),
        "inner.layer.extra": torch.zeros(1),
        "fusion_layer.scale": torch.zeros(9),
    }
    with pytest.raises(RuntimeError) as info:
        nn.ModuleDict({"a": fused}).load_state_dict({f"a.{k}": v for k, v in wrong.items()})
    message = str(info.value)
    assert "size mismatch for a.weight" in message
    assert "size mismatch for a.fusion_layer.scale" in message
    assert '"a.inner.layer.extra"' in message
    assert '"a.inner.layer.weight", "a.inner.layer.bias"' in message
    assert "a.layer." not in message
    # As a root the layer has no prefix to tell it by.
    with pytest.raises(RuntimeError, match=r"size mismatch for fusion_layer\.scale"):
        fused.load_state_dict(wrong)


def test_a_child_called_layer_keeps_its_name():
    class T5Like(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.ModuleList([nn.Linear(3, 3)])
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.layer[0](x) * self.weight

    block = T5Like()
    fused = FusionLayer(block, Add())
    assert keys_of(fused) == [*keys_of(block), "fusion_layer.scale"]
    assert fused.get_submodule("layer.0") is block.layer[0]
    assert fused.wrapped is block
    other = FusionLayer(T5Like(), Add())
    other.load_state_dict(fused.state_dict())
    x = torch.randn(2, 3)
    assert torch.equal(other(x), fused(x))


@pytest.mark.parametrize("name", ["fusion_layer", "fusion_first", "fusion_params", "setup_caches"])
def test_what_cannot_keep_its_name_is_refused_by_name(name):
    block = Block()
    block._modules[name] = nn.Linear(3, 3)
    with pytest.raises(ModelError, match=f"keep its names: {name} would be hidden"):
        FusionLayer(block, Add())


def test_a_fusion_layer_in_a_fusion_layer_is_refused():
    with pytest.raises(ModelError, match="fusion_layer would be hidden"):
        FusionLayer(FusionLayer(Block(), Add()), Add())


def test_parts_are_replaced_where_they_are():
    block = Block()
    fused = FusionLayer(block, Add())
    fused.inner = nn.ModuleDict({"layer": nn.Identity(), "mylayer": nn.Identity()})
    assert "inner" not in fused._modules
    assert isinstance(block.inner["layer"], nn.Identity)
    fused.weight = nn.Parameter(torch.zeros(3))
    assert not block.weight.any()
    del fused.inner
    assert "inner" not in block._modules


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole_and_independent(copied):
    fused = FusionLayer(Block(), Add())
    other = copied(fused)
    assert keys_of(other) == keys_of(fused)
    x = torch.randn(2, 3)
    assert torch.equal(other(x), fused(x))
    with torch.no_grad():
        other.weight.zero_()
    assert fused.weight.any()
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(x), fused(x))


def test_attributes_fall_through_and_missing_ones_are_missing():
    fused = FusionLayer(tiny_decoder().layers[0], Add())
    assert fused.attn.num_heads == 3
    with pytest.raises(AttributeError, match="nonsense"):
        fused.nonsense  # noqa: B018


def test_fusion_params_name_the_new_layer():
    fused = FusionLayer(Block(), Add())
    assert fused.fusion_params() == ["fusion_layer.scale"]
    assert list(get_fusion_params(nn.Sequential(Block(), fused))) == ["1.fusion_layer.scale"]


class Cached(nn.Module):
    def __init__(self, spelling):
        super().__init__()
        self.calls = []
        if spelling == "new":
            self.setup_caches = lambda *a, **k: self.calls.append((a, k))
            self.caches_are_setup = lambda: bool(self.calls)
            self.caches_are_enabled = lambda: bool(self.calls)
            self.reset_cache = lambda: self.calls.append("reset")
        else:
            self.setup_cache = lambda *a, **k: self.calls.append((a, k))
            self.reset_caches = lambda: self.calls.append("reset")

    @property
    def cache_enabled(self):
        return bool(self.calls)


@pytest.mark.parametrize("spelling", ["new", "old"])
@pytest.mark.parametrize(
    ("set_up", "reset"), [("setup_caches", "reset_caches"), ("setup_cache", "reset_cache")]
)
def test_caches_of_both_layers_in_both_spellings(spelling, set_up, reset):
    layer, new = Cached(spelling), Cached(spelling)
    fused = FusionLayer(layer, new)
    assert not fused.caches_are_setup()
    assert not fused.caches_are_enabled()
    assert not fused.cache_enabled
    getattr(fused, set_up)(2, torch.float32, encoder_max_seq_len=5, decoder_max_seq_len=7)
    call = ((2, torch.float32), {"encoder_max_seq_len": 5, "decoder_max_seq_len": 7})
    assert layer.calls == new.calls == [call]
    assert fused.caches_are_setup()
    assert fused.caches_are_enabled()
    assert fused.cache_enabled
    getattr(fused, reset)()
    assert layer.calls[-1] == new.calls[-1] == "reset"


def test_a_layer_without_caches_is_named_and_nothing_is_set_up():
    layer = Cached("new")
    with pytest.raises(ModelError, match="Add has none of the methods setup_caches, setup_cache"):
        FusionLayer(layer, Add()).setup_caches(
            2, torch.float32, encoder_max_seq_len=5, decoder_max_seq_len=7
        )
    assert layer.calls == []


def test_own_parameters_and_buffers_of_a_subclass_are_saved_and_loaded():
    class Counting(FusionLayer):
        def __init__(self, layer, new):
            super().__init__(layer, new)
            self.amount = nn.Parameter(torch.tensor(3.0))

    def make(value):
        fused = Counting(nn.Linear(3, 3), nn.Linear(3, 3))
        fused.register_buffer("steps", torch.tensor(value))
        return fused

    source, target = make(7), make(0)
    with torch.no_grad():
        source.amount.fill_(5)
    result = target.load_state_dict(source.state_dict())
    assert not result.missing_keys
    assert (target.amount.item(), target.steps.item()) == (5, 7)
    assert torch.equal(target.wrapped.weight, source.wrapped.weight)


def test_a_refused_cache_leaves_no_cache_behind():
    model = fuse(tiny_decoder(), TinyEncoder(), every=2)
    with pytest.raises(ModelError, match="needs encoder_max_seq_len"):
        model.layers[1].setup_caches(2, torch.float32, encoder_max_seq_len=None, decoder_max_seq_len=9)
    assert not model.layers[1].caches_are_setup()
