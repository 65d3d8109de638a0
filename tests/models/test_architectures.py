"""What every architecture must show, whatever it does with features.

What only one of them has is in the test file of that one.
"""

import functools
import math

import pytest
import torch
from ranks import run_on_ranks
from support import FEATURES, IMAGE, VOCAB, TinyEncoder, inputs, text, tiny_decoder
from torch import nn
from torch.distributed.fsdp import fully_shard
from torchtune.modules import TransformerCrossAttentionLayer, TransformerSelfAttentionLayer
from torchtune.training import set_activation_checkpointing

from torchfuse import fuse, generate, get_fusion_params, param_groups
from torchfuse.data.masks import causal_mask, positions
from torchfuse.generation import Session, session
from torchfuse.naming import canonical_name
from torchfuse.training.loss import next_token_loss
from torchfuse.training.sharding import shard

PLACEHOLDER = {"placement": "placeholder", "encoder_token": IMAGE}
EXPERTS = {"arch": "moma", "num_experts": 2, "num_text_experts": 2}
ARCHS = {
    "cross_attention": {"every": 1},
    "prefix": {"arch": "joint_decoder", "placement": "prefix"},
    "placeholder": {"arch": "joint_decoder", **PLACEHOLDER},
    "mot": {"arch": "mot"},
    "mot_placeholder": {"arch": "mot", **PLACEHOLDER},
    "moma": EXPERTS,
    "moma_placeholder": {**EXPERTS, **PLACEHOLDER},
    "deepstack": {"arch": "deepstack"},
    "deepstack_placeholder": {"arch": "deepstack", **PLACEHOLDER},
}
every_arch = pytest.mark.parametrize("name", ARCHS)
# Those with weights of their own in the layers and features in the sequence; of the others, the same is
# shown in tests/contract and tests/generation.
MIXTURES = [
    name for name, options in ARCHS.items() if options.get("arch") in ("mot", "moma", "deepstack")
]
every_mixture = pytest.mark.parametrize("name", MIXTURES)


def in_place(name):
    return "encoder_token" in ARCHS[name]


def fresh(name, *, encoder=None, **options):
    options = {"encoder_trainable": True, **ARCHS[name], **options}
    return fuse(tiny_decoder(), encoder or TinyEncoder(), **options)


@torch.no_grad()
def move(model, scale=0.3):
    """New weights that are nobody's copies or zero, and features that outweigh the embeddings."""
    generator = torch.Generator().manual_seed(23)
    for parameter in get_fusion_params(model).values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def make(name, **options):
    return move(fresh(name, **options))


def prompt(name, batch=2, length=13, start=2):
    tokens = text(batch, length)
    if in_place(name):
        tokens[:, start : start + FEATURES] = IMAGE
    return tokens


def labels_of(tokens):
    return tokens.masked_fill(tokens == IMAGE, -100)


# --- what is scored ------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@every_arch
def test_text_is_scored_as_by_the_decoder_to_the_bit(name, training):
    expected = tiny_decoder().train(training)(text())
    model = fresh(name, fusion_vocab_size=2).train(training)
    assert torch.equal(model(text()), expected)
    if name == "cross_attention":  # whose features add nothing at first
        assert torch.equal(model(text(), encoder_input=inputs()), expected)
    if "num_text_experts" not in ARCHS[name]:  # and whatever is learned of features, text stays
        assert torch.equal(move(model)(text()), expected)


@every_arch
def test_defect_1_what_scores_a_token_has_not_seen_it(name):
    """Logits at ``t - 1`` score the id at ``t``."""
    model, tokens, given = make(name).eval(), prompt(name), {"encoder_input": inputs()}
    out, changed = model(tokens, **given), tokens.clone()
    changed[:, 10] = torch.where(tokens[:, 10] == 5, 6, 5)
    other = model(changed, **given)
    assert torch.equal(out[:, :10], other[:, :10])
    assert (out - other)[:, 10:].abs().amax(dim=(0, 2)).min() > 1e-3


@every_arch
def test_features_move_all_that_sees_them_and_nothing_else(name):
    model = make(name).eval()
    out, other = (model(prompt(name), encoder_input=inputs(seed=seed)) for seed in (2, 9))
    first = 2 if in_place(name) else 0
    assert torch.equal(out[:, :first], other[:, :first])
    assert (out - other)[:, first:].abs().amax(dim=(0, 2)).min() > 1e-3


