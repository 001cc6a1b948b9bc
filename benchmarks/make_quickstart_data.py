"""Writes the quickstart data: short messages to a shop's front desk, each with the JSON record a clerk would file.

    python benchmarks/make_quickstart_data.py [DIRECTORY]

The same rows come out every time. No name and no item of a held-out row occurs in a training row, so an answer that is
right there was read from its message and not remembered.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

SEED = 20260314
TRAIN_ROWS = 480
TEST_ROWS = 60
DESTINATION = Path(__file__).resolve().parent.parent / "src" / "trimtab" / "data" / "quickstart"

INSTRUCTION = "Turn this message into a JSON record:"

# `[...]` is left out when the message gives no date; `{them}` is "it" or "them".
TEMPLATES = {
    "order": [
        "Hi, {name} here. Please send me {items}[ by {date}].",
        "Order for {name}: {items}[, to arrive on {date}].",
        "{name} would like to buy {items}[ before {date}].",
        "Could I get {items}[ by {date}]? Thanks, {name}",
        "We need {items}[ for {date}], please. {name}",
        "Put {items} aside for {name}[, pick-up {date}].",
        "[For {date}: ]{items} for {name}, paid in cash.",
    ],
    "return": [
        "I want to send back {items}[, bought on {date}]. {name}",
        "{name} is returning {items}[ delivered {date}].",
        "Please refund {items}[ from {date}]. Regards, {name}",
        "Hello, {name} again. I bring {items} back[ on {date}], wrong size.",
        "[Bought {date}: ]{items}. I changed my mind, money back please. {name}",
        "My name is {name} and I no longer want {items}[ that came on {date}].",
    ],
    "repair": [
        "{items} broke[ on {date}], can you fix {them}? {name}",
        "{name} brought in {items} to be mended[, ready by {date}].",
        "Can somebody repair {items}[ before {date}]? This is {name}.",
        "{items} will not work any more[, since {date}]. Please mend {them}. {name}",
        "{name} asks what it costs to fix {items}[ by {date}].",
        "Workshop, please look at {items} of {name}[, due {date}].",
    ],
    "lost": [
        "I left {items} on the bus[ on {date}]. Call {name}.",
        "{name} lost {items}[ on {date}].",
        "Has anybody found {items}?[ Gone since {date}.] {name}",
        "[On {date} ]{name} forgot {items} in the waiting room.",
        "Looking for {items} left behind[ on {date}], owner is {name}.",
        "Missing: {items}[, last seen {date}]. Tell {name}.",
    ],
}

TRAIN_NAMES = """
    Abena Ada Adeline Agnes Ahmed Alejandro Alice Alina Amara Amir Anders Anika Anna Anton Arjun Astrid Aurelia
    Ayesha Bartosz Bea Beatrix Ben Bilal Bruno Camille Carla Carlos Catalina Chen Chidi Clara Cormac Cyrus
    Dagmar Daniel Dariusz David Delphine Desmond Diego Dilara Dora Eamon Edith Elena Eleni Elif Emeka Emil Emma
    Enrique Erik Esme Eva Farid Fatima Felix Fergus Fiona Florian Frank Freya Gabriela Genevieve Giorgos Gita
    Greta Hamza Hana Hassan Helen Hiroshi Hugo Ida Igor Ines Ingrid Isolde Ivan Ivana Jack James Jamila Jana
    Jelena Jonas Jorge Julia Kai Karim Kate Kenji Kirsten Lakshmi Lars Laura Leo Lina Lorenzo Lucas Lucia
    Ludmila Maeve Magnus Malik Maria Marisol Mark Marta Matthias Max Mei Mia Milena Mireille Nadia Nikhil Nina
    Noah Noor Oksana Olga Olivier Omar Paloma Paul Pedro Philippa Priya Ravi Renata Roberto Rohan Rosa Ruth Sam
    Sanjay Sara Saskia Selim Siobhan Sofia Stefan Sven Tariq Tatiana Thabo Theodora Tobias Tom Umar Valeria Vera
    Victor Vikram Wilhelmina Xavier Yara Yolanda Yuki Yusuf Zainab Zbigniew Zoe
""".split()
TRAIN_SURNAMES = """
    Adams Ali Andersson Baker Banerjee Berg Bianchi Brown Castillo Chukwu Costa Cruz Delgado Demir Farouk
    Fischer Fitzgerald Gallagher Garcia Gupta Hall Hansen Hernandez Hill Horvat Ito Jankowski Jensen Jones Khan
    Kim King Kowalski Larsen Lee Lindqvist Lopez Martin Mbeki McCarthy Mendoza Meyer Mills Moore Nair Nakamura
    Nguyen Novak Olsen Oyelaran Papadopoulos Park Patel Perez Petrov Quiroga Rasmussen Reed Rossi Sato Schneider
    Scott Silva Singh Stone Szabo Tanaka Thompson Turner Vasquez Wang Weber White Wolf Wong Wood Yamamoto Young
    Zielinski
""".split()
TEST_NAMES = """
    Aiko Bjorn Celine Dmitri Esther Gustav Imani Joaquin Kofi Leila Mateo Naomi Oscar Petra Quentin Rafael
    Simone Tamar Ulrich Wanda
