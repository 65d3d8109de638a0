"""The page of all configurations describes every key, as the dataclasses have it."""

import ast
import importlib
import importlib.util
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from torchfuse import recipes
from torchfuse.training.config import typed
from torchfuse.training.config_keys import attributes_of, config_keys

FILE = Path(__file__).parents[2] / "docs" / "configuration.py"


def load_generator():
    spec = importlib.util.spec_from_file_location("configuration", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = load_generator()


def schema_of(recipe):
    return importlib.import_module(f"torchfuse.recipes.{recipe}").Config


def sections(schema):
    yield schema
    for field in fields(schema):
        if is_dataclass(field.type):
            yield from sections(field.type)


def test_every_recipe_is_on_the_page():
    named = [
        file.stem
        for file in Path(recipes.__file__).parent.glob("*.py")
        for node in ast.parse(file.read_text()).body
        if any("recipe(Config" in ast.unparse(mark) for mark in getattr(node, "decorator_list", []))
    ]
    assert sorted(named) == sorted(GENERATOR.RECIPES)


@pytest.mark.parametrize("recipe", GENERATOR.RECIPES)
def test_the_docstrings_describe_every_key_and_nothing_else(recipe):
    for section in sections(schema_of(recipe)):
        assert list(attributes_of(section)) == [field.name for field in fields(section)], section
    for key in config_keys(schema_of(recipe)):
        assert key.meaning, key
        assert "any value" not in key.type, key


@pytest.mark.parametrize("recipe", GENERATOR.RECIPES)
def test_the_defaults_on_the_page_are_those_of_the_dataclasses(recipe):
    required, shown = {}, {}
    for key in config_keys(schema_of(recipe)):
        if key.default is None:
            value = ["x"] if key.type.startswith("list") else {} if key.type == "section" else "x"
            required[key.name] = value
        elif not key.is_section:
            shown[key.name] = yaml.safe_load(key.default)
    assert shown
    assert typed(nested(required), schema_of(recipe)) == typed(
        nested(required | shown), schema_of(recipe)
    )


def nested(values):
    config = OmegaConf.create()
    for key, value in values.items():
        OmegaConf.update(config, key, value)
    return config


def test_the_page_has_a_row_for_every_key():
    page = GENERATOR.page()
    for recipe in GENERATOR.RECIPES:
        table = page.partition(f"\n## {recipe}\n")[2].partition("\n## ")[0]
        rows = [line for line in table.splitlines() if line.startswith("| `")]
        keys = list(config_keys(schema_of(recipe)))
        for row, key in zip(rows, keys, strict=True):
            assert row.startswith(f"| `{key.name}` | {key.type} | ")
            assert row.count("|") == 5
