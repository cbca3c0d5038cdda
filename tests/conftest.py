"""A world small enough to learn in a test: coloured shapes on coloured ground, with captions that say so."""

import io
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import webdataset
import yaml
from hypothesis import settings
from PIL import Image, ImageDraw

settings.register_profile("vlmoe", deadline=None, derandomize=True)  # shared machines are slow at times
settings.load_profile("vlmoe")

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200), "yellow": (230, 210, 40)}
SHAPES = ("square", "disc", "bar")


@dataclass(frozen=True)
class TinyWorld:
    folder: Path

    @property
    def pairs(self) -> str:
        return f"{self.folder}/pairs-*.tar"

    @property
    def held_out(self) -> str:
        return f"{self.folder}/val-*.tar"

    @property
    def spm(self) -> str:
        return f"{self.folder}/tiny.model"


def scene(shape: str, ink: str, ground: str, size: int = 32) -> Image.Image:
    image = Image.new("RGB", (size, size), COLOURS[ground])
    draw = ImageDraw.Draw(image)
    low, high = size // 4, 3 * size // 4
    if shape == "disc":
        draw.ellipse((low, low, high, high), fill=COLOURS[ink])
    else:
        top, bottom = (low, high) if shape == "square" else (size * 3 // 8, size * 5 // 8)
        draw.rectangle((low, top, high, bottom), fill=COLOURS[ink])
    return image


def sentence(shape: str, ink: str, ground: str) -> str:
    return f"a {ink} {shape} on a {ground} ground"


def write_shard(path: Path, samples: list[tuple[Image.Image, str]]) -> None:
    with webdataset.TarWriter(str(path), mtime=0) as writer:
        for number, (image, text) in enumerate(samples):
            content = io.BytesIO()
            image.save(content, "PNG")
            writer.write({"__key__": f"{number:04}", "png": content.getvalue(), "txt": text.encode()})


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    kinds = [each for each in itertools.product(SHAPES, COLOURS, COLOURS) if each[1] != each[2]]
    drawn = [kinds[i] for i in rng.integers(len(kinds), size=160)]
    samples = [(scene(*each), sentence(*each)) for each in drawn]
    for shard in range(4):
        write_shard(folder / f"pairs-{shard:06}.tar", samples[shard * 32 : (shard + 1) * 32])
    write_shard(folder / "val-000000.tar", samples[128:])
    (folder / "text.txt").write_text("\n".join(sentence(*each) for each in kinds))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tiny"), vocab_size=60, hard_vocab_limit=False,
        minloglevel=2, num_threads=1,
    )  # fmt: skip
    return TinyWorld(folder)


@pytest.fixture(autouse=True)
def same_draws_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer_recipe(tiny_world: TinyWorld) -> Path:
    """A visual tokenizer that a test trains in a second."""
    return write_recipe(
        tiny_world.folder / "visual_tokenizer.yaml",
        {
            "task": "visual_tokenizer", "out": str(tiny_world.folder / "visual_tokenizer"), "steps": 30,
            "image_size": 32, "patch_size": 8, "dim": 32, "depth": 1, "attn_heads": 2, "num_codes": 32, "code_dim": 8,
            **SHORT, "data": {"workers": 0, "images": stream(tiny_world, 16)},
        },
    )  # fmt: skip


@pytest.fixture(scope="session")
def trained_tokenizer(tokenizer_recipe: Path) -> Path:
    from vlmoe.config import load
    from vlmoe.train.trainer import train

    config = load(tokenizer_recipe)
    train(config)
    return Path(config.out)


@pytest.fixture
def broken_shard(tiny_world: TinyWorld, tmp_path: Path) -> Path:
    """A shard none of whose pictures can be decoded."""
    path = tmp_path / "broken.tar"
    path.write_bytes((tiny_world.folder / "pairs-000000.tar").read_bytes().replace(b"\x89PNG", b"\x89BAD"))
    return path


@pytest.fixture(scope="session")
def pretrain_recipe(tiny_world: TinyWorld, trained_tokenizer: Path) -> Path:
    """A two-layer MH-MoE on pairs and texts; a test sets `out`."""
    return write_recipe(
        tiny_world.folder / "pretrain.yaml",
        {
            "task": "pretrain", "steps": 12, "visual_tokenizer": str(trained_tokenizer), **SHORT,
            "model": {
                "dim": 32, "depth": 2, "attn_heads": 2, "image_size": 32, "patch_size": 8, "max_text_length": 16,
                "drop_path": 0.1, "ffn": {"num_experts": 4, "num_heads": 2},
            },
            "data": {
                "workers": 0, "text": {"model": tiny_world.spm},
                "pairs": stream(tiny_world, 16), "texts": stream(tiny_world, 8),
            },
        },
    )  # fmt: skip


