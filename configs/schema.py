"""What can be configured: our own keys as dataclasses, the host's keys as a plain dict."""

from __future__ import annotations  # keeps annotations as text, the form the host's fields have

import re
from dataclasses import asdict, dataclass, field, fields
from os.path import expanduser
from typing import Any

from ..core.errors import ConfigError
from .adapter import AdapterConfig
from .coercion import check_choices
from .recompute import parse_recompute
from .train_modules import parse_train_modules

_PIXELS_448 = 448 * 448

ANSWER_METRICS = (
    "exact_match",
    "vqa_accuracy",
    "anls",
    "relaxed_accuracy",
    "bleu",
    "cider",
    "rouge_l",
)
"""What generated answers are scored with (`evaluation.scores`)."""


@dataclass
class ModelConfig:
    """Which model is trained, and which parts of it."""

    model_path: str = field(
        default="", metadata={"help": "Local folder or Hub name of the model to train."}
    )
    llm_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Without model_path: the language model of a new Ovis2.5, which is built in "
            "output_dir/base and trained."
        },
    )
    vit_name_or_path: str | None = field(
        default=None, metadata={"help": "Without model_path: its SigLIP or SigLIP2 vision tower."}
    )
    visual_vocab_size: int | None = field(
        default=None,
        metadata={"help": "Without model_path: its size of the visual vocabulary; null is 65536."},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention kernel by its transformers name; null lets transformers pick, and "
            "with packing is packed, which attends inside each sample."
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
    train_modules: str = field(
        default="all",
        metadata={
            "help": "What is trained, each part with its own learning rate or the common one: "
            '"vte:1e-4|llm"; all else is frozen, and the most specific name counts. With LoRA: '
            "what is trained fully beside the adapters; all is then nothing."
        },
    )
    freeze_llm: bool = field(
        default=False, metadata={"help": "Leave the language model as it is in the checkpoint."}
    )
    freeze_vision_tower: bool = field(
        default=False, metadata={"help": "Leave the vision encoder as it is in the checkpoint."}
    )

    def __post_init__(self) -> None:
        self.model_path = expanduser(self.model_path)
        self.llm_name_or_path = self.llm_name_or_path and expanduser(self.llm_name_or_path)
        self.vit_name_or_path = self.vit_name_or_path and expanduser(self.vit_name_or_path)
        self.torch_dtype = self.torch_dtype.removeprefix("torch.")
        check_choices(self)
        parse_train_modules(self.train_modules)


@dataclass
class LoopConfig:
    """How the training loop runs, beyond the host's own keys."""

    trainer: str = field(
        default="trl",
        metadata={
            "help": "Base trainer: trl is TRL's SFTTrainer, standard is transformers' Trainer.",
            "choices": ("trl", "standard"),
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Begin anew where output_dir holds a finished model or checkpoints of another "
            "run."
        },
    )
    base_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Instead of learning_rate: the rate that suits base_batch_size, scaled by the "
            "square root of the global batch over base_batch_size."
        },
    )
    base_batch_size: int | None = field(
        default=None, metadata={"help": "Global batch, in samples, that base_learning_rate suits."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after this many evaluations without a better metric_for_best_model; the "
            "best model is kept and reloaded."
        },
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "By how much an evaluation must be better to count."}
    )
    eval_metrics: list[str] = field(
        default_factory=list,
        metadata={
            "help": "At each evaluation also answer questions of eval_data_path, greedily, and "
            "score the answers: exact_match, vqa_accuracy, anls, relaxed_accuracy, bleu, cider "
            "or rouge_l, one or several."
        },
    )
    eval_generate_samples: int = field(
        default=64,
        metadata={
            "help": "With eval_metrics: how many samples of each evaluation set are answered, "
            "always the same, spread evenly over it."
        },
    )
    eval_max_new_tokens: int = field(
        default=512,
        metadata={"help": "With eval_metrics: tokens of an answer at most, its thought included."},
    )
    recompute: str | None = field(
        default=None,
        metadata={
            "help": "What the backward pass computes again to save memory: none, selective (all "
            'but matrix products and attention) or full, for both towers or each, "llm:full|'
            'visual_tokenizer:none"; null leaves it to gradient_checkpointing.'
        },
    )
    max_empty_batches: int = field(
        default=10,
        metadata={
            "help": "Stop the run after this many micro-batches in a row without a trained token."
        },
    )
    probe: bool = field(
        default=False,
        metadata={
            "help": "Before the first step: forward and backward of each process's micro-batch "
            "that needs the most memory, then the run as without it. Not with streaming."
        },
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if self.recompute is not None:
            parse_recompute(self.recompute)
        if self.base_learning_rate is not None and self.base_learning_rate <= 0:
            raise ConfigError(
                "base_learning_rate", f"{self.base_learning_rate} is not above 0", "give 1e-5"
            )
        for name in self.eval_metrics:
            if name not in ANSWER_METRICS:
                raise ConfigError(
                    "eval_metrics",
                    f'"{name}" is not a metric of answers',
                    f"give {' or '.join(ANSWER_METRICS)}, or several of them",
                )
        if self.early_stopping_threshold < 0:
            raise ConfigError(
                "early_stopping_threshold",
                f"{self.early_stopping_threshold} is below 0",
                "give 0 or more",
            )
        for key in (
            "base_batch_size",
            "early_stopping_patience",
            "eval_generate_samples",
            "eval_max_new_tokens",
            "max_empty_batches",
        ):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(key, f"{value} is below 1", "give 1 or more")
        if (self.base_learning_rate is None) != (self.base_batch_size is None):
            raise ConfigError(
                "base_learning_rate",
                "base_learning_rate and base_batch_size go together",
                "give both, or learning_rate instead",
            )


@dataclass
class DataConfig:
    """Where samples come from and how they become tokens and pixels.

    Pixel limits count the pixels of one resized image or frame. A negative limit of several images
    or of a video means "derive": a minimum becomes the single-image minimum, a maximum becomes the
    single-image maximum divided by the number of images or frames, at least the minimum.
    """

    data_path: list[str] = field(
        metadata={
            "help": 'Training data: one path, a list, or several joined by "|"; JSON, JSON lines, '
            "parquet, a datasets folder, a Hub dataset, or names of sets in datainfo."
        }
    )
    eval_data_path: list[str] | dict[str, Any] = field(
        default_factory=list,
        metadata={
            "help": "Evaluation data, written as data_path is, or an object of named sets; empty "
            "means no evaluation."
        },
    )
    datainfo: str | None = field(
        default=None,
        metadata={
            "help": "JSON file of named sets: name to meta_file, image_dir and data_format "
            "(conversation or caption)."
        },
    )
    mix: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Set name, or file name without its ending, to its expected passes per epoch, "
            "1 where it is not named; a part of a set is drawn anew each epoch. Not with streaming."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read and check the training data while training, for what is too large to "
            "prepare; needs max_steps, and a bad sample ends the run when it is met."
        },
    )
    shuffle_buffer: int = field(
        default=1000,
        metadata={"help": "Records a stream draws the next one from; 1 keeps the file's order."},
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
    packing: bool = field(
        default=False,
        metadata={
            "help": "Put whole samples side by side into rows of packing_length tokens, without "
            "attention between them, instead of padding each; per_device_train_batch_size then "
            "counts rows."
        },
    )
    packing_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of a packed row; null is multimodal_max_length."},
    )
    packing_max_patches: int | None = field(
        default=None,
        metadata={
            "help": "Visual patches of a packed row at most; null leaves them to packing_length."
        },
    )
    jpeg_draft: bool = field(
        default=False,
        metadata={
            "help": "Decode a JPEG at the smallest of its scales that is large enough: faster and "
            "smaller in memory, but the pixels differ a little."
        },
    )
    on_bad_sample: str = field(
        default="error",
        metadata={
            "help": "A bad sample ends the run before training (error) or is left out and "
            "listed with its reason (skip). With error, a JPEG that is broken inside is found when "
            "it is first trained on; skip decodes every file once to find it.",
            "choices": ("error", "skip"),
        },
    )

    @property
    def eval_sets(self) -> dict[str, list[str]]:
        """`eval_data_path` by the names of its sets; "" is that of an unnamed one."""
        if isinstance(self.eval_data_path, dict):
            return self.eval_data_path
        return {"": self.eval_data_path} if self.eval_data_path else {}

    def __post_init__(self) -> None:
        self.data_path = [expanduser(path) for path in self.data_path]
        if isinstance(self.eval_data_path, dict):
            self.eval_data_path = {
                name: _paths_of_set(name, paths) for name, paths in self.eval_data_path.items()
            }
        else:
            self.eval_data_path = [expanduser(path) for path in self.eval_data_path]
        self.image_folder = self.image_folder and expanduser(self.image_folder)
        self.datainfo = self.datainfo and expanduser(self.datainfo)
        check_choices(self)
        for key in (
            "multimodal_max_length",
            "text_max_length",
            "min_frames",
            "max_frames",
            "shuffle_buffer",
            "packing_length",
            "packing_max_patches",
        ):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(key, f"{value} is below 1", "give 1 or more")
        if self.max_frames < self.min_frames:
            raise ConfigError(
                "max_frames",
                f"max_frames {self.max_frames} is below min_frames {self.min_frames}",
                "raise max_frames or lower min_frames",
            )
        for media in ("single_image", "multiple_image", "video"):
            self._check_pixels(f"{media}_min_pixels", f"{media}_max_pixels")
        _check_mix(self.mix)

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
        loop: Our keys of the training loop, defaults filled in.
        adapter: Our keys of LoRA and QLoRA, defaults filled in; `use_lora` is decided.
        training: `SFTConfig`/`TrainingArguments` keys the user gave, coerced; no defaults.
        sources: Where each given key came from: "file PATH" or "command line".
        notes: One line for each key that was renamed or has no effect.
    """

    model: ModelConfig
    data: DataConfig
    loop: LoopConfig
    adapter: AdapterConfig
    training: dict[str, Any]
    sources: dict[str, str]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The flat config to save beside checkpoints; loading it again gives the same run."""
        parts = (self.model, self.data, self.loop, self.adapter)
        return {key: value for part in parts for key, value in asdict(part).items()} | self.training


