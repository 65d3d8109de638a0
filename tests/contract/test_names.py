"""A pretrained parameter keeps its name: every wrapper, every view, frozen and trainable bases."""

import pytest
import torch
from contract import views
from support import open_gates, tiny_decoder

from torchfuse.naming import unwrap


@pytest.mark.parametrize("train_base", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("view", views.VIEWS, ids=lambda f: f.__name__.removeprefix("view_"))
@pytest.mark.parametrize("wrap", views.WRAPPERS, ids=lambda f: f.__name__)
def test_names(wrap, view, train_base):
    torch._dynamo.reset()
    model = open_gates(views.fused_model(train_base=train_base))
    reference = tiny_decoder(tied=True)
    view(wrap(model), wrap(reference))
    assert unwrap(model) is not None
