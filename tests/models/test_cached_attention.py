"""Setting up caches exchanges torchtune's attention for one that takes over all that it holds."""

import copy
import pickle

import pytest
import torch
from ranks import run_on_ranks
from support import TinyEncoder, inputs, text, tiny_decoder
from torchtune.modules import MultiHeadAttention, delete_kv_caches
from torchtune.modules.peft import LoRALinear

from torchfuse import fuse, generate
from torchfuse.models.cached_attention import CachedAttention
from torchfuse.training import shard


def make(**options):
    return fuse(tiny_decoder(), TinyEncoder(), every=2, **options).eval()


def attentions(model):
    return [layer.attn for layer in model.layers]


def test_names_values_hooks_and_mode_stay():
    model, ran = make(decoder_trainable=True), []
    old, order = attentions(model), list(model.state_dict())
    tensors = dict(model.named_parameters())
    for attn in old:
        attn.register_forward_hook(lambda *_: ran.append(1))
    expected = model(text(), encoder_input=inputs())
    old[1].train()
    model.setup_caches(2, torch.float32, encoder_max_seq_len=7, decoder_max_seq_len=13)
    new = attentions(model)
    assert [type(attn) for attn in new] == [CachedAttention] * 3
    assert [attn.training for attn in new] == [False, True, False]
    delete_kv_caches(model)
    assert list(model.state_dict()) == order
    assert all(p is tensors[name] for name, p in model.named_parameters())
    assert all(type(attn) is MultiHeadAttention and attn.kv_cache is None for attn in old)
    assert torch.equal(model(text(), encoder_input=inputs()), expected)
    assert len(ran) == 2 * len(old)
    model.setup_caches(2, torch.float32, encoder_max_seq_len=7, decoder_max_seq_len=13)
    assert all(one is other for one, other in zip(attentions(model), new, strict=True))


def test_replaced_projections_stay():
    model = make()
    attn = model.layers[0].attn
    attn.q_proj = LoRALinear(18, 18, rank=2, alpha=3.0)
    torch.nn.init.normal_(attn.q_proj.lora_b.weight)
    model.eval()
    tokens = generate(model, text(), encoder_input=inputs(), max_new_tokens=1, temperature=0)
    assert model.layers[0].attn.q_proj is attn.q_proj
    assert torch.equal(tokens[:, -1], model(text(), encoder_input=inputs())[:, -1].argmax(-1))


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_decodes_on_its_own(copied):
    model, call = make(), {"encoder_input": inputs(), "max_new_tokens": 3, "temperature": 0}
    tokens = generate(model, text(), **call)
    for attn in attentions(model):
        attn._attention_call = (
            None  # a local function of torchtune's, which no model of its layers pickles
        )
    other = copied(model)
    assert {type(attn) for attn in attentions(other)} == {CachedAttention}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(generate(other, text(), **call), tokens)


class Other(MultiHeadAttention):
    """May compute something else."""


def test_a_subclass_is_left_alone():
    model = make()
    model.layers[0].attn, state = Other.__new__(Other), model.layers[0].attn.__getstate__()
    model.layers[0].attn.__setstate__(state)
    model.setup_caches(2, torch.float32, encoder_max_seq_len=7, decoder_max_seq_len=13)
    assert [type(attn) for attn in attentions(model)] == [Other, CachedAttention, CachedAttention]


def decode_sharded(rank):
    call = {"encoder_input": inputs(), "max_new_tokens": 5, "temperature": 0}
    expected = generate(make(), text(), **call)
    model = make(on_missing="participate")
    shard(model)
    assert torch.equal(generate(model, text(), **call), expected)
    assert {type(attn) for attn in attentions(model)} == {CachedAttention}


@pytest.mark.distributed
def test_a_sharded_model_decodes():
    run_on_ranks(decode_sharded)
