import pytest

from torchfuse.options import call_with_options


def takes(a, /, b, *, c=3):
    return a, b, c


def test_calls_when_the_signature_agrees():
    assert call_with_options(takes, 1, what="it", options={"b": 2}) == (1, 2, 3)


def test_names_every_fault_and_what_there_is():
    with pytest.raises(
        ValueError,
        match=r"^it: unknown option 'd', unknown option 'e', missing option 'b'; it takes b, c",
    ):
        call_with_options(takes, 1, what="it", options={"d": 0, "e": 0})


def test_a_fault_inside_the_call_keeps_its_own_type():
    def breaks(b):
        raise TypeError("inside")

    with pytest.raises(TypeError, match="inside"):
        call_with_options(breaks, what="it", options={"b": 2})


def test_keywords_of_any_name_pass_where_they_are_taken():
    assert call_with_options(dict, what="it", options={"x": 1}) == {"x": 1}
    assert call_with_options(lambda **kw: kw, what="it", options={"x": 1}) == {"x": 1}