@dataclass(frozen=True)
class TinyExamples:
    """Index files over pictures in a folder: `vqa/`, `coco/`, `nlvr2/`, `karpathy.json`, `<split>.jsonl`."""

    folder: Path
    spm: str

    def source(self, format: str, split: str) -> dict[str, object]:
        """One of the sources of `data.examples`."""
        index = {
            "vqa": f"vqa/questions_{split}.json", "coco": f"coco/captions_{split}.json", "jsonl": f"{split}.jsonl",
            "instances": f"coco/instances_{split}.json", "nlvr2": f"nlvr2/{split}.jsonl", "karpathy": "karpathy.json",
            "folders": "sorted",
        }[format]  # fmt: skip
        said: dict[str, object] = {"format": format, "index": f"{self.folder}/{index}"}
        if format == "vqa":
            said |= {"annotations": f"{self.folder}/vqa/annotations_{split}.json", "image_name": "{image_id:04}.png"}
        if format == "karpathy":
            said["splits"] = [split]
        return said if format == "folders" else {**said, "images": f"{self.folder}/images"}

    def data(self, format: str, batch_size: int) -> dict[str, object]:
        """The block `data` of a recipe."""
        sources = {"sources": [self.source(format, "train")], "eval_sources": [self.source(format, "val")]}
        return {"workers": 0, "text": {"model": self.spm}, "examples": {"batch_size": batch_size, **sources}}


@pytest.fixture(scope="session")
def tiny_examples(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> TinyExamples:
    """Questions, captions, statements and labels about 64 scenes to train on and 16 held-out ones."""
    folder = tmp_path_factory.mktemp("examples")
    for name in ("images", "vqa", "coco", "nlvr2", *(f"sorted/{shape}" for shape in SHAPES)):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(1)
    kinds = [each for each in itertools.product(SHAPES, COLOURS, COLOURS) if each[1] != each[2]]
    karpathy = []
    for split, numbers in {"train": range(64), "val": range(64, 80)}.items():
        drawn = {number: kinds[rng.integers(len(kinds))] for number in numbers}
        questions, annotations, captions, labels, statements = [], [], [], [], []
        for number, (shape, ink, ground) in drawn.items():
            name = f"{number:04}.png"
            scene(shape, ink, ground).save(folder / "images" / name)
            scene(shape, ink, ground).save(folder / "sorted" / shape / name)
            texts = [sentence(shape, ink, ground), f"on {ground} ground a {ink} {shape}"]
            karpathy.append(
                {"filename": name, "imgid": number, "split": split, "sentences": [{"raw": t} for t in texts]}
            )
            captions += [{"image_id": number, "id": 10 * number + i, "caption": text} for i, text in enumerate(texts)]
            labels.append(
                {"image": name, "text": f"a {ink} what on a {ground} ground", "answer": shape, "label": shape}
            )
            for i, (text, kind, answer) in enumerate((("a what on a ground", "ink", ink), ("a what", "shape", shape))):
                ids = {"question_id": 10 * number + i, "image_id": number}
                questions.append({**ids, "question": text})
                said = [{"answer": answer, "answer_id": n} for n in range(1, 11)]
                kind_and_answer = {"question_type": kind, "answer_type": "other", "multiple_choice_answer": answer}
                annotations.append({**ids, **kind_and_answer, "answers": said})
            other = numbers[(number - numbers[0] + 1) % len(numbers)]
            statements.append({
                "identifier": f"{split}-{number // 2}-{number % 2}-0", "sentence": f"a {shape} on a ground",
                "label": str(drawn[other][0] == shape), "left_image": name, "right_image": f"{other:04}.png",
            })  # fmt: skip
        images = [{"id": number, "file_name": f"{number:04}.png"} for number in numbers]
        boxes = [
            {"image_id": number, "category_id": SHAPES.index(shape), "area": area}
            for number, (drawn_shape, *_) in drawn.items()
            for shape, area in (("bar", 10), (drawn_shape, 100), ("disc", 20))
        ]
        categories = [{"id": number, "name": shape} for number, shape in enumerate(SHAPES)]
        written = {
            f"vqa/questions_{split}.json": {"questions": questions},
            f"vqa/annotations_{split}.json": {"annotations": annotations},
            f"coco/captions_{split}.json": {"images": images, "annotations": captions},
            f"coco/instances_{split}.json": {"images": images, "annotations": boxes, "categories": categories},
        }
        for name, content in written.items():
            (folder / name).write_text(json.dumps(content))
        for name, rows in {f"nlvr2/{split}.jsonl": statements, f"{split}.jsonl": labels}.items():
            (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "karpathy.json").write_text(json.dumps({"images": karpathy}))
    return TinyExamples(folder, tiny_world.spm)


TINY_MODEL = {
    "dim": 32, "depth": 2, "attn_heads": 2, "image_size": 32, "patch_size": 8, "max_text_length": 16,
    "ffn": {"num_experts": 4, "num_heads": 2},
}  # fmt: skip


@pytest.fixture
def finetune_recipe(tiny_examples: TinyExamples, tmp_path: Path) -> Callable[..., Path]:
    """finetune_recipe("vqa", "vqa", steps=3) -> a recipe whose run is `run` beside it."""

    def write(task: str, format: str, **settings: object) -> Path:
        recipe = {
            "task": task, "out": str(tmp_path / "run"), "steps": 6, **SHORT, "model": TINY_MODEL,
            "data": tiny_examples.data(format, 16), **settings,
        }  # fmt: skip
        return write_recipe(tmp_path / f"{task}.yaml", recipe)

    return write


SHORT = {
    "precision": "fp32", "device": "cpu", "log_every": 1, "eval_every": 1000, "checkpoint_every": 1000,
    "optim": {"lr": 3e-3, "warmup_steps": 4},
}  # fmt: skip


def stream(world: TinyWorld, batch_size: int) -> dict[str, object]:
    return {"batch_size": batch_size, "sources": [{"shards": world.pairs}], "eval_shards": [world.held_out]}


def write_recipe(path: Path, recipe: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump(recipe))
    return path
