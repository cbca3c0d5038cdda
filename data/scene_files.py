"""The files that scenes are written to: webdataset shards, and indexes in the forms of COCO, VQAv2 and NLVR2.

The processes that make samples also pack them, so that the one that writes only appends.
"""

import io
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tarfile import BLOCKSIZE, RECORDSIZE, USTAR_FORMAT, TarFile
from types import TracebackType
from typing import IO, Any, Self

from bank_format import add_file, credits_page
from scene_kinds import Vocabulary
from scene_make import Record, Sample
from scene_stats import SplitStats

from vlmoe.metrics.vqa import normalize_answer

INFO = {
    "description": "vlmoe scenes: drawings placed on backgrounds; every text is made from the layout",
    "answers": "the ten answers of a question agree: they are made from the layout, not given by people",
    "version": "1.0",
    "url": "",
    "year": 2026,
    "contributor": "data/scenes.py",
    "date_created": "",
}
LICENCES = [{"id": 1, "name": "those of the drawings: see credits.md and each sample's json", "url": "credits.md"}]
Entry = tuple[str, str, Record]  # index, list in it, item


@dataclass
class Packed:
    """Some samples of one sort and split, as they go into its files."""

    members: list[bytes] = field(default_factory=list)  # of each sample: its part of a tar file
    entries: defaultdict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))
    stats: SplitStats = field(default_factory=SplitStats)


def pack(samples: Iterable[Sample], what: str, vocabulary: Vocabulary) -> Packed:
    packed, categories = Packed(), _category_numbers(vocabulary)
    for sample in samples:
        packed.members.append(_members(sample))
        if what == "texts":
            packed.stats.counts["texts"] += 1
            continue
        (packed.stats.add_scene if what == "scenes" else packed.stats.add_pair)(sample.record)
        for index, name, item in _scene_entries(sample, categories) if what == "scenes" else _pair_entries(sample):
            packed.entries[index, name].append(json.dumps(item, ensure_ascii=False))
    return packed


class Shards:
    """Writes packed samples to `<prefix>-000000.tar`, `<prefix>-000001.tar`, ... of `per_shard` samples each."""

    def __init__(self, folder: Path, prefix: str, per_shard: int) -> None:
        self.folder, self.prefix, self.per_shard = folder, prefix, per_shard
        self.written = 0
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def add(self, members: bytes) -> None:
        if self.written % self.per_shard == 0:
            self.__exit__(None, None, None)
            name = f"{self.prefix}-{self.written // self.per_shard:06d}.tar"
            self._file = (self.folder / name).open("wb")
        assert self._file is not None
        self._file.write(members)
        self.written += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        file, self._file = self._file, None
        if file is not None:
            with file:
                end = file.tell() + 2 * BLOCKSIZE  # an archive ends with two empty blocks, and fills its records
                file.write(bytes(2 * BLOCKSIZE + -end % RECORDSIZE))


class JsonFile:
    """A JSON object with long lists that are written as they come: `head`, then each list of `lists`."""

    def __init__(self, path: Path, head: dict[str, Any], lists: Iterable[str]) -> None:
        self.path, self.head = path, head
        self._lists: dict[str, IO[str]] = {
            name: tempfile.TemporaryFile("w+", encoding="utf-8", dir=path.parent)  # noqa: SIM115
            for name in lists
        }

    def add(self, name: str, items: Iterable[str]) -> None:
        """`items` are JSON."""
        file = self._lists[name]
        if file.tell():
            file.write(",\n")
        file.write(",\n".join(items))

    def close(self) -> None:
        with self.path.open("w", encoding="utf-8") as out:
            out.write(json.dumps(self.head, ensure_ascii=False)[:-1])
            for name, file in self._lists.items():
                out.write(f', "{name}": [\n')
                file.seek(0)
                while part := file.read(1 << 20):
                    out.write(part)
                out.write("\n]")
                file.close()
            out.write("}\n")


