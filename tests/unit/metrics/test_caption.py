import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmoe.errors import UserError
from vlmoe.metrics import caption_scores, caption_scores_per_image, java_caption_scores

words = st.lists(
    st.sampled_from(["a", "man", "dog", "red", "kite", "flies", "over", "the", "grass"]), min_size=1, max_size=8
).map(" ".join)
images = st.dictionaries(
    st.integers(0, 99), st.tuples(st.lists(words, min_size=1, max_size=3), words), min_size=2, max_size=5
)


def split(data: dict) -> tuple[dict, dict]:
    return {k: references for k, (references, _) in data.items()}, {k: candidate for k, (_, candidate) in data.items()}


@given(images, st.randoms())
def test_order_of_images_and_references_changes_nothing(data: dict, random) -> None:
    references, candidates = split(data)
    shuffled = random.sample(list(references), len(references))
    again = {image: random.sample(references[image], len(references[image])) for image in shuffled}
    assert caption_scores(again, candidates) == pytest.approx(caption_scores(references, candidates))


@given(images)
def test_repeating_every_reference_changes_nothing(data: dict) -> None:
    references, candidates = split(data)
    twice = {image: captions * 2 for image, captions in references.items()}
    assert caption_scores(twice, candidates) == pytest.approx(caption_scores(references, candidates))


def test_a_candidate_that_is_a_reference_is_perfect() -> None:
    captions = {0: "a man rides a red bike", 1: "two dogs sleep on the grass", 2: "an old bus in the rain"}
    scores = caption_scores({image: [caption, "a kite"] for image, caption in captions.items()}, captions)
    assert [scores[f"bleu{n}"] for n in (1, 2, 3, 4)] == pytest.approx([1] * 4)
    assert scores["rouge_l"] == pytest.approx(1)
    alone = caption_scores({image: [caption] for image, caption in captions.items()}, captions)
    assert alone["cider"] == pytest.approx(10)


def test_corpus_rouge_and_cider_are_means_over_images() -> None:
    references = {"a": ["a red bus"], "b": ["two dogs", "a dog and a cat"]}
    candidates = {"a": "a bus", "b": "a dog and cats"}
    per_image, corpus = caption_scores_per_image(references, candidates), caption_scores(references, candidates)
    for name in ("rouge_l", "cider"):
        assert corpus[name] == pytest.approx((per_image["a"][name] + per_image["b"][name]) / 2)


def test_clear_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="image 7 has references but no candidate"):
        caption_scores({7: ["a"]}, {})
    with pytest.raises(UserError, match="image 8 has a candidate but no reference"):
        caption_scores({7: ["a"]}, {7: "a", 8: "b"})
    with pytest.raises(UserError, match="image 7 has no reference"):
        caption_scores({7: []}, {7: "a"})
    with pytest.raises(UserError, match="no metric"):
        java_caption_scores({7: ["a"]}, {7: "a"}, metrics=["bleurt"])
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    monkeypatch.setitem(sys.modules, "pycocoevalcap.meteor.meteor", None)
    with pytest.raises(UserError, match="pip install"):
        java_caption_scores({7: ["a"]}, {7: "a"})
