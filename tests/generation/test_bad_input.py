"""Errors are raised before any work: no encoder runs, no cache is set up or written to."""

import pytest
import torch
from generation import models
from generation.models import ARCHS, GREEDY, prompt
from support import FEATURES, IMAGE, VOCAB, TinyEncoder, inputs, text

from torchfuse import generate
from torchfuse.errors import ConfigError, ModelError
from torchfuse.generation import Session
from torchfuse.generation.sampling import Sampling

LONGEST = 53  # what the model holds
ROOM = 31  # what a session's caches hold


class CountingEncoder(TinyEncoder):
    """Counts its calls."""

    ran = 0

    def forward(self, x):
        self.ran += 1
        return super().forward(x)


def make(name):
    return models.make(name, CountingEncoder(), max_seq_len=LONGEST)


# -- generate -----------------------------------------------------------------------------------------

BAD_CALLS = {
    "no new tokens": ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    "temperature": ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
    "top_k": ({"top_k": 0}, "top_k must be at least 1, got 0"),
    "penalty": ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0, got 0.0"),
    "pad": (
        {"pad_id": VOCAB},
        rf"pad_id \[{VOCAB}\] must lie in \[0, {VOCAB}\), the ids that the model",
    ),
    "negative pad": ({"pad_id": -1}, rf"pad_id \[-1\] must lie in \[0, {VOCAB}\)"),
    "token": ({"last": VOCAB + 1}, rf"tokens \[{VOCAB + 1}\] must lie in \[0, {VOCAB}\)"),
    "negative token": ({"last": -2}, r"tokens \[-2\] must lie in"),
    "top_p": ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
    "stop token": ({"stop_tokens": [VOCAB]}, rf"stop_tokens \[{VOCAB}\] must lie in \[0, {VOCAB}\)"),
    "negative stop token": ({"stop_tokens": [[3], [-1]]}, r"stop_tokens \[-1\] must lie in"),
    "prompt": ({"length": LONGEST}, rf"{LONGEST} prompt tokens.* 3 new ones are more than"),
    "new tokens": ({"max_new_tokens": LONGEST}, rf"11 prompt tokens.* {LONGEST} new ones are more than"),
    "several": (
        {"top_p": 1.5, "stop_tokens": [VOCAB], "top_k": 0, "pad_id": 99},
        "top_k must.*top_p must.*stop_tokens.*pad_id",
    ),
}


@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("problem", BAD_CALLS)
@pytest.mark.parametrize("name", ARCHS)
def test_a_bad_call_encodes_nothing(name, problem, compile_it):
    model, (call, complaint) = make(name), BAD_CALLS[problem]
    call = {"max_new_tokens": 3, "length": 11, "compile": compile_it} | call
    tokens = prompt(name, length=call.pop("length"))
    tokens[:, -1] = call.pop("last", 1)
    kind = ModelError if problem in ("prompt", "new tokens") else ConfigError
    with pytest.raises(kind, match=complaint):
        generate(model, tokens, encoder_input=inputs(), **call)
    assert model.encoder.ran == 0
    assert not model.caches_are_setup()


def test_padding_cannot_be_a_token_that_features_replace():
    model = make("placeholder")
    with pytest.raises(ValueError, match=rf"pad_id \[{IMAGE}\] cannot be text: in this model features"):
        generate(model, prompt("placeholder"), max_new_tokens=3, pad_id=IMAGE)
    assert model.encoder.ran == 0


@pytest.mark.parametrize("pad_id", [-1, VOCAB])
def test_a_session_whose_padding_the_model_does_not_embed_sets_up_nothing(pad_id):
    model = make("cross_attention")
    with pytest.raises(ConfigError, match=rf"Session: pad_id \[{pad_id}\] must lie in \[0, {VOCAB}\)"):
        Session(model, batch_size=2, max_tokens=ROOM, pad_id=pad_id)
    assert not model.caches_are_setup()


@pytest.mark.parametrize("given", [FEATURES - 2, FEATURES + 2])
def test_images_and_their_tokens_differ_in_number(given):
    """The number of features is known once the encoder has run; the decoder has not run then."""
    model, ran = make("placeholder"), []
    model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match=rf"row 0 has {FEATURES} tokens and {given} features"):
        generate(model, prompt("placeholder"), encoder_input=inputs(num=given), max_new_tokens=3)
    assert ran == []
    assert not model.caches_are_setup()


def test_a_mask_that_hides_features_of_image_tokens_is_refused_before_the_encoder_runs():
    """The features of a row are known from its mask."""
    model = make("placeholder")
    mask = torch.arange(FEATURES) < torch.tensor([[FEATURES - 1], [FEATURES]])
    with pytest.raises(ValueError, match=f"row 0 has {FEATURES} tokens and {FEATURES - 1} features"):
        generate(
            model, prompt("placeholder"), encoder_input=inputs(), encoder_mask=mask, max_new_tokens=3
        )
    assert model.encoder.ran == 0
    assert not model.caches_are_setup()


def test_a_prompt_that_fits_only_without_its_features_sets_up_nothing():
    model = make("prefix")
    with pytest.raises(ValueError, match=rf"{FEATURES} encoder tokens and 3 new ones are more than"):
        generate(model, prompt("prefix", length=LONGEST - 5), encoder_input=inputs(), max_new_tokens=3)
    assert not model.caches_are_setup()


# -- a turn of a session ------------------------------------------------------------------------------

