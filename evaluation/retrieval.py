"""How well images find their texts, and texts their images, by a matrix of similarities."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.errors import DataError, ModelError
from .scores import Score, resampled_sums, score_of

CUTOFFS = (1, 5, 10)


@dataclass(frozen=True)
class Retrieval:
    """What comes before the right one, in a pool of all images and all texts.

    Attributes:
        image_ranks: For each image, how many texts come before the best of its own, `[I]`.
        text_ranks: For each text, how many images come before its own, `[T]`.
        owner: The image of each text, `[T]`.
    """

    image_ranks: np.ndarray
    text_ranks: np.ndarray
    owner: np.ndarray

    @property
    def images(self) -> int:
        """In the pool."""
        return len(self.image_ranks)

    @property
    def texts(self) -> int:
        """In the pool."""
        return len(self.text_ranks)

    def scores(self, *, resamples: int = 1000, seed: int = 0) -> dict[str, Score]:
        """The shares of images and of texts that find their own, with 95 % intervals.

        Images are resampled together with their texts; ranks stay those in the whole pool.

        Returns:
            `image_to_text_recall@K` and `text_to_image_recall@K` for K of 1, 5 and 10 (1 in a pool
            of K and fewer), the contrastive accuracies `image_to_text_accuracy` and
            `text_to_image_accuracy`, which are the recalls at 1, and their mean,
            `contrastive_accuracy`, which is of no single sample.
        """
        ways = {
            "image_to_text": (self.image_ranks, np.arange(self.images)),
            "text_to_image": (self.text_ranks, self.owner),
        }
        scores, resampled = {}, {}
        for way, (ranks, owner) in ways.items():
            for cutoff in CUTOFFS:
                hits = (ranks < cutoff).astype(float)
                found = np.bincount(owner, hits, minlength=self.images)
                columns = np.stack([found, np.bincount(owner, minlength=self.images)], axis=1)
                sums = resampled_sums(columns, resamples, seed)
                name = f"{way}_recall@{cutoff}"
                resampled[name] = sums[:, 0] / sums[:, 1]
                scores[name] = score_of(hits.mean(), resampled[name], hits.tolist())
        accuracies = {f"{way}_accuracy": scores[f"{way}_recall@1"] for way in ways}
        both = score_of(
            np.mean([score.value for score in accuracies.values()]),
            np.mean([resampled[f"{way}_recall@1"] for way in ways], axis=0),
        )
        return {**accuracies, "contrastive_accuracy": both, **scores}


def retrieval(similarity: Any, owner: Sequence[int]) -> Retrieval:
    """Rank the texts for each image and the images for each text.

    Equal similarities rank by index, the lowest first, so that vectors that are all the same
    give an accuracy of 1 / n.

    Args:
        similarity: `[I, T]`, an array or a tensor on the CPU.
        owner: The row of each text's own image, `[T]`; every image has a text.

    Raises:
        DataError: a text without an image, an image without a text, or none at all.
        ModelError: a similarity is no finite number.
    """
    matrix, owners = np.asarray(similarity), np.asarray(owner)
    images, texts = matrix.shape
    _check(matrix, owners)
    own = matrix[owners, np.arange(texts)]
    image_ranks, text_ranks = np.zeros(images, int), np.zeros(texts, int)
    for image, row in enumerate(matrix):
        text_ranks += (row > own) | ((row == own) & (image < owners))
        mine = np.flatnonzero(owners == image)
        best = mine[row[mine].argmax()]
        image_ranks[image] = (row > row[best]).sum() + (row[:best] == row[best]).sum()
    return Retrieval(image_ranks, text_ranks, owners)


def _check(matrix: np.ndarray, owners: np.ndarray) -> None:
    images, texts = matrix.shape
    where, fix = "image and text pairs", "give every image a text, and every text its image"
    if not texts or len(owners) != texts:
        raise DataError(where, f"{texts:,} texts, {len(owners):,} images named for them", fix)
    if wrong := [i for i in owners.tolist() if not 0 <= i < images]:
        raise DataError(where, f"a text is of image {wrong[0]}, of {images:,} (from 0)", fix)
    if missing := sorted(set(range(images)) - set(owners.tolist())):
        raise DataError(where, f"image {missing[0]} has no text", fix)
    if not np.isfinite(matrix).all():
        image, text = (int(i) for i in np.argwhere(~np.isfinite(matrix))[0])
        raise ModelError(
            f"similarity of image {image} and text {text}",
            f"is {matrix[image, text]}",
            "look for NaN or infinity in the weights",
        )
