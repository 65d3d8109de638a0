import hf
import pytest
import torch
from generation.models import trace_only
from prompt_settings import LAYOUTS, images, make_settings, model_for, sample, tokenizer, transform

from torchfuse import from_pretrained, generate
from torchfuse.data import (
    GridImageTransform,
    Message,
    Sample,
    SampleTransform,
    TiledImageTransform,
    padded_collate_images,
)
from torchfuse.generation.sampling import Sampling
from torchfuse.tasks.conversation import Conversation
from torchfuse.tasks.image_inputs import fit_to_encoder
from torchfuse.tasks.prediction import predict
from torchfuse.tasks.prompts import user_message
from torchfuse.tasks.report import Report, peak_memory

SAMPLED = Sampling(temperature=1.4, top_k=17)


def predict_texts(*args, **options):
    return [prediction.text for prediction in predict(*args, **options)]


def mixed(folder):
    """Samples with none, one and several images, of different lengths, in no order."""
    a, b, c = images(folder).values()
    return [
        sample("<image> w4", (a,)),
        sample("w5 w6 w7 w8 w9"),
        sample("w4 <image> w5 w6 <image> <image> w7", (b, a, c)),
        sample("w9"),
        sample("<image> w4", (c,)),
        sample("<image> w4 w5 w6 w7 w8 <image>", (c, b)),
        sample("w6 w7"),
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), SAMPLED], ids=["greedy", "sampled"])
def test_batches_give_the_answers_of_single_prompts(tmp_path, layout, sampling):
    model, samples = model_for(layout), mixed(tmp_path)
    stop = (7, 11, 13, 29)
    settings = make_settings(
        tmp_path, layout, sampling=sampling, max_new_tokens=11, stop_tokens=stop, seed=5
    )
    alone = []
    for index, each in enumerate(samples):
        options = {"max_tokens": 60, "max_images": 3}
        with Conversation(model, settings, **options) as conversation:
            conversation.reset(index=index)
            alone.append(conversation.ask(each.messages[0]))
    for batch_size in (1, 3, 50):
        report = Report()
        got = predict_texts(model, settings, samples, batch_size=batch_size, report=report)
        assert got == alone
        assert (report.prompts, report.images) == (7, 7)
        encoded = [settings.transform.prompt(each.messages) for each in samples]
        assert report.prompt_tokens == sum(map(len, encoded))
    assert len(set(alone)) > 2
    assert not model.caches_are_setup()
    assert predict_texts(model, settings, [], batch_size=3) == []


def alone(model, settings, each):
    """The answer to the prompt of a sample, by ``generate``."""
    batch = padded_collate_images([settings.transform(each, with_answer=False)])
    tokens = batch.pop("tokens")
    batch = fit_to_encoder(model, batch)
    sampling = vars(settings.sampling)
    new = {"max_new_tokens": settings.max_new_tokens, "stop_tokens": settings.stops}
    got = generate(model, tokens, **batch, **new, **sampling)
    return settings.text(got[0, tokens.shape[1] :].tolist())


