"""Generation on a GPU, by test bodies that run on the CPU too, and what CUDA graphs need, without one.

CUDA graphs replay a recording: a graph's mutated tensors must keep their addresses, and its results are
overwritten by the next replay. Both can be checked on the traced graphs, before any device records them.
"""

import contextlib

import pytest
import torch
from generation import models
from generation.models import ARCHS, GREEDY, WIDE, mixed_rows, seeded
from support import inputs, text
from torch.utils._python_dispatch import TorchDispatchMode

from torchfuse import generate, quantize
from torchfuse.generation import Session
from torchfuse.generation.sampling import Sampling

SCHEMES = ("int8_weight_only", "int8_dynamic", "float8_weight_only", "nf4")
STEPS = 17

on_gpu = pytest.param("cuda", marks=pytest.mark.gpu)
devices = pytest.mark.parametrize("device", ["cpu", on_gpu])
archs = pytest.mark.parametrize("name", ARCHS)


def make(name, device, **decoder):
    return models.make(name, device=device, **decoder).requires_grad_(False)


def pixels(device, batch=3):
    return {"x": inputs(batch, WIDE)["x"].to(device)}


def of_row(row, x, valid):
    return {"encoder_input": {"x": x["x"][row, valid[row]][None]}} if row else {}


# -- the same on any device ---------------------------------------------------------------------------


@devices
@archs
def test_rows_sample_as_if_alone(name, device):
    model, x = make(name, device), pixels(device)
    rows, batch, valid = mixed_rows(name, device)
    options = {"max_new_tokens": STEPS, "temperature": 1.2, "top_k": 19, "top_p": 0.97}
    given = {"encoder_input": x, "encoder_mask": valid}
    together = generate(model, batch, **given, **options, generator=seeded(5, 6, 7, device=device))
    for row, prompt in enumerate(rows):
        generator = seeded(5 + row, device=device)
        alone = generate(model, prompt[None], **of_row(row, x, valid), **options, generator=generator)
        assert torch.equal(alone[0, -STEPS:], together[row, -STEPS:])


@devices
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_models_answer(scheme, device):
    wide = {"embed_dim": 128, "num_heads": 4, "num_kv_heads": 2, "intermediate_dim": 256}
    model = make("cross_attention", device, **wide)
    given = {"encoder_input": pixels(device, 2)}
    tokens = text(2, 11).to(device)
    expected = model(tokens, **given)
    refused = ""
    try:
        quantize(model, scheme)
    except ValueError as error:  # such as float8 on devices that have none
        refused = str(error)
    if refused:
        assert device != "cpu" and f"{scheme} does not run on {device}" in refused
        return
    error = (model(tokens, **given) - expected).norm() / expected.norm()
    assert 0 < error < {"nf4": 0.3, "float8_weight_only": 0.06}.get(scheme, 0.02)
    answer = generate(model, tokens, **given, max_new_tokens=5, temperature=0)
    for at in range(11, 16):
        assert torch.equal(model(answer[:, :at], **given)[:, -1].argmax(-1), answer[:, at])


