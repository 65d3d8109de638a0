import json
from pathlib import Path

import pytest
import torch
from ranks import run_on_ranks
from support import TinyEncoder, inputs, text, tiny_decoder
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from torchfuse import fuse, fusion_state_dict, get_fusion_params
from torchfuse.checkpoint.artifact.fingerprint import (
    TensorFingerprint,
    compare_fingerprints,
    fingerprint,
    format_differences,
    pretrained_tensors,
    read_fingerprint,
)
from torchfuse.training import shard


def values(tensor):
    return fingerprint({"x": tensor})["x"].values


def test_every_value_of_a_small_tensor_changes_its_fingerprint():
    x = torch.randn(5, 11)
    found = {values(x)}
    for index in range(x.numel()):
        other = x.clone()
        other.view(-1)[index] += 1
        found.add(values(other))
    assert len(found) == 1 + x.numel()


def test_a_big_tensor_is_sampled_from_the_first_value_to_the_last():
    x = torch.randn(101, 103)
    found = {values(x)}
    for part in (slice(0, 1), slice(-1, None), slice(0, 503), slice(5003, 5303)):
        other = x.clone()
        other.view(-1)[part] += 1
        found.add(values(other))
    assert len(found) == 5
    assert len({values(torch.arange(n).float()) for n in (63, 64, 65, 67, 997)}) == 5


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (3, 5, 7), (71, 3)], ids=str)
def test_layout_in_memory_makes_no_difference(shape):
    x = torch.randn(shape)
    strided = torch.stack([x, x + 1], dim=-1)[..., 0]
    assert values(strided) == values(x) is not None
    if x.dim() == 3:
        assert values(x.permute(2, 0, 1).contiguous().permute(1, 2, 0)) == values(x)


def fingerprint_of(tensor):
    return fingerprint({"x": tensor})


def test_the_same_values_in_other_dtypes():
    x = torch.randn(7, 13)
    whole = fingerprint_of(x)
    assert whole["x"] == TensorFingerprint([7, 13], "float32", values(x))
    assert compare_fingerprints(whole, fingerprint_of(x.bfloat16())) == {}
    assert compare_fingerprints(fingerprint_of(x.bfloat16()), fingerprint_of(x.bfloat16().float())) == {}
    assert compare_fingerprints(whole, fingerprint_of(x.bfloat16() + 1)) == {
        "x": "float32 [7, 13] in the saved base, bfloat16 [7, 13] with other values here"
    }
    # fp16 rounds elsewhere on the way to bf16: compared with itself, not with the others.
    assert (
        compare_fingerprints(fingerprint_of(x.half()), fingerprint_of(x))
        == compare_fingerprints(fingerprint_of(x.half() + 1), fingerprint_of(x))
        == {}
    )
    assert list(compare_fingerprints(fingerprint_of(x.half()), fingerprint_of(x.half() + 1))) == ["x"]


def test_unreadable_values_leave_name_and_shape():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    linear = nn.Linear(7, 13, bias=False)
    whole = fingerprint_of(linear.weight)
    quantize_(linear, Int8WeightOnlyConfig(version=2))
    for unread in (linear.weight, torch.empty(13, 7, device="meta"), torch.ones(13, 7).int()):
        given = fingerprint_of(unread)
        assert given["x"].values is None
        assert compare_fingerprints(whole, given) == compare_fingerprints(given, whole) == {}
        assert list(compare_fingerprints(given, fingerprint_of(torch.ones(7, 13)))) == ["x"]


def test_differences_are_formatted_and_only_the_first_few_listed():
    ones = {f"x{i}": torch.ones(3, 5) for i in range(13)}
    saved, own = fingerprint(ones), fingerprint({n: x + 1 for n, x in ones.items()})
    del own["x0"], saved["x1"]
    own["x2"] = fingerprint_of(torch.ones(5, 3))["x"]
    found = compare_fingerprints(saved, own)
    assert len(found) == 13
    assert found["x0"] == "float32 [3, 5] in the saved base, missing here"
    assert found["x1"] == "not in the saved base, float32 [3, 5] here"
    assert found["x2"] == "float32 [3, 5] in the saved base, float32 [5, 3] here"
    lines = format_differences(found)
    assert lines[0] == "base: 13 pretrained tensors differ from those that this was trained over"
    assert len(lines) == 10
    assert lines[-1] == "base: and 5 more"
    assert format_differences({"x": "odd"}) == [
        "base: 1 pretrained tensor differs from those that this was trained over",
        "base: x is odd",
    ]


def test_round_trip_through_json():
    there = fingerprint({"x": torch.randn(3, 5), "y": torch.ones(2).int()})
    text_ = json.dumps({name: tensor._asdict() for name, tensor in there.items()})
    assert read_fingerprint(json.loads(text_)) == there
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        read_fingerprint({"x": {"form": [3]}})


class Normed(TinyEncoder):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(7)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def test_pretrained_tensors_are_all_that_fusion_did_not_add():
    model = fuse(tiny_decoder(), Normed(), every=2, fusion_vocab_size=2, fusion_head=True)
    added = fusion_state_dict(model)
    tensors = pretrained_tensors(model)
    assert set(tensors) == set(model.state_dict()) - set(added)
    assert "encoder.norm.running_mean" in tensors
    assert set(pretrained_tensors(torch.compile(model, backend="eager"))) == set(tensors)
    rest = pretrained_tensors(model, without=["encoder.norm.weight", "decoder.norm.scale"])
    left_out = {name for name in tensors if name.startswith("encoder.norm") and "bias" not in name}
    assert set(tensors) - set(rest) == left_out | {"decoder.norm.scale"}


# --- sharded -------------------------------------------------------------------------------------


def make():
    return fuse(tiny_decoder(tied=True), TinyEncoder(), every=2, on_missing="participate")


def _sharded(rank, file):
    expected = read_fingerprint(json.loads(Path(file).read_text()))
    model = make()
    shard(model)
    assert fingerprint(pretrained_tensors(model)) == expected
    model(text(), encoder_input=inputs()).sum().backward()  # gathers, and shards again
    assert fingerprint(pretrained_tensors(model)) == expected
    with torch.no_grad():
        model.decoder.norm.scale.mul_(3)
    assert list(compare_fingerprints(expected, fingerprint(pretrained_tensors(model)))) == [
        "decoder.norm.scale"
    ]
    mesh = init_device_mesh("cpu", (2,))
    for shape in ((1,), (5, 7), (3, 101), ()):
        x = torch.linspace(-3, 3, torch.Size(shape).numel()).view(shape)
        for placement in (Replicate(), *map(Shard, range(len(shape)))):
            assert values(distribute_tensor(x, mesh, [placement])) == values(x), (shape, placement)


@pytest.mark.distributed
def test_sharded_models_have_the_fingerprint_of_full_ones(tmp_path):
    file = tmp_path / "base.json"
    model = make()
    assert get_fusion_params(model)
    base = fingerprint(pretrained_tensors(model))
    file.write_text(json.dumps({name: tensor._asdict() for name, tensor in base.items()}))
    run_on_ranks(_sharded, str(file))
