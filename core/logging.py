"""Lines for the user. Rank 0 speaks; the other ranks stay silent."""

import logging
import sys
import warnings

from .distributed import rank


def say(line: str = "") -> None:
    """Print one line to stderr on rank 0, so stdout stays free for results."""
    if rank() == 0:
        print(line, file=sys.stderr, flush=True)


def note(line: str) -> None:
    """Print a one-line note about something accepted but changed or without effect."""
    say(f"note: {line}")


def quiet_hosts() -> None:
    """Silence host libraries' start-up lines about unused parts, and about each other."""
    # PEFT 0.21 asks transformers 5.23 by an old name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
