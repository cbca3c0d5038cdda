"""Shards of pictures with names in many languages, and of text about the same things, from a picture bank.

    python data/pictures.py --bank datasets/bank --out datasets/pictures --seed 0

Splits: `test_concept` is one concept in ten, held out in every style; `test_style` is every other picture of a style
that is never trained on; `val` and `test` are new drawings of known concepts; `train` is the rest.
"""

import argparse
import hashlib
import io
import itertools
import json
import math
import random
import sys
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from bank import run_command
from bank_format import (
    Bank,
    Concept,
    Picture,
    add_file,
    credits_page,
    load_bank,
    new_folder,
    put_in_place,
    save_sheet,
    sha256,
)
from picture_texts import LANGUAGES, captions, text_lines
from PIL import Image, ImageColor, ImageDraw, ImageFont
from tqdm import tqdm

SPLITS = ("train", "val", "test", "test_style", "test_concept")
UNSEEN_STYLE = "openmoji"
HELD_OUT_CONCEPTS = 0.1
HELD_OUT_DRAWINGS = 0.15  # of the known concepts give up one design to val, as many to test: a few % of the pictures
SKIN_TONES = 0.2  # of the pictures with a skin tone are kept
VAL_TEXTS = 0.02
LIGHT = 215  # mean brightness (0 to 255) above which a drawing is not put on white


def fraction(seed: int, purpose: str, key: str) -> float:
    """A number in [0, 1) that depends on the arguments and nothing else."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{key}".encode()).digest()[:7], "big") / 2**56


def design(style: str) -> str:
    """Styles that show the same design rendered differently share its name: a split between them would leak."""
    return "fluent" if style.startswith("fluent-") else style


def concept_clusters(pictures: Sequence[Picture]) -> dict[str, str]:
    """Concept -> the first of the concepts that share a picture with it, as the flags of Norway and Svalbard do."""
    leader = {picture.concept: picture.concept for picture in pictures}

    def find(concept: str) -> str:
        while leader[concept] != concept:
            concept = leader[concept]
        return concept

    first_with: dict[bytes, str] = {}
    for picture in pictures:
        other = first_with.setdefault(hashlib.sha256(picture.png).digest(), picture.concept)
        one, two = sorted((find(picture.concept), find(other)))
        leader[two] = one
    return {concept: find(concept) for concept in leader}


def assign_splits(pictures: Sequence[Picture], seed: int) -> list[str]:
    """The split of each picture. Equal pictures, and renderings of one design, are never in two of them."""
    clusters = concept_clusters(pictures)
    designs: dict[str, set[str]] = defaultdict(set)
    for picture in pictures:
        if picture.style != UNSEEN_STYLE:
            designs[clusters[picture.concept]].add(design(picture.style))
    held_out: dict[tuple[str, str], str] = {}
    for cluster, drawn in designs.items():
        chance = fraction(seed, "drawing", cluster)
        if len(drawn) > 1 and chance < 2 * HELD_OUT_DRAWINGS:  # another design of it stays in train
            chosen = min(drawn, key=lambda name: fraction(seed, name, cluster))
            held_out[cluster, chosen] = "val" if chance < HELD_OUT_DRAWINGS else "test"
    splits = []
    for picture in pictures:
        cluster = clusters[picture.concept]
        if fraction(seed, "concept", cluster) < HELD_OUT_CONCEPTS:
            splits.append("test_concept")
        elif picture.style == UNSEEN_STYLE:
            splits.append("test_style")
        else:
            splits.append(held_out.get((cluster, design(picture.style)), "train"))
    return splits


def on_background(image: Image.Image, rng: random.Random) -> Image.Image:
    """The picture on white or on a soft colour; a light drawing on a colour that it stands out from."""
    pixels = np.asarray(image, np.float32)
    weight = pixels[..., 3] / 255
    brightness = (pixels[..., :3].mean(-1) * weight).sum() / max(float(weight.sum()), 1.0)
    light, white = brightness > LIGHT, rng.random() < 0.5
    hue, saturation = rng.randrange(360), rng.randint(8, 30)
    value = rng.randint(55, 75) if light else rng.randint(88, 100)
    colour = "white" if white and not light else ImageColor.getrgb(f"hsv({hue},{saturation}%,{value}%)")
    background = Image.new("RGBA", image.size, colour)
    return Image.alpha_composite(background, image).convert("RGB")


def make_sample(picture: Picture, concept: Concept, split: str, key: str, seed: int) -> tuple[bytes, bytes]:
    """The PNG and the JSON of a sample."""
    rng = random.Random(f"{seed}/{key}")
    file = io.BytesIO()
    on_background(picture.image(), rng).save(file, "PNG")
    fields = {
        "captions": captions(concept, rng),
        "name": concept.name,
        "concept": concept.id,
        "style": picture.style,
        "skin_tone": picture.skin_tone,
        "subgroup": concept.subgroup,
        "split": split,
        "licence": picture.licence,
        "source": picture.package,
        "names": {language: concept.names[language] for language in LANGUAGES if language in concept.names},
    }
    return file.getvalue(), json.dumps(fields, ensure_ascii=False).encode()


def write_shards(folder: Path, name: str, samples: Iterator[dict[str, bytes]], size: int) -> int:
    """`name-000000.tar`, ... of `size` samples each; a sample maps file names to contents. Returns how many."""
    count = 0
    while batch := list(itertools.islice(samples, size)):
        with tarfile.open(folder / f"{name}-{count // size:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for file_name, content in itertools.chain.from_iterable(files.items() for files in batch):
                add_file(tar, file_name, content)
        count += len(batch)
    return count


def build(bank: Bank, out: Path, *, seed: int, texts: int, shard_size: int) -> dict[str, int]:
    """Write every split's shards and the text shards; returns the samples of each."""
    kept = [
        (index, picture)
        for index, picture in enumerate(bank.pictures)
        if not picture.is_icon
        if not picture.skin_tone or fraction(seed, "skin tone", str(index)) < SKIN_TONES
    ]
    splits = assign_splits([picture for _, picture in kept], seed)
    new = new_folder(out)
    counts = {}
    with tqdm(total=len(kept), desc="pictures", unit="picture") as bar:

        def samples(split: str) -> Iterator[dict[str, bytes]]:
            chosen = [item for item, its_split in zip(kept, splits, strict=True) if its_split == split]
            random.Random(f"{seed}/{split}").shuffle(chosen)
            for index, picture in chosen:
                key = f"{index:06d}"
                png, fields = make_sample(picture, bank.concepts[picture.concept], split, key, seed)
                bar.update()
                yield {f"{key}.png": png, f"{key}.json": fields}

        for split in SPLITS:
            counts[split] = write_shards(new, split, samples(split), shard_size)
    unseen = {picture.concept for (_, picture), split in zip(kept, splits, strict=True) if split == "test_concept"}
    known = [concept for concept in bank.concepts.values() if concept.id not in unseen]
    lines = list(text_lines(known, texts, random.Random(f"{seed}/texts")))
    num_val = math.ceil(VAL_TEXTS * len(lines))
    for name, part in (("texts-val", lines[:num_val]), ("texts-train", lines[num_val:])):
        keyed = ({f"{number:08d}.txt": line.encode()} for number, line in enumerate(part))
        counts[name] = write_shards(new, name, keyed, 10 * shard_size)
    (new / "credits.md").write_text(credits_page(bank.manifest["packages"]), encoding="utf-8")
    digests = {path.name: sha256(path) for path in sorted(new.glob("*.tar"))}
    put_in_place(new, out, {"seed": seed, "bank": bank.manifest["sha256"], "samples": counts, "sha256": digests})
    return counts


