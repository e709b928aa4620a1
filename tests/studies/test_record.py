import json

from hypothesis import given, settings
from hypothesis import strategies as st

from studies.record import Target, laid_out

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    plain, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(), part, max_size=3)
)


@given(values)
@settings(max_examples=100, deadline=None)
def test_however_it_is_laid_out_json_means_the_same(value: object) -> None:
    assert json.loads(laid_out(value)) == value


def test_what_holds_plain_values_alone_stands_on_one_line() -> None:
    assert laid_out({"a": [1, 2], "b": {"c": {"d": None}}, 3: []}) == (
        '{\n  "a": [1, 2],\n  "b": {\n    "c": {"d": null}\n  },\n  "3": []\n}'
    )


def test_a_target_tells_its_interval_and_its_note_only_where_it_has_them() -> None:
    bare = Target("rate", 0.9, 0.85, at_least=True).to_dict()
    assert bare == {"name": "rate", "value": 0.9, "bound": 0.85, "at_least": True, "met": True}
    told = Target("gain", 0.1, 0.0, at_least=True, beyond=True, interval=(-0.1, 0.3), note="a against b").to_dict()
    assert (told["low"], told["high"], told["beyond"], told["note"]) == (-0.1, 0.3, True, "a against b")


def test_the_bound_itself_meets_unless_the_value_must_lie_beyond_it() -> None:
    for at_least in (True, False):
        assert Target("gain", 0.0, 0.0, at_least).met
        assert not Target("gain", 0.0, 0.0, at_least, beyond=True).met
    assert Target("gain", 1e-9, 0.0, at_least=True, beyond=True).met


def test_what_has_no_value_is_not_met() -> None:
    assert not Target("ratio", None, 0.5, at_least=False).met
    assert not Target("ratio", None, 0.5, at_least=True).met
