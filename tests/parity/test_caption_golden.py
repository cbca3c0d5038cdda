"""Caption tokens and scores against pycocoevalcap 1.2 and the Java tokenizer that it runs."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from vlmoe.metrics import caption_scores, caption_scores_per_image, java_caption_scores, ptb_tokenize

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
NAMES = {
    "Bleu_1": "bleu1",
    "Bleu_2": "bleu2",
    "Bleu_3": "bleu3",
    "Bleu_4": "bleu4",
    "ROUGE_L": "rouge_l",
    "CIDEr": "cider",
}


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads((GOLDEN / "caption_metrics.json").read_text(encoding="utf-8"))


def candidates_of(golden: dict) -> dict[str, str]:
    return {image: caption for image, [caption] in golden["candidates"].items()}


def test_tokens_of_captions(golden: dict) -> None:
    for kind in ("references", "candidates"):
        captions = [caption for captions in golden[kind].values() for caption in captions]
        tokens = [tokens for captions in golden[f"tokenized_{kind}"].values() for tokens in captions]
        assert ptb_tokenize(captions) == tokens


def test_tokens_of_odd_text() -> None:
    """Contractions, quotes, prices, abbreviations at a line's end, addresses, faces, other scripts, random marks."""
    odd = json.loads((GOLDEN / "ptb_tokens.json").read_text(encoding="utf-8"))
    differ = [
        (caption, ours, theirs)
        for caption, ours, theirs in zip(odd["captions"], ptb_tokenize(odd["captions"]), odd["tokens"], strict=True)
        if ours != theirs
    ]
    assert differ == []


def test_corpus_scores(golden: dict) -> None:
    scores = caption_scores(golden["references"], candidates_of(golden))
    assert scores == pytest.approx({ours: golden["scores"][theirs] for theirs, ours in NAMES.items()}, abs=1e-6)


def test_scores_per_image(golden: dict) -> None:
    scores = caption_scores_per_image(golden["references"], candidates_of(golden))
    for theirs, ours in NAMES.items():
        expected = golden["per_image"][theirs]
        assert {image: scores[image][ours] for image in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.skipif(
    find_spec("pycocoevalcap") is None or not shutil.which("java"), reason="needs pycocoevalcap and Java"
)
def test_meteor(golden: dict) -> None:
    scores = java_caption_scores(golden["references"], candidates_of(golden), metrics=["meteor"])
    assert scores == pytest.approx({"meteor": golden["scores"]["METEOR"]}, abs=1e-6)
