import pytest
import torch
from generation.models import trace_only
from prompt_settings import LAYOUTS, images, make_settings, model_for

from torchfuse.data.questions import Question
from torchfuse.generation.sampling import Sampling
from torchfuse.tasks.conversation import Conversation
from torchfuse.tasks.prediction import predict
from torchfuse.tasks.report import Report, peak_memory

SAMPLED = Sampling(temperature=1.4, top_k=17)


def predict_texts(*args, **options):
    return [prediction.text for prediction in predict(*args, **options)]


def mixed(folder):
    """Questions with none, one and several images, of different lengths, in no order."""
    a, b, c = images(folder).values()
    return [
        Question("<image> w4", (a,)),
        Question("w5 w6 w7 w8 w9"),
        Question("w4 <image> w5 w6 <image> <image> w7", (b, a, c)),
        Question("w9"),
        Question("<image> w4", (c,)),
        Question("<image> w4 w5 w6 w7 w8 <image>", (c, b)),
        Question("w6 w7"),
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), SAMPLED], ids=["greedy", "sampled"])
def test_batches_give_the_answers_of_single_questions(tmp_path, layout, sampling):
    model, questions = model_for(layout), mixed(tmp_path)
    stop = (7, 11, 13, 29)
    settings = make_settings(
        tmp_path, layout, sampling=sampling, max_new_tokens=11, stop_tokens=stop, seed=5
    )
    alone = []
    for index, question in enumerate(questions):
        options = {"max_tokens": 60, "max_images": 3}
        with Conversation(model, settings, **options) as conversation:
            conversation.reset(index=index)
            alone.append(conversation.ask(question))
    for batch_size in (1, 3, 50):
        report = Report()
        got = predict_texts(model, settings, questions, batch_size=batch_size, report=report)
        assert got == alone
        assert (report.prompts, report.images) == (7, 7)
        encoded = [settings.transform.encode(q, with_answer=False)[0] for q in questions]
        assert report.prompt_tokens == sum(map(len, encoded))
    assert len(set(alone)) > 2
    assert not model.caches_are_setup()
    assert predict_texts(model, settings, [], batch_size=3) == []


def test_a_model_inside_another_module_answers(tmp_path):
    model, settings, questions = model_for("all"), make_settings(tmp_path, "all"), mixed(tmp_path)
    expected = predict(model, settings, questions, batch_size=3)
    outer = torch.nn.ModuleDict({"model": model}).train()
    assert settings.problems(outer) == []
    assert predict(outer, settings, questions, batch_size=3) == expected
    with Conversation(outer.eval(), settings, max_tokens=60, max_images=3) as conversation:
        assert conversation.ask(questions[0]) == expected[0].text


def test_questions_that_do_not_fit_are_named_before_any_is_answered(tmp_path):
    model, settings = model_for("all", max_seq_len=31), make_settings(tmp_path, "all", max_new_tokens=7)
    questions = [*mixed(tmp_path), Question("w4 " * 24), Question("w4 " * 23), Question("w4 " * 29)]
    with pytest.raises(ValueError, match="questions has 2 problems") as info:
        predict_texts(model, settings, questions, batch_size=2)
    lines = str(info.value).splitlines()
    assert lines[1] == (
        "  prompt 8: 25 tokens in 1 turns, and an answer of up to 7 to each are 32, and 31 fit into the "
        "model's max_seq_len of 31 beside 3 images."
    )
    assert lines[2].startswith("  prompt 10: 30 tokens")
    assert model.encoder.seen == 0
    assert not model.caches_are_setup()


def test_features_in_front_need_room_too(tmp_path):
    model, settings = (
        model_for("prefix", max_seq_len=31),
        make_settings(tmp_path, "prefix", max_new_tokens=7),
    )
    pictures = tuple(images(tmp_path).values())
    predict_texts(model, settings, [Question("w4 " * 17, pictures)], batch_size=2)
    with pytest.raises(
        ValueError, match="are 26, and 25 fit into the model's max_seq_len of 31 beside 3"
    ):
        predict_texts(model, settings, [Question("w4 " * 18, pictures)], batch_size=2)


@pytest.fixture
def traced(monkeypatch):
    trace_only(monkeypatch)
    yield
    torch._dynamo.reset()


# A prompt without images and one with images; two steps too, where layers attend to features.
@pytest.mark.parametrize(("layout", "graphs"), [("all", 4), ("placeholder", 3)])
def test_compiled_batches_share_graphs_and_give_the_same_answers(tmp_path, layout, graphs, traced):
    model, questions = model_for(layout), mixed(tmp_path)
    expected = predict_texts(model, make_settings(tmp_path, layout), questions, batch_size=2)
    report = Report()
    counted = torch._dynamo.utils.counters
    counted.clear()
    got = predict_texts(
        model, make_settings(tmp_path, layout, compile=True), questions, batch_size=2, report=report
    )
    assert got == expected
    assert counted["stats"]["unique_graphs"] == graphs
    assert report.seconds["compile"] > 0
    assert report.seconds["prefill"] > 0
    assert "in none of the other times" in "\n".join(report.lines(torch.device("cpu")))


def test_compiled_conversations_give_the_same_answers(tmp_path, traced):
    model, questions = model_for("all", 200), [mixed(tmp_path)[i] for i in (0, 1, 5)]
    answers = []
    for compile in (False, True):
        settings = make_settings(tmp_path, "all", compile=compile)
        with Conversation(model, settings, max_tokens=150, max_images=3) as conversation:
            answers.append([conversation.ask(question) for question in questions])
    assert answers[0] == answers[1]


def test_finished_rows_count_no_tokens(tmp_path):
    model, questions = model_for("all"), mixed(tmp_path)
    settings = make_settings(tmp_path, "all", max_new_tokens=9, sampling=Sampling(temperature=0))
    free = predict_texts(model, settings, questions, batch_size=7)
    stop = tuple({int(answer.split()[0][1:]) for answer in free[:3]})
    settings = make_settings(
        tmp_path, "all", max_new_tokens=9, stop_tokens=stop, sampling=Sampling(temperature=0)
    )
    report = Report()
    answers = predict_texts(model, settings, questions, batch_size=7, report=report)
    assert "" in answers
    lengths = [len(answer.split()) + (len(answer.split()) < 9) for answer in answers]
    assert report.tokens == sum(lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gpu_gives_the_answers_of_the_cpu(tmp_path, layout):
    model, questions = model_for(layout), mixed(tmp_path)
    settings = make_settings(tmp_path, layout, max_new_tokens=11)
    expected = predict_texts(model, settings, questions, batch_size=3)
    report = Report()
    assert predict_texts(model.cuda(), settings, questions, batch_size=3, report=report) == expected
    peak, whose = peak_memory(torch.device("cuda"))
    assert peak >= sum(p.nbytes for p in model.parameters())
    assert whose == "allocated by tensors on cuda"
