"""Index files in the formats of the benchmarks -> examples, one by one.

Every reader is a function of one source of a recipe. A row that cannot be used stops it with one line that names the row.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

from vlmoe.config import ExamplesSource
from vlmoe.data.sample import FILE_EXTENSIONS
from vlmoe.errors import UserError

ANSWERS = 10  # of a question, as in VQAv2


@dataclass(frozen=True)
class Example:
    """A row of an index file. `meta` goes into the sample as it is."""

    id: int | str
    images: tuple[str, ...]  # names below the source's `images`; NLVR2 has two, the left one first
    where: str  # file and row
    texts: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)


def read_examples(source: ExamplesSource) -> Iterator[Example]:
    """All rows of an index file, whatever `source.part` says.

    Raises:
        UserError: the file is missing or broken, or a row lacks something; the line names the row.
    """
    return READERS[source.format](source)


def parts_of(examples: list[Example], count: int) -> list[Literal["rest", "held_out"] | None]:
    """Held out are the examples of `count` pictures: those whose names have the smallest SHA-256, whatever their order.

    An example with one of these pictures beside another one belongs to neither part (None).
    """
    images = {name for example in examples for name in example.images}
    chosen = set(
        sorted(images, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest())[:count]
    )
    shares = ({name in chosen for name in example.images} for example in examples)
    return [None if len(share) > 1 else "held_out" if True in share else "rest" for share in shares]


def _vqa(source: ExamplesSource) -> Iterator[Example]:
    """VQAv2: {"questions": [{"image_id", "question_id", "question"}]} and {"annotations": [{"image_id", "question_id",
    "answers", "multiple_choice_answer", "question_type", "answer_type"}]}, joined by question, one to one."""
    if source.image_name is None:
        raise UserError(
            f"{source.index}: VQA questions name pictures by number: set image_name, such as "
            "COCO_val2014_{image_id:012d}.jpg"
        )
    annotations = {} if source.annotations is None else _annotations(source.annotations)
    unused = dict.fromkeys(annotations)
    for where, row in _rows_of(source.index, "questions"):
        number, image = _get(row, "question_id", (int, str), where), _get(row, "image_id", (int, str), where)
        _, annotated, labels = annotations.get(number, ("", image, {}))
        if source.annotations is not None and number not in annotations:
            raise UserError(f"{where}: question {number!r} has no annotation in {source.annotations}")
        if annotated != image:
            raise UserError(
                f"{where}: image_id is {image!r}, but {annotated!r} in the annotation of question {number!r}"
            )
        unused.pop(number, None)
        try:
            name = source.image_name.format(image_id=image)
        except (ValueError, KeyError, IndexError) as error:
            raise UserError(
                f"{where}: image_name {source.image_name!r} does not fit image_id {image!r} ({error})"
            ) from None
        meta = {"image_id": image, **labels}
        yield Example(number, (name,), where, (_get(row, "question", str, where),), meta)
    for number in unused:
        raise UserError(f"{annotations[number][0]}: question {number!r} is not in {source.index}")


def _annotations(path: str) -> dict[int | str, tuple[str, int | str, dict[str, Any]]]:
    """Question -> row, image, and what goes into `meta`."""
    found: dict[int | str, tuple[str, int | str, dict[str, Any]]] = {}
    for where, row in _rows_of(path, "annotations"):
        number, image = _get(row, "question_id", (int, str), where), _get(row, "image_id", (int, str), where)
        if number in found:
            raise UserError(f"{where}: question {number!r} is annotated in {found[number][0]} already")
        answers = [_get(each, "answer", str, where) for each in _get(row, "answers", list, where)]
        if len(answers) != ANSWERS:
            raise UserError(f"{where}: it has {len(answers)} answers, not {ANSWERS}; format jsonl takes any number")
        meta = {"answers": answers, "multiple_choice_answer": _get(row, "multiple_choice_answer", str, where)}
        meta |= {key: _get(row, key, str, where) if key in row else "other" for key in ("question_type", "answer_type")}
        found[number] = where, image, meta
    return found


def _coco(source: ExamplesSource) -> Iterator[Example]:
    """COCO captions: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}; a row an image."""
    content = _load(source.index)
    captions: dict[Any, list[str]] = {}
    names = [
        (where, _get(row, "id", (int, str), where), _get(row, "file_name", str, where))
        for where, row in _rows_of(source.index, "images", content)
    ]
    known = {image for _, image, _ in names}
    for where, row in _rows_of(source.index, "annotations", content):
        image = _get(row, "image_id", (int, str), where)
        if image not in known:
            raise UserError(f"{where}: image_id {image!r} is not among the images of the file")
        captions.setdefault(image, []).append(_get(row, "caption", str, where))
    for where, image, name in names:
        yield Example(image, (name,), where, tuple(captions.get(image, ())), {"image_id": image})


def _instances(source: ExamplesSource) -> Iterator[Example]:
    """COCO instances: {"images", "annotations": [{"image_id", "category_id", "area"}], "categories": [{"id", "name"}]}; the
    label of an image is the category of its largest object, and images without any are left out."""
    content = _load(source.index)
    names = {
        _get(row, "id", (int, str), where): _get(row, "name", str, where)
        for where, row in _rows_of(source.index, "categories", content)
    }
    known = {_get(row, "id", (int, str), where) for where, row in _rows_of(source.index, "images", content)}
    largest: dict[Any, tuple[float, str]] = {}
    for where, row in _rows_of(source.index, "annotations", content):
        image, category = _get(row, "image_id", (int, str), where), _get(row, "category_id", (int, str), where)
        if category not in names:
            raise UserError(f"{where}: category_id {category!r} is not among the categories of the file")
        if image not in known:
            raise UserError(f"{where}: image_id {image!r} is not among the images of the file")
        largest[image] = max(largest.get(image, (-1.0, "")), (_get(row, "area", (int, float), where), names[category]))
    for where, row in _rows_of(source.index, "images", content):
        image = _get(row, "id", (int, str), where)
        if image in largest:
            meta = {"image_id": image, "label": largest[image][1]}
            yield Example(image, (_get(row, "file_name", str, where),), where, (), meta)


def _karpathy(source: ExamplesSource) -> Iterator[Example]:
    """Karpathy's splits of COCO and Flickr30k: {"images": [{"filename", "split", "sentences": [{"raw"}]}]}."""
    found = set()
    for where, row in _rows_of(source.index, "images"):
        split = _get(row, "split", str, where)
        found.add(split)
        if source.splits and split not in source.splits:
            continue
        name = _get(row, "filename", str, where)
        path = f"{_get(row, 'filepath', str, where)}/{name}" if "filepath" in row else name
        texts = tuple(_get(each, "raw", str, where) for each in _get(row, "sentences", list, where))
        image = _get(row, next(key for key in ("cocoid", "imgid", "filename") if key in row), (int, str), where)
        yield Example(image, (path,), where, texts, {"image_id": image})
    if missing := sorted(set(source.splits) - found):
        raise UserError(f"{source.index} has no split {missing[0]!r}; it has {', '.join(sorted(found))}")


