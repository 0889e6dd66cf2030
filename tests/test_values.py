"""Values from text and back: YAML 1.2, duplicate keys, JSON without Infinity."""

import json
import math

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from stn_fast.errors import UserError
from stn_fast.recipes import digits
from stn_fast.training.layering import resolve
from stn_fast.values import NotYaml, finite, from_json, from_yaml, number, to_json, to_yaml, whole_number


def refuse(constant):
    raise ValueError(f"{constant} is not JSON")


# As the YAML 1.2.2 specification has it, section 10.3.2.
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1e3", 1000.0),
        ("-.5E+2", -50.0),
        ("12.", 12.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("+12", 12),
        ("true", True),
        ("FALSE", False),
        ("", None),
        ("~", None),
        ("Null", None),
    ],
)
def test_plain_scalars_are_what_yaml_1_2_says(text, value):
    assert from_yaml(text) == value
    assert type(from_yaml(text)) is type(value)
    assert math.isnan(from_yaml(".nan"))


@pytest.mark.parametrize(
    "text",
    ["yes", "no", "on", "Off", "y", "1:30", "1:30.5", "1_000", "1_0.5", "0b11", "2001-01-31", "2001-99-99", "=", "inf"],
)
def test_what_only_yaml_1_1_takes_for_something_else_is_text(text):
    assert from_yaml(text) == text


NOT_TEXT = ["yes", "1e3", "1e-3", "null", "010", "0o17", "~", "", "1:30", "1_000", "2001-01-31", "<<", "=", ".inf"]
texts = st.one_of(st.text(), st.sampled_from(NOT_TEXT), st.from_regex(r"[-+.0-9eEx_:o]{1,8}", fullmatch=True))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), texts),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(values)
@example("\udcff is what an argument that is not UTF-8 becomes")
@example("a b " * 60)
def test_what_is_dumped_reads_back_equal(value):
    assert from_yaml(to_yaml(value)) == value


@given(texts)
def test_text_reads_back_as_text_by_yaml_1_1_too(text):
    assert yaml.safe_load(to_yaml({"key": text})) == {"key": text}


@pytest.mark.parametrize("text", NOT_TEXT)
def test_a_configuration_keeps_text_that_looks_like_something_else(text, tmp_path):
    config = resolve(digits.config(), flags={"data_root": text or "x"})
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml({"data_root": config.data_root}))
    assert resolve(digits.config(), str(file)).data_root == config.data_root


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("seed: 1\nseed: 2\n", "'seed'", 2),
        ("a:\n  b: 1\nc: 1\na:\n  d: 1\n", "'a'", 4),
        ("a: {b: 1, 'b': 2}", "'b'", 1),
        ("- - {x: 1,\n     x: 1}", "'x'", 2),
        ("a: &a {b: 1, b: 2}\nc: {<<: *a}\n", "'b'", 1),
        ("? {k: 1, k: 2}\n: 3\n", "'k'", 1),
        ("{1: a, 0x1: b}", "'0x1'", 1),
        ("a: {<<: {b: 1}, <<: {b: 2}}", "'<<'", 1),
    ],
)
def test_a_key_that_is_given_twice_is_an_error_that_names_it(text, key, line):
    with pytest.raises(NotYaml, match=rf"^line {line}: key {key} is given twice$"):
        from_yaml(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{<<: {a: 1}, a: 2}", {"a": 2}),
        ("{a: 2, <<: [{a: 1, b: 1}, {b: 3, c: 3}]}", {"a": 2, "b": 1, "c": 3}),
        ("x: &x {a: 1}\ny: &y {<<: *x, a: 2, b: 2}\nz: {<<: *y, a: 3}\n", {"a": 3, "b": 2}),
    ],
)
def test_a_merge_key_may_repeat_what_is_merged(text, value):
    read = from_yaml(text)
    assert read.get("z", read) == value


