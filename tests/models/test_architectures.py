"""What every architecture computes: scores, caches and generation.

What one of them alone has is tested in the file of that one.
"""

import functools

import pytest
import torch
from models.architectures import ARCHS, ROUTED, every_arch, fresh, in_place, make, move, prompt
from support import FEATURES, IMAGE, VOCAB, inputs, text, tiny_decoder
from torch import nn

from torchfuse import generate
from torchfuse.data.masks import causal_mask, positions
from torchfuse.generation import Session, session

# Of the others the same is tested in tests/generation.
MIXTURES = [name for name, options in ARCHS.items() if options.get("arch") in ROUTED]
every_mixture = pytest.mark.parametrize("name", MIXTURES)


# --- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@every_arch
def test_text_is_scored_as_by_the_decoder_to_the_bit(name, training):
    expected = tiny_decoder().train(training)(text())
    model = fresh(name, fusion_vocab_size=2).train(training)
    assert torch.equal(model(text()), expected)
    if name == "cross_attention":  # zero gates
        assert torch.equal(model(text(), encoder_input=inputs()), expected)
    if "num_text_experts" not in ARCHS[name]:  # new weights act on features alone
        assert torch.equal(move(model)(text()), expected)


@every_arch
def test_a_token_is_scored_from_the_tokens_before_it(name):
    """Logits at ``t - 1`` score the id at ``t``."""
    model, tokens, given = make(name).eval(), prompt(name), {"encoder_input": inputs()}
    out, changed = model(tokens, **given), tokens.clone()
    changed[:, 10] = torch.where(tokens[:, 10] == 5, 6, 5)
    other = model(changed, **given)
    assert torch.equal(out[:, :10], other[:, :10])
    assert (out - other)[:, 10:].abs().amax(dim=(0, 2)).min() > 1e-3


@every_arch
def test_features_change_the_positions_that_attend_to_them_alone(name):
    model = make(name).eval()
    out, other = (model(prompt(name), encoder_input=inputs(seed=seed)) for seed in (2, 9))
    first = 2 if in_place(name) else 0
    assert torch.equal(out[:, :first], other[:, :first])
    assert (out - other)[:, first:].abs().amax(dim=(0, 2)).min() > 1e-3


@every_arch
def test_the_id_of_padding_does_not_matter(name):
    model, counts = make(name).eval(), torch.ones(2, 15, dtype=torch.bool)
    counts[:, :2] = False
    call = {"mask": causal_mask(counts), "input_pos": positions(counts), "encoder_input": inputs()}
    outs = []
    for pad in (0, 7):
        padded = torch.cat([torch.full((2, 2), pad), prompt(name)], dim=1)
        outs.append(model(padded, **call)[:, 2:])
    assert torch.equal(*outs)
    alone = model(prompt(name), encoder_input=inputs())
    torch.testing.assert_close(outs[0], alone, rtol=1e-4, atol=1e-5)


@every_arch
def test_a_row_does_not_depend_on_its_batch(name):
    """Rows with all features, some, and none."""
    model, valid = make(name).eval(), torch.zeros(3, FEATURES, dtype=torch.bool)
    valid[0], valid[1, :4] = True, True
    tokens = text(3)
    if in_place(name):
        tokens[:, 2 : 2 + FEATURES] = torch.where(valid, IMAGE, tokens[:, 2 : 2 + FEATURES])
    together = model(tokens, encoder_input=inputs(3), encoder_mask=valid)
    for row, num in enumerate((FEATURES, 4, 0)):
        own = {"encoder_input": {"x": inputs(3)["x"][row : row + 1, :num]}} if num else {}
        alone = model(tokens[row : row + 1], **own)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@every_arch
def test_autocast_of_a_full_precision_model(name):
    model, tokens = make(name), prompt(name)
    exact = model.eval()(tokens, encoder_input=inputs())
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens, encoder_input=inputs())
        out.float().square().mean().backward()
    assert (out.float() - exact).norm() < 0.05 * exact.norm()


# --- caches and generation -----------------------------------------------------------------------