@every_arch
def test_defect_6_the_id_of_padding_does_not_matter(name):
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
def test_defect_6_batch_mates_do_not_matter(name):
    """Rows with all features, some, and none."""
    model, valid = make(name).eval(), torch.zeros(3, FEATURES, dtype=torch.bool)
    valid[0], valid[1, :4] = True, True
    tokens = text(3)
    if in_place(name):
        tokens[:, 2 : 2 + FEATURES] = torch.where(valid, IMAGE, tokens[:, 2 : 2 + FEATURES])
    together = model(tokens, encoder_input=inputs(3), encoder_mask=valid)
    for row, num in enumerate((FEATURES, 4, 0)):
        mine = {"encoder_input": {"x": inputs(3)["x"][row : row + 1, :num]}} if num else {}
        alone = model(tokens[row : row + 1], **mine)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


# --- learning ------------------------------------------------------------------------------------


def losses_of(name, target, steps=200):
    """Loss per token of each step on ids that are drawn anew each time, everything training."""
    model = fresh(name, decoder_trainable=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator, losses = torch.Generator().manual_seed(31), []
    for _ in range(steps):
        ids = torch.randint(0, VOCAB, (5, 8 + FEATURES * in_place(name)), generator=generator)
        if in_place(name):
            ids[:, 3 : 3 + FEATURES] = IMAGE
        loss, count = next_token_loss(model(ids, encoder_input=inputs(5)), target(ids))
        losses.append(loss.detach() / count)
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
    return torch.stack(losses)


@every_arch
def test_defect_1_fresh_random_ids_cannot_be_learned(name):
    losses = losses_of(name, labels_of)
    assert losses.unfold(0, 40, 20).mean(dim=1).min() > math.log(VOCAB) - 0.02


def test_defect_1_what_can_be_copied_is():
    """As the test above, but with labels that are not the next ids: it would have noticed."""
    assert losses_of("prefix", lambda ids: ids.roll(1, dims=1))[-20:].mean() < math.log(VOCAB) - 1


def learning(model, name, batch=2, called=None, seed=29):
    """The loss per token, and the gradients of all that trains."""
    torch.manual_seed(seed)  # experts are chosen with noise
    run = model if called is None else called
    tokens = prompt(name, batch)
    loss, count = next_token_loss(run(tokens, encoder_input=inputs(batch)), labels_of(tokens))
    (loss / count).backward()
    return loss / count, {
        canonical_name(n): p.grad for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in ARCHS), *((n, {"start": "zero"}) for n in MIXTURES if n[:2] == "mo")],
    ids=lambda value: value if isinstance(value, str) else "_".join(value.values()),
)
def test_all_that_trains_has_a_gradient_by_the_second_step(name, options):
    model = fresh(name, **options)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2))
    for step in range(2):
        optimizer.zero_grad()
        # Enough rows that each expert takes a feature of which something is asked.
        _, gradients = learning(model, name, batch=11, seed=step)
        optimizer.step()
    assert [n for n, gradient in gradients.items() if gradient is None or not gradient.any()] == []
    assert {n.partition(".")[0] for n in gradients} >= {"encoder", "adapter"}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@every_arch
def test_defect_4_a_batch_without_a_target_is_finite(name):
    model, tokens = make(name, decoder_trainable=True), prompt(name)
    loss, count = next_token_loss(model(tokens, encoder_input=inputs()), torch.full_like(tokens, -100))
    assert loss.item() == count.item() == 0
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), parameter_name
        # What foretells the choice of experts has its target in that.
        assert parameter.grad.any() == ("auxiliary" in parameter_name), parameter_name


def same(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-5, atol=1e-5, msg=name)


@every_arch
def test_one_graph_equals_eager_in_values_and_gradients(name):
    torch._dynamo.reset()
    model = make(name, decoder_trainable=True)
    called = torch.compile(model, backend="aot_eager", fullgraph=True)
    same(learning(model, name, called=called), learning(make(name, decoder_trainable=True), name))


@pytest.mark.parametrize("around", ["fused", "pretrained"])
@every_arch
def test_activation_checkpointing_equals_eager_in_values_and_gradients(name, around):
    model, ran = make(name, decoder_trainable=True), []
    # New weights run again, too, where there are any.
    new = [
        m for n, m in model.layers.named_modules() if "fusion_layer" in n and isinstance(m, nn.Linear)
    ]
    (new or [model.layers[1].mlp.w1])[0].register_forward_hook(lambda *_: ran.append(1))
    kinds = {TransformerSelfAttentionLayer, TransformerCrossAttentionLayer}
    if around == "fused":
        kinds = {type(layer) for layer in model.layers}
    set_activation_checkpointing(model, kinds)
    same(learning(model, name), learning(make(name, decoder_trainable=True), name))
    assert len(ran) == 2  # forward, and again for backward


