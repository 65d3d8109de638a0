import pytest
import torch
from prompt_settings import (
    LAYOUTS,
    MARK,
    PER_IMAGE,
    images,
    make_settings,
    model_for,
    transform,
)

from torchfuse import generate
from torchfuse.data import ChatTemplate, GridImageTransform, Message, Sample, padded_collate_images
from torchfuse.data.templates import text_template
from torchfuse.generation import session
from torchfuse.generation.sampling import Sampling
from torchfuse.tasks.chat import HELP, chat
from torchfuse.tasks.conversation import Conversation
from torchfuse.tasks.prompt_settings import required_slots
from torchfuse.tasks.prompts import user_message
from torchfuse.tasks.report import Report
from torchfuse.tasks.text_stream import TextStream

WORDS = """
{%- for message in messages %}
    {{- 'w13 ' + message.role.replace('system', 'w14').replace('user', 'w15').replace('assistant', 'w16') }}
    {%- if message.role == 'assistant' %}
        {{- ' w17 ' }}{% generation %}{{ message.content }} <eos>{% endgeneration %}{{ ' w18 ' }}
    {%- else %}
        {{- ' w17 ' + message.content + ' w19 ' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'w13 w16 w17 ' }}
{%- endif %}
"""  # with a header of each message, an end of each turn, and a word between turns
CHANGING = """
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- ' w17 ' }}{% generation %}{{ message.content if loop.last else 'w20' }} <eos>{% endgeneration %}
    {%- else %}
        {{- ' w15 ' + message.content + ' w19 ' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- ' w17 ' }}
{%- endif %}
"""  # earlier answers are left out, as thoughts are in Qwen3
TEMPLATES = {
    "plain": "plain",
    "changing": ChatTemplate(CHANGING, name="changing"),
    "texts": text_template("{text} w15 ", "w16 {text} w17"),
    "chat": ChatTemplate(WORDS, name="words"),
}


def turns(folder, layout):
    """Two images, none, a new one and an old one, none; only in the first turn for a prefix."""
    a, b, c = images(folder).values()
    questions = [
        user_message("w4 <image> w5 <image> w6", (a, b)),
        user_message("w7 w8 w9"),
        user_message("<image> w10 <image> w11", (c, a)),
        user_message("w12"),
    ]
    return [questions[0], questions[1], questions[3]] if layout == "prefix" else questions


def without_images(questions):
    return [Message("user", [part for part in q.content if isinstance(part, str)]) for q in questions]


def from_scratch(model, settings, questions, system=None):
    """Each turn as one prompt with all turns before it, all its images encoded again."""
    return _from_scratch(model, settings, questions, system)[:2]


def _from_scratch(model, settings, questions, system):
    """Also the logits of the first token of each answer, without caches."""
    messages = [] if system is None else [Message("system", [system])]
    tokens, answers, logits = [], [], []
    for question in questions:
        messages.append(question)
        sample = settings.transform(Sample(messages), with_answer=False)
        batch = padded_collate_images([sample])
        tokens = batch.pop("tokens")
        logits.append(model(tokens, **batch)[0, -1])
        got = generate(
            model,
            tokens,
            **batch,
            max_new_tokens=settings.max_new_tokens,
            stop_tokens=settings.stops,
            **vars(settings.sampling),
        )
        answer = settings.until_stop(got[0, tokens.shape[1] :].tolist())
        tokens = tokens[0].tolist() + answer
        answers.append(settings.text(answer))
        messages.append(Message("assistant", [answers[-1]]))
    return tokens, answers, logits


