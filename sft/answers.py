"""Answers at each evaluation: some samples of every set are answered, scored and written down."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..configs.schema import RunConfig
from ..core.distributed import of_first_process, rank, world_size
from ..core.errors import DataError
from ..core.logging import note
from ..data.dataset import PreparedData
from ..data.sources import Source, resolve_sources
from ..evaluation.rows import score_rows, unfinished_thoughts
from ..inference.files import references_of, reply_row
from ..inference.generation import memory_for
from ..inference.prompts import PromptSettings
from ..inference.reply import Reply, parse_reply
from ..inference.request import Request
from ..inference.sampling import Sampling
from ..inference.vlm import VLMInference
from .arguments import answer_prefix
from .data import RunData
from .failures import unwritable
from .output import ANSWERS


@dataclass(frozen=True)
class Question:
    """The last trained answer of a sample, to be given again.

    Attributes:
        set: Name of its evaluation set.
        row: What of its line in the file is known before it is answered.
        thinking: Whether the answer in the data has a thought.
        length: Tokens of the training sample.
    """

    set: str
    request: Request
    row: dict[str, Any]
    thinking: bool
    length: int


class AnswerEvaluation:
    """Which samples of a run's evaluation sets are answered, always the same, and how.

    Raises:
        DataError: a file cannot be read any more, or a record lists no usable references.
    """

    def __init__(self, config: RunConfig, data: RunData):
        self.metrics, self.processor = config.loop.eval_metrics, data.encoder.processor
        self.sampling = Sampling(max_new_tokens=config.loop.eval_max_new_tokens)
        self.prompts = PromptSettings(
            data.encoder.limits, data.encoder.thinking, data.encoder.jpeg_draft
        )
        self.questions = [
            question
            for name, prepared in data.evaluation.items()
            for question in pick_questions(config, name, prepared)
        ]

    def evaluate(
        self,
        model: Any,
        args: TrainingArguments,
        step: int,
        autocast: AbstractContextManager[Any],
    ) -> dict[str, float]:
        """Let the model answer, write `eval_samples/step-N.jsonl` and score. Every rank calls it.

        Args:
            autocast: What the training forward runs in.

        Returns:
            `answer_keys` and their values, the same on every rank, and with them
            `evaluation.rows.unfinished_thoughts` of each set.

        Raises:
            TrainingError: out of memory, or the file cannot be written.
        """
        # Layers that torch_compile has compiled would be compiled again for each token's shapes.
        with autocast, torch.compiler.set_stance("force_eager"):
            replies = self._replies(model, args, step)
        found: dict[str, float] = {}
        if rank() == 0:
            rows = [
                {"set": question.set, **question.row, **reply_row(replies[i])}
                for i, question in enumerate(self.questions)
            ]
            write_rows(rows, Path(args.output_dir or ".") / ANSWERS, step)
            found = self._scores(rows)
        return of_first_process(found)

    def _replies(self, model: Any, args: TrainingArguments, step: int) -> dict[int, Reply]:
        """Those of all ranks, by the places of their questions."""
        inference = VLMInference.of(model, self.processor, self.prompts)
        # The longest first: little padding, and where memory is too small, that shows at once.
        order = sorted(range(len(self.questions)), key=lambda i: -self.questions[i].length)
        size, synced = args.per_device_eval_batch_size, is_deepspeed_zero3_enabled()
        # Under ZeRO-3 all ranks run as many batches, one without questions that of another.
        batches = -(-len(order[0 if synced else rank() :: world_size()]) // size)
        mine, replies = order[rank() :: world_size()], {}
        hidden = args.disable_tqdm or rank() > 0
        for batch in tqdm(range(batches), desc="answers", leave=False, disable=hidden):
            taken = mine[batch * size : (batch + 1) * size]
            asked = [self.questions[i] for i in taken or order[-1:]]
            ids = ", ".join(str(one.row["id"]) for one in asked)
            fix = "lower per_device_eval_batch_size, eval_max_new_tokens or the pixel limits"
            with memory_for(f"rank {rank()}, step {step}, answers to {ids}", fix):
                answers = inference.answer(
                    [one.request for one in asked],
                    self.sampling,
                    enable_thinking=[one.thinking for one in asked],
                    synced=synced,
                )
            replies.update(zip(taken, answers, strict=bool(taken)))
        every: list[Any] = [replies]
        if world_size() > 1:
            every = [None] * world_size()
            torch.distributed.all_gather_object(every, replies)
        return {i: reply for of_rank in every for i, reply in of_rank.items()}

    def _scores(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        found = {}
        for name in dict.fromkeys(row["set"] for row in rows):
            prefix = answer_prefix(name)
            places = [i for i, row in enumerate(rows) if row["set"] == name]
            of_set = [rows[i] for i in places]
            # Intervals are not logged.
            scores = score_rows(of_set, self.metrics, resamples=1)
            values = {key: of.value for key, of in scores.items()}
            values |= unfinished_thoughts(of_set, [self.questions[i].thinking for i in places])
            found |= {f"{prefix}{key}": value for key, value in values.items()}
        return found


def pick_questions(config: RunConfig, name: str, prepared: PreparedData) -> Iterator[Question]:
    """`eval_generate_samples` of a set, or all where it has fewer, spread evenly over it; read
    again from their sources, as the prepared ones are tokens alone."""
    total = len(prepared.dataset)
    count = min(config.loop.eval_generate_samples, total)
    picked = np.arange(count) * total // count
    source_of = np.searchsorted(np.cumsum(prepared.sizes), picked, side="right")
    records, lengths = prepared.column("record")[picked], prepared.column("length")[picked]
    data = config.data
    sources = resolve_sources(data.eval_sets[name], data.image_folder, data.datainfo)
    for number, source in enumerate(sources):
        here = source_of == number
        wanted = dict(zip(records[here].tolist(), lengths[here].tolist(), strict=True))
        for index, record in source.records() if wanted else ():
            if index in wanted:
                yield _question(name, source, index, record, wanted.pop(index))
            if not wanted:
                break


def _question(name: str, source: Source, index: int, record: Any, length: int) -> Question:
    whole = source.parse(index, record)
    last = max(i for i, turn in enumerate(whole.turns) if turn.trained)
    conversation, written = replace(whole, turns=whole.turns[: last + 1]), whole.turns[last].text
    request, references = Request.of(conversation), references_of(record, conversation, written)
    if not references:
        raise DataError(
            conversation.where("references"),
            "is empty, so an answer cannot be scored.",
            "list what is right, or remove the key.",
        )
    row = {
        "record": index,
        "source": source.path,
        "id": conversation.id,
        "prompt": request.turns[-1].text if request.turns else "",
        "images": [*request.images, *conversation.frames],
        "video": conversation.video,
        "references": references,
    }
    return Question(name, request, row, bool(parse_reply(written)[0]), length)


def write_rows(rows: list[dict[str, Any]], folder: Path, step: int) -> None:
    """One object per line, under its name only when all is written.

    Raises:
        TrainingError: the disk is full, or the folder cannot be written.
    """
    aside, name = folder / ".partial", f"step-{step}.jsonl"
    with unwritable(aside, "answers"):
        aside.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (aside / name).write_text(lines, "utf-8", errors="backslashreplace")
        (aside / name).replace(folder / name)
        aside.rmdir()
    if failed := sum(row["error"] is not None for row in rows):
        note(f"{failed} of {len(rows)} answers failed, see {folder / name}")
