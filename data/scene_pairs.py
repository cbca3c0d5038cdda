"""Statements about two pictures, true or false, in the form of NLVR2.

A set is one sentence and four pairs of pictures: it is true of two of them and false of the other two, so neither the
sentence nor the number of the pair gives the label away. The label is drawn first, then how often the kind that the
sentence speaks of is in either picture, then two scenes that hold it so often. Everything else in the scenes is drawn
the same way whatever the label is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from scene_captions import spelled
from scene_kinds import Kind, may_meet, pair_held_out
from scene_layout import LayoutOptions, Scene, draw_scene, generator
from scene_sprites import World

PAIRS = 4  # of one sentence
MOST = 4  # of the kind that a sentence speaks of, in one picture


@dataclass(frozen=True, kw_only=True)
class Statement:
    """One type of sentence. `n` is the number that some sentences name."""

    patterns: tuple[str, ...]  # {n}; {one} "a dog"; {kind} "dog"; {kinds} "dogs"; {those} agrees with n
    numbers: tuple[int, ...]
    holds: Callable[[int, int, int], bool]  # left count, right count, n
    asked: Callable[[int, int, int], bool] = lambda left, right, n: True  # which counts come up, true or false


STATEMENTS: dict[str, Statement] = {
    "total": Statement(
        patterns=("There {are} exactly {n} {those} in total.", "The two pictures show {n} {those} altogether."),
        numbers=(2, 3, 4, 5),
        holds=lambda left, right, n: left + right == n,
        asked=lambda left, right, n: abs(left + right - n) <= 2,
    ),
    "each": Statement(
        patterns=("There is at least one {kind} in each picture.", "Both pictures contain {one}."),
        numbers=(1,),
        holds=lambda left, right, n: min(left, right) >= 1,
        asked=lambda left, right, n: left + right >= 1,
    ),
    "more_left": Statement(
        patterns=(
            "There are more {kinds} in the left picture than in the right picture.",
            "The left picture contains more {kinds} than the right one.",
        ),
        numbers=(1,),
        holds=lambda left, right, n: left > right,
        asked=lambda left, right, n: left + right >= 1,
    ),
    "one_and_none": Statement(
        patterns=("One picture contains exactly one {kind} and the other contains none.",),
        numbers=(1,),
        holds=lambda left, right, n: {left, right} == {0, 1},
        asked=lambda left, right, n: 1 <= left + right <= 3,
    ),
    "same_number": Statement(
        patterns=(
            "Both pictures contain the same number of {kinds}.",
            "There are as many {kinds} in the left picture as in the right picture.",
        ),
        numbers=(1,),
        holds=lambda left, right, n: left == right,
        asked=lambda left, right, n: min(left, right) >= 1,
    ),
    "right_has": Statement(
        patterns=(
            "The right picture contains exactly {n} {those}.",
            "There {are} exactly {n} {those} in the right picture.",
        ),
        numbers=(1, 2, 3),
        holds=lambda left, right, n: right == n,
        asked=lambda left, right, n: abs(right - n) <= 2,
    ),
    "only_one": Statement(
        patterns=("Only one of the pictures contains {one}.", "{One} can be seen in just one of the two pictures."),
        numbers=(1,),
        holds=lambda left, right, n: (left == 0) != (right == 0),
        asked=lambda left, right, n: left + right >= 1,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two pictures and what is said of them."""

    split: str
    set_number: int
    number: int  # 0 to 3 within the set
    statement_type: str
    sentence: str
    label: bool
    left: Scene
    right: Scene

    @property
    def identifier(self) -> str:
        """Split, set, pair, sentence: official scorers group by all but the pair to measure consistency."""
        return f"{self.split}-{self.set_number}-{self.number}-0"


def draw_pairs(
    world: World, split: str, set_number: int, seed: int, options: LayoutOptions
) -> list[tuple[Pair, Random]]:
    """The four pairs of one sentence, each with the generator that its pictures are to be rendered with."""
    rng = generator(seed, "statement", split, set_number)
    types = options.statements or tuple(STATEMENTS)
    statement_type = types[set_number % len(types)]
    statement = STATEMENTS[statement_type]
    kind = rng.choice(_subjects(world, split))
    most = min(MOST, options.max_objects - 1)
    number = rng.choice([n for n in statement.numbers if n <= most])
    sentence = _say(statement, kind, number, rng)
    labels = [True, True, False, False]
    rng.shuffle(labels)
    pairs = []
    for pair_number, label in enumerate(labels):
        own = generator(seed, "pair", split, set_number * PAIRS + pair_number)
        counts = _draw_counts(statement, number, label, most, own)
        index = 2 * (set_number * PAIRS + pair_number)
        left, right = (
            draw_scene(world, split, index + side, own, options, required={kind: count}, forbidden=kind.alike)
            for side, count in enumerate(counts)
        )
        pair = Pair(
            split=split,
            set_number=set_number,
            number=pair_number,
            statement_type=statement_type,
            sentence=sentence,
            label=label,
            left=left,
            right=right,
        )
        pairs.append((pair, own))
    return pairs


def _subjects(world: World, split: str) -> list[Kind]:
    """The kinds that a split's sentences may speak of."""
    pool = world.pool(split)
    if split == "test_combination":  # its scenes need a second kind that the first one never meets in train
        return [kind for kind in pool if any(pair_held_out(kind, other) and may_meet(kind, other) for other in pool)]
    return world.new_concepts if split == "test_concept" else pool


def _draw_counts(statement: Statement, number: int, label: bool, most: int, rng: Random) -> tuple[int, int]:
    """How often the kind is in the left and the right picture, so that the sentence is what its label says."""
    options = [
        (left, right)
        for left in range(most + 1)
        for right in range(most + 1)
        if statement.asked(left, right, number) and statement.holds(left, right, number) is label
    ]
    return rng.choice(options)


def _say(statement: Statement, kind: Kind, number: int, rng: Random) -> str:
    one = f"{kind.article} {kind.name}"
    return rng.choice(statement.patterns).format(
        n=spelled(number),
        one=one,
        One=one[0].upper() + one[1:],
        kind=kind.name,
        kinds=kind.plural,
        those=kind.name if number == 1 else kind.plural,
        are="is" if number == 1 else "are",
    )
