import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Protocol, TypeVar

import pytest
import torch

from torchfuse.models import build_modality_strategy, strategy
from torchfuse.options import call_with_options, check_fields, passes_options_to

T = TypeVar("T")


class SomeProtocol(Protocol):
    def method(self): ...


def takes(a, /, b, *, c=3):
    return a, b, c


def test_calls_when_the_signature_agrees():
    assert call_with_options(takes, 1, what="it", options={"b": 2}) == (1, 2, 3)


def test_names_every_problem_and_what_there_is():
    with pytest.raises(
        ValueError,
        match=r"^it: unknown option 'd', unknown option 'e', missing option 'b'; it takes b, c\.$",
    ):
        call_with_options(takes, 1, what="it", options={"d": 0, "e": 0})


def test_a_problem_inside_the_call_keeps_its_own_type():
    def breaks(b):
        raise TypeError("inside")

    with pytest.raises(TypeError, match="inside"):
        call_with_options(breaks, what="it", options={"b": 2})


def test_keywords_of_any_name_pass_where_they_are_taken():
    def anything(a, **rest):
        return a, rest

    assert call_with_options(anything, 1, what="it", options={"x": 2}) == (1, {"x": 2})
    with pytest.raises(ValueError, match="unknown option 'a', unknown option 7; it takes none"):
        call_with_options(anything, 1, what="it", options={"x": 2, "a": 3, 7: 5})


@pytest.mark.parametrize(
    "target", [dict, torch, "abs", object()], ids=lambda target: type(target).__name__
)
def test_what_has_no_signature_is_not_called(target):
    with pytest.raises(ValueError, match="^it must be a function or class with a known signature, got "):
        call_with_options(target, what="it", options={})


def fits(annotation, value):
    """True if an option with this annotation takes the value; else what the error message expects."""

    def target(option):
        assert option is value

    target.__annotations__["option"] = annotation
    try:
        call_with_options(target, what="it", options={"option": value})
    except ValueError as error:
        message = str(error)
        start, end = "it: option must be ", f", got {value!r}."
        assert message.startswith(start) and message.endswith(end)
        return message[len(start) : -len(end)]
    return True


@pytest.mark.parametrize(
    ("annotation", "good", "bad", "expected"),
    [
        (bool, [True, False], [1, 0.0, "maybe", None, []], "true or false"),
        (int, [3, -2], [3.0, 1.5, True, "3", None, {}], "an integer"),
        (float, [0.5, 2], [True, "2", None, [1.0]], "a number"),
        (str, ["", "x"], [2, None, True, ["x"]], "a string"),
        (None, [None], [0, "", False], "null"),
        (int | None, [5, None], ["five", 5.0, False], "an integer or null"),
        (Optional[float], [5, None], ["five", True], "a number or null"),  # noqa: UP045
        (Literal["a", "b"], ["a"], ["c", None, ["a"]], "'a' or 'b'"),
        (Literal[1, 0], [1], [True, 1.0, 2], "1 or 0"),
        (str | Path, ["x"], [5, None, ["x"]], "a string or a path"),
        (Path, ["x"], [5, True], "a path"),
        (dict, [{}, {"a": 1}], [[], 3, "a"], "a mapping"),
        (Mapping[str, int], [{}, {"a": 1}], [{"a": "x"}, {"a": True}, 3], "a mapping (each an integer)"),
        (Mapping[str, Any], [{"a": object}], [[1], "x"], "a mapping"),
        (list[float], [[], [1, 0.5]], [["x"], [True], "x", 3, {}], "a list (each a number)"),
        (Sequence[float], [[1]], ["12", "", ["1"]], "a list (each a number)"),
        (Sequence[Any], [[1, "x"]], ["12", None], "a list"),
        (tuple[int, str], [[], [1, "x"]], ["x", 1], "a list"),
        (
            bool | Mapping[str, bool],
            [True, {"a": False}],
            ["yes", {"a": 1}],
            "true or false or a mapping (each true or false)",
        ),
        (torch.nn.Module, [torch.nn.ReLU()], ["relu", None], "Module"),
        (
            Literal["mean"] | torch.Tensor,
            ["mean", torch.zeros(1)],
            ["median", 0],
            "'mean' or Tensor",
        ),
        (Callable[[int], str], [str], ["str", 3], "Callable"),
    ],
    ids=str,
)
def test_values_of_a_yaml_must_fit_the_annotation(annotation, good, bad, expected):
    assert [fits(annotation, value) for value in good] == [True] * len(good)
    assert [fits(annotation, value) for value in bad] == [expected] * len(bad)


@pytest.mark.parametrize(
    "annotation",
    [Any, object, T, SomeProtocol, Annotated[int, "small"], "NoSuchName", "int | NoSuchName"],
    ids=str,
)
def test_annotations_without_a_checkable_type_accept_everything(annotation):
    for value in (None, True, 3, 0.5, "x", [1], {"a": 1}):
        assert fits(annotation, value) is True


def test_objects_from_python_pass():
    for value in (object(), torch.zeros(2), Path("x"), (1, 2)):
        assert fits(int, value) is True


