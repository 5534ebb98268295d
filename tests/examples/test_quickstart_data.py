"""The quickstart's data: the same on every machine, nothing held out is in training, the score is strict."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import make_data
import pytest
from make_data import Order, is_exact, make_cases, read_cases, write_cases

QUICKSTART = Path(make_data.__file__).parent
ORDER = Order("Ada Costa", "red lamp", 12, "Oslo")


@pytest.fixture(scope="module")
def cases() -> tuple[list[make_data.Case], list[make_data.Case]]:
    return make_cases()


def test_there_are_as_many_cases_as_asked_for(cases):
    train, heldout = cases
    assert (len(train), len(heldout)) == (make_data.TRAIN_ROWS, make_data.HELDOUT_ROWS)
    assert [len(part) for part in make_cases(train=7, heldout=3)] == [7, 3]


def test_no_sentence_occurs_twice(cases):
    sentences = [case.sentence for part in cases for case in part]
    assert len(set(sentences)) == len(sentences)


def test_no_customer_with_product_that_is_held_out_is_in_training(cases):
    train, heldout = ({(case.order.customer, case.order.product) for case in part} for part in cases)
    assert not train & heldout


def test_no_customer_that_is_held_out_is_in_training(cases):
    train, heldout = ({case.order.customer for case in part} for part in cases)
    assert not train & heldout


def test_what_is_held_out_is_of_the_same_kind_as_what_is_trained(cases):
    """Colours, articles and cities are few and shared: only customers and combinations are new."""
    train, heldout = (
        {word for case in part for word in (*case.order.product.split(), case.order.city)} for part in cases
    )
    assert heldout <= train


def test_the_same_seed_gives_the_same_cases_in_another_process(cases):
    """Hash order differs between processes: nothing may depend on it."""
    script = "import make_data; print(repr(make_data.make_cases()))"
    other = subprocess.run(
        [sys.executable, "-c", script], cwd=QUICKSTART, env={"PYTHONHASHSEED": "1"}, capture_output=True, text=True
    )
    assert other.stdout.strip() == repr(cases)


def test_another_seed_gives_other_cases(cases):
    assert make_cases(seed=make_data.SEED + 1) != cases


def test_the_sentence_says_what_the_order_holds(cases):
    for part in cases:
        for case in part:
            order = case.order
            colour, article = order.product.split()
            noun = f"{colour} {article if order.quantity == 1 else make_data.ARTICLES[article]}"
            amounts = [word for word, number in make_data.AMOUNTS.items() if number == order.quantity]
            amounts = [str(order.quantity), *("an" if word == "a" and noun[0] in "aeiou" else word for word in amounts)]
            assert re.search(rf"(^|[ :])({'|'.join(amounts)}) {noun}[.,? ]", case.sentence, re.IGNORECASE), case
            assert order.customer in case.sentence
            assert order.city in case.sentence


def test_every_way_of_saying_a_quantity_is_learnt(cases):
    said = " ".join(case.sentence.lower() for case in cases[0])
    assert [amount for amount in make_data.AMOUNTS if said.count(f"{amount} ") < 3] == []


def test_a_row_holds_instruction_sentence_and_answer(cases):
    case = cases[0][0]
    messages = case.to_row()["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[:2] == case.prompt()
    assert messages[1]["content"] == case.sentence
    assert "\n" not in messages[2]["content"]
    assert list(json.loads(messages[2]["content"])) == ["customer", "product", "quantity", "city"]


def test_the_instruction_names_every_key():
    assert all(key in make_data.INSTRUCTION for key in ("customer", "product", "quantity", "city"))


def test_what_is_written_is_read_back(cases, tmp_path: Path):
    path = tmp_path / "new" / "heldout.jsonl"
    write_cases(cases[1], path)
    assert read_cases(path) == cases[1]


def test_every_written_answer_is_exact(cases):
    assert all(is_exact(case.order.to_json(), case.order) for part in cases for case in part)


@pytest.mark.parametrize(
    "answer",
    [
        '{"customer": "Ada Costa", "product": "red lamp", "quantity": 12, "city": "Oslo"}',
        ' {"customer":"Ada Costa","product":"red lamp","quantity":12,"city":"Oslo"}\n',
        '{"city": "Oslo", "quantity": 12, "product": "red lamp", "customer": "Ada Costa"}',
    ],
)
def test_spacing_and_the_order_of_keys_are_free(answer: str):
    assert is_exact(answer, ORDER)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Ada Costa wants 12 red lamps.",
        '{"customer": "Ada Costa", "product": "red lamp", "quantity": 12, "city": "Oslo"',
        '{"customer": "Ada Costa", "product": "red lamp", "quantity": 12, "city": "Oslo"} Done.',
        'JSON: {"customer": "Ada Costa", "product": "red lamp", "quantity": 12, "city": "Oslo"}',
        '{"customer": "Ada Costa", "product": "red lamp",\n "quantity": 12, "city": "Oslo"}',
        '{"customer": "Ada Costa", "product": "red lamp", "quantity": "12", "city": "Oslo"}',
        '{"customer": "Ada Costa", "product": "red lamp", "quantity": 12.0, "city": "Oslo"}',
        '{"customer": "Ada Costa", "product": "red lamp", "quantity": 12}',
        '{"customer": "Ada Costa", "product": "red lamp", "quantity": 12, "city": "Oslo", "colour": "red"}',
        '{"customer": "ada costa", "product": "red lamp", "quantity": 12, "city": "Oslo"}',
        '["Ada Costa", "red lamp", 12, "Oslo"]',
    ],
)
def test_anything_else_is_wrong(answer: str):
    assert not is_exact(answer, ORDER)


def test_true_is_not_one():
    one = replace(ORDER, quantity=1)
    assert not is_exact(one.to_json().replace(": 1,", ": true,"), one)


def test_the_script_writes_both_files_beside_itself(tmp_path: Path):
    script = tmp_path / "make_data.py"
    script.write_bytes((QUICKSTART / "make_data.py").read_bytes())
    answer = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert len(read_cases(tmp_path / "data" / "train.jsonl")) == make_data.TRAIN_ROWS
    assert len(read_cases(tmp_path / "data" / "heldout.jsonl")) == make_data.HELDOUT_ROWS
    assert f"{make_data.TRAIN_ROWS} cases" in answer.stdout
