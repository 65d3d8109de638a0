"""Generation on a GPU, by the bodies that run on the CPU too; and what a GPU would trip over, without one.

CUDA graphs replay a recording: what a graph writes to must stand where it stood, and what it returned is
overwritten by the next. Both can be seen in the graphs themselves, before any device records them.
"""

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from support import IMAGE, TinyEncoder, inputs, open_gates, text, tiny_decoder
from torch.utils._python_dispatch import TorchDispatchMode

from torchfuse import fuse, generate, quantize
from torchfuse.generation import Session, session
from torchfuse.generation.sampling import Sampling

ARCHS = {
    "cross_attention": {"every": 2},
    "placeholder": {"arch": "joint_decoder", "encoder_token": IMAGE},
    "prefix": {"arch": "joint_decoder", "placement": "prefix"},
}
SCHEMES = ("int8_weight_only", "int8_dynamic", "float8_weight_only", "nf4")
AN_IMAGE = 3  # features of one image
LENGTHS = (9, 13, 11)  # of prompts with no image, one and two
WIDE = 2 * AN_IMAGE
STEPS = 17
GREEDY = Sampling(temperature=0)

on_gpu = pytest.param("cuda", marks=pytest.mark.gpu)
devices = pytest.mark.parametrize("device", ["cpu", on_gpu])
archs = pytest.mark.parametrize("name", ARCHS)


def make(name, device, **decoder):
    model = fuse(tiny_decoder(max_seq_len=131, **decoder), TinyEncoder(), **ARCHS[name]).eval()
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.mul_(30)
    model.requires_grad_(False)
    return (open_gates(model) if name == "cross_attention" else model).to(device)


def mixed_rows(name, device):
    """Prompts without padding, their batch, and which features each row has."""
    rows = [text(1, length, seed)[0] for seed, length in enumerate(LENGTHS)]
    if name == "placeholder":
        rows[1][4 : 4 + AN_IMAGE] = IMAGE
        rows[2][:AN_IMAGE] = rows[2][5 : 5 + AN_IMAGE] = IMAGE
    batch = torch.stack([F.pad(row, (max(LENGTHS) - len(row), 0)) for row in rows])
    valid = torch.arange(WIDE) < torch.tensor([[0], [AN_IMAGE], [WIDE]])
    return [row.to(device) for row in rows], batch.to(device), valid.to(device)


def pixels(device, batch=3):
    return {"x": inputs(batch, WIDE)["x"].to(device)}


def of_row(row, x, valid):
    return {"encoder_input": {"x": x["x"][row, valid[row]][None]}} if row else {}


def seeded(device, *seeds):
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


# -- the same on any device ---------------------------------------------------------------------------


@torch.no_grad()
@devices
@archs
def test_every_step_of_mixed_rows_equals_each_row_alone_without_caches(name, device):
    model, x = make(name, device), pixels(device)
    rows, batch, valid = mixed_rows(name, device)
    given = {"encoder_input": x, "encoder_mask": valid}
    said, logits = generate(model, batch, **given, max_new_tokens=STEPS, temperature=0, scores="logits")
    for row, prompt in enumerate(rows):
        sequence = said[row, -STEPS - len(prompt) : -1][None]
        expected = model(sequence, **of_row(row, x, valid))[0, -STEPS:]
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-5)


@devices
@archs
def test_rows_sample_as_if_alone(name, device):
    model, x = make(name, device), pixels(device)
    rows, batch, valid = mixed_rows(name, device)
    options = {"max_new_tokens": STEPS, "temperature": 1.2, "top_k": 19, "top_p": 0.97}
    given = {"encoder_input": x, "encoder_mask": valid}
    together = generate(model, batch, **given, **options, generator=seeded(device, 5, 6, 7))
    for row, prompt in enumerate(rows):
        generator = seeded(device, 5 + row)
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
    moved = (model(tokens, **given) - expected).norm() / expected.norm()
    assert 0 < moved < {"nf4": 0.3, "float8_weight_only": 0.06}.get(scheme, 0.02)
    said = generate(model, tokens, **given, max_new_tokens=5, temperature=0)
    for at in range(11, 16):
        assert torch.equal(model(said[:, :at], **given)[:, -1].argmax(-1), said[:, at])


