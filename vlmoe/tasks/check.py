"""Reading all that a fine-tuning reads, before hours are spent on it."""

from collections.abc import Iterator

import torch

from vlmoe.config import FinetuneConfig, RunConfig
from vlmoe.data import Examples, ExampleStream
from vlmoe.data.examples import STREAM, ExamplePlace
from vlmoe.errors import UserError
from vlmoe.tasks.registry import make_task
from vlmoe.tasks.vqa import VQA


def check_data(config: RunConfig) -> Iterator[str]:
    """Lines that say what there is; notes on what is allowed but worth knowing.

    Raises:
        UserError: the first wrong row: broken JSON, something missing in it, an id that comes twice, a label that
            training does not have, a picture that is missing or broken.
    """
    if not isinstance(config, FinetuneConfig):
        raise UserError(f"task {config.task} reads shards, whose broken samples are counted while it trains")
    task = make_task(config, torch.device("cpu"))
    stream = task.open_streams()[STREAM]
    assert isinstance(stream, ExampleStream)
    splits = {"training": stream.examples}
    for place in task.open_held_out().get(STREAM, ())[:1]:
        assert isinstance(place, ExamplePlace)
        splits["held out"] = place.examples
    for name, examples in splits.items():
        examples.check_pictures(decode=True)
        yield f"{name}: {len(examples)} examples with {len(examples.pictures_of())} pictures"
    if "held out" in splits:
        shared = splits["training"].pictures_of().keys() & splits["held out"].pictures_of().keys()
        if shared:
            yield f"note: {len(shared)} held-out pictures are trained on too, such as {min(shared)[1]}"
    if isinstance(task, VQA):
        yield f"{len(task.labels)} answers"
        yield from _unknown(task, "training", task.training, "left out")
        if task.held_out.examples is not None:
            yield from _unknown(task, "held-out", task.held_out.examples, "counted as wrong")


def _unknown(task: VQA, name: str, examples: Examples, fate: str) -> Iterator[str]:
    rows = [each.where for each in examples if "answers" in each.meta and not task.is_known(each)]
    if rows:
        yield f"note: {len(rows)} {name} questions have no answer of the vocabulary and are {fate}, first {rows[0]}"
