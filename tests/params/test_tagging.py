import functools
import pickle

import pytest
import torch
from params.models import model_of
from support import TinyEncoder, tiny_decoder
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from torchfuse import (
    fuse,
    get_fusion_params,
    register_fusion_module,
)
from torchfuse.params import fusion_buffers


def test_a_tag_that_names_nothing_is_an_error():
    module = nn.Linear(3, 5)
    module.fusion_params = lambda: ["weigth"]
    with pytest.raises(
        ValueError, match="Linear '1' names weigth, which it does not have; it has weight"
    ):
        get_fusion_params(nn.Sequential(nn.Identity(), module))


def test_buffers_of_fusion_modules_belong_to_fusion():
    adapter = nn.Sequential(nn.Linear(11, 18), nn.BatchNorm1d(7, affine=False))
    register_fusion_module(adapter)
    model = fuse(tiny_decoder(), TinyEncoder(), every=3, adapter=adapter)
    assert set(fusion_buffers(model)) == {f"adapter.1.{n}" for n in adapter[1].state_dict()}
    assert fusion_buffers(model_of()) == {}


def test_a_registered_module_pickles():
    module = nn.Sequential(nn.Linear(3, 5))
    register_fusion_module(module)
    other = pickle.loads(pickle.dumps(module))
    assert other.fusion_params() == ["0.weight", "0.bias"]
    assert list(get_fusion_params(other)) == ["0.weight", "0.bias"]
    other[0] = nn.Identity()
    assert other.fusion_params() == []
    assert module.fusion_params() == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    "wrap",
    [checkpoint_wrapper, functools.partial(torch.compile, backend="eager")],
    ids=["checkpointed", "compiled"],
)
def test_fusion_params_are_found_once_in_any_wrapper(wrap):
    model = fuse(tiny_decoder(), TinyEncoder(), every=2, fusion_vocab_size=2)
    expected = get_fusion_params(model)
    for index, layer in enumerate(model.layers):
        model.layers[index] = wrap(layer)
    model.adapter = wrap(model.adapter)
    found = get_fusion_params(wrap(model))
    assert list(found) == list(expected)
    assert all(found[name] is expected[name] for name in expected)
