import functools

import pytest
import torch
from support import FEATURES, IMAGE, TinyEncoder, inputs, open_gates, text, tiny_decoder

from torchfuse import fuse, generate
from torchfuse.generation import Session, session, steps
from torchfuse.generation.sampling import Sampling

ARCHS = {
    "cross_attention": {"every": 2},
    "placeholder": {"arch": "joint_decoder", "encoder_token": IMAGE},
    "prefix": {"arch": "joint_decoder", "placement": "prefix"},
}


def make(name):
    model = fuse(tiny_decoder(max_seq_len=200), TinyEncoder(), **ARCHS[name]).eval()
    return open_gates(model) if name == "cross_attention" else model


def prompt(name, length, seed):
    tokens = text(2, length, seed)
    if name == "placeholder":
        tokens[:, 1 : 1 + FEATURES] = IMAGE
    return tokens


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


@pytest.mark.parametrize("name", ARCHS)
def test_one_graph_a_prompt_and_one_a_step_for_all_of_a_bucket(name, traced):
    model = make(name)
    options = {"max_new_tokens": 64, "temperature": 0}
    generate(model, prompt(name, 11, 1), encoder_input=inputs(), **options, compile=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length, seed in ((13, 2), (16, 3), (9, 4)):
            tokens, given = prompt(name, length, seed), inputs(seed=seed)
            got = generate(model, tokens, encoder_input=given, **options, compile=True)
            assert torch.equal(got, generate(model, tokens, encoder_input=given, **options))


def test_graphs_break_nowhere_and_change_with_the_bucket_alone(traced):
    model = make("cross_attention")
    counted = torch._dynamo.utils.counters
    options = {"max_new_tokens": 5, "temperature": 0, "compile": True}
    counted.clear()
    generate(model, text(2, 11), encoder_input=inputs(), **options)
    assert not counted["graph_break"]
    assert counted["stats"]["unique_graphs"] == 2
    with (
        torch._dynamo.config.patch(error_on_recompile=True),
        pytest.raises(torch._dynamo.exc.RecompileError),
    ):
        generate(model, text(2, 40), encoder_input=inputs(), **options)


def test_a_session_compiles_its_turns(traced):
    model = make("cross_attention")
    embeds, greedy = model.encode(inputs()), Sampling(temperature=0)

    def turns(compile_it):
        with Session(
            model, batch_size=2, max_tokens=90, max_features=FEATURES, compile=compile_it
        ) as talk:
            options = {"max_new_tokens": 6, "sampling": greedy}
            one, _ = talk.answer(text(2, 11), encoder_embeds=embeds, **options)
            two, _ = talk.answer(text(2, 7, seed=8), **options)
        return one, two

    for compiled, eager in zip(turns(True), turns(False), strict=True):
        assert torch.equal(compiled, eager)


def test_shapes_may_be_as_many_as_there_are(monkeypatch):
    torch._dynamo.reset()
    traced = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(
        steps.torch, "compile", lambda function, *, mode, **options: traced(function, **options)
    )
    steps.compiled.cache_clear()
    model = make("cross_attention")
    try:
        for rows in range(1, 12):  # torch stops after eight
            tokens = text(rows, 5)
            options = {"max_new_tokens": 2, "temperature": 0}
            assert torch.equal(
                generate(model, tokens, **options, compile=True), generate(model, tokens, **options)
            )
    finally:
        steps.compiled.cache_clear()
        torch._dynamo.reset()


def test_inductor_says_the_same():
    torch._dynamo.reset()
    model, tokens = make("cross_attention"), text(2, 11)
    options = {"encoder_input": inputs(), "max_new_tokens": 20, "temperature": 0}
    assert torch.equal(
        generate(model, tokens, **options, compile=True), generate(model, tokens, **options)
    )
    torch._dynamo.reset()
