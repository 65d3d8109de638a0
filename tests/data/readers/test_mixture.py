import pickle
from collections import Counter

import numpy as np
import pytest
from sample_records import write_array

from torchfuse.data import Mixture, read_mixture, read_samples
from torchfuse.errors import ConfigError, DataError

SIZES = (53, 11, 7)


@pytest.fixture
def sets(tmp_path):
    names = "abc"
    return [
        read_samples(
            write_array(tmp_path / f"{name}.json", [{"question": f"{name}{i}"} for i in range(size)])
        )
        for name, size in zip(names, SIZES, strict=True)
    ]


def questions(samples):
    return [sample.messages[0].text for sample in samples]


def test_without_weights_an_epoch_is_every_sample_once(sets):
    mixture = Mixture([(samples, None) for samples in sets], seed=3)
    everything = sorted(text for samples in sets for text in questions(samples))
    first, second = (questions(mixture.epoch(epoch)) for epoch in range(2))
    assert sorted(first) == sorted(second) == everything
    assert first != second
    assert len(mixture) == len(first) == sum(SIZES)


def test_shares_are_those_of_the_weights_and_rows_are_drawn_equally_often(sets):
    mixture = Mixture([*zip(sets, (2.0, 1.0, 0.5), strict=True)], seed=3)
    drawn = Counter()
    for epoch in range(9):
        texts = questions(mixture.epoch(epoch))
        counts = Counter(text[0] for text in texts)
        assert len(texts) == len(mixture) == 71
        assert [counts[name] for name in "abc"] == [41, 20, 10]
        drawn.update(texts)
    for name, size in zip("abc", SIZES, strict=True):
        times = [drawn[f"{name}{i}"] for i in range(size)]
        assert max(times) - min(times) <= 1
        assert min(times) > 0


def test_the_order_is_a_function_of_seed_and_epoch(sets):
    def order(seed, epoch, weight=1.0):
        mixture = Mixture([(samples, weight) for samples in sets], seed=seed)
        return questions(pickle.loads(pickle.dumps(mixture)).epoch(epoch))

    assert order(3, 5) == order(3, 5)
    assert len({tuple(order(seed, epoch)) for seed in (3, 4) for epoch in (0, 1)}) == 4
    mixture = Mixture([(samples, 1.0) for samples in sets], seed=3)
    assert questions(mixture.epoch(5)[29:]) == order(3, 5)[29:]


def test_slices_and_repeated_sets_are_parts(sets):
    mixture = Mixture([(sets[0][40:], 1.0), (sets[0][:40:4], 1.0), (sets[1], 1.0)])
    names = Counter(text[0] for text in questions(mixture.epoch(0)))
    assert names == {"a": 23, "b": 11}
    assert {int(text[1:]) for text in questions(mixture.samples) if text[0] == "a"} == {
        *range(40, 53),
        *range(0, 40, 4),
    }


def test_digests_differ_by_the_sets_and_their_order(sets):
    digests = {
        Mixture([(samples, None) for samples in chosen]).digest
        for chosen in (sets, sets[::-1], sets[:2], [sets[0][1:], *sets[1:]])
    }
    assert len(digests) == 4


def test_selected_samples_are_those_of_the_indices(sets):
    part = sets[0][50:3:-2]
    assert questions(part.select(np.array([2, 0, 2]))) == ["a46", "a50", "a46"]
    assert questions(part.select(np.array([2, 0, 2]))[1:].select(np.array([1]))) == ["a46"]
    with pytest.raises(IndexError, match="indices must be from 0 to 23"):
        part.select(np.array([24]))


def test_bad_weights(sets):
    for weights in [(1.0, None, 1.0), (1.0, 0.0, 1.0), (1.0, float("inf"), 1.0)]:
        with pytest.raises(ConfigError, match="Give every set of a mixture a weight above 0, or none"):
            Mixture([*zip(sets, weights, strict=True)])
    with pytest.raises(ConfigError, match=r"weights \[1e-06, 1, 1\] .* would never be drawn"):
        Mixture([*zip(sets, (1e-6, 1, 1), strict=True)])
    with pytest.raises(ConfigError, match=r"needs sets of samples that are not empty, got sizes \[0\]"):
        Mixture([(sets[0][:0], None)])


def test_mixtures_of_a_configuration(tmp_path, sets):
    mixture = read_mixture(
        [{"path": tmp_path / "a.json", "weight": 3}, {"path": str(tmp_path / "b.json"), "weight": 1}],
        seed=3,
    )
    same = Mixture([(sets[0], 3.0), (sets[1], 1.0)], seed=3)
    assert questions(mixture.epoch(2)) == questions(same.epoch(2))
    assert questions(read_mixture(tmp_path / "a.json").samples) == questions(sets[0])
    (sample, *_) = read_mixture({"path": tmp_path / "a.json", "format": "vqa"}).samples
    assert sample.metadata == {}
    with pytest.raises(DataError, match="x.json cannot be read: .*\n.*y.json cannot be read"):
        read_mixture([tmp_path / "x.json", tmp_path / "y.json"])
    with pytest.raises(ConfigError, match="data names no file"):
        read_mixture([])
