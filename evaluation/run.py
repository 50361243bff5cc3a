"""An evaluation: answers, losses or vectors of a data set, scored and written down.

One that follows in the same folder, with the same settings, takes the answers and losses that are
there and adds its metrics to the result.
"""

import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
from peft import PeftConfig
from transformers import AutoConfig

from .. import __version__
from ..collators.sample import SampleEncoder
from ..configs.schema import ANSWER_METRICS, DataConfig
from ..core.distributed import rank
from ..core.errors import DataError
from ..core.logging import note, say
from ..data.images import check_image
from ..data.sources import Source
from ..inference.files import answer_file, check_output
from ..inference.parts import Parts
from ..inference.sampling import Sampling
from ..inference.vlm import VLMInference
from ..models import Ovis2_5Config
from .dual_encoder import DualEncoder, is_dual_encoder, similarity
from .folder import LOSSES, PREDICTIONS, RESULT, loss_settings, read_result, read_rows, write
from .loss import loss_file
from .retrieval import retrieval
from .rows import Row, score_rows, unfinished_thoughts
from .samples import Sample
from .scores import resampled_sums, score_of
from .wanted import Kind

LIBRARIES = ("torch", "transformers", "peft", "sacrebleu")


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, by which metrics, and where it is written.

    Attributes:
        load: Loads the model; called when something is to be computed with it.
        run: Config of the run that trained the model, or empty: how long a sample may be.
        samples: The records of `sources`, no more than `limit`.
        metrics: Of `wanted.METRICS`, each possible for this model and these samples.
        left_out: Metrics that are not possible, and why.
        output: An existing folder.
        settings: All that answers depend on, as JSON.
        about: What else the result says of model and data, as JSON.
        tokenizer: As of `scores.score`.
    """

    load: Callable[[], VLMInference | DualEncoder]
    run: dict[str, Any]
    sources: Sequence[Source]
    samples: Sequence[Sample]
    metrics: Sequence[str]
    output: Path
    settings: dict[str, Any]
    sampling: Sampling = field(default_factory=Sampling)
    enable_thinking: bool | None = None
    batch_size: int = 8
    limit: int | None = None
    tokenizer: str = "ptb_python"
    left_out: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def kind_of(model: str) -> Kind:
    """What a folder or Hub name can be asked for; of an adapter, what its base can.

    Whether it can be loaded shows when it is.
    """
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError):  # no config.json, as in an adapter's folder
        try:
            base = PeftConfig.from_pretrained(model).base_model_name_or_path
            config = AutoConfig.from_pretrained(str(base))
        except (OSError, ValueError, KeyError):
            return "vlm"
    if isinstance(config, Ovis2_5Config):
        return "ovis2_5"
    return "dual_encoder" if is_dual_encoder(config) else "vlm"


def evaluate(e: Evaluation) -> tuple[dict[str, Any], list[Row]] | None:
    """Compute what is not there yet, score it, and write the result.

    Under torchrun all processes share the work and the first one scores.

    Returns:
        The result and the rows of `predictions.jsonl`; None on the other processes.

    Raises:
        VLMTuneError: the model cannot be loaded or run, or the folder cannot be written.
    """
    load = cache(e.load)
    answers = [name for name in e.metrics if name in ANSWER_METRICS]
    if answers:
        _answer(e, load)
    if "loss" in e.metrics:
        _compute_losses(e, load)
    if rank():
        return None
    rows, losses = read_rows(e.output / PREDICTIONS), read_rows(e.output / LOSSES)
    errors, left_out = [*rows, *losses], dict(e.left_out)
    found: dict[str, Any] = {}
    if answers:
        for row, sample in zip(rows, e.samples, strict=True):
            row["references"] = row["references"] or sample.texts
        found |= _score_answers(rows, answers, e.tokenizer)
    if "loss" in e.metrics:
        found |= _score_losses(losses)
        if "loss" not in found:
            left_out["loss"] = "no record could be run"
    _add_losses(rows, losses)
    if "contrastive" in e.metrics:
        texts_of, unread = _readable_images(e.samples)
        errors += unread
        if len(texts_of) > 1:
            found |= _score_vectors(cast(DualEncoder, load()), texts_of, e.batch_size)
        else:
            left_out["contrastive"] = "fewer than two images can be read"
    if rows:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write(e.output / PREDICTIONS, lines)
    thinks = [s.thinks if e.enable_thinking is None else e.enable_thinking for s in e.samples]
    earlier = read_result(e.output).get("metrics", {})
    result = {
        **e.about,
        "records": len(e.samples),
        "metrics": {**earlier, **found},
        "left_out": left_out,
        "answers": _shares(rows, thinks) if rows else None,
        "errors": _errors(errors),
        "settings": e.settings,
        "versions": _versions(),
    }
    write(e.output / RESULT, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result, rows


def _answer(e: Evaluation, load: Callable[[], Any]) -> None:
    output = e.output / PREDICTIONS
    if check_output(e.sources, output, e.settings, e.limit):
        say(f"{output} is there already; its answers are scored")
        return
    answer_file(
        load(),
        e.sources,
        output,
        sampling=e.sampling,
        enable_thinking=e.enable_thinking,
        batch_size=e.batch_size,
        limit=e.limit,
        settings=e.settings,
    )


def _compute_losses(e: Evaluation, load: Callable[[], Any]) -> None:
    output, settings = e.output / LOSSES, loss_settings(e.settings)
    if Parts(output, settings).is_complete():
        say(f"{output} is there already; its losses are summed up")
        return
    inference = load()
    prompts = inference.prompts.settings
    lengths = {
        key: e.run.get(key, getattr(DataConfig, key))
        for key in ("multimodal_max_length", "text_max_length")
    }
    encoder = SampleEncoder(
        inference.processor,
        prompts.limits,
        **lengths,
        thinking=prompts.thinking,
        jpeg_draft=prompts.jpeg_draft,
    )
    loss_file(
        inference.model,
        encoder,
        e.samples,
        output,
        batch_size=e.batch_size,
        settings=settings,
    )


def _score_answers(rows: Sequence[Row], names: Sequence[str], tokenizer: str) -> dict[str, Any]:
    """The metrics; each sample's are put into its row."""
    scored = [row for row in rows if row["references"]]
    entries = {}
    for name, metric in score_rows(scored, names, tokenizer=tokenizer).items():
        entries[name] = {"value": metric.value, "low": metric.low, "high": metric.high}
        entries[name] |= {"n": len(scored)}
        if metric.tokenizer:
            entries[name]["tokenizer"] = metric.tokenizer
        for row, value in zip(scored, metric.per_sample or [], strict=True):
            row.setdefault("scores", {})[name] = value
    return entries


