"""Benchmark figures as the official evaluators compute them; pure functions, and no torch."""

from vlmoe.metrics.caption import caption_scores, caption_scores_per_image, java_caption_scores
from vlmoe.metrics.nlvr2 import nlvr2_scores, read_nlvr2_predictions
from vlmoe.metrics.ptb_tokenizer import ptb_tokenize
from vlmoe.metrics.recall import recall_at_k, recall_at_k_of_embeddings
from vlmoe.metrics.vqa import build_answer_vocabulary, normalize_answer, soft_targets, vqa_accuracy

__all__ = [
    "build_answer_vocabulary",
    "caption_scores",
    "caption_scores_per_image",
    "java_caption_scores",
    "nlvr2_scores",
    "normalize_answer",
    "ptb_tokenize",
    "read_nlvr2_predictions",
    "recall_at_k",
    "recall_at_k_of_embeddings",
    "soft_targets",
    "vqa_accuracy",
]
