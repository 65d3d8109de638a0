import errno
import fcntl
import os
import signal
import stat
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from torchfuse.errors import CheckpointError
from torchfuse.io import atomic
from torchfuse.io.atomic import contains_only_checkpoint_files, write_directory, write_file, write_text
from torchfuse.io.save_lock import SaveLock


def write(number):
    """Writes a directory that says one number in two files, one of them below."""

    def into(folder):
        (folder / "config.json").write_text(str(number))
        save_file({"a": torch.full((5,), float(number))}, folder / "model.safetensors")

    return into


def tree(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def write_other(folder):
    (folder / "config.json").write_text("9")
    (folder / "fusion.json").write_text("{}")


@pytest.fixture(params=["exchange", "two renames"])
def way(request, monkeypatch):
    """Both ways to replace a directory."""
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)


@pytest.mark.parametrize("before", ["nothing", "parents", "empty", "older", "link"])
@pytest.mark.usefixtures("way")
def test_a_directory_is_the_new_one_and_nothing_is_left(tmp_path, before):
    path = tmp_path / "x"
    if before == "parents":
        path = tmp_path / "deep" / "er" / "x"
    elif before == "empty":
        path.mkdir()
    elif before == "older":
        write_directory(path, write_other)
    elif before == "link":
        write_directory(tmp_path / "y", write_other)
        path.symlink_to("y")
    write_directory(str(path), write(3))
    assert set(tree(path)) == {"config.json", "model.safetensors"}
    assert (path / "config.json").read_text() == "3"
    assert path.is_symlink() == (before == "link")
    assert sorted(os.listdir(path.parent)) == (["x", "y"] if before == "link" else ["x"])


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_the_exchange_is_one_step_here(tmp_path, monkeypatch):
    write_directory(tmp_path / "x", write(2))
    monkeypatch.setattr(atomic.Path, "replace", None)
    done = []
    exchange = atomic._exchange
    monkeypatch.setattr(atomic, "_exchange", lambda *pair: done.append(exchange(*pair)) or done[-1])
    write_directory(tmp_path / "x", write(3))
    assert done == [True]


@pytest.mark.usefixtures("way")
def test_readers_see_one_or_the_other_while_it_is_written(tmp_path):
    path = tmp_path / "x"
    write_directory(path, write(2))
    seen = []

    def slowly(folder):
        write(3)(folder)
        assert folder.parent == path.parent  # the same file system
        seen.append((path / "config.json").read_text())

    write_directory(path, slowly)
    assert seen == ["2"]
    assert (path / "config.json").read_text() == "3"


@pytest.mark.parametrize("stage", ["write", "fsync", "rename"])
@pytest.mark.usefixtures("way")
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, stage):
    path = tmp_path / "x"
    write_directory(path, write(2))
    before = tree(tmp_path)

    def full_disk(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def writer(folder):
        write(3)(folder)
        if stage == "write":
            full_disk()

    if stage == "fsync":
        monkeypatch.setattr(os, "fsync", full_disk)
    elif stage == "rename":
        monkeypatch.setattr(atomic.Path, "rename", full_disk)
    with pytest.raises(
        CheckpointError, match="x was not written: the disk is full .* previous one is int"
    ):
        write_directory(path, writer)
    monkeypatch.undo()
    assert tree(tmp_path) == before


def test_the_second_of_two_renames_fails(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_directory(path, write(2))
    before = tree(tmp_path)
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    rename, calls = Path.rename, []

    def fails_once(self, target):
        calls.append(target)
        if len(calls) == 3:  # refused over what is there, aside, into place
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(atomic.Path, "rename", fails_once)
    with pytest.raises(
        CheckpointError, match="x was not written: the disk reported an input/output error"
    ):
        write_directory(path, write(3))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EXDEV])
def test_file_systems_that_cannot_exchange(tmp_path, monkeypatch, code):
    write_directory(tmp_path / "x", write(2))

    class Libc:
        @staticmethod
        def renameat2(*arguments):
            return -1

    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *args, **options: Libc)
    monkeypatch.setattr(atomic.ctypes, "get_errno", lambda: code)
    if code == errno.EXDEV:
        with pytest.raises(CheckpointError, match="cross-device"):
            write_directory(tmp_path / "x", write(3))
        assert (tmp_path / "x" / "config.json").read_text() == "2"
    else:
        write_directory(tmp_path / "x", write(3))
        assert (tmp_path / "x" / "config.json").read_text() == "3"
    assert os.listdir(tmp_path) == ["x"]


