import pytest
import torch
from generation.models import ARCHS, make, prompt
from support import FEATURES, VOCAB, TinyEncoder, inputs, open_gates, text, tiny_decoder

from torchfuse import fuse, generate
from torchfuse.generation import sample


def without_caches(model, tokens, steps, **given):
    """The greedy continuation, with the whole sequence run again at every step."""
    for _ in range(steps):
        with torch.no_grad():
            logits = model(tokens, **given)
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        if given.get("encoder_mask") is not None and given["encoder_mask"].dim() == 3:
            mask = given["encoder_mask"]
            given["encoder_mask"] = torch.cat([mask, mask[:, -1:]], dim=1)
    return tokens


@pytest.mark.parametrize("name", ARCHS)
def test_equals_the_model_without_caches(name):
    model, tokens = make(name), prompt(name)
    got = generate(model, tokens, encoder_input=inputs(), max_new_tokens=9, temperature=0)
    assert torch.equal(got, without_caches(model, tokens, 9, encoder_input=inputs()))
    assert not model.caches_are_setup()
    with torch.no_grad():
        logits = [model(tokens, encoder_input=inputs(seed=seed))[:, -1] for seed in (2, 9)]
    assert not torch.allclose(*logits, rtol=0.01)  # the answer depends on the features


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_new_tokens_that_the_head_scores_can_be_penalized_and_end_an_answer(tied):
    decoder = tiny_decoder(tied=tied)
    model = fuse(decoder, TinyEncoder(), every=2, fusion_vocab_size=3, fusion_head=True).eval()
    options = {"max_new_tokens": 5, "temperature": 0, "repetition_penalty": 1.5, "scores": "logits"}
    _, scores = generate(model, text(), **options)
    assert scores.shape[-1] == VOCAB + 3
    generate(model, text(), **options, stop_tokens=[VOCAB + 2])
    with pytest.raises(ValueError, match=rf"stop_tokens \[{VOCAB + 3}\] must lie in \[0, {VOCAB + 3}\)"):
        generate(model, text(), **options, stop_tokens=[VOCAB + 3])


def test_new_tokens_attend_to_what_the_last_prompt_token_attends_to():
    model, tokens = make("cross_attention"), prompt("cross_attention")
    mask = torch.rand(2, 11, FEATURES) < 0.5
    given = {"encoder_input": inputs(), "encoder_mask": mask}
    got = generate(model, tokens, **given, max_new_tokens=7, temperature=0)
    assert torch.equal(got, without_caches(model, tokens, 7, **given))


def test_named_encoders_and_their_masks():
    encoders = {"eye": TinyEncoder(), "ear": TinyEncoder(seed=6)}
    model = open_gates(fuse(tiny_decoder(), encoders, every=1)).eval()
    given = {"eye": inputs(), "ear": inputs(num=3)}
    masks = {"eye": torch.rand(2, 11, 7) < 0.5, "ear": torch.rand(2, 11, 3) < 0.5}
    joined = torch.cat([masks["eye"], masks["ear"]], dim=-1)
    tokens = text(2, 11)
    expected = without_caches(model, tokens, 6, encoder_input=given, encoder_mask=joined)
    for mask in (masks, joined):
        got = generate(
            model, tokens, encoder_input=given, encoder_mask=mask, max_new_tokens=6, temperature=0
        )
        assert torch.equal(got, expected)


def test_stop_tokens_end_rows_and_then_the_batch():
    model, tokens = make("cross_attention"), text(2, 5)
    free = generate(model, tokens, max_new_tokens=12, temperature=0)[:, 5:]
    stop = [int(free[0, 2]), int(free[1, 4])]
    ended = generate(model, tokens, max_new_tokens=12, temperature=0, stop_tokens=stop, pad_id=0)[:, 5:]
    ends = [min(free[row].tolist().index(s) for s in stop if s in free[row].tolist()) for row in (0, 1)]
    assert ended.shape[1] == max(ends) + 1
    for row, end in enumerate(ends):
        assert torch.equal(ended[row, : end + 1], free[row, : end + 1])
        assert not ended[row, end + 1 :].any()


def test_a_plain_decoder_generates():
    decoder = tiny_decoder().eval()
    got = generate(decoder, text(), max_new_tokens=5, temperature=0)
    assert torch.equal(got, without_caches(decoder, text(), 5))


def test_a_seed_gives_the_same_answer_and_the_stream_is_that_answer():
    model, streamed = make("cross_attention"), []
    runs = [
        generate(
            model,
            text(),
            max_new_tokens=9,
            temperature=0.9,
            top_k=11,
            generator=torch.Generator().manual_seed(5),
            stream=streamed.append if turn else None,
        )
        for turn in range(2)
    ]
    assert torch.equal(*runs)
    assert torch.equal(torch.stack(streamed, dim=1), runs[1][:, 13:])
    other = generate(model, text(), max_new_tokens=9, generator=torch.Generator().manual_seed(6))
    assert not torch.equal(other, runs[0])


def test_modes_are_restored_and_there_is_no_gradient():
    model = make("cross_attention").train()
    before = [m.training for m in model.modules()]
    out = generate(model, text(), max_new_tokens=2)
    assert [m.training for m in model.modules()] == before
    assert not out.requires_grad


