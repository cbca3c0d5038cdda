"""One scene, one set of pairs, one text: from its number to the files of its samples and the records of its indexes.

Each is a pure function of (seed, split, index), so it does not matter which process makes it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from scene_captions import captions, other_language, paragraph
from scene_kinds import SPLITS
from scene_layout import LayoutOptions, Scene, draw_scene, generator
from scene_pairs import PAIRS, draw_pairs
from scene_questions import questions
from scene_render import Background, encode, render
from scene_sprites import World

ANSWERS = 10  # an official VQA question has ten; here they agree, because the layout is the truth
Record = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """What goes into a shard under one key, and what the indexes say of it."""

    key: str
    files: dict[str, bytes]  # by extension
    record: Record


def image_id(split: str, index: int) -> int:
    """A number that no other scene of any split has."""
    return SPLITS.index(split) * 10_000_000 + index


def make_scene(world: World, split: str, index: int, seed: int, options: LayoutOptions) -> Sample:
    """A picture with captions, questions and boxes."""
    rng = generator(seed, "scene", split, index)
    scene = draw_scene(world, split, index, rng, options)
    image, background = render(world, scene, rng, options)
    language, names = other_language(scene, rng)
    number = image_id(split, index)
    record = {
        "image_id": number,
        "split": split,
        "captions": captions(scene, rng),
        "captions_other": {language: names},
        "questions": [
            {
                "question_id": number * 10 + place,
                "question": question.question,
                "question_type": question.question_type,
                "answer_type": question.answer_type,
                "answer": question.answer,
                "answers": [question.answer] * ANSWERS,
            }
            for place, question in enumerate(questions(world, scene, rng))
        ],
        **_about(world, scene, background),
    }
    return _sample(f"scenes_{split}_{number:012d}", {"jpg": encode(image)}, record)


def make_pairs(world: World, split: str, set_number: int, seed: int, options: LayoutOptions) -> Iterator[Sample]:
    """The four pairs of pictures of one sentence."""
    for pair, rng in draw_pairs(world, split, set_number, seed, options):
        files, sides = {}, {}
        for side, scene in (("left", pair.left), ("right", pair.right)):
            image, background = render(world, scene, rng, options)
            files[f"{side}.jpg"] = encode(image)
            sides[side] = _about(world, scene, background)
        record = {
            "identifier": pair.identifier,
            "split": split,
            "statement_type": pair.statement_type,
            "sentence": pair.sentence,
            "label": str(pair.label),
            **sides,
        }
        yield _sample(f"pairs_{split}_{pair.set_number:08d}_{pair.number}", files, record)


def make_text(world: World, split: str, index: int, seed: int, options: LayoutOptions) -> Sample:
    """Sentences about a layout that is never drawn."""
    rng = generator(seed, "text", split, index)
    text = paragraph(draw_scene(world, split, index, rng, options), rng)
    return Sample(f"texts_{split}_{index:08d}", {"txt": text.encode()}, {})


def samples_of(
    world: World, what: str, split: str, numbers: range, seed: int, options: LayoutOptions
) -> Iterator[Sample]:
    """The samples of a run of numbers of one sort ("scenes", "pairs", "texts"), in order."""
    if what == "pairs":
        for first in range(numbers.start, numbers.stop, PAIRS):
            yield from make_pairs(world, split, first // PAIRS, seed, options)
    else:
        make = make_scene if what == "scenes" else make_text
        for index in numbers:
            yield make(world, split, index, seed, options)


def _about(world: World, scene: Scene, background: Background) -> Record:
    """Boxes, background and licence of one picture; the licence is an SPDX expression."""
    pictures = [world.bank.pictures[thing.picture] for thing in scene.things]
    used = pictures + ([] if background.picture is None else [world.bank.pictures[background.picture]])
    return {
        "width": scene.size,
        "height": scene.size,
        "objects": [
            {"name": thing.kind.name, "box": thing.box, "style": picture.style, "color": thing.color}
            for thing, picture in zip(scene.things, pictures, strict=True)
        ],
        "background": background.about
        if background.picture is None
        else f"photograph of {world.bank.pictures[background.picture].concept}",
        "licence": " AND ".join(sorted({picture.licence for picture in used})),
        "source": "scenes",
    }


def _sample(key: str, files: dict[str, bytes], record: Record) -> Sample:
    return Sample(key, files | {"json": json.dumps(record, ensure_ascii=False).encode()}, record)
