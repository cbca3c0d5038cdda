"""Shards of pictures and texts, and the tokenizer trained on them, from a small bank made by hand."""

import hashlib
import io
import json
import random
import tarfile
from collections import defaultdict
from pathlib import Path

import pictures
import pytest
import train_tokenizer
import webdataset
from bank import run_command
from bank_format import Concept, Picture, load_bank, write_bank
from PIL import Image, ImageDraw

STYLES = ("noto", "twemoji", "fluent-emoji", "fluent-emoji-flat", "openmoji")
CREDIT = {
    "title": "Noto",
    "homepage": "https://example.org",
    "author": "A",
    "name": "noto",
    "version": "1",
    "licence": "MIT",
}


def drawing(seed: str, brightness: int = 128) -> bytes:
    image = Image.new("RGBA", (32, 32))
    rng = random.Random(seed)
    box = (rng.randrange(12), rng.randrange(12), 20 + rng.randrange(12), 20 + rng.randrange(12))
    ImageDraw.Draw(image).ellipse(box, fill=(brightness, brightness, rng.randrange(256), 255))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of 60 concepts in five styles, the first with a skin-toned picture and one that another concept shares."""
    words = [f"{first}{second}" for first in ("ka", "lo", "mi", "su", "ta", "re") for second in "bdfgklmnrs"]
    concepts = [
        Concept(
            id=word,
            code="",
            group="things",
            subgroup="small-things",
            name=word,
            names={"en": word, "de": word + "chen", "yo": word + "u"},
            keywords={"en": [word, "small", "red"], "de": ["klein"]},
        )
        for word in words
    ]
    drawn = []
    for word in words:
        for style in STYLES:
            png = drawing("shared") if style == "noto" and word in ("kab", "kad") else drawing(f"{word} {style}")
            drawn.append(Picture(concept=word, style=style, licence="MIT", package=f"{style}@1", png=png))
            if style == "twemoji":
                toned = drawing(f"{word} tone")
                drawn += [
                    Picture(concept=word, style=style, licence="MIT", package="p@1", png=toned, skin_tone=True)
                ] * 2
    out = tmp_path_factory.mktemp("data") / "bank"
    write_bank(out, concepts, drawn, {"made_of": {"size": 32}, "packages": [CREDIT]})
    return out


@pytest.fixture(scope="module")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "pictures"
    arguments = ["--bank", str(folder), "--out", str(out), "--seed", "3", "--texts", "300", "--shard-size", "50"]
    pictures.main([*arguments, "--sheet", str(out.parent / "seen" / "sheet.png")])
    return out


def read(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {member.name: stored.read() for member in tar if (stored := tar.extractfile(member))}


def samples(shards: Path) -> dict[str, list[tuple[str, dict]]]:
    found: dict[str, list[tuple[str, dict]]] = defaultdict(list)
    for shard in sorted(shards.glob("t*.tar")) + sorted(shards.glob("val*.tar")):
        for name, content in read(shard).items():
            if name.endswith(".json"):
                found[shard.name.rsplit("-", 1)[0]].append((name[:-5], json.loads(content)))
    return found


def test_splits_hold_out_what_they_say(folder: Path, shards: Path) -> None:
    found = samples(shards)
    assert set(found) == set(pictures.SPLITS)
    keys = [key for split in found.values() for key, _ in split]
    assert len(keys) == len(set(keys))
    bank = load_bank(folder)
    tones = sum(bank.pictures[int(key)].skin_tone for key in keys)
    assert len(keys) - tones == 60 * len(STYLES) and 0 < tones < 0.5 * 120  # one in five of 120, by chance
    concepts = {split: {fields["concept"] for _, fields in of} for split, of in found.items()}
    known = set().union(*(of for split, of in concepts.items() if split != "test_concept"))
    assert not concepts["test_concept"] & known and 0 < len(concepts["test_concept"]) < 15
    assert concepts["val"] | concepts["test"] | concepts["test_style"] <= concepts["train"]
    assert all(fields["style"] == "openmoji" for _, fields in found["test_style"])
    assert all(fields["style"] != "openmoji" for split in ("train", "val", "test") for _, fields in found[split])


def test_no_drawing_is_in_two_splits(folder: Path) -> None:
    bank = load_bank(folder)
    for seed in range(20):
        splits = pictures.assign_splits(bank.pictures, seed)
        of_design, of_content = defaultdict(set), defaultdict(set)
        for picture, split in zip(bank.pictures, splits, strict=True):
            of_design[picture.concept, pictures.design(picture.style)].add(split)
            of_content[hashlib.sha256(picture.png).digest()].add(split)
        assert all(len(found) == 1 for found in (*of_design.values(), *of_content.values()))


def test_samples_say_what_they_show(shards: Path) -> None:
    files = read(shards / "train-000000.tar")
    assert len(files) == 100
    captions = []
    for name in files:
        if name.endswith(".png"):
            image = Image.open(io.BytesIO(files[name]))
            assert image.mode == "RGB" and image.size == (32, 32)
            fields = json.loads(files[name[:-3] + "json"])
            assert fields["licence"] == "MIT" and "@1" in fields["source"] and fields["split"] == "train"
            assert fields["names"] == {"en": fields["name"], "de": fields["name"] + "chen"}
            assert all(caption.startswith(fields["name"]) for caption in fields["captions"])
            captions += fields["captions"]
    assert any(", small" in caption for caption in captions) and any("chen, klein" in caption for caption in captions)
    assert "MIT" in (shards / "credits.md").read_text()


def test_a_light_drawing_stands_out(folder: Path) -> None:
    light = Image.open(io.BytesIO(drawing("light", brightness=250)))
    light.paste((255, 255, 255, 255), (8, 8, 24, 24))
    for seed in range(30):
        corner = pictures.on_background(light, random.Random(seed)).getpixel((0, 0))
        assert max(corner) < 200  # pyright: ignore[reportArgumentType]


def test_texts_are_distinct_and_leave_out_unseen_concepts(shards: Path) -> None:
    lines = {
        name: [text.decode() for text in read(shards / f"texts-{name}-000000.tar").values()]
        for name in ("train", "val")
    }
    every = lines["train"] + lines["val"]
    assert len(every) == len(set(every)) == 300 and len(lines["val"]) == 6
    unseen = {fields["name"] for _, fields in samples(shards)["test_concept"]}
    assert not any(line.removeprefix("English ").removeprefix("a picture: ")[:3] in unseen for line in every)


def test_the_same_seed_gives_the_same_bytes(folder: Path, shards: Path, tmp_path: Path) -> None:
    for seed, same in ((3, True), (4, False)):
        out = tmp_path / str(seed)
        pictures.build(load_bank(folder), out, seed=seed, texts=300, shard_size=50)
        assert ((out / "manifest.json").read_bytes() == (shards / "manifest.json").read_bytes()) is same


def test_tokenizer(shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import sentencepiece

    out = tmp_path / "new" / "tokenizer.model"
    arguments = ["--out", str(out), "--vocab-size", "2000", *map(str, shards.glob("t*-000000.tar"))]
    train_tokenizer.main(arguments)
    said = capfd.readouterr()
    assert "the texts hold no more" in said.out and "trainer_interface" not in said.err
    first = out.read_bytes()
    pieces = sentencepiece.SentencePieceProcessor(model_proto=first)
    assert (pieces.unk_id(), pieces.bos_id(), pieces.eos_id(), pieces.pad_id()) == (0, 1, 2, -1)
    for text in ("kab, small, red", "牛 and things never seen"):
        assert pieces.decode(pieces.encode(text)) == text and 0 not in pieces.encode(text)
    train_tokenizer.main(arguments)
    assert out.read_bytes() == first


def test_tokenizer_leaves_out_what_is_broken(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.tar"
    broken = [b"{", b"[]", b'{"captions": [1]}', b'{"captions": ["\\ud800"]}']
    with webdataset.TarWriter(str(path)) as writer:
        for number, content in enumerate([*broken, b'{"captions": ["a red disc"]}']):
            writer.write({"__key__": f"{number}", "json": content, "txt": b"\xff" if number else b"a bar"})
    assert list(train_tokenizer.texts_of([path])) == ["a bar", "a red disc"]
    said = capfd.readouterr().err
    assert all(said.count(f"left out: {path} key {number} (bad ") == 1 for number in range(3))
    assert said.count("left out") == 8 and said.count("surrogates not allowed") == 1


def test_tokenizer_refuses_what_is_no_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.tar").write_text("not a tar")
    (tmp_path / "empty.tar").write_bytes(bytes(10240))
    for name, said in (("a.tar", "no shard"), ("empty.tar", "no captions"), ("missing.tar", "No such file")):
        arguments = ["--out", str(tmp_path / "model"), str(tmp_path / name)]
        assert run_command(lambda: train_tokenizer.main(arguments)) == 2  # noqa: B023
        assert said in capsys.readouterr().err.splitlines()[-1]