@pytest.fixture
def graphs(monkeypatch):
    """Compiled for the device: on the CPU traced whole and run as they are, which takes seconds."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    @functools.cache
    def traced(function, kind):
        return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")

    def choose(device):
        if device == "cpu":
            monkeypatch.setattr(session, "compiled", traced)

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
    for _ in range(2):  # the second time on other caches
        assert torch.equal(generate(model, batch, **given, compile=True), eager)
    # Whatever keeps CUDA graphs from being recorded leaves a step as slow as its launches.
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


# -- nobody waits for the device ----------------------------------------------------------------------

WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.unique_dim.default,
    torch.ops.aten._unique2.default,
}


class Watch(TorchDispatchMode):
    """While it is on, what would make a host wait for its device raises, on either."""

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


def answer_watched(model, name, device, compile_it, sampling, generator=None):
    """A watch that is on from the fifth token to the last but one, when all is warm."""
    _, batch, valid = mixed_rows(name, device)
    watch, heard = Watch(device), []

    def stream(token):
        heard.append(token)
        watch.turn(5 <= len(heard) < STEPS)

    sizes = {"batch_size": 3, "max_tokens": 64, "max_features": WIDE, "compile": compile_it}
    given = {"encoder_embeds": model.encode(pixels(device)), "encoder_mask": valid, "stream": stream}
    given |= {"max_new_tokens": STEPS, "sampling": sampling, "generator": generator}
    with Session(model, **sizes) as talk:
        try:
            # A device says itself when it is waited for, and compiles nothing under a watch.
            with watch if device == "cpu" else contextlib.nullcontext():
                talk.answer(batch, **given)
        finally:
            watch.turn(False)
    assert len(heard) == STEPS
    return watch


# On the CPU placeholders are counted by looking at them, so that a mistake can be named.
UNSEEN = [
    ("cross_attention", "cpu"),
    pytest.param("prefix", "cpu"),
    *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in ARCHS),
]


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("name", "device"), UNSEEN)
def test_no_token_waits_for_the_device(name, device, sampled):
    sampling = Sampling(0.9, top_k=11, top_p=0.9, repetition_penalty=1.2) if sampled else GREEDY
    generator = seeded(device, 1, 2, 3) if sampled else None
    watch = answer_watched(make(name, device), name, device, False, sampling, generator)
    assert device != "cpu" or watch.seen > 100  # it was on


@pytest.mark.parametrize("call", [lambda t: t.sum().item(), lambda t: t[t > 0]], ids=["item", "mask"])
def test_the_watch_sees_what_waits(call):
    with Watch("cpu") as watch:
        call(torch.ones(3))
        watch.turn(True)
        with pytest.raises(AssertionError, match="aten"):
            call(torch.ones(3))


@pytest.mark.gpu
@archs
def test_no_compiled_token_waits_for_the_device(name):
    torch._dynamo.reset()
    answer_watched(make(name, "cuda"), name, "cuda", True, GREEDY)
    torch._dynamo.reset()


# -- what CUDA graphs ask of a graph ------------------------------------------------------------------


class Recorded:
    """A backend that runs graphs as they are and notes what recording them would break."""

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
    torch._dynamo.reset()
    backend = Recorded()

    @functools.cache
    def compiled(function, kind):
        return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

    monkeypatch.setattr(session, "compiled", compiled)
    yield backend
    torch._dynamo.reset()


@archs
def test_graphs_are_fit_to_be_recorded(name, recorded):
    model = make(name, "cpu")
    _, batch, valid = mixed_rows(name, "cpu")
    given = {"encoder_input": pixels("cpu"), "encoder_mask": valid}
    generate(model, batch, **given, max_new_tokens=4, temperature=0, compile=True)
    assert recorded.runs == 4
    # Inductor leaves a graph that writes to anything but a static address to plain launches, and says so
    # only in a log; mark_static_address says that it is one.
    assert recorded.moves == set()
    # What is kept from one graph for a later one must be a copy, or written in place.
    assert recorded.stale == set()