def test_all_is_on_the_disk_before_it_is_in_its_place(tmp_path, monkeypatch):
    path, events = tmp_path / "x", []
    write_directory(path, write(2))
    fsync, exchange = os.fsync, atomic._exchange

    def recorded(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(atomic, "_exchange", lambda *pair: events.append("put") or exchange(*pair))

    def nested(folder):
        write(3)(folder)
        (folder / "below").mkdir()
        (folder / "below" / "fusion.json").write_text("{}")

    write_directory(path, nested)
    put = events.index("put")
    names = ["config.json", "model.safetensors", "fusion.json", "below"]
    assert sorted(e.name for e in events[: put - 1]) == sorted(names)
    assert events[put - 1].name.startswith(".x.")  # the directory itself after all that is in it
    assert events[put + 1 :] == [tmp_path]


@pytest.mark.parametrize(
    "names",
    [
        ["notes.txt", "config.json"],
        ["config.json", ".bashrc"],
        ["config.json", "src/main.py"],
        ["fusion.safetensors", "model.safetensors/x"],
        ["config.json", "my-lora.safetensors"],
        ["model.safetensors"],
        ["train.json"],
    ],
    ids="_".join,
)
@pytest.mark.usefixtures("way")
def test_what_may_be_missed_is_never_removed(tmp_path, names):
    path = tmp_path / "home"
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("mine")
    before = tree(tmp_path)
    assert not contains_only_checkpoint_files(path)
    plain = names in (["notes.txt", "config.json"], ["config.json", ".bashrc"])
    assert contains_only_checkpoint_files(path, besides=["notes.txt", ".bashrc"]) == plain
    with pytest.raises(CheckpointError, match="home is not replaced, .* nothing was written") as info:
        write_directory(path, lambda folder: pytest.fail("written for nothing"))
    assert names[0].split("/")[0] in str(info.value)
    assert tree(tmp_path) == before
    write_directory(path, write(3), may_replace=lambda place: place == path)
    assert set(tree(path)) == {"config.json", "model.safetensors"}


def test_links_in_a_directory_are_no_checkpoint(tmp_path):
    write_directory(tmp_path / "x", write(2))
    (tmp_path / "x" / "vocab.json").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="x is not replaced"):
        write_directory(tmp_path / "x", write(3))


def test_what_comes_while_it_is_written_is_kept(tmp_path):
    path = tmp_path / "x"

    def with_a_guest(folder):
        write(3)(folder)
        path.mkdir()
        (path / "notes.txt").write_text("mine")

    with pytest.raises(CheckpointError, match=r"x is not replaced, .*notes\.txt"):
        write_directory(path, with_a_guest)
    assert tree(tmp_path) == {"x": None, "x/notes.txt": b"mine"}


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(CheckpointError, match="x is a file; a checkpoint is a directory"):
        write_directory(tmp_path / "x", write(3))
    assert tree(tmp_path) == {"x": b"mine"}


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027])
def test_permissions_are_the_usual_ones(tmp_path, mask):
    def private(folder):
        write(3)(folder)
        (folder / "config.json").chmod(0o600)

    old = os.umask(mask)
    try:
        write_directory(tmp_path / "x", private)
        write_file(tmp_path / "y", lambda file: file.write_text("3"))
        assert os.umask(mask) == mask
    finally:
        os.umask(old)
    for path in (tmp_path / "y", *(tmp_path / "x").iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o777 & ~mask


def test_a_file_is_written_completely(tmp_path):
    path = tmp_path / "x"
    write_file(path, lambda file: file.write_text("2"))

    def fails(file):
        file.write_text("half")
        assert path.read_text() == "2"
        raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        write_file(path, fails)
    assert tree(tmp_path) == {"x": b"2"}
    write_file(tmp_path / "new" / "x", lambda file: file.write_text("3"))
    assert tree(tmp_path / "new") == {"x": b"3"}


LEFTOVERS = [".x.0123abcd.tmp", ".x.host-3.4711-77.0123abcd.new"]  # the second by an earlier version
OTHERS = [".y.0123abcd.tmp", ".x.0123abcd", "x.0123abcd.tmp", ".x.mine.tmp", ".xx.0123abcd.tmp"]


@pytest.fixture
def leftovers(tmp_path):
    for name in LEFTOVERS + OTHERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("1")
    (tmp_path / ".x.lock").touch()


@pytest.mark.usefixtures("leftovers")
@pytest.mark.parametrize("kind", ["directory", "file"])
def test_leftovers_of_killed_processes_are_removed(tmp_path, kind):
    if kind == "directory":
        write_directory(tmp_path / "x", write(2))
    else:
        write_text(tmp_path / "x", "2")
    assert sorted(os.listdir(tmp_path)) == sorted([*OTHERS, "x"])


@pytest.mark.parametrize("name", [".x.0123abcd.old", ".x.host-3.4711-77.0123abcd.old"])
def test_a_directory_that_was_moved_away_comes_back(tmp_path, name):
    (tmp_path / name).mkdir()
    write(1)(tmp_path / name)

    def fails(folder):
        raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        write_directory(tmp_path / "x", fails)
    assert (tmp_path / "x" / "config.json").read_text() == "1"


def test_a_second_writer_waits_for_the_first(tmp_path):
    order = []

    def slowly(file):
        second.start()
        time.sleep(0.2)
        order.append(sorted(os.listdir(tmp_path)))
        file.write_text("first")

    second = threading.Thread(target=lambda: write_text(tmp_path / "x", "second"))
    write_file(tmp_path / "x", slowly)
    second.join()
    assert len(order[0]) == 2  # the lock, and one temporary directory
    assert tree(tmp_path) == {"x": b"second"}


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_lock_ends_when_it_is_released_although_a_forked_process_has_it_open(tmp_path):
    lock = SaveLock(tmp_path / "lock")
    assert lock.acquire()
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    try:
        lock.release()
        assert SaveLock(tmp_path / "lock").acquire(wait=False)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_nothing_is_removed_where_there_are_no_locks(tmp_path, monkeypatch, leftovers):
    monkeypatch.setattr(
        fcntl, "flock", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOLCK, "none"))
    )
    write_text(tmp_path / "x", "2")
    assert {*LEFTOVERS, *OTHERS} < set(os.listdir(tmp_path))
    assert (tmp_path / "x").read_text() == "2"
