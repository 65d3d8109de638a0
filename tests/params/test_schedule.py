import json

import pytest
from params.freeze_support import BEGIN, TWO_STAGES, make, trains
from support import TinyEncoder, tiny_decoder
from torch import nn

from torchfuse import fuse, set_trainable
from torchfuse.params import (
    FreezeSchedule,
    FreezeSpec,
    FreezeStage,
    apply_freeze_specs,
    canonical_freeze_meta,
    effective_freeze,
    read_freeze_meta,
)

OFF, ON = FreezeSpec("encoder", True), FreezeSpec("encoder", False)
TOP = FreezeSpec("encoder.layers.2", False)


def encoder_trains(model):
    return any(n.startswith("encoder.") for n in trains(model))


# --- stages and what is in force -----------------------------------------------------------------


def test_specs_in_force_add_up_in_the_order_of_steps():
    late, early = FreezeStage(7, (TOP,)), FreezeStage(3, (ON, OFF))
    stages = [late, early]
    assert [len(effective_freeze(stages, step)) for step in (0, 2, 3, 6, 7, 100)] == [0, 0, 2, 2, 3, 3]
    assert effective_freeze(stages, 7) == (ON, OFF, TOP)
    assert effective_freeze([TOP, FreezeStage(0, (OFF,)), *stages], 3) == (TOP, OFF, ON, OFF)
    assert effective_freeze([OFF], 0) == (OFF,)
    assert effective_freeze([], 11) == ()


@pytest.mark.parametrize("step", [-1, 1.0, True, None])
def test_a_step_is_a_whole_number(step):
    with pytest.raises(ValueError, match="step must be a whole number from 0 on, got"):
        effective_freeze(TWO_STAGES, step)


@pytest.mark.parametrize(
    ("start_step", "specs", "complaints"),
    [
        (-1, (OFF,), ["start_step must be a whole number from 0 on, got -1"]),
        (True, (), ["start_step must be a whole number from 0 on, got True", "at least one FreezeSpec"]),
        (2.0, OFF, ["got 2.0", "specs must be a sequence of at least one FreezeSpec"]),
        (0, ("encoder", OFF), ["specs must be FreezeSpecs, got 'encoder'"]),
    ],
    ids=["negative", "bool", "float", "strings"],
)
def test_a_stage_that_is_none_is_refused_when_it_is_made(start_step, specs, complaints):
    with pytest.raises(ValueError, match="^FreezeStage: ") as caught:
        FreezeStage(start_step, specs)
    for complaint in complaints:
        assert complaint in str(caught.value)


def test_stages_are_unique():
    twice = [FreezeStage(5, (OFF,)), FreezeStage(3, (OFF,)), FreezeStage(5, (ON,))]
    for use in (FreezeSchedule, canonical_freeze_meta, lambda s: effective_freeze(s, 1)):
        with pytest.raises(ValueError, match="2 stages start at step 5; make them one"):
            use(twice)
    with pytest.raises(ValueError, match="expected FreezeStages, got 'encoder'"):
        FreezeSchedule(["encoder"])


# --- the record ----------------------------------------------------------------------------------


def test_the_record_comes_back_through_json_with_its_order():
    stages = (FreezeStage(0, (OFF, TOP, OFF)), FreezeStage(5, (ON,)))
    meta = json.loads(json.dumps(canonical_freeze_meta(reversed(stages))))
    assert read_freeze_meta(meta) == stages
    assert canonical_freeze_meta(FreezeSchedule(stages)) == meta
    assert [s["module"] for s in meta[0]["specs"]] == ["encoder", "encoder.layers.2", "encoder"]