def test_other_bad_calls():
    model = make("prefix")
    with pytest.raises(
        ValueError, match="13 prompt tokens, 7 encoder tokens and 78 new ones.*max_seq_len of 97"
    ):
        generate(model, text(), encoder_input=inputs(), max_new_tokens=78)
    with pytest.raises(ValueError, match=r"tokens must be ids \[b, s\]"):
        generate(model, torch.ones(3), max_new_tokens=1)
    model.setup_caches(3, torch.float32)
    with pytest.raises(ValueError, match="the caches hold 3 rows, not 2"):
        generate(model, text(), max_new_tokens=1)


# --- sampling ------------------------------------------------------------------------------------


def frequencies(logits, **options):
    generator = torch.Generator().manual_seed(3)
    drawn = sample(logits.expand(20_000, -1), generator=generator, **options)
    return torch.bincount(drawn, minlength=logits.shape[-1]) / 20_000


def test_sampling_follows_the_distribution():
    logits = torch.randn(7)
    torch.testing.assert_close(frequencies(logits), logits.softmax(-1), rtol=0, atol=0.015)
    torch.testing.assert_close(
        frequencies(logits, temperature=0.5), (2 * logits).softmax(-1), rtol=0, atol=0.015
    )


def test_top_k_and_top_p():
    logits = torch.tensor([0.5, 0.1, 0.25, 0.15]).log()
    assert frequencies(logits, top_k=2).nonzero().flatten().tolist() == [0, 2]
    assert frequencies(logits, top_p=0.7).nonzero().flatten().tolist() == [0, 2]
    assert frequencies(logits, top_p=0.76).nonzero().flatten().tolist() == [0, 2, 3]
    assert frequencies(logits, top_p=0.01).nonzero().flatten().tolist() == [0]
    assert frequencies(logits, top_k=99, top_p=1.0).nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert sample(torch.randn(3, VOCAB), temperature=0).shape == (3,)


def test_new_tokens_attend_to_the_same_part_of_a_prefix_as_the_last_prompt_token():
    model, tokens = make("prefix"), prompt("prefix")
    mask = torch.ones(2, 11, FEATURES, dtype=torch.bool)
    mask[:, -1, 1:] = False
    given = {"encoder_input": inputs(), "encoder_mask": mask}
    got = generate(model, tokens, **given, max_new_tokens=9, temperature=0)
    assert torch.equal(got, without_caches(model, tokens, 9, **given))
    for _ in range(9):  # attending to all of it would give other tokens
        with torch.no_grad():
            logits = model(tokens, encoder_input=inputs(), encoder_mask=mask)
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones(2, 1, FEATURES, dtype=torch.bool)], dim=1)
    assert not torch.equal(got, tokens)


@pytest.mark.parametrize("case", ["one of two inputs", "one of two masks", "two shapes of mask", "none"])
def test_masks_by_name_in_every_form_that_the_model_takes(case):
    encoders = {"a": TinyEncoder(), "b": TinyEncoder(seed=4)}
    model = open_gates(fuse(tiny_decoder(), encoders, every=1)).eval()
    rows, positions = torch.rand(2, FEATURES) < 0.5, torch.rand(2, 11, FEATURES) < 0.5
    both = {"a": inputs(), "b": inputs(seed=7)}
    inputs_, mask = {
        "one of two inputs": ({"a": inputs()}, {"a": rows}),
        "one of two masks": (both, {"a": positions}),
        "two shapes of mask": (both, {"a": rows, "b": positions}),
        "none": (both, {"a": positions, "b": None}),
    }[case]
    tokens = text(2, 11)
    got = generate(
        model, tokens, encoder_input=inputs_, encoder_mask=mask, max_new_tokens=5, temperature=0
    )
    for _ in range(5):
        with torch.no_grad():
            logits = model(tokens, encoder_input=inputs_, encoder_mask=mask)
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        mask = {
            name: m if m is None or m.dim() == 2 else torch.cat([m, m[:, -1:]], dim=1)
            for name, m in mask.items()
        }
    assert torch.equal(got, tokens)


def test_a_token_that_features_replace_is_never_generated():
    model = fuse(tiny_decoder(), TinyEncoder(), arch="joint_decoder", encoder_token=5)
    tokens = text(2, 11).masked_fill(text(2, 11) == 5, 6)
    tokens[:, 1 : 1 + FEATURES] = 5
    generator = torch.Generator().manual_seed(0)
    got = generate(
        model, tokens, encoder_input=inputs(), max_new_tokens=40, temperature=9.0, generator=generator
    )
    new = got[:, 11:]
    assert not (new == 5).any()
    assert len(new.unique()) > VOCAB - 6  # at this temperature nearly all others are


def test_chunked_output_and_hidden_states_change_nothing():
    model, tokens = make("cross_attention"), prompt("cross_attention")
    given = {"encoder_input": inputs(), "max_new_tokens": 6, "temperature": 0}
    expected = generate(model, tokens, **given)
    model.set_num_output_chunks(4)
    assert torch.equal(generate(model, tokens, **given), expected)
    model.output_hidden_states = [1]
    assert torch.equal(generate(model, tokens, **given), expected)


@pytest.mark.parametrize("name", ARCHS)
def test_under_autocast(name):
    model, tokens = make(name), prompt(name)
    with torch.autocast("cpu", torch.bfloat16):
        got = generate(model, tokens, encoder_input=inputs(), max_new_tokens=4, temperature=0)
    assert got.shape == (2, 15)
