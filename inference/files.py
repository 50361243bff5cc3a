"""Answers to whole data files: a line for each record, resumable, by any number of processes."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.distributed import rank, world_size
from ..core.errors import DataError, ModelError
from ..data.conversation import PLAIN, Conversation, read_conversation, record_id
from ..data.sources import Source
from .parts import Parts
from .reply import Reply, parse_reply
from .request import Request
from .sampling import Sampling

if TYPE_CHECKING:
    from .tools import Tool
    from .vlm import VLMInference

UNANSWERED = ("answer-none", "answer-empty", "caption-empty")
"""Faults of a record that lacks nothing but its answer."""


@dataclass(frozen=True)
class Summary:
    """Attributes:
    records: Lines of the output.
    errors: Those of them with an error, of which `first_error` is the first.
    """

    records: int
    errors: int
    output: Path
    first_error: str | None = None


@dataclass(frozen=True)
class _Asked:
    """A record: its part of the row that is known before the answer, and what it asks, or why
    that cannot be told."""

    row: dict[str, Any]
    request: Request | None = None
    thinking: bool = False
    error: DataError | None = None


def check_output(
    sources: Sequence[Source], output: Path, settings: dict[str, Any], limit: int | None = None
) -> Summary | None:
    """See that the sources can be read and the output written, without importing torch.

    Args:
        settings: As of `answer_file`.

    Returns:
        The summary of an output that is complete already, else None.

    Raises:
        ConfigError: the output is of other settings, or it cannot be made.
        DataError: a source is missing or broken, or there is no record.
    """
    if Parts(output, settings).is_complete():
        return _summary(output)
    _count(sources, limit)
    return None


def answer_file(
    inference: "VLMInference",
    sources: Sequence[Source],
    output: Path,
    *,
    sampling: Sampling,
    enable_thinking: bool | None,
    batch_size: int,
    limit: int | None = None,
    tools: "Sequence[Tool]" = (),
    max_rounds: int = 5,
    settings: dict[str, Any],
) -> Summary:
    """Answer each record's last question and write a JSON line for it, in the order of the records:
    `{"record", "source", "id", "prompt", "images", "video", "references", "thinking", "answer",
    "unfinished_thought", "ended", "tokens", "error"}`.

    `record` counts from 1 through all sources; a record that cannot be read or answered has its
    `error`. A run that was stopped is gone on with. The file is the same for any number of
    processes and any batch size, as far as the model answers a record in any batch alike; what is
    drawn with a seed is drawn for each record by itself.

    Args:
        enable_thinking: None: where the record's own answer has a thought.
        limit: Of records.
        settings: All that the answers depend on, as JSON: those of a run that is gone on with must
            be equal.

    Raises:
        ConfigError: the output is of other settings, or another run is writing it.
        DataError: a source is missing or broken, or the output cannot be written.
        TrainingError: the GPU is out of memory.
    """
    parts = Parts(output, settings)
    if parts.is_complete():
        return _summary(output)
    total = _count(sources, limit)
    with parts.begun() as wait:
        done = parts.done()
        mine = [n for n in range(1, total + 1) if n not in done][rank() :: world_size()]
        asked = _asked(sources, set(mine), enable_thinking)
        with parts.lines() as write, _progress(len(mine)) as tell:
            while batch := list(islice(asked, batch_size)):
                replies = _answers(inference, batch, sampling, tools, max_rounds)
                for one, reply in zip(batch, replies, strict=True):
                    write({**one.row, **reply_row(reply)})
                tell(len(batch))
            wait()
        if rank() == 0:
            parts.finish(total)
        wait()
    return _summary(output)


def _records(sources: Sequence[Source], limit: int | None) -> Iterator[tuple[Source, int, Any]]:
    every = ((s, index, record) for s in sources for index, record in s.records())
    return islice(every, limit)


def _count(sources: Sequence[Source], limit: int | None) -> int:
    total = sum(1 for _ in _records(sources, limit))
    if not total:
        names = ", ".join(source.path for source in sources)
        raise DataError(names, "there is no record", "add records", "file-empty")
    return total


def _asked(
    sources: Sequence[Source], numbers: set[int], enable_thinking: bool | None
) -> Iterator[_Asked]:
    records = _records(sources, max(numbers, default=0))
    for number, (source, index, record) in enumerate(records, start=1):
        if number in numbers:
            yield _read(number, source, index, record, enable_thinking)


def _read(
    number: int, source: Source, index: int, record: Any, enable_thinking: bool | None
) -> _Asked:
    conversation, faults = read_conversation(
        record, source.path, index, source.folder, source.data_format
    )
    row: dict[str, Any] = {
        "record": number,
        "source": source.path,
        "id": record_id(record, index),
        "prompt": "",
        "images": [],
        "video": None,
        "references": [],
    }
    try:
        if fault := next((fault for fault in faults if fault.code not in UNANSWERED), None):
            raise fault
        assert conversation
        request = Request.of(conversation)
        written = _written_answer(conversation, request)
        row |= {
            "prompt": request.turns[-1].text if request.turns else "",
            "images": [*request.images, *conversation.frames],
            "video": conversation.video,
            "references": references_of(record, conversation, written),
        }
    except DataError as error:
        return _Asked(row, error=error)
    thinking = bool(parse_reply(written)[0]) if enable_thinking is None else enable_thinking
    return _Asked(row, request, thinking)


def _written_answer(conversation: Conversation, request: Request) -> str:
    """What the record itself answers to the request."""
    following = conversation.turns[len(request.turns) :][:1]
    return "".join(turn.text for turn in following if turn.role in ("assistant", PLAIN))


def references_of(record: dict[str, Any], conversation: Conversation, written: str) -> list[str]:
    """The answers or captions that a record lists, or else its own."""
    keys = ("references", "answers", "captions", "caption")
    key = next((key for key in keys if record.get(key) is not None), None)
    if key is None:
        return [written] if written.strip() else []
    listed, texts = record[key], []
    for entry in listed if isinstance(listed, list) else [listed]:
        text = entry.get("answer") if isinstance(entry, dict) else entry  # as VQAv2 lists them
        if not isinstance(text, str | int | float):
            where, fix = conversation.where(key), "write a text, or a list of texts"
            raise DataError(where, f"{entry!r} is no text", fix)
        texts.append(str(text))
    return texts


def _answers(
    inference: "VLMInference",
    batch: Sequence[_Asked],
    sampling: Sampling,
    tools: "Sequence[Tool]",
    max_rounds: int,
) -> list[Reply]:
    """Raises TrainingError where the GPU's memory is not enough."""
    from .generation import memory_for  # imported late, as torch is

    def alone(one: _Asked, request: Request) -> Reply:
        own = sampling
        if sampling.seed is not None:  # for each record another one, in whatever process it is
            own = replace(sampling, seed=sampling.seed + one.row["record"])
        settings: Any = {"enable_thinking": one.thinking, "tools": tools, "max_rounds": max_rounds}
        try:
            return inference.respond(request, own, **settings)
        except (DataError, ModelError) as error:
            return Reply.failed(error)

    good = [(one, one.request) for one in batch if one.request]
    thinking = [one.thinking for one, _ in good]
    where = f"records {batch[0].row['record']} to {batch[-1].row['record']}"
    fix = "lower batch_size, with which the run can be gone on with, or max_pixels"
    with memory_for(where, fix):
        if tools or (sampling.do_sample and sampling.seed is not None):
            replies = iter([alone(one, request) for one, request in good])
        else:
            requests = [request for _, request in good]
            replies = iter(inference.answer(requests, sampling, enable_thinking=thinking))
    return [Reply.failed(one.error) if one.error else next(replies) for one in batch]


def reply_row(reply: Reply) -> dict[str, Any]:
    return {
        "thinking": reply.thinking,
        "answer": reply.answer,
        "unfinished_thought": reply.unfinished_thought,
        "ended": reply.ended,
        "tokens": len(reply.tokens),
        "error": reply.error,
    }


@contextmanager
def _progress(records: int) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal, for what takes more than a second, of this process's records."""
    if rank() or not sys.stderr or not sys.stderr.isatty():
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(desc="Answering", unit=" records", total=records, delay=1) as bar:
        yield bar.update


def _summary(output: Path) -> Summary:
    records = errors = 0
    first = None
    with output.open(encoding="utf-8") as file:
        for line in file:
            error = json.loads(line)["error"]
            records += 1
            errors += error is not None
            first = first or error
    return Summary(records, errors, output, first)
