"""A function given a module that contains a fused model acts on the fused model, or refuses."""

import filecmp
import re

import pytest
import torch
from params.models import model_of, names, trains
from support import inputs, open_gates, same_state, state, text, tiny_decoder
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from torchfuse import (
    FusionEmbedding,
    describe,
    fusion_state_dict,
    generate,
    get_fusion_params,
    load_fusion,
    load_fusion_state_dict,
    load_pretrained,
    param_groups,
    quantize,
    register_fusion_module,
    save_fusion,
    seed_adapters,
    set_trainable,
)
from torchfuse.checkpoint import load_checkpoint, save_checkpoint
from torchfuse.checkpoint.artifact.trained import load_trained, save_trained
from torchfuse.errors import CheckpointError, ConfigError, ModelError
from torchfuse.generation.sampling import Sampling
from torchfuse.generation.session import Session
from torchfuse.naming import find_model, named_parameters, unwrap_model
from torchfuse.params import (
    FreezeSchedule,
    FreezeSpec,
    FreezeStage,
    apply_freeze_specs,
    freeze_params,
    fusion_buffers,
    partition,
    parts_of,
    quantized_dtype,
)


class Lightning(nn.Module):
    """A training module as Lightning's: it has the model, a loss and a metric."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.loss = nn.CrossEntropyLoss()
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class Peft(nn.Module):
    """The modules around a model of peft: ``base_model.model``, and attributes that fall through."""

    def __init__(self, model):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model").model, name)

    def forward(self, *args, **kwargs):
        return self.base_model.model(*args, **kwargs)


HOLDERS = {
    "lightning": Lightning,
    "averaged": AveragedModel,
    "peft": Peft,
    "nested": lambda model: nn.ModuleDict({"module": Lightning(Peft(model))}),
    "compiled": lambda model: torch.compile(Lightning(torch.compile(model, backend="eager"))),
    "checkpointed": lambda model: Lightning(checkpoint_wrapper(model)),
}
every_holder = pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS.keys())


def make():
    return open_gates(model_of(encoder_trainable=True)).eval()


def named_values(model):
    for name, tensor in model.state_dict().items():
        yield name, tensor.dequantize() if quantized_dtype(tensor) else tensor


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


STAGES = FreezeSchedule(
    [
        FreezeSpec("encoder", True),
        FreezeStage(3, (FreezeSpec("decoder.layers.1", False), FreezeSpec("adapter", True))),
    ]
)

# What each returns, and what it does to the model, is compared.
ACTIONS = {
    "set_trainable": lambda model: set_trainable(model, decoder=True),
    "apply_freeze_specs": lambda model: apply_freeze_specs(
        model, [FreezeSpec("decoder.layers.*", False), FreezeSpec("fusion", True)]
    ),
    "freeze_params": lambda model: freeze_params(model, "encoder", "adapter.linear_1"),
    "schedule": lambda model: [
        STAGES.trained_ever(model),
        STAGES.apply(model, 0),
        STAGES.apply(model, 5),
    ],
    "param_groups": lambda model: [
        (group["name"], group["param_names"], group["lr"], shapes(dict(enumerate(group["params"]))))
        for group in param_groups(model, lr={"encoder": 0.1, "fusion": 0.2}, stages=[])
    ],
    "describe": lambda model: str(describe(model)),
    "parts": lambda model: {part: type(module) for part, module in parts_of(model).items()},
    "partition": lambda model: {part: shapes(own) for part, own in partition(model).items()},
    "names": lambda model: [name for name, _ in named_parameters(model)],
    "get_fusion_params": lambda model: shapes(get_fusion_params(model)),
    "fusion_buffers": lambda model: shapes(fusion_buffers(model)),
    "fusion_state_dict": lambda model: shapes(fusion_state_dict(model)),
    "quantize": lambda model: str(quantize_decoder(model)),
    "generate": lambda model: generate(
        model, text(), encoder_input=inputs(), max_new_tokens=5, temperature=0.0
    ).tolist(),
    "session": lambda model: answer(model).tolist(),
}


def quantize_decoder(model):
    set_trainable(model)
    return quantize(model, "int8_weight_only")


def answer(model):
    with Session(model, batch_size=2, max_tokens=30) as session:
        return session.answer(text(), max_new_tokens=3, sampling=Sampling(temperature=0.0))[0]


@pytest.mark.parametrize("act", ACTIONS.values(), ids=ACTIONS.keys())
@every_holder
def test_acting_on_a_module_around_a_model_is_acting_on_the_model(hold, act):
    torch._dynamo.reset()
    model, holder = make(), hold(make())
    inside = unwrap_model(holder)
    assert type(inside) is type(model) and inside is not holder
    assert act(holder) == act(model)
    assert trains(inside) == trains(model)
    assert [m.training for m in inside.modules()] == [m.training for m in model.modules()]
    values, expected = (dict(named_values(m)) for m in (inside, model))
    assert list(values) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in values.items())


@every_holder
def test_an_artifact_of_a_module_around_a_model_is_the_models(hold, tmp_path):
    torch.manual_seed(5)
    model = make()
    trained = list(names(model, "encoder"))
    with torch.no_grad():
        for parameter in get_fusion_params(model).values():
            parameter.normal_()
    holder = hold(model)
    for save, options in ((save_fusion, {}), (save_trained, {"trained": trained})):
        save(holder, tmp_path / "holder", **options)
        save(model, tmp_path / "model", **options)
        written = sorted(path.name for path in (tmp_path / "model").iterdir())
        assert sorted(path.name for path in (tmp_path / "holder").iterdir()) == written
        assert filecmp.cmpfiles(tmp_path / "model", tmp_path / "holder", written, shallow=False)[0] == (
            written
        )
        for other in (make(), hold(make())):
            (load_fusion if save is save_fusion else load_trained)(other, tmp_path / "holder")
            assert same_state(state(model), unwrap_model(other))
    given = fusion_state_dict(holder)
    other = hold(make())
    assert not any(load_fusion_state_dict(other, given))
    assert same_state(state(model), unwrap_model(other))
    other = hold(make())
    save_fusion(holder, tmp_path / "seed")
    assert seed_adapters(other, tmp_path / "seed") == [n for n in given if n.startswith("adapter.")]


@every_holder
def test_a_run_of_a_module_around_a_model_is_the_models(hold, tmp_path):
    def trained(model):
        optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2))
        unwrap_model(model)(text(), encoder_input=inputs()).square().mean().backward()
        optimizer.step()
        return optimizer

    holder = hold(make())
    optimizer = trained(holder)
    kept = FreezeSchedule().trained_ever(holder)
    if isinstance(holder, AveragedModel):  # its count would be lost
        with pytest.raises(CheckpointError, match="n_averaged is a buffer outside of the fused model"):
            save_checkpoint(tmp_path, holder, optimizer, step=1)
        assert not list(tmp_path.iterdir())
        holder = holder.module
    save_checkpoint(tmp_path, holder, optimizer, step=1, trained=kept)
    for other in (make(), hold(make())):
        again = trained(other)
        loaded = load_checkpoint(tmp_path, other, again)
        assert loaded.trainable == tuple(n for n, p in named_parameters(holder) if p.requires_grad)
        assert same_state(state(unwrap_model(holder)), unwrap_model(other))
        for one, two in zip(optimizer.state.values(), again.state.values(), strict=True):
            assert all(torch.equal(one[key], two[key]) for key in one)


@every_holder
def test_a_module_that_does_not_fit_is_refused_by_its_parts(hold, tmp_path):
    with pytest.raises(ConfigError, match="into encoder.nose: the model's parts are decoder, encoder"):
        load_pretrained(hold(make()), encoder={"nose": tmp_path})


def test_several_models_are_refused_by_their_paths():
    holder = nn.ModuleDict({"student": make(), "teacher": Lightning(make())})
    message = (
        "ModuleDict contains 2 fused models: student (DeepFusionModel), teacher.model (DeepFusionModel). "
        "Pass the one that is meant."
    )
    before = [trains(holder["student"]), trains(holder["teacher"].model)]
    for act in ACTIONS.values():
        with pytest.raises(ModelError, match=re.escape(message)):
            act(holder)
    assert [trains(holder["student"]), trains(holder["teacher"].model)] == before
    holder["teacher"] = holder["student"]  # one model under two names is one model
    assert find_model(holder) is holder["student"]


def test_parameters_outside_of_the_model_are_refused_by_their_names():
    holder = Lightning(make())
    holder.temperature = nn.Parameter(torch.ones(()))
    holder.heads = nn.ModuleList([nn.Linear(2, 3) for _ in range(5)])
    message = (
        r"Lightning has parameters outside of the fused model inside it \(model\): temperature, "
        r"heads\.0\.weight, .* and 3 more\. Pass the fused model"
    )
    for act in ACTIONS.values():
        with pytest.raises(ModelError, match=message):
            act(holder)
    tied = Lightning(make())
    tied.head = tied.model.decoder.layers[0].attn.q_proj
    assert find_model(tied) is tied.model


def test_a_module_without_a_fused_model_is_taken_as_it_is():
    projection = nn.Linear(3, 5)
    register_fusion_module(projection)
    model = Lightning(nn.Sequential(FusionEmbedding(11, 2, 3), projection, tiny_decoder()))
    assert find_model(model) is unwrap_model(model) is model
    assert list(get_fusion_params(model)) == [
        "model.0.fusion_embedding.weight",
        "model.1.weight",
        "model.1.bias",
    ]
    set_trainable(model)
    assert trains(model) == set(get_fusion_params(model))
    assert list(parts_of(model)) == ["decoder"]
