"""Caches change no logit: not with padding, images or none, grouped heads, room to spare or a past."""

import pytest
import torch
import torch.nn.functional as F
from generation import models
from generation.models import AN_IMAGE, ARCHS, GREEDY, LENGTHS, WIDE, mixed_rows
from support import IMAGE, inputs, text
from torchtune.modules.common_utils import delete_kv_caches

from torchfuse import generate, set_trainable
from torchfuse.generation import Session
from torchfuse.modules.kv_cache import EncoderKVCache, KVCache

HEADS = 6
STEPS = 9

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def make(name, kv_heads=2, device="cpu"):
    sizes = {"num_heads": HEADS, "num_kv_heads": kv_heads, "embed_dim": 24, "max_seq_len": 71}
    return models.make(name, device=device, **sizes)


def scored(model, x, name, **options):
    """The greedy answer of the mixed rows, and the logits at each of its steps."""
    _, batch, valid = mixed_rows(name, x["x"].device)
    return generate(
        model,
        batch,
        encoder_input=x,
        encoder_mask=valid,
        max_new_tokens=STEPS,
        temperature=0,
        scores="logits",
        **options,
    )


@torch.no_grad()
@devices
@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
@pytest.mark.parametrize("name", ARCHS)
def test_every_step_of_mixed_rows_equals_each_row_alone_without_caches(name, kv_heads, device):
    model, x = make(name, kv_heads, device), {"x": inputs(3, WIDE)["x"].to(device)}
    answers, logits = scored(model, x, name)
    rows, _, valid = mixed_rows(name, device)
    for row, prompt in enumerate(rows):
        sequence = answers[row, -STEPS - len(prompt) : -1][None]
        assert torch.equal(sequence[0, : len(prompt)], prompt)
        alone = {"encoder_input": {"x": x["x"][row, valid[row]][None]}} if row else {}
        expected = model(sequence, **alone)[0, -STEPS:]
        assert expected.std() > 0.1
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ARCHS)
def test_features_reach_the_rows_that_have_them_and_no_other(name):
    model, x = make(name), inputs(3, WIDE)
    _, before = scored(model, x, name)
    changed = {"x": x["x"] + torch.randn(3, WIDE, 5)}
    _, after = scored(model, changed, name)
    assert torch.equal(after[0], before[0])
    assert ((after[1:] - before[1:]).abs().amax(dim=-1) > 1e-2).all()  # at every step
    padding = {"x": x["x"].clone()}
    padding["x"][1, AN_IMAGE:] = 11  # where row 1 has no second image
    assert torch.equal(scored(model, padding, name)[1], before)


def answer(model, name, *, features, tokens, poison=False):
    """As ``scored``, in a session with caches of these sizes, which may hold other values before."""
    _, batch, valid = mixed_rows(name)
    embeds = model.encode(inputs(3, WIDE))
    options = {"batch_size": 3, "max_features": features, "max_tokens": tokens}
    with Session(model, **options) as session:
        if poison:
            for buffer in model.buffers():
                if buffer.dim() == 4:  # keys and values
                    buffer.fill_(1e4)
        given = {"encoder_embeds": embeds, "encoder_mask": valid}
        return session.answer(batch, max_new_tokens=STEPS, sampling=GREEDY, scores="logits", **given)


@torch.no_grad()
@pytest.mark.parametrize("poison", [False, True], ids=["clean", "poisoned"])
@pytest.mark.parametrize("name", ARCHS)
def test_caches_larger_than_needed_change_nothing(name, poison):
    model, needed = make(name), max(LENGTHS) + STEPS - 1
    tokens_needed, logits = answer(model, name, features=WIDE, tokens=needed)
    for features, tokens in ((WIDE + 5, needed), (WIDE, needed + 11), (WIDE + 5, needed + 11)):
        got = answer(model, name, features=features, tokens=tokens, poison=poison)
        assert torch.equal(got[0], tokens_needed)
        torch.testing.assert_close(got[1], logits, rtol=0, atol=2e-6)


def run(model, tokens, steps, x=None):
    """Logits of a prompt and of the greedy steps behind it, through the model's own call."""
    every, at, parts = torch.arange(model.decoder_max_cache_seq_len), 0, []
    given = {} if x is None else {"encoder_input": x}
    for _ in range(steps):
        here = torch.arange(at, at + tokens.shape[1])
        mask = (every <= here[:, None]).expand(tokens.shape[0], -1, -1)
        parts.append(model(tokens, mask=mask, input_pos=here.expand(tokens.shape[0], -1), **given))
        at, given = at + tokens.shape[1], {}
        tokens = parts[-1][:, -1:].argmax(-1)
    return torch.cat(parts, dim=1)


