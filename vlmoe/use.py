"""A trained run as an object that answers: `m = vlmoe.load("runs/vqa"); m.answer("a.png", "What is left of the dog?")`.

Pictures pass what they pass in an evaluation, in batches, on the GPU where there is one.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vlmoe.data import BrokenSample, Pixels, Sample, collate, to_device
from vlmoe.data.sample import decode_image, to_pixels, to_rgb
from vlmoe.data.text import is_unicode
from vlmoe.errors import UserError
from vlmoe.tasks import load_run
from vlmoe.tasks.captioning import Captioning
from vlmoe.tasks.classification import Classification
from vlmoe.tasks.nlvr2 import NLVR2
from vlmoe.tasks.retrieval import Retrieval
from vlmoe.tasks.vqa import VQA
from vlmoe.train.hardware import autocast, check_experts

Picture = str | Path | Image.Image | Pixels
Pictures = list[str] | list[Path] | list[Image.Image] | list[Pixels]
T = TypeVar("T")


class Answer(NamedTuple):
    text: str
    score: float  # VQA: the accuracy that the model expects of it, 0 to 1; classification: its probability


def load(run: str | Path, device: str = "auto", *, batch_size: int = 32, overrides: Sequence[str] = ()) -> "Model":
    """The newest checkpoint of a run folder, or the checkpoint of a checkpoint folder, ready to use.

    Args:
        run: what `vlmoe train` wrote, or `tools/convert_checkpoint.py`.
        device: "cpu", "cuda" (or "cuda:1"), or "auto": CUDA where there is some.
        batch_size: pictures or texts that pass the model together.
        overrides: `key=value` settings that replace the recipe's, such as "beam_size=5".

    Raises:
        UserError: there is no checkpoint, or it is damaged; there is no such device, or it cannot run the recipe's
            backend; `batch_size` is below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    on = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        torch.empty(0, device=on)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {on!r} cannot be used here ({str(error).splitlines()[0]}); use cpu or auto") from None
    return Model(Path(run), torch.device(on), batch_size, overrides)


