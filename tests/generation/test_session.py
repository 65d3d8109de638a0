import pytest
import torch
from generation.models import ARCHS, GREEDY, make, prompt
from support import FEATURES, VOCAB, inputs, text
from transformers import RepetitionPenaltyLogitsProcessor

from torchfuse import generate
from torchfuse.generation import Session, sample


def first_turn(name):
    tokens = prompt(name)
    if name == "placeholder":
        tokens[0] = tokens[1]
    else:
        tokens[0, :2] = 0  # a shorter prompt
    return tokens


@torch.no_grad()
def without_caches(model, turns, steps, embeds):
    """All turns again at every step, row by row and without padding."""
    rows = []
    for row in range(2):
        sequence, answers = torch.zeros(1, 0, dtype=torch.long), []
        for turn in turns:
            prompt = turn[row : row + 1]
            sequence = torch.cat([sequence, prompt[:, (prompt[0] != 0).nonzero()[0, 0] :]], dim=1)
            new = []
            for _ in range(steps):
                logits = model(sequence, encoder_embeds=embeds[row : row + 1])
                new.append(logits[:, -1].argmax(-1))
                sequence = torch.cat([sequence, new[-1][None]], dim=1)
            answers.append(torch.stack(new, dim=1))
        rows.append(answers)
    return [torch.cat([rows[row][turn] for row in range(2)]) for turn in range(len(turns))]


@pytest.mark.parametrize("name", ARCHS)
def test_a_second_turn_follows_the_first_and_encodes_nothing(name):
    model = make(name)
    embeds = model.encode(inputs())
    turns = [first_turn(name), text(2, 5, seed=9)]
    turns[1][1, 0] = 0
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    with Session(model, batch_size=2, max_tokens=40, max_features=FEATURES) as session:
        one, _ = session.answer(turns[0], max_new_tokens=6, encoder_embeds=embeds, sampling=GREEDY)
        two, _ = session.answer(turns[1], max_new_tokens=6, sampling=GREEDY)
        assert session.length == 11 + 5 + 1 + 5 + 5
    assert calls == []
    assert not model.caches_are_setup()
    expected = without_caches(model, turns, 6, embeds)
    assert torch.equal(one, expected[0])
    assert torch.equal(two, expected[1])


@pytest.mark.parametrize("name", ARCHS)
def test_a_row_that_stopped_early_continues_as_if_alone(name):
    model = make(name)
    embeds, prompt = model.encode(inputs()), first_turn(name)
    with Session(model, batch_size=2, max_tokens=40, max_features=FEATURES) as session:
        free, _ = session.answer(prompt, max_new_tokens=8, encoder_embeds=embeds, sampling=GREEDY)
    stops = [[int(free[0, 2])], []]
    second = text(2, 4, seed=11)
    alone = []
    for row in range(2):
        with Session(model, batch_size=1, max_tokens=40, max_features=FEATURES) as session:
            at = slice(row, row + 1)
            given = {"encoder_embeds": embeds[at], "sampling": GREEDY, "stop_tokens": [stops[row]]}
            one, _ = session.answer(prompt[at], max_new_tokens=8, **given)
            two, _ = session.answer(second[at], max_new_tokens=5, sampling=GREEDY)
            alone.append((one, two))
    with Session(model, batch_size=2, max_tokens=40, max_features=FEATURES) as session:
        given = {"encoder_embeds": embeds, "sampling": GREEDY, "stop_tokens": stops}
        one, _ = session.answer(prompt, max_new_tokens=8, **given)
        two, _ = session.answer(second, max_new_tokens=5, sampling=GREEDY)
    for row in range(2):
        length = alone[row][0].shape[1]
        assert torch.equal(one[row, :length], alone[row][0][0])
        assert (one[row, length:] == 0).all()
        assert torch.equal(two[row], alone[row][1][0])


def test_log_probabilities_on_request():
    model = make("prefix")
    options = {"encoder_input": inputs(), "max_new_tokens": 5, "temperature": 0}
    _, logits = generate(model, text(2, 7), **options, scores="logits")
    sequence, scores = generate(model, text(2, 7), **options, scores="log_probs")
    assert scores.shape == (2, 5, VOCAB)
    torch.testing.assert_close(scores, logits.log_softmax(-1))
    assert torch.equal(scores.argmax(-1), sequence[:, 7:])


def test_encoder_embeds_equal_encoder_input():
    model = make("cross_attention")
    options = {"max_new_tokens": 5, "temperature": 0}
    embeds = model.encode(inputs())
    one = generate(model, text(2, 7), encoder_input=inputs(), **options)
    assert torch.equal(generate(model, text(2, 7), encoder_embeds=embeds, **options), one)
    with pytest.raises(ValueError, match="encoder_input or encoder_embeds, not both"):
        generate(model, text(2, 7), encoder_input=inputs(), encoder_embeds=embeds, **options)


def test_rows_may_have_stop_tokens_of_their_own():
    model, prompt = make("prefix"), text(2, 7)
    options = {"encoder_input": inputs(), "max_new_tokens": 9, "temperature": 0}
    free = generate(model, prompt, **options)[:, 7:]
    stops = [[int(free[0, 3])], [int(free[1, 1])]]
    stopped = generate(model, prompt, **options, stop_tokens=stops)[:, 7:]
    for row, ids in enumerate(stops):
        first = int((free[row] == ids[0]).nonzero()[0, 0])
        assert torch.equal(stopped[row, : first + 1], free[row, : first + 1])
        assert (stopped[row, first + 1 :] == 0).all()
    with pytest.raises(ValueError, match="stop_tokens by row must be 2 lists"):
        generate(model, prompt, **options, stop_tokens=[[1], [2], [3]])