@every_arch
def test_cached_steps_equal_the_full_forward(name):
    model, tokens = make(name).eval(), prompt(name, length=17)
    expected = model(tokens, encoder_input=inputs()).detach()
    slots = 17 + model.strategy.extra_tokens(FEATURES)
    model.setup_caches(2, torch.float32, encoder_max_seq_len=FEATURES, decoder_max_seq_len=slots)
    mask = torch.ones(slots, slots, dtype=torch.bool).tril()[:17].expand(2, -1, -1)
    for start, end in ((0, 10), (10, 11), (11, 12), (12, 15), (15, 16), (16, 17)):
        given = {"encoder_input": inputs()} if start == 0 else {}
        with torch.no_grad():
            at = torch.arange(start, end)
            out = model(tokens[:, start:end], mask=mask[:, start:end], input_pos=at, **given)
        torch.testing.assert_close(out, expected[:, start:end], rtol=1e-5, atol=1e-5)
    model.reset_caches()
    with torch.no_grad():
        out = model(text()[:, :2], mask=mask[:, :2], input_pos=torch.arange(2))
        alone = make(name).eval()(text()[:, :2])
    torch.testing.assert_close(out, alone, rtol=1e-5, atol=1e-5)


@every_mixture
def test_generates_rows_of_any_length_with_and_without_image(name):
    model = make(name).eval()
    rows = [text(1, 6), prompt(name, 1, 13), prompt(name, 1, 11)]
    x, valid = inputs(3), torch.tensor([[False], [True], [True]]).expand(-1, FEATURES)
    batch = torch.cat([nn.functional.pad(row, (13 - row.shape[1], 0)) for row in rows])
    call = {"max_new_tokens": 7, "temperature": 0}
    together = generate(model, batch, encoder_input=x, encoder_mask=valid, **call)
    for index, row in enumerate(rows):
        given = {"encoder_input": {"x": x["x"][index : index + 1]}} if index else {}
        full = row
        for _ in range(7):
            with torch.no_grad():
                likeliest = model(full, **given)[:, -1].argmax(-1, keepdim=True)
            full = torch.cat([full, likeliest], dim=1)
        assert torch.equal(together[index, 13 - row.shape[1] :], full[0]), index


@pytest.mark.parametrize("name", [name for name in MIXTURES if in_place(name)])
def test_a_later_turn_may_bring_another_image(name):
    model = make(name).eval()
    first, second = prompt(name, length=11), prompt(name, length=12, start=3)
    with torch.no_grad(), Session(model, batch_size=2, max_tokens=44) as session:
        answer, _ = session.answer(
            first, max_new_tokens=4, encoder_embeds=model.encode(inputs()), sampling=None
        )
        _, scores = session.answer(
            second, max_new_tokens=3, encoder_embeds=model.encode(inputs(seed=9)), scores="logits"
        )
    both = {"x": torch.cat([inputs()["x"], inputs(seed=9)["x"]], dim=1)}
    expected = model(torch.cat([first, answer, second], dim=1), encoder_input=both)[:, -1]
    torch.testing.assert_close(scores[:, 0, :VOCAB], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["moma_placeholder", "deepstack"])
def test_compiled_generation_is_the_same_in_two_graphs(name, monkeypatch):
    @functools.cache
    def traced(function, device):  # whole graphs, run as they are: seconds where inductor takes minutes
        return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")

    torch._dynamo.reset()
    model, call = make(name).eval(), {"encoder_input": inputs(), "max_new_tokens": 6, "temperature": 0}
    expected = generate(model, prompt(name), **call)
    monkeypatch.setattr(session, "compiled", traced)
    torch._dynamo.utils.counters.clear()
    assert torch.equal(generate(model, prompt(name), **call, compile=True), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("name", ["cross_attention", "prefix", *ROUTED])
def test_rows_with_no_one_and_two_images_generate_as_they_do_alone(name):
    model = make(name).eval()
    many = inputs(3, 2 * FEATURES)["x"]
    valid = torch.tensor([[0, 0], [1, 0], [1, 1]]).bool().repeat_interleave(FEATURES, dim=1)
    call = {"max_new_tokens": 5, "temperature": 0}
    together = generate(model, text(3), encoder_input={"x": many}, encoder_mask=valid, **call)
    for row in range(3):
        alone = {"encoder_input": {"x": many[row : row + 1, : row * FEATURES]}} if row else {}
        one = generate(model, text(3)[row : row + 1], **alone, **call)
        assert torch.equal(together[row : row + 1], one), row
        full = model(one[:, :-1], **alone)[:, -1]
        assert torch.equal(full.argmax(-1), one[:, -1]), row
    other = generate(model, text(3), encoder_input={"x": many * -3}, encoder_mask=valid, **call)
    assert torch.equal(other[0], together[0])