# --- caches --------------------------------------------------------------------------------------


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
def test_compiled_generation_says_the_same_in_two_graphs(name, monkeypatch):
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


# --- ranks ---------------------------------------------------------------------------------------


def scored(model, *args, **kwargs):
    torch.manual_seed(29)  # experts are chosen with noise
    return model(*args, **kwargs)


@every_mixture
def test_a_stand_in_changes_no_bit_and_reaches_every_new_weight(name):
    plain, model = make(name), make(name, on_missing="participate")
    out = scored(model, text())
    assert torch.equal(out, scored(plain, text()))
    out.square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.any() == (".text." in parameter_name), parameter_name


@every_mixture
def test_named_encoders_take_part_one_by_one(name):
    def both(on_missing):
        encoders = {"eye": TinyEncoder(), "ear": TinyEncoder(seed=6)}
        token = {"encoder_token": {"eye": IMAGE, "ear": IMAGE + 1}} if in_place(name) else {}
        return make(name, encoder=encoders, on_missing=on_missing, **token)

    only, plain, model = {"encoder_input": {"eye": inputs()}}, both("skip"), both("participate")
    out = scored(model, prompt(name), **only)
    assert torch.equal(out, scored(plain, prompt(name), **only))
    out.square().sum().backward()
    for parameter_name, parameter in get_fusion_params(model).items():
        assert parameter.grad.any() == ("ear" not in parameter_name.split(".")), parameter_name


def quiet(name):
    return {"noise": False} if ARCHS[name].get("arch") == "moma" else {}


def of_rank(model, name, rank):
    """Loss per token and gradients of what one rank sees: rank zero an image, the other none."""
    images = rank == 0
    tokens, given = (prompt(name), {"encoder_input": inputs()}) if images else (text(), {})
    loss, count = next_token_loss(model(tokens, **given), labels_of(tokens if images else text(seed=5)))
    (loss / count).backward()
    return loss / count, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def compare(rank, name):
    options = {"decoder_trainable": True, "on_missing": "participate", **quiet(name)}
    alone = [of_rank(make(name, **options), name, r) for r in (0, 1)]
    model = make(name, **options)
    shard(model)
    loss, gradients = of_rank(model, name, rank)
    torch.testing.assert_close(loss, alone[rank][0], rtol=1e-6, atol=1e-6)
    assert gradients.keys() == alone[0][1].keys() == {n for n, _ in model.named_parameters()}
    for parameter, gradient in gradients.items():
        mean = (alone[0][1][parameter] + alone[1][1][parameter]) / 2
        assert mean.any() or "experts" in parameter, parameter  # one may have taken nothing that counts
        torch.testing.assert_close(gradient.full_tensor(), mean, rtol=1e-6, atol=1e-6, msg=parameter)
    torch.optim.AdamW(param_groups(model, lr=1e-3)).step()
    of_rank(model, name, rank)  # and on it goes


def compare_all(rank):
    for name in ARCHS:
        try:
            compare(rank, name)
        except BaseException as error:
            raise AssertionError(f"{name}, rank {rank}: {error}") from error


@pytest.mark.distributed
def test_defect_4_two_ranks_of_which_one_has_no_image_equal_one_process():
    run_on_ranks(compare_all)


def shard_the_pretrained_layers(rank):
    from torchtune.training import get_shard_conditions, shard_model

    for name in ("mot", "mot_placeholder", "moma"):
        options = {"on_missing": "participate", "decoder_trainable": True}
        whole, inner = make(name, **options), make(name, **options)
        # All that is called a layer, so both a fused one and what it wraps.
        shard_model(whole, [get_shard_conditions], cpu_offload=False)
        fully_shard(inner.layers[0].wrapped)
        for model in (whole, inner):
            for call in ({"encoder_input": inputs()}, {}):
                tokens = prompt(name) if call else text()
                with pytest.raises(
                    ValueError, match="inside this .* is sharded .*torchfuse.training.sharding.shard"
                ):
                    model(tokens, **call)
        sharded = make(name, **options)
        shard(sharded)
        expected = scored(make(name, **options), prompt(name), encoder_input=inputs())
        out = scored(sharded, prompt(name), encoder_input=inputs())
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.distributed
def test_a_pretrained_layer_that_is_sharded_by_itself_is_refused():
    run_on_ranks(shard_the_pretrained_layers, world_size=1)
