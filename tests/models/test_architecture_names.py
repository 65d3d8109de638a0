"""Pretrained names in every view, for architectures with weights of their own in the layers.

For cross-attention, tests/contract tests the same.
"""

import pytest
import torch
from contract import views
from ranks import run_on_ranks
from support import IMAGE, LAYERS, TinyEncoder, text_with_image, tiny_decoder
from torch.distributed.fsdp import fully_shard

from torchfuse import fuse
from torchfuse.naming import unwrap
from torchfuse.training import shard

ARCHS = {
    "mot": {},
    # Without noise, so that the same weights give the same logits in whatever mode a view left a model.
    "moma": {"num_experts": 2, "num_text_experts": 2, "noise": False},
    "deepstack": {"layers": [0, 1, 2]},
}


def fused_model_of(arch):
    def fused_model(*, train_base, seed=0, encoder_token=IMAGE, **options):
        return fuse(
            tiny_decoder(seed, tied=True),
            TinyEncoder(),
            arch=arch,
            encoder_token=encoder_token,
            fusion_vocab_size=2,
            decoder_trainable=train_base,
            encoder_trainable=train_base,
            on_missing="participate",
            **ARCHS[arch],
            **options,
        )

    return fused_model


def use(arch, patch):
    patch(views, "fused_model", fused_model_of(arch))
    patch(views, "text", text_with_image)


# Views in which a graph or a rank changes names; each of them takes seconds.
SOME = [views.view_state_dict, views.view_named_parameters, views.view_dcp_optimizer]
CASES = [
    (wrap, view) for wrap in views.WRAPPERS for view in (SOME if wrap is views.compiled else views.VIEWS)
]


@pytest.mark.parametrize(("wrap", "view"), CASES, ids=lambda f: f.__name__.removeprefix("view_"))
@pytest.mark.parametrize("arch", ARCHS)
def test_names(arch, wrap, view, monkeypatch):
    torch._dynamo.reset()
    use(arch, monkeypatch.setattr)
    # With placeholders mot wraps the final norm, whose parameter is no child's, so no name leads to it.
    layout = {"encoder_token": None} if (arch, view) == ("mot", views.view_children) else {}
    model = views.fused_model(train_base=view is not views.view_ignore_frozen, **layout)
    view(wrap(model), wrap(tiny_decoder(tied=True)))
    assert len(unwrap(model).strategy.fused_layers(unwrap(model).decoder)) == LAYERS


def check(rank):
    for arch in ARCHS:
        use(arch, setattr)
        check_views(arch, rank)


def check_views(arch, rank):
    for view in SOME:
        torch.manual_seed(17)
        model, reference = views.fused_model(train_base=False), tiny_decoder(tied=True)
        shard(model)
        for layer in reference.layers:
            fully_shard(layer)
        fully_shard(reference)
        try:
            view(model, reference)
        except BaseException as error:
            raise AssertionError(f"{arch}, {view.__name__} on rank {rank}: {error!r}") from error


@pytest.mark.distributed
def test_names_of_a_sharded_model():
    run_on_ranks(check)