""".split()
TEST_SURNAMES = (
    "Abbott Bauer Dubois Eriksen Fraser Gomez Hughes Ivanov Keller Lund Morris Okafor Quinn Ramos Taylor".split()
)

TRAIN_ITEMS = """
    armchair backpack barometer basket bicycle binder birdcage blanket blender bookend bottle bowl buckle
    calculator calendar camera candle canoe cardigan carpet chair charger clock coat corkscrew cupboard cushion
    desk dishwasher doormat drill drum dustpan earring envelope eraser fan flashlight freezer fridge grater
    guitar hammer hammock harmonica hat headphone heater helmet jacket jar kayak kettle keyboard ladder lamp
    lampshade lantern laptop lighter microscope mirror mitten monitor mousetrap mug napkin nightstand notebook
    oven padlock pan parasol pendant piano pillow pillowcase pitcher plate playpen printer pullover racket radio
    ring rucksack saddle saucepan scooter shirt shovel snowboard sofa spoon stapler stool stroller suitcase
    surfboard sweater table tablecloth tablet teapot tent thermometer towel toy tray tripod typewriter umbrella
    vacuum vase violin wallet wardrobe wheelbarrow whistle wristband xylophone
""".split()
TEST_ITEMS = """
    apron bracelet bucket drawer flute hairdryer handbag necklace phone projector raincoat sandal speaker
    telescope toaster trumpet
""".split()
QUALITIES = (
    "black blue brown green grey large leather old orange plastic red silver small steel white wooden yellow".split()
)

NUMBER_WORDS = "one two three four five six seven eight nine ten eleven twelve".split()
MONTHS = "January February March April May June July August September October November December".split()

T = TypeVar("T")


@dataclass(frozen=True)
class Vocabulary:
    names: list[str]
    surnames: list[str]
    items: list[str]


def pick(random_source: random.Random, choices: list[T]) -> T:
    """One of `choices`. Built on `random()` alone, whose sequence Python promises to keep from version to version."""
    return choices[int(random_source.random() * len(choices))]


def spoken_date(random_source: random.Random, year: int, month: int, day: int) -> str:
    name = MONTHS[month - 1]
    forms = [
        f"{day} {name} {year}",
        f"{name} {day}, {year}",
        f"{day} {name[:3]} {year}",
        f"{day:02d}.{month:02d}.{year}",
        f"{year}-{month:02d}-{day:02d}",
    ]
    return pick(random_source, forms)


def spoken_quantity(random_source: random.Random, item: str) -> tuple[int, str]:
    """A number and the way somebody would say that many of `item`: "a pair of red hats", "3 red hats", "a red hat"."""
    if random_source.random() < 0.3:
        article = "an" if item[0] in "aeiou" else "a"
        return 1, f"{pick(random_source, [article, 'one'])} {item}"
    if random_source.random() < 0.2:
        number, words = pick(random_source, [(2, "a pair of"), (6, "half a dozen"), (12, "a dozen")])
        return number, f"{words} {item}s"
    number = pick(random_source, list(range(2, 13)))
    return number, f"{pick(random_source, [str(number), NUMBER_WORDS[number - 1]])} {item}s"


def row(random_source: random.Random, vocabulary: Vocabulary, intent: str) -> dict[str, str]:
    """One message with its record, as a prompt and the completion wanted for it."""
    name = pick(random_source, vocabulary.names)
    if random_source.random() < 0.4:
        name += " " + pick(random_source, vocabulary.surnames)
    item = pick(random_source, vocabulary.items)
    if random_source.random() < 0.7:
        item = f"{pick(random_source, QUALITIES)} {item}"
    quantity, items = spoken_quantity(random_source, item)
    year, month, day = 2025 + int(random_source.random() * 3), *(1 + int(random_source.random() * n) for n in (12, 28))
    said = spoken_date(random_source, year, month, day)
    dated = random_source.random() < 0.7
    template = pick(random_source, TEMPLATES[intent])
    before, _, rest = template.partition("[")
    optional, _, after = rest.partition("]")
    text = before + (optional if dated else "") + after
    text = text.format(name=name, items=items, date=said, them="it" if quantity == 1 else "them")
    record = {
        "intent": intent,
        "name": name,
        "item": item,
        "quantity": quantity,
        "date": f"{year}-{month:02d}-{day:02d}" if dated else None,
    }
    return {
        "prompt": f"{INSTRUCTION} {text[0].upper()}{text[1:]}",
        "completion": json.dumps(record, ensure_ascii=False),
    }


def rows(seed: int, vocabulary: Vocabulary, count: int) -> list[dict[str, str]]:
    """`count` different rows, the intents in turn."""
    random_source = random.Random(seed)
    intents = list(TEMPLATES)
    made: dict[str, dict[str, str]] = {}
    while len(made) < count:
        new = row(random_source, vocabulary, intents[len(made) % len(intents)])
        made.setdefault(new["prompt"], new)
    return list(made.values())


def files() -> dict[str, str]:
    """File name -> text of every data file."""
    parts = {
        "train.jsonl": rows(SEED, Vocabulary(TRAIN_NAMES, TRAIN_SURNAMES, TRAIN_ITEMS), TRAIN_ROWS),
        "test.jsonl": rows(SEED + 1, Vocabulary(TEST_NAMES, TEST_SURNAMES, TEST_ITEMS), TEST_ROWS),
    }
    return {name: "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in part) for name, part in parts.items()}


def main(arguments: list[str]) -> None:
    destination = Path(arguments[0]) if arguments else DESTINATION
    destination.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (destination / name).write_text(text, encoding="utf-8")
        print(f"{destination / name}: {text.count(chr(10))} rows")


if __name__ == "__main__":
    main(sys.argv[1:])
