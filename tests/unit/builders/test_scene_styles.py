"""The drawings that scenes are made of: which split shows which, and how those of training are varied."""

import io
from collections import Counter
from random import Random

import numpy as np
import pytest
from bank_format import Picture, load_bank, write_bank
from PIL import Image, ImageColor, ImageDraw
from scene_layout import LayoutOptions
from scene_make import samples_of
from scene_restyle import color_in, restyle
from scene_sprites import COLOR_NAMES, build_world, color_name, color_named
from small_bank import KINDS


@pytest.mark.parametrize(("split", "changes"), [("train", True), ("val", False), ("test_style", False)])
def test_only_training_drawings_are_restyled(world, split, changes):
    plain, restyled = (
        next(iter(samples_of(world, "scenes", split, range(1), 0, LayoutOptions(image_size=96, restyled=share))))
        for share in (0.0, 1.0)
    )
    assert (plain.files["jpg"] != restyled.files["jpg"]) is changes
    assert plain.record["objects"] == restyled.record["objects"]
    assert changes or plain.record == restyled.record


@pytest.mark.parametrize("name", ["saddlebrown", "limegreen", "pink", "white", "gold", "red", "dodgerblue", "gray"])
def test_a_restyled_drawing_keeps_its_size_and_a_named_colour(name):
    whole = Image.new("RGBA", (60, 48))
    ImageDraw.Draw(whole).ellipse((2, 2, 57, 45), fill=ImageColor.getrgb(name))
    sprite = np.asarray(whole.convert("RGBa"), np.float32)
    changed = 0
    for seed in range(60):
        made = restyle(sprite, Random(seed), keep_color=True)
        assert made.shape == sprite.shape and made.dtype == np.float32
        assert (made >= 0).all() and (made[..., :3] <= made[..., 3:] + 1e-3).all() and made.max() <= 255
        drawn = Image.fromarray(made.round().astype(np.uint8), "RGBa").convert("RGBA")
        assert color_name(drawn) in (color_name(whole), None)
        changed += not np.array_equal(made, sprite)
    assert changed > 50


@pytest.fixture(scope="module")
def world_with_icons(bank_folder, tmp_path_factory):
    bank = load_bank(bank_folder)
    ring = Image.new("RGBA", (60, 60))
    ImageDraw.Draw(ring).ellipse((2, 2, 57, 57), outline="black", width=6)
    packed = io.BytesIO()
    ring.save(packed, "PNG")
    icons = [Picture(concept=name, style="mdi", licence="MIT", png=packed.getvalue()) for name in KINDS]
    folder = tmp_path_factory.mktemp("icons") / "bank"
    write_bank(folder, list(bank.concepts.values()), [*bank.pictures, *icons], {"made_of": {}, "packages": []})
    return build_world(load_bank(folder))


@pytest.mark.parametrize(
    ("split", "restyled", "has_icons"), [("train", 1.0, True), ("train", 0.0, False), ("val", 1.0, False)]
)
def test_icons_are_for_training(world_with_icons, split, restyled, has_icons):
    options = LayoutOptions(image_size=96, restyled=restyled)
    drawn = [sample.record for sample in samples_of(world_with_icons, "scenes", split, range(40), 0, options)]
    styles = Counter(each["style"] for record in drawn for each in record["objects"])
    assert (styles["mdi"] > 0) is has_icons and styles["round"] > 0
    assert not has_icons or 0.3 < styles["mdi"] / styles.total() < 0.7


def test_what_lines_enclose_is_solid(world_with_icons):
    [icon] = world_with_icons.pool("train")[0].icons
    solid = world_with_icons.solid(icon)
    y, x = np.mgrid[0 : solid.height, 0 : solid.width] - (solid.width - 1) / 2
    far = np.hypot(y, x) / (solid.width / 2)
    assert (np.asarray(solid)[far < 0.97] == 255).all() and (np.asarray(solid)[far > 1.06] == 0).all()
    assert np.asarray(world_with_icons.image(icon))[28, 28, 3] == 0


@pytest.mark.parametrize("name", COLOR_NAMES)
def test_an_icon_takes_on_a_named_colour(world_with_icons, name):
    [icon] = world_with_icons.pool("train")[0].icons
    lines, solid = (
        np.asarray(world_with_icons.image(icon), np.float32),
        np.asarray(world_with_icons.solid(icon), np.float32),
    )
    for seed in range(20):
        rng = Random(seed)
        made = color_in(lines, solid, rng, (color_named(name, rng), color_named(name, rng)))
        assert (made[..., :3] <= made[..., 3:] + 1e-3).all() and np.allclose(made[..., 3], solid)
        assert color_name(Image.fromarray(made.round().astype(np.uint8), "RGBa").convert("RGBA")) == name


def test_few_kinds_are_those_whose_colours_differ(bank_folder):
    chosen = set(build_world(load_bank(bank_folder), kinds=10).vocabulary.kinds)
    assert len(chosen) == 10
    assert not {"strawberry", "tomato"} <= chosen, "both are red"
    assert {"panda", "ant"} <= chosen, "white and black"


def test_few_styles_are_those_that_draw_most_kinds(bank_folder):
    bank = load_bank(bank_folder)
    kinds = build_world(bank, styles=1).vocabulary.kinds.values()
    assert {bank.pictures[index].style for kind in kinds for index in kind.known} == {"round"}
    assert {bank.pictures[index].style for kind in kinds for index in kind.unseen} == {"openmoji"}