def annotations_of(
    config: type[ModelConfig] | type[DataConfig] | type[LoopConfig] | type[AdapterConfig],
) -> dict[str, str]:
    """Key -> annotation text, as `host_fields` gives it for the host's keys."""
    return {f.name: str(f.type) for f in fields(config)}


def _paths_of_set(name: str, paths: Any) -> list[str]:
    """The files of one named evaluation set, from a list or text joined by "|"."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ConfigError(
            "eval_data_path",
            f'the name of a set "{name}" cannot be part of a metric\'s name',
            "use letters, digits, _, - and .",
        )
    if isinstance(paths, str):
        paths = [part.strip() for part in paths.split("|") if part.strip()]
    if not isinstance(paths, list) or not paths or not all(isinstance(p, str) for p in paths):
        raise ConfigError(
            "eval_data_path",
            f'the set "{name}" names no files: {paths!r}',
            "give a path, a list of paths, or several joined by |",
        )
    return [expanduser(path) for path in paths]


def _check_mix(mix: dict[str, Any]) -> None:
    for name, passes in mix.items():
        number = isinstance(passes, int | float) and not isinstance(passes, bool)
        if not (number and 0 <= passes < float("inf")):
            raise ConfigError(
                "mix",
                f'{passes!r} is not how often "{name}" is passed in an epoch',
                "give a number, 0 or more",
            )
