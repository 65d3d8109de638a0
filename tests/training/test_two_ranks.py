"""Two ranks train as one process does that runs their batches, with images on some ranks only."""

from types import SimpleNamespace

import pytest
import torch
from models.architectures import ARCHS, in_place, make, prompt
from ranks import run_on_ranks
from support import FEATURES, IMAGE, inputs, text
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchfuse.recipes.finetune_config import Config, Train
from torchfuse.recipes.finetune_trainer import Trainer

from torchfuse import add_lora, set_trainable
from torchfuse.data.loading import Cursor
from torchfuse.errors import ModelError
from torchfuse.naming import named_parameters
from torchfuse.params import FreezeSchedule, FreezeSpec, FreezeStage
from torchfuse.training import keep_in_fp32, shard
from torchfuse.training.parallel import Parallel, checkpoint_activations, compile_layers
from torchfuse.training.progress import Progress, StepMetrics

BATCHES = 4  # of a step, on all ranks together
STRATEGIES = [{"strategy": "fsdp"}, {"strategy": "ddp"}]


class Batches:
    """The batches of every step, dealt out to ranks as ``StepLoader`` does."""

    formats = SimpleNamespace(by_encoder={"": SimpleNamespace(token=IMAGE)})
    transform = SimpleNamespace(pad_id=0, formats=formats)
    samples = SimpleNamespace(digest="")

    def __init__(self, name, num_steps):
        self.name, self.num_steps, self.steps_per_epoch = name, num_steps, num_steps
        self.skipped, self.too_long = [], 0
        self.world_size = distributed.get_world_size() if distributed.is_initialized() else 1
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0

    def steps(self, cursor):
        for step in range(self.num_steps):
            numbers = range(step * BATCHES + self.rank, (step + 1) * BATCHES, self.world_size)
            yield [self.batch(number) for number in numbers], Cursor()

    def batch(self, number):
        """Text, in some batches with an image; the second rank has nothing to learn in the first step."""
        chance = torch.Generator().manual_seed(number)
        length = int(torch.randint(11, 17, (), generator=chance))
        labels = text(1, length, seed=number)
        labels[:, : int(torch.randint(2, 9, (), generator=chance))] = -100
        if number < BATCHES and number % 2:
            labels[:] = -100
        if torch.rand((), generator=chance) < 0.5:
            return {"tokens": text(1, length, seed=number), "labels": labels}
        tokens = prompt(self.name if in_place(self.name) else "", 1, length)
        tokens[:, :2] = text(1, 2, seed=number)
        return {
            "tokens": tokens,
            "labels": labels.masked_fill(tokens == IMAGE, -100),
            "encoder_input": inputs(1, seed=number),
            "encoder_mask": torch.ones(1, length, FEATURES, dtype=torch.bool),
        }


def train(name, num_steps, *, prepare=None, stages=(), dtype="fp32", **parallel):
    """The gradients of the first step, the losses and the trained weights, by name."""
    model = make(name, on_missing="participate")
    if prepare is not None:
        prepare(model)
    batches = Batches(name, num_steps)
    options = Train(
        lr=3e-3,
        lr_schedule="constant",
        clip_grad_norm=None,
        gradient_accumulation_steps=BATCHES // batches.world_size,
    )
    config = Config(output_dir="", train=options, parallel=Parallel(**parallel), dtype=dtype)
    trainer = Trainer(model, FreezeSchedule(stages), batches, config)
    gradients = {}

    def keep(*_):
        if not gradients:
            gradients.update({n: whole(p.grad) for n, p in named_parameters(model) if p.requires_grad})

    trainer.optimizer.register_step_pre_hook(keep)
    progress = Progress(num_steps, 0, device=trainer.device, log=lambda _: None, shown=False)
    record = trainer.train(progress, lambda: 0.0)
    weights = {name: whole(p) for name, p in named_parameters(model)}
    return gradients, [loss for _, loss in record.losses], weights


def whole(tensor):
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().clone()


def difference(found, expected):
    """The norm of the difference of all tensors, relative to that of the expected ones."""
    assert found.keys() == expected.keys()
    apart = torch.stack([(found[n] - expected[n]).double().norm() for n in expected]).norm()
    return float(apart / torch.stack([expected[n].double().norm() for n in expected]).norm())


def on_each_rank(rank, name, num_steps, expected, runs):
    for options in runs:
        gradients, losses, weights = train(name, num_steps, **options)
        assert difference(gradients, expected[0]) < 1e-6, options
        assert losses == pytest.approx(expected[1], rel=1e-4), options
        assert difference(weights, expected[2]) < 1e-3, options


