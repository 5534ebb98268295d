"""Make the quickstart's data set: a sentence about an order, and the order as one line of JSON.

    python examples/quickstart/make_data.py

writes data/train.jsonl and data/heldout.jsonl beside this file. The same seed gives the same bytes. No customer
of a held-out order has an order in training, so nothing of its answer can be remembered.
"""

# ruff: noqa: T201 (printing is for the person who runs this)

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data"
TRAIN_ROWS = 340
HELDOUT_ROWS = 40
SEED = 7

INSTRUCTION = "Write the order as one line of JSON with the keys customer, product, quantity and city."

FIRST_NAMES = """Ada Amara Anders Beatriz Bruno Carmen Chidi Clara Daniel Elif Emeka Farah Felix Greta Hana Hugo Ines
    Ivan Jonas Kaito Lena Leo Lucia Marta Mateo Mira Nadia Noor Oskar Paula Petra Rafael Rosa Sami Sofia
    Tomas Ursula Viktor Wanda Yusuf""".split()
LAST_NAMES = """Abebe Almeida Bauer Becker Carvalho Costa Dahl Demir Eriksen Fischer Fontaine Garcia Haddad Hansen
    Ibrahim Ito Jansen Kaya Keller Kowalski Lange Lindqvist Marino Mensah Moreau Nakamura Novak Okafor
    Olsen Petrov Ricci Rossi Santos Schmidt Silva Tanaka Vargas Weber Wolf Zhang""".split()
CITIES = """Antwerp Athens Bergen Bologna Bristol Cadiz Dakar Dublin Geneva Ghent Graz Hamburg Izmir Krakow
    Lagos Leeds Lima Lisbon Lyon Malmo Munich Nantes Osaka Oslo Porto Prague Quito Riga Rome Seville
    Tallinn Turin Utrecht Vienna Zagreb""".split()
COLOURS = "black blue brown green grey orange pink red white yellow".split()
ARTICLES = {
    "armchair": "armchairs",
    "backpack": "backpacks",
    "basket": "baskets",
    "bench": "benches",
    "blanket": "blankets",
    "bowl": "bowls",
    "brush": "brushes",
    "candle": "candles",
    "clock": "clocks",
    "curtain": "curtains",
    "cushion": "cushions",
    "desk": "desks",
    "dish": "dishes",
    "glass": "glasses",
    "jug": "jugs",
    "kettle": "kettles",
    "knife": "knives",
    "lamp": "lamps",
    "mirror": "mirrors",
    "notebook": "notebooks",
    "plate": "plates",
    "stool": "stools",
    "suitcase": "suitcases",
    "teapot": "teapots",
    "towel": "towels",
    "tray": "trays",
    "umbrella": "umbrellas",
    "vase": "vases",
    "watch": "watches",
}
"""The articles on sale: singular and plural."""
AMOUNTS = {
    "a": 1,
    "one": 1,
    "two": 2,
    "a pair of": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "half a dozen": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "eleven": 11,
    "twelve": 12,
    "a dozen": 12,
}
"""Quantities in words; half of the orders have digits instead."""
SENTENCES = (
    "{customer} from {city} would like {goods}.",
    "Please send {goods} to {customer} in {city}.",
    "Order for {customer}, {city}: {goods}.",
    "Could you ship {goods} to {city} for {customer}?",
    "This is {customer} in {city}, I need {goods}.",
    "We sold {goods} to {customer}, {city}.",
    "Put {customer} of {city} down for {goods}.",
    "I want {goods}, please. My name is {customer} and I live in {city}.",
    "{goods} to {city}, please, for {customer}.",
    "A customer in {city}, {customer}, asked for {goods}.",
)


@dataclass(frozen=True)
class Order:
    """What a sentence says. product: in the singular."""

    customer: str
    product: str
    quantity: int
    city: str

    def to_json(self) -> str:
        """One line, keys in the order above."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Case:
    """A sentence and the order in it."""

    sentence: str
    order: Order

    def prompt(self) -> list[dict[str, str]]:
        """The messages that the model answers."""
        return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": self.sentence}]

    def to_row(self) -> dict[str, list[dict[str, str]]]:
        """A row of the format `messages`."""
        return {"messages": [*self.prompt(), {"role": "assistant", "content": self.order.to_json()}]}


def make_cases(train: int = TRAIN_ROWS, heldout: int = HELDOUT_ROWS, seed: int = SEED) -> tuple[list[Case], list[Case]]:
    """`train` cases to learn from and `heldout` cases of other customers, no sentence twice."""
    chance = random.Random(seed)
    customers = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    chance.shuffle(customers)
    return _distinct(train, customers[heldout:], chance), _distinct(heldout, customers[:heldout], chance)


def is_exact(answer: str, order: Order) -> bool:
    """Whether `answer` is one line of JSON with the order's keys and values, of the right types, and nothing else."""
    line = answer.strip()
    if "\n" in line:
        return False
    try:
        found = json.loads(line)
    except ValueError:
        return False
    return json.dumps(found, sort_keys=True) == json.dumps(asdict(order), sort_keys=True)


def read_cases(path: Path) -> list[Case]:
    """The cases of a file that `write_cases` wrote."""
    return [_case(json.loads(line)["messages"]) for line in path.read_text(encoding="utf-8").splitlines()]


def write_cases(cases: list[Case], path: Path) -> None:
    """One row a line, as `oslo` and `datasets` read them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(case.to_row()) + "\n" for case in cases), encoding="utf-8")


def _distinct(count: int, customers: list[str], chance: random.Random) -> list[Case]:
    cases: dict[str, Case] = {}
    while len(cases) < count:
        # Customers in turn rather than by lot: as many different ones as there can be.
        case = _make_case(customers[len(cases) % len(customers)], chance)
        cases[case.sentence] = case
    return list(cases.values())


def _make_case(customer: str, chance: random.Random) -> Case:
    colour, article = chance.choice(COLOURS), chance.choice(list(ARTICLES))
    amount = chance.choice(list(AMOUNTS)) if chance.random() < 0.5 else str(chance.randint(2, 99))
    quantity = AMOUNTS[amount] if amount in AMOUNTS else int(amount)
    order = Order(customer, f"{colour} {article}", quantity, chance.choice(CITIES))
    noun = f"{colour} {ARTICLES[article] if quantity > 1 else article}"
    goods = f"an {noun}" if amount == "a" and noun[0] in "aeiou" else f"{amount} {noun}"
    sentence = chance.choice(SENTENCES).format(customer=customer, city=order.city, goods=goods)
    return Case(sentence[0].upper() + sentence[1:], order)


def _case(messages: list[dict[str, str]]) -> Case:
    return Case(messages[1]["content"], Order(**json.loads(messages[2]["content"])))


def main() -> None:
    train, heldout = make_cases()
    for name, cases in (("train", train), ("heldout", heldout)):
        write_cases(cases, DATA / f"{name}.jsonl")
        print(f"{len(cases)} cases in {DATA / f'{name}.jsonl'}")


if __name__ == "__main__":
    main()
