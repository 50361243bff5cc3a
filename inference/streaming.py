"""An answer piece by piece, while another thread generates it."""

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

from transformers.generation.streamers import BaseStreamer

from ..core.errors import ModelError
from .reply import Reply


class TextStreamer(BaseStreamer):
    """Hands text on as soon as its last character is whole; unlike transformers' own, the pieces
    joined are always the text of all tokens."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        self.tokenizer, self.on_text = tokenizer, on_text
        self.ids: list[int] | None = None
        # Tokens from `start` to `stop` are written and tell how the next ones are read.
        self.start = self.stop = 0

    def put(self, value: Any) -> None:
        """Called with the prompt, then with each new token."""
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        text = self._unwritten()
        # A character may need several tokens.
        self._write("" if text.endswith("\ufffd") else text)

    def end(self) -> None:
        self._write(self._unwritten())

    def _unwritten(self) -> str:
        ids = self.ids or []
        written = self._text(ids[self.start : self.stop])
        return self._text(ids[self.start :])[len(written) :]

    def _write(self, text: str) -> None:
        if text:
            self.start, self.stop = self.stop, len(self.ids or [])
        self.on_text(text)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class _Closed(Exception):
    """Ends generation at its next token."""


class Stream:
    """Iterate over the pieces of text; afterwards `reply` is the whole reply.

    An error while generating is raised to the reader. Generation begins when the first piece is
    asked for, and ends soon after the loop is left early or `close` is called.

    Example:
        for piece in stream:
            print(piece, end="", flush=True)
        print(stream.reply.thinking)
    """

    def __init__(
        self,
        work: Callable[[Callable[[str], None]], Reply],
        then: Callable[[Reply], object] = lambda reply: None,
    ):
        """
        Args:
            work: Called in the thread, with what takes each piece.
            then: Called with the reply when the reader has come to its end.
        """
        self._work, self._then = work, then
        self._pieces: SimpleQueue[str | None] = SimpleQueue()
        self._closed = threading.Event()
        self._outcome: Reply | BaseException | None = None
        self._whole = False
        self._thread = threading.Thread(target=self._run, name="vlmtune-stream", daemon=True)

    def __iter__(self) -> Iterator[str]:
        if self._thread.ident is None and not self._closed.is_set():
            self._thread.start()
        try:
            while not self._closed.is_set():
                piece = self._pieces.get()
                if piece is None:
                    self._end()
                    break
                yield piece
        finally:
            self.close()
        if isinstance(self._outcome, BaseException) and not isinstance(self._outcome, _Closed):
            raise self._outcome

    @property
    def reply(self) -> Reply:
        """The whole reply; what has not been read yet is waited for.

        Raises:
            ModelError: the stream was closed before its end.
        """
        for _ in self:
            pass
        if not self._whole or not isinstance(self._outcome, Reply):
            what = "it was closed before the reply was whole"
            raise ModelError("stream", what, "read it to its end")
        return self._outcome

    def _end(self) -> None:
        self._whole = True
        if isinstance(self._outcome, Reply):
            self._then(self._outcome)

    def close(self) -> None:
        """End generation, and wait until it has ended."""
        self._closed.set()
        # A stream that is forgotten may be cleaned up in any thread.
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            self._outcome = self._work(self._take)
        except BaseException as error:
            self._outcome = error
        finally:
            self._pieces.put(None)

    def _take(self, piece: str) -> None:
        if self._closed.is_set():
            raise _Closed
        if piece:
            self._pieces.put(piece)
