"""Captions: sentences that are true of a layout, in English and, as lists of names, in other languages."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from random import Random

from scene_facts import DIRECTIONS, Direction, beyond, extreme_size, family_counts, outermost
from scene_kinds import Kind
from scene_layout import Scene, Thing

CAPTIONS = 5
EDGE = 1 / 6  # of the picture's side: this far from its middle begins an outer third
SYNONYMS = 0.25  # how often a kind that has another word is called by it
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

_ARABIC_COMMA = {"ar", "fa", "ps", "sd", "ug", "ur"}
_IDEOGRAPHIC_COMMA = {"ja", "yue", "yue-Hans", "zh", "zh-Hant"}


def spelled(number: int) -> str:
    """`2` -> "two"; figures above twelve."""
    return NUMBERS[number] if number < len(NUMBERS) else str(number)


def listed(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return text[0].upper() + text[1:] + "."


def some(kind: Kind, count: int, *, adjective: str = "", synonym: bool = False) -> str:
    """ "a dog", "two dogs", "a red dog"; with `synonym` by the other word for the kind."""
    singular, plural, article = kind.name, kind.plural, kind.article
    if synonym and kind.synonym:
        singular, plural = kind.synonym
        article = "an" if singular[0] in "aeio" else "a"
    if count > 1:
        return " ".join(filter(None, (spelled(count), adjective, plural)))
    if adjective:
        article = "an" if adjective[0] in "aeiou" else "a"
    return " ".join(filter(None, (article, adjective, singular)))


class Speaker:
    """Makes one caption of a scene: calls each kind by the same word throughout."""

    def __init__(self, scene: Scene, rng: Random) -> None:
        self.scene, self.rng = scene, rng
        self._otherwise = {kind for kind in scene.counts if kind.synonym and rng.random() < SYNONYMS}

    def some(self, kind: Kind, count: int, adjective: str = "") -> str:
        return some(kind, count, adjective=adjective, synonym=kind in self._otherwise)

    def listing(self, counts: Mapping[Kind, int]) -> list[str]:
        """The kinds with their counts, in random order."""
        parts = [self.some(kind, count) for kind, count in counts.items()]
        self.rng.shuffle(parts)
        return parts


def everything(say: Speaker) -> str:
    kinds = listed(say.listing(say.scene.counts))
    first_is_plural = kinds.split()[0] in NUMBERS[2:]
    patterns = (
        "{}",
        "a picture of {}",
        f"there {'are' if first_is_plural else 'is'} {{}}",
        "this picture shows {}",
        "an image with {}",
        "you can see {}",
    )
    return sentence(say.rng.choice(patterns).format(kinds))


def total(say: Speaker) -> str:
    """How many objects there are, and which."""
    kinds = listed(say.listing(say.scene.counts))
    number = spelled(len(say.scene.things))
    patterns = ("{n} objects: {}", "{}, {n} objects in all", "a picture of {n} things: {}")
    return sentence(say.rng.choice(patterns).format(kinds, n=number))


def families(say: Speaker) -> str | None:
    """Families where every member can be counted, and the other kinds by name."""
    counts = {
        family: count for family, count in family_counts(say.scene).items() if count and family.singular != "bird"
    }
    covered = {family.singular for family in counts}
    parts = [
        f"{spelled(count)} {family.plural}" if count > 1 else f"{family.article} {family.singular}"
        for family, count in counts.items()
    ]
    rest = {kind: count for kind, count in say.scene.counts.items() if not kind.families & covered}
    if not parts:
        return None
    say.rng.shuffle(parts)
    return sentence(listed([*parts, *say.listing(rest)]))


def relation(say: Speaker) -> str | None:
    """One kind beside another, every one of them, and the rest."""
    kinds = [*say.scene.counts]
    pairs = [(a, b, way) for a in kinds for b in kinds if a is not b for way in DIRECTIONS]
    say.rng.shuffle(pairs)
    for a, b, way in pairs:
        of_a, of_b = ([thing for thing in say.scene.things if thing.kind is kind] for kind in (a, b))
        if all(beyond(one, other, DIRECTIONS[way], say.scene.size) for one in of_a for other in of_b):
            text = f"{say.some(a, len(of_a))} {way} {say.some(b, len(of_b))}"
            return sentence(text + _with_rest(say, {a, b}))
    return None


def sides(say: Speaker) -> str | None:
    """What is farthest left and right, or at the top and the bottom."""
    names = [("to the left of", "on the far left"), ("to the right of", "on the far right")]
    if say.rng.random() < 0.4:
        names = [("above", "at the top"), ("below", "at the bottom")]
    ends = [(_at_edge(say.scene, DIRECTIONS[way]), where) for way, where in names]
    say.rng.shuffle(ends)
    parts, shown = [], Counter[Kind]()
    for thing, where in ends:
        if thing is not None:
            parts.append(f"{say.some(thing.kind, 1)} {where}")
            shown[thing.kind] += 1
    if not parts:
        return None
    rest = say.scene.counts - shown
    others = f", and {spelled(rest.total())} more object{'s' if rest.total() > 1 else ''}" if rest else ""
    return sentence(" and ".join(parts) + others)


def size(say: Speaker) -> str | None:
    """The thing that is clearly the largest."""
    thing = extreme_size(say.scene.things, largest=True)
    if thing is None:
        return None
    rest = say.listing(say.scene.counts - Counter([thing.kind]))
    name = say.some(thing.kind, 1)
    adjective = say.rng.choice(("large", "big"))
    text = say.rng.choice(
        (
            say.some(thing.kind, 1, adjective) + f" with {listed(rest)}",
            f"{name}, the largest object, and {listed(rest)}",
            f"the largest of {spelled(len(say.scene.things))} objects is {name}",
        )
    )
    return sentence(text)


def colors(say: Speaker) -> str | None:
    """The kinds, with the colour of every one that is there once and clearly has one."""
    color_of = {
        thing.kind: thing.color
        for thing in say.scene.things
        if say.scene.counts[thing.kind] == 1 and thing.color and " " not in thing.kind.name  # no "gray white cane"
    }
    if not color_of:
        return None
    parts = [say.some(kind, n, color_of.get(kind) or "") for kind, n in say.scene.counts.items()]
    say.rng.shuffle(parts)
    return sentence(say.rng.choice(("{}", "a picture of {}")).format(listed(parts)))


def subject(say: Speaker) -> str | None:
    """One kind, and how many other things there are."""
    kind, count = say.rng.choice([*say.scene.counts.items()])
    others = len(say.scene.things) - count
    if not others:
        return None
    return sentence(f"{say.some(kind, count)} and {spelled(others)} other object{'s' if others > 1 else ''}")


def _at_edge(scene: Scene, direction: Direction) -> Thing | None:
    """The outermost thing in a direction, if it lies in that third of the picture."""
    thing, (axis, sign) = outermost(scene, direction), direction
    return thing if thing and sign * (thing.centre[axis] / scene.size - 0.5) >= EDGE else None


def _with_rest(say: Speaker, named: set[Kind]) -> str:
    rest = {kind: count for kind, count in say.scene.counts.items() if kind not in named}
    return say.rng.choice((", with {}", ", and also {}")).format(listed(say.listing(rest))) if rest else ""


Maker = Callable[[Speaker], str | None]
_WEIGHTS: dict[Maker, int] = {total: 2, families: 2, relation: 4, sides: 2, size: 2, colors: 3, subject: 1}


def captions(scene: Scene, rng: Random) -> list[str]:
    """Five different captions; the first two, or more, name everything that is there."""
    makers: list[Maker] = [everything, everything]
    makers += rng.choices([*_WEIGHTS], [*_WEIGHTS.values()], k=12)
    found: list[str] = []
    for maker in makers + [everything] * 40:
        caption = maker(Speaker(scene, rng))
        if caption is not None and caption not in found:
            found.append(caption)
        if len(found) == CAPTIONS:
            break
    return found


def other_language(scene: Scene, rng: Random) -> tuple[str, str]:
    """A language that has a name for every kind, and the list of names in it: `("de", "Hund, Katze × 2")`."""
    kinds = [*scene.counts]
    languages = sorted(set.intersection(*(set(kind.names) for kind in kinds)) - {"en"})
    language = rng.choice(languages) if languages else "en"
    rng.shuffle(kinds)
    parts = [kind.names[language] + (f" × {n}" if (n := scene.counts[kind]) > 1 else "") for kind in kinds]
    comma = "، " if language in _ARABIC_COMMA else "、" if language in _IDEOGRAPHIC_COMMA else ", "
    return language, comma.join(parts)


def paragraph(scene: Scene, rng: Random) -> str:
    """Text without a picture: one to three captions of a layout, in one of five cases a list in another language."""
    if rng.random() < 0.2:
        return other_language(scene, rng)[1]
    return " ".join(rng.sample(captions(scene, rng), rng.randint(1, 3)))
