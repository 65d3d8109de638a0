"""Batches of steps: order, ranks, workers, packing, resuming."""

import json
import multiprocessing
import os
import random
import re
import signal
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from torchfuse.data import Mixture, read_samples
from torchfuse.data.loading import Cursor, LoaderOptions, StepLoader, order
from torchfuse.errors import ConfigError, DataError

NUM, LONGEST, WINDOW = 211, 23, 67
METHODS = ["fork", "spawn"] if "fork" in multiprocessing.get_all_start_methods() else ["spawn"]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(order, "WINDOW", WINDOW)


class Numbers:
    """Samples that are their own index, some of which cannot be read."""

    def __init__(self, num=NUM, bad=()):
        self.num, self.bad = num, frozenset(bad)

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        if index in self.bad:
            raise DataError(f"rows.jsonl, row {index}: no JSON.")
        return index


class Repeat:
    """A sample as a sequence that holds it as often as its length says."""

    pad_id, layout, max_seq_len = 0, "marker", None

    def length(self, sample):
        return 1 + sample % 7

    def __call__(self, sample):
        tokens = [sample + 1] * Repeat.length(self, sample)
        mask = torch.zeros(len(tokens), 0, dtype=torch.bool)
        return {
            "tokens": tokens,
            "labels": tokens,
            "images": torch.empty(0, 3, 1, 1),
            "encoder_mask": mask,
        }


class Named(Repeat):
    """The same, of questions that name a file and a number."""

    @staticmethod
    def number(sample):
        name, number = sample.prompt[0].text.split()
        return int(number) + 100 * (name == "b")

    def length(self, sample):
        return super().length(self.number(sample))

    def __call__(self, sample):
        return super().__call__(self.number(sample))


def samples_of(step):
    return sorted(
        token - 1 for batch in step for token in batch["tokens"].unique().tolist() if token > 0
    )


def loader(samples=None, *, ranks=1, rank=0, transform=None, **options):
    options = {"batch_size": 4, "batches_per_step": 2, "max_seq_len": LONGEST, "seed": 5} | options
    samples = Numbers() if samples is None else samples
    return StepLoader(
        samples, transform or Repeat(), LoaderOptions(**options), world_size=ranks, rank=rank
    )


def drawn(loader, num=None, cursor=None):
    return [samples_of(step) for step, _ in islice(loader.steps(cursor), num or loader.num_steps)]


packing = pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])


@packing
def test_an_epoch_has_every_sample_once(packed):
    whole = loader(packed=packed)
    counts = Counter(sample for step in drawn(whole) for sample in step)
    assert set(counts.values()) == {1}
    # Without those of a last step that is not full, and, packed, an estimate of the number of steps.
    assert len(counts) > (0.7 if packed else 0.95) * NUM


@packing
def test_epochs_have_orders_of_their_own(packed):
    twice = loader(Numbers(101), batch_size=2, epochs=2, packed=packed)
    steps = drawn(twice)
    half = len(steps) // 2
    assert twice.num_steps == 2 * half
    assert steps[:half] != steps[half:]
    assert drawn(loader(Numbers(101), batch_size=2, packed=packed, seed=6)) != steps[:half]


@packing
def test_ranks_share_the_samples_of_each_step(packed):
    one = drawn(loader(packed=packed, batch_size=3), 5)
    three = [drawn(loader(packed=packed, batch_size=1, ranks=3, rank=r), 5) for r in range(3)]
    assert [sorted(a + b + c) for a, b, c in zip(*three, strict=True)] == one


def test_the_order_is_that_of_torch_distributed_sampler():
    sampler = torch.utils.data.DistributedSampler(range(NUM), 3, 1, seed=5, drop_last=True)
    sampler.set_epoch(1)
    expected = list(sampler)[:8]
    second = Cursor(epoch=1)
    assert drawn(loader(ranks=3, rank=1), 1, second) == [sorted(expected)]


@packing
@pytest.mark.parametrize("workers", [{}, *({"num_workers": 2, "start_method": m} for m in METHODS)])
def test_workers_and_resuming_change_nothing(packed, workers):
    samples = Numbers(bad=[7])
    options = {"packed": packed, "batch_size": 3, "epochs": 2, "bad_samples": "skip"}
    whole = [
        (samples_of(step), end)
        for step, end in islice(
            loader(samples, **options).steps(), 2 * loader(samples, **options).num_steps
        )
    ]
    start = len(whole) // 3
    cursor = Cursor(**json.loads(json.dumps(whole[start - 1][1].state())))
    assert drawn(loader(samples, **options, **workers), len(whole) - start, cursor) == [
        step for step, _ in whole[start:]
    ]


def test_nothing_before_the_cursor_is_read():
    class Recorded(Numbers):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    read: list[int] = []
    *_, (_, end) = islice(loader().steps(), 20)
    given = loader(Recorded())
    assert not read
    (step,) = drawn(given, 1, end)
    assert sorted(read) == step


def test_cursor_of_step():
    given = loader(epochs=3)
    ends = [end for _, end in islice(given.steps(), given.num_steps)]
    for step in (1, 7, 20, 26, 30, given.num_steps - 1):
        assert drawn(given, 2, given.cursor_of_step(step)) == drawn(given, 2, ends[step - 1])