def record_logits(monkeypatch):
    """A list of the logits of the first token of each answer of a session."""
    logits, answer = [], session.Session.answer

    def recorded(*args, **options):
        new, scores = answer(*args, **options, scores="logits")
        logits.append(scores[0, 0])
        return new, None

    monkeypatch.setattr(session.Session, "answer", recorded)
    return logits


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("system", [None, "w13 w14"], ids=["alone", "system"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_turn_equals_the_whole_conversation_from_scratch(
    tmp_path, layout, system, template, monkeypatch
):
    model, questions = model_for(layout), turns(tmp_path, layout)
    made = transform(tmp_path, layout, template=TEMPLATES[template])
    settings = make_settings(tmp_path, layout, made)
    *expected, expected_logits = _from_scratch(model, settings, questions, system)
    *_, blind = _from_scratch(model, settings, without_images(questions), system)
    assert (blind[0] - expected_logits[0]).abs().max() > 1e-3
    model.encoder.seen = 0
    report, logits = Report(), record_logits(monkeypatch)
    options = {"max_tokens": 97, "max_images": 5, "system": system, "report": report}
    if layout == "prefix":
        options |= {"max_tokens": 80, "max_images": 2}
    with Conversation(model, settings, **options) as conversation:
        answers = [conversation.ask(question) for question in questions]
        assert [conversation.tokens, answers] == expected
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-4)
    num = 2 if layout == "prefix" else 3  # the repeated image is encoded once
    assert model.encoder.seen == report.images == num
    assert not model.caches_are_setup()


@pytest.mark.parametrize("layout", ["last", "all", "placeholder"])
def test_images_in_any_number_of_tiles(tmp_path, layout):
    """A grid of two tiles, one of four, each beside the whole image; and the first one again."""
    model = model_for(layout, max_seq_len=149)
    grid = GridImageTransform(8, resolutions=[(8, 16), (16, 16)])
    made = transform(tmp_path, layout, template="plain", image_transform=grid)
    settings = make_settings(tmp_path, layout, made)
    square = images(tmp_path, 16, 16)["b"].rename(tmp_path / "square.png")
    wide = images(tmp_path, 8, 16)["a"]
    questions = [
        user_message("w4 <image> w5", (wide,)),
        user_message("<image> w7 <image>", (square, wide)),
        user_message("w12"),
    ]
    expected = from_scratch(model, settings, questions)
    model.encoder.seen = 0
    with Conversation(model, settings, max_tokens=97, max_images=11) as conversation:
        answers = [conversation.ask(question) for question in questions]
        assert (conversation.tokens, answers) == expected
        assert model.encoder.seen == 3 + 5
        with pytest.raises(ValueError, match="would be 14 images, and there is room for 11"):
            conversation.ask(questions[0])


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_turns_follow_the_stop_token_of_the_last_answer(tmp_path, template):
    model, questions = model_for("all"), turns(tmp_path, "all")
    made = transform(tmp_path, "all", template=TEMPLATES[template])
    free = from_scratch(model, make_settings(tmp_path, "all", made), questions[:1])[1][0].split()
    eos = 2
    with torch.no_grad():  # the end takes the place of the third word
        head = model.output.weight
        head[eos] = head[int(free[2][1:])] * 1.01
    settings = make_settings(tmp_path, "all", made, stop_tokens=None)
    expected = from_scratch(model, settings, questions)
    with Conversation(model, settings, max_tokens=97, max_images=4) as conversation:
        assert [conversation.ask(question) for question in questions] == expected[1]
        assert conversation.tokens == expected[0]
    assert expected[1][0].split() == free[: free.index(free[2])]
    # One end for each answer, whether generated or added to one that was cut short; none for the last.
    last = expected[0][-1] == eos
    assert expected[0].count(eos) == len(questions) - 1 + last


@pytest.mark.parametrize("layout", ["all", "placeholder"])
def test_a_conversation_after_reset_equals_the_first(tmp_path, layout):
    model, questions = model_for(layout), turns(tmp_path, layout)
    settings = make_settings(tmp_path, layout, sampling=Sampling(temperature=1.5), seed=3)
    with Conversation(model, settings, max_tokens=80, max_images=4) as conversation:
        first = [conversation.ask(question) for question in questions]
        for index, same in ((0, True), (1, False)):
            conversation.reset(index=index)
            assert ([conversation.ask(question) for question in questions] == first) is same


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_turn_that_does_not_fit_changes_nothing(tmp_path, layout):
    model, questions = model_for(layout), turns(tmp_path, layout)
    settings, picture = make_settings(tmp_path, layout), images(tmp_path)["a"]
    with Conversation(model, settings, max_tokens=40, max_images=3) as conversation:
        first = conversation.ask(questions[0])
        before = (list(conversation.tokens), list(conversation.messages))
        seen = model.encoder.seen
        with pytest.raises(
            ValueError, match=r"fit any more: \d+ tokens and an answer of up to 5 do not"
        ):
            conversation.ask(user_message("w4 " * 33))
        two = user_message("w4", (picture, picture))
        reason = "only the first turn can have any" if layout == "prefix" else "would be 4 images"
        with pytest.raises(ValueError, match=reason):
            conversation.ask(two)
        assert (conversation.tokens, conversation.messages) == before
        assert model.encoder.seen == seen
        second = conversation.ask(questions[1])
    assert [first, second] == from_scratch(model, settings, questions[:2])[1]


def test_an_error_in_the_middle_resets(tmp_path):
    model, questions = model_for("all"), turns(tmp_path, "all")
    settings = make_settings(tmp_path, "all")

    def fails(text):
        raise KeyboardInterrupt

    with Conversation(model, settings, max_tokens=80, max_images=4) as conversation:
        first = conversation.ask(questions[0])
        with pytest.raises(KeyboardInterrupt, match="^$"):
            conversation.ask(questions[1], stream=fails)
        assert conversation.tokens == []
        assert conversation.ask(questions[0]) == first


def test_the_pieces_of_a_stream_are_the_answer(tmp_path):
    model, questions = model_for("all"), turns(tmp_path, "all")
    with Conversation(
        model, make_settings(tmp_path, "all"), max_tokens=80, max_images=4
    ) as conversation:
        for question in questions:
            pieces = []
            answer = conversation.ask(question, stream=pieces.append)
            assert "".join(pieces) == answer
            assert len(pieces) == len(answer.split())


def test_a_stream_splits_neither_words_nor_characters():
    text = "naïve 猫🐈 né"
    pieces = []
    stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"), pieces.append)
    for byte in text.encode():
        stream.put(byte)
    stream.end()
    assert pieces == list(text)
    half = []
    stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"), half.append)
    for byte in "né".encode()[:-1]:
        stream.put(byte)
    stream.end()
    assert half == ["n", "\ufffd"]


def test_a_stream_whose_text_changes_is_written_again():
    texts = ["", "do", "do not", "don't", "don't !"]
    pieces = []
    stream = TextStream(lambda ids: texts[len(ids)], pieces.append)
    for token in range(4):
        stream.put(token)
    stream.end()
    assert pieces == ["do", " not", "\n", "don't !"]


def test_chat(tmp_path):
    model, pictures = model_for("all"), images(tmp_path)
    settings, shown = make_settings(tmp_path, "all"), []
    (tmp_path / "broken.png").write_text("no image")
    typed = f"""
        /image {pictures["a"]}
        /image '{pictures["b"]}'
        /image {tmp_path}/none.png
        /image {tmp_path}/broken.png
        /image
        w4 <image> w5
        w4 <image> w5 <image> w6
        /what w5
        w7 w8 w9
        {"w4 " * 90}
        w12
        /reset
        w12
        /quit
        w13
    """.splitlines()
    report = Report()
    with Conversation(model, settings, max_tokens=60, max_images=2, report=report) as conversation:
        chat(conversation, typed, shown.append)
    questions = [
        user_message("w4 <image> w5 <image> w6", (pictures["a"], pictures["b"])),
        user_message("w7 w8 w9"),
        user_message("w12"),
    ]
    answers = (
        from_scratch(model, settings, questions)[1] + from_scratch(model, settings, questions[2:])[1]
    )
    lines = "".join(shown).splitlines()
    assert lines[:2] == [f"[{name}.png comes with the next question]" for name in "ab"]
    assert "none.png cannot be opened" in lines[2]
    assert "broken.png is no image" in lines[3]
    assert lines[4] == "[/image needs the path of an image]"
    assert "has <image> 1 times, but there are 2 images; /image adds one" in lines[5]
    assert lines[6] == answers[0]
    assert lines[7] == f"[/what is no command. {HELP}]"
    assert lines[8] == answers[1]
    assert "[This turn does not fit any more: 91 tokens" in lines[9]
    assert lines[10:] == [answers[2], "[a new conversation]", answers[3]]
    assert report.images == 2


def test_settings_that_do_not_fit_the_model_are_named(tmp_path):
    settings = make_settings(tmp_path, "all", stop_tokens=(-1, 999), max_new_tokens=0)
    settings = type(settings)(**vars(settings) | {"sampling": Sampling(temperature=-1)})
    text = "; ".join(settings.problems(model_for("all")))
    for problem in (
        "temperature must be at least 0, got -1",
        "max_new_tokens must be at least 1, got 0",
        f"stop_tokens [-1, 999] must lie in [0, {MARK}), what the head scores",
    ):
        assert problem in text
    assert make_settings(tmp_path, "all").problems(model_for("all")) == []


@pytest.mark.parametrize(
    ("layout", "model", "problem"),
    [
        ("all", "prefix", rf"image_token must be null \(layout prefix\) for this model, got {MARK}"),
        ("prefix", "all", "image_token must be an id that marks images for this model, got None"),
        ("prefix", "placeholder", "image_token must be an id that marks images"),
    ],
)
def test_a_transform_of_another_model_is_named(tmp_path, layout, model, problem):
    (found,) = make_settings(tmp_path, layout).problems(model_for(model))
    with pytest.raises(ValueError, match=problem):
        raise ValueError(found)


def test_tokens_and_features_of_another_model_are_named(tmp_path):
    settings = make_settings(tmp_path, "all")
    settings.transform.image_token, settings.transform.features_per_image = MARK + 3, PER_IMAGE + 1
    problems = settings.problems(model_for("all"))
    assert problems == [
        f"image_token is {MARK + 3}, but the model embeds the ids below {MARK + 1}; fusion_vocab_size=1 "
        "adds a row for it",
        "features_per_image is 3, but 'encoder' makes 2 of an image",
    ]
    assert settings.problems(model_for("placeholder"))[0] == (
        f"image_token is {MARK + 3}, but in this model features replace ({MARK},)"
    )


def test_ids_of_another_tokenizer_are_named(tmp_path):
    settings = make_settings(tmp_path, "all")
    tokenizer = settings.transform.tokenizer
    tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id = MARK + 1, (2, MARK + 2), -1
    settings.transform.image_token = -3
    assert settings.problems(model_for("all")) == [
        f"bos_token_id [{MARK + 1}] must lie in [0, {MARK + 1}), the ids that the model embeds",
        f"eos_token_id [{MARK + 2}] must lie in [0, {MARK + 1}), the ids that the model embeds",
        f"pad_token_id [-1] must lie in [0, {MARK + 1}), the ids that the model embeds",
        f"image_token is -3, but the model embeds the ids below {MARK + 1}; fusion_vocab_size=1 adds a "
        "row for it",
    ]
    tokenizer.bos_id = MARK
    assert f"bos_token_id [{MARK}] cannot be text: in this model features replace [{MARK}]" in (
        settings.problems(model_for("placeholder"))
    )


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_slots_are_enough_for_all_turns(tmp_path, compile, monkeypatch):
    monkeypatch.setattr(session, "compiled", lambda function, device: function)
    model, settings = model_for("all", 89), make_settings(tmp_path, "all", compile=compile)

    def slots(*lengths):
        # BOS, or the end of the answer before.
        return required_slots(model, settings, [[n + 1 for n in lengths]], 0, path="p")

    for lengths in ([83], [20, 3, 11], [15, 16, 17]):
        with Conversation(model, settings, max_tokens=slots(*lengths)) as conversation:
            for n in lengths:
                conversation.ask(user_message(" ".join(["w4"] * n)))
    with pytest.raises(ValueError, match=r"p, prompt 1: 85 tokens in 1 turns, .* are 90, and 89 fit"):
        slots(84)
    if compile:
        with pytest.raises(
            ValueError, match="73 tokens in 3 turns, padded to lengths that share a graph"
        ):
            slots(40, 20, 10)
    else:
        assert slots(40, 20, 10) == 73 + 2 + 3 * 4 + 1