def test_bad_records_name_every_problem():
    spec = {"module": "encoder", "frozen": True}
    meta = [
        {"start_step": 0, "specs": [spec, {"module": "encoder.", "frozen": "no"}]},
        {"start": 3, "specs": [spec]},
        {"start_step": -3, "specs": [spec]},
        {"start_step": 4, "specs": "encoder"},
        {"start_step": 5, "specs": [{"module": "encoder"}, "adapter"]},
        "stage",
        {"start_step": 6, "specs": []},
    ]
    with pytest.raises(ValueError, match="^Freeze stages: ") as caught:
        read_freeze_meta(meta)
    for problem in (
        "stage 0, spec 1: FreezeSpec: module 'encoder.' has an empty component",
        "frozen must be true (freeze) or false (let train), got 'no'",
        "stage 1 must have the keys start_step and specs, got the keys start, specs",
        "stage 2: FreezeStage: start_step must be a whole number from 0 on, got -3",
        "stage 3: FreezeStage: specs must be a sequence of at least one FreezeSpec, got 'encoder'",
        "stage 4, spec 0 must have the keys module and frozen, got the keys module",
        "stage 4, spec 1 must have the keys module and frozen, got 'adapter'",
        "stage 5 must have the keys start_step and specs, got 'stage'",
        "stage 6: FreezeStage: specs must be a sequence of at least one FreezeSpec, got []",
    ):
        assert problem in str(caught.value)
    with pytest.raises(ValueError, match="Freeze stages must be a list, got 'encoder'"):
        read_freeze_meta("encoder")
    with pytest.raises(ValueError, match="2 stages start at step 1"):
        read_freeze_meta([{"start_step": 1, "specs": [spec]}] * 2)


# --- applying ------------------------------------------------------------------------------------


def test_each_stage_is_applied_exactly_at_its_step():
    model, schedule = make(), FreezeSchedule(TWO_STAGES)
    seen = [(schedule.apply(model, step), encoder_trains(model)) for step in range(6)]
    assert seen == [(step in (0, BEGIN), step >= BEGIN) for step in range(6)]


def test_a_stage_on_a_skipped_step_applies_at_the_next_one():
    model, schedule = make(), FreezeSchedule(TWO_STAGES)
    schedule.apply(model, BEGIN - 1)
    assert not encoder_trains(model)
    assert schedule.apply(model, BEGIN + 2)
    assert encoder_trains(model)
    three = FreezeSchedule([FreezeStage(4, (ON,)), FreezeStage(5, (FreezeSpec("adapter", True),))])
    other = make()
    three.apply(other, 3)
    three.apply(other, 9)
    assert encoder_trains(other)
    assert not any(n.startswith("adapter.") for n in trains(other))


def test_a_stage_at_step_zero_applies():
    model = make(encoder_trainable=True)
    assert FreezeSchedule([FreezeStage(0, (OFF,))]).apply(model, 0)
    assert not encoder_trains(model)


def test_applying_again_changes_nothing_and_undoes_what_others_did():
    model, schedule = make(), FreezeSchedule(TWO_STAGES)
    schedule.apply(model, 0)
    before = trains(model)
    assert not schedule.apply(model, 0)
    assert trains(model) == before
    set_trainable(model, decoder=True)
    assert schedule.apply(model, 1)
    assert trains(model) == before


def test_apply_returns_false_for_a_stage_that_changes_nothing():
    schedule = FreezeSchedule([FreezeStage(0, (OFF,)), FreezeStage(2, (OFF,))])
    model = make(encoder_trainable=True)
    assert [schedule.apply(model, step) for step in range(4)] == [True, False, False, False]


def test_one_schedule_serves_two_models():
    schedule, models = FreezeSchedule(TWO_STAGES), [make(), make()]
    for step in (0, BEGIN):
        assert [schedule.apply(model, step) for model in models] == [True, True]
    assert encoder_trains(models[0]) and encoder_trains(models[1])


def test_a_schedule_without_stages_changes_nothing():
    model = make()
    before = trains(model)
    assert not FreezeSchedule().apply(model, 0)
    assert trains(model) == before == FreezeSchedule().trained_ever(model)


