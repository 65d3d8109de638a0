"""The adapter first, then the adapter and the encoder: live, compiled, sharded and resumed."""

import pytest
import torch
from contract.views import checkpointed_inside, checkpointed_outside
from params.freeze_support import (
    BEGIN,
    TWO_STAGES,
    adamw,
    equal,
    make,
    run,
    step,
    still_until_its_stage,
    trains,
    two_stage_run,
    values,
)
from ranks import run_on_ranks
from support import inputs, text
from torch import distributed

from torchfuse import get_fusion_params, param_groups
from torchfuse.checkpoint import load_checkpoint, save_checkpoint
from torchfuse.errors import ConfigError
from torchfuse.naming import named_parameters
from torchfuse.params import FreezeSchedule, FreezeSpec, FreezeStage, freeze_params
from torchfuse.training import shard

# --- one process ---------------------------------------------------------------------------------


def compiled(model):
    return torch.compile(model, backend="aot_eager")


def layers_compiled(model):
    for layer in [*model.layers, *model.encoder.layers]:
        layer.compile(backend="aot_eager")
    return model


def plain(model):
    return model


WRAPPERS = [plain, checkpointed_inside, checkpointed_outside, compiled, layers_compiled]


@pytest.fixture(scope="module")
def eager():
    model, seen = two_stage_run()
    return values(model), seen


# PyTorch looks at it itself where a graph begins at a layer.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda w: w.__name__)
def test_the_encoder_is_bit_equal_until_its_stage_and_moves_after_it(wrap, eager):
    torch.compiler.reset()
    model, seen = two_stage_run(wrap)
    assert still_until_its_stage(seen)
    for name, value in values(model).items():
        torch.testing.assert_close(value, eager[0][name], rtol=1e-4, atol=1e-5, msg=name)


def test_what_never_trains_never_moves(eager):
    start = values(make())
    moved = {name for name, value in eager[0].items() if not torch.equal(value, start[name])}
    assert {name.split(".")[0] for name in moved} == {"adapter", "encoder"}


@pytest.mark.parametrize(
    ("wrap", "end"),
    [(plain, 1), (plain, BEGIN), (plain, BEGIN + 2), (compiled, BEGIN + 1)],
    ids=["before", "at", "after", "compiled"],
)
def test_a_resumed_run_ends_bit_equal_to_one_without_interruption(tmp_path, wrap, end):
    torch.compiler.reset()
    whole, _ = two_stage_run(wrap)

    first = wrap(make().train())
    schedule = FreezeSchedule(TWO_STAGES)
    optimizer = adamw(first, schedule)
    run(first, optimizer, schedule, range(end))
    save_checkpoint(tmp_path, first, optimizer, step=end)

    fresh = wrap(make(seed=5).train())
    assert not equal(values(fresh), values(first))
    schedule = FreezeSchedule(TWO_STAGES)
    optimizer = adamw(fresh, schedule)
    at = load_checkpoint(tmp_path, fresh, optimizer).step
    run(fresh, optimizer, schedule, range(at, 6))
    assert equal(values(fresh), values(whole))
    assert trains(fresh) == trains(whole)


# --- the optimizer -------------------------------------------------------------------------------


def test_a_later_stage_trains_what_was_frozen_at_first():
    """All that some stage trains is in the groups from the start: named, disjoint and complete."""
    model, schedule = make(), FreezeSchedule(TWO_STAGES)
    schedule.apply(model, 0)
    groups = param_groups(model, lr={"encoder": 1e-4, "fusion": 1e-3}, stages=schedule)
    assert [(g["name"], g["lr"]) for g in groups] == [("encoder", 1e-4), ("fusion", 1e-3)]
    listed = [n for g in groups for n in g["param_names"]]
    by_name = dict(named_parameters(model))
    assert [id(p) for g in groups for p in g["params"]] == [id(by_name[n]) for n in listed]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(schedule.trained_ever(model))
    assert [g["name"] for g in param_groups(model, lr=1.0)] == ["fusion"]
    with pytest.raises(
        ConfigError, match="lr must name the parts that train, encoder, fusion.*missing: encoder"
    ):
        param_groups(model, lr={"fusion": 1e-3}, stages=schedule)
    with pytest.raises(ConfigError, match="stage at step 0: 'nose' matches no parameter"):
        param_groups(model, lr=1.0, stages=[FreezeSpec("nose", True)])