def test_annotations_are_read_where_they_are_strings():
    def target(option: "int | None" = None): ...

    with pytest.raises(ValueError, match=r"^it: option must be an integer or null, got 'x'\.$"):
        call_with_options(target, what="it", options={"option": "x"})


INTEGER, FLAG, NUMBER = "an integer", "true or false", "a number"
START = "'warm' or 'zero'"
NO_INTEGERS = ["4", True, 1.5, [4]]
NO_FLAGS = ["false", 0, None]
# Every option of every strategy: what it must be, and what it must not be.
OPTIONS = {
    "placement": ("'placeholder' or 'prefix' or null", ["behind", 3, True, ["prefix"]]),
    "encoder_token": ("an integer, a mapping (each an integer) or null", ["41", True, {"eye": "41"}]),
    "layers": ("a list (each an integer) or null", ["01", "", 3, [True], ["0"], {"a": 1}]),
    "num_heads": (f"{INTEGER} or null", NO_INTEGERS),
    "num_kv_heads": (f"{INTEGER} or null", NO_INTEGERS),
    "hidden_dim": (f"{INTEGER} or null", NO_INTEGERS),
    "qk_norm": (FLAG, NO_FLAGS),
    "norm_eps": (NUMBER, ["1e-5", True, None]),
    "attn_dropout": (NUMBER, ["0.1", False, None]),
    "fusion_first": (FLAG, NO_FLAGS),
    "start": (START, ["cold", True, None]),
    "num_experts": ("an integer or a mapping (each an integer)", ["4", True, None, {"eye": "4"}]),
    "num_text_experts": (INTEGER, NO_INTEGERS),
    "capacity": (f"{NUMBER} or null", ["0.5", True, [0.5]]),
    "noise": (FLAG, NO_FLAGS),
    "auxiliary_router": (FLAG, NO_FLAGS),
    "auxiliary_dim": (f"{INTEGER} or null", NO_INTEGERS),
    "auxiliary_loss_weight": (NUMBER, ["1", True, None]),
    "pad_id": (f"{INTEGER} or null", NO_INTEGERS),
}


@pytest.mark.parametrize(
    ("arch", "name"),
    [(arch, field.name) for arch, cls in strategy._REGISTRY.items() for field in fields(cls)],
)
def test_no_option_of_any_architecture_takes_a_value_of_another_type(arch, name):
    expected, wrong = OPTIONS[name]
    for value in wrong:
        complaint = re.escape(f"architecture {arch!r}: {name} must be {expected}, got {value!r}.")
        with pytest.raises(ValueError, match=f"^{complaint}$"):
            build_modality_strategy(arch, **{name: value})


@dataclass
class Size:
    width: int
    shape: Sequence[int] = (1, 2)
    name: Any = None


def test_fields_are_checked_for_any_instance():
    check_fields(Size(3), "size")
    check_fields(Size(3, [5], name=7), "size")
    with pytest.raises(
        ValueError,
        match=r"^size: width must be an integer, got True; shape must be a list \(each an integer\), "
        r"got '01'\.$",
    ):
        check_fields(Size(True, "01"), "size")


def test_all_problems_are_one_error():
    def target(one: int, *, two: bool = True, three: str = ""): ...

    with pytest.raises(
        ValueError,
        match=r"^it: unknown option 'four', missing option 'one'; it takes one, two, three; "
        r"two must be true or false, got 'x'; three must be a string, got 5\.$",
    ):
        call_with_options(target, what="it", options={"two": "x", "three": 5, "four": 4})


def inner(part, *, width: int, depth: int = 2, **rest: int):
    return part, width, depth, rest


@passes_options_to(inner, width=5)
def outer(*, name: str, depth: int = 7, **options):
    """Documented."""
    return name, inner("part", width=5, depth=depth, **options)


@passes_options_to(outer, name="x")
def outermost(**options):
    return outer(name="x", **options)


def test_options_that_are_passed_on():
    assert outer(name="x", more=3) == ("x", ("part", 5, 7, {"more": 3}))
    assert outermost(depth=3) == ("x", ("part", 5, 3, {}))
    assert (outer.__name__, outer.__doc__) == ("outer", "Documented.")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"depth": "x"}, "depth must be an integer, got 'x'"),
        ({"width": 5}, "width is fixed here at 5 and cannot be given, got 5"),
        ({"part": "mine"}, "part is fixed here and cannot be given, got 'mine'"),
    ],
    ids=str,
)
def test_options_that_are_passed_on_are_checked(options, complaint):
    with pytest.raises(ValueError, match=rf"^outer: {complaint}\.$"):
        outer(name="x", **options)
    with pytest.raises(ValueError, match=rf"^outermost: {complaint}\.$"):
        outermost(**options)
    with pytest.raises(ValueError, match=rf"^it: {complaint}\.$"):
        call_with_options(outer, what="it", options={"name": "x", **options})


def test_what_is_fixed_is_not_offered():
    with pytest.raises(ValueError, match=r"^it: missing option 'name'; it takes name, depth\.$"):
        call_with_options(outer, what="it", options={})
    with pytest.raises(ValueError, match=r"name is fixed here at 'x' and cannot be given, got 'y'"):
        outermost(name="y")
