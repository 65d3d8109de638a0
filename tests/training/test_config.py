import copy
import re
import sys
from argparse import Namespace
from dataclasses import dataclass, field

import pytest
from omegaconf import MISSING, OmegaConf

from torchfuse.components import build
from torchfuse.errors import CheckpointError, ConfigError, DataError, ModelError
from torchfuse.training.config import _override, read_config, recipe, typed
from torchfuse.training.config_keys import config_keys


@dataclass
class Inner:
    """A section.

    Attributes:
        rate (number or section): how fast,
            with a second line: the end.
        steps: how long.

    Examples:
        name: none.
    """

    rate: float = 0.5
    steps: int | None = None


@dataclass
class Faster(Inner):
    """Another section.

    Attributes:
        times: how often.
    """

    times: list[int | None] = field(default_factory=lambda: [2, None])


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
    ("values", "message"),
    [
        ({"name": "x", "nme": 1}, r"key 'nme': unknown; there are name, inner, number\."),
        ({"name": "x", "inner": {"rte": 1}}, r"key 'inner\.rte': unknown; there are rate, steps\."),
        ({"name": "x", 5: 1}, "key '5': unknown"),
        ({"name": "x", "number": "many"}, "key 'number': .*'many'.* Integer"),
        ({"name": "x", "number": None}, "key 'number': .*'None'.*'int'"),
        ({"name": "x", "inner": {"rate": [1]}}, r"key 'inner\.rate': .*\[1\].* Float"),
        ({}, "key 'name': missing"),
        ({"name": "???"}, "key 'name': missing"),
        ({"name": "x", "inner": 5}, "key 'inner': expected a section with rate, steps, got 5"),
        ({"name": "x", "inner": None}, "key 'inner': expected a section with rate, steps, got None"),
        ({"name": "x", "inner": [1]}, r"key 'inner': expected a section with rate, steps, got \[1\]"),
        ({"name": "x", "number": "${nothing}"}, "key 'number': Interpolation key 'nothing' not found"),
        ({"name": "x", "number": "${name}"}, "key 'number': .*'x'.* Integer"),
    ],
    ids=str,
)
def test_keys_and_values_that_do_not_fit(values, message):
    with pytest.raises(ValueError, match=f"^Configuration {message}") as info:
        typed(OmegaConf.create(values), Schema)
    assert "\n" not in str(info.value)
    assert str(info.value).count("Configuration key") == 1


def test_all_problems_are_one_error():
    with pytest.raises(
        ValueError,
        match=r"^Configuration key 'inner\.rte': .* Configuration key 'inner\.steps': .* "
        r"Configuration key 'number': .* Configuration key 'name': missing, and must be given\.$",
    ):
        read(inner={"rte": 1, "steps": "x"}, number="many")


def test_interpolations_are_resolved():
    assert read(name="a", number="${inner.steps}", inner={"steps": 5}).number == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", r"is no YAML: .*line 1"),
        ("a: 1\nb: 2\na: 3", r"is no YAML: .*duplicate key a .*line 3"),
        ("a: {b: 1, b: 2}", r"is no YAML: .*duplicate key b"),
        ("- 1", "must hold keys with values, got a list: it is mine"),
        ("5", "cannot be read .*int.*: it is mine"),
        ("1: 2", "a key must be a string, got 1"),
        ("a: ${", "is no YAML: "),
        (b"a: \xff", "is no YAML: .*utf-8"),
        (None, r"cannot be read \(No such file or directory\): it is mine"),
    ],
    ids=str,
)
def test_files_that_are_no_configuration(tmp_path, text, message):
    file = tmp_path / "some.yaml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"some\.yaml:? {message}") as info:
        read_config(file, "it is mine")
    assert "\n" not in str(info.value)
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\): it is mine"):
        read_config(tmp_path, "it is mine")


def test_build():
    got = build({"_component_": "training.test_config.Inner", "rate": 3.0}, what="section")
    assert type(got).__name__ == "Inner"
    with pytest.raises(
        ValueError,
        match=r"section \(training\.test_config\.Inner\): unknown option 'rte'; it takes rate, steps",
    ):
        build({"_component_": "training.test_config.Inner", "rte": 3.0}, what="section")
    with pytest.raises(ValueError, match="there is no component 'training.test_config.Nothing'"):
        build({"_component_": "training.test_config.Nothing"}, what="section")
    with pytest.raises(ValueError, match="there is no component 'no_such_package.x'"):
        build({"_component_": "no_such_package.x"}, what="section")
    with pytest.raises(ValueError, match="section must name its _component_"):
        build({"rate": 3.0}, what="section")
    for nothing in (None, 5, [1], {}, {"_component_": 7}):
        with pytest.raises(ValueError, match="section must name its _component_, a dotted path; got "):
            build(nothing, what="section")
    with pytest.raises(
        ValueError,
        match=r"section \(training\.test_config\.Inner\): steps must be an integer or null, got 'x'\.",
    ):
        build({"_component_": "training.test_config.Inner", "steps": "x"}, what="section")
    with pytest.raises(
        ValueError, match=r"section \(training\.test_config\) must be a function or class .* <module"
    ):
        build({"_component_": "training.test_config"}, what="section")
    with pytest.raises(
        ValueError, match=r"\(training\.test_config\.Inner\) must return a Schema, got a Inner"
    ):
        build({"_component_": "training.test_config.Inner"}, what="section", kind=Schema)


