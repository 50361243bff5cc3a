"""Which metrics an evaluation has: what was asked for, and what model and data allow."""

from collections.abc import Sequence
from typing import Literal

from ..configs.load import COMMAND_LINE
from ..configs.schema import ANSWER_METRICS
from ..core.errors import ConfigError
from .samples import Sample

METRICS = (*ANSWER_METRICS, "loss", "contrastive")
"""Of generated answers, of the data's own answers, and of vectors of images and texts."""

STAGE_1 = ("bleu", "cider", "rouge_l", "contrastive", "loss")
LATER_STAGES = (*ANSWER_METRICS, "loss")

Kind = Literal["ovis2_5", "vlm", "dual_encoder"]
"""An Ovis2.5, another model that answers, or one that only compares images with texts."""


def named_metrics(text: str, stage: int | None = None) -> tuple[tuple[str, ...], bool]:
    """What `--metrics` names, and whether each must be possible.

    Args:
        text: "all", or names joined by commas.
        stage: Of training, which "all" is meant for: 1 aligns images with captions, later ones
            train answers; None: every metric.

    Raises:
        ConfigError: there is no such metric.
    """
    if text == "all":
        return (METRICS if stage is None else STAGE_1 if stage == 1 else LATER_STAGES), False
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if unknown := [name for name in names if name not in METRICS]:
        raise ConfigError(
            f"{COMMAND_LINE}, metrics",
            f'there is no metric "{unknown[0]}"',
            f"give all, or of {', '.join(METRICS)}, joined by commas",
        )
    return names, True


def possible_metrics(
    names: Sequence[str], kind: Kind, samples: Sequence[Sample], required: bool
) -> tuple[list[str], dict[str, str]]:
    """Those of the metrics that can be computed, and why the others cannot.

    Raises:
        ConfigError: none of them can, or one cannot where all are `required`.
    """
    left_out = {name: why for name in names if (why := _obstacle(name, kind, samples))}
    if left_out and (required or len(left_out) == len(names)):
        name, why = next(iter(left_out.items()))
        fix = "leave it out, or give a model and data for it"
        raise ConfigError(f"{COMMAND_LINE}, metrics, {name}", why, fix)
    return [name for name in names if name not in left_out], left_out


def _obstacle(name: str, kind: Kind, samples: Sequence[Sample]) -> str | None:
    if name == "contrastive":
        if kind != "dual_encoder":
            return "the model makes no vectors of images and texts, as CLIP does"
        images = {image for sample in samples if (image := sample.described_image)}
        return None if len(images) > 1 else "fewer than two images have a text"
    if kind == "dual_encoder":
        return "the model makes vectors of images and texts, and no answers"
    if name == "loss":
        if kind != "ovis2_5":
            return "it is computed for Ovis2.5, as training renders it"
        written = (s.conversation for s in samples if s.conversation and not s.error)
        trained = any(turn.trained for conversation in written for turn in conversation.turns)
        return None if trained else "no record has an answer of its own"
    return None if any(s.texts and not s.error for s in samples) else "no record has an answer"
