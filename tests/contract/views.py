"""The views in which a pretrained parameter must keep its name, and the wrappers it must survive.

Every view is a function of the fused model and of the plain decoder, both wrapped in the same way. The
plain decoder is the reference: fusion must not change any of its names.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from support import TinyEncoder, inputs, text, tiny_decoder
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers.trainer_pt_utils import get_parameter_names

from torchfuse import fuse, get_fusion_params, param_groups
from torchfuse.naming import canonical_name, named_parameters, unwrap

PREFIX = "decoder."


def fused_model(*, train_base: bool, seed: int = 0, **options: Any) -> nn.Module:
    return fuse(
        tiny_decoder(seed, tied=True),
        TinyEncoder(),
        every=2,
        fusion_vocab_size=2,
        decoder_trainable=train_base,
        encoder_trainable=train_base,
        on_missing="participate",
        **options,
    )


# --- wrappers ------------------------------------------------------------------------------------


def plain(model):
    return model


def checkpointed_inside(model):
    """Activation checkpointing around the pretrained layers, inside the fusion layers."""
    for index, layer in enumerate(model.layers):
        if hasattr(layer, "wrapped"):
            layer.layer = checkpoint_wrapper(layer.layer)
        else:
            model.layers[index] = checkpoint_wrapper(layer)
    return model


def checkpointed_outside(model):
    """Activation checkpointing around the fusion layers."""
    for index, layer in enumerate(model.layers):
        model.layers[index] = checkpoint_wrapper(layer)
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = [plain, checkpointed_inside, checkpointed_outside, compiled]


# --- views ---------------------------------------------------------------------------------------


def pretrained(model, names):
    """Of the names of a fused model the decoder's that fusion did not add, as the decoder's own."""
    added = set(get_fusion_params(model))
    return [
        prefix + rest
        for name in names
        if canonical_name(name) not in added
        for prefix, found, rest in [name.partition(PREFIX)]
        if found
    ]


def step(model, optimizer):
    """One training step with an image, so that everything that trains has a gradient."""
    out = model(text(), encoder_input=inputs())
    out.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def logits(model):
    model.eval()
    with torch.no_grad():
        out = model(text(), encoder_input=inputs())
    if hasattr(model, "reshard"):  # FSDP2 keeps the root gathered until a backward that does not come
        model.reshard()
    return out


def optimizer_of(model):
    return torch.optim.AdamW(param_groups(model, lr=1e-2))


def view_state_dict(model, reference):
    assert pretrained(model, model.state_dict()) == list(reference.state_dict())


def view_named_parameters(model, reference):
    names = [name for name, _ in named_parameters(model)]
    assert pretrained(model, names) == [name for name, _ in named_parameters(reference)]
    raw = [name for name, _ in model.named_parameters()]
    assert [canonical_name(name) for name in raw] == names
    assert [canonical_name(name) for name in model.state_dict()] == names  # the same order


def view_submodules(model, reference):
    inner = unwrap(model)
    for name, _ in named_parameters(reference):
        parameter = inner.get_parameter(PREFIX + name)
        assert parameter is dict(named_parameters(inner))[PREFIX + name]


def view_children(model, reference):
    """The names that transformers' Trainer composes of children decide which tensors are decayed."""

    def names(model):
        parameters = dict(named_parameters(model))  # a bias that is None has a name too
        found = map(canonical_name, get_parameter_names(model, []))
        return [name for name in found if name in parameters]

    assert pretrained(model, names(model)) == names(reference)
    assert sorted(names(model)) == sorted(name for name, _ in named_parameters(model))


def view_dcp_model(model, reference):
    expected = list(get_model_state_dict(reference))
    for options in (None, StateDictOptions(full_state_dict=True)):
        saved = get_model_state_dict(model, options=options)
        assert pretrained(model, saved) == expected
        assert list(saved) == [name for name, _ in named_parameters(model)]
    full = StateDictOptions(full_state_dict=True)
    saved = {name: tensor.clone() for name, tensor in get_model_state_dict(model, options=full).items()}
    before = logits(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert not torch.equal(logits(model), before)
    set_model_state_dict(model, saved, options=full)
    assert torch.equal(logits(model), before)


def view_dcp_optimizer(model, reference):
    optimizer = optimizer_of(model)
    step(model, optimizer)
    full = StateDictOptions(full_state_dict=True)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=full))
    trained = {name for name, p in named_parameters(model) if p.requires_grad}
    assert set(saved["state"]) == trained
    fresh = optimizer_of(model)
    set_optimizer_state_dict(model, fresh, saved, options=full)
    again = get_optimizer_state_dict(model, fresh, options=full)
    for name in trained:
        for key, value in saved["state"][name].items():
            assert torch.equal(again["state"][name][key], value), (name, key)
    assert any(s["exp_avg"].any() for s in again["state"].values())


def view_ignore_frozen(model, reference):
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    saved = get_model_state_dict(model, options=options)
    assert list(saved) == [name for name, p in named_parameters(model) if p.requires_grad]


def view_partial_load(model, reference):
    torch.manual_seed(5)
    given = {name: torch.randn_like(value) for name, value in reference.state_dict().items()}
    state = model.state_dict()
    fitting = {}
    for name in state:
        head, found, rest = name.partition(PREFIX)
        if found and head + rest in given:
            fitting[name] = given[head + rest]
    assert len(fitting) == len(given)
    result = model.load_state_dict(fitting, strict=False)
    assert result.unexpected_keys == []
    missing = {canonical_name(name) for name in result.missing_keys}
    assert missing == {canonical_name(name) for name in state if name not in fitting}
    assert set(get_fusion_params(model)) <= missing
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in fitting.items())


def view_meta_assign(model, reference):
    train_base = any(p.requires_grad for p in unwrap(model).encoder.parameters())
    with torch.device("meta"):
        empty = fused_model(train_base=train_base)
    saved = {canonical_name(name): value for name, value in model.state_dict().items()}
    assert list(empty.state_dict()) == list(saved)
    empty.load_state_dict(saved, assign=True)
    assert not any(p.is_meta for p in empty.parameters())
    for module in empty.modules():
        if hasattr(module, "rope_init"):
            module.rope_init()
    # The head is tied to the embedding that fusion put in place of the pretrained one.
    assert torch.equal(logits(empty), logits(model))


def sdpa(q, k, v, mask, dropout_p, is_causal):
    mask = None if mask is None else mask[:, None]
    return nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)


def view_pickle(model, reference):
    # torchtune's attention holds a local function, so no model of its layers pickles; this one does.
    for module in model.modules():
        if hasattr(module, "_attention_call"):
            module._attention_call = sdpa
    other = pickle.loads(pickle.dumps(model))
    assert list(other.state_dict()) == list(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    assert set(get_fusion_params(other)) == set(get_fusion_params(model))


def view_deepcopy(model, reference):
    other = copy.deepcopy(model)
    assert list(other.state_dict()) == list(model.state_dict())
    before = logits(model)
    assert torch.equal(logits(other), before)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(logits(model), before)


VIEWS = [
    view_state_dict,
    view_named_parameters,
    view_submodules,
    view_children,
    view_dcp_model,
    view_dcp_optimizer,
    view_ignore_frozen,
    view_partial_load,
    view_meta_assign,
    view_pickle,
    view_deepcopy,
]
