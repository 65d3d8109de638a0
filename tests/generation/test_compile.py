import functools

import pytest
import torch
from generation import models
from generation.models import ARCHS, GREEDY, make, prompt
from support import FEATURES, inputs, text, tiny_decoder

from torchfuse import generate
from torchfuse.generation import Session, steps


@pytest.fixture
def traced(monkeypatch):
    models.trace_only(monkeypatch)
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ARCHS)
def test_prompts_of_a_bucket_share_two_graphs(name, traced):
    model = make(name)
    options = {"max_new_tokens": 5, "temperature": 0}
    generate(model, prompt(name, seed=1), encoder_input=inputs(), **options, compile=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length, seed in ((13, 2), (16, 3), (9, 4)):
            tokens, given = prompt(name, length=length, seed=seed), inputs(seed=seed)
            got = generate(model, tokens, encoder_input=given, **options, compile=True)
            assert torch.equal(got, generate(model, tokens, encoder_input=given, **options))


def test_graphs_do_not_break_and_depend_on_the_bucket_only(traced):
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
    embeds = model.encode(inputs())

    def turns(compile_it):
        with Session(
            model, batch_size=2, max_tokens=90, max_features=FEATURES, compile=compile_it
        ) as session:
            options = {"max_new_tokens": 6, "sampling": GREEDY}
            one, _ = session.answer(text(2, 11), encoder_embeds=embeds, **options)
            two, _ = session.answer(text(2, 7, seed=8), **options)
        return one, two

    for compiled, eager in zip(turns(True), turns(False), strict=True):
        assert torch.equal(compiled, eager)


def test_torchs_limit_of_shapes_does_not_apply(monkeypatch):
    """With a limit of one shape, three compile."""
    torch._dynamo.reset()
    traced = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(
        steps.torch, "compile", lambda function, *, mode, **options: traced(function, **options)
    )
    steps.compiled.cache_clear()
    decoder = tiny_decoder(num_layers=1).eval()
    options = {"max_new_tokens": 2, "temperature": 0}
    try:
        with torch._dynamo.config.patch(recompile_limit=1):
            for rows in (1, 2, 3):
                expected = generate(decoder, text(rows, 5), **options)
                assert torch.equal(generate(decoder, text(rows, 5), **options, compile=True), expected)
    finally:
        steps.compiled.cache_clear()
        torch._dynamo.reset()


@pytest.mark.long  # inductor takes half a minute
def test_inductor_gives_the_same_answer():
    torch._dynamo.reset()
    model, tokens = make("cross_attention"), text(2, 11)
    options = {"encoder_input": inputs(), "max_new_tokens": 20, "temperature": 0}
    assert torch.equal(
        generate(model, tokens, **options, compile=True), generate(model, tokens, **options)
    )
    torch._dynamo.reset()
