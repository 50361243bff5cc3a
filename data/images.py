"""Opening images and videos, with errors that name the record, and their pixel limits."""

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from PIL import Image, UnidentifiedImageError

from ..core.errors import DataError
from .tables import REFERENCE, read_image

# From twice this warning's limit on (179 million pixels) Pillow refuses an image, and so do we.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


JPEGS, JPEG_END = ("JPEG", "MPO"), b"\xff\xd9"


@dataclass(frozen=True)
class PixelLimits:
    """Smallest and largest area an image or frame is resized to, and how many frames are taken.

    A negative minimum of several images or a video means the single-image minimum; a negative
    maximum means the single-image maximum shared among them.

    Source: AIDC-AI/Ovis 2.5.0, `ConversationDataset`.
    """

    single_image_min_pixels: int
    single_image_max_pixels: int
    multiple_image_min_pixels: int
    multiple_image_max_pixels: int
    video_min_pixels: int
    video_max_pixels: int
    min_frames: int
    max_frames: int

    def for_images(self, count: int) -> tuple[int, int]:
        if count == 1:
            return self.single_image_min_pixels, self.single_image_max_pixels
        return self._shared(self.multiple_image_min_pixels, self.multiple_image_max_pixels, count)

    def for_video(self, frames: int) -> tuple[int, int]:
        return self._shared(self.video_min_pixels, self.video_max_pixels, frames)

    def _shared(self, low: int, high: int, count: int) -> tuple[int, int]:
        low = self.single_image_min_pixels if low < 0 else low
        high = max(low, self.single_image_max_pixels // count) if high < 0 else high
        return low, high


def open_image(path: str, where: str) -> Image.Image:
    """The image with its header read and its pixels not yet decoded.

    Args:
        path: A file, or a reference to an image in a table.

    Raises:
        DataError: missing, unreadable, of zero size, or huge.
    """
    try:
        if path.startswith(REFERENCE):
            return Image.open(io.BytesIO(read_image(path)))
        if not os.path.isfile(path) and not os.path.isdir(path) and os.path.exists(path):
            raise OSError("it is a pipe or a device")  # which could be waited for without end
        return Image.open(path)
    except DataError as error:  # the table is gone
        raise DataError(where, f"{error.where} {error.what}", error.fix, "image-missing") from None
    except LookupError:
        what, fix, code = "is not in the table any more", "start the run again", "image-missing"
    except FileNotFoundError:
        what, fix, code = (
            "does not exist",
            "check the path, and image_folder where it is relative",
            "image-missing",
        )
    except Image.DecompressionBombError:
        what, fix = "has too many pixels to be an honest image", "scale it down"
        code = "image-huge"
    except UnidentifiedImageError:
        empty = not _size_of(path)
        what = "is empty" if empty else "is no image Pillow can read"
        fix, code = "replace or remove it", "image-empty" if empty else "image-unreadable"
    except Exception as error:  # Pillow's plugins raise whatever their libraries do
        what, fix = f"cannot be opened: {error}", "replace or remove it"
        code = "image-unreadable"
    raise _bad(where, path, what, fix, code)


def _size_of(path: str) -> int:
    """Bytes of a file or of an image in a table."""
    return len(read_image(path)) if path.startswith(REFERENCE) else os.path.getsize(path)


def decode(image: Image.Image, path: str, where: str) -> Image.Image:
    """Read the pixels.

    Raises:
        DataError: the file is truncated or corrupt.
    """
    try:
        image.load()
    except Exception as error:  # as above
        what = f"is corrupt: {error}"
        raise _bad(where, path, what, "replace or remove it", "image-truncated") from None
    return image


def check_image(path: str, where: str, decode_whole: bool = False) -> tuple[int, int]:
    """Height and width from the header of a whole file.

    Args:
        decode_whole: Decode also a file that shows that it is whole: it may be broken inside.

    Raises:
        DataError: as `open_image` and `decode`.
    """
    with open_image(path, where) as image:
        size = image.height, image.width
        require_whole(image, path, where, decode_whole)
    return size


def require_whole(image: Image.Image, path: str, where: str, decode_whole: bool = False) -> None:
    """Look whether an opened file is whole; `image` may be closed by that.

    Raises:
        DataError: as `check_image`.
    """
    whole = _is_whole(image)
    if whole and not decode_whole:
        return
    with open_image(path, where) as image:
        # A JPEG is read to its end but built at an eighth of its size.
        image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
        decode(image, path, where)
        # Zeros, which a file system leaves at the end, are decoded as grey.
        if image.format in JPEGS and not whole:
            what = "is corrupt: it has no end"
            raise _bad(where, path, what, "replace or remove it", "image-truncated")


def _is_whole(image: Image.Image) -> bool:
    """Whether an opened file shows that nothing is missing: a JPEG by its end, a PNG by its
    checksums. Other formats do not."""
    file: Any = getattr(image, "fp", None)
    try:
        if image.format in JPEGS:
            pixels = file.tell()
            file.seek(-2, os.SEEK_END)
            if file.read() == JPEG_END:
                return True
            file.seek(pixels)  # something may follow the end
            return JPEG_END in file.read()
        if image.format == "PNG":
            image.verify()
            return True
    except Exception:  # `decode` will tell
        pass
    return False


def frame_indices(total: int, min_frames: int, max_frames: int) -> list[int]:
    """Which of `total` frames are taken: all within the bounds, else evenly spaced ones.

    Source: AIDC-AI/Ovis 2.5.0, training sampler.
    """
    if min_frames <= total <= max_frames:
        return list(range(total))
    count = min_frames if total < min_frames else max_frames
    stride = total / count
    return [
        min(total - 1, (round(stride * i) + round(stride * (i + 1))) // 2) for i in range(count)
    ]


def check_video(path: str, where: str) -> tuple[int, int, int]:
    """Number of frames, height and width of a video file, without decoding it.

    Raises:
        DataError: PyAV is missing, or the file has no readable video.
    """
    with _video(path, where) as container:
        stream = container.streams.video[0]
        frames = sum(1 for p in container.demux(stream) if p.size and not p.is_discard)
        codec = stream.codec_context
        if not frames or codec is None or not codec.height:
            raise _unreadable(where, path, "has no video frames")
        return frames, codec.height, codec.width


def read_video(path: str, where: str, indices: Sequence[int]) -> Iterator[Image.Image]:
    """The frames at `indices`, each decoded when it is asked for.

    Args:
        indices: They may repeat and do not fall.

    Raises:
        DataError: as `check_video`, or the video is shorter than announced.
    """
    with _video(path, where) as container:
        frames, position, frame = container.decode(video=0), -1, None
        for index in indices:
            if index > position:
                frame = next(islice(frames, index - position - 1, None), None)
                position = index
            if frame is None:
                raise _unreadable(where, path, f"ends before frame {index}")
            yield frame.to_image()


@contextmanager
def _video(path: str, where: str) -> Iterator[Any]:
    """An open container; what goes wrong inside is a DataError."""
    try:
        import av
    except ImportError:
        raise DataError(
            where,
            f"{path} is a video file, and PyAV, which decodes it, is not installed.",
            'run: pip install "vlmtune[video]", or give "video_frames".',
        ) from None
    try:
        container = av.open(path)
    except Exception as error:  # FFmpeg's errors have no common base but this
        code = "video-unreadable" if os.path.exists(path) else "video-missing"
        what = f"cannot be opened: {error}"
        raise _bad(where, path, what, "check the path and file", code) from None
    with container:
        if not container.streams.video:
            raise _unreadable(where, path, "has no video stream")
        try:
            yield container
        except DataError:
            raise
        except Exception as error:
            raise _unreadable(where, path, f"cannot be decoded: {error}") from None


def _unreadable(where: str, path: str, what: str) -> DataError:
    return _bad(where, path, what, "replace or remove it", "video-unreadable")


def _bad(where: str, path: str, what: str, fix: str, code: str) -> DataError:
    return DataError(where, f"{path} {what}.", f"{fix}.", code)
