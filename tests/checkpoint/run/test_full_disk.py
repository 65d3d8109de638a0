"""A disk that is full or fails while ranks save: the reason on every rank, and earlier checkpoints are intact."""

import errno
import os

import pytest
import torch
from checkpoint.run.dcp_support import contents, differences
from ranks import run_on_ranks
from small_disk import small_disk
from torch import nn
from torch.distributed.checkpoint import filesystem

from torchfuse.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from torchfuse.errors import CheckpointError


def run(width):
    model = nn.Linear(11, width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(2, 11)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("asynchronous", [False, True], ids=["now", "later"])
@pytest.mark.parametrize("width", [1_009, 2_003])  # the index, or the tensors, do not fit
def test_the_disk_is_full(tmp_path, asynchronous, width):
    model, optimizer = run(503)
    before = contents(model, optimizer)
    with small_disk(tmp_path / "disk", "128k") as disk:
        save_checkpoint(disk, model, optimizer, step=1)
        larger = run(width)
        num_bytes = 2 * 4 * 12 * width
        message = (
            rf"^rank 0: {disk}/step_2 was not written: the disk is full \([\d,]* bytes are available, "
            rf"{num_bytes:,} are needed\)\. Earlier checkpoints are intact\. Free some space, or write"
        )
        with pytest.raises(CheckpointError, match=message):
            save_checkpoint(disk, *larger, step=2, asynchronous=asynchronous).wait()
        assert os.listdir(disk) == ["step_1"]
        with torch.no_grad():
            model.weight.zero_()
        load_checkpoint(disk, model, optimizer)
        assert not differences(before, contents(model, optimizer))


def test_a_folder_that_cannot_be_written_to(tmp_path):
    with (
        small_disk(tmp_path / "disk", "64k", "ro") as disk,
        pytest.raises(
            CheckpointError,
            match="step_2 was not written: the file system is read-only.* Earlier checkpoints",
        ),
    ):
        save_checkpoint(disk, nn.Linear(3, 5), step=2)


def _disk_of_one_rank_fails(rank, folder):
    model, optimizer = run(37)
    save_checkpoint(folder, model, optimizer, step=1)
    before = contents(model, optimizer)
    write_item = filesystem._write_item

    def fails(*args):
        raise OSError(errno.EIO, "Input/output error")

    for failing in (0, 1):
        filesystem._write_item = fails if rank == failing else write_item
        message = rf"^rank {failing}: .*step_2 was not written: the disk reported an input/output error"
        for asynchronous in (False, True):
            with pytest.raises(CheckpointError, match=message):
                save_checkpoint(folder, model, optimizer, step=2, asynchronous=asynchronous).wait()
    filesystem._write_item = write_item
    load_checkpoint(folder, model, optimizer)
    assert not differences(before, contents(model, optimizer))


@pytest.mark.distributed
def test_every_rank_raises_the_error_of_any(tmp_path):
    run_on_ranks(_disk_of_one_rank_fails, tmp_path)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_1"
