"""CIDEr-D, BLEU and ROUGE-L of captions, as the COCO caption scores define them.

Captions come as tokens (`evaluation.tokenizer`); a caption may have none, a sample needs at least
one reference.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics.bleu import BLEU

Tokens = Sequence[str]
Ngrams = list[Counter[tuple[str, ...]]]

ORDERS = 4
SIGMA = 6.0
"""How soon CIDEr-D takes a caption of another length for another caption."""
BETA = 1.2
"""How much more recall counts than precision in ROUGE-L."""


def cider_d(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """CIDEr-D of each sample, in [0, 10]; that of the set is their mean.

    How rare an n-gram is, is told by the references of the samples given: a sample's value depends
    on its set, and is 0 in a set of one.

    Source: CIDEr-D of arXiv:1411.5726, with pycocoevalcap 1.2's reading of it: the length of a
    caption is its number of bigrams.
    """
    candidates = [_ngrams(tokens) for tokens in predictions]
    wanted = [[_ngrams(tokens) for tokens in of_sample] for of_sample in references]
    seen = Counter(
        ngram
        for of_sample in wanted
        for ngram in {ngram for counts in of_sample for order in counts for ngram in order}
    )
    samples = math.log(len(wanted)) if wanted else 0.0
    rarity = {ngram: samples - math.log(count) for ngram, count in seen.items()}

    def weighed(counts: Ngrams) -> list[dict[tuple[str, ...], float]]:
        return [{g: n * rarity.get(g, samples) for g, n in order.items()} for order in counts]

    values = []
    for candidate, of_sample in zip(candidates, wanted, strict=True):
        vectors = weighed(candidate)
        likeness = [
            _likeness(vectors, weighed(reference))
            * math.exp(-((candidate[1].total() - reference[1].total()) ** 2) / (2 * SIGMA**2))
            for reference in of_sample
        ]
        values.append(10 * sum(likeness) / len(likeness))
    return values


def _ngrams(tokens: Tokens) -> Ngrams:
    """How often each n-gram is there, for n from 1 to `ORDERS`."""
    orders = range(1, ORDERS + 1)
    return [Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for n in orders]


def _likeness(candidate: list[dict], reference: list[dict]) -> float:
    """The mean cosine over the orders, what the candidate has too often of an n-gram cut off."""
    cosines = []
    for ours, theirs in zip(candidate, reference, strict=True):
        common = sum(min(ours[g], theirs[g]) * theirs[g] for g in ours if g in theirs)
        norms = math.sqrt(sum(w * w for w in ours.values()) * sum(w * w for w in theirs.values()))
        cosines.append(common / norms if norms else 0.0)
    return sum(cosines) / len(cosines)


def bleu_statistics(
    predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> np.ndarray:
    """What BLEU needs of each sample, int64 `[N, 10]`, counted by sacrebleu.

    The length of the prediction, that of its closest reference (the shorter of two), its n-grams
    for n from 1 to 4 that a reference has, and all its n-grams. A set's are their sum.
    """
    # Effective order changes no count; without it sacrebleu warns of every sentence.
    bleu = BLEU(tokenize="none", smooth_method="none", effective_order=True)
    rows = []
    for tokens, of_sample in zip(predictions, references, strict=True):
        counted = bleu.sentence_score(" ".join(tokens), [" ".join(other) for other in of_sample])
        rows.append([counted.sys_len, counted.ref_len, *counted.counts, *counted.totals])
    return np.array(rows, np.int64).reshape(-1, 2 + 2 * ORDERS)


def bleu(statistics: np.ndarray) -> list[float]:
    """BLEU-1 to BLEU-4, in [0, 1] and unsmoothed, of one row of statistics.

    pycocoevalcap adds small constants to its counts: its perfect score is 1 - 4e-12, and where a
    caption lacks a matching n-gram of some order it gives not 0 but a small number.
    """
    sys_len, ref_len, *counts = (int(count) for count in statistics)
    counted = counts[:ORDERS], counts[ORDERS:], sys_len, ref_len
    return [
        # Its logarithms give a perfect match 1 + 4e-16.
        min(BLEU.compute_bleu(*counted, max_ngram_order=order).score / 100, 1.0)
        for order in range(1, ORDERS + 1)
    ]


def rouge_l(prediction: Tokens, references: Sequence[Tokens]) -> float:
    """ROUGE-L of one sample, in [0, 1]: best precision and best recall over the references.

    Source: pycocoevalcap 1.2, which takes the two from different references and weighs recall by
    beta 1.2. Two captions without tokens have nothing in common here.
    """
    common = [_common_subsequence(prediction, reference) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(prediction)
    recall = max(n / max(len(r), 1) for n, r in zip(common, references, strict=True))
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common_subsequence(one: Tokens, other: Tokens) -> int:
    """The length of the longest one."""
    longest = [0] * (len(other) + 1)
    for token in one:
        before = 0
        for j, wanted in enumerate(other, 1):
            before, longest[j] = (
                longest[j],
                before + 1 if token == wanted else max(longest[j], longest[j - 1]),
            )
    return longest[-1]