class Model:
    """Every method takes one picture or text, or a list, and returns one result or a list of them.

    A picture is a path, a PIL image, or uint8 RGB pixels [3, height, width]. What the run's task does not do raises a
    UserError that names the task which does.
    """

    def __init__(self, run: Path, device: torch.device, batch_size: int, overrides: Sequence[str]) -> None:
        loaded = load_run(run, device, list(overrides))
        check_experts(loaded.config, device)
        self.run, self.checkpoint, self.config = run, loaded.folder, loaded.config
        self.device, self.batch_size = device, batch_size
        self._task, self._model = loaded.task, loaded.model

    @overload
    def answer(self, image: Picture, question: str, top_k: int = 5) -> list[Answer]: ...
    @overload
    def answer(self, image: Pictures, question: str | list[str], top_k: int = 5) -> list[list[Answer]]: ...
    @overload
    def answer(self, image: Picture, question: list[str], top_k: int = 5) -> list[list[Answer]]: ...
    def answer(
        self, image: Picture | Pictures, question: str | list[str], top_k: int = 5
    ) -> list[Answer] | list[list[Answer]]:
        """The `top_k` likeliest answers, best first; a list of such lists where the image or the question is a list.

        A single picture goes with every question of a list, and a single question with every picture.
        """
        task = self._of(VQA, "vqa", "answers questions")
        pictures, questions = _as_list(image), _as_list(question)
        count = max(len(pictures), len(questions))
        if not {len(pictures), len(questions)} <= {1, count}:
            raise UserError(
                f"{len(pictures)} pictures do not pair with {len(questions)} questions; give one, or equally many"
            )

        def run(part: dict[str, Any]) -> list[list[Answer]]:
            logits = self._model(part["image"], part["text"], text_padding=part["text_padding"]).logits
            return _best(task.expected_scores(logits.float()), task.labels, top_k)

        samples = (_sample(pictures[i % len(pictures)], [questions[i % len(questions)]]) for i in range(count))
        answers = self._over(samples, task, run)
        return answers if isinstance(image, list) or isinstance(question, list) else answers[0]

    @overload
    def caption(self, image: Picture) -> str: ...
    @overload
    def caption(self, image: Pictures) -> list[str]: ...
    def caption(self, image: Picture | Pictures) -> str | list[str]:
        """A sentence, or a list of them."""
        task = self._of(Captioning, "captioning", "writes captions")
        return self._of_pictures(image, task, lambda part: task.captions(self._model, part["image"]))

    @overload
    def classify(self, image: Picture, top_k: int = 5) -> list[Answer]: ...
    @overload
    def classify(self, image: Pictures, top_k: int = 5) -> list[list[Answer]]: ...
    def classify(self, image: Picture | Pictures, top_k: int = 5) -> list[Answer] | list[list[Answer]]:
        """The `top_k` likeliest labels, best first, or a list of such lists."""
        task = self._of(Classification, "classification", "classifies pictures")
        return self._of_pictures(
            image, task, lambda part: _best(self._model(part["image"]).logits.float().softmax(-1), task.labels, top_k)
        )

    def is_true(self, sentence: str, left: Picture, right: Picture) -> bool:
        """Whether a sentence is true of two pictures."""
        task = self._of(NLVR2, "nlvr2", "judges sentences of two pictures")

        def run(part: dict[str, Any]) -> list[bool]:
            return [each["prediction"] == "True" for each in task.predict(self._model, {"examples": part})]

        return self._over(iter([_sample(left, [sentence], right)]), task, run)[0]

    def embed_image(self, image: Picture | Pictures) -> Float[Tensor, "*images dim"]:
        """Of unit length, float32, on the CPU; its product with `embed_text` says how well text and picture go together."""
        task = self._of(Retrieval, "retrieval", "embeds pictures")
        found = self._of_pictures(
            image, task, lambda part: list(self._model(part["image"]).image_embedding.float().cpu())
        )
        if isinstance(image, list):
            return torch.stack(found) if found else torch.zeros(0, task.config.model.dim)
        return found

    def embed_text(self, text: str | list[str]) -> Float[Tensor, "*texts dim"]:
        """Of unit length, float32, on the CPU."""
        task, texts = self._of(Retrieval, "retrieval", "embeds texts"), _valid(_as_list(text))
        with torch.inference_mode(), autocast(self.config, self.device):
            parts = [texts[i : i + self.batch_size] for i in range(0, len(texts), self.batch_size)]
            found = torch.cat(
                [torch.zeros(0, task.config.model.dim), *(task.embed_texts(self._model, part).cpu() for part in parts)]
            )
        return found if isinstance(text, list) else found[0]

    def _of(self, kind: type[T], name: str, does: str) -> T:
        if not isinstance(self._task, kind):
            raise UserError(f"{self.run} is a run of task {self.config.task}; a run of task {name} {does}")
        return self._task

    def _of_pictures(self, image: Any, task: Any, run: Callable[[dict[str, Any]], list[Any]]) -> Any:
        found = self._over((_sample(each, [""]) for each in _as_list(image)), task, run)
        return found if isinstance(image, list) else found[0]

    def _over(self, samples: Iterator[Sample], task: Any, run: Callable[[dict[str, Any]], list[Any]]) -> list[Any]:
        """`run` on every batch of prepared samples, its results in one list."""
        rng = np.random.default_rng(0)  # evaluation draws nothing
        prepared = (task.prepare(sample, "examples", rng, False) for sample in samples)
        results: list[Any] = []
        while part := list(islice(prepared, self.batch_size)):
            batch = collate(part, pad_id=task.pad_id, max_text_length=task.max_text_length)
            with torch.inference_mode(), autocast(self.config, self.device):
                results += run(to_device(batch, self.device))
        return results


def open_picture(picture: Picture) -> Pixels:
    """RGB and upright. Raises UserError for a file that is missing or no picture, and a tensor that is no pixels."""
    if isinstance(picture, Tensor):
        if picture.dtype != torch.uint8 or picture.dim() != 3 or picture.shape[0] != 3:
            raise UserError(
                f"a picture is a {picture.dtype} tensor {list(picture.shape)}; give uint8 [3, height, width], or a PIL image"
            )
        return picture
    if isinstance(picture, Image.Image):
        return to_pixels(to_rgb(picture))
    try:
        return decode_image(Path(picture).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {picture}: {error.strerror}") from None
    except ValueError as error:  # no file can have such a name
        raise UserError(f"cannot read {str(picture)!r}: {error}") from None
    except BrokenSample as error:
        raise UserError(f"{picture}: {error.cause}; give JPEG, PNG, WebP, GIF or BMP files") from None


def _valid(texts: list[str]) -> list[str]:
    for text in texts:
        if not is_unicode(text):
            raise UserError(f"the text {text!r} is not valid Unicode; write it in UTF-8")
    return texts


def _sample(picture: Picture, texts: list[str], second: Picture | None = None) -> Sample:
    return Sample(
        key="",
        source="",
        image=open_picture(picture),
        texts=_valid(texts),
        meta={"id": 0, "image_id": 0},
        image_b=None if second is None else open_picture(second),
    )


def _best(scores: Float[Tensor, "rows labels"], labels: list[str], top_k: int) -> list[list[Answer]]:
    if top_k < 1:
        raise UserError(f"top_k is {top_k}; it must be at least 1")
    top = scores.topk(min(top_k, len(labels)))
    return [
        [Answer(labels[number], score) for number, score in zip(numbers, row, strict=True)]
        for numbers, row in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def _as_list(x: Any) -> list[Any]:
    return x if isinstance(x, list) else [x]
