"""Boxes and points written into text, as grounding data writes them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import DataError
from .conversation import Conversation
from .turns import text_place

_TAGGED = re.compile(r"<(box|point)>([^<]*)</\1>")
_NUMBER = r"\s*+(-?\d++(?:\.\d++)?)\s*+"
_PAIR = rf"[(\[]?{_NUMBER},{_NUMBER}[)\]]?\s*+"
_POINT = re.compile(rf"\s*+{_PAIR}")
_BOX = re.compile(rf"\s*+(?:\[\s*+)?{_PAIR},\s*+{_PAIR}(?:\]\s*+)?")

SCALE = 1000
"""Coordinates up to 1 are shares of the image's sides, up to this thousandths or pixels, which
cannot be told apart; larger ones are pixels."""


@dataclass(frozen=True)
class Box:
    """A box or a point in text.

    Attributes:
        start, stop: Bounds of the tag in the text.
        coordinates: x1, y1, x2, y2 of a box, x, y of a point, as written.
    """

    start: int
    stop: int
    coordinates: tuple[float, ...]


def find_boxes(text: str) -> list[Box]:
    """The boxes and points of a text, in order.

    Known are `<box>x1,y1,x2,y2</box>`, `<box>(x1,y1),(x2,y2)</box>`, `<point>x,y</point>` and
    `<point>(x,y)</point>`, with brackets of either kind; other text in such tags is no box.
    """
    found = []
    for tag in _TAGGED.finditer(text):
        form = _BOX if tag[1] == "box" else _POINT
        if written := form.fullmatch(tag[2]):
            found.append(Box(*tag.span(), tuple(map(float, written.groups()))))
    return found


def check_boxes(
    record: dict[str, Any], conversation: Conversation, sizes: Sequence[tuple[int, int, int]]
) -> list[DataError]:
    """Boxes whose corners are swapped, or that leave every image of the record.

    Args:
        conversation: What `read_conversation` read of the record.
        sizes: Frames, height and width of the media.
    """
    found = []
    for i, turn in enumerate(conversation.turns):
        for box in find_boxes(turn.text) if "</" in turn.text else ():
            where = conversation.where(text_place(record, conversation.turns, i))
            tag = turn.text[box.start : box.stop]
            x1, y1, x2, y2 = (*box.coordinates, *box.coordinates)[:4]
            if x2 < x1 or y2 < y1:
                what = f"{tag} does not run from its upper left to its lower right corner."
                fix = "write x1,y1,x2,y2 with x1 <= x2 and y1 <= y2."
                found.append(DataError(where, what, fix, "box-inverted"))
            low, high = min(box.coordinates), max(box.coordinates)
            inside = any(max(x1, x2) <= w and max(y1, y2) <= h for _, h, w in sizes)
            if low < 0 or (high > SCALE and sizes and not inside):
                shown = " and ".join(f"{w} x {h}" for _, h, w in sizes)
                what = f"{tag} lies outside the image" + (f" of {shown} pixels." if shown else ".")
                fix = "write pixels of the image as it is stored, thousandths or shares of it."
                found.append(DataError(where, what, fix, "box-outside"))
    return found
