"""Ids and samples that were there before, found in constant memory."""

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager

from ..core.errors import DataError
from .conversation import Conversation
from .tables import REFERENCE, read_image

CACHE_KB = 2_048
"""What SQLite keeps in memory; the rest lies in a temporary file."""

Place = tuple[int, int]
"""Number of a source, and the record's position in it."""


def sample_key(conversation: Conversation) -> bytes:
    """16 bytes that two records share which would train on the same: turns and media files.

    Images in tables count by their bytes; files by their path.
    """
    digest = hashlib.blake2b(digest_size=16)
    for turn in conversation.turns:
        text = turn.text.encode(errors="surrogatepass")
        digest.update(f"{turn.role} {turn.trained:d} {len(text)} ".encode())
        digest.update(text)
    for file in conversation.media_files:
        content = read_image(file) if file.startswith(REFERENCE) else file.encode()
        digest.update(f"{len(content)} ".encode())
        digest.update(content)
    return digest.digest()


def id_key(identity: str) -> bytes:
    return hashlib.blake2b(identity.encode(), digest_size=16).digest()


class Seen:
    """The first place of every id of a source, and of every sample of all sources."""

    def __init__(self, database: sqlite3.Connection):
        self.database = database

    def first_id(self, source: int, identity: str, record: int) -> int | None:
        """The earlier record of the source with this id; None, and remembered, for a new one."""
        key = source.to_bytes(4, "big") + id_key(identity)
        found = self._first(key, (source, record))
        return found and found[1]

    def first_sample(self, key: bytes, place: Place) -> Place | None:
        """Where the sample was before; None, and remembered, for a new one."""
        return self._first(key, place)

    def _first(self, key: bytes, place: Place) -> Place | None:
        insert = "INSERT OR IGNORE INTO seen VALUES (?, ?, ?)"
        if self.database.execute(insert, (key, *place)).rowcount:
            return None
        select = "SELECT source, record FROM seen WHERE key = ?"
        return self.database.execute(select, (key,)).fetchone()


@contextmanager
def remembering() -> Iterator[Seen]:
    """A memory of what was seen, in a temporary file that only this process sees.

    Raises:
        DataError: the disk is full.
    """
    with closing(sqlite3.connect("", isolation_level=None)) as database:
        database.execute(f"PRAGMA cache_size = -{CACHE_KB}")
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("PRAGMA synchronous = OFF")
        table = "(key BLOB PRIMARY KEY, source INTEGER, record INTEGER) WITHOUT ROWID"
        database.execute(f"CREATE TABLE seen {table}")
        database.execute("BEGIN")
        try:
            yield Seen(database)
        except sqlite3.OperationalError as error:
            fix = "free some space, or set SQLITE_TMPDIR to a folder with more of it."
            what = f"the temporary file of ids and samples cannot be written: {error}."
            raise DataError("duplicates", what, fix) from None