def set_up(model):
    extra = model.strategy.extra_tokens(WIDE)
    model.setup_caches(2, torch.float32, encoder_max_seq_len=WIDE, decoder_max_seq_len=23 + extra)


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHS)
def test_reset_caches_equal_new_ones(name):
    model = make(name)
    first, second = text(2, 13, seed=1), text(2, 8, seed=2)
    if name == "placeholder":
        first[:, 2 : 2 + WIDE] = second[:, 1 : 1 + AN_IMAGE] = IMAGE
    sequences = [
        (first, inputs(2, WIDE)),
        (second, inputs(2, AN_IMAGE, seed=4)),  # shorter, with fewer features
        (text(2, 5, seed=3), None),
        (first, inputs(2, WIDE)),
    ]
    fresh = []
    for tokens, x in sequences:
        set_up(model)
        fresh.append(run(model, tokens, 7, x))
        delete_kv_caches(model)
    set_up(model)
    places = [buffer.data_ptr() for buffer in model.buffers()]
    for (tokens, x), expected in zip(sequences, fresh, strict=True):
        model.reset_caches()
        assert torch.equal(run(model, tokens, 7, x), expected)
    assert [buffer.data_ptr() for buffer in model.buffers()] == places
    assert not torch.allclose(fresh[0][:, -7:], fresh[1][:, -7:], atol=1e-2)


@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
@pytest.mark.parametrize("name", ["cross_attention", "prefix"])
def test_attention_reads_the_caches_themselves(name, kv_heads, monkeypatch):
    """Nothing is copied to the heads of queries."""
    model, steps, attend = make(name, kv_heads), [], F.scaled_dot_product_attention

    def spy(q, k, v, *args, **kwargs):
        steps[-1].append((q.shape, k, v))
        return attend(q, k, v, *args, **kwargs)

    embeds = model.encode(inputs(2, WIDE))
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with Session(model, batch_size=2, max_tokens=30, max_features=WIDE) as session:
        caches = [m for m in model.modules() if isinstance(m, KVCache | EncoderKVCache)]
        steps.append([])
        session.answer(
            text(2, 7),
            max_new_tokens=4,
            encoder_embeds=embeds,
            sampling=GREEDY,
            stream=lambda _: steps.append([]),
        )
        held = {(c.k_cache.data_ptr(), c.v_cache.data_ptr()): c.k_cache for c in caches}
    *read, behind = steps
    assert behind == [] and len(read) == 4
    for step, calls in enumerate(read):
        assert {(k.data_ptr(), v.data_ptr()) for _, k, v in calls} == held.keys()
        for q, k, v in calls:
            cache = held[k.data_ptr(), v.data_ptr()]
            assert k.shape == v.shape == cache.shape and k.shape[1] == kv_heads
            assert k.stride() == v.stride() == cache.stride()
            if step:
                assert q[1] == kv_heads and q[1] * q[2] == HEADS


def test_keys_of_features_are_computed_once_for_all_turns():
    model, ran = make("cross_attention"), []
    for module in model.modules():
        if hasattr(module, "ca_scale"):
            module.attn.k_proj.register_forward_hook(lambda *_: ran.append(1))
    with Session(model, batch_size=2, max_tokens=40, max_features=WIDE) as session:
        embeds = model.encode(inputs(2, WIDE))
        session.answer(text(2, 7), max_new_tokens=5, encoder_embeds=embeds, sampling=GREEDY)
        session.answer(text(2, 3), max_new_tokens=5, sampling=GREEDY)
    assert ran == [1]


@pytest.mark.parametrize("name", ARCHS)
def test_caches_are_refused_in_training(name):
    """Cached keys have no gradient: the weights that made them would not train, silently."""
    model = make(name).train()
    set_trainable(model, decoder=True)
    set_up(model)
    before = [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(ValueError, match=r"[Cc]aches are for inference.*eval\(\).*no_grad"):
        run(model, text(2, 8), 1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    with torch.no_grad():
        assert not run(model, text(2, 8), 2).requires_grad  # as in a recipe that prints samples
    assert not any(buffer.requires_grad for buffer in model.buffers())
    delete_kv_caches(model)
    model(text(2, 8)).square().mean().backward()
    assert model.layers[0].attn.k_proj.weight.grad.any()
