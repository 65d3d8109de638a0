import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from torchfuse.io import atomic as files
from torchfuse.io.atomic import holds_only_a_checkpoint, write_directory, write_whole


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
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)


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
    monkeypatch.setattr(files.Path, "replace", None)
    done = []
    exchange = files._exchange
    monkeypatch.setattr(files, "_exchange", lambda *pair: done.append(exchange(*pair)) or done[-1])
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
        monkeypatch.setattr(files.os, "fsync", full_disk)
    elif stage == "rename":
        monkeypatch.setattr(files.Path, "rename", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_directory(path, writer)
    monkeypatch.undo()
    assert tree(tmp_path) == before


def test_the_second_of_two_renames_fails(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_directory(path, write(2))
    before = tree(tmp_path)
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    rename, calls = Path.rename, []

    def fails_once(self, target):
        calls.append(target)
        if len(calls) == 3:  # refused over what is there, aside, into place
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(files.Path, "rename", fails_once)
    with pytest.raises(OSError, match="Input/output"):
        write_directory(path, write(3))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EXDEV])
def test_file_systems_that_cannot_exchange(tmp_path, monkeypatch, code):
    write_directory(tmp_path / "x", write(2))

    class Libc:
        @staticmethod
        def renameat2(*arguments):
            return -1

    monkeypatch.setattr(files.ctypes, "CDLL", lambda *args, **options: Libc)
    monkeypatch.setattr(files.ctypes, "get_errno", lambda: code)
    if code == errno.EXDEV:
        with pytest.raises(OSError, match="cross-device"):
            write_directory(tmp_path / "x", write(3))
        assert (tmp_path / "x" / "config.json").read_text() == "2"
    else:
        write_directory(tmp_path / "x", write(3))
        assert (tmp_path / "x" / "config.json").read_text() == "3"
    assert os.listdir(tmp_path) == ["x"]


def test_all_is_on_the_disk_before_it_is_in_its_place(tmp_path, monkeypatch):
    path, events = tmp_path / "x", []
    write_directory(path, write(2))
    fsync, exchange = os.fsync, files._exchange

    def recorded(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", recorded)
    monkeypatch.setattr(files, "_exchange", lambda *pair: events.append("put") or exchange(*pair))

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
    "strangers",
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
def test_what_may_be_missed_is_never_removed(tmp_path, strangers):
    path = tmp_path / "home"
    for name in strangers:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("mine")
    before = tree(tmp_path)
    assert not holds_only_a_checkpoint(path)
    plain = strangers in (["notes.txt", "config.json"], ["config.json", ".bashrc"])
    assert holds_only_a_checkpoint(path, besides=["notes.txt", ".bashrc"]) == plain
    with pytest.raises(ValueError, match="home is not replaced, .* nothing was written") as info:
        write_directory(path, lambda folder: pytest.fail("written for nothing"))
    assert strangers[0].split("/")[0] in str(info.value)
    assert tree(tmp_path) == before
    write_directory(path, write(3), may_replace=lambda place: place == path)
    assert set(tree(path)) == {"config.json", "model.safetensors"}


def test_links_in_a_directory_are_no_checkpoint(tmp_path):
    write_directory(tmp_path / "x", write(2))
    (tmp_path / "x" / "vocab.json").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="x is not replaced"):
        write_directory(tmp_path / "x", write(3))


def test_what_comes_while_it_is_written_is_kept(tmp_path):
    path = tmp_path / "x"

    def with_a_guest(folder):
        write(3)(folder)
        path.mkdir()
        (path / "notes.txt").write_text("mine")

    with pytest.raises(ValueError, match=r"x is not replaced, .*notes\.txt"):
        write_directory(path, with_a_guest)
    assert tree(tmp_path) == {"x": None, "x/notes.txt": b"mine"}


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(ValueError, match="x is a file; a checkpoint is a directory"):
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
        write_whole(tmp_path / "y", lambda file: file.write_text("3"))
        assert os.umask(mask) == mask
    finally:
        os.umask(old)
    for path in (tmp_path / "y", *(tmp_path / "x").iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o777 & ~mask


def test_a_file_is_written_whole(tmp_path):
    path = tmp_path / "x"
    write_whole(path, lambda file: file.write_text("2"))

    def fails(file):
        file.write_text("half")
        assert path.read_text() == "2"
        raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        write_whole(path, fails)
    assert tree(tmp_path) == {"x": b"2"}
    with pytest.raises(FileNotFoundError, match="none"):
        write_whole(tmp_path / "none" / "x", lambda file: file.write_text("3"))


def dead_process():
    """The number of a process that was, and when another one began."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def left_overs(tmp_path):
    """Left-overs of writers to ``x``: those to be removed, and those that are not."""
    host, dead, living = files._host(), dead_process(), os.getppid()
    since = files._started(living)
    removed = [
        f".x.{host}.{dead}-77.0123abcd.new",
        f".x.{host}.{living}-7.0123abcd.new",  # the number was given again
        f".x.{host}.{dead}-77.0123abcd.old",
    ]
    kept = [
        f".x.{host}.{living}-{since}.0123abcd.new",
        f".x.another-host.{dead}-77.0123abcd.new",
        f".y.{host}.{dead}-77.0123abcd.new",
        f".x.{host}.{dead}-77.0123abcd",
        f"x.{host}.{dead}-77.0123abcd.new",
    ]
    for name in removed + kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("1")
    return removed, kept


def test_left_overs_of_the_dead_are_removed(tmp_path, left_overs):
    _, kept = left_overs
    write_directory(tmp_path / "x", write(2))
    assert (tmp_path / "x" / "config.json").read_text() == "2"
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "x"])


def test_left_overs_of_files_are_removed(tmp_path, left_overs):
    removed, kept = left_overs
    shutil.rmtree(tmp_path / removed[2])  # of a directory
    write_whole(tmp_path / "x", lambda file: file.write_text("2"))
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "x"])


def test_what_a_dead_writer_had_moved_away_comes_back(tmp_path, left_overs):
    def fails(folder):
        raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        write_directory(tmp_path / "x", fails)
    assert (tmp_path / "x" / "config.json").read_text() == "1"


def killed(kind, folder, num_kills, seed):
    worker = Path(__file__).with_name("kill_worker.py")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(worker), kind, str(folder), str(num_kills), str(seed)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    *moments, last = map(json.loads, run.stdout.splitlines())
    assert len(moments) == num_kills
    return moments, last["left at the end"]


def is_whole(moment):
    """One number everywhere, not older than the last save that was reported."""
    found = moment["found"]
    return len(found) == 1 and moment["finished"] <= found[0] <= moment["begun"]


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and exchanges in one step")
@pytest.mark.parametrize("kind", ["artifact", "directory"])
def test_writers_that_are_killed_leave_one_save_whole(tmp_path, kind):
    moments, left = killed(kind, tmp_path / "x", num_kills=34, seed=5)
    assert [moment for moment in moments if not is_whole(moment)] == []
    assert left == []
    # Many were killed in the middle of a save, some with a file half written beside its place.
    assert sum(moment["begun"] > moment["finished"] for moment in moments) > 10
    assert any(moment["left"] for moment in moments)
    assert len({moment["found"][0] for moment in moments}) > 10


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_the_kills_would_show_a_torn_directory(tmp_path):
    moments, _ = killed("in_place", tmp_path / "x", num_kills=13, seed=5)
    assert any(moment["problem"] or len(moment["found"]) > 1 for moment in moments)
