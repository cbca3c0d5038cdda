"""BLEU, ROUGE-L and CIDEr-D of captions, as pycocoevalcap 1.2 computes them but without Java; METEOR and SPICE with it.

Units are pycocoevalcap's: BLEU and ROUGE-L lie in 0..1 and CIDEr-D in 0..10. Papers print all of them times 100 (a
CIDEr of "143.2" is 1.432).
"""

import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from vlmoe.errors import UserError
from vlmoe.metrics.ptb_tokenizer import ptb_tokenize

_ORDERS = (1, 2, 3, 4)
_TINY, _SMALL = 1e-15, 1e-9  # what the reference adds to a BLEU precision's numerator and denominator
_ROUGE_BETA = 1.2
_CIDER_SIGMA = 6.0

_JAVA_METRICS = {
    "meteor": ("pycocoevalcap.meteor.meteor", "Meteor"),
    "spice": ("pycocoevalcap.spice.spice", "Spice"),
}

NGrams = Counter[tuple[str, ...]]


def caption_scores(references: Mapping[Any, Sequence[str]], candidates: Mapping[Any, str]) -> dict[str, float]:
    """Corpus scores {"bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider"} of one candidate caption an image.

    `references` are the raw captions of each image (tokens are made here), and both have the same ids. CIDEr-D weighs
    n-grams by how many of *these* images' references have them, so it depends on the set: score a whole split.
    Raises UserError for ids that differ or an image without a reference.
    """
    tokens = _tokenize(references, candidates)
    per_image = _score_images(tokens)
    return {
        **_corpus_bleu(tokens),
        "rouge_l": _mean([scores["rouge_l"] for scores in per_image]),
        "cider": _mean([scores["cider"] for scores in per_image]),
    }


def caption_scores_per_image(
    references: Mapping[Any, Sequence[str]], candidates: Mapping[Any, str]
) -> dict[Any, dict[str, float]]:
    """The same scores of every image. Corpus ROUGE-L and CIDEr-D are their means; corpus BLEU is not."""
    return dict(zip(references, _score_images(_tokenize(references, candidates)), strict=True))


def java_caption_scores(
    references: Mapping[Any, Sequence[str]], candidates: Mapping[Any, str], *, metrics: Sequence[str] = ("meteor",)
) -> dict[str, float]:
    """Corpus METEOR 1.5 and / or SPICE 1.0 (0..1), by pycocoevalcap's Java programs on our tokens.

    `metrics` is any of "meteor" and "spice". SPICE downloads its parsing models when it is first used.
    Raises UserError if pycocoevalcap or Java is missing.
    """
    if unknown := set(metrics) - set(_JAVA_METRICS):
        raise UserError(f"{min(unknown)!r} is no metric of pycocoevalcap's Java programs: ask for 'meteor' or 'spice'")
    try:
        programs = {name: getattr(import_module(module), scorer) for name, (module, scorer) in _JAVA_METRICS.items()}
    except ImportError as error:
        raise UserError("METEOR and SPICE need pycocoevalcap: pip install 'vlmoe[caption]'") from error
    if shutil.which("java") is None:
        raise UserError("METEOR and SPICE need Java: install a Java runtime and put `java` on the PATH")
    tokens = _tokenize(references, candidates)
    ground_truth = {index: image_references for index, (image_references, _) in enumerate(tokens)}
    results = {index: [candidate] for index, (_, candidate) in enumerate(tokens)}
    return {name: float(programs[name]().compute_score(ground_truth, results)[0]) for name in metrics}


def _tokenize(references: Mapping[Any, Sequence[str]], candidates: Mapping[Any, str]) -> list[tuple[list[str], str]]:
    """(tokenised references, tokenised candidate) of each image, in the order of `references`."""
    if not references:
        raise UserError("there is no image to score: pass references and candidates")
    for image in references:
        if image not in candidates:
            raise UserError(f"image {image} has references but no candidate: predict a caption for every image")
        if not references[image]:
            raise UserError(f"image {image} has no reference caption: leave it out or add one")
    for image in candidates:
        if image not in references:
            raise UserError(f"image {image} has a candidate but no reference: are these the captions of this split?")
    flat = iter(ptb_tokenize([caption for captions in references.values() for caption in captions]))
    image_references = [[next(flat) for _ in captions] for captions in references.values()]
    return list(zip(image_references, ptb_tokenize([candidates[image] for image in references]), strict=True))


