"""What can be configured: our own keys as dataclasses, the host's keys as a plain dict."""

from __future__ import annotations  # keeps annotations as text, the form the host's fields have

from dataclasses import asdict, dataclass, field, fields
from os.path import expanduser
from typing import Any

from ..core.errors import ConfigError

_PIXELS_448 = 448 * 448


@dataclass
class ModelConfig:
    """Which model is trained, which parts of it stay frozen, by which trainer, and whether the
    result may replace another."""

    model_path: str = field(metadata={"help": "Local folder or Hub name of the model to train."})
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention kernel by its transformers name; null lets transformers pick."
        },
    )
    torch_dtype: str = field(
        default="float32",
        metadata={
            "help": "bfloat16 and float16 switch on bf16 and fp16, in which the model computes; "
            "the weights themselves are kept in float32, where small updates are not lost.",
            "choices": ("auto", "float32", "bfloat16", "float16"),
        },
    )
    freeze_llm: bool = field(
        default=False, metadata={"help": "Leave the language model as it is in the checkpoint."}
    )
    freeze_vision_tower: bool = field(
        default=False, metadata={"help": "Leave the vision encoder as it is in the checkpoint."}
    )
    trainer: str = field(
        default="trl",
        metadata={
            "help": "Base trainer: trl is TRL's SFTTrainer, standard is transformers' Trainer.",
            "choices": ("trl", "standard"),
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace a finished model that output_dir holds."}
    )

    def __post_init__(self) -> None:
        self.model_path = expanduser(self.model_path)
        self.torch_dtype = self.torch_dtype.removeprefix("torch.")
        _check_choices(self)


@dataclass
class DataConfig:
    """Where samples come from and how they become tokens and pixels.

    Pixel limits count the pixels of one resized image or frame. A negative limit of several images
    or of a video means "derive": a minimum becomes the single-image minimum, a maximum becomes the
    single-image maximum divided by the number of images or frames, at least the minimum.
    """

    data_path: list[str] = field(
        metadata={"help": 'Training files: one path, a list, or several joined by "|".'}
    )
    eval_data_path: list[str] = field(
        default_factory=list,
        metadata={"help": "Evaluation files, written as data_path is; empty means no evaluation."},
    )
    image_folder: str | None = field(
        default=None, metadata={"help": "Folder that relative image paths in the data start from."}
    )
    multimodal_max_length: int = field(
        default=4096, metadata={"help": "Longest sample with images or video, in tokens."}
    )
    text_max_length: int = field(
        default=4096, metadata={"help": "Longest sample of text alone, in tokens."}
    )
    single_image_min_pixels: int = field(
        default=_PIXELS_448, metadata={"help": "A sample's only image is enlarged to this size."}
    )
    single_image_max_pixels: int = field(
        default=1792 * 1344, metadata={"help": "A sample's only image is reduced to this size."}
    )
    multiple_image_min_pixels: int = field(
        default=_PIXELS_448,
        metadata={"help": "Each of several images is enlarged to this size; negative derives it."},
    )
    multiple_image_max_pixels: int = field(
        default=_PIXELS_448,
        metadata={"help": "Each of several images is reduced to this size; negative derives it."},
    )
    video_min_pixels: int = field(
        default=_PIXELS_448,
        metadata={"help": "Each video frame is enlarged to this size; negative derives it."},
    )
    video_max_pixels: int = field(
        default=_PIXELS_448,
        metadata={"help": "Each video frame is reduced to this size; negative derives it."},
    )
    min_frames: int = field(
        default=8, metadata={"help": "A shorter video is sampled up to this many frames."}
    )
    max_frames: int = field(
        default=8, metadata={"help": "A longer video is sampled down to this many frames."}
    )
    thinking: str = field(
        default="every_turn",
        metadata={
            "help": "What answers without thoughts look like: every_turn gives each of them an "
            "untrained empty think block, in the history too (the reference's training form); "
            "last_turn trains the last answer only and writes the history without thoughts and "
            "without empty blocks, as the published chat template does at inference; as_is never "
            "inserts a block.",
            "choices": ("every_turn", "last_turn", "as_is"),
        },
    )
    on_bad_sample: str = field(
        default="error",
        metadata={
            "help": "A bad sample ends the run before training (error) or is left out and "
            "listed with its reason (skip).",
            "choices": ("error", "skip"),
        },
    )

    def __post_init__(self) -> None:
        self.data_path = [expanduser(path) for path in self.data_path]
        self.eval_data_path = [expanduser(path) for path in self.eval_data_path]
        self.image_folder = self.image_folder and expanduser(self.image_folder)
        _check_choices(self)
        for key in ("multimodal_max_length", "text_max_length", "min_frames", "max_frames"):
            if getattr(self, key) < 1:
                raise ConfigError(key, f"{getattr(self, key)} is below 1", "give 1 or more")
        if self.max_frames < self.min_frames:
            raise ConfigError(
                "max_frames",
                f"max_frames {self.max_frames} is below min_frames {self.min_frames}",
                "raise max_frames or lower min_frames",
            )
        for media in ("single_image", "multiple_image", "video"):
            self._check_pixels(f"{media}_min_pixels", f"{media}_max_pixels")

    def _check_pixels(self, min_key: str, max_key: str) -> None:
        derivable = not min_key.startswith("single_image")
        for key in (min_key, max_key):
            pixels = getattr(self, key)
            if pixels == 0 or (pixels < 0 and not derivable):
                raise ConfigError(
                    key,
                    f"{pixels} is not a number of pixels",
                    f"give a positive number, for example {_PIXELS_448} (448 x 448)"
                    + (", or -1 to derive it from the single-image limits" if derivable else ""),
                )
        low, high = getattr(self, min_key), getattr(self, max_key)
        if 0 < high < low:
            raise ConfigError(
                max_key,
                f"{max_key} {high} is below {min_key} {low}",
                f"raise {max_key} or lower {min_key}",
            )


@dataclass
class RunConfig:
    """One resolved training run.

    Attributes:
        model: Our model keys, defaults filled in.
        data: Our data keys, defaults filled in.
        training: `SFTConfig`/`TrainingArguments` keys the user gave, coerced; no defaults.
        sources: Where each given key came from: "file PATH" or "command line".
        notes: One line for each key that was renamed or has no effect.
    """

    model: ModelConfig
    data: DataConfig
    training: dict[str, Any]
    sources: dict[str, str]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The flat config to save beside checkpoints; loading it again gives the same run."""
        return {**asdict(self.model), **asdict(self.data), **self.training}


def annotations_of(config: type[ModelConfig] | type[DataConfig]) -> dict[str, str]:
    """Key -> annotation text, as `host_fields` gives it for the host's keys."""
    return {f.name: str(f.type) for f in fields(config)}


def _check_choices(config: ModelConfig | DataConfig) -> None:
    for f in fields(config):
        choices = f.metadata.get("choices")
        value = getattr(config, f.name)
        if choices and value not in choices:
            raise ConfigError(
                f.name, f'"{value}" is not a choice of {f.name}', f"give {' or '.join(choices)}"
            )