def check(name, num_steps=3, world_size=2, *, prepare=None, stages=(), parallel=({},)):
    """Compare one process with ranks that are started once, for each of several ``parallel`` sections."""
    same = {"prepare": prepare, "stages": stages}
    one = train(name, num_steps, **same)
    assert len(one[1]) == num_steps
    assert one[1][-1] != one[1][0]
    runs = [same | options for options in parallel]
    run_on_ranks(on_each_rank, name, num_steps, one, runs, world_size=world_size)


def with_lora(model):
    """LoRA with dropout in the decoder, with values of a training, so that all of it has gradients."""
    assert add_lora(model, rank=2, alpha=4, dropout=0.1)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in named_parameters(model):
            if "lora_b" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)


def train_all(model):
    set_trainable(model, decoder=True, encoder=True)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ARCHS)
def test_two_ranks_equal_one_process(name):
    check(name)


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.parametrize("prepare", [None, train_all, with_lora], ids=["fusion", "all", "lora"])
@pytest.mark.parametrize("name", ARCHS)
def test_two_ranks_equal_one_process_for_many_steps(name, prepare):
    check(name, 50, prepare=prepare, parallel=STRATEGIES)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["cross_attention", "moma_placeholder"])
def test_ddp_follows_what_trains(name):
    """In the second step the decoder starts to train, in the third the encoder stops."""
    stages = (
        FreezeStage(1, (FreezeSpec("decoder", False),)),
        FreezeStage(2, (FreezeSpec("encoder", True),)),
    )
    check(name, stages=stages, parallel=STRATEGIES)


@pytest.mark.distributed
def test_two_replicas_of_two_shards():
    less_memory = {"shard": 2, "reduce_every_batch": True, "reshard_after_forward": False}
    check("cross_attention", world_size=4, prepare=train_all, parallel=[{"replicate": 2}])
    check("mot", world_size=4, parallel=[less_memory])


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["cross_attention", "placeholder"])
def test_lora_on_two_ranks(name):
    check(name, prepare=with_lora, parallel=STRATEGIES)


def checkpointed_and_compiled(model):
    trained = [name for name, p in named_parameters(model) if p.requires_grad]
    assert checkpoint_activations(model, trained) == {"decoder": 3, "encoder": 1}
    compile_layers(model, backend="aot_eager")


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_layers_that_are_checkpointed_and_compiled_are_sharded():
    check("cross_attention", prepare=checkpointed_and_compiled)


def in_bf16(model):
    model.to(torch.bfloat16)
    keep_in_fp32(model, [n for n, p in named_parameters(model) if p.requires_grad])


def low_precision(rank, expected):
    gradients, losses, weights = train("cross_attention", 3, prepare=in_bf16, dtype="bf16")
    # FSDP2 gathers weights in bf16, which autocast does not do to norms and gates.
    assert losses == pytest.approx(expected[1], rel=0.02)
    assert difference(gradients, expected[0]) < 0.05
    dtypes = {name: weight.dtype for name, weight in weights.items()}
    assert dtypes == {name: weight.dtype for name, weight in expected[2].items()}
    assert {dtypes[name] for name in gradients} == {torch.float32}


@pytest.mark.distributed
def test_fp32_weights_are_sharded_beside_bf16_ones():
    expected = train("cross_attention", 3, prepare=in_bf16, dtype="bf16")
    assert torch.bfloat16 in {weight.dtype for weight in expected[2].values()}
    run_on_ranks(low_precision, expected)


class Reductions(TorchDispatchMode):
    """The names of the operations that reduce and scatter."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "reduce_scatter" in str(function):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def count_reductions(rank):
    model = make("cross_attention", every=2, encoder_trainable=False, on_missing="participate")
    batches = Batches("cross_attention", 1)
    config = Config(output_dir="", train=Train(gradient_accumulation_steps=2))
    checkpoint_activations(model, [])
    trainer = Trainer(model, FreezeSchedule(()), batches, config)
    [(step, _)] = batches.steps(Cursor())
    units = [model.decoder.layers[1], model]  # a layer with a fusion layer; the adapter in the root
    assert all(any(p.requires_grad for p in unit.parameters()) for unit in units)
    with Reductions() as reductions:
        trainer._backward(step, StepMetrics())
    assert len(reductions.names) == len(units)
    with pytest.raises(ModelError, match="distributed already"):
        shard(model)


@pytest.mark.distributed
def test_what_is_frozen_is_not_reduced_and_a_step_reduces_once():
    run_on_ranks(count_reductions)