def contact_sheet(folder: Path, rng: random.Random, columns: int = 8, rows: int = 8) -> Image.Image:
    """Random samples of the first shard of each split, with their split and captions."""
    found = []
    for split in SPLITS:
        shard = folder / f"{split}-000000.tar"
        if shard.is_file():
            with tarfile.open(shard) as tar:
                files = {member.name: stored.read() for member in tar if (stored := tar.extractfile(member))}
            found += [(files[name], json.loads(files[name[:-3] + "json"])) for name in files if name.endswith(".png")]
    chosen = rng.sample(found, k=min(len(found), columns * rows))
    sheet, font = Image.new("RGB", (columns * 210, rows * 190), "white"), ImageFont.load_default(size=11)
    pen = ImageDraw.Draw(sheet)
    for number, (png, fields) in enumerate(chosen):
        left, top = number % columns * 210, number // columns * 190
        sheet.paste(Image.open(io.BytesIO(png)), (left, top))
        text = [fields["name"], f"{fields['style']}, {fields['split']}", *fields["captions"][:4]]
        for line, words in enumerate(text):
            pen.text((left, top + 98 + 14 * line), words[:34], fill="black", font=font)
    return sheet


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=Path, required=True, help="folder that data/bank.py made")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the shards; what a former run left is replaced"
    )
    parser.add_argument("--seed", type=int, default=0, help="of splits, captions and backgrounds (default: 0)")
    parser.add_argument("--texts", type=int, default=50_000, help="lines of text, at most (default: 50000)")
    parser.add_argument("--shard-size", type=int, default=1000, help="samples in a shard (default: 1000)")
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet of random samples to this PNG")
    options = parser.parse_args(arguments)
    bank = load_bank(options.bank)
    counts = build(bank, options.out, seed=options.seed, texts=options.texts, shard_size=options.shard_size)
    print(f"{options.out}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    if options.sheet is not None:
        save_sheet(contact_sheet(options.out, random.Random(options.seed)), options.sheet)


if __name__ == "__main__":
    sys.exit(run_command(main))
