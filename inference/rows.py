"""What becomes of each row while a batch is generated: tokens it is told to write, and its end.

Shape suffixes: B rows, T new tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, StoppingCriteria

from ..core.errors import ModelError
from .reply import END_OF_THOUGHT, Ended
from .sampling import Sampling


@dataclass(frozen=True)
class Generated:
    """One row: its new ids with the stop token and without padding, and what ended it. `error` is
    set where `ended` is "error", the ids are then those before it."""

    ids: list[int]
    ended: Ended
    error: ModelError | None = None


class Rows:
    """The rows of one call of `generate`, between which nothing is shared.

    Attributes:
        limits, limit: Most new tokens of each row, and of any.
        begin: Where they begin in the ids that the host hands over; those of a prompt that it was
            given as embeddings are not among them.
        written: New tokens so far.
        closing: Rows whose thought is ended for them.
        broken: Rows whose logits were no numbers.
    """

    def __init__(
        self,
        tokenizer: Any,
        sampling: Sampling,
        thinks: list[bool],
        early_stop: list[int],
        stop_at: Sequence[str],
        stop_ids: list[int],
    ):
        self.tokenizer, self.thinks = tokenizer, thinks
        self.stop_at, self.stop_ids = stop_at, stop_ids
        # A token is a byte at least.
        self.reach = max((len(text.encode()) for text in stop_at), default=0)
        self.limits = [sampling.limit(on, len(early_stop)) for on in thinks]
        self.most, self.limit = sampling.max_new_tokens, max(self.limits)
        self.budget, self.early_stop = sampling.thinking_budget, early_stop
        self.begin: int | None = None
        self.written = 0
        self.ended: list[Ended | None] = [None] * len(thinks)
        self.lengths = [0] * len(thinks)
        self.closing: set[int] = set()
        self.broken: set[int] = set()

    def told(self) -> dict[int, int]:
        """Row to the token that it is to write next, of those that are told one."""
        place = self.written - (self.budget or 0)
        if not self.closing or place >= len(self.early_stop):
            return {}
        return {row: self.early_stop[place] for row in self.closing}

    def settled(self) -> bool:
        """Whether no row's next token is left to the model."""
        told = self.told()
        return bool(told) and all(end or row in told for row, end in enumerate(self.ended))

    def steer(self, ids: Tensor, scores_BV: Tensor) -> Tensor:
        """The scores, with one token left to rows that are told one or have no numbers."""
        if self.begin is None:
            self.begin = ids.shape[1]
        told = self.told()
        for row in (~scores_BV.amax(-1).isfinite()).nonzero()[:, 0].tolist():
            if self.ended[row] is None:
                self.broken.add(row)
            told[row] = self.stop_ids[0]
        for row, token in told.items():
            scores_BV[row] = -torch.inf
            scores_BV[row, token] = 0.0
        return scores_BV

    def watch(self, ids: Tensor) -> Tensor:
        """Bool `[B]`: the rows that have come to their end."""
        new_BT = ids[:, self.begin :]
        self.written = new_BT.shape[1]
        if self.written == self.budget:
            self.closing = {row for row in range(len(new_BT)) if self._thinks_on(row, new_BT)}
        for row, last in enumerate(new_BT[:, -1].tolist()):
            if self.ended[row] is None:
                self.ended[row] = self._end(row, last, new_BT)
                self.lengths[row] = self.written - (row in self.broken)
        return torch.tensor([end is not None for end in self.ended], device=ids.device)

    def result(self, row: int, ids: list[int]) -> Generated:
        kept = ids[self.begin :][: self.lengths[row]]
        if row not in self.broken:
            return Generated(kept, self.ended[row] or "length")
        error = ModelError(
            "generation" if len(self.ended) == 1 else f"generation, row {row + 1}",
            f"the logits are NaN or infinite after {len(kept)} new tokens",
            "run the model in the dtype it was trained in, or in float32, and look for NaN in its "
            "weights",
        )
        return Generated(kept, "error", error)

    def _thinks_on(self, row: int, new_BT: Tensor) -> bool:
        ids = new_BT[row].tolist()
        if not self.thinks[row] or self.ended[row] or row in self.broken:
            return False
        return ids[-1] not in self.stop_ids and END_OF_THOUGHT not in self.tokenizer.decode(ids)

    def _end(self, row: int, last: int, new_BT: Tensor) -> Ended | None:
        if row in self.broken:
            return "error"
        if last in self.stop_ids:
            return "stop"
        if self.stop_at:
            tail = self.tokenizer.decode(new_BT[row, -self.reach :].tolist())
            if any(text in tail for text in self.stop_at):
                return "tool_call"
        # The early stop is written whole, as the reference does.
        most = self.limit if row in self.closing else self.most
        return "length" if self.written >= most else None


class Steering(LogitsProcessor):
    def __init__(self, rows: Rows):
        self.rows = rows

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return self.rows.steer(input_ids, scores)


class Watching(StoppingCriteria):
    def __init__(self, rows: Rows):
        self.rows = rows

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return self.rows.watch(input_ids)


@contextmanager
def read_together(language_model: nn.Module, rows: Rows) -> Iterator[None]:
    """Let the language model read tokens that all rows were told in one forward pass.

    While `rows` are settled no logits count, so a step leaves its token waiting and gives back the
    outputs of the step before; the first step whose logits count reads those that wait with its
    own. The model has to take `input_ids` and `position_ids` and nothing else token by token.
    """
    forward, replaced = language_model.forward, vars(language_model).get("forward")
    waiting: list[dict[str, Tensor]] = []
    outputs: Any = None

    @wraps(forward)
    def read(**given: Any) -> Any:
        nonlocal outputs
        if rows.settled():
            waiting.append(given)
            return outputs
        if waiting:
            for key in ("input_ids", "position_ids"):
                given[key] = torch.cat([*(step[key] for step in waiting), given[key]], dim=-1)
            waiting.clear()
        outputs = forward(**given)
        return outputs

    language_model.forward = read
    try:
        yield
    finally:
        if replaced is None:
            del language_model.forward
        else:
            language_model.forward = replaced