def test_what_is_frozen_has_no_gradient_no_state_and_no_decay():
    model, schedule = make().train(), FreezeSchedule(TWO_STAGES)
    optimizer = adamw(model, schedule)
    encoder = list(model.encoder.parameters())
    for number in range(BEGIN):
        schedule.apply(model, number)
        step(model, optimizer, number)
        assert all(p.grad is None for p in encoder)
        assert not any(p in optimizer.state for p in encoder)
    schedule.apply(model, BEGIN)
    step(model, optimizer, BEGIN)
    assert all(optimizer.state[p]["step"] == 1 for p in encoder)


def test_parameters_frozen_during_a_run_stay_constant():
    stages = [FreezeSpec("encoder", False), FreezeStage(2, (FreezeSpec("encoder.layers.1", True),))]
    model, schedule = make().train(), FreezeSchedule(stages)
    optimizer = adamw(model, schedule)
    seen = run(model, optimizer, schedule, range(2))
    tokens = text()
    model(tokens, encoder_input=inputs()).square().mean().backward()  # gradients that nobody took away
    schedule.apply(model, 2)
    assert all(p.grad is None for p in model.encoder.layers[1].parameters())
    optimizer.zero_grad(set_to_none=False)
    counts = {p: int(optimizer.state[p]["step"]) for p in model.encoder.layers[1].parameters()}
    seen += run(model, optimizer, schedule, range(2, 5))
    for name, value in seen[2].items():
        assert torch.equal(value, seen[-1][name]) == name.startswith("encoder.layers.1."), name
    assert {p: int(optimizer.state[p]["step"]) for p in counts} == counts


def test_frozen_parameters_do_not_count_in_the_clip_norm():
    model, schedule = make().train(), FreezeSchedule(TWO_STAGES)
    optimizer = adamw(model, schedule)
    schedule.apply(model, 0)
    alone = make().train()
    freeze_params(alone, "*")
    freeze_params(alone, "adapter", frozen=False)
    reference = torch.optim.AdamW(param_groups(alone, lr=1e-2, weight_decay=0.1))
    assert torch.equal(step(model, optimizer, 0), step(alone, reference, 0))
    more = make(encoder_trainable=True).train()
    assert step(more, adamw(more, ()), 0) > 1.01 * step(alone, reference, 0)


# --- two ranks -----------------------------------------------------------------------------------


def no_grad_forward(model):
    """An evaluation; FSDP2 leaves whole parameters of the root behind."""
    with torch.no_grad():
        model(text(), encoder_input=inputs())


def sharded_run(folder):
    model, schedule = make().train(), FreezeSchedule(TWO_STAGES)
    shard(model)
    no_grad_forward(model)
    optimizer = adamw(model, schedule)
    seen = []
    for number in range(6):
        seen.append(values(model, "encoder."))
        no_grad_forward(model)
        schedule.apply(model, number)
        step(model, optimizer, number)
        if number == BEGIN:
            save_checkpoint(folder, model, optimizer, step=number + 1)
    assert still_until_its_stage([*seen, values(model, "encoder.")])
    alone, _ = two_stage_run()  # both ranks see what this one sees
    sharded, single = values(model), values(alone)
    assert sharded.keys() == single.keys()
    for name, value in sharded.items():
        torch.testing.assert_close(value, single[name], rtol=1e-4, atol=1e-5, msg=name)

    fresh, schedule = make(seed=5).train(), FreezeSchedule(TWO_STAGES)
    shard(fresh)
    optimizer = adamw(fresh, schedule)
    at = load_checkpoint(folder, fresh, optimizer).step
    run(fresh, optimizer, schedule, range(at, 6))
    assert equal(values(fresh), sharded)
    assert trains(fresh) == trains(alone)