def _nlvr2(source: ExamplesSource) -> Iterator[Example]:
    """NLVR2's JSON lines. Pictures are `left_image` and `right_image`, or by the official rule
    [<directory>/]<identifier without its last part>-img{0,1}.png."""
    for where, row in _lines_of(source.index):
        identifier = _get(row, "identifier", str, where)
        stem = identifier.rpartition("-")[0]
        if "left_image" in row or "right_image" in row:
            images = _get(row, "left_image", str, where), _get(row, "right_image", str, where)
        else:
            folder = f"{row['directory']}/" if "directory" in row else ""
            images = f"{folder}{stem}-img0.png", f"{folder}{stem}-img1.png"
        meta = {}
        if "label" in row:
            if str(row["label"]).lower() not in ("true", "false"):
                raise UserError(f'{where}: label is {row["label"]!r}; write "True" or "False"')
            meta["label"] = str(row["label"]).capitalize()
        yield Example(identifier, images, where, (_get(row, "sentence", str, where),), meta)


def _jsonl(source: ExamplesSource) -> Iterator[Example]:
    """A line an example: "image" (and "image_b"), "text" (a string or several), "answers" or "answer", "label", "id".

    Fewer than ten answers are repeated in turn until there are ten, so that a single answer counts in full.
    """
    for number, (where, row) in enumerate(_lines_of(source.index), start=1):
        images = tuple(_get(row, key, str, where) for key in ("image", "image_b") if key == "image" or key in row)
        texts = row.get("text", [])
        texts = [texts] if isinstance(texts, str) else texts
        answers = row.get("answers", [row["answer"]] if "answer" in row else [])
        for name, values in {"text": texts, "answers": answers}.items():
            if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
                raise UserError(f"{where}: {name!r} must be a string or a list of strings")
        if not all(answer.strip() for answer in answers):
            raise UserError(f"{where}: an answer is blank")
        meta: dict[str, Any] = {"image_id": row["image"]}
        if "label" in row:
            meta["label"] = str(_get(row, "label", (str, int, bool), where))
        if answers:
            meta["answers"] = list(islice(cycle(answers), max(ANSWERS, len(answers))))
            meta["free_spelling"] = True  # the evaluator compares an official file's to the letter at times
            meta["multiple_choice_answer"] = max(answers, key=answers.count)
            meta |= {key: str(row.get(key, "other")) for key in ("question_type", "answer_type")}
        key = _get(row, "id", (int, str), where) if "id" in row else f"{Path(source.index).with_suffix('')}-{number}"
        yield Example(key, images, where, tuple(texts), meta)