@pytest.mark.parametrize("penalty", [1.7, 0.6])
def test_repetition_penalty_is_transformers(penalty):
    logits, held = torch.randn(3, VOCAB), torch.randint(0, VOCAB, (3, 5))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(held, logits.clone()).argmax(-1)
    seen = torch.zeros(3, VOCAB, dtype=torch.bool).scatter(1, held, True)
    chosen = sample(logits, temperature=0, repetition_penalty=penalty, seen=seen)
    assert torch.equal(chosen, expected)


@torch.no_grad()
def test_a_strong_penalty_prevents_all_repetition():
    model, prompt = make("placeholder"), first_turn("placeholder")
    sequence = generate(
        model, prompt, encoder_input=inputs(), max_new_tokens=12, temperature=0, repetition_penalty=1e9
    )
    held = prompt.shape[1]
    for row in sequence.tolist():
        new = row[held:]
        assert len(set(new)) == len(new)
        assert not set(new) & set(row[:held])


def test_what_does_not_fit_into_the_session_is_named_and_changes_nothing():
    model = make("cross_attention")
    with Session(model, batch_size=2, max_tokens=20) as session:
        session.answer(text(2, 6), max_new_tokens=4, sampling=GREEDY)
        before = [buffer.clone() for buffer in model.buffers()]
        with pytest.raises(ValueError, match=r"room for 11 more tokens of text, got 2 rows of 8 and 4"):
            session.answer(text(2, 8), max_new_tokens=4, sampling=GREEDY)
        with pytest.raises(ValueError, match="has 2 rows"):
            session.answer(text(3, 2), max_new_tokens=1, sampling=GREEDY)
        assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
        session.answer(text(2, 7), max_new_tokens=4, sampling=GREEDY)
        with pytest.raises(ValueError, match="the caches hold a sequence already"):
            Session(model, batch_size=2, max_tokens=20)
    with pytest.raises(ValueError, match="98 tokens of text and 0 encoder tokens are more than"):
        Session(model, batch_size=2, max_tokens=98)


def test_a_turn_that_the_model_refuses_changes_nothing():
    model = make("placeholder")
    embeds, prompt, again = model.encode(inputs()), first_turn("placeholder"), text(2, 4, seed=9)

    def last_answer(interrupted):
        with Session(model, batch_size=2, max_tokens=40, max_features=FEATURES) as session:
            session.answer(prompt, max_new_tokens=5, encoder_embeds=embeds, sampling=GREEDY)
            if interrupted:
                with pytest.raises(ValueError, match="every token 41 needs one feature"):
                    session.answer(prompt, max_new_tokens=5, sampling=GREEDY)
            return session.answer(again, max_new_tokens=5, sampling=GREEDY)[0]

    assert torch.equal(last_answer(interrupted=True), last_answer(interrupted=False))


def test_caches_keep_their_addresses_and_are_in_no_state_dict():
    model = make("cross_attention")
    keys = list(model.state_dict())
    with Session(model, batch_size=2, max_tokens=30, max_features=FEATURES) as session:
        places = [buffer.data_ptr() for buffer in model.buffers()]
        embeds = model.encode(inputs())
        for _ in range(2):
            session.answer(text(2, 5), max_new_tokens=4, encoder_embeds=embeds, sampling=GREEDY)
        assert [buffer.data_ptr() for buffer in model.buffers()] == places
        assert list(model.state_dict()) == keys


@pytest.mark.parametrize("name", ARCHS)
def test_the_models_own_caches_are_used_and_emptied(name):
    model = make(name)
    prompt, given = first_turn(name), {"encoder_input": inputs()}
    options = {"max_new_tokens": 6, "temperature": 0}
    fresh = generate(model, prompt, **given, **options)
    model.setup_caches(2, torch.float32, encoder_max_seq_len=13, decoder_max_seq_len=47)
    places = [buffer.data_ptr() for buffer in model.buffers()]
    for _ in range(2):
        assert torch.equal(generate(model, prompt, **given, **options), fresh)
        assert [buffer.data_ptr() for buffer in model.buffers()] == places
    with Session(model, batch_size=2, max_tokens=30, max_features=FEATURES) as session:
        embeds = model.encode(inputs())
        for _ in range(2):
            new, _ = session.answer(prompt, max_new_tokens=6, encoder_embeds=embeds, sampling=GREEDY)
            assert torch.equal(new, fresh[:, prompt.shape[1] :])
            session.reset()
            assert session.length == 0
    assert model.caches_are_setup()


def test_caches_that_do_not_fit_are_named_and_unchanged():
    model = make("cross_attention")
    model.setup_caches(2, torch.float32, encoder_max_seq_len=5, decoder_max_seq_len=19)
    before = [buffer.clone() for buffer in model.buffers()]
    ran = []
    model.encoder.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match="17 new ones.*decoder_max_seq_len of the caches of 19"):
        generate(model, text(2, 6), encoder_input=inputs(), max_new_tokens=17)
    assert ran == []
    with pytest.raises(ValueError, match="hold 2 rows, not 3; the caches hold 5 encoder tokens, not 7"):
        Session(model, batch_size=3, max_tokens=11, max_features=7)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_padding_to_a_bucket_leaves_room_for_the_answer():
    model = make("cross_attention")
    with Session(model, batch_size=2, max_tokens=40, compile=True) as session:
        assert session._padding(text(2, 20), 4) == 12  # a bucket of 32
        assert session._padding(text(2, 20), 16) == 5  # all that the answer leaves
        assert session._padding(text(2, 20), 21) == 0
