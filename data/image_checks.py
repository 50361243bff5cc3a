"""What validation finds in the media files of a record."""

import os
from functools import partial
from typing import Any

from PIL import ExifTags, Image

from ..core.errors import DataError
from .conversation import Conversation
from .images import JPEGS, check_video, open_image, read_video, require_whole

MAX_ASPECT = 200
"""Beyond this a side is stretched when the image is resized. Source: Qwen2-VL, `smart_resize`."""

WIDE_MODES = ("I", "F")
"""Pillow's modes of more than 8 bits, `I;16` among the first; colour is read as 8 bits at once."""

TURNED = range(2, 9)
"""EXIF orientations of an image that is not as it is stored; cameras write 0 too, which is none."""


def inspect_media(
    conversation: Conversation, decode: bool = False
) -> tuple[list[tuple[int, int, int]] | None, list[DataError]]:
    """Look at every image, frame and video of a record.

    Args:
        decode: Decode each of them to its end.

    Returns:
        Frames, height and width of each file, in the order of `media_files`, or None where one
        of them has none to tell; and what was found.
    """
    sizes, found = [], []
    for field, files in (("image", conversation.images), ("video_frames", conversation.frames)):
        for file in files:
            size, errors = inspect_image(file, conversation.where(field), decode)
            sizes.append(size and (1, *size))
            found += errors
    if conversation.video:
        size, errors = inspect_video(conversation.video, conversation.where("video"), decode)
        sizes.append(size)
        found += errors
    return (None if None in sizes else sizes), found


def inspect_image(
    path: str, where: str, decode: bool = False
) -> tuple[tuple[int, int] | None, list[DataError]]:
    """Everything to be told of an image file, or of an image in a table.

    Args:
        decode: Decode also a file that shows that it is whole: it may be broken inside.

    Returns:
        Height and width as training sees them, None where it refuses the file; and what was found.
    """
    try:
        with open_image(path, where) as image:
            size = image.height, image.width
            found = _suspicious(image, path, where)
            require_whole(image, path, where, decode)
    except DataError as error:
        return None, [error]
    return size, found


def inspect_video(
    path: str, where: str, decode: bool = False
) -> tuple[tuple[int, int, int] | None, list[DataError]]:
    """Frames, height and width of a video file; without PyAV only whether the file is there."""
    fault = partial(DataError, where)
    if not os.path.exists(path):
        fix = "check the path, and image_folder where it is relative."
        return None, [fault(f"{path} does not exist.", fix, "video-missing")]
    if not os.path.isfile(path) or not os.path.getsize(path):
        fix = "replace or remove it."
        return None, [fault(f"{path} is no file, or an empty one.", fix, "video-unreadable")]
    if not can_open_videos():
        return None, []
    try:
        size = check_video(path, where)
        if decode:
            for _ in read_video(path, where, range(size[0])):
                pass
    except DataError as error:
        return None, [error]
    return size, []


def can_open_videos() -> bool:
    try:
        import av  # noqa: F401
    except ImportError:
        return False
    return True


def _suspicious(image: Image.Image, path: str, where: str) -> list[DataError]:
    """What an opened image's header tells."""
    found = []

    def tell(code: str, what: str, fix: str) -> None:
        found.append(DataError(where, f"{path} {what}.", f"{fix}.", code))

    width, height = image.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        what = f"is {width} x {height}: one side is over {MAX_ASPECT} times the other"
        tell("image-aspect", what, "crop or split it, or remove the record")
    if (frames := _frames(image)) > 1:
        what = f"has {frames} frames, and only the first one is used"
        tell("image-animated", what, 'keep one frame, or list the frames in "video_frames"')
    if image.mode == "CMYK":
        what = "is CMYK, and is converted to RGB without its colour profile"
        tell("image-cmyk", what, "convert it to RGB with its profile")
    if image.mode.startswith(WIDE_MODES):
        what = "has more than 8 bits per pixel, and what is above 255 becomes white"
        tell("image-16bit", what, "scale it to 8 bits")
    if (turned := _orientation(image)) in TURNED:
        what = f"is to be turned by EXIF (orientation {turned}), and is used as it is stored"
        tell("image-rotated", what, "turn its pixels: PIL.ImageOps.exif_transpose")
    return found


def _frames(image: Any) -> int:
    """Of an animation or of pages; the further pictures of a camera's JPEG are its previews."""
    if image.format in JPEGS:
        return 1
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # the whole file is looked at for it, and `require_whole` tells what is wrong
        return 1


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow turns it as it decodes it
        return 1
    try:
        # A PNG's own method decodes the pixels first, for what may follow them.
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken header has no orientation
        return 1