def _folders(source: ExamplesSource) -> Iterator[Example]:
    """Pictures sorted into folders, `<index>/<label>/<picture>`, as ImageNet's are."""
    root = Path(source.index)
    if not root.is_dir():
        raise UserError(f"{root} is no folder; format folders wants one whose subfolders are the labels")
    for path in sorted(root.glob("*/*")):
        if path.suffix.lower().removeprefix(".") in FILE_EXTENSIONS:
            name = f"{path.parent.name}/{path.name}"
            yield Example(name, (name,), str(path), (), {"image_id": name, "label": path.parent.name})


READERS: dict[str, Callable[[ExamplesSource], Iterator[Example]]] = {
    "vqa": _vqa,
    "coco": _coco,
    "instances": _instances,
    "karpathy": _karpathy,
    "nlvr2": _nlvr2,
    "jsonl": _jsonl,
    "folders": _folders,
}


def _load(path: str) -> Any:
    try:
        return json.loads(_text_of(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def _rows_of(path: str, name: str, content: Any = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file: name[3]", row) of a list inside a JSON object."""
    content = _load(path) if content is None else content
    rows = content.get(name) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise UserError(f'{path} has no list "{name}"; is it a file of another format?')
    for number, row in enumerate(rows):
        yield f"{path}: {name}[{number}]", row


def _lines_of(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", row) of a file of JSON lines; empty lines are passed over."""
    for number, line in enumerate(_text_of(path).split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number} is not valid JSON: {error}") from None


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; make or download the index file, or change the recipe") from None
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error})") from None


def _get(row: Any, key: str, kinds: type | tuple[type, ...], where: str) -> Any:
    if not isinstance(row, dict):
        raise UserError(f"{where} is no JSON object")
    if type(row.get(key)) is kinds:  # nearly always
        return row[key]
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    is_odd = isinstance(row.get(key), bool) and bool not in kinds  # which Python counts among the ints
    if is_odd or not isinstance(row.get(key), kinds):
        names = " or ".join(each.__name__ for each in kinds)
        said = f"is {row[key]!r}" if key in row else "is missing"
        raise UserError(f"{where}: {key!r} {said}; it must be of type {names}")
    return row[key]
