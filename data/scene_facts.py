"""What is true of a layout, and what is clearly true: text is made only from what nobody would dispute.

A direction is a pair of an axis (0 across, 1 down) and a sign, e.g. (0, -1) for "to the left of".
"""

from collections.abc import Sequence

from scene_kinds import FAMILIES, Family, Kind
from scene_layout import Scene, Thing

Direction = tuple[int, int]

DIRECTIONS: dict[str, Direction] = {
    "to the left of": (0, -1),
    "to the right of": (0, 1),
    "above": (1, -1),
    "below": (1, 1),
}
APART = 0.18  # of the picture's side: centres that far apart are clearly to the left, right, above, below
LEVEL = 0.06  # centres no farther than this in a direction are clearly not beyond one another
OUTERMOST = 0.1  # how far the outermost thing lies beyond the next
LARGER = 1.5  # ratio of areas from which one thing is clearly larger


def beyond(a: Thing, b: Thing, direction: Direction, size: int) -> bool | None:
    """Whether `a` lies in a direction from `b`; None when that could be disputed."""
    axis, sign = direction
    gap = sign * (a.centre[axis] - b.centre[axis]) / size
    return True if gap >= APART else False if gap <= LEVEL else None


def only(scene: Scene, kind: Kind) -> Thing:
    """The one thing of a kind that is there once."""
    return next(thing for thing in scene.things if thing.kind is kind)


def singles(scene: Scene) -> list[Kind]:
    """The kinds that are there exactly once."""
    return [kind for kind, count in scene.counts.items() if count == 1]


def beside(scene: Scene, thing: Thing, direction: Direction) -> Thing | None:
    """The only thing in a direction from another; None when there is none, more than one, or a doubtful one."""
    others = [other for other in scene.things if other is not thing]
    where = [beyond(other, thing, direction, scene.size) for other in others]
    if where.count(True) != 1 or None in where:
        return None
    return others[where.index(True)]


def outermost(scene: Scene, direction: Direction) -> Thing | None:
    """The thing that lies clearly farthest out in a direction."""
    axis, sign = direction
    first, second = sorted(scene.things, key=lambda thing: -sign * thing.centre[axis])[:2]
    gap = sign * (first.centre[axis] - second.centre[axis]) / scene.size
    edge = [sign * (thing.centre[axis] + sign * thing.box[2 + axis] / 2) for thing in scene.things]
    return first if gap >= OUTERMOST and edge[scene.things.index(first)] == max(edge) else None


def larger(a: Thing, b: Thing) -> bool | None:
    """Whether `a` is clearly larger than `b` (False: clearly smaller)."""
    longer = max(a.box[2:]) >= max(b.box[2:])
    if a.area >= LARGER * b.area and longer:
        return True
    return False if b.area >= LARGER * a.area and max(b.box[2:]) >= max(a.box[2:]) else None


def extreme_size(things: Sequence[Thing], *, largest: bool) -> Thing | None:
    """The thing that is clearly larger (or smaller) than every other."""
    best = max(things, key=lambda thing: thing.area if largest else -thing.area)
    return best if all(larger(best, other) is largest for other in things if other is not best) else None


def family_counts(scene: Scene) -> dict[Family, int]:
    """How many members each family has, for the families of which every thing clearly is or is not one."""
    counts: dict[Family, int] = {}
    for family in FAMILIES:
        if any(family.singular in thing.kind.disputed for thing in scene.things):
            continue
        counts[family] = sum(family.singular in thing.kind.families for thing in scene.things)
    return counts
