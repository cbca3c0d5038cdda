"""Chunked recall against sorting the whole matrix."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmoe.errors import UserError
from vlmoe.metrics import recall_at_k, recall_at_k_of_embeddings

KS = (1, 2, 5)


def oracle(similarity: np.ndarray, image_of_text: np.ndarray) -> dict:
    to_text = np.argsort(-similarity, axis=1, kind="stable")
    to_image = np.argsort(-similarity.T, axis=1, kind="stable")
    image_to_text = {
        f"recall@{k}": 100 * np.mean([i in image_of_text[row[:k]] for i, row in enumerate(to_text)]) for k in KS
    }
    text_to_image = {
        f"recall@{k}": 100 * np.mean([image_of_text[j] in row[:k] for j, row in enumerate(to_image)]) for k in KS
    }
    mean = np.mean([*image_to_text.values(), *text_to_image.values()])
    return {"image_to_text": image_to_text, "text_to_image": text_to_image, "mean": mean}


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Small whole numbers, so that scores tie often and dot products are exact; 1 to 3 texts an image, in any order."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    image_of_text = rng.permutation(np.repeat(np.arange(n := draw(st.integers(1, 9))), rng.integers(1, 4, n)))
    dim = draw(st.integers(1, 4))
    shape = (len(image_of_text), dim)
    return (
        rng.integers(-2, 3, (n, dim)).astype(np.float32),
        rng.integers(-2, 3, shape).astype(np.float32),
        image_of_text,
    )


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key] == pytest.approx(theirs[key])


@given(problems(), st.integers(1, 12))
def test_equals_a_full_sort(problem: tuple, chunk: int) -> None:
    images, texts, image_of_text = problem
    expected = oracle(images @ texts.T, image_of_text)
    assert_same(recall_at_k(images @ texts.T, image_of_text, KS, chunk=chunk), expected)
    assert_same(recall_at_k_of_embeddings(images, texts, image_of_text, KS, chunk=chunk), expected)


@given(problems(), st.randoms())
def test_invariances(problem: tuple, random) -> None:
    """Order does not matter where nothing ties, nor does a rising function of the score."""
    images, texts, image_of_text = problem
    similarity = (
        images @ texts.T
        + np.random.default_rng(0).permutation(len(images) * len(texts)).reshape(len(images), len(texts)) / 1e4
    )
    expected = recall_at_k(similarity, image_of_text, KS)
    assert_same(recall_at_k(np.exp(similarity / 4), image_of_text, KS), expected)
    rows, columns = random.sample(range(len(images)), len(images)), random.sample(range(len(texts)), len(texts))
    moved = np.argsort(rows)[image_of_text[columns]]
    assert_same(recall_at_k(similarity[np.ix_(rows, columns)], moved, KS), expected)


def test_the_best_of_several_captions_counts_and_earlier_wins_ties() -> None:
    similarity = np.array([[1.0, 3.0, 3.0], [3.0, 2.0, 2.0]])
    scores = recall_at_k(similarity, [0, 0, 1], ks=(1,))
    assert scores["image_to_text"] == {"recall@1": 50.0}
    assert scores["text_to_image"] == pytest.approx({"recall@1": 100 / 3})
    constant = recall_at_k(np.zeros((4, 4)), [0, 1, 2, 3], ks=(1,))
    assert constant["image_to_text"] == {"recall@1": 25.0}  # a collapsed model scores chance, not 100


def test_takes_tensors() -> None:
    torch = pytest.importorskip("torch")
    scores = recall_at_k(torch.eye(3), torch.arange(3), ks=(1,))
    assert scores == {"image_to_text": {"recall@1": 100.0}, "text_to_image": {"recall@1": 100.0}, "mean": 100.0}


def test_clear_errors() -> None:
    for similarity, positives, message in [
        (np.zeros((2, 2)), [0], "1 positives for 2 texts"),
        (np.zeros((2, 2)), [0, 2], "there are 2 images"),
        (np.zeros((2, 2)), [0, 0], "1 of 2 images have no text"),
        (np.zeros((2, 2)), [0.0, 1.0], "of type float64"),
        (np.zeros(2), [0, 1], "shape"),
        (np.full((1, 1), np.nan), [0], "not a number"),
    ]:
        with pytest.raises(UserError, match=message):
            recall_at_k(similarity, positives)
    with pytest.raises(UserError, match="do not go together"):
        recall_at_k_of_embeddings(np.zeros((2, 3)), np.zeros((2, 4)), [0, 1])