class SceneIndexes:
    """COCO instances and captions, VQAv2 questions and annotations, of one split."""

    def __init__(self, folder: Path, split: str, vocabulary: Vocabulary) -> None:
        coco = {"info": INFO, "licenses": LICENCES}
        numbers = _category_numbers(vocabulary)
        categories = [
            {"id": numbers[kind.name], "name": kind.name, "supercategory": kind.kin}
            for kind in vocabulary.kinds.values()
        ]
        vqa = {"info": INFO, "license": LICENCES[0], "data_type": "scenes", "data_subtype": split}
        for name in ("coco", "vqa"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._files = {
            index: JsonFile(folder / f"{index}_{split}.json", head, lists)
            for index, head, lists in (
                ("coco/instances", coco | {"categories": categories}, ("images", "annotations")),
                ("coco/captions", coco, ("images", "annotations")),
                ("vqa/questions", vqa | {"task_type": "Open-Ended"}, ("questions",)),
                ("vqa/annotations", vqa, ("annotations",)),
            )
        }

    def add(self, packed: Packed) -> None:
        for (index, name), items in packed.entries.items():
            self._files[index].add(name, items)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class PairIndex:
    """NLVR2's JSON lines of one split."""

    def __init__(self, folder: Path, split: str) -> None:
        (folder / "nlvr2").mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"nlvr2/{split}.jsonl").open("w", encoding="utf-8")

    def add(self, packed: Packed) -> None:
        for items in packed.entries.values():
            self._file.writelines(f"{item}\n" for item in items)

    def close(self) -> None:
        self._file.close()


def _members(sample: Sample) -> bytes:
    file = io.BytesIO()
    tar = TarFile(fileobj=file, mode="w", format=USTAR_FORMAT)
    for extension, content in sample.files.items():
        add_file(tar, f"{sample.key}.{extension}", content)
    return file.getvalue()  # of an archive that is not closed: it has no end


def _category_numbers(vocabulary: Vocabulary) -> dict[str, int]:
    return {kind.name: number for number, kind in enumerate(vocabulary.kinds.values(), 1)}


def _scene_entries(sample: Sample, categories: dict[str, int]) -> Iterator[Entry]:
    record, number = sample.record, sample.record["image_id"]
    image = {"id": number, "file_name": f"{sample.key}.jpg", "license": 1}
    image |= {"width": record["width"], "height": record["height"]}
    yield "coco/instances", "images", image
    yield "coco/captions", "images", image
    for place, thing in enumerate(record["objects"]):
        yield "coco/instances", "annotations", _box(thing, number, place, categories)
    for place, caption in enumerate(record["captions"]):
        yield "coco/captions", "annotations", {"image_id": number, "id": 10 * number + place, "caption": caption}
    for question in record["questions"]:
        ids = {"image_id": number, "question_id": question["question_id"]}
        yield "vqa/questions", "questions", ids | {"question": question["question"]}
        yield "vqa/annotations", "annotations", ids | _annotation(question)


def _pair_entries(sample: Sample) -> Iterator[Entry]:
    line = {name: sample.record[name] for name in ("identifier", "sentence", "label", "statement_type")}
    line |= {"left_image": f"{sample.key}.left.jpg", "right_image": f"{sample.key}.right.jpg"}
    yield "nlvr2", "lines", line


def _box(thing: Record, image: int, place: int, categories: dict[str, int]) -> Record:
    left, top, width, height = thing["box"]
    right, bottom = left + width, top + height
    return {
        "id": 10 * image + place,
        "image_id": image,
        "category_id": categories[thing["name"]],
        "bbox": [left, top, width, height],
        "area": width * height,
        "iscrowd": 0,
        "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
    }


def _annotation(question: Record) -> Record:
    """A question's entry in VQAv2's annotations."""
    return {
        "question_type": question["question_type"],
        "answer_type": question["answer_type"],
        "multiple_choice_answer": normalize_answer(question["answer"]),
        "answers": [  # as the evaluator spells them: unanimous ones are compared to the letter
            {"answer": normalize_answer(answer), "answer_confidence": "yes", "answer_id": number}
            for number, answer in enumerate(question["answers"], 1)
        ],
    }


def credits_text(packages: Sequence[dict[str, str]], used: Iterable[str]) -> str:
    """The credits of the bank's packages, with a word on what the scenes are."""
    return (
        "The pictures of this data set are drawings of the packages below, placed on backgrounds. "
        f"Licences of the drawings used: {', '.join(sorted(used))}. "
        "The json of each sample names those that apply to it.\n\n" + credits_page(packages)
    )
