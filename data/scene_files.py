"""The files that scenes are written to: webdataset shards, and indexes in the forms of COCO, VQAv2 and NLVR2."""

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from tarfile import USTAR_FORMAT, TarFile
from tarfile import open as open_tar
from types import TracebackType
from typing import IO, Any, Self

from bank_format import add_file, credits_page
from scene_kinds import Vocabulary
from scene_make import Record, Sample

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


class Shards:
    """Writes samples to `<prefix>-000000.tar`, `<prefix>-000001.tar`, ... of `per_shard` samples each."""

    def __init__(self, folder: Path, prefix: str, per_shard: int) -> None:
        self.folder, self.prefix, self.per_shard = folder, prefix, per_shard
        self.written = 0
        self._tar: TarFile | None = None

    def __enter__(self) -> Self:
        return self

    def add(self, sample: Sample) -> None:
        if self.written % self.per_shard == 0:
            self.__exit__(None, None, None)
            name = f"{self.prefix}-{self.written // self.per_shard:06d}.tar"
            self._tar = open_tar(self.folder / name, "w", format=USTAR_FORMAT)  # noqa: SIM115
        assert self._tar is not None
        for extension, content in sample.files.items():
            add_file(self._tar, f"{sample.key}.{extension}", content)
        self.written += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tar is not None:
            self._tar.close()


class JsonFile:
    """A JSON object with long lists that are written as they come: `head`, then each list of `lists`."""

    def __init__(self, path: Path, head: dict[str, Any], lists: Iterable[str]) -> None:
        self.path, self.head = path, head
        self._lists: dict[str, IO[str]] = {
            name: tempfile.TemporaryFile("w+", encoding="utf-8", dir=path.parent)  # noqa: SIM115
            for name in lists
        }

    def add(self, name: str, item: Any) -> None:
        file = self._lists[name]
        if file.tell():
            file.write(",\n")
        file.write(json.dumps(item, ensure_ascii=False))

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
        self._category = {kind.name: number for number, kind in enumerate(vocabulary.kinds.values(), 1)}
        categories = [
            {"id": self._category[kind.name], "name": kind.name, "supercategory": kind.kin}
            for kind in vocabulary.kinds.values()
        ]
        vqa = {"info": INFO, "license": LICENCES[0], "data_type": "scenes", "data_subtype": split}
        for name in ("coco", "vqa"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.instances = JsonFile(
            folder / f"coco/instances_{split}.json", coco | {"categories": categories}, ("images", "annotations")
        )
        self.captions = JsonFile(folder / f"coco/captions_{split}.json", coco, ("images", "annotations"))
        self.questions = JsonFile(
            folder / f"vqa/questions_{split}.json", vqa | {"task_type": "Open-Ended"}, ("questions",)
        )
        self.answers = JsonFile(folder / f"vqa/annotations_{split}.json", vqa, ("annotations",))
        self._boxes = self._captions = 0

    def add(self, sample: Sample) -> None:
        record, number = sample.record, sample.record["image_id"]
        image = {"id": number, "file_name": f"{sample.key}.jpg", "license": 1}
        image |= {"width": record["width"], "height": record["height"]}
        self.instances.add("images", image)
        self.captions.add("images", image)
        for thing in record["objects"]:
            self._boxes += 1
            self.instances.add("annotations", self._box(thing, number))
        for caption in record["captions"]:
            self._captions += 1
            self.captions.add("annotations", {"image_id": number, "id": self._captions, "caption": caption})
        for question in record["questions"]:
            ids = {"image_id": number, "question_id": question["question_id"]}
            self.questions.add("questions", ids | {"question": question["question"]})
            self.answers.add("annotations", ids | _annotation(question))

    def close(self) -> None:
        for file in (self.instances, self.captions, self.questions, self.answers):
            file.close()

    def _box(self, thing: Record, image: int) -> Record:
        left, top, width, height = thing["box"]
        right, bottom = left + width, top + height
        return {
            "id": self._boxes,
            "image_id": image,
            "category_id": self._category[thing["name"]],
            "bbox": [left, top, width, height],
            "area": width * height,
            "iscrowd": 0,
            "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
        }


class PairIndex:
    """NLVR2's JSON lines of one split."""

    def __init__(self, folder: Path, split: str) -> None:
        (folder / "nlvr2").mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"nlvr2/{split}.jsonl").open("w", encoding="utf-8")

    def add(self, sample: Sample) -> None:
        line = {name: sample.record[name] for name in ("identifier", "sentence", "label", "statement_type")}
        line |= {"left_image": f"{sample.key}.left.jpg", "right_image": f"{sample.key}.right.jpg"}
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._file.close()


def _annotation(question: Record) -> Record:
    """A question's entry in VQAv2's annotations."""
    return {
        "question_type": question["question_type"],
        "answer_type": question["answer_type"],
        "multiple_choice_answer": question["answer"],
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": number}
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
