"""The folder of a picture bank: `manifest.json`, `concepts.json.gz`, `pictures.tar`, `credits.md`."""

import gzip
import hashlib
import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from vlmoe.errors import UserError

FORMAT = 1
FILES = ("concepts.json.gz", "pictures.tar", "credits.md")


@dataclass(frozen=True, kw_only=True)
class Concept:
    """A kind of thing that is drawn in one or more styles."""

    id: str  # the English name as a slug, e.g. "sea-turtle"
    code: str  # Unicode code points in hex, joined by "-"; empty for what is no emoji
    group: str
    subgroup: str
    name: str  # English
    names: dict[str, str]  # language (CLDR locale) -> name, English included
    keywords: dict[str, list[str]]  # language -> words that go with it
    plural: str = ""  # English; "" for concepts that scenes do not use
    article: str = ""  # "a" or "an"; likewise
    scene: bool = False  # a clean, unambiguous object that scenes are made of


ICONS = (  # styles of one colour, black in the bank: scenes colour them in
    "fluent-emoji-high-contrast", "emojione-monotone", "game-icons", "mdi", "icon-park-outline", "hugeicons", "ph",
    "fa7-solid", "lucide", "tabler",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One drawing of a concept on a transparent background."""

    concept: str
    style: str
    licence: str  # SPDX
    package: str = ""  # the npm package it comes from, name@version
    skin_tone: bool = False  # drawn with one of the five skin tones (the plain yellow drawing is another picture)
    png: bytes

    @property
    def is_icon(self) -> bool:
        return self.style in ICONS

    def image(self) -> Image.Image:
        """The decoded picture, RGBA."""
        return Image.open(io.BytesIO(self.png)).convert("RGBA")


@dataclass(frozen=True, kw_only=True)
class Bank:
    concepts: dict[str, Concept]
    pictures: list[Picture]
    manifest: dict[str, Any]

    @cached_property
    def by_concept(self) -> dict[str, list[Picture]]:
        """The pictures of each concept, in the order of the bank."""
        found: dict[str, list[Picture]] = {concept: [] for concept in self.concepts}
        for picture in self.pictures:
            found[picture.concept].append(picture)
        return found


def load_bank(folder: str | Path) -> Bank:
    """Read a bank folder. UserError when it is missing, of another format, or not what its manifest says."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder}: no picture bank here; make one with: python data/bank.py --out {folder}")
    if not files_match(folder, manifest):
        raise UserError(f"{folder}: the files are not those of manifest.json; copy the folder again or make it anew")
    with gzip.open(folder / "concepts.json.gz", "rt", encoding="utf-8") as file:
        concepts = {id: Concept(id=id, **fields) for id, fields in json.load(file).items()}
    pictures = []
    with tarfile.open(folder / "pictures.tar") as tar:
        png = b""
        for member in tar:
            stored = tar.extractfile(member)
            assert stored is not None
            if member.name.endswith(".png"):
                png = stored.read()
            else:
                pictures.append(Picture(**json.load(stored), png=png))
    return Bank(concepts=concepts, pictures=pictures, manifest=manifest)


def write_bank(folder: Path, concepts: Sequence[Concept], pictures: Iterable[Picture], about: dict[str, Any]) -> None:
    """Write a bank beside `folder` and rename it into place; `about` becomes part of the manifest.

    `about["packages"]` lists the packages for the credits: name, version, sha256, licence, homepage, author, title.
    """
    styles: Counter[str] = Counter()
    new = new_folder(folder)
    with tarfile.open(new / "pictures.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, picture in enumerate(pictures):
            fields = {name: value for name, value in vars(picture).items() if name != "png"}
            add_file(tar, f"{number:06d}.png", picture.png)
            add_file(tar, f"{number:06d}.json", json.dumps(fields).encode())
            styles[picture.style] += 1
    plain = {concept.id: {k: v for k, v in asdict(concept).items() if k != "id"} for concept in concepts}
    packed = gzip.compress(json.dumps(plain, ensure_ascii=False).encode(), mtime=0)
    (new / "concepts.json.gz").write_bytes(packed)
    (new / "credits.md").write_text(credits_page(about["packages"]), encoding="utf-8")
    manifest = {
        "format": FORMAT,
        **about,
        "concepts": len(plain),
        "scene_concepts": sum(concept.scene for concept in concepts),
        "pictures": sum(styles.values()),
        "pictures_by_style": dict(sorted(styles.items())),
        "sha256": {name: sha256(new / name) for name in FILES},
    }
    put_in_place(new, folder, manifest)


def new_folder(folder: Path) -> Path:
    """An empty folder beside `folder`, to be filled and then put in its place.

    UserError when `folder` holds something that no builder made (there is no manifest.json).
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "manifest.json").is_file():
        raise UserError(f"--out {folder}: holds files of something else; give another folder")
    new = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    return new


def put_in_place(new: Path, folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest into the finished folder `new` and rename it to `folder`, which it replaces."""
    (new / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append a file whose header says nothing of time, user or machine, so that equal content is an equal tar."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def credits_page(packages: Sequence[dict[str, str]]) -> str:
    """A table of the packages that the pictures and names come from."""
    rows = [
        f"| [{p['title']}]({p['homepage']}) | {p['author']} | `{p['name']}` {p['version']} | {p['licence']} |"
        for p in packages
    ]
    head = ["# Credits", "", "| title | author | package | licence |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, ""])


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a bank folder; None where there is none. UserError for another format."""
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{path}: format {manifest.get('format')}, this version reads {FORMAT}; remove it and make it anew"
        )
    return manifest


def files_match(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether every file of the bank is there with the content that the manifest states."""
    return all(
        (folder / name).is_file() and sha256(folder / name) == digest for name, digest in manifest["sha256"].items()
    )


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a contact sheet; its folder need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
