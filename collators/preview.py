"""What training sees of a sample, told from its prepared row: every token with its label, every
image as resized."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..data.boxes import check_boxes
from ..data.checks import check_text
from ..data.conversation import Conversation
from ..data.findings import Finding
from ..data.image_checks import inspect_media
from ..data.sources import Source
from ..models.ovis2_5.vision_ovis2_5 import Grid
from .pieces import Piece, pieces_of
from .rendering import IGNORE_INDEX
from .sample import SampleEncoder, Size, grids_of
from .sample_checks import check_sample


@dataclass(frozen=True)
class Medium:
    """An image or video that is left after the cut.

    Attributes:
        kind: `image` or `video`.
        file: The image or video, or the first frame taken of `video_frames`.
        width, height: Pixels of the file.
        resized_width, resized_height: Pixels that the model sees.
        grid: Frames, rows and columns of patches.
        tokens: Visual tokens, without the two that stand around them.
        frames: Images that the model sees; 1 for an image.
        total_frames: Frames of the video; 1 for an image.
    """

    kind: str
    file: str
    width: int
    height: int
    resized_width: int
    resized_height: int
    grid: tuple[int, int, int]
    tokens: int
    frames: int
    total_frames: int


@dataclass(frozen=True)
class RowPlace:
    """Where a sample lies among those that are packed together.

    Attributes:
        row: Number of the row in the first epoch, from 0.
        start: Tokens of the row before the sample.
        tokens: Tokens of the row.
        room: Tokens that the row may hold.
    """

    row: int
    start: int
    tokens: int
    room: int


@dataclass(frozen=True)
class Problem:
    """What `vlmtune validate` would say about the sample, as in `data.findings.Finding`."""

    code: str
    severity: str
    field: str
    what: str
    fix: str


@dataclass(frozen=True)
class Preview:
    """A sample as training sees it. The ids and labels of all pieces, one after another, are those
    of the batch.

    Attributes:
        index: Its number in the prepared data, from 0.
        source, record, id: Data file, 1-based position in it, and the record's id.
        length, trained_tokens: Tokens, and those that are learnt.
        cut: Tokens that the length limit took away.
        place: In a packed row; None without packing. Samples of a row follow one another.
    """

    index: int
    source: str
    record: int
    id: str
    length: int
    trained_tokens: int
    cut: int
    pieces: list[Piece]
    media: list[Medium]
    problems: list[Problem]
    place: RowPlace | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def preview_sample(
    encoder: SampleEncoder,
    source: Source,
    index: int,
    row: dict[str, Any],
    record: Any,
    place: RowPlace | None = None,
) -> Preview:
    """The preview of a row.

    Args:
        source, record: What the row was made of; for what stands in no row, sizes of files and
            problems.

    Raises:
        DataError: a file is gone, or has changed since it was checked.
    """
    conversation = source.parse(row["record"], record)
    sizes = encoder.check_files(conversation)
    ids, labels = encoder.ids_and_labels(row)
    if place is not None:  # as PackedCollator
        labels[:1] = IGNORE_INDEX
    return Preview(
        index=index,
        source=row["source"],
        record=row["record"],
        id=row["id"],
        length=len(ids),
        trained_tokens=int((labels != IGNORE_INDEX).sum()),
        cut=row["cut"],
        pieces=pieces_of(ids.tolist(), labels.tolist(), grids_of(row), encoder.processor),
        media=media_of(encoder, conversation, sizes, grids_of(row)),
        problems=list(problems_of(encoder, record, conversation)),
        place=place,
    )


def media_of(
    encoder: SampleEncoder,
    conversation: Conversation,
    sizes: Sequence[Size],
    grids: Sequence[Grid],
) -> list[Medium]:
    """The media that the cut has left, of which there are as many as `grids`."""
    images = encoder.processor.image_processor
    files = conversation.images or [conversation.video or ""]
    if frames := conversation.frames:
        files = [frames[encoder.taken(len(frames))[0]]]
    return [
        Medium(
            kind="image" if conversation.images else "video",
            file=file,
            width=width,
            height=height,
            resized_width=grid[2] * images.patch_size,
            resized_height=grid[1] * images.patch_size,
            grid=grid,
            tokens=images.visual_tokens(grid),
            frames=grid[0] * images.temporal_patch_size,
            total_frames=total,
        )
        for grid, file, (total, height, width) in zip(grids, files, sizes, strict=False)
    ]


def images_of(encoder: SampleEncoder, row: dict[str, Any]) -> list[Image.Image]:
    """The images that the model sees of a row, pixel by pixel: `Medium.frames` of each medium.

    Raises:
        DataError: a file is gone, or has changed since it was checked.
    """
    processor = encoder.processor.image_processor
    pixels = np.empty((row["patches"], processor.features), np.uint8)
    encoder.write_pixels(row, pixels)
    images, start = [], 0
    for grid in grids_of(row):
        stop = start + grid[0] * grid[1] * grid[2]
        images += processor.images_of(pixels[start:stop], grid)
        start = stop
    return images


def problems_of(
    encoder: SampleEncoder, record: Any, conversation: Conversation
) -> Iterator[Problem]:
    """What `vlmtune validate` with the config of this run finds in the sample by itself."""
    files, in_files = inspect_media(conversation)
    found = [*check_text(record, conversation), *in_files]
    if files is not None:
        found += check_boxes(record, conversation, files)
        found += check_sample(encoder, conversation, files)
    for error in found:
        finding = Finding.of(error, conversation.source, conversation.record, conversation.id)
        yield Problem(finding.code, finding.severity, finding.field, finding.what, finding.fix)