@pytest.mark.parametrize(
    "text",
    ["[1", "a: 1\n---\nb: 2", "\0", "[" * 5000, "9" * 5000, "!!timestamp 2001-99-99", "!!int 1_000", "{[1]: 2}"],
)
def test_all_invalid_yaml_raises_the_same_error(text):
    with pytest.raises(NotYaml) as caught:
        from_yaml(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ("schedule={epochs: 3, epochs: 4}", "key 'epochs' is given twice"),
        ("hyperparameters.input_noise={init: .1, init: .2}", "key 'init' is given twice"),
        ("method.freeze=yes", "method.freeze .* = 'yes': must be true or false"),
        ("seed=1_000", "seed .* = '1_000': must be a whole number"),
        ("seed=1:30", "seed .* = '1:30': must be a whole number"),
        ("optimizer.learning_rate='0.1'", "optimizer.learning_rate = '0.1': must be a number"),
        ("seed=2001-99-99", "must be a whole number"),
        (f"optimizer.learning_rate=1{'0' * 400}", "must be a number that a float can hold"),
    ],
)
def test_a_pair_is_read_by_the_same_rules(pair, says):
    with pytest.raises(UserError, match=says):
        resolve(digits.config(), None, [pair])
    assert resolve(digits.config(), None, ["seed=010", "optimizer.learning_rate=1e-3"]).seed == 10


def test_a_file_is_read_by_the_same_rules(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("optimizer:\n  learning_rate: 0.25\nseed: 3\noptimizer:\n  momentum: 0.5\n")
    with pytest.raises(UserError, match=r"c.yaml is not valid YAML \(line 4: key 'optimizer' is given twice\)"):
        resolve(digits.config(), str(file))
    file.write_text("method: {freeze: no}\n")
    with pytest.raises(UserError, match="must be true or false"):
        resolve(digits.config(), str(file))
    file.write_text("optimizer: {<<: {learning_rate: 0.25, momentum: 0.5}, learning_rate: 125e-3}\nseed: 0o10\n")
    config = resolve(digits.config(), str(file))
    assert (config.optimizer.learning_rate, config.optimizer.momentum, config.seed) == (0.125, 0.5, 8)


@given(st.floats())
def test_a_number_is_read_from_text_as_yaml_reads_it(value):
    text = repr(value).replace("inf", ".inf").replace("nan", ".nan")
    assert number(text) == value or math.isnan(value)
    assert number("0x10") == whole_number("0x10") == 16


@pytest.mark.parametrize("text", ["1_000", " 1", "", "1e400x", "٣", "nan", "infinity", "true"])
def test_a_number_that_only_python_reads_is_refused(text):
    for read in (number, whole_number):
        with pytest.raises(ValueError, match="is not a"):
            read(text)


@pytest.mark.parametrize("indent", [None, 2])
def test_no_json_has_a_number_that_is_not_finite(indent):
    value = {"a": math.inf, "b": [1.5, (-math.inf, math.nan)], "c": {"d": math.nan, "e": 1}, "f": "Infinity"}
    expected = {"a": None, "b": [1.5, [None, None]], "c": {"d": None, "e": 1}, "f": "Infinity"}
    assert json.loads(to_json(value, indent), parse_constant=refuse) == expected == finite(value)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", b"\xff", "9" * 5000])
def test_all_invalid_json_raises_the_same_error(text):
    with pytest.raises(ValueError):  # noqa: PT011  what it says is json's
        from_json(text)


@pytest.mark.parametrize("text", ["0x" + "f" * 5000, "0o" + "7" * 5000, "-" + "9" * 5000])
def test_a_number_of_too_many_digits_is_a_value_error_of_one_line(text):
    for read in (number, whole_number):
        with pytest.raises(ValueError, match="digits") as caught:
            read(text)
        assert len(str(caught.value)) < 200
    with pytest.raises(NotYaml):
        from_yaml(f"seed: {text}")


def test_a_whole_number_that_no_float_holds_is_a_value_error_where_a_number_is_read():
    with pytest.raises(ValueError, match="too large for a floating point"):
        number("9" * 400)


@pytest.mark.parametrize("text", ["!!timestamp 2020-01-01", "!!set {a, b}", "!!binary aGk=", "!!omap [a: 1]"])
def test_tags_of_yaml_1_1_are_refused(text):
    with pytest.raises(NotYaml):
        from_yaml(text)