@pytest.mark.parametrize("order", [(OFF, TOP), (TOP, OFF)], ids=["top-last", "top-first"])
def test_overlapping_patterns_give_the_same_mask_after_a_resume(order):
    """Live, the stages come one by one; resumed, all at once, from what the record says."""
    stages = [
        FreezeStage(0, (ON,)),
        FreezeStage(2, order),
        FreezeStage(5, (FreezeSpec("encoder.layers.?.linear.bias", False), FreezeSpec("fusion", True))),
        FreezeStage(7, (FreezeSpec("encoder.layers.1", True), FreezeSpec("adapter", False))),
    ]
    for end in range(9):
        live, schedule = make(), FreezeSchedule(stages)
        for step in range(end + 1):
            schedule.apply(live, step)
        read = read_freeze_meta(json.loads(json.dumps(canonical_freeze_meta(stages))))
        resumed, direct = make(), make()
        FreezeSchedule(read).apply(resumed, end)
        apply_freeze_specs(direct, effective_freeze(read, end))
        assert trains(live) == trains(resumed) == trains(direct), end
    one, other = make(), make()
    apply_freeze_specs(one, order)
    apply_freeze_specs(other, reversed(order))
    assert trains(one) != trains(other)
    assert canonical_freeze_meta(order) != canonical_freeze_meta(reversed(order))


def test_bad_patterns_are_refused_before_the_first_step():
    """Every stage is held against the model at the first step, and all problems are one error."""
    stages = [
        FreezeStage(0, (OFF,)),
        FreezeStage(500, (FreezeSpec("encoder.layer.2", False), ON)),
        FreezeStage(900, (FreezeSpec("adaptor", False),)),
    ]
    model = make(encoder_trainable=True)
    before = trains(model)
    for use in (
        lambda s: s.apply(model, 0),
        lambda s: s.check(model),
        lambda s: s.trained_ever(model),
    ):
        with pytest.raises(ValueError, match="The freeze stages do not fit the model") as caught:
            use(FreezeSchedule(stages))
        assert "stage at step 500: 'encoder.layer.2' matches no parameter; encoder has" in str(
            caught.value
        )
        assert "stage at step 900: 'adaptor' matches no parameter" in str(caught.value)
        assert trains(model) == before


# --- what some stage trains ----------------------------------------------------------------------


def test_trained_ever_is_the_union_over_the_steps():
    stages = [
        FreezeStage(0, (FreezeSpec("*", True), FreezeSpec("adapter", False))),
        FreezeStage(2, (FreezeSpec("adapter", True), TOP)),
        FreezeStage(3, (FreezeSpec("encoder.layers.2", True), FreezeSpec("decoder.norm", False))),
    ]
    model, schedule = make(), FreezeSchedule(stages)
    ever = schedule.trained_ever(model)
    live = set()
    for step in range(5):
        schedule.apply(model, step)
        live |= set(trains(model))
        if step == 0:
            assert schedule.trained_ever(model) == ever
    assert set(ever) == live
    assert ever == [n for n, _ in model.named_parameters() if n in live]
    assert not any("fusion_layer" in n for n in ever)  # trained before the first stage, which is step 0


def test_what_trains_before_the_first_stage_counts():
    model = make()
    ever = FreezeSchedule([FreezeStage(1, (FreezeSpec("fusion", True), ON))]).trained_ever(model)
    assert set(ever) == {
        *trains(model),
        *(n for n, _ in model.named_parameters() if n.startswith("encoder.")),
    }


def test_steps_at_which_nothing_trains_are_named():
    model = make()
    with pytest.raises(
        ValueError, match="Nothing trains from step 0, 7 on: add a spec with frozen=False"
    ):
        FreezeSchedule(
            [FreezeSpec("*", True), FreezeStage(3, (ON,)), FreezeStage(7, (OFF,))]
        ).trained_ever(model)


def test_every_architecture_and_every_module():
    early = fuse(tiny_decoder(), TinyEncoder(), arch="joint_decoder", placement="prefix")
    for model, name in ((early, "encoder"), (nn.Sequential(nn.Linear(2, 3)), "0")):
        schedule = FreezeSchedule([FreezeSpec("*", True), FreezeStage(1, (FreezeSpec(name, False),))])
        schedule.apply(model, 0)
        assert trains(model) == []
        schedule.apply(model, 1)
        assert trains(model) == [n for n, _ in model.named_parameters() if n.startswith(f"{name}.")]
