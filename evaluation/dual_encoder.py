"""Models that make a vector of an image and one of a text, and how well these find each other."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor

from ..core.errors import ModelError
from ..data.images import decode, open_image

T = TypeVar("T")


def is_dual_encoder(config: Any) -> bool:
    """Whether transformers makes a model of this config that has vectors for images and texts."""
    kind: Any = AutoModel._model_mapping.get(type(config), None)
    return all(hasattr(kind, name) for name in ("get_image_features", "get_text_features"))


@dataclass(frozen=True)
class DualEncoder:
    """CLIP, SigLIP and what else has `get_image_features` and `get_text_features`.

    Attributes:
        model: In evaluation mode.
        processor: Its processor, of images and of texts.
    """

    model: Any
    processor: Any

    @classmethod
    def load(cls, path: str, dtype: str = "auto", device: str | None = None) -> "DualEncoder":
        """Load a folder or Hub name; the defaults are those of `inference.loading.load`.

        Raises:
            ModelError: transformers cannot read the model or its processor.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if dtype == "auto" and device == "cpu":
            dtype = "float32"
        try:
            model = AutoModel.from_pretrained(path, dtype=dtype)
            processor = AutoProcessor.from_pretrained(path)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            fix = "give a folder with config.json, weights, tokenizer and image processor"
            raise ModelError(f"model {path}", f"cannot be loaded: {reason}", fix) from error
        return cls(model.to(device).eval(), processor)

    @torch.no_grad()
    def of_images(self, images: Iterable[Image.Image], batch_size: int = 32) -> Tensor:
        """Vectors of length 1, float32 `[N, D]`, on the CPU."""
        return torch.cat([self._image_vectors(batch) for batch in _batches(images, batch_size)])

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str], batch_size: int = 32) -> Tensor:
        """Vectors of length 1, float32 `[N, D]`, on the CPU; a text that is too long is cut."""
        return torch.cat([self._text_vectors(batch) for batch in _batches(texts, batch_size)])

    @property
    def longest_text(self) -> int:
        """In tokens."""
        positions = self.model.config.get_text_config().max_position_embeddings
        return min(positions, self.processor.tokenizer.model_max_length)

    def too_long(self, texts: Sequence[str]) -> int:
        """How many texts are cut."""
        ids = self.processor.tokenizer(list(texts), verbose=False)["input_ids"]
        return sum(len(text) > self.longest_text for text in ids)

    def _image_vectors(self, images: Sequence[Image.Image]) -> Tensor:
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return _vectors(self.model.get_image_features(**inputs))

    def _text_vectors(self, texts: Sequence[str]) -> Tensor:
        inputs = self.processor(
            text=list(texts),
            # SigLIP is trained on padded texts without a mask; to the others padding is nothing.
            padding="max_length",
            truncation=True,
            max_length=self.longest_text,
            return_tensors="pt",
        )
        return _vectors(self.model.get_text_features(**inputs.to(self.model.device)))


def similarity(
    encoder: DualEncoder, images: Sequence[str], texts: Sequence[str], batch_size: int = 32
) -> Tensor:
    """Cosines, float32 `[images, texts]`.

    Args:
        images: Files, or references to images in a table.

    Raises:
        DataError: an image cannot be read.
    """
    read = (decode(open_image(path, path), path, path).convert("RGB") for path in images)
    shown = tqdm(read, "images", len(images), unit="image", disable=None)
    of_images = encoder.of_images(shown, batch_size)
    return of_images @ encoder.of_texts(texts, batch_size).T


def _vectors(output: Any) -> Tensor:
    features = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(features.float(), dim=-1).cpu()


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