BAD_TURNS = {
    "top_p": ({"sampling": Sampling(top_p=1.5)}, r"top_p must lie in \(0, 1\], got 1.5"),
    "stop token": ({"stop_tokens": [VOCAB]}, rf"stop_tokens \[{VOCAB}\] must lie in \[0, {VOCAB}\)"),
    "stop tokens by row": ({"stop_tokens": [[1]] * 3}, "stop_tokens by row must be 2 lists"),
    "prompt": ({"length": ROOM}, "room for .* more tokens of text"),
    "token": ({"last": VOCAB}, rf"tokens \[{VOCAB}\] must lie in"),
    "no new tokens": ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    "scores": ({"scores": "everything"}, 'scores must be "logits" or "log_probs"'),
    "generators": ({"generator": [torch.Generator()]}, "generators by row must be 2, got 1"),
}


def answer_after(model, name, turn):
    """Run a first turn, ``turn``, and a last one whose answer depends on the tokens of all."""
    sampling = Sampling(temperature=0, repetition_penalty=1.3)
    options = {"max_new_tokens": 4, "sampling": sampling, "scores": "logits"}
    embeds = model.encode(inputs())
    options_of_session = {"batch_size": 2, "max_tokens": ROOM, "max_features": FEATURES}
    with Session(model, **options_of_session) as session:
        session.answer(prompt(name), encoder_embeds=embeds, **options)
        turn(session, sampling)
        return session.answer(text(2, 5, seed=8), **options)


def is_refused(model, complaint, tokens, **call):
    def turn(session, sampling):
        before = [buffer.clone() for buffer in model.buffers()]
        length, state = session.length, model.cache_state
        with pytest.raises(ValueError, match=complaint):
            session.answer(tokens, **{"max_new_tokens": 3, "sampling": sampling} | call)
        assert session.length == length and model.cache_state is state
        assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))

    return turn


def check_that_nothing_changes(model, name, turn):
    got, expected = answer_after(model, name, turn), answer_after(model, name, lambda *_: None)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("problem", BAD_TURNS)
@pytest.mark.parametrize("name", ARCHS)
def test_a_bad_turn_leaves_the_session_unchanged(name, problem):
    model, (call, complaint) = make(name), dict(BAD_TURNS)[problem]
    call = {"length": 5} | call
    tokens = text(2, call.pop("length"), seed=7)
    tokens[:, -1] = call.pop("last", 1)
    check_that_nothing_changes(model, name, is_refused(model, complaint, tokens, **call))


@pytest.mark.parametrize(
    ("name", "features", "rows", "complaint"),
    [
        ("cross_attention", FEATURES + 2, 2, rf"{FEATURES} encoder tokens.*, got {FEATURES + 2}"),
        ("cross_attention", FEATURES, 3, "features .* have 3 rows, the tokens 2"),
        ("placeholder", FEATURES - 2, 2, rf"row 0 has {FEATURES} tokens and 5 features"),
        ("prefix", FEATURES, 2, "a prefix can only be its start"),
    ],
    ids=["too many", "other rows", "fewer than tokens", "behind text"],
)
def test_features_that_do_not_fit_leave_the_session_unchanged(name, features, rows, complaint):
    model = make(name)
    embeds = model.encode(inputs(rows, features, seed=6))
    turn = is_refused(model, complaint, prompt(name, length=9), encoder_embeds=embeds)
    check_that_nothing_changes(model, name, turn)


@pytest.mark.parametrize("name", ["cross_attention", "placeholder"])
def test_a_mask_that_does_not_fit_leaves_the_session_unchanged(name):
    model = make(name)
    given = {"encoder_embeds": model.encode(inputs(seed=6))}
    given["encoder_mask"] = torch.ones(2, FEATURES + 1, dtype=torch.bool)
    turn = is_refused(
        model, rf"encoder_mask covers {FEATURES + 1} features", prompt(name, length=9), **given
    )
    check_that_nothing_changes(model, name, turn)


@pytest.mark.parametrize("name", ["cross_attention", "prefix"])
def test_more_features_than_a_session_has_room_for(name):
    model = make(name)
    embeds = [model.encode(inputs(num=num)) for num in (FEATURES, FEATURES + 2)]
    options = {"max_new_tokens": 4, "sampling": GREEDY, "scores": "logits"}
    answers = []
    for interrupted in (True, False):
        with Session(model, batch_size=2, max_tokens=ROOM, max_features=FEATURES) as session:
            if interrupted:
                with pytest.raises(
                    ValueError, match=rf"{FEATURES} encoder tokens.*, got {FEATURES + 2}"
                ):
                    session.answer(text(2, 9), encoder_embeds=embeds[1], **options)
                assert session.length == 0 and model.cache_state is None
            answers.append(session.answer(prompt(name), encoder_embeds=embeds[0], **options))
    assert torch.equal(answers[0][1], answers[1][1])


def test_the_model_refuses_more_features_than_its_caches_hold_before_any_layer_runs():
    model, ran = make("cross_attention"), []
    model.setup_caches(2, torch.float32, encoder_max_seq_len=FEATURES, decoder_max_seq_len=ROOM)
    model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    mask = torch.ones(2, 5, ROOM, dtype=torch.bool)
    with pytest.raises(ValueError, match=rf"up to {FEATURES} encoder tokens, got {FEATURES + 2}"):
        model(
            text(2, 5),
            mask=mask,
            input_pos=torch.arange(5),
            encoder_embeds=model.encode(inputs(num=FEATURES + 2)),
        )
    assert ran == [] and model.cache_state is None