def partly_frozen(rank):
    def mean_of_both(model):
        total = 0.0
        for number in range(2):
            total = total + model(text(seed=number), encoder_input=inputs(seed=number)).square().mean()
        return total / 2

    specs = ["encoder.layers.1", "encoder.norm.bias", "decoder.layers.2.attn"]
    model, alone = make(), make()
    shard(model)
    for each in (model, alone):
        freeze_params(each, *specs, frozen=False)
    optimizer, reference = (torch.optim.SGD(param_groups(m, lr=0.1)) for m in (model, alone))
    for _ in range(3):
        model(text(seed=rank), encoder_input=inputs(seed=rank)).square().mean().backward()
        mean_of_both(alone).backward()
        for one, other in zip(model.parameters(), alone.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None) == (not one.requires_grad)
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    sharded, single = values(model), values(alone)
    for name, value in sharded.items():
        torch.testing.assert_close(value, single[name], rtol=1e-5, atol=1e-6, msg=name)
        both = [torch.empty_like(value) for _ in range(2)]
        distributed.all_gather(both, value)
        assert torch.equal(*both), name
    moved = [n for n, value in values(make()).items() if not torch.equal(value, sharded[n])]
    assert any(n.startswith("encoder.layers.1.") for n in moved)
    assert not any(n.startswith("encoder.layers.0.") for n in moved)


@pytest.mark.distributed
def test_ranks_agree_on_a_partly_frozen_encoder():
    run_on_ranks(partly_frozen)


def chosen_after_an_evaluation():
    model = make()
    shard(model)
    sharded = [id(p) for p in model.parameters()]
    no_grad_forward(model)
    assert [id(p) for p in model.parameters()] != sharded  # FSDP2 shows whole ones now
    groups = param_groups(model, lr=1.0)
    assert {id(p) for g in groups for p in g["params"]} <= set(sharded)
    assert {n for g in groups for n in g["param_names"]} == set(get_fusion_params(model))
    no_grad_forward(model)
    freeze_params(model, "*")
    assert [id(p) for p in model.parameters()] == sharded
    assert not any(p.requires_grad for p in model.parameters())
    no_grad_forward(model)
    assert not any(p.requires_grad for p in model.parameters())


def of_two_dtypes():
    model = make().train()
    model.encoder.double()
    schedule = FreezeSchedule([FreezeStage(1, (FreezeSpec("encoder", False),))])
    shard(model)
    optimizer = adamw(model, schedule)
    alone = make().train()
    alone.encoder.double()
    reference = adamw(alone, schedule)
    for each, its in ((model, optimizer), (alone, reference)):
        run(each, its, FreezeSchedule(schedule), range(3))
    sharded, single = values(model), values(alone)
    for name, value in sharded.items():
        torch.testing.assert_close(value, single[name], rtol=1e-4, atol=1e-5, msg=name)
    both = make(encoder_trainable=True).train()
    both.encoder.double()
    shard(both)
    step(both, adamw(both, ()), 0)
    assert {p.dtype for p in both.encoder.parameters()} == {torch.float64}


def sharded(rank, folder):
    sharded_run(folder)
    chosen_after_an_evaluation()
    of_two_dtypes()


@pytest.mark.distributed
def test_two_ranks_train_and_resume_as_one_process(tmp_path):
    """Also what is chosen after an evaluation, and an encoder of another dtype than the decoder's."""
    run_on_ranks(sharded, tmp_path)


def test_the_runs_here_can_fail():
    """A loop that forgets the schedule, or builds the optimizer without it, is told apart."""
    model = make().train()
    freeze_params(model, "*")
    freeze_params(model, "adapter", frozen=False)
    forgotten = run(model, torch.optim.AdamW(param_groups(model, lr=1e-2)), FreezeSchedule(), range(6))
    assert not still_until_its_stage(forgotten)
    model, schedule = make().train(), FreezeSchedule(TWO_STAGES)
    schedule.apply(model, 0)
    assert not still_until_its_stage(run(model, adamw(model, ()), schedule, range(6)))
