"""Layouts: which objects a scene holds, and where. The layout is the truth that all text is made from.

A box is (left, top, width, height) in pixels. Every random choice of a scene comes from its own generator, seeded with
(seed, what, split, index), so a scene does not depend on who draws it or when.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from scene_kinds import Kind, is_new, may_meet, pair_held_out
from scene_sprites import COLOR_NAMES, World

from vlmoe.errors import UserError

Box = tuple[int, int, int, int]

SMALLEST = 22  # pixels of an object's longer side
RELATIVES = 0.45  # probability that a further kind shares a family with one that is there
TRIES = 60
ICON_SHARE = 0.5  # of the restyled things, those that are drawn from icons where their kind has some
NAMED_COLOR_SHARE = 0.5  # of the icons, those that are coloured in a colour that has a name


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object of a scene."""

    kind: Kind
    picture: int
    box: Box
    flipped: bool
    color: str | None

    @property
    def centre(self) -> tuple[float, float]:
        left, top, width, height = self.box
        return left + width / 2, top + height / 2

    @property
    def area(self) -> int:
        return self.box[2] * self.box[3]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The things of a square picture, back to front."""

    split: str
    index: int
    size: int
    things: tuple[Thing, ...]

    @property
    def counts(self) -> Counter[Kind]:
        return Counter(thing.kind for thing in self.things)


@dataclass(frozen=True, kw_only=True)
class LayoutOptions:
    image_size: int = 128
    min_objects: int = 2
    max_objects: int = 7
    max_overlap: float = 0.08  # of the smaller of two boxes
    kinds: int | None = None  # draw from so many kinds only; None: from all
    styles: int | None = None  # and in so many styles only
    plain: bool = False  # all backgrounds white
    restyled: float = 0.0  # share of a training scene's things that are drawn in a made-up style
    statements: tuple[str, ...] = ()  # the types of sentence about pairs; none: all of them


def generator(seed: int, what: str, split: str, index: int) -> Random:
    """The random numbers of one item."""
    return Random(f"{seed}/{what}/{split}/{index}")


def draw_scene(
    world: World,
    split: str,
    index: int,
    rng: Random,
    options: LayoutOptions,
    *,
    required: Mapping[Kind, int] | None = None,
    forbidden: Iterable[str] = (),
) -> Scene:
    """A new scene.

    `required`: kinds that must be there, exactly so often (0: must not). `forbidden`: ids of kinds not to draw besides.
    """
    counts = draw_counts(world, split, rng, options, required=required or {}, forbidden=frozenset(forbidden))
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    rng.shuffle(kinds)
    pictures = [rng.choice(_pictures(kind, split, rng, options)) for kind in kinds]
    boxes = place([world.image(picture).size for picture in pictures], rng, options)
    things = [
        Thing(kind=kind, picture=picture, box=box, flipped=rng.random() < 0.5, color=_color(world, picture, rng))
        for kind, picture, box in zip(kinds, pictures, boxes, strict=True)
    ]
    return Scene(split=split, index=index, size=options.image_size, things=tuple(things))


def _pictures(kind: Kind, split: str, rng: Random, options: LayoutOptions) -> tuple[int, ...]:
    """Those of its pictures that one is drawn from."""
    if split == "train" and options.restyled and kind.icons and rng.random() < ICON_SHARE * options.restyled:
        return kind.icons
    return kind.unseen if split == "test_style" else kind.known


def _color(world: World, picture: int, rng: Random) -> str | None:
    """The name of a picture's colour; of an icon's, the colour that it is to be given."""
    if not world.bank.pictures[picture].is_icon:
        return world.color(picture)
    return rng.choice(COLOR_NAMES) if rng.random() < NAMED_COLOR_SHARE else None


def draw_counts(
    world: World,
    split: str,
    rng: Random,
    options: LayoutOptions,
    *,
    required: Mapping[Kind, int],
    forbidden: frozenset[str],
) -> Counter[Kind]:
    """How many of which kinds, drawn anew until they are what the split is for."""
    for _ in range(TRIES):
        counts = _try_counts(world, split, rng, options, required, forbidden)
        if counts.total() >= options.min_objects and _suits(split, counts):
            return counts
    raise UserError(f"--bank: too few kinds of object for the scenes of {split}; make it with: --objects scene")


def _try_counts(
    world: World,
    split: str,
    rng: Random,
    options: LayoutOptions,
    required: Mapping[Kind, int],
    forbidden: frozenset[str],
) -> Counter[Kind]:
    counts = Counter({kind: count for kind, count in required.items() if count})
    blocked = forbidden | {kind.id for kind in required}
    total = rng.randint(options.min_objects, options.max_objects)
    if not _suits(split, counts):
        total = max(total, counts.total() + 1)
    while left := max(total - counts.total(), 0):
        kind = _draw_kind(world, split, rng, [*counts], blocked)
        if kind is None:
            break
        most = left if counts else left - 1  # two kinds or more
        counts[kind] = min(rng.choices((1, 2, 3, 4, 5), (10, 5, 4, 3, 2))[0], most)
    return counts


def _suits(split: str, kinds: Iterable[Kind]) -> bool:
    """Whether a scene of these kinds has what its split is for."""
    kinds = [*kinds]
    if split == "test_combination":
        return any(pair_held_out(a, b) for a in kinds for b in kinds if a is not b)
    return split != "test_concept" or any(is_new(kind.id) for kind in kinds)


def _draw_kind(world: World, split: str, rng: Random, there: Sequence[Kind], blocked: frozenset[str]) -> Kind | None:
    """A kind that may join those that are there; None when none is found."""
    pools = [world.pool(split)]
    if split == "test_concept" and (not _suits(split, there) or rng.random() < 0.5):
        pools = [world.new_concepts, *pools]
    elif split == "test_combination" and there and not _suits(split, there):
        pools = [[kind for kind in pools[0] if any(pair_held_out(kind, other) for other in there)]]
    elif there and rng.random() < RELATIVES:
        pools = [world.kin(split, rng.choice(there).kin), *pools]
    for pool in filter(None, pools):
        for _ in range(TRIES):
            kind = rng.choice(pool)
            met = kind.id not in blocked and all(kind is not other and may_meet(kind, other) for other in there)
            if met and (split == "test_combination" or not any(pair_held_out(kind, other) for other in there)):
                return kind
    return None


def place(shapes: Sequence[tuple[int, int]], rng: Random, options: LayoutOptions) -> list[Box]:
    """A box for each picture (width, height), with its proportions, none hiding more of another than allowed."""
    size = options.image_size
    largest = size * max(0.54 - 0.04 * len(shapes), 0.2)
    longer = [max(largest * rng.uniform(0.58, 1.0), SMALLEST) for _ in shapes]
    while True:
        extents = [_fit(shape, side, size) for shape, side in zip(shapes, longer, strict=True)]
        boxes = _scatter(extents, rng, options)
        if boxes is not None:
            return boxes
        if max(longer) <= SMALLEST:
            raise UserError(
                f"--image-size {size}: too small for {len(shapes)} objects; raise it or lower --max-objects"
            )
        longer = [max(side * 0.94, SMALLEST) for side in longer]


def _fit(shape: tuple[int, int], longer: float, size: int) -> tuple[int, int]:
    """Width and height of a picture whose longer side is `longer`, a fifth more when it is slim."""
    width, height = shape
    scale = longer / max(shape) * (1.2 if min(shape) < 0.5 * max(shape) else 1.0)
    return min(max(round(width * scale), 1), size - 2), min(max(round(height * scale), 1), size - 2)


def _scatter(extents: Sequence[tuple[int, int]], rng: Random, options: LayoutOptions) -> list[Box] | None:
    boxes: dict[int, Box] = {}
    for which in sorted(range(len(extents)), key=lambda i: -extents[i][0] * extents[i][1]):
        width, height = extents[which]
        for _ in range(TRIES):
            left = rng.randint(1, options.image_size - 1 - width)
            top = rng.randint(1, options.image_size - 1 - height)
            box = (left, top, width, height)
            if all(overlap(box, other) <= options.max_overlap for other in boxes.values()):
                boxes[which] = box
                break
        else:
            return None
    return [boxes[which] for which in range(len(extents))]


def overlap(a: Box, b: Box) -> float:
    """The share of the smaller box that two boxes have in common."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0) / min(a[2] * a[3], b[2] * b[3])