def _score_losses(losses: Sequence[Row]) -> dict[str, Any]:
    """Loss and perplexity over all trained tokens; intervals by resampling the samples."""
    columns = np.array([(row["total"], row["tokens"]) for row in losses if row["tokens"]])
    if not len(columns):
        return {}
    total, tokens = columns.sum(0)
    again = resampled_sums(columns, resamples=1000, seed=0)
    loss = score_of(total / tokens, again[:, 0] / again[:, 1])
    facts = {"n": len(columns), "tokens": int(tokens)}
    if cut := sum(row["cut"] > 0 for row in losses):
        note(f"{cut:,} of {len(losses):,} records are cut to the length limit")
        facts["cut_to_the_length_limit"] = cut
    return {
        "loss": {"value": loss.value, "low": loss.low, "high": loss.high, **facts},
        "perplexity": {key: _exp(getattr(loss, key)) for key in ("value", "low", "high")} | facts,
    }


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:  # above 709
        return math.inf


def _add_losses(rows: Sequence[Row], losses: Sequence[Row]) -> None:
    by_record = {row["record"]: row["total"] / row["tokens"] for row in losses if row["tokens"]}
    for row in rows:
        if row["record"] in by_record:
            row.setdefault("scores", {})["loss"] = by_record[row["record"]]


def _readable_images(samples: Sequence[Sample]) -> tuple[dict[str, list[str]], list[Row]]:
    """Images with their texts, and which records have an image that cannot be read."""
    texts_of: dict[str, list[str]] = {}
    unread: list[Row] = []
    for sample in samples:
        image = sample.described_image
        if image is None:
            continue
        try:
            if image not in texts_of:
                check_image(image, f"record {sample.record}, image", decode_whole=True)
        except DataError as error:
            unread.append({"record": sample.record, "error": " ".join(str(error).split())})
        else:
            texts_of.setdefault(image, []).extend(sample.texts)
    return texts_of, unread


def _score_vectors(
    encoder: DualEncoder, texts_of: dict[str, list[str]], batch_size: int
) -> dict[str, Any]:
    """The metrics of the pool of all images and their texts."""
    texts = [text for of_image in texts_of.values() for text in of_image]
    owner = [i for i, of_image in enumerate(texts_of.values()) for _ in of_image]
    found = retrieval(similarity(encoder, list(texts_of), texts, batch_size), owner)
    pool = {"n": found.images, "images": found.images, "texts": found.texts}
    if cut := encoder.too_long(texts):
        note(f"{cut:,} of {len(texts):,} texts are cut to {encoder.longest_text} tokens")
        pool["cut_to_the_length_limit"] = cut
    return {
        name: {"value": s.value, "low": s.low, "high": s.high, **pool}
        for name, s in found.scores().items()
    }


def _shares(rows: Sequence[Row], thinks: Sequence[bool]) -> dict[str, float] | None:
    """How the answers came to their ends; None where there is none."""
    said = [row for row in rows if not row["error"]]
    if not said:
        return None
    return {
        "thoughts": sum(bool(row["thinking"]) for row in said) / len(said),
        **unfinished_thoughts(rows, thinks),
        "ended_by_length": sum(row["ended"] == "length" for row in said) / len(said),
        "without_reference": sum(not row["references"] for row in said) / len(said),
        "tokens": sum(row["tokens"] for row in said) / len(said),
    }


def _errors(rows: Sequence[Row]) -> list[Row]:
    """Each record with what first went wrong with it, in order."""
    found: dict[int, str] = {}
    for row in rows:
        if row["error"]:
            found.setdefault(row["record"], row["error"])
    return [{"record": record, "error": found[record]} for record in sorted(found)]


def _versions() -> dict[str, str]:
    found = {"vlmtune": __version__, "python": platform.python_version()}
    return found | {name: version(name) for name in LIBRARIES}
