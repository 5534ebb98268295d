"""The core schema of YAML 1.2: what a scalar means, and what is refused."""

from __future__ import annotations

import math

import pytest

from runner import yaml12


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 0.0002),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("-7", -7),
        ("+7", 7),
        ("0o17", 15),
        ("017", 17),
        ("0xff", 255),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("off", "off"),
        ("True", True),
        ("false", False),
        ("~", None),
        ("null", None),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("2024-01-01", "2024-01-01"),
        ("e5", "e5"),
        ('"2e-4"', "2e-4"),
        ("!!str 5", "5"),
        ("!!int 0x10", 16),
    ],
)
def test_scalars(text: str, value: object) -> None:
    document = yaml12.parse(f"key: {text}")
    assert document.problems == []
    assert document.values == {"key": value}
    assert type(document.values["key"]) is type(value)


def test_nan() -> None:
    assert math.isnan(yaml12.parse("key: .nan").values["key"])


def test_lines_of_keys_and_items() -> None:
    document = yaml12.parse("a: 1\nb:\n  c: 2\n  d:\n    - x\n    - y: 3\n")
    assert document.lines == {"": 1, "a": 1, "b": 2, "b.c": 3, "b.d": 4, "b.d[0]": 5, "b.d[1]": 6, "b.d[1].y": 6}


def test_anchors_are_copies() -> None:
    values = yaml12.parse("a: &x {k: [1]}\nb: *x\n").values
    assert values == {"a": {"k": [1]}, "b": {"k": [1]}}
    assert values["a"]["k"] is not values["b"]["k"]


def test_aliases_of_aliases_are_bounded() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    document = yaml12.parse("\n".join(levels))
    assert [problem.message for _, problem in document.problems] == [
        "more than 100000 values, aliases counted as often as they are used"
    ]


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "a: given twice, first on line 1 (keep one of the two)"),
        ("a:\n  b: 1\n  b: 2\n", 3, "a.b: given twice, first on line 2 (keep one of the two)"),
        ("a: 1\n---\nb: 2\n", 2, "several documents in one file: keep one (what stands after `---`, on its own)"),
        ("a: &a [*a]\n", 1, "a[0]: contains itself through an alias"),
        ("a: {<<: {b: 1}}\n", 1, "a: merge keys (<<) are not part of YAML 1.2 (write the keys out)"),
        ("true: 1\n", 1, "expected text as a key, got true (put it in quotes)"),
        ("[a]: 1\n", 1, "expected text as a key, got a list or a mapping"),
        ("a: !!timestamp 2024-01-01\n", 1, "a: the tag !!timestamp is not supported (leave it out)"),
        ("a: !!python/name:os.system x\n", 1, "a: the tag !!python/name:os.system is not supported (leave it out)"),
        ("a: !!int x\n", 1, "a: 'x' cannot be read as int"),
        ("a: \x07\n", 1, "the character U+0007 is not allowed in YAML"),
        ("a: *b\n", 1, "not valid YAML: an alias (*name) without its anchor (&name)"),
        ('a: "\\0"\n', 1, "a: contains a NUL character, which no value may"),
        ('"\\0": 1\n', 1, "a key contains a NUL character"),
        ("a: \udcff\n", 1, "not UTF-8 text"),
    ],
)
def test_refused(text: str, line: int, problem: str) -> None:
    document = yaml12.parse(text)
    assert [(at, str(found)) for at, found in document.problems] == [(line, problem)]


@pytest.mark.parametrize("number", ["9" * 5_000, "0x" + "f" * 5_000, "0o" + "7" * 5_000])
def test_a_number_too_long_to_be_printed_is_refused(number: str) -> None:
    ((_, problem),) = yaml12.parse(f"a: {number}").problems
    assert problem.message.endswith("cannot be read as int")
    assert len(str(problem)) < 600


def test_nothing_is_no_value() -> None:
    assert yaml12.parse("# only a comment\n").values is None
    assert yaml12.parse("").problems == []


def test_byte_order_mark_is_skipped() -> None:
    assert yaml12.parse(yaml12.decode(b"\xef\xbb\xbfa: 1\n")).values == {"a": 1}


def test_what_is_not_utf8_names_line_and_byte() -> None:
    with pytest.raises(ValueError, match="line 2: byte 0xe9 is not UTF-8"):
        yaml12.decode("a: 1\nb: é\n".encode("latin-1"))


@pytest.mark.parametrize(
    "text",
    [
        "a:\n  " + "[" * 100_000 + "]" * 100_000,
        "a:\n  " + "{b: " * 5_000 + "1" + "}" * 5_000,
        "a:\n  " + "- " * 60 + "x",
    ],
    ids=["lists", "mappings", "blocks"],
)
def test_what_is_nested_too_deep_is_one_problem(text: str) -> None:
    problems = yaml12.parse(text).problems
    assert [problem.message for _, problem in problems] == [
        "more than 50 levels of lists and mappings inside each other"
    ]


def test_aliases_that_nest_too_deep_are_one_problem() -> None:
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 4_000))]
    problems = yaml12.parse("\n".join(lines)).problems
    assert len(problems) == 1
    assert problems[0][1].message.startswith("more than")


def test_a_chain_of_aliases_too_deep_for_the_stack() -> None:
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 4_000))]
    ((_, problem),) = yaml12.parse("\n".join(lines)).problems
    assert problem.message == "more than 50 levels of lists and mappings inside each other"


def test_fifty_levels_are_read() -> None:
    text = "a: " + "[" * 49 + "x" + "]" * 49
    assert yaml12.parse(text).problems == []
    assert len(yaml12.parse(text.replace("[x]", "[[x]]")).problems) == 1
