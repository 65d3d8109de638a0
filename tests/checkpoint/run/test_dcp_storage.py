"""Hostile and damaged files: each is refused in one error, and nothing is run or changed."""

import json
import pickle

import pytest
import torch
from checkpoint.run.dcp_support import refused, trained
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from torchfuse.checkpoint import load_checkpoint, save_checkpoint


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.fixture
def saved(tmp_path):
    model, optimizer = trained()
    save_checkpoint(tmp_path, model, optimizer, step=1)
    return tmp_path / "step_1"


def test_no_pickle_of_the_index_is_run(saved, tmp_path):
    proof = tmp_path / "proof"
    index = saved / ".metadata"
    model, optimizer = trained(5)
    good = pickle.loads(index.read_bytes())
    for evil in (Evil(proof), Metadata({}, planner_data=Evil(proof)), [good, Evil(proof)]):
        index.write_bytes(pickle.dumps(evil))
        name = f"{open.__module__}.open"  # of io, or from Python 3.12 on of _io
        refused(saved, model, optimizer, str(index), f"it contains {name}, which is not allowed there")
        assert not proof.exists()
    pickle.loads(index.read_bytes())[1].close()
    assert proof.exists()  # it would have run


@pytest.mark.parametrize(
    ("module_name", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("os", "system"),
        ("torch", "load"),
        ("torch", "ops"),
        ("torch.serialization", "load"),
        ("pathlib", "PosixPath"),
    ],
)
def test_the_index_has_no_names_but_its_own(saved, module_name, name):
    (saved / ".metadata").write_bytes(b"\x80\x04c%s\n%s\n." % (module_name.encode(), name.encode()))
    refused(saved, *trained(5), f"it contains {module_name}.{name}, which is not allowed there")


@pytest.mark.parametrize("name", ["field", "os.system", "FileSystem"])
def test_other_names_of_its_modules_are_inert(saved, name):
    for module_name in ("metadata", "filesystem"):
        where = f"torch.distributed.checkpoint.{module_name}\n{name}\n".encode()
        (saved / ".metadata").write_bytes(b"\x80\x04c" + where + b"(S'touch x'\ntR.")
        refused(saved, *trained(5), "is damaged, or no file of save_checkpoint: TypeError")


def test_an_index_cannot_change_the_classes_that_it_names(saved):
    # The opcode BUILD with (None, {...}) sets attributes of the object before it, also of a class.
    where = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    attack = b"\x80\x02" + where + b"N}X\x06\x00\x00\x00hackedI1\ns\x86b."
    assert pickle.loads(attack) is Metadata
    assert Metadata.hacked == 1  # the attack is one
    del Metadata.hacked
    (saved / ".metadata").write_bytes(attack)
    refused(saved, *trained(5), "is damaged, or no file of save_checkpoint")
    assert not hasattr(Metadata, "hacked")


def rewrite(path, change):
    index = path / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    change(metadata)
    index.write_bytes(pickle.dumps(metadata))


def first(metadata):
    return next(iter(metadata.storage_data.values()))


def outside(metadata):
    first(metadata).relative_path = "../step_1.distcp"


def absolute(metadata):
    first(metadata).relative_path = "/dev/zero"


def linked(metadata):
    first(metadata).relative_path = "link"


def beyond(metadata):
    first(metadata).offset += 10**6


def negative(metadata):
    first(metadata).offset = -1


def transformed(metadata):
    first(metadata).transform_descriptors = ["stream.zstd"]


def unstored(metadata):
    del metadata.storage_data[next(iter(metadata.storage_data))]


def short(metadata):
    tensor = metadata.state_dict_metadata["model.encoder.layers.0.weight"]
    assert isinstance(tensor, TensorStorageMetadata)
    tensor.chunks[0].sizes = torch.Size([7, 5])


def overhanging(metadata):
    tensor = metadata.state_dict_metadata["model.encoder.layers.0.weight"]
    tensor.chunks[0].offsets = torch.Size([1, 0])
    stored = metadata.storage_data[MetadataIndex("model.encoder.layers.0.weight", [0, 0])]
    metadata.storage_data[MetadataIndex("model.encoder.layers.0.weight", [1, 0])] = stored


