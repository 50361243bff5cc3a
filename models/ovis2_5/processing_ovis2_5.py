"""Processor of Ovis2.5: how its conversations are written and its images become tokens."""

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.utils.hub import cached_file

from ...core.errors import ModelError
from .configuration_ovis2_5 import (
    IMAGE_BEGIN_ID,
    IMAGE_END_ID,
    VIDEO_BEGIN_ID,
    VIDEO_END_ID,
    VISUAL_ATOM_ID,
)
from .image_processing_ovis2_5 import Ovis2_5ImageProcessor

PREPROCESSOR_FILE = "preprocessor_config.json"
CONTENT_TAGS = frozenset(
    f"<{slash}{name}>" for name in ("think", "tool_call", "tool_response") for slash in ("", "/")
)
"""Added tokens that people and models write; every other one is control."""


class Ovis2_5Processor(ProcessorMixin):
    """Tokenizer and image processor of one checkpoint.

    A conversation is ChatML: `<|im_start|>role`, newline, text, `<|im_end|>`, newline. An answer
    given without thinking starts with the empty think block.

    The Jinja chat template renders prompts as the published one does, history without thoughts;
    training and vlmtune's own inference go through `vlmtune.collators.rendering` instead, whose
    prompts equal the training prefix (docs/decisions/0003).

    Source: AIDC-AI/Ovis 2.5.0, `Qwen3ConversationFormatter`; tokenizer_config.json of
    AIDC-AI/Ovis2.5-9B.
    """

    attributes = ("image_processor", "tokenizer")
    turn_start, turn_end = "<|im_start|>", "<|im_end|>"
    empty_think = "<think>\n\n</think>\n\n"

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        chat_template = chat_template or getattr(tokenizer, "chat_template", None)
        super().__init__(
            image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Reads tokenizer, preprocessor_config.json and, where there is one, config.json, whose
        `vit_config` rules over patch sizes. Remote code is never run."""
        kwargs = {k: v for k, v in kwargs.items() if not k.startswith("_")}
        kwargs.pop("trust_remote_code", None)
        source = pretrained_model_name_or_path
        settings, _ = Ovis2_5ImageProcessor.get_image_processor_dict(source, **kwargs)
        if cached_file(
            source, "config.json", _raise_exceptions_for_missing_entries=False, **kwargs
        ):
            vit = AutoConfig.from_pretrained(source, **kwargs).vit_config
            for key in ("patch_size", "hidden_stride", "temporal_patch_size"):
                settings[key] = getattr(vit, key)
        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
        return cls(Ovis2_5ImageProcessor(**settings), tokenizer)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Writes the published layout: preprocessor_config.json and the tokenizer's files."""
        folder = Path(save_directory)
        if push_to_hub:
            raise ModelError(
                str(folder), "push_to_hub is not done by the processor.", "upload the saved folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
        self.image_processor.to_json_file(folder / PREPROCESSOR_FILE)
        template, self.tokenizer.chat_template = self.tokenizer.chat_template, self.chat_template
        files = self.tokenizer.save_pretrained(save_directory)
        self.tokenizer.chat_template = template
        _name_tokens_as_published(folder / "tokenizer_config.json")
        return [*files, str(folder / PREPROCESSOR_FILE)]

    def control_id(self, token: str) -> int:
        """Id of a control token such as `<|im_end|>`.

        Raises:
            ModelError: the tokenizer has no such token.
        """
        index = self._added_ids.get(token)
        if index is None:
            raise ModelError(
                f"tokenizer of {self.tokenizer.name_or_path!r}",
                f"has no token {token}.",
                "use the tokenizer that came with the Ovis2.5 checkpoint.",
            )
        return index

    def text_ids(self, text: str) -> list[int]:
        """Ids of a user's text. A control token spelled out in it, such as "<|im_end|>", stays
        text: it is tokenized in two pieces, neither of which is the token."""
        pieces, start = [], 0
        for found in self._control_tokens.finditer(text):
            pieces.append(text[start : found.start() + 1])
            start = found.start() + 1
        pieces.append(text[start:])
        return [index for piece in pieces for index in self._ids(piece)]

    def _ids(self, text: str) -> list[int]:
        """Ids of text inside a chat. SentencePiece tokenizers put a space before what starts a
        text, so it is read behind a turn's first token, as a whole rendered chat would be."""
        ids = self._encode(self.turn_start + text)
        return ids[ids.index(self.control_id(self.turn_start)) + 1 :]

    def _encode(self, text: str) -> list[int]:
        """What `tokenizer(text, add_special_tokens=False)` gives, without the cost of that call,
        which for a short text is many times that of its tokens."""
        tokenizer: Any = self.tokenizer
        if not tokenizer.is_fast:
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        backend = tokenizer.backend_tokenizer
        # What other calls of the tokenizer have asked for stays set in it.
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        if backend.encode_special_tokens != tokenizer.split_special_tokens:
            backend.encode_special_tokens = tokenizer.split_special_tokens
        return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    @cached_property
    def _added_ids(self) -> dict[str, int]:
        return self.tokenizer.get_added_vocab()

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        # Some tokenizers add runs of spaces, which are text.
        tokens = {token for token in self._added_ids if token.strip()} - CONTENT_TAGS
        return re.compile("|".join(map(re.escape, sorted(tokens))) or r"(?!)")

    def visual_ids(self, tokens: int, *, video: bool = False) -> list[int]:
        """Ids an image or video of that many visual tokens is written with."""
        begin, end = (VIDEO_BEGIN_ID, VIDEO_END_ID) if video else (IMAGE_BEGIN_ID, IMAGE_END_ID)
        return [begin, *[VISUAL_ATOM_ID] * tokens, end]

    def __call__(
        self,
        images: Sequence[Image.Image] | Image.Image | None = None,
        text: str | Sequence[str] | None = None,
        videos: Sequence[Sequence[Image.Image]] | None = None,
        min_pixels: int = 448**2,
        max_pixels: int = 1792**2,
        padding_side: Literal["left", "right"] = "left",
        **kwargs: Any,
    ) -> BatchFeature:
        """Tokenize rendered text whose `<image>` and `<video>` marks stand for the given media.

        Returns:
            `input_ids` and `attention_mask` `[B, T]`, padded on `padding_side`, for generation the
            left; with media also `pixel_values` `[N, features]` and `grid_thws` `[media, 3]`, in
            the order in which images, then videos, are given. TRL's collators ask for both sides.

        Raises:
            ModelError: the marks do not match the media, or both kinds are given.
        """
        texts = [text] if isinstance(text, str) else list(text or ())
        stills = list(_flat(images))
        clips = [list(frames) for frames in videos or ()]
        for mark, given in (("<image>", stills), ("<video>", clips)):
            marks = sum(t.count(mark) for t in texts)
            if marks != len(given):
                raise ModelError(
                    "Ovis2_5Processor",
                    f"the text has {marks} {mark}, but {len(given)} were passed.",
                    f"write one {mark} for each, in order.",
                )
        if stills and clips:
            raise ModelError("Ovis2_5Processor", "got images and videos.", "pass one kind.")
        mark = "<video>" if clips else "<image>"
        media = clips or [[image] for image in stills]
        pieces = [self.image_processor.patches(frames, min_pixels, max_pixels) for frames in media]
        blocks = iter(
            self.visual_ids(self.image_processor.visual_tokens(grid), video=bool(clips))
            for _, grid in pieces
        )
        rows = []
        for one in texts:
            first, *rest = one.split(mark) if media else [one]
            ids = self._ids(first)
            for chunk in rest:
                ids += [*next(blocks), *self._ids(chunk)]
            rows.append(ids)
        longest = max(map(len, rows), default=0)
        pad = self.tokenizer.pad_token_id

        def padded(row: list[int], filler: int) -> list[int]:
            padding = [filler] * (longest - len(row))
            return row + padding if padding_side == "right" else padding + row

        data: dict[str, Any] = {
            "input_ids": torch.tensor([padded(row, pad) for row in rows]),
            "attention_mask": torch.tensor([padded([1] * len(row), 0) for row in rows]),
        }
        if pieces:
            data["pixel_values"] = torch.from_numpy(np.concatenate([p for p, _ in pieces]))
            data["grid_thws"] = torch.tensor([grid for _, grid in pieces])
        return BatchFeature(data)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "grid_thws"]


def _name_tokens_as_published(file: Path) -> None:
    """Under the key of transformers 4, which serving engines may run; 5 reads it as well."""
    settings = json.loads(file.read_text("utf-8"))
    if tokens := settings.pop("extra_special_tokens", None):
        settings["additional_special_tokens"] = tokens
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _flat(images: Any) -> Iterator[Image.Image]:
    """Images of one, a list, or the list per text that `apply_chat_template` passes."""
    if isinstance(images, Image.Image):
        yield images
    else:
        for image in images or ():
            yield from _flat(image)


CHAT_TEMPLATE = """\
{%- macro plain(text) -%}
{{- text | replace('<image>', '') | replace('<video>', '') -}}
{%- endmacro -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{%- set body = plain(message.content) -%}
{%- else -%}
{%- set parts = namespace(all=[]) -%}
{%- for item in message.content -%}
{%- if item.type in ['image', 'video'] -%}
{%- set parts.all = parts.all + ['<' + item.type + '>'] -%}
{%- elif item.type == 'text' -%}
{%- set parts.all = parts.all + [plain(item.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set body = parts.all | join('\\n') -%}
{%- endif -%}
{%- if message.role == 'assistant' and '</think>' in body -%}
{%- set body = body.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- body + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}
"""