def of_sizes(folder):
    """Images whose tiles differ in number, of 8 x 8."""
    return [
        images(folder, height, width)["a"].rename(folder / f"{height}x{width}.png")
        for height, width in ((8, 8), (8, 16), (16, 16))
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_prompt_is_all_before_the_last_answer(tmp_path, layout):
    model, (a, b, c) = model_for(layout), images(tmp_path).values()
    settings = make_settings(tmp_path, layout, transform(tmp_path, layout, template="vicuna"))
    turns = [user_message("<image> w4", (a,)), Message("assistant", ["w5 w6"])]
    turns += [user_message("w7 <image> w8", (c,)), Message("assistant", ["w9"])]
    samples = [
        Sample([Message("system", ["w10"]), *turns]),
        Sample(turns[:3]),
        Sample(turns[:2]),
        sample("w4 w5", answer="w6"),
    ]
    expected = [alone(model, settings, each) for each in samples]
    assert predict_texts(model, settings, samples, batch_size=3) == expected
    assert len(set(expected)) > 1
    changed = Sample([user_message("<image> w4", (b,)), *turns[1:]])
    assert settings.transform(changed)["tokens"] == settings.transform(Sample(turns))["tokens"]


def tiled(folder, layout):
    """A transform whose images have several items, and samples with up to five in a row."""
    one, wide, square = of_sizes(folder)
    grid = GridImageTransform(8, resolutions=[(8, 8), (8, 16), (16, 16)])
    made = transform(folder, layout, image_transform=grid)
    samples = [
        sample("<image> w4", (square,)),
        sample("w5"),
        sample("w6 <image> w7 <image>", (one, wide)),
        sample("<image> w4", (wide,)),
    ]
    assert [[made.reader.num_items(image) for image in s.images] for s in samples] == [
        [5],
        [],
        [2, 3],
        [3],
    ]
    return made, samples


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_in_any_number_of_tiles(tmp_path, layout):
    model, (made, samples) = model_for(layout, 149), tiled(tmp_path, layout)
    settings = make_settings(tmp_path, layout, made)
    expected = [alone(model, settings, each) for each in samples]
    assert predict_texts(model, settings, samples, batch_size=3) == expected


def test_tiles_of_llama_vision(tmp_path):
    """Its tower pads each image to four tiles; nothing attends to those."""
    hf.mllama(tmp_path / "mllama")
    model = from_pretrained(tmp_path / "mllama").eval()
    tiles = TiledImageTransform(12, max_tiles=4)
    images_of = [
        images(tmp_path, height, width)["a"].rename(tmp_path / f"{height}x{width}.png")
        for height, width in ((12, 12), (24, 12), (24, 24))
    ]
    words = tokenizer(tmp_path / "words")
    settings = make_settings(tmp_path, "all", SampleTransform.for_model(model, words, tiles, "plain"))
    one, high, square = images_of
    samples = [
        sample("<image> w4", (square,)),
        sample("w6 <image> w7 <image>", (one, high)),
        sample("w5"),
        sample("<image> w4", (one,)),
    ]
    expected = [alone(model, settings, each) for each in samples]
    assert predict_texts(model, settings, samples, batch_size=3) == expected
    assert len(set(expected)) > 1
    with Conversation(model, settings, max_tokens=40, max_images=7) as conversation:
        answers = [conversation.ask(each.messages[0]) for each in (samples[1], samples[0])]
        messages = conversation.messages
    assert answers == [expected[1], alone(model, settings, Sample(messages))]


def test_a_model_inside_another_module_answers(tmp_path):
    model, settings, samples = model_for("all"), make_settings(tmp_path, "all"), mixed(tmp_path)
    expected = predict(model, settings, samples, batch_size=3)
    outer = torch.nn.ModuleDict({"model": model}).train()
    assert settings.problems(outer) == []
    assert predict(outer, settings, samples, batch_size=3) == expected
    with Conversation(outer.eval(), settings, max_tokens=60, max_images=3) as conversation:
        assert conversation.ask(samples[0].messages[0]) == expected[0].text


def test_samples_that_do_not_fit_are_named_before_any_is_answered(tmp_path):
    model, settings = model_for("all", max_seq_len=31), make_settings(tmp_path, "all", max_new_tokens=7)
    samples = [*mixed(tmp_path), sample("w4 " * 24), sample("w4 " * 23), sample("w4 " * 29)]
    with pytest.raises(ValueError, match="samples has 2 problems") as info:
        predict_texts(model, settings, samples, batch_size=2)
    lines = str(info.value).splitlines()
    assert lines[1] == (
        "  prompt 8: 25 tokens in 1 turns, and an answer of up to 7 to each are 32, and 31 fit into the "
        "model's max_seq_len of 31 beside 6 features of images."
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
    predict_texts(model, settings, [sample("w4 " * 17, pictures)], batch_size=2)
    with pytest.raises(
        ValueError, match="are 26, and 25 fit into the model's max_seq_len of 31 beside 6"
    ):
        predict_texts(model, settings, [sample("w4 " * 18, pictures)], batch_size=2)


@pytest.fixture
def traced(monkeypatch):
    trace_only(monkeypatch)
    yield
    torch._dynamo.reset()


# A prompt without images and one with images; two steps too, where layers attend to features.
@pytest.mark.parametrize(("layout", "graphs"), [("all", 4), ("placeholder", 3)])
def test_compiled_batches_share_graphs_and_give_the_same_answers(tmp_path, layout, graphs, traced):
    model, samples = model_for(layout), mixed(tmp_path)
    expected = predict_texts(model, make_settings(tmp_path, layout), samples, batch_size=2)
    report = Report()
    counted = torch._dynamo.utils.counters
    counted.clear()
    got = predict_texts(
        model, make_settings(tmp_path, layout, compile=True), samples, batch_size=2, report=report
    )
    assert got == expected
    assert counted["stats"]["unique_graphs"] == graphs
    assert report.seconds["compile"] > 0
    assert report.seconds["prefill"] > 0
    assert "in none of the other times" in "\n".join(report.lines(torch.device("cpu")))


@pytest.mark.long
def test_compiled_batches_of_tiles(tmp_path, traced):
    model, (made, samples) = model_for("all", 149), tiled(tmp_path, "all")
    settings = [make_settings(tmp_path, "all", made, compile=compile) for compile in (False, True)]
    texts = [predict_texts(model, each, samples, batch_size=2) for each in settings]
    assert texts[0] == texts[1]


def test_compiled_conversations_give_the_same_answers(tmp_path, traced):
    model, samples = model_for("all", 200), [mixed(tmp_path)[i] for i in (0, 1, 5)]
    answers = []
    for compile in (False, True):
        settings = make_settings(tmp_path, "all", compile=compile)
        with Conversation(model, settings, max_tokens=150, max_images=3) as conversation:
            answers.append([conversation.ask(each.messages[0]) for each in samples])
    assert answers[0] == answers[1]


def test_finished_rows_count_no_tokens(tmp_path):
    model, samples = model_for("all"), mixed(tmp_path)
    settings = make_settings(tmp_path, "all", max_new_tokens=9, sampling=Sampling(temperature=0))
    free = predict_texts(model, settings, samples, batch_size=7)
    stop = tuple({int(answer.split()[0][1:]) for answer in free[:3]})
    settings = make_settings(
        tmp_path, "all", max_new_tokens=9, stop_tokens=stop, sampling=Sampling(temperature=0)
    )
    report = Report()
    answers = predict_texts(model, settings, samples, batch_size=7, report=report)
    assert "" in answers
    lengths = [len(answer.split()) + (len(answer.split()) < 9) for answer in answers]
    assert report.tokens == sum(lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gpu_gives_the_answers_of_the_cpu(tmp_path, layout):
    model, samples = model_for(layout), mixed(tmp_path)
    settings = make_settings(tmp_path, layout, max_new_tokens=11)
    expected = predict_texts(model, settings, samples, batch_size=3)
    report = Report()
    assert predict_texts(model.cuda(), settings, samples, batch_size=3, report=report) == expected
    peak, whose = peak_memory(torch.device("cuda"))
    assert peak >= sum(p.nbytes for p in model.parameters())
    assert whose == "allocated by tensors on cuda"
