"""Errors of the disk: each is one sentence with the path and the reason, and the earlier file is intact."""

import errno
import json
import os
import re
import resource
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_disk import small_disk
from support import TinyEncoder, open_gates, same_state, state, tiny_decoder

from torchfuse import export, fuse, get_fusion_params, load_fusion, save_fusion
from torchfuse.checkpoint import load_trained, save_trained
from torchfuse.errors import CheckpointError
from torchfuse.io.atomic import write_directory, write_file, write_text
from torchfuse.io.disk_errors import disk_errors

NUMBERS = {"a": torch.arange(20_011.0)}  # 80,044 bytes


def torch_save(file):
    with file.open("wb") as stream:
        torch.save(NUMBERS, stream)


WRITERS = {
    "safetensors": lambda file: save_file(NUMBERS, file),
    "torch.save": torch_save,
    "text": lambda file: file.write_text(json.dumps(NUMBERS["a"].tolist())),
    "many small files": lambda file: [
        file.with_name(f"{file.name}-{index}").write_text("x" * 1_009) for index in range(997)
    ],
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_named_and_the_file_before_is_intact(tmp_path, writer):
    with small_disk(tmp_path / "disk", "64k") as disk:
        write_text(disk / "x", "before")
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
        with pytest.raises(CheckpointError) as caught:
            write_file(disk / "x", WRITERS[writer])
        message = (
            f"{disk}/x was not written: the disk is full \\((.*) bytes are available, more are needed"
        )
        found = re.match(
            message + r"\)\. The previous one is intact\. Free some space, or", str(caught.value)
        )
        assert found, caught.value
        assert int(found[1].replace(",", "")) == free
        assert (disk / "x").read_text() == "before"
        assert os.listdir(disk) == ["x"]
        write_text(disk / "x", "after")  # there is space again


def test_a_full_disk_leaves_directories_and_artifacts_intact(tmp_path):
    model = open_gates(fuse(tiny_decoder(), TinyEncoder(), every=2))
    before = state(model)
    with small_disk(tmp_path / "disk", "200k") as disk:
        save_fusion(model, disk / "artifact")
        write_directory(
            disk / "x", lambda folder: save_file({"a": torch.ones(7)}, folder / "fusion.safetensors")
        )
        (disk / "filler").write_bytes(
            bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - 8_192)
        )
        with pytest.raises(
            CheckpointError, match=r"fusion\.safetensors was not written: the disk is full"
        ):
            save_fusion(fuse(tiny_decoder(5), TinyEncoder(seed=5), every=2), disk / "artifact")
        with pytest.raises(
            CheckpointError, match="new was not written: the disk is full .* Nothing is left"
        ):
            export(tiny_decoder(), disk / "new", format="llama")
        with pytest.raises(
            CheckpointError, match="x was not written: .*full.* The previous one is intact"
        ):
            write_directory(disk / "x", lambda folder: save_file(NUMBERS, folder / "fusion.safetensors"))
        load_fusion(model, disk / "artifact")
        assert same_state(before, model)
        assert torch.equal(load_file(disk / "x" / "fusion.safetensors")["a"], torch.ones(7))
        assert sorted(os.listdir(disk)) == ["artifact", "filler", "x"]


def test_files_that_belong_together_are_all_written_before_one_is_replaced(tmp_path):
    model = open_gates(fuse(tiny_decoder(), TinyEncoder(), every=2))
    names = ["decoder.tok_embeddings.weight", *get_fusion_params(model)]
    before = state(model)
    with small_disk(tmp_path / "disk", "256k") as disk:
        save_trained(model, disk, trained=names)
        (disk / "filler").write_bytes(
            bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - 40_960)
        )
        other = fuse(tiny_decoder(5), TinyEncoder(), every=2)
        with pytest.raises(CheckpointError, match=r"safetensors was not written: .* full .* is intact"):
            save_trained(other, disk, trained=list(dict(other.named_parameters())))
        with torch.no_grad():
            for name in names:
                model.get_parameter(name).add_(1)
        load_trained(model, disk)
        assert same_state(before, model)


def test_a_disk_that_is_read_only(tmp_path):
    with small_disk(tmp_path / "disk", "64k") as disk:
        write_text(disk / "x", "before")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(CheckpointError, match="x was not written: the file system is read-only"):
            write_text(disk / "x", "after")
        with pytest.raises(CheckpointError, match="new was not written: the file system is read-only"):
            write_directory(disk / "deep" / "new", lambda folder: None)
        assert (disk / "x").read_text() == "before"


def test_a_limit_on_the_size_of_files(tmp_path):
    write_text(tmp_path / "x", "before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointError, match="a file would be larger than this process may write"):
            write_file(tmp_path / "x", WRITERS["safetensors"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "before"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EIO, "the disk reported an input/output error"),
        (errno.EACCES, "this user may not write there"),
        (errno.EPERM, "this user may not write there"),
        (errno.ESTALE, "Stale file handle"),
    ],
)
@pytest.mark.parametrize("moment", ["write", "sync"])
def test_other_errors_of_the_disk(tmp_path, monkeypatch, code, reason, moment):
    def fails(*args):
        raise OSError(code, os.strerror(code))

    write_text(tmp_path / "x", "before")
    if moment == "sync":
        monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(
        CheckpointError, match=f"x was not written: .*{reason}.* The previous one is intact"
    ):
        write_file(tmp_path / "x", fails if moment == "write" else lambda file: file.write_text("after"))
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "before"


@pytest.mark.parametrize("error", [RuntimeError("shapes"), ValueError("x"), KeyError("k")])
def test_other_exceptions_pass_through(tmp_path, error):
    with pytest.raises(type(error)) as caught, disk_errors(tmp_path / "x"):
        raise error
    assert caught.value is error