def test_keys_are_described_by_the_docstrings():
    keys = [tuple(vars(key).values()) for key in config_keys(Faster, "a.")]
    assert keys == [
        ("a.rate", "number or section", "0.5", "how fast, with a second line: the end", False),
        ("a.steps", "integer or null", "null", "how long", False),
        ("a.times", "list of integers or nulls", "[2, null]", "how often", False),
    ]
    keys = [(key.name, key.type, key.default, key.is_section) for key in config_keys(Schema)]
    assert keys == [
        ("name", "text", None, False),
        ("inner", "section", "", True),
        ("inner.rate", "number or section", "0.5", False),
        ("inner.steps", "integer or null", "null", False),
        ("number", "integer", "3", False),
    ]


def run(main, tmp_path, monkeypatch, *overrides):
    (tmp_path / "some.yaml").write_text("name: x\ninner: {rate: 2.5}\n")
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(tmp_path / "some.yaml"), *overrides])
    monkeypatch.setattr(sys, "path", [*sys.path])
    recipe(Schema)(main)()


def test_a_recipe_takes_its_file_and_command_line(tmp_path, monkeypatch):
    got = []
    run(got.append, tmp_path, monkeypatch, "number=5", "inner.steps=7", "~inner.rate")
    assert got == [Schema("x", Inner(0.5, 7), 5)]


def test_help_prints_the_keys(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        run(pytest.fail, tmp_path, monkeypatch, "--help")
    printed = capsys.readouterr().out
    assert "  inner.rate (number or section; 0.5)\n        how fast, with a second line" in printed
    assert "  name (text; required)\n" in printed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["number=many"], "Configuration key 'number': "),
        (["number={a"], "Override number={a: while parsing a flow mapping"),
        (["number"], "Override number: expected key=value"),
        (["~other"], "Override ~other: there is no key 'other' to remove"),
        (["~name.x"], "Override ~name.x: "),
        (["[=1"], "Override \\[=1: "),
        (["inner=[1]"], "Override inner=\\[1\\]: "),
        (["a={", "b={"], "Override a={: .* Override b={: "),
    ],
    ids=str,
)
def test_a_mistake_on_the_command_line_ends_a_recipe(tmp_path, monkeypatch, capsys, overrides, message):
    with pytest.raises(SystemExit, match="^1$"):
        run(pytest.fail, tmp_path, monkeypatch, *overrides)
    printed = capsys.readouterr()
    assert not printed.out
    assert len(printed.err.splitlines()) == 1
    assert re.match(f"error: {message}", printed.err)


@pytest.mark.parametrize(
    "override",
    [
        "number=5",
        "inner.rate=1e-3",
        "inner.new.deep=null",
        "name=None",
        "model=other.component",
        "model.width=7",
        "~inner.rate",
        "~number",
        "name=[1, 2]",
    ],
)
def test_overrides_are_merged_as_torchtune_merges_them(override):
    from torchtune.config._utils import _merge_yaml_and_cli_args

    given = {
        "name": "x",
        "number": 3,
        "inner": {"rate": 2.5},
        "model": {"_component_": "some.component", "width": 5},
    }
    expected = _merge_yaml_and_cli_args(Namespace(**copy.deepcopy(given)), [override])
    assert _override(OmegaConf.create(given), override) == expected


def test_a_value_may_hold_an_equals_sign():
    assert _override(OmegaConf.create({"name": "x"}), "name=a=b").name == "a=b"


def test_a_name_with_dots_is_overridden():
    config = OmegaConf.create({"train": {"lr": {"lora.decoder": 2.0, "lora": 3.0}}})
    assert _override(config, "train.lr.lora.decoder=5.0").train.lr == {"lora.decoder": 5.0, "lora": 3.0}
    assert _override(config, "train.lr.lora=5.0").train.lr == {"lora.decoder": 2.0, "lora": 5.0}
    assert _override(config, "train.lr={lora.decoder: 5.0}").train.lr["lora.decoder"] == 5.0


@pytest.mark.parametrize("path", ["~model", "~model._component_"])
def test_a_component_cannot_be_removed(path):
    config = OmegaConf.create({"model": {"_component_": "some.component", "width": 5}})
    with pytest.raises(ConfigError, match="a component cannot be removed"):
        _override(config, path)


def test_an_error_of_the_caller_is_one_sentence_and_any_other_keeps_its_traceback(
    tmp_path, monkeypatch, capsys
):
    def fails_with(error):
        def main(config):
            raise error

        return main

    for kind in (ConfigError, DataError, CheckpointError):
        with pytest.raises(SystemExit, match="^1$"):
            run(fails_with(kind("this sentence")), tmp_path, monkeypatch)
        assert capsys.readouterr().err == "error: this sentence\n"
    for bug in (ValueError("a bug"), ModelError("a bug"), RuntimeError("a bug"), KeyError("a bug")):
        with pytest.raises(type(bug), match="a bug"):
            run(fails_with(bug), tmp_path, monkeypatch)
    monkeypatch.setenv("TORCHFUSE_TRACEBACK", "1")
    with pytest.raises(ConfigError, match="this sentence"):
        run(fails_with(ConfigError("this sentence")), tmp_path, monkeypatch)