@packing
def test_a_mixture_has_orders_of_its_own(tmp_path, packed):
    for name in "ab":
        lines = [json.dumps({"question": f"{name} {n}", "answer": "yes"}) for n in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    parts = [(read_samples(tmp_path / f"{name}.jsonl"), w) for name, w in (("a", 1), ("b", 3))]
    mixture = Mixture(parts, seed=3)
    given = loader(mixture, transform=Named(), packed=packed, batch_size=1, batches_per_step=1)
    for epoch in range(2):
        expected = sorted(Named.number(sample) for sample in mixture.epoch(epoch))
        assert sum(number >= 100 for number in expected) == 60
        steps = []
        for step, end in given.steps(Cursor(epoch)):
            if end.epoch > epoch:
                break
            steps += samples_of(step) if packed else step[0]["tokens"][:, 0].sub(1).tolist()
        assert set(steps) == set(expected)
        assert packed or sorted(steps) == expected  # a sample of b comes twice in some epochs


@packing
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples(packed, workers):
    bad = Numbers(bad=[3, 199])
    options = {"packed": packed, "num_workers": workers, "batch_size": 1}
    with pytest.raises(DataError, match=r"^rows.jsonl, row (3|199): no JSON\.$"):
        drawn(loader(bad, **options))
    skipping = loader(bad, bad_samples="skip", **options)
    steps = drawn(skipping, skipping.num_steps + 1)
    assert {3, 199} & {sample for step in steps for sample in step} == set()
    assert set(skipping.skipped) <= {f"rows.jsonl, row {row}: no JSON." for row in (3, 199)}
    assert skipping.skipped


@packing
def test_samples_that_are_too_long_are_left_out_and_counted(packed):
    given = loader(Numbers(140), packed=packed, max_seq_len=6, batch_size=1, batches_per_step=1)
    first = []
    for step, end in given.steps():
        if end.epoch:
            break
        first += samples_of(step)
    assert sorted(first) == [n for n in range(140) if n % 7 != 6]
    assert given.too_long >= 20


def test_a_batch_without_a_usable_sample_has_nothing_to_learn():
    given = loader(Numbers(8, bad=range(8)), bad_samples="skip", batch_size=2, batches_per_step=2)
    step, _ = next(given.steps())
    assert [batch["labels"].unique().tolist() for batch in step] == [[-100]] * 2
    assert len(given.skipped) == 4


class UnpicklableError(Exception):
    def __reduce__(self):
        raise TypeError("not to be sent to another process")


class Raises(Repeat):
    """A transform of the user's own that raises at one sample."""

    def __init__(self, error):
        self.error = error

    def __call__(self, sample):
        if sample == 17:
            raise self.error
        return super().__call__(sample)


@packing
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "error", [KeyError("size"), StopIteration(), UnpicklableError("x"), OSError(28, "y")]
)
def test_whatever_a_transform_raises_names_the_sample(packed, workers, error):
    """A StopIteration would end the steps; what cannot be pickled would never arrive."""
    options = {"packed": packed, "num_workers": workers, "transform": Raises(error)}
    problem = f"sample 17: {type(error).__name__}: {error} (test_loading.py, line "
    with pytest.raises(DataError, match=rf"^{re.escape(problem)}\d+\)$"):
        drawn(loader(**options))
    skipping = loader(bad_samples="skip", **options)
    steps = drawn(skipping)
    assert 17 not in {sample for step in steps for sample in step}
    assert {message.split(" (")[0] for message in skipping.skipped} == {problem.split(" (")[0]}


class Ends(Repeat):
    def __call__(self, sample):
        if sample == 17:
            os._exit(3)
        return super().__call__(sample)


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_that_ends_names_the_sample(method):
    options = {"num_workers": 2, "start_method": method, "transform": Ends()}
    with pytest.raises(DataError, match=r"^A worker process ended while .*sample 17.* was read: "):
        drawn(loader(**options))


def test_options_out_of_range():
    with pytest.raises(ConfigError) as error:
        loader(batch_size=0, num_workers=-1, packed=True, max_seq_len=None, start_method="x")
    for part in ("batch_size=0 must be at least 1", "num_workers=-1", "packed=True", "fork"):
        assert part in str(error.value)
    short = Repeat()
    short.max_seq_len = LONGEST - 1
    with pytest.raises(ConfigError, match="max_seq_len=23 is more than the transform's, 22"):
        loader(transform=short)
    with pytest.raises(DataError, match=r"7 samples \(7 rows\) are too few for one step of 1 x 4 x 2"):
        loader(Numbers(7))


def write_steps(path, cursor, given):
    """Append the samples of each step, and the cursor after it, to a file, for ever."""
    os.setsid()  # so that its workers are killed with it
    torch.set_num_threads(1)
    with Path(path).open("a") as file:
        for step, end in given.steps(cursor):
            file.write(json.dumps([samples_of(step), end.state()]) + "\n")
            file.flush()


@pytest.mark.long
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes are forked")
@packing
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("workers", "method"), [(0, None), *((2, method) for method in METHODS)])
def test_kills_lose_and_repeat_nothing(tmp_path, packed, workers, method, ranks):
    options = {"packed": packed, "batch_size": 2, "num_workers": workers, "start_method": method}
    rng = random.Random(f"{packed} {workers} {method} {ranks}")
    for rank in range(ranks):
        path, cursor, whole = tmp_path / f"{rank}.jsonl", Cursor(), []
        given = loader(ranks=ranks, rank=rank, **options)
        for _ in range(20):
            path.write_text("")
            process = multiprocessing.get_context("fork").Process(
                target=write_steps, args=(path, cursor, given)
            )
            process.start()
            while "\n" not in path.read_text():
                time.sleep(0.001)
                assert process.is_alive()
            time.sleep(rng.uniform(0, 0.02))
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
            kept = lines[: rng.randint(1, min(len(lines), 9))]  # the last checkpoint was saved here
            whole += [step for step, _ in kept]
            cursor = Cursor(**kept[-1][1])
        alone = loader(ranks=ranks, rank=rank, packed=packed, batch_size=2)
        assert whole == drawn(alone, len(whole))
