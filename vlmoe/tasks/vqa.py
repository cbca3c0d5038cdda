"""Task `vqa`: answer a question about a picture by choosing among the frequent answers (VQAv2; BEiT-3, appendix).

`loss: bce` is the binary cross-entropy of each answer with the soft targets of the ten annotators, summed over answers, as in
BEiT-3; `cross_entropy` is that of one softmax over all answers with the same targets, scaled to sum to one, which learns faster
where a question has one answer (docs/benchmarks). Either is the mean over questions. The figure is the official accuracy over
every held-out question: one without an answer in the vocabulary counts as wrong.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vlmoe.config import VQAConfig
from vlmoe.data import Example, Examples, Sample, SamplePlace, SampleStream, load_tokenizer
from vlmoe.data.text import tokenizer_digest
from vlmoe.errors import UserError
from vlmoe.metrics import build_answer_vocabulary, normalize_answer, soft_targets, vqa_accuracy
from vlmoe.models.build import build_encoder, check_model
from vlmoe.models.heads import VQAModel
from vlmoe.tasks import finetune
from vlmoe.tasks.labels import LABELS_FILE, labels_text, read_labels
from vlmoe.tasks.start import TOKENIZER_FILE, start_encoder
from vlmoe.tasks.task import Inputs, TaskLoss, Totals


def bce(logits: Float[Tensor, "questions answers"], targets: Float[Tensor, "questions answers"]) -> Float[Tensor, ""]:
    """Binary cross-entropy, summed over answers and questions."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")


def cross_entropy(
    logits: Float[Tensor, "questions answers"], targets: Float[Tensor, "questions answers"]
) -> Float[Tensor, ""]:
    """Cross-entropy of a softmax over the answers, summed over questions; each has a target above zero."""
    return F.cross_entropy(logits, targets / targets.sum(-1, keepdim=True), reduction="sum")


LOSSES = {"bce": bce, "cross_entropy": cross_entropy}


