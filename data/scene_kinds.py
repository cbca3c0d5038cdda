"""The kinds of object that scenes are made of: their words, their families, and which of them a split may use."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from bank_format import Bank, Concept
from numpy.typing import NDArray
from PIL import Image

from vlmoe.errors import UserError

SPLITS = ("train", "val", "test", "test_style", "test_combination", "test_concept")
UNSEEN_STYLE = "openmoji"  # a drawing style that only `test_style` shows
HELD_OUT = 0.1  # of the names, for `test_concept`; of the pairs of names, for `test_combination`


@dataclass(frozen=True)
class Family:
    """A word that covers several kinds, such as "fruit"."""

    singular: str
    plural: str
    article: str
    subgroups: tuple[str, ...]  # of the Unicode emoji list
    disputed: frozenset[str] = (
        frozenset()
    )  # names about which people differ: no question counts or names the family there


_GARDEN = frozenset({"tomato", "avocado", "cucumber", "eggplant", "chestnut", "coconut"}) | frozenset(
    {"corn cob", "hot pepper", "bell pepper", "pea pod"}
)
FAMILIES = (
    Family(
        "animal",
        "animals",
        "an",
        ("animal-mammal", "animal-bird", "animal-amphibian", "animal-reptile", "animal-marine", "animal-bug"),
        disputed=frozenset({"coral"}),
    ),
    Family("bird", "birds", "a", ("animal-bird",)),
    Family("fruit", "fruits", "a", ("food-fruit",), disputed=_GARDEN),
    Family("vegetable", "vegetables", "a", ("food-vegetable",), disputed=_GARDEN),
    Family(
        "vehicle",
        "vehicles",
        "a",
        ("transport-ground", "transport-air", "transport-water"),
        disputed=frozenset(
            {"canoe", "ferry", "flying saucer", "kick scooter", "rocket", "sailboat", "sled", "speedboat"}
        ),
    ),
    Family("musical instrument", "musical instruments", "a", ("musical-instrument",)),
)

# Kinds that a careful person could take for one another in a small drawing. A scene never holds two kinds of one group,
# and no question or statement sets one against the other.
_ALIKE = (
    ("monkey", "gorilla"),
    ("dog", "wolf", "fox"),
    ("tiger", "leopard"),
    ("donkey", "horse", "zebra"),
    ("sheep", "goat", "llama"),
    ("mouse", "hamster", "chipmunk", "beaver", "otter", "badger", "skunk", "hedgehog", "raccoon"),
    ("bear", "koala", "sloth"),
    ("duck", "goose", "swan"),
    ("turkey", "rooster", "peacock"),
    ("crocodile", "lizard", "dinosaur"),
    ("whale", "dolphin", "seal", "shark"),
    ("crab", "lobster", "shrimp", "scorpion"),
    ("octopus", "squid", "jellyfish"),
    ("ant", "bee", "beetle", "cricket", "mosquito", "fly", "spider"),
    ("worm", "caterpillar"),
    ("tangerine", "lemon", "mango", "apple", "peach", "tomato"),
    ("avocado", "pear"),
    ("hot pepper", "bell pepper"),
    ("potato", "chestnut"),
    ("croissant", "baguette", "pretzel"),
    ("bagel", "doughnut", "cookie"),
    ("hamburger", "sandwich", "taco", "burrito", "hot dog"),
    ("candy", "lollipop"),
    ("birthday cake", "cupcake", "pie"),
    ("locomotive", "tram", "bus"),
    ("bus", "ambulance", "delivery truck", "fire engine"),
    ("police car", "taxi", "SUV", "pickup truck", "racing car", "auto rickshaw"),
    ("delivery truck", "pickup truck", "fire engine"),
    ("motorcycle", "motor scooter", "bicycle", "kick scooter"),
    ("sailboat", "canoe", "speedboat", "ferry"),
    ("volleyball", "baseball", "soccer ball", "basketball"),
    ("safety vest", "t-shirt", "coat"),
    ("dress", "kimono", "sari"),
    ("swimsuit", "bikini"),
    ("handbag", "backpack"),
    ("running shoe", "hiking boot", "ice skate", "high heel"),
    ("baseball cap", "helmet"),
    ("top hat", "graduation cap"),
    ("saxophone", "trumpet"),
    ("guitar", "violin", "banjo"),
    ("piano keyboard", "accordion"),
    ("hammer", "axe", "pickaxe"),
    ("wrench", "screwdriver"),
)

# Words of CLDR's keyword lists that name the same thing, with their plurals.
_SYNONYMS = {
    "airplane": ("plane", "planes"),
    "axe": ("hatchet", "hatchets"),
    "backpack": ("rucksack", "rucksacks"),
    "bicycle": ("bike", "bikes"),
    "doughnut": ("donut", "donuts"),
    "eggplant": ("aubergine", "aubergines"),
    "flying saucer": ("UFO", "UFOs"),
    "gear": ("cogwheel", "cogwheels"),
    "hamburger": ("burger", "burgers"),
    "helicopter": ("copter", "copters"),
    "hippopotamus": ("hippo", "hippos"),
    "ladybug": ("ladybird", "ladybirds"),
    "rabbit": ("bunny", "bunnies"),
    "running shoe": ("sneaker", "sneakers"),
    "saxophone": ("sax", "saxes"),
    "shovel": ("spade", "spades"),
    "sled": ("toboggan", "toboggans"),
    "taxi": ("cab", "cabs"),
    "wrench": ("spanner", "spanners"),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Kind:
    """One kind of object, with the words for it."""

    id: str
    name: str
    plural: str
    article: str
    names: dict[str, str]  # language -> name
    synonym: tuple[str, str] | None  # singular, plural
    kin: str  # the family or, for kinds of none, the subgroup that decoys are taken from
    families: frozenset[str]
    disputed: frozenset[str]  # families of which it may or may not be a member
    alike: frozenset[str]  # ids of the kinds that it must not meet, itself among them
    known: tuple[int, ...]  # its pictures in the styles that are trained on: indices into the bank
    unseen: tuple[int, ...]  # its pictures in the unseen style
    icons: tuple[int, ...]  # its pictures of one colour


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    kinds: dict[str, Kind]

    def pool(self, split: str) -> list[Kind]:
        """The kinds that a split's scenes are drawn from, in the order of their ids."""
        if split == "test_style":
            return [kind for kind in self.kinds.values() if kind.unseen and not is_new(kind.id)]
        return [kind for kind in self.kinds.values() if kind.known and not is_new(kind.id)]

    def new_concepts(self) -> list[Kind]:
        """The kinds that only `test_concept` shows."""
        return [kind for kind in self.kinds.values() if kind.known and is_new(kind.id)]