CHANGES = [
    (outside, "is no plain file of this checkpoint"),
    (absolute, "is no plain file of this checkpoint"),
    (linked, "is no plain file of this checkpoint"),
    (beyond, "__0_0.distcp is cut off"),
    (negative, "sizes expected, not (-1"),
    (transformed, "is no plain file of this checkpoint"),
    (unstored, "no values are stored for"),
    (short, "chunks that do not make up a tensor of [11, 5]"),
    (overhanging, "chunks that do not make up a tensor of [11, 5]"),
]


@pytest.mark.parametrize(("change", "problem"), CHANGES, ids=[c.__name__ for c, _ in CHANGES])
def test_an_inconsistent_index_is_refused(saved, change, problem):
    data = saved / "__0_0.distcp"
    (saved.parent / "step_1.distcp").write_bytes(data.read_bytes())
    (saved / "link").symlink_to(saved.parent / "step_1.distcp")
    rewrite(saved, change)
    refused(saved, *trained(5), f"{saved / '.metadata'} is damaged", problem)


def test_no_pickle_among_the_tensors_is_run(saved, tmp_path):
    proof = tmp_path / "proof"
    data = saved / "__0_0.distcp"
    whole = data.read_bytes()
    bad = tmp_path / "bad"
    torch.save(Evil(proof), bad, _use_new_zipfile_serialization=False)
    evil = bad.read_bytes()
    data.write_bytes(evil + whole[len(evil) :])
    refused(saved, *trained(5), "cannot be read, nothing was changed: rank 0")
    assert not proof.exists()
    torch.load(bad, weights_only=False).close()
    assert proof.exists()  # it would have run


def test_damage_is_found_before_anything_changes(saved):
    data = saved / "__0_0.distcp"
    whole = data.read_bytes()
    model, optimizer = trained(5)
    data.write_bytes(whole[:-5000])
    refused(saved, model, optimizer, "__0_0.distcp is cut off")
    data.write_bytes(whole[:-5000] + bytes(5000))
    refused(saved, model, optimizer, "cannot be read, nothing was changed: rank 0")
    data.write_bytes(whole)
    index = saved / ".metadata"
    kept = index.read_bytes()
    index.write_bytes(kept[:-9])
    refused(saved, model, optimizer, f"{index} is damaged")
    index.unlink()
    refused(saved, model, optimizer, f"{index} is damaged")
    index.write_bytes(kept)
    load_checkpoint(saved, model, optimizer)


def no_step(data):
    del data["step"]


def other_format(data):
    data["format"] = 2


def parameters_as_option(data):
    data["optimizer"]["groups"][0]["options"]["params"] = [0]


def text_as_state(data):
    next(iter(data["optimizer"]["state"].values()))["values"]["step"] = "abc"


def group_without_names(data):
    del data["optimizer"]["groups"][0]["names"]


@pytest.mark.parametrize(
    "change",
    [no_step, other_format, parameters_as_option, text_as_state, group_without_names],
    ids=lambda c: c.__name__,
)
def test_a_damaged_description_is_refused(saved, change):
    file = saved / "checkpoint.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    refused(saved, *trained(5), f"{file} is damaged, or no file of save_checkpoint")


def test_a_description_that_does_not_go_with_the_tensors_is_refused(saved):
    file = saved / "checkpoint.json"
    data = json.loads(file.read_text())
    data["trainable"].append("decoder.nothing")
    file.write_text(json.dumps(data))
    refused(saved, *trained(5), "decoder.nothing trained, and is no parameter")
    data["trainable"].pop()
    data["optimizer"]["state"]["decoder.norm.scale"]["tensors"].append("exp_avg_hm")
    file.write_text(json.dumps(data))
    refused(saved, *trained(5), "damaged: the optimizer's state of decoder.norm.scale is incomplete")
