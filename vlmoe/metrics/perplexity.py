"""Perplexity, and the unigram baseline that gives it meaning. Plain numpy."""

import math

import numpy as np
from numpy.typing import ArrayLike


def perplexity(nll_sum: float, count: float) -> float:
    """exp of the mean negative log-likelihood (nats) of `count` predictions; inf where that overflows."""
    mean = nll_sum / count
    return math.exp(mean) if mean < 700 else math.inf


def unigram_perplexity(counts: ArrayLike) -> float:
    """Perplexity, on exactly these targets, of the best model that ignores all context: exp of the entropy of `counts`
    (occurrences of each symbol). No unigram model does better, so a figure below it needed context.
    """
    n = np.asarray(counts, dtype=np.float64)
    share = n[n > 0] / n.sum()
    return float(np.exp(-(share * np.log(share)).sum()))
