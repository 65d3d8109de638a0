"""MoT keeps every pretrained name in every view, and comes back from the directories it writes."""

import pytest
import torch
from contract import views
from ranks import run_on_ranks
from support import IMAGE, TinyEncoder, text_with_image, tiny_decoder
from torch.distributed.fsdp import fully_shard

from torchfuse import export, from_pretrained, fuse, get_fusion_params, save_pretrained
from torchfuse.encoders.clip import ClipVisionEncoder
from torchfuse.models.llama import llama_decoder
from torchfuse.modules.mixture_of_transformers import MoTLayer
from torchfuse.naming import unwrap
from torchfuse.training import shard

PLACEHOLDER = {"placement": "placeholder", "encoder_token": IMAGE}


def fused_model(*, train_base, seed=0, **options):
    return fuse(
        tiny_decoder(seed, tied=True),
        TinyEncoder(),
        arch="mot",
        fusion_vocab_size=2,
        decoder_trainable=train_base,
        encoder_trainable=train_base,
        on_missing="participate",
        **PLACEHOLDER,
        **options,
    )


def use(patch):
    patch(views, "fused_model", fused_model)
    patch(views, "text", text_with_image)


# A graph for each view takes seconds; what it adds to names shows in these.
COMPILED = [views.view_state_dict, views.view_named_parameters, views.view_dcp_optimizer]
CASES = [
    (wrap, view)
    for wrap in views.WRAPPERS
    for view in (COMPILED if wrap is views.compiled else views.VIEWS)
]


@pytest.mark.parametrize(("wrap", "view"), CASES, ids=lambda f: f.__name__.removeprefix("view_"))
def test_names(wrap, view, monkeypatch):
    torch._dynamo.reset()
    use(monkeypatch.setattr)
    model = fused_model(train_base=view is not views.view_ignore_frozen)
    view(wrap(model), wrap(tiny_decoder(tied=True)))
    assert sum(isinstance(unwrap(layer), MoTLayer) for layer in unwrap(model).layers) == 3


def check(rank):
    use(setattr)
    for view in views.VIEWS:
        if view in (views.view_meta_assign, views.view_pickle, views.view_deepcopy):
            continue  # what FSDP2 itself refuses
        torch.manual_seed(17)
        model, reference = fused_model(train_base=False), tiny_decoder(tied=True)
        shard(model)
        for layer in reference.layers:
            fully_shard(layer)
        fully_shard(reference)
        try:
            view(model, reference)
        except BaseException as error:
            raise AssertionError(f"{view.__name__} on rank {rank}: {error!r}") from error


@pytest.mark.distributed
def test_names_of_a_sharded_model():
    run_on_ranks(check)


def parts():
    torch.manual_seed(3)
    decoder = llama_decoder(
        vocab_size=37,
        num_layers=3,
        num_heads=3,
        num_kv_heads=1,
        embed_dim=18,
        max_seq_len=53,
        intermediate_dim=29,
    )
    tower = ClipVisionEncoder(image_size=12, patch_size=4, embed_dim=10, num_layers=2, num_heads=5)
    return {"decoder": decoder, "encoder": tower}


@pytest.mark.parametrize(
    "options", [{"layers": [0, 2]}, {"every": 2, "start": "zero"}, PLACEHOLDER], ids=str
)
def test_a_directory_holds_the_whole_model(options, tmp_path):
    model = fuse(**parts(), arch="mot", **options)
    with torch.no_grad():
        for parameter in get_fusion_params(model).values():
            parameter.add_(torch.randn_like(parameter))
    save_pretrained(model, tmp_path)
    other = from_pretrained(tmp_path)
    assert list(other.state_dict()) == list(model.state_dict())
    assert other.strategy.describe(other.decoder) == model.strategy.describe(model.decoder)
    tokens = torch.randint(1, 37, (2, 13))
    if options is PLACEHOLDER:
        tokens[:, 1:10] = IMAGE
    call = {"encoder_input": {"images": torch.randn(2, 3, 12, 12)}}
    assert torch.equal(other(tokens, **call), model(tokens, **call))


def test_a_fusion_of_directories_starts_from_what_they_hold(tmp_path):
    pretrained, formats = parts(), {"decoder": "llama", "encoder": "clip"}
    for part, module in pretrained.items():
        export(module, tmp_path / part, format=formats[part])
    model = from_pretrained(**{part: tmp_path / part for part in formats}, arch="mot")
    assert all(layer.experts_are_fresh() for layer in model.layers)
    expert, layer = model.layers[1].fusion_layer["encoder"], pretrained["decoder"].layers[1]
    assert torch.equal(expert.mlp.w3.weight, layer.mlp.w3.weight)
