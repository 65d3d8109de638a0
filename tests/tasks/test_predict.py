import functools

import pytest
import torch
from prompt_settings import LAYOUTS, asking, images, model_for

from torchfuse import quantize
from torchfuse.data.questions import Question
from torchfuse.generation import session
from torchfuse.generation.sampling import Sampling
from torchfuse.params import storage_nbytes
from torchfuse.tasks.conversation import Conversation
from torchfuse.tasks.predict import answer_in_batches
from torchfuse.tasks.report import Report, TimedSession, peak_memory, step_bytes

DRAWN = Sampling(temperature=1.4, top_k=17)


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
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), DRAWN], ids=["greedy", "drawn"])
def test_a_batch_answers_as_one_by_one(tmp_path, layout, sampling):
    model, questions = model_for(layout), mixed(tmp_path)
    stop = (7, 11, 13, 29)
    ask = asking(tmp_path, layout, sampling=sampling, max_new_tokens=11, stop_tokens=stop, seed=5)
    alone = []
    for index, question in enumerate(questions):
        options = {"max_tokens": 60, "max_images": 3}
        with Conversation(model, ask, **options) as conversation:
            conversation.reset(index=index)
            alone.append(conversation.ask(question))
    for batch_size in (1, 3, 50):
        report = Report()
        got = answer_in_batches(model, ask, questions, batch_size=batch_size, report=report)
        assert got == alone
        assert (report.prompts, report.images) == (7, 7)
        assert report.prefills == -(-7 // min(batch_size, 7))
        assert report.prompt_tokens >= sum(len(q.question.split()) + 1 for q in questions) - 7
    assert len(set(alone)) > 2
    assert not model.caches_are_setup()
    assert answer_in_batches(model, ask, [], batch_size=3) == []


def test_what_does_not_fit_is_named_before_anything_is_answered(tmp_path):
    model, ask = model_for("all", max_seq_len=31), asking(tmp_path, "all", max_new_tokens=7)
    questions = [*mixed(tmp_path), Question("w4 " * 24), Question("w4 " * 23), Question("w4 " * 29)]
    with pytest.raises(ValueError, match="questions has 2 problems") as info:
        answer_in_batches(model, ask, questions, batch_size=2)
    said = str(info.value).splitlines()
    assert said[1] == (
        "  prompt 8: 25 tokens in 1 turns, and an answer of up to 7 to each are 32, and 31 fit into the "
        "model's max_seq_len of 31 beside 3 images."
    )
    assert said[2].startswith("  prompt 10: 30 tokens")
    assert model.encoder.seen == 0
    assert not model.caches_are_setup()


def test_features_in_front_take_their_room(tmp_path):
    model, ask = model_for("prefix", max_seq_len=31), asking(tmp_path, "prefix", max_new_tokens=7)
    pictures = tuple(images(tmp_path).values())
    answer_in_batches(model, ask, [Question("w4 " * 17, pictures)], batch_size=2)
    with pytest.raises(
        ValueError, match="are 26, and 25 fit into the model's max_seq_len of 31 beside 3"
    ):
        answer_in_batches(model, ask, [Question("w4 " * 18, pictures)], batch_size=2)


@pytest.fixture
def traced(monkeypatch):
    """Graphs that are traced whole and run as they are, which takes seconds where inductor takes minutes."""
    torch._dynamo.reset()

    @functools.cache
    def compiled(function, device):
        return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")

    monkeypatch.setattr(session, "compiled", compiled)
    yield
    torch._dynamo.reset()


# A prompt without images and one with; a step too, where layers read the features.
@pytest.mark.parametrize(("layout", "graphs"), [("all", 4), ("placeholder", 3)])
def test_compiled_batches_share_graphs_and_answer_the_same(tmp_path, layout, graphs, traced):
    model, questions = model_for(layout), mixed(tmp_path)
    expected = answer_in_batches(model, asking(tmp_path, layout), questions, batch_size=2)
    report = Report()
    counted = torch._dynamo.utils.counters
    counted.clear()
    got = answer_in_batches(
        model, asking(tmp_path, layout, compile=True), questions, batch_size=2, report=report
    )
    assert got == expected
    assert counted["stats"]["unique_graphs"] == graphs
    assert report.compile_seconds > 0
    assert report.prefills == 2  # of four batches, the first without and the first with images compile
    assert "in none of the rates below" in "\n".join(report.lines(torch.device("cpu")))


def test_compiled_conversations_answer_the_same(tmp_path, traced):
    model, questions = model_for("all", 200), [mixed(tmp_path)[i] for i in (0, 1, 5)]
    said = []
    for compile in (False, True):
        ask = asking(tmp_path, "all", compile=compile)
        with Conversation(model, ask, max_tokens=150, max_images=3) as conversation:
            said.append([conversation.ask(question) for question in questions])
    assert said[0] == said[1]


@pytest.mark.parametrize("layout", ["all", "placeholder"])
@pytest.mark.parametrize("shown", [True, False], ids=["images", "text"])
def test_defect_9_bytes_of_a_step_are_those_of_what_runs(tmp_path, layout, shown):
    """Counted anew: what is read by modules that a step runs, found by hooks, and every cache."""
    model, ask = model_for(layout), asking(tmp_path, layout)
    ran, counting = set(), []
    for module in model.modules():
        own = {id(p): p for p in module.parameters(recurse=False)}
        if own:
            module.register_forward_hook(lambda *_, own=own: ran.update(own) if counting else None)
    model.layers[-1].register_forward_hook(lambda *_: counting.append(1))  # not the prompt's, then all
    everything = {id(p): p for p in model.parameters()}
    table = {id(p) for p in model.tok_embeddings.parameters()}
    question = mixed(tmp_path)[0 if shown else 1]
    report = Report()
    with Conversation(model, ask, max_tokens=40, max_images=3, report=report) as conversation:
        conversation.ask(question)
        caches = [m for m in model.modules() if hasattr(m, "k_cache") and getattr(m, "is_filled", True)]
        expected = sum(m.k_cache.nbytes + m.v_cache.nbytes for m in caches)
        expected += sum(everything[i].nbytes for i in ran if i not in table)
        assert len(caches) == 3 + (layout == "all" and shown)
        assert step_bytes(model) == expected
        assert report.bytes_read == report.steps * expected
    assert report.steps == 4
    assert (report.tokens, report.step_tokens) == (5, 4)


def test_a_tied_head_reads_the_table(tmp_path):
    from support import tiny_decoder

    free, tied = tiny_decoder(), tiny_decoder(tied=True)
    assert (
        step_bytes(free) == sum(p.nbytes for p in free.parameters()) - free.tok_embeddings.weight.nbytes
    )
    assert step_bytes(tied) == sum(p.nbytes for p in tied.parameters())


def test_quantized_weights_count_as_they_are_held(tmp_path):
    model = model_for("all")
    before = step_bytes(model)
    done = quantize(model, "int8_weight_only")
    assert step_bytes(model) == before - done.bytes_before + done.bytes_after
    assert storage_nbytes(torch.zeros(3, 5)) == 60


def test_finished_rows_count_no_tokens(tmp_path):
    model, questions = model_for("all"), mixed(tmp_path)
    ask = asking(tmp_path, "all", max_new_tokens=9, sampling=Sampling(temperature=0))
    free = answer_in_batches(model, ask, questions, batch_size=7)
    stop = tuple({int(answer.split()[0][1:]) for answer in free[:3]})
    ask = asking(tmp_path, "all", max_new_tokens=9, stop_tokens=stop, sampling=Sampling(temperature=0))
    report = Report()
    answers = answer_in_batches(model, ask, questions, batch_size=7, report=report)
    assert "" in answers
    lengths = [len(answer.split()) + (len(answer.split()) < 9) for answer in answers]
    assert report.tokens == sum(lengths)
    assert report.step_tokens == sum(length - 1 for length in lengths)


def test_a_report_in_words():
    report = Report(3, 2, 0.5, 40, 0.25, 2, 90, 1.5, 30, 87, 6_000_000_000)
    lines = report.lines(torch.device("cpu"))
    assert lines[:5] == [
        "90 tokens for 3 prompts in 2.25 s on cpu",
        "  images:    2 encoded in 0.500 s",
        "  prefill:   0.250 s in all, 125.0 ms each; 40 tokens of prompts",
        "  decoding:  58.0 tokens/s, 30 steps of 50.00 ms",
        "  bandwidth: 4 GB/s; a step reads 200 MB: the decoder's weights as they are held, and all slots of "
        "the caches",
    ]
    assert lines[5].startswith("  memory:    ")
    assert len(Report().lines(torch.device("cpu"))) == 3


def test_peak_memory_is_at_least_what_is_held():
    held = torch.ones(30_000_000)
    assert peak_memory(torch.device("cpu"))[0] > held.nbytes


def test_times_add_up(tmp_path):
    import time

    model, ask, report = model_for("all"), asking(tmp_path, "all"), Report()
    started = time.perf_counter()
    answer_in_batches(model, ask, mixed(tmp_path), batch_size=3, report=report)
    assert 0 < report.seconds < time.perf_counter() - started
    assert min(report.encode_seconds, report.prefill_seconds, report.decode_seconds) > 0
    assert issubclass(TimedSession, session.Session)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_a_gpu_batches_answer_as_on_the_cpu(tmp_path, layout):
    model, questions = model_for(layout), mixed(tmp_path)
    ask = asking(tmp_path, layout, max_new_tokens=11)
    expected = answer_in_batches(model, ask, questions, batch_size=3)
    report = Report()
    assert answer_in_batches(model.cuda(), ask, questions, batch_size=3, report=report) == expected
    peak, whose = peak_memory(torch.device("cuda"))
    assert peak >= sum(p.nbytes for p in model.parameters())
    assert whose == "allocated by tensors on cuda"
