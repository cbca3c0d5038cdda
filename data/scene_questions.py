"""Questions about a layout, each with its one true answer.

For every type the answer is drawn first, evenly where it can be, and then a question that has it: so the wording of a
question says little about its answer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

from scene_facts import DIRECTIONS, beside, beyond, extreme_size, family_counts, larger, only, outermost, singles
from scene_kinds import Kind, is_new
from scene_layout import Scene, Thing
from scene_sprites import World

QUESTIONS = 5
AnswerType = Literal["yes/no", "number", "other"]
Found = tuple[str, str, str]  # question, answer, what it is about: two wordings of one question share it


@dataclass(frozen=True)
class Question:
    question: str
    answer: str
    question_type: str
    answer_type: AnswerType


@dataclass(frozen=True)
class Asking:
    """What a question maker may look at."""

    world: World
    scene: Scene
    rng: Random

    def absent(self) -> Kind:
        """A kind that is not there but might be: where it can be, of the same family as one that is."""
        there, split = self.scene.counts, self.scene.split
        near = self.rng.choice([*there])
        pool = self.world.kin(split, near.kin)
        if split == "test_concept" and (is_new(near.id) or self.rng.random() < 0.5):
            pool = [kind for kind in self.world.new_concepts if kind.kin == near.kin] or pool
        blocked = set[str]().union(*(kind.alike for kind in there))
        decoys = [kind for kind in pool if kind.id not in blocked]
        return self.rng.choice(decoys or [kind for kind in self.world.pool(split) if kind.id not in blocked])

    def yes_no(self) -> bool:
        return self.rng.random() < 0.5


# How likely a count is asked for, given that it is there: rare counts more, so that the answers come out even.
_COUNT_WEIGHTS = {0: 0.4, 1: 0.3, 2: 0.7, 3: 1.4, 4: 2.6, 5: 5.0, 6: 6.0, 7: 6.0}


def count(ask: Asking) -> Found:
    """How many of a kind."""
    options = [*ask.scene.counts.items(), (ask.absent(), 0)]
    numbers = sorted({n for _, n in options})
    number = ask.rng.choices(numbers, [_COUNT_WEIGHTS[n] for n in numbers])[0]
    kind = ask.rng.choice([kind for kind, n in options if n == number])
    return _how_many(kind.plural, ask.rng), str(number), kind.id


def count_family(ask: Asking) -> Found | None:
    """How many of a family, such as fruits."""
    options = {family: n for family, n in family_counts(ask.scene).items() if n or ask.rng.random() < 0.1}
    if not options:
        return None
    numbers = sorted(set(options.values()))
    number = ask.rng.choices(numbers, [_COUNT_WEIGHTS[n] for n in numbers])[0]
    family = ask.rng.choice([family for family, n in options.items() if n == number])
    return _how_many(family.plural, ask.rng), str(number), family.singular


def count_all(ask: Asking) -> Found:
    """How many objects in all."""
    return _how_many(ask.rng.choice(("objects", "things")), ask.rng), str(len(ask.scene.things)), ""


def exists(ask: Asking) -> Found:
    """Whether a kind is there; the decoys are of the same family as something that is."""
    truth = ask.yes_no()
    kind = ask.rng.choice([*ask.scene.counts]) if truth else ask.absent()
    one = f"{kind.article} {kind.name}"
    patterns = (f"Is there {one}?", f"Is there {one} in the picture?", f"Can you see {one}?")
    return ask.rng.choice((*patterns, f"Are there any {kind.plural}?")), _said(truth), _said(truth)


def which(ask: Asking) -> Found | None:
    """The one member of a family."""
    families = [family for family, n in family_counts(ask.scene).items() if n == 1]
    if not families:
        return None
    name = ask.rng.choice(families).singular
    answer = next(thing.kind.name for thing in ask.scene.things if name in thing.kind.families)
    patterns = (f"What {name} is shown?", f"What {name} is in the picture?", f"Which {name} is this?")
    return ask.rng.choice(patterns), answer, name


def relation(ask: Asking) -> Found | None:
    """Whether one thing is to the left of, to the right of, above or below another."""
    kinds = singles(ask.scene)
    truth = ask.yes_no()
    options = [
        (a, way, b)
        for a in kinds
        for b in kinds
        for way in DIRECTIONS
        if a is not b and _clear(ask.scene, *((a, b) if truth else (b, a)), way)
    ]
    if not options:
        return None
    a, way, b = ask.rng.choice(options)
    return f"Is the {a.name} {way} the {b.name}?", _said(truth), _both(a, b)


def neighbour(ask: Asking) -> Found | None:
    """The only thing in a direction from another."""
    options = [
        (way, kind, found)
        for kind in singles(ask.scene)
        for way in DIRECTIONS
        if (found := beside(ask.scene, only(ask.scene, kind), DIRECTIONS[way]))
    ]
    if not options:
        return None
    way, kind, found = ask.rng.choice(options)
    return f"What is {way} the {kind.name}?", found.kind.name, way + kind.id


def compare(ask: Asking) -> Found | None:
    """Whether there are more, or fewer, of one kind than of another."""
    counts = [*ask.scene.counts.items()]
    truth = ask.yes_no()
    options = [(a, b) for a, n in counts for b, m in counts if n > m]
    if not options:
        return None
    more, fewer = ask.rng.choice(options)
    if not truth:
        more, fewer = fewer, more
    patterns = (
        f"Are there more {more.plural} than {fewer.plural}?",
        f"Are there fewer {fewer.plural} than {more.plural}?",
    )
    return ask.rng.choice(patterns), _said(truth), _both(more, fewer)


def equal(ask: Asking) -> Found | None:
    """Whether there are as many of one kind as of another; asked only where both answers could be had."""
    counts = [*ask.scene.counts.items()]
    pairs = [(a, b, n == m) for a, n in counts for b, m in counts if a is not b]
    if len({same for *_, same in pairs}) < 2:
        return None
    truth = ask.yes_no()
    a, b, _ = ask.rng.choice([pair for pair in pairs if pair[2] is truth])
    return f"Are there as many {a.plural} as {b.plural}?", _said(truth), _both(a, b)


def color(ask: Asking) -> Found | None:
    """The colour of the thing at a place: common colours are asked for less often."""
    options = [(where, thing) for where, thing in _places(ask.scene) if thing.color]
    if not options:
        return None
    where, thing = ask.rng.choice(options)
    assert thing.color
    shares = ask.world.color_shares
    if ask.rng.random() > min(shares.values()) ** 0.5 / shares.get(thing.color, 1.0) ** 0.5 + 0.15:
        return None
    return f"What color is {where}?", thing.color, where


def place(ask: Asking) -> Found | None:
    """What is at a place: the outermost, the largest or the smallest thing."""
    options = _places(ask.scene)
    if not options:
        return None
    where, thing = ask.rng.choice(options)
    return f"What is {where}?", thing.kind.name, where


def size(ask: Asking) -> Found | None:
    """Whether one thing is larger than another."""
    kinds = singles(ask.scene)
    truth = ask.yes_no()
    options = [
        (a, b) for a in kinds for b in kinds if a is not b and larger(only(ask.scene, a), only(ask.scene, b)) is truth
    ]
    if not options:
        return None
    a, b = ask.rng.choice(options)
    word = ask.rng.choice(("larger", "bigger"))
    return f"Is the {a.name} {word} than the {b.name}?", _said(truth), _both(a, b)


Maker = Callable[[Asking], Found | None]
MAKERS: dict[Maker, tuple[float, AnswerType]] = {  # share, answer type
    count: (1.6, "number"),
    count_family: (0.6, "number"),
    count_all: (0.5, "number"),
    exists: (1.3, "yes/no"),
    relation: (1.0, "yes/no"),
    compare: (0.6, "yes/no"),
    equal: (0.4, "yes/no"),
    size: (0.7, "yes/no"),
    which: (1.5, "other"),
    neighbour: (1.2, "other"),
    place: (1.0, "other"),
    color: (2.2, "other"),
}


def questions(world: World, scene: Scene, rng: Random) -> list[Question]:
    """Up to five different questions; fewer only where a layout gives no more."""
    ask = Asking(world, scene, rng)
    found: dict[tuple[Maker, str], Question] = {}
    for maker in rng.choices([*MAKERS], [share for share, _ in MAKERS.values()], k=6 * QUESTIONS):
        made = maker(ask)
        if made is not None:
            question, answer, about = made
            asked = Question(question, answer, question_type=maker.__name__, answer_type=MAKERS[maker][1])
            found.setdefault((maker, about), asked)
        if len(found) == QUESTIONS:
            break
    return [*found.values()]


def _how_many(plural: str, rng: Random) -> str:
    return rng.choice(
        (
            f"How many {plural} are there?",
            f"How many {plural} are in the picture?",
            f"How many {plural} can you see?",
        )
    )


def _said(truth: bool) -> str:
    return "yes" if truth else "no"


def _both(a: Kind, b: Kind) -> str:
    return "|".join(sorted((a.id, b.id)))


def _clear(scene: Scene, a: Kind, b: Kind, way: str) -> bool:
    return beyond(only(scene, a), only(scene, b), DIRECTIONS[way], scene.size) is True


def _places(scene: Scene) -> list[tuple[str, Thing]]:
    """Ways to speak of one thing by where it is or how large, without naming it."""
    found = [
        ("the leftmost object", outermost(scene, DIRECTIONS["to the left of"])),
        ("the rightmost object", outermost(scene, DIRECTIONS["to the right of"])),
        ("the topmost object", outermost(scene, DIRECTIONS["above"])),
        ("the lowest object", outermost(scene, DIRECTIONS["below"])),
        ("the largest object", extreme_size(scene.things, largest=True)),
        ("the smallest object", extreme_size(scene.things, largest=False)),
    ]
    return [(where, thing) for where, thing in found if thing is not None]
