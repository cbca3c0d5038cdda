"""Scenes with captions, questions, statements and boxes, made from the drawings of a picture bank.

    python data/scenes.py --bank datasets/bank --out datasets/scenes --train 20000 --val 1000 --test 1000 --seed 0

Writes into --out:
    <split>-000000.tar          key.jpg, key.json: captions, captions_other, questions with answers, objects with boxes
    pairs-<split>-000000.tar    key.left.jpg, key.right.jpg, key.json: sentence, label
    texts-{train,val}-*.tar     key.txt: sentences about layouts that are never drawn
    coco/ vqa/ nlvr2/           the same in the official forms; the file names in them are those of images/<split>/
    credits.md  stats.json  manifest.json
Splits: train, val, test; test_style (every drawing in a style that is never trained on), test_combination (two kinds
that never meet in train), test_concept (names that are never trained on; `pictures.py --seed 0` keeps the same). What
comes out depends on the bank and the options, not on the number of processes.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from bank import run_command
from bank_format import load_bank, new_folder, put_in_place, save_sheet
from processes import in_processes
from scene_files import Packed, PairIndex, SceneIndexes, Shards, credits_text, pack
from scene_kinds import SPLITS
from scene_layout import LayoutOptions
from scene_make import Sample, samples_of
from scene_pairs import PAIRS, STATEMENTS
from scene_sheet import contact_sheet
from scene_sprites import World, build_world
from scene_stats import SplitStats, question_only_floors, table
from tqdm import tqdm

from vlmoe.errors import UserError

CHUNK = 64  # samples that a process makes at a time; a multiple of PAIRS
VAL_TEXTS = 0.02  # as a share of the training texts
SHEET = (12, 6)  # scenes and pairs on the contact sheet

_world: World  # of a worker process
_seed: int
_layout: LayoutOptions
_images: dict[str, Path]  # split -> folder for its pictures


def build(
    bank_folder: Path,
    out: Path,
    *,
    scenes: dict[str, int],
    pairs: dict[str, int],
    texts: int,
    seed: int,
    layout: LayoutOptions,
    shard_size: int,
    images: str,
    workers: int,
) -> dict[str, SplitStats]:
    """Make every split; `scenes` and `pairs` say how many of each. Returns the figures by split."""
    bank = load_bank(bank_folder)
    world = build_world(bank, layout.kinds, layout.styles)
    _check(world, [split for split in SPLITS if scenes[split] or pairs[split]])
    new = new_folder(out)
    folders = {split: new / "images" / split for split in SPLITS if _keeps(images, split)}
    stats = {split: SplitStats() for split in SPLITS}
    wanted = [("scenes", split, scenes[split]) for split in SPLITS]
    wanted += [("pairs", split, pairs[split]) for split in SPLITS]
    wanted += [("texts", "train", texts), ("texts", "val", round(VAL_TEXTS * texts))]
    wanted = [(what, split, number) for what, split, number in wanted if number]
    chunks = [
        (what, split, range(first, min(first + CHUNK, number)))
        for what, split, number in wanted
        for first in range(0, number, CHUNK)
    ]
    seconds: dict[str, float] = {"scenes": 0.0, "pairs": 0.0, "texts": 0.0}
    with ExitStack() as stack:
        making = in_processes(_make, chunks, workers, initializer=_start, initargs=(bank_folder, seed, layout, folders))
        made = stack.enter_context(closing(making))
        bar = stack.enter_context(tqdm(total=sum(number for *_, number in wanted), desc="scenes", unit="sample"))
        for what, split, number in wanted:
            bar.set_description(f"{what} {split}")
            started = time.perf_counter()
            prefix = split if what == "scenes" else f"{what}-{split}"
            ours = _counted(islice(made, -(-number // CHUNK)), bar)
            _write(ours, what, split, world, new, prefix, shard_size, stats[split])
            seconds[what] += time.perf_counter() - started
    _write_about(new, world, stats, wanted, seconds)
    about = {"seed": seed, "layout": asdict(layout), "scenes": scenes, "pairs": pairs, "texts": texts}
    icons = sum(len(kind.icons) for kind in world.pool("train"))
    put_in_place(new, out, about | {"bank": bank.manifest["sha256"], "icons": icons})
    return stats


def sheet_samples(bank_folder: Path, seed: int, layout: LayoutOptions) -> tuple[list[Sample], list[Sample]]:
    """The first training scenes and pairs of several sentences, for the contact sheet."""
    world = build_world(load_bank(bank_folder), layout.kinds, layout.styles)
    scenes = list(samples_of(world, "scenes", "train", range(SHEET[0]), seed, layout))
    pairs = list(samples_of(world, "pairs", "train", range(PAIRS * SHEET[1]), seed, layout))
    return scenes, [pairs[PAIRS * number + number % PAIRS] for number in range(SHEET[1])]


def _start(bank_folder: Path, seed: int, layout: LayoutOptions, images: dict[str, Path]) -> None:
    global _world, _seed, _layout, _images
    _world, _seed, _layout = build_world(load_bank(bank_folder), layout.kinds, layout.styles), seed, layout
    _images = images


def _make(chunk: tuple[str, str, range]) -> Packed:
    """Samples, packed; their pictures are written where they are kept as files too."""
    what, split, numbers = chunk
    samples = [*samples_of(_world, what, split, numbers, _seed, _layout)]
    if what != "texts" and split in _images:
        _images[split].mkdir(parents=True, exist_ok=True)
        for sample in samples:
            for extension, content in sample.files.items():
                if extension.endswith("jpg"):
                    (_images[split] / f"{sample.key}.{extension}").write_bytes(content)
    return pack(samples, what, _world.vocabulary)


def _counted(made: Iterator[Packed], bar: "tqdm[Any]") -> Iterator[Packed]:
    for packed in made:
        bar.update(len(packed.members))
        yield packed


def _write(
    made: Iterator[Packed],
    what: str,
    split: str,
    world: World,
    out: Path,
    prefix: str,
    shard_size: int,
    stats: SplitStats,
) -> None:
    """One split of one sort: its shards, its index files, its figures."""
    index = None
    if what != "texts":
        index = SceneIndexes(out, split, world.vocabulary) if what == "scenes" else PairIndex(out, split)
    with Shards(out, prefix, shard_size if what != "texts" else 10 * shard_size) as shards:
        for packed in made:
            for members in packed.members:
                shards.add(members)
            stats.add(packed.stats)
            if index is not None:
                index.add(packed)
    if index is not None:
        index.close()


def _write_about(
    out: Path,
    world: World,
    stats: dict[str, SplitStats],
    wanted: Sequence[tuple[str, str, int]],
    seconds: dict[str, float],
) -> None:
    """stats.json and credits.md; prints the table of floors."""
    used = set[str]().union(*(split.licences for split in stats.values()))
    (out / "credits.md").write_text(credits_text(world.bank.manifest["packages"], used), encoding="utf-8")
    floors = (
        question_only_floors(stats["train"], stats["val"]) if stats["train"].by_type and stats["val"].by_type else {}
    )
    if floors:
        print("Accuracy on val without looking at the picture:\n" + table(floors))
    rate = {
        f"{what}_per_second": round(sum(number for sort, _, number in wanted if sort == what) / spent, 1)
        for what, spent in seconds.items()
        if spent
    }
    size = {
        "megabytes_of_shards": round(sum(path.stat().st_size for path in out.glob("*.tar")) / 1e6, 1),
        "megabytes_of_images": round(sum(path.stat().st_size for path in out.glob("images/*/*")) / 1e6, 1),
    }
    splits = {split: figures.summary() for split, figures in stats.items() if figures.counts}
    text = json.dumps(
        rate | size | {"question_only_floors_on_val": floors, "splits": splits}, indent=1, ensure_ascii=False
    )
    (out / "stats.json").write_text(text + "\n", encoding="utf-8")
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in (rate | size).items()))


def _keeps(images: str, split: str) -> bool:
    return images == "all" or (images == "held-out" and split != "train")


def _check(world: World, splits: Sequence[str]) -> None:
    """UserError where the bank has nothing for a split."""
    for split in splits:
        if len(world.pool(split)) < 2 or (split == "test_concept" and not world.new_concepts):
            raise UserError(f"--bank: too few kinds of object for {split}; make the bank with: --objects scene")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--bank", type=Path, required=True, help="folder that data/bank.py made")
    add("--out", type=Path, required=True, help="folder for the data set; what a former run left is replaced")
    add("--train", type=int, default=20_000, help="scenes to train on (default: 20000)")
    add("--val", type=int, default=1000, help="scenes, and pairs, of val (default: 1000)")
    add("--test", type=int, default=1000, help="scenes, and pairs, of each of the four test splits (default: 1000)")
    add("--pairs", type=int, help="pairs to train on (default: as many as --train)")
    add("--texts", type=int, default=20_000, help="texts to train on (default: 20000)")
    add("--seed", type=int, default=0, help="of everything (default: 0)")
    add("--image-size", type=int, default=128, help="side of a picture in pixels, 96 or more (default: 128)")
    add("--min-objects", type=int, default=2, help="in a scene (default: 2)")
    add("--max-objects", type=int, default=7, help="in a scene, 7 at most (default: 7)")
    add("--kinds", type=int, help="draw from so many kinds of object only, 12 or more (default: all of the bank)")
    add("--styles", type=int, help="in so many styles only, besides the unseen one (default: all of the bank)")
    add("--plain", action="store_true", help="white backgrounds")
    add("--restyled", type=float, default=0.0, help="share of training drawings in made-up styles (default: 0)")
    add("--statements", nargs="+", choices=STATEMENTS, default=(), help="types of sentence about pairs (default: all)")
    add("--max-overlap", type=float, default=0.08, help="share of the smaller of two boxes (default: 0.08)")
    add("--images", choices=("all", "held-out", "none"), default="all", help="splits with picture files (default: all)")
    add("--shard-size", type=int, default=1000, help="samples in a shard (default: 1000)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: every core)")
    add("--sheet", type=Path, help="also write a contact sheet to this PNG")
    options = parser.parse_args(arguments)
    options.pairs = options.train if options.pairs is None else options.pairs
    for name, least, most in (
        ("train", 0, 10_000_000),
        ("val", 0, 10_000_000),
        ("test", 0, 10_000_000),
        ("pairs", 0, 10_000_000),
        ("texts", 0, 10_000_000),
        ("image_size", 96, 4096),
        ("min_objects", 2, 7),
        ("max_objects", max(options.min_objects, 3), 7),
        ("kinds", 12, 10_000_000),
        ("styles", 1, 10_000_000),
        ("restyled", 0, 1),
        ("max_overlap", 0, 0.3),
        ("shard_size", 1, 10_000_000),
        ("workers", 1, 4096),
    ):
        if (given := getattr(options, name)) is not None and not least <= given <= most:
            raise UserError(f"--{name.replace('_', '-')} {given}: give a number from {least} to {most}")
    scenes = {split: getattr(options, split) if split in ("train", "val") else options.test for split in SPLITS}
    pairs = {split: number // PAIRS * PAIRS for split, number in scenes.items()}
    pairs["train"] = options.pairs // PAIRS * PAIRS
    layout = LayoutOptions(
        image_size=options.image_size,
        min_objects=options.min_objects,
        max_objects=options.max_objects,
        max_overlap=options.max_overlap,
        kinds=options.kinds,
        styles=options.styles,
        plain=options.plain,
        restyled=options.restyled,
        statements=tuple(options.statements),
    )
    stats = build(
        options.bank,
        options.out,
        scenes=scenes,
        pairs=pairs,
        texts=options.texts,
        seed=options.seed,
        layout=layout,
        shard_size=options.shard_size,
        images=options.images,
        workers=options.workers,
    )
    made = ", ".join(
        f"{split} {figures.counts['scenes']}+{figures.counts['pairs']}" for split, figures in stats.items()
    )
    print(f"{options.out}: scenes+pairs: {made}")
    if options.sheet is not None:
        save_sheet(contact_sheet(*sheet_samples(options.bank, options.seed, layout)), options.sheet)


if __name__ == "__main__":
    sys.exit(run_command(main))
