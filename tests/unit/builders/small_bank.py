"""A picture bank of a few coloured shapes in three styles, and of coloured planes for photographs."""

import io
from pathlib import Path

from bank_format import Concept, Picture, write_bank
from PIL import Image, ImageColor, ImageDraw

KINDS = {  # name -> plural, subgroup, colour
    "ant": ("ants", "animal-bug", "black"),
    "owl": ("owls", "animal-bird", "saddlebrown"),
    "parrot": ("parrots", "animal-bird", "limegreen"),
    "pig": ("pigs", "animal-mammal", "hotpink"),
    "panda": ("pandas", "animal-mammal", "white"),
    "banana": ("bananas", "food-fruit", "gold"),
    "strawberry": ("strawberries", "food-fruit", "red"),
    "tomato": ("tomatoes", "food-fruit", "red"),
    "eggplant": ("eggplants", "food-vegetable", "blueviolet"),
    "carrot": ("carrots", "food-vegetable", "darkorange"),
    "airplane": ("airplanes", "transport-air", "dodgerblue"),
    "tractor": ("tractors", "transport-ground", "forestgreen"),
    "drum": ("drums", "musical-instrument", "red"),
    "harp": ("harps", "musical-instrument", "orange"),
    "crown": ("crowns", "clothing", "gold"),
    "scarf": ("scarves", "clothing", "royalblue"),
    "axe": ("axes", "tool", "gray"),
    "magnet": ("magnets", "tool", "crimson"),
}
KEYWORDS = {"airplane": ["plane"], "eggplant": ["aubergine"], "axe": ["hatchet"]}


def drawing(name: str, style: str) -> bytes:
    """A shape whose proportions depend on the kind and the style."""
    image = Image.new("RGBA", (96, 96))
    pen, place = ImageDraw.Draw(image), list(KINDS).index(name)
    inset = 6 + 3 * (place % 5)
    box = (6, inset, 90, 96 - inset) if place % 2 else (inset, 6, 96 - inset, 90)
    color = ImageColor.getrgb(KINDS[name][2])
    (pen.ellipse if style == "round" else pen.rectangle)(box, fill=color, outline="black")
    packed = io.BytesIO()
    image.save(packed, "PNG")
    return packed.getvalue()


def write_small_bank(folder: Path) -> None:
    concepts = [
        Concept(
            id=name,
            code="",
            group="",
            subgroup=subgroup,
            name=name,
            names={"en": name, "xx": name[::-1], "ja": f"<{name}>"},
            keywords={"en": KEYWORDS.get(name, [])},
            plural=plural,
            article="an" if name[0] in "aeiou" else "a",
            scene=True,
        )
        for name, (plural, subgroup, _) in KINDS.items()
    ]
    concepts += [
        Concept(id=f"food-{i}", code="", group="food-photographs", subgroup="", name="", names={}, keywords={})
        for i in range(40)
    ]
    pictures = [
        Picture(concept=name, style=style, licence=licence, png=drawing(name, style))
        for name in KINDS
        for style, licence in (("round", "MIT"), ("square", "Apache-2.0"), ("openmoji", "CC-BY-SA-4.0"))
    ]
    for i in range(40):
        packed = io.BytesIO()
        Image.new("RGB", (64, 48), (5 * i, 255 - 5 * i, 90)).save(packed, "PNG")
        pictures.append(Picture(concept=f"food-{i}", style="photograph", licence="MIT", png=packed.getvalue()))
    about = {
        "made_of": {},
        "packages": [dict.fromkeys(("title", "homepage", "author", "name", "version", "licence"), "x")],
    }
    write_bank(folder, concepts, pictures, about)