def fraction(key: str) -> float:
    """A number in [0, 1) that depends on the key alone: the same on every machine and for every seed."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big") / 2**56


def is_new(concept: str) -> bool:
    """Whether a concept is kept for `test_concept`: the same ones that `pictures.py --seed 0` keeps for it."""
    return fraction(f"0/concept/{concept}") < HELD_OUT


def pair_held_out(a: Kind, b: Kind) -> bool:
    """Whether two kinds together are kept for `test_combination`."""
    return fraction("pair/" + "|".join(sorted((a.id, b.id)))) < HELD_OUT


def may_meet(a: Kind, b: Kind) -> bool:
    """Whether two kinds can be told apart beyond doubt, so that one scene may hold both."""
    return b.id not in a.alike


def build_vocabulary(bank: Bank, number: int | None = None, styles: int | None = None) -> Vocabulary:
    """The kinds of a bank, or `number` of them whose colours differ most, in every style or in the `styles` that draw most
    of the bank's kinds (and the unseen one): the same ones every time. UserError when it has too few."""
    concepts = {id: concept for id, concept in sorted(bank.concepts.items()) if concept.scene}
    drawn = Counter(
        each.style
        for each in bank.pictures
        if each.concept in concepts and each.style != UNSEEN_STYLE and not each.is_icon
    )
    trained_on = sorted(drawn, key=lambda style: (-drawn[style], style))[:styles]
    known: dict[str, list[int]] = {id: [] for id in concepts}
    unseen: dict[str, list[int]] = {id: [] for id in concepts}
    icons: dict[str, list[int]] = {id: [] for id in concepts}
    for index, picture in enumerate(bank.pictures):
        if picture.concept in concepts and picture.style == UNSEEN_STYLE:
            unseen[picture.concept].append(index)
        elif picture.concept in concepts and picture.style in trained_on:
            known[picture.concept].append(index)
        elif picture.concept in concepts and picture.is_icon:
            icons[picture.concept].append(index)
    if number is not None:
        chosen = _most_different(bank, {id: known[id] for id in concepts if known[id] and not is_new(id)}, number)
        concepts = {id: concepts[id] for id in sorted(chosen)}
    if sum(map(bool, known.values())) < 8:
        raise UserError("--bank: scenes need eight kinds of object or more; make the bank with: --objects scene")
    taken = {concept.name for concept in concepts.values()}
    kinds = {
        id: _kind(
            concept, concepts.values(), taken, known=tuple(known[id]), unseen=tuple(unseen[id]), icons=tuple(icons[id])
        )
        for id, concept in concepts.items()
    }
    return Vocabulary(kinds=kinds)