class VQA:
    def __init__(self, config: VQAConfig, device: torch.device) -> None:
        check_model(config.model)
        self.config, self.streams = config, finetune.STREAMS
        self.tokenizer = load_tokenizer(config.data.text)
        self.pad_id, self.max_text_length = self.tokenizer.pad_id, config.model.max_text_length
        self.labels = read_labels(config.labels) if config.labels else self._frequent_answers()
        self.number_of = {answer: number for number, answer in enumerate(self.labels)}
        self.files = {LABELS_FILE: labels_text(self.labels), TOKENIZER_FILE: tokenizer_digest(config.data.text)}

    def build_model(self) -> VQAModel:
        encoder = build_encoder(self.config.model, self.tokenizer.vocab_size, final_norm=False)
        model = VQAModel(encoder, len(self.labels))
        if self.config.freeze_routers:
            finetune.freeze_routers(model)
        return model

    def start(self, model: nn.Module) -> None:
        assert isinstance(model, VQAModel)
        start_encoder(model.encoder, self.config, self.tokenizer.vocab_size)

    def describe(self, model: nn.Module) -> str:
        return finetune.describe_finetune(model, self.config, f"{len(self.labels)} answers")

    @cached_property
    def training(self) -> Examples:
        return finetune.open_training(self.config, self.check_labelled)

    @cached_property
    def held_out(self) -> finetune.HeldOut:
        return finetune.HeldOut(self.config, self.check, lambda each: "answers" in each.meta)

    def open_streams(self) -> dict[str, SampleStream]:
        """Questions without any answer of the vocabulary teach nothing and are left out, as in ViLT and BEiT-3."""
        finetune.check_finetune(self.config)
        return finetune.stream_of(self.training.where(self.is_known), self.config)

    def open_held_out(self) -> dict[str, Sequence[SamplePlace]]:
        return self.held_out.places()

    def check(self, example: Example) -> None:
        finetune.need(example, "vqa", texts=True)

    def check_labelled(self, example: Example) -> None:
        finetune.need(example, "vqa", texts=True, meta=("answers", "multiple_choice_answer"))

    def is_known(self, example: Example) -> bool:
        """Whether some answer to the question is in the vocabulary."""
        return any(answer in self.number_of for answer in soft_targets(example.meta["answers"]))

    def prepare(self, sample: Sample, stream: str, rng: np.random.Generator, training: bool) -> dict[str, Any]:
        tensors: dict[str, Any] = {
            "image": finetune.prepare_image(sample.image, self.config, rng, training),
            "text": finetune.prepare_text(sample.texts[0], self.config, self.tokenizer),
        }
        if training:
            tensors["targets"] = torch.zeros(len(self.labels))
            for answer, score in soft_targets(sample.meta["answers"]).items():
                if answer in self.number_of:
                    tensors["targets"][self.number_of[answer]] = score
        else:
            tensors["question"] = sample.meta
        return tensors

    def num_targets(self, inputs: Inputs) -> dict[str, int]:
        return {"questions": len(inputs["examples"]["image"]), "micro_batches": 1}

    def loss(self, model: nn.Module, inputs: Inputs, num_targets: Totals) -> TaskLoss:
        part = inputs["examples"]
        out = model(part["image"], part["text"], text_padding=part["text_padding"], text_at=part["text_at"])
        loss = LOSSES[self.config.loss](out.logits.float(), part["targets"]) / num_targets["questions"]
        auxiliary, metrics = finetune.auxiliary_loss(out.routings, self.config, num_targets["micro_batches"])
        return TaskLoss(loss + auxiliary, {"answers": loss.detach(), **metrics})

    def after_step(self, model: nn.Module, states: list[Any]) -> None:
        pass

    def expected_scores(self, logits: Float[Tensor, "questions answers"]) -> Float[Tensor, "questions answers"]:
        """The accuracy that the model expects of each answer, 0 to 1, by what its loss made the logits mean."""
        return logits.softmax(-1) if self.config.loss == "cross_entropy" else logits.sigmoid()

    def predict(self, model: nn.Module, inputs: Inputs) -> list[dict[str, Any]]:
        """One record per question: its row, and the answer of the highest score."""
        part = inputs["examples"]
        out = model(part["image"], part["text"], text_padding=part["text_padding"])
        best = out.logits.argmax(-1).tolist()
        return [
            {**question, "answer": self.labels[label]} for question, label in zip(part["question"], best, strict=True)
        ]

    def score(self, predictions: list[dict[str, Any]]) -> dict[str, float]:
        records = self.held_out.in_order(predictions)
        asked = [each for each in records if "answers" in each]
        if not asked:  # a test set: only the server has its answers
            return {"questions": float(len(records))}
        annotations = [official_annotation(each) for each in asked]
        answers = [{"question_id": each["id"], "answer": each["answer"]} for each in asked]
        found = vqa_accuracy({"annotations": annotations}, answers)
        known = sum(any(answer in self.number_of for answer in soft_targets(each["answers"])) for each in asked)
        return {
            "accuracy": found["overall"],
            **{f"accuracy/{name}": value for name, value in found["per_answer_type"].items()},
            **{f"accuracy/question_type/{name}": value for name, value in found["per_question_type"].items()},
            "questions": float(len(records)),
            "questions_with_a_known_answer": float(known),
        }

    def prediction_files(self, predictions: list[dict[str, Any]]) -> dict[str, str]:
        """The results file of the VQA evaluation server."""
        records = self.held_out.in_order(predictions)
        return {"vqa_results.json": json.dumps([{"question_id": r["id"], "answer": r["answer"]} for r in records])}

    def _frequent_answers(self) -> list[str]:
        answers = build_answer_vocabulary(
            [{"annotations": [each.meta for each in self.training.whole()]}], self.config.min_answer_count
        )
        if not answers:
            raise UserError(
                f"no answer of data.examples.sources occurs min_answer_count = {self.config.min_answer_count} times; "
                f"lower it, or name a file of `labels`"
            )
        return answers


def official_annotation(question: Mapping[str, Any]) -> dict[str, Any]:
    """A row of an official annotations file, as far as the evaluator reads it; answers from elsewhere in its spelling."""
    spell = normalize_answer if question.get("free_spelling") else str
    return {
        "question_id": question["id"],
        "question_type": question["question_type"],
        "answer_type": question["answer_type"],
        "answers": [{"answer": spell(said), "answer_id": i} for i, said in enumerate(question["answers"], start=1)],
    }
