"""Answers against references: each metric's value and its bootstrap interval."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ..configs.schema import ANSWER_METRICS
from ..core.errors import ConfigError, DataError
from .answer_metrics import anls, exact_match, relaxed_accuracy, vqa_accuracy
from .caption_metrics import bleu, bleu_statistics, cider_d, rouge_l
from .tokenizer import tokenize

_OF_TEXTS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "vqa_accuracy": vqa_accuracy,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
}
_CAPTIONS = {"bleu", "cider", "rouge_l"}


@dataclass(frozen=True)
class Score:
    """A metric over a set of samples.

    Attributes:
        value: In [0, 1]; CIDEr-D in [0, 10]; a loss in nats.
        low: Lower end of its 95 % interval.
        high: Upper end of its 95 % interval.
        per_sample: The metric of each sample, in the order given; the value is their mean, but
            BLEU's is that of all samples as one text. `None` for what no single sample has.
        tokenizer: What split captions into tokens; `None` where nothing did.
    """

    value: float
    low: float
    high: float
    per_sample: list[float] | None = None
    tokenizer: str | None = None


def score(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    names: Sequence[str],
    *,
    tokenizer: str = "ptb_python",
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Score]:
    """Score predictions against their references.

    The intervals are percentiles of a bootstrap over samples, the same resamples for all metrics:
    of the mean of per-sample values, and of BLEU's counts summed anew. CIDEr-D's resamples keep
    the rarity of n-grams in the whole set.

    Args:
        predictions: One answer per sample, thoughts stripped.
        references: Of each sample, at least one.
        names: Of `configs.schema.ANSWER_METRICS`.
        tokenizer: Of captions, one of `tokenizer.TOKENIZERS`.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        By name, in the order asked for; "bleu" gives bleu_1, bleu_2, bleu_3 and bleu_4.

    Raises:
        ConfigError: an unknown metric or tokenizer, or "ptb_java" without what it needs.
        DataError: nothing to score, or a sample without references, by its index from 0.
    """
    _check(predictions, references, names)
    scores: dict[str, Score] = {}
    pairs = list(zip(predictions, references, strict=True))
    split = _split(predictions, references, tokenizer) if _CAPTIONS & set(names) else ([], [])
    for name in names:
        if name == "bleu":
            scores |= _bleu(bleu_statistics(*split), tokenizer, resamples, seed)
            continue
        by = tokenizer if name in _CAPTIONS else None
        if name == "cider":
            values = cider_d(*split)
        elif name == "rouge_l":
            values = [rouge_l(*sample) for sample in zip(*split, strict=True)]
        else:
            values = [_OF_TEXTS[name](prediction, wanted) for prediction, wanted in pairs]
        resampled = resampled_sums(np.array(values)[:, None], resamples, seed)[:, 0] / len(values)
        scores[name] = score_of(sum(values) / len(values), resampled, values, by)
    return scores


def resampled_sums(columns: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sums over as many samples drawn with replacement, `[resamples, K]` of `[N, K]`.

    The draws depend on N and the seed alone.
    """
    draws = np.random.default_rng(seed)
    n = len(columns)
    counts = (np.bincount(draws.integers(n, size=n), minlength=n) for _ in range(resamples))
    return np.stack([count @ columns for count in counts])


def score_of(
    value: float | np.floating,
    resampled: np.ndarray,
    per_sample: list[float] | None = None,
    tokenizer: str | None = None,
) -> Score:
    """A value with the 95 % interval that its resampled values have."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Score(float(value), float(low), float(high), per_sample, tokenizer)


def _check(
    predictions: Sequence[str], references: Sequence[Sequence[str]], names: Sequence[str]
) -> None:
    if unknown := [name for name in names if name not in ANSWER_METRICS]:
        listed = ", ".join(ANSWER_METRICS)
        raise ConfigError("metrics", f'there is no metric "{unknown[0]}"', f"give of {listed}")
    if not predictions or len(predictions) != len(references):
        raise DataError(
            "predictions",
            f"{len(predictions):,} predictions, references of {len(references):,} samples",
            "give at least one prediction, and references of every one",
        )
    for i, wanted in enumerate(references):
        if isinstance(wanted, str) or not wanted:
            what = "is one text, not a list" if wanted else "has no references"
            raise DataError(f"sample {i}", what, "give a list with at least one reference answer")


def _split(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Tokens of the predictions, and of each sample's references."""
    texts = [*predictions, *(text for wanted in references for text in wanted)]
    tokens = iter(tokenize(texts, tokenizer))
    ours = list(islice(tokens, len(predictions)))
    return ours, [list(islice(tokens, len(wanted))) for wanted in references]


def _bleu(statistics: np.ndarray, tokenizer: str, resamples: int, seed: int) -> dict[str, Score]:
    whole = bleu(statistics.sum(0))
    resampled = np.array([bleu(row) for row in resampled_sums(statistics, resamples, seed)])
    of_samples = np.array([bleu(row) for row in statistics])
    return {
        f"bleu_{i + 1}": score_of(whole[i], resampled[:, i], of_samples[:, i].tolist(), tokenizer)
        for i in range(len(whole))
    }
