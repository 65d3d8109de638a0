"""A pretrained parameter keeps its name under FSDP2, on two gloo ranks."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from contract import views
from ranks import run_on_ranks
from support import open_gates, tiny_decoder
from torch.distributed.fsdp import fully_shard

from torchfuse.training import shard

pytestmark = pytest.mark.distributed


def view_meta_assign(model, reference):
    with torch.device("meta"):
        empty = views.fused_model(train_base=any(p.requires_grad for p in model.encoder.parameters()))
    shard(empty)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert not any(p.is_meta for p in empty.parameters())
    for module in empty.modules():
        if hasattr(module, "rope_init"):
            module.rope_init()
    assert torch.equal(views.logits(empty), views.logits(model))


def view_copies(model, reference):
    """FSDP2 itself refuses copies of what it shards; fusion changes nothing about that."""
    for copied in (copy.deepcopy, lambda m: pickle.dump(m, io.BytesIO())):
        outcomes = []
        for one in (reference, model):
            try:
                copied(one)
            except Exception as error:
                outcomes.append(type(error))
        assert len(outcomes) == 2, outcomes
        assert outcomes[0] is outcomes[1], outcomes


VIEWS = [
    *(v for v in views.VIEWS if v.__name__ not in ("view_meta_assign", "view_pickle", "view_deepcopy")),
    view_meta_assign,
    view_copies,
]


def check(rank):
    for view, train_base in itertools.product(VIEWS, (False, True)):
        torch.manual_seed(17)
        model = open_gates(views.fused_model(train_base=train_base))
        reference = tiny_decoder(tied=True)
        shard(model)
        for layer in reference.layers:
            fully_shard(layer)
        fully_shard(reference)
        try:
            view(model, reference)
        except BaseException as error:
            case = f"{view.__name__}, {'trainable' if train_base else 'frozen'} base, rank {rank}"
            raise AssertionError(f"{case}: {error!r}") from error


def test_names():
    run_on_ranks(check)
