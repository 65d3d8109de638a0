from dataclasses import dataclass, field

import pytest
from omegaconf import MISSING, OmegaConf

from torchfuse.config import build, typed


@dataclass
class Inner:
    rate: float = 0.5
    steps: int | None = None


@dataclass
class Schema:
    name: str = MISSING
    inner: Inner = field(default_factory=Inner)
    number: int = 3


def read(**values):
    return typed(OmegaConf.create(values), Schema)


def test_defaults_and_values():
    got = read(name="x", inner={"rate": 2})
    assert got == Schema("x", Inner(2.0, None), 3)
    assert isinstance(got.inner, Inner)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"name": "x", "nme": 1}, r"key 'nme': .*There are name, inner, number\."),
        ({"name": "x", "inner": {"rte": 1}}, r"key 'inner\.rte': .*There are rate, steps\."),
        ({"name": "x", "number": "many"}, "key 'number'"),
        ({}, "key 'name'"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(values, complaint):
    with pytest.raises(ValueError, match=complaint) as info:
        read(**values)
    assert "\n" not in str(info.value)


def test_build():
    got = build({"_component_": "test_config.Inner", "rate": 3.0}, what="section")
    assert type(got).__name__ == "Inner"
    with pytest.raises(
        ValueError, match=r"section \(test_config\.Inner\): unknown option 'rte'; it takes rate, steps"
    ):
        build({"_component_": "test_config.Inner", "rte": 3.0}, what="section")
    with pytest.raises(ValueError, match="there is no component 'test_config.Nothing'"):
        build({"_component_": "test_config.Nothing"}, what="section")
    with pytest.raises(ValueError, match="there is no component 'no_such_package.x'"):
        build({"_component_": "no_such_package.x"}, what="section")
    with pytest.raises(ValueError, match="section must name its _component_"):
        build({"rate": 3.0}, what="section")
