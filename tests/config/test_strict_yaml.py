"""Strict YAML: what is read, what is refused, and on which line. Both of PyYAML's scanners are run."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from truthgpt.config import strict_yaml
from truthgpt.config.strict_yaml import (
    MAX_ALIASED,
    MAX_DEPTH,
    dotted,
    flow,
    parse_scalar_or_flow,
    parse_yaml,
    scan_yaml,
)
from truthgpt.errors import ConfigError

# The scanner is the same for all examples of one test.
scanned = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)


@pytest.fixture(autouse=True, params=["CSafeLoader", "SafeLoader"])
def scanner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_yaml, "_LOADER", getattr(yaml, request.param))


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "a.yaml")
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-1.5e+3", -1500.0),
        ("012", 12),
        ("0o17", 15),
        ("0x1F", 31),
        ("-3", -3),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("off", "off"),
        ("no", "no"),
        ("Yes", "Yes"),
        ("2024-01-01", "2024-01-01"),
        ("12:30:00", "12:30:00"),
        ("1_000", "1_000"),
        ("0b1", "0b1"),
        ("'1'", "1"),
        ('"true"', "true"),
        ("!!str 5", "5"),
        ("!!float 5", 5.0),
        ("! 5", "5"),
        ("-.inf", -math.inf),
    ],
)
def test_scalars_of_yaml_1_2(written: str, value: object) -> None:
    read = parse_yaml(f"a: {written}", "a.yaml").data["a"]
    assert read == value
    assert type(read) is type(value)


def test_every_key_and_item_has_its_line() -> None:
    parsed = parse_yaml("a:\n  b: [1,\n    2]\n\n# comment\nc:\n  - d: 1\n", "a.yaml")
    assert parsed.data == {"a": {"b": [1, 2]}, "c": [{"d": 1}]}
    assert parsed.lines == {
        ("a",): 1,
        ("a", "b"): 2,
        ("a", "b", 0): 2,
        ("a", "b", 1): 3,
        ("c",): 6,
        ("c", 0): 7,
        ("c", 0, "d"): 7,
    }


def test_aliases_become_copies() -> None:
    data = parse_yaml("a: &x {b: [1]}\nc: *x\n", "a.yaml").data
    assert data == {"a": {"b": [1]}, "c": {"b": [1]}}
    assert data["a"]["b"] is not data["c"]["b"]


def test_lesser_mistakes_are_all_reported() -> None:
    text = "a: 1\nb:\n  c: 1\n  c: 2\n1: x\n<<: {d: 1}\ne: !mine 2\nf: !!timestamp 2024\ng: !!python/name:os x\n"
    found = problems(text)
    assert found[0] == "a.yaml:4: b.c: written twice, on lines 3 and 4 (keep one of them)"
    assert [line.split(":")[1] for line in found] == ["4", "5", "6", "7", "8", "9"]
    assert "a key must be text; found an integer" in found[1]
    assert "extends" in found[2]
    assert scan_yaml(text, "a.yaml").data["b"] == {"c": 1}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("- 1", 1, "must be a mapping"),
        ("just text", 1, "must be a mapping"),
        ("", None, "empty"),
        ("# only a comment\n", None, "empty"),
        ("a: 1\n---\nb: 1\n", 2, "second YAML document"),
        ("a: 1\nb: [1, 2\n", 3, "column"),
        ("a: 1\n\tb: 2\n", 2, "column"),
        ("a: 1\nb: @x\n", 2, "column 4"),
        ("a: 1\nb: \x07\n", 2, "U+0007"),
        ("a: *nothing\n", 1, "no anchor"),
        ("a: 1\nb: &x [*x]\n", 2, "inside its own anchor"),
        ("a: 1\nb: " + "[" * 40 + "]" * 40, 2, f"more than {MAX_DEPTH} deep"),
        ("a: " + "{b: " * 200_000, 1, f"more than {MAX_DEPTH} deep"),
        ("a: " + "9" * 70, 1, "a number of 70 characters"),
        ("a: " + "x" * (1 << 20), None, "bytes; at most"),
        ("a: \ud800", None, "not valid Unicode"),
    ],
)
def test_refusals_name_the_line(text: str, line: int | None, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "a.yaml")
    (problem,) = caught.value.problems
    assert (problem.file, problem.line) == ("a.yaml", line)
    assert words in problem.message


def test_alias_bomb_is_refused_before_it_expands() -> None:
    levels = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 12)]
    (found,) = problems("\n".join(["l0: &l0 [1, 1, 1]", *levels]))
    assert f"more than {MAX_ALIASED:,} values" in found


def test_aliases_do_not_hide_depth() -> None:
    chain = ["l0: &l0 {x: 1}", *(f"l{i}: &l{i} {{x: *l{i - 1}}}" for i in range(1, 60))]
    (found,) = problems("\n".join(chain))
    assert f"more than {MAX_DEPTH} deep" in found
    assert found.startswith(f"a.yaml:{MAX_DEPTH - 1}:")  # line n is n + 2 deep: root, l<n - 1>, ..., 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("[a, 2]", ["a", 2]),
        ("{type: byte}", {"type": "byte"}),
        ("", None),
        ("off", "off"),
        ("a b", "a b"),
    ],
)
def test_command_line_values(text: str, value: object) -> None:
    assert parse_scalar_or_flow(text) == value


def test_bad_command_line_value() -> None:
    with pytest.raises(ConfigError):
        parse_scalar_or_flow("[1, 2")
    with pytest.raises(ConfigError):
        parse_scalar_or_flow("{a: 1, a: 2}")


def test_dotted_paths() -> None:
    assert dotted(("training", "callbacks", 0, "type")) == "training.callbacks[0].type"
    assert dotted(("a", "odd\nkey")) == 'a."odd\\nkey"'
    assert len(dotted(("x" * 1000,))) < 80


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=12,
)


@scanned
@given(plain)
def test_flow_is_read_back_the_same(value: object) -> None:
    read = parse_yaml(f"a: {flow(value)}  # comment", "a.yaml").data["a"]
    assert read == value
    assert repr(read) == repr(value)


@scanned
@given(st.sampled_from([1e-5, 2.5e-8, 1e16, 0.1, True, "off", "no", "1e5", "null", None, 3]))
def test_flow_means_the_same_to_readers_of_yaml_1_1(value: object) -> None:
    assert yaml.safe_load(flow(value)) == value


@scanned
@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parsed = parse_yaml(text, "a.yaml")
    except ConfigError as error:
        assert all(problem.message and "\n" not in str(problem) for problem in error.problems)
    else:
        assert isinstance(parsed.data, dict)


@scanned
@given(st.text(alphabet="ab:{}[]&*!|>-? \n\t'\"#%<,1.e", max_size=60))
def test_yaml_like_text_is_read_or_refused(text: str) -> None:
    try:
        parse_yaml(text, "a.yaml")
    except ConfigError as error:
        assert str(error)