def _score_images(tokens: Sequence[tuple[list[str], str]]) -> list[dict[str, float]]:
    cider = _cider(tokens)
    return [
        {
            **_bleu(*_bleu_counts(references, candidate)),
            "rouge_l": _rouge_l(references, candidate),
            "cider": image_cider,
        }
        for (references, candidate), image_cider in zip(tokens, cider, strict=True)
    ]


def _ngrams(caption: str, order: int) -> NGrams:
    words = caption.split()
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _corpus_bleu(tokens: Sequence[tuple[list[str], str]]) -> dict[str, float]:
    correct, guessed, length, reference_length = [0] * 4, [0] * 4, 0, 0
    for references, candidate in tokens:
        image_correct, image_guessed, image_length, image_reference_length = _bleu_counts(references, candidate)
        correct = [a + b for a, b in zip(correct, image_correct, strict=True)]
        guessed = [a + b for a, b in zip(guessed, image_guessed, strict=True)]
        length += image_length
        reference_length += image_reference_length
    return _bleu(correct, guessed, length, reference_length)


def _bleu_counts(references: Sequence[str], candidate: str) -> tuple[list[int], list[int], int, int]:
    """n-grams that are right (clipped) and that are there, per order; candidate length; closest reference length."""
    length = len(candidate.split())
    reference_lengths = [len(reference.split()) for reference in references]
    closest = min(reference_lengths, key=lambda reference: (abs(reference - length), reference))
    correct = []
    for order in _ORDERS:
        most: NGrams = Counter()
        for reference in references:
            most |= _ngrams(reference, order)
        correct.append((_ngrams(candidate, order) & most).total())
    return correct, [max(0, length - order + 1) for order in _ORDERS], length, closest


def _bleu(correct: Sequence[int], guessed: Sequence[int], length: int, reference_length: int) -> dict[str, float]:
    """Geometric mean of the precisions up to each order, times the brevity penalty (Papineni et al. 2002)."""
    ratio = (length + _TINY) / (reference_length + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = {}, 1.0
    for order, right, there in zip(_ORDERS, correct, guessed, strict=True):
        product *= (right + _TINY) / (there + _SMALL)
        scores[f"bleu{order}"] = product ** (1 / order) * brevity
    return scores


def _rouge_l(references: Sequence[str], candidate: str) -> float:
    """F-score, beta 1.2, of the best precision and the best recall over the references; they may be two captions'."""
    words = candidate.split(" ")  # of an empty caption: one empty word
    common = [_longest_common_subsequence(words, reference.split(" ")) for reference in references]
    precision = max(common) / len(words)
    recall = max(length / len(reference.split(" ")) for length, reference in zip(common, references, strict=True))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + _ROUGE_BETA**2) * precision * recall / (recall + _ROUGE_BETA**2 * precision)


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    previous = [0] * (len(b) + 1)
    for word in a:
        row = [0]
        for j, other in enumerate(b):
            row.append(previous[j] + 1 if word == other else max(previous[j + 1], row[j]))
        previous = row
    return previous[-1]


def _cider(tokens: Sequence[tuple[list[str], str]]) -> list[float]:
    """CIDEr-D (Vedantam et al. 2015) of each image: TF-IDF cosines, clipped, with a penalty on length, mean over n."""
    images = len(tokens)
    scores = [0.0] * images
    for order in _ORDERS:
        reference_counts = [[_ngrams(reference, order) for reference in references] for references, _ in tokens]
        document_frequency = Counter(ngram for counts in reference_counts for ngram in set().union(*counts))

        def weigh(counts: NGrams, frequency: NGrams = document_frequency) -> dict[tuple[str, ...], float]:
            return {ngram: n * (math.log(images) - math.log(max(1, frequency[ngram]))) for ngram, n in counts.items()}

        for image, (references, candidate) in enumerate(tokens):
            vector = weigh(_ngrams(candidate, order))
            for reference, counts in zip(references, reference_counts[image], strict=True):
                # The reference implementation takes the number of bigrams for a caption's length.
                gap = max(0, len(candidate.split()) - 1) - max(0, len(reference.split()) - 1)
                penalty = math.exp(-(gap**2) / (2 * _CIDER_SIGMA**2))
                scores[image] += 10 / 4 * penalty * _clipped_cosine(vector, weigh(counts)) / len(references)
    return scores


def _clipped_cosine(candidate: Mapping[tuple[str, ...], float], reference: Mapping[tuple[str, ...], float]) -> float:
    product = sum(
        min(weight, reference[ngram]) * reference[ngram] for ngram, weight in candidate.items() if ngram in reference
    )
    norms = math.sqrt(sum(w * w for w in candidate.values())) * math.sqrt(sum(w * w for w in reference.values()))
    return product / norms if norms else 0.0
