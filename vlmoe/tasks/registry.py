"""Every task by its name in a recipe. A new task is one file and one line here."""

from collections.abc import Callable
from typing import Any

import torch

from vlmoe.config import RunConfig
from vlmoe.tasks.captioning import Captioning
from vlmoe.tasks.classification import Classification
from vlmoe.tasks.nlvr2 import NLVR2
from vlmoe.tasks.pretrain import Pretrain
from vlmoe.tasks.retrieval import Retrieval
from vlmoe.tasks.task import Task
from vlmoe.tasks.visual_tokenizer import TrainVisualTokenizer
from vlmoe.tasks.vqa import VQA

TASKS: dict[str, Callable[[Any, torch.device], Task]] = {
    "pretrain": Pretrain,
    "visual_tokenizer": TrainVisualTokenizer,
    "vqa": VQA,
    "nlvr2": NLVR2,
    "retrieval": Retrieval,
    "captioning": Captioning,
    "classification": Classification,
}


def make_task(config: RunConfig, device: torch.device) -> Task:
    return TASKS[config.task](config, device)
