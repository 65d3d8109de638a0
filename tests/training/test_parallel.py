"""Options of several ranks, what is wrapped in a model, and a run whose ranks wait for each other."""

import re
import time

import pytest
import torch
from models.architectures import make, prompt
from ranks import run_on_ranks
from support import inputs, text
from torch import distributed
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from torchfuse import get_fusion_params, set_trainable
from torchfuse.errors import ConfigError, ModelError
from torchfuse.naming import named_parameters
from torchfuse.training import shard
from torchfuse.training.parallel import (
    Parallel,
    Watchdog,
    check_shared_directory,
    checkpoint_activations,
    compile_layers,
    layers_of,
)
from torchfuse.training.parallel.watchdog import key


@pytest.mark.parametrize(
    ("options", "world_size", "device", "problem"),
    [
        ({"strategy": "zero"}, 1, "cpu", "parallel.strategy=zero must be one of fsdp, ddp"),
        ({"tensor": 2}, 2, "cuda", "tensor parallelism is not implemented; use parallel.strategy=fsdp"),
        ({"context": 2}, 2, "cuda", "context parallelism is not implemented; use activation_checkp"),
        ({"timeout_minutes": 0}, 1, "cpu", "parallel.timeout_minutes=0 must be above 0"),
        (
            {"shard": 4},
            1,
            "cpu",
            "parallel.shard=4 must divide the number of ranks, 1; launch with",
        ),
        ({"shard": 2, "replicate": 2}, 8, "cuda", "must be the number of ranks, 8"),
        ({"replicate": 0}, 2, "cpu", "parallel.replicate=0 must be at least 1"),
        ({"strategy": "ddp", "shard": 2}, 2, "cpu", "parallel.shard are for parallel.strategy=fsdp"),
        ({}, 2, "mps", "device=mps has no communication between processes; run one process"),
        ({}, 2, "cuda:1", "device=cuda:1 is one device for 2 ranks"),
    ],
)
def test_options_that_do_not_fit(options, world_size, device, problem):
    [found] = Parallel(**options).problems(world_size, device)
    assert problem in found


def test_meshes():
    assert list(Parallel(shard=4, replicate=2).problems(8, "cuda")) == []
    assert Parallel(replicate=2).mesh_shape(6) == (2, 3)
    assert Parallel(shard=2).mesh_shape(6) == (3, 2)
    assert Parallel(shard=6).mesh_shape(6) is None


def test_a_model_that_leaves_modules_out_is_refused():
    with pytest.raises(ModelError, match='Several ranks need .* on_missing="participate"'):
        shard(make("cross_attention"))


@pytest.mark.parametrize("name", ["cross_attention", "placeholder", "mot", "moma", "deepstack"])
@pytest.mark.parametrize("encoder", [False, True])
def test_activations_of_layers_are_computed_again(name, encoder):
    def gradients(prepare):
        model = make(name)
        set_trainable(model, encoder=encoder)
        trained = [name for name, p in named_parameters(model) if p.requires_grad]
        found = prepare(model, trained)
        torch.manual_seed(3)  # of noise
        model(prompt(name), encoder_input=inputs()).square().mean().backward()
        return found, {n: p.grad for n, p in named_parameters(model) if p.requires_grad}, model

    _, expected, _ = gradients(lambda *_: None)
    wrapped, found, model = gradients(checkpoint_activations)
    assert wrapped == {"decoder": 3} | ({"encoder": 1} if encoder else {})
    checkpointed = [layer for layer in layers_of(model) if isinstance(layer, CheckpointWrapper)]
    assert len(checkpointed) == sum(wrapped.values())
    added = {id(p) for layer in checkpointed for p in layer.parameters()}
    in_layers = [p for n, p in get_fusion_params(model).items() if ".layers." in n]
    assert in_layers or name == "placeholder"
    assert all(id(p) in added for p in in_layers)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_layers_are_compiled():
    model = make("cross_attention")
    expected = model(text(), encoder_input=inputs())
    compile_layers(model, backend="aot_eager")
    assert len(layers_of(model)) == 4
    assert all(layer._compiled_call_impl is not None for layer in layers_of(model))
    torch.testing.assert_close(model(text(), encoder_input=inputs()), expected)


def wait_for(file):
    while not file.exists():
        time.sleep(0.05)


def hang(rank, report):
    watchdog = Watchdog(0.02, end=report.write_text if rank == 0 else lambda _: None)
    if rank:
        watchdog.enter("step 7, data")
        with watchdog:
            wait_for(report)
            distributed.barrier()
    else:
        with watchdog:
            distributed.distributed_c10d._get_default_store().wait([key(1)])
            watchdog.enter("step 7, model")
            distributed.barrier()


@pytest.mark.distributed
def test_ranks_that_wait_for_each_other_are_named(tmp_path):
    run_on_ranks(hang, tmp_path / "report")
    first, *ranks, _ = (tmp_path / "report").read_text().splitlines()
    assert re.fullmatch(r"error: rank 0 has waited for \d+ s in step 7, model\.", first)
    assert re.fullmatch(
        r"  rank 0: step 7, model, for \d+ s, in \w+ \(\S+distributed\S+:\d+\)", ranks[0]
    )
    assert re.fullmatch(r"  rank 1: step 7, data, for \d+ s, in wait_for \(\S+:\d+\)", ranks[1])


def test_without_ranks_nothing_is_watched():
    with Watchdog(1e-6, end=pytest.fail) as watchdog:
        watchdog.enter("step 1, data")
        time.sleep(0.01)


def directories(rank, folder):
    check_shared_directory(folder / "shared" / "run")
    own = folder / str(rank)
    own.mkdir()
    with pytest.raises(ConfigError, match=r"not the same directory on all ranks: rank 1 on \S+ cannot"):
        check_shared_directory(own / "run")
    distributed.barrier()
    assert not list(folder.rglob(".torchfuse*"))


@pytest.mark.distributed
def test_a_directory_that_is_not_shared_is_refused(tmp_path):
    (tmp_path / "shared").mkdir()
    run_on_ranks(directories, tmp_path)
