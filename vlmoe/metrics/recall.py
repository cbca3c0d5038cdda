"""Recall at k of image-text retrieval, in both directions, without ever sorting a whole row of scores.

A query's rank is the number of candidates that score strictly more than its best positive, plus those that score the
same and come earlier: what a stable sort by falling score gives. `recall@k` is the share of queries of rank < k.
Of an image's captions, the best one counts (BEiT-3, BLIP, CLIP_benchmark).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from vlmoe.errors import UserError

Recalls = dict[str, Any]


def recall_at_k(
    similarity: Float[ndarray, "images texts"] | Any,
    positives: Int[ndarray, " texts"] | Sequence[int],
    ks: Sequence[int] = (1, 5, 10),
    *,
    chunk: int = 512,
) -> Recalls:
    """Recalls in percent: {"image_to_text": {"recall@1": ...}, "text_to_image": {...}, "mean": over all of them}.

    `similarity` is an array or anything with `__array__` (a CPU tensor); text j belongs to image `positives[j]`, a row
    of `similarity`. `chunk` queries are ranked at a time. Raises UserError for positives that do not fit, an image
    without a text, or a similarity that is not a number.
    """
    scores = np.asarray(similarity)
    if scores.ndim != 2:
        raise UserError(
            f"the similarity has shape {scores.shape}: pass one score for each image and text, [images, texts]"
        )
    return _recalls(lambda rows: scores[rows], lambda columns: scores[:, columns].T, scores.shape, positives, ks, chunk)


def recall_at_k_of_embeddings(
    image_embedding: Float[ndarray, "images dim"] | Any,
    text_embedding: Float[ndarray, "texts dim"] | Any,
    positives: Int[ndarray, " texts"] | Sequence[int],
    ks: Sequence[int] = (1, 5, 10),
    *,
    chunk: int = 512,
) -> Recalls:
    """`recall_at_k` of the dot products of embeddings (normalise them for cosines), `chunk` rows of them at a time."""
    images, texts = np.asarray(image_embedding), np.asarray(text_embedding)
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        raise UserError(
            f"embeddings of shape {images.shape} and {texts.shape} do not go together: pass [n, dim] of one dim"
        )
    shape = (len(images), len(texts))
    return _recalls(
        lambda rows: images[rows] @ texts.T, lambda rows: texts[rows] @ images.T, shape, positives, ks, chunk
    )


def _recalls(
    scores_of_images: Callable[[slice], ndarray],
    scores_of_texts: Callable[[slice], ndarray],
    shape: tuple[int, ...],
    positives: ndarray | Sequence[int],
    ks: Sequence[int],
    chunk: int,
) -> Recalls:
    num_images, num_texts = shape
    image_of_text = np.asarray(positives)
    _check(image_of_text, num_images, num_texts)
    images = np.arange(num_images)
    ranks = {
        "image_to_text": [
            _ranks(scores_of_images(rows), image_of_text == images[rows, None]) for rows in _slices(num_images, chunk)
        ],
        "text_to_image": [
            _ranks(scores_of_texts(rows), images == image_of_text[rows, None]) for rows in _slices(num_texts, chunk)
        ],
    }
    recalls: Recalls = {
        direction: {f"recall@{k}": 100 * float((np.concatenate(parts) < k).mean()) for k in ks}
        for direction, parts in ranks.items()
    }
    return recalls | {"mean": float(np.mean([value for values in recalls.values() for value in values.values()]))}


def _ranks(
    scores: Float[ndarray, "queries candidates"], is_positive: Bool[ndarray, "queries candidates"]
) -> Int[ndarray, " queries"]:
    if np.isnan(scores).any():
        raise UserError("a similarity is not a number: look for NaN in the embeddings")
    best = np.where(is_positive, scores, -np.inf).max(axis=1, keepdims=True)
    ties = scores == best
    first = (ties & is_positive).argmax(axis=1)[:, None]
    earlier = ties & (np.arange(scores.shape[1]) < first)
    return (scores > best).sum(axis=1) + earlier.sum(axis=1)


def _check(image_of_text: ndarray, num_images: int, num_texts: int) -> None:
    if image_of_text.shape != (num_texts,):
        raise UserError(
            f"{image_of_text.size} positives for {num_texts} texts: give the row of its image for each text"
        )
    if not np.issubdtype(image_of_text.dtype, np.integer):
        raise UserError(f"positives are of type {image_of_text.dtype}: give the row of its image for each text")
    present = np.unique(image_of_text)
    if present.size and (present[0] < 0 or present[-1] >= num_images):
        raise UserError(
            f"positives go from {present[0]} to {present[-1]}, but there are {num_images} images (0-based rows)"
        )
    if len(present) < max(num_images, 1):
        missing = np.setdiff1d(np.arange(num_images), present)
        raise UserError(
            f"{len(missing)} of {num_images} images have no text (the first is {missing[:1]}): leave them out"
        )


def _slices(length: int, chunk: int) -> Iterable[slice]:
    return (slice(start, start + chunk) for start in range(0, length, chunk))
