import pytest
from params.models import model_of
from support import TinyEncoder, tiny_decoder
from torch import nn

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
