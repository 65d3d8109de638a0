"""The estimate of a training's memory is what a training takes."""

import pytest
from benchmarks import training_memory


@pytest.mark.long
@pytest.mark.parametrize("name", training_memory.CASES)
def test_the_estimate_is_within_a_tenth_of_the_measured_peak(name):
    measured, estimated = training_memory.compare(name)
    print(f"{name}: measured {measured / 1e9:.3f} GB, estimated {estimated.peak / 1e9:.3f} GB")
    assert measured > 1.5e9
    assert estimated.peak == pytest.approx(measured, rel=0.1)