def _most_different(bank: Bank, drawn: dict[str, list[int]], number: int) -> list[str]:
    """Farthest-point choice by mean colour, less the spread over a kind's own pictures."""
    ids = sorted(drawn)
    colors = [np.array([_mean_color(bank.pictures[index].image()) for index in drawn[id]]) for id in ids]
    means = np.array([each.mean(0) for each in colors])
    spread = np.array([np.linalg.norm(each - each.mean(0), axis=1).max() for each in colors])
    nearest = np.linalg.norm(means - means.mean(0), axis=1)  # begins with the one farthest from the mean of all
    chosen: list[int] = []
    while len(chosen) < min(number, len(ids)):
        score = nearest - spread
        score[chosen] = -np.inf
        chosen.append(int(score.argmax()))
        to_last = np.linalg.norm(means - means[chosen[-1]], axis=1)
        nearest = to_last if len(chosen) == 1 else np.minimum(nearest, to_last)
    return [ids[i] for i in chosen]


def _mean_color(picture: Image.Image) -> NDArray[np.float64]:
    pixels = np.asarray(picture.convert("RGBA"), np.float64).reshape(-1, 4)
    return np.average(pixels[:, :3], axis=0, weights=pixels[:, 3])


def _kind(concept: Concept, everyone: Iterable[Concept], taken: set[str], **pictures: tuple[int, ...]) -> Kind:
    name = concept.name
    relatives = {name}.union(*(group for group in _ALIKE if name in group))
    return Kind(
        id=concept.id,
        name=name,
        plural=concept.plural,
        article=concept.article,
        names=concept.names,
        synonym=_synonym(concept, taken),
        kin=next((f.singular for f in FAMILIES if concept.subgroup in f.subgroups), concept.subgroup),
        families=frozenset(f.singular for f in FAMILIES if concept.subgroup in f.subgroups and name not in f.disputed),
        disputed=frozenset(f.singular for f in FAMILIES if name in f.disputed),
        alike=frozenset(other.id for other in everyone if other.name in relatives),
        **pictures,
    )


def _synonym(concept: Concept, taken: set[str]) -> tuple[str, str] | None:
    found = _SYNONYMS.get(concept.name)
    said: Sequence[str] = concept.keywords.get("en", ())
    return found if found and found[0] in said and found[0] not in taken else None
