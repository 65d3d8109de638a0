"""An architecture that is registered works wherever the built-in ones do.

The class is in ``greeting``; the recipe runs it in ``tests/recipes/test_architectures_by_name.py``.
"""

import pytest
import torch
from greeting import ARCH, GreetingStrategy, register
from ranks import run_on_ranks
from support import TinyEncoder, inputs, text, tiny_decoder
from torch import distributed

from torchfuse import (
    describe,
    from_pretrained,
    fuse,
    generate,
    get_fusion_params,
    load_fusion,
    param_groups,
    save_fusion,
    save_pretrained,
)
from torchfuse.encoders.clip import ClipVisionEncoder
from torchfuse.models import (
    FusedModel,
    JointDecoderStrategy,
    ModalityContext,
    ModalityStrategy,
    VLMWrapper,
    build_modality_strategy,
    build_vlm_wrapper,
    register_modality_strategy,
    strategy,
)
from torchfuse.models.decoders.llama import llama_decoder
from torchfuse.params import FreezeSpec, apply_freeze_specs
from torchfuse.training import shard
from torchfuse.training.loss import next_token_loss


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    register(monkeypatch)


def make(**options):
    return fuse(tiny_decoder(), TinyEncoder(), arch=ARCH, **options)


def moved(model):
    with torch.no_grad():
        for parameter in get_fusion_params(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def test_fuses_and_is_the_decoder_where_there_is_no_image():
    model = make(scale=3.0)
    assert type(model) is FusedModel
    assert model.strategy == GreetingStrategy(3.0) == build_modality_strategy(ARCH, scale=3.0)
    assert "fusion" in str(describe(model))
    assert torch.equal(model(text()), tiny_decoder()(text()))
    out = model(text(), encoder_input=inputs())
    assert (out - model(text(), encoder_input=inputs(seed=9))).abs().amax(dim=(0, 2)).min() > 1e-4
    none = torch.zeros(2, 7, dtype=torch.bool)
    assert torch.equal(model(text(), encoder_input=inputs(), encoder_mask=none), model(text()))
    assert not torch.equal(make(scale=1.0)(text(), encoder_input=inputs()), out)


def test_its_options_are_its_own():
    with pytest.raises(ValueError, match="architecture 'greeting': unknown option 'start'; it takes sc"):
        make(start="warm")
    with pytest.raises(ValueError, match="scale must be a number, got 'big'"):
        make(scale="big")
    with pytest.raises(ValueError, match="cannot be given beside a GreetingStrategy, which has its op"):
        fuse(tiny_decoder(), TinyEncoder(), arch=GreetingStrategy(), scale=2.0)
    with pytest.raises(
        ValueError, match="There is an architecture 'greeting' already: GreetingStrategy"
    ):
        register_again()
    assert torch.equal(
        fuse(tiny_decoder(), TinyEncoder(), arch=GreetingStrategy(2.0))(text()), make(scale=2.0)(text())
    )


def register_again():
    register_modality_strategy(ARCH)(GreetingStrategy)


def test_it_has_no_layers_to_count():
    with pytest.raises(ValueError, match="every=2 cannot be given: GreetingStrategy fuses no layer"):
        make(every=2)


def prepared(self, model, tokens, features, **call):
    return ModalityContext(tokens)


class Unprepared(ModalityStrategy):
    scale: float = 1.0


class Unfielded(ModalityStrategy):
    prepare = prepared

    def __init__(self, scale=1.0): ...


class Unreadable(ModalityStrategy):
    prepare = prepared
    scale: "NoSuchName" = 1.0  # noqa: F821


@pytest.mark.parametrize(
    ("cls", "complaint"),
    [
        (
            Unprepared,
            "Unprepared'> cannot be the architecture 'sixth': it must have the methods prepare",
        ),
        (Unfielded, "it must be a dataclass, whose fields are its options, and have no __init__"),
        (Unreadable, r"the annotations of its options cannot be read \(name 'NoSuchName' is not def"),
        (dict, "<class 'dict'> cannot .*: it must be a class below ModalityStrategy"),
        (GreetingStrategy(), r"^GreetingStrategy\(.*it must be a class below ModalityStrategy"),
        (JointDecoderStrategy, "it is 'joint_decoder' already, and a class has one name"),
    ],
    ids=["abstract", "own init", "unreadable", "dict", "instance", "second name"],
)
def test_a_class_that_is_no_architecture_is_not_registered(cls, complaint):
    known, options = dict(strategy._REGISTRY), vars(cls).copy()
    with pytest.raises(ValueError, match=complaint):
        register_modality_strategy("sixth")(cls)
    assert known == strategy._REGISTRY
    assert dict(vars(cls)) == dict(options)
    assert build_modality_strategy("joint_decoder", placement="prefix").arch == "joint_decoder"


@pytest.mark.parametrize("name", ["", 3, None, GreetingStrategy], ids=str)
def test_a_name_is_a_string_that_is_not_empty(name):
    with pytest.raises(
        ValueError, match=r'that is not empty: @register_modality_strategy\("mine"\)\. Got'
    ):
        register_modality_strategy(name)


def test_a_name_belongs_to_one_class():
    class Other(ModalityStrategy):
        prepare = prepared

    with pytest.raises(ValueError, match="There is an architecture 'mot' already: MoTStrategy"):
        register_modality_strategy("mot")(Other)
    assert not hasattr(Other, "arch")


def test_pixels_and_ids():
    adapter = make().adapter
    model = VLMWrapper(TinyEncoder(), adapter, tiny_decoder(), GreetingStrategy(2.0))
    logits, labels = model(inputs()["x"], text(), labels=text())
    plain = fuse(tiny_decoder(), TinyEncoder(), adapter=adapter, arch=ARCH, scale=2.0)
    assert torch.equal(logits, plain(text(), encoder_input=inputs()))
    assert torch.equal(labels, text())
    assert model.num_image_tokens == 0
    built = build_vlm_wrapper(
        {
            "vocab_size": 37,
            "num_layers": 2,
            "num_heads": 3,
            "num_kv_heads": 1,
            "embed_dim": 18,
            "max_seq_len": 53,
            "intermediate_dim": 29,
        },
        {"type": "random", "num_tokens": 5, "feature_dim": 7},
        {"type": "linear"},
        {"arch": ARCH, "scale": 5.0, "max_text_len": 53},  # features take no room
    )
    assert built.strategy == GreetingStrategy(5.0)


def test_freezes_by_name():
    model = make(encoder_trainable=True)
    specs = [FreezeSpec("fusion", True), FreezeSpec("adapter.linear_2.bias", False)]
    apply_freeze_specs(model, [*specs, FreezeSpec("encoder", True)])
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["adapter.linear_2.bias"]


def test_artifacts_hold_the_adapter_and_compare_the_options(tmp_path):
    model, other = moved(make(scale=3.0)), make(scale=3.0)
    save_fusion(model, tmp_path)
    assert not any(load_fusion(other, tmp_path))
    assert torch.equal(other(text(), encoder_input=inputs()), model(text(), encoder_input=inputs()))
    with pytest.raises(ValueError, match=r"option: scale 3\.0, the model's is 1\.0"):
        load_fusion(make(), tmp_path)
    joint = fuse(tiny_decoder(), TinyEncoder(), arch="joint_decoder", placement="prefix")
    with pytest.raises(ValueError, match="architecture 'greeting', the model's is 'joint_decoder'"):
        load_fusion(joint, tmp_path)


def test_a_directory_holds_the_whole_model(tmp_path):
    decoder = llama_decoder(
        vocab_size=37,
        num_layers=2,
        num_heads=3,
        num_kv_heads=1,
        embed_dim=18,
        max_seq_len=53,
        intermediate_dim=29,
    )
    tower = ClipVisionEncoder(image_size=12, patch_size=4, embed_dim=10, num_layers=2, num_heads=5)
    model = moved(fuse(decoder, tower, arch=ARCH, scale=3.0))
    save_pretrained(model, tmp_path)
    other = from_pretrained(tmp_path)
    assert other.strategy == GreetingStrategy(3.0)
    call = {"encoder_input": {"images": torch.randn(2, 3, 12, 12)}}
    assert torch.equal(other(text(), **call), model(text(), **call))


def test_generates_what_the_full_forward_says():
    model = moved(make()).eval()
    rows = [text(1, 5), text(1, 9, seed=5)]
    batch = torch.cat([torch.nn.functional.pad(row, (9 - row.shape[1], 0)) for row in rows])
    valid = torch.tensor([[True], [False]]).expand(-1, 7)
    call = {"max_new_tokens": 6, "temperature": 0}
    together = generate(model, batch, encoder_input=inputs(), encoder_mask=valid, **call)
    for index, row in enumerate(rows):
        given = {} if index else {"encoder_input": {"x": inputs()["x"][:1]}}
        for _ in range(6):
            with torch.no_grad():
                likeliest = model(row, **given)[:, -1].argmax(-1, keepdim=True)
            row = torch.cat([row, likeliest], dim=1)
        assert torch.equal(together[index, 9 - rows[index].shape[1] :], row[0])


def step(rank):
    register()
    given = {"encoder_input": inputs()} if rank == 0 else {}
    alone = make(encoder_trainable=True)
    losses = [
        next_token_loss(alone(text(), **one), text())[0] for one in ({"encoder_input": inputs()}, {})
    ]
    (sum(losses) / 2).backward()
    model = make(encoder_trainable=True, on_missing="participate")
    shard(model)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2))
    loss, _ = next_token_loss(model(text(), **given), text())
    torch.testing.assert_close(loss, losses[rank], rtol=1e-6, atol=1e-6)
    loss.backward()
    expected = {n: p.grad for n, p in alone.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = parameter.grad.full_tensor()
            torch.testing.assert_close(whole, expected[name], rtol=1e-5, atol=1e-6, msg=name)
            assert whole.any(), name
    optimizer.step()
    distributed.barrier()


@pytest.mark.distributed
def test_two_ranks_with_one_image_equal_one_process():
    run_on_ranks(step)
