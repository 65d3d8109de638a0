import pytest
import torch
from prompt_settings import LAYOUTS, MARK, PER_IMAGE, images, make_settings, model_for

from torchfuse import generate
from torchfuse.data.questions import Question
from torchfuse.generation import session
from torchfuse.generation.sampling import Sampling
from torchfuse.tasks.chat import HELP, chat
from torchfuse.tasks.conversation import Conversation
from torchfuse.tasks.prompt_settings import required_slots
from torchfuse.tasks.prompts import Template
from torchfuse.tasks.report import Report
from torchfuse.tasks.text_stream import TextStream


def turns(folder, layout):
    """Two images, none, a new one and an old one, none; only in the first turn for a prefix."""
    a, b, c = images(folder).values()
    questions = [
        Question("w4 <image> w5 <image> w6", (a, b)),
        Question("w7 w8 w9"),
        Question("<image> w10 <image> w11", (c, a)),
        Question("w12"),
    ]
    return [questions[0], questions[1], questions[3]] if layout == "prefix" else questions


def from_scratch(model, settings, questions, system=None):
    """Each turn as one prompt with all turns before it, all its images encoded again."""
    transform, sequence, shown, answers = settings.transform, [], [], []
    for question in questions:
        text = settings.template.fill(question.question, system=None if sequence else system)
        prompt, _ = transform.encode(Question(text, question.images), with_answer=False)
        sequence += prompt[bool(sequence) :]
        shown += question.images
        given = {}
        if shown:
            pixels = torch.stack([transform.pixels(path) for path in shown])
            mask = transform.encoder_mask(sequence, len(shown))
            given = {"encoder_input": {"images": pixels[None]}, "encoder_mask": mask[None]}
        tokens = torch.tensor([sequence])
        new = settings.max_new_tokens
        got = generate(
            model,
            tokens,
            **given,
            max_new_tokens=new,
            stop_tokens=settings.stops,
            **vars(settings.sampling),
        )
        answers.append(settings.until_stop(got[0, len(sequence) :].tolist()))
        sequence = sequence + answers[-1]
    return sequence, [settings.text(answer) for answer in answers]


@pytest.mark.parametrize("system", [None, "w13 w14"], ids=["plain", "system"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_turn_equals_the_whole_conversation_from_scratch(tmp_path, layout, system):
    model, questions = model_for(layout), turns(tmp_path, layout)
    settings = make_settings(tmp_path, layout, template=Template("{text} w15 ", "w16 {text} w17"))
    expected = from_scratch(model, settings, questions, system)
    model.encoder.seen = 0
    report = Report()
    options = {"max_tokens": 80, "max_images": 4, "system": system, "report": report}
    with Conversation(model, settings, **options) as conversation:
        answers = [conversation.ask(question) for question in questions]
        assert (conversation.tokens, answers) == expected
    assert len(set(answers)) > 1
    num = 2 if layout == "prefix" else 3  # the repeated image is encoded once
    assert model.encoder.seen == report.images == num
    assert not model.caches_are_setup()
    blind = from_scratch(
        model, settings, [Question(q.question.replace("<image>", "")) for q in questions], system
    )
    assert blind[1] != answers


def test_turns_follow_the_stop_token_of_the_last_answer(tmp_path):
    model, questions = model_for("all"), turns(tmp_path, "all")
    free = from_scratch(model, make_settings(tmp_path, "all"), questions[:1])[1][0].split()
    stop = int(free[2][1:])
    settings = make_settings(tmp_path, "all", stop_tokens=(stop,))
    expected = from_scratch(model, settings, questions)
    with Conversation(model, settings, max_tokens=80, max_images=4) as conversation:
        assert [conversation.ask(question) for question in questions] == expected[1]
        assert conversation.tokens == expected[0]
    assert expected[1][0].split() == free[: free.index(free[2])]


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
        before = list(conversation.tokens)
        seen = model.encoder.seen
        with pytest.raises(
            ValueError, match=r"fit any more: \d+ tokens and an answer of up to 5 do not"
        ):
            conversation.ask(Question("w4 " * 33))
        two = Question("w4", (picture, picture))
        reason = "only the first turn can have any" if layout == "prefix" else "would be 4 images"
        with pytest.raises(ValueError, match=reason):
            conversation.ask(two)
        with pytest.raises(ValueError, match="makes no token of ' '"):
            conversation.ask(Question(" "))
        assert (conversation.tokens, model.encoder.seen) == (before, seen)
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
        Question("w4 <image> w5 <image> w6", (pictures["a"], pictures["b"])),
        Question("w7 w8 w9"),
        Question("w12"),
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
    assert "[This turn does not fit any more: 90 tokens" in lines[9]
    assert lines[10:] == [answers[2], "[a new conversation]", answers[3]]
    assert report.images == 2


def test_settings_that_do_not_fit_the_model_are_named(tmp_path):
    settings = make_settings(tmp_path, "all", stop_tokens=(-1, 999), max_new_tokens=0)
    settings = type(settings)(
        **vars(settings) | {"sampling": Sampling(temperature=-1), "template": Template("x", "")}
    )
    text = "; ".join(settings.problems(model_for("all")))
    for problem in (
        "temperature must be at least 0, got -1",
        "template.system must hold {text} once and no <image>, got 'x'",
        "template.question must hold {text} once",
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
        encoded = [[list(range(n + (not i))) for i, n in enumerate(lengths)]]
        return required_slots(model, settings, encoded, 0, path="p")

    for lengths in ([83], [20, 3, 11], [15, 16, 17]):
        with Conversation(model, settings, max_tokens=slots(*lengths)) as conversation:
            for n in lengths:
                conversation.ask(Question(" ".join(["w4"] * n)))
    with pytest.raises(ValueError, match=r"p, prompt 1: 85 tokens in 1 turns, .* are 90, and 89 fit"):
        slots(84)
    if compile:
        with pytest.raises(
            ValueError, match="71 tokens in 3 turns, padded to lengths that share a graph"
        ):
            slots(40, 20, 10)
    else:
        assert slots(40, 20, 10) == 71 + 2 + 3 * 4 + 1