@pytest.fixture
def graphs(monkeypatch):
    """Graphs compiled on CUDA, and traced only on the CPU."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def choose(device):
        if device == "cpu":
            models.trace_only(monkeypatch, "aot_eager")

    yield choose
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("cross_attention", "cpu"),
        *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in ARCHS),
    ],
)
def test_compiled_equals_eager(name, device, graphs):
    graphs(device)
    model, x = make(name, device), pixels(device)
    _, batch, valid = mixed_rows(name, device)
    given = {"encoder_input": x, "encoder_mask": valid, "max_new_tokens": STEPS, "temperature": 0}
    eager = generate(model, batch, **given)
    for _ in range(2):  # the second time with other caches
        assert torch.equal(generate(model, batch, **given, compile=True), eager)
    # Without recorded CUDA graphs a step is as slow as its kernel launches.
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


# -- no synchronisation with the device ----------------------------------------------------------------

WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.unique_dim.default,
    torch.ops.aten._unique2.default,
}


class SyncGuard(TorchDispatchMode):
    """While it is on, operations that make the host wait for its device raise, on the CPU too."""

    def __init__(self, device):
        super().__init__()
        self.device, self.on, self.seen = device, False, 0

    def turn(self, on):
        self.on = on
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("error" if on else "default")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.on:
            by_mask = function is torch.ops.aten.index.Tensor and any(
                index is not None and index.dtype == torch.bool for index in args[1]
            )
            assert function not in WAITING and not by_mask, function
            self.seen += 1
        return function(*args, **(kwargs or {}))


def answer_guarded(model, name, device, compile_it, sampling, generator=None):
    """Answer under a guard that is on from the fifth token to the last but one."""
    _, batch, valid = mixed_rows(name, device)
    guard, streamed = SyncGuard(device), []

    def stream(token):
        streamed.append(token)
        guard.turn(5 <= len(streamed) < STEPS)

    sizes = {"batch_size": 3, "max_tokens": 64, "max_features": WIDE, "compile": compile_it}
    given = {"encoder_embeds": model.encode(pixels(device)), "encoder_mask": valid, "stream": stream}
    given |= {"max_new_tokens": STEPS, "sampling": sampling, "generator": generator}
    with Session(model, **sizes) as session:
        try:
            # CUDA has its own sync debug mode, and compiles nothing under a dispatch mode.
            with guard if device == "cpu" else contextlib.nullcontext():
                session.answer(batch, **given)
        finally:
            guard.turn(False)
    assert len(streamed) == STEPS
    return guard


# On the CPU placeholders are counted by value, so that a wrong number is an error.
WITHOUT_SYNC = [
    ("cross_attention", "cpu"),
    pytest.param("prefix", "cpu"),
    *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in ARCHS),
]


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("name", "device"), WITHOUT_SYNC)
def test_no_token_waits_for_the_device(name, device, sampled):
    sampling = Sampling(0.9, top_k=11, top_p=0.9, repetition_penalty=1.2) if sampled else GREEDY
    generator = seeded(1, 2, 3, device=device) if sampled else None
    guard = answer_guarded(make(name, device), name, device, False, sampling, generator)
    assert device != "cpu" or guard.seen > 100  # it was on


@pytest.mark.parametrize("call", [lambda t: t.sum().item(), lambda t: t[t > 0]], ids=["item", "mask"])
def test_the_guard_raises(call):
    with SyncGuard("cpu") as guard:
        call(torch.ones(3))
        guard.turn(True)
        with pytest.raises(AssertionError, match="aten"):
            call(torch.ones(3))


@pytest.mark.gpu
@archs
def test_no_compiled_token_waits_for_the_device(name):
    torch._dynamo.reset()
    answer_guarded(make(name, "cuda"), name, "cuda", True, GREEDY)
    torch._dynamo.reset()


# -- requirements of CUDA graphs -----------------------------------------------------------------------


class Recorded:
    """A backend that runs graphs uncompiled and collects what would break when they are recorded."""

    def __init__(self):
        self.runs = 0
        self.moves, self.stale = set(), set()
        self.returned = []  # kept, so that no address is used twice

    def __call__(self, graph, example_inputs):
        names = [node for node in graph.graph.nodes if node.op == "placeholder"]

        def run(*args):
            held = {out.untyped_storage().data_ptr() for out in self.returned}
            tensors = [(n, a) for n, a in zip(names, args, strict=True) if isinstance(a, torch.Tensor)]
            versions = [a._version for _, a in tensors]
            self.stale |= {n.name for n, a in tensors if a.untyped_storage().data_ptr() in held}
            results = graph(*args)
            for (node, tensor), version in zip(tensors, versions, strict=True):
                static = "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})
                if tensor._version != version and not static:
                    self.moves.add(node.name)
            own = {a.untyped_storage().data_ptr() for _, a in tensors}
            fresh = [out for out in results if isinstance(out, torch.Tensor) and out.numel()]
            self.returned += [out for out in fresh if out.untyped_storage().data_ptr() not in own]
            self.runs += 1
            return results

        return run


@pytest.fixture
def recorded(monkeypatch):
    backend = Recorded()
    models.trace_only(monkeypatch, backend)
    yield backend
    torch._dynamo.reset()


@archs
def test_graphs_can_be_recorded(name, recorded):
    model = make(name, "cpu")
    _, batch, valid = mixed_rows(name, "cpu")
    given = {"encoder_input": pixels("cpu"), "encoder_mask": valid}
    generate(model, batch, **given, max_new_tokens=4, temperature=0, compile=True)
    assert recorded.runs == 4
    # Inductor does not record a graph that mutates anything but a static address, and only logs it;
    # mark_static_address marks these tensors as such.
    assert recorded.moves == set()
    # A result that a later graph takes must be a copy, or written in place.
    assert recorded.stale == set()
