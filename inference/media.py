"""Images and videos of a request, from wherever they are given, as training reads them."""

import base64
import io
import os
import re
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from string import punctuation
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, unquote_to_bytes

from PIL import Image

from .. import __version__
from ..core.errors import DataError
from ..data.images import (
    JPEG_END,
    JPEGS,
    PixelLimits,
    check_video,
    decode,
    frame_indices,
    open_image,
    read_video,
)
from ..data.tables import REFERENCE

ImageSource = str | Path | bytes | Image.Image
"""A path, a reference into a table (`data.tables`), an `http://`, `https://` or `data:` URL, the
bytes of a file, or an image."""

Video = str | Path | Sequence[ImageSource]
"""A video file, or its frames."""

SILENCE, PATIENCE = 10.0, 60.0
"""Seconds that a server may be silent, and that a download may take in all."""

LARGEST = 100 << 20
"""Bytes of a download; an image of Pillow's limit is smaller in any compressed format."""

_CHUNK = 1 << 16
_SHOWN = 200
_SCHEME = re.compile(r"(data:|[a-z][a-z0-9+.-]*://)", re.IGNORECASE)


def open_picture(
    source: ImageSource, where: str, before: Callable[[Image.Image], None] | None = None
) -> Image.Image:
    """The image, decoded; it is not turned as its EXIF data may ask.

    Args:
        before: Called with the image before its pixels are decoded; an image that was given as
            such is decoded by then.

    Raises:
        DataError: it is no `ImageSource`, cannot be fetched or read, or is truncated, of zero size
            or huge.
    """
    given, source = source, fetched(source, where)
    name = _named(given)
    if isinstance(source, Image.Image):
        image = decode(source, name, where)
    elif isinstance(source, bytes):
        image = _of_bytes(source, name, where)
    else:
        image = open_image(name, where)
    if not image.width or not image.height:
        raise DataError(where, f"{name} has no pixels.", "replace or remove it.")
    if before:
        before(image)
    whole = image.format not in JPEGS or _has_end(image)
    decode(image, name, where)
    if not whole:  # zeros, which a file system leaves at the end, are decoded as grey
        raise DataError(where, f"{name} is corrupt: it has no end.", "replace or remove it.")
    return image


def fetched(source: ImageSource, where: str) -> str | bytes | Image.Image:
    """The source itself; of a URL the bytes it stands for.

    Raises:
        DataError: the URL cannot be fetched, or it is no `ImageSource`.
    """
    if isinstance(source, bytes | Image.Image):
        return source
    if not isinstance(source, str | Path):
        what = f"{type(source).__name__} is no image."
        raise DataError(where, what, "give a path, a URL, bytes or an image of Pillow.")
    text = str(source)
    scheme = _SCHEME.match(text)
    if not text:
        raise DataError(where, '"" is no path.', "write the path of a file.")
    if scheme is None or text.startswith(REFERENCE):
        return text
    if scheme[1].lower() == "data:":
        return _of_data_url(text, where)
    if scheme[1].lower() in ("http://", "https://"):
        return _downloaded(text, where)
    what = f"{_named(text)} is of a kind of URL that is not fetched."
    raise DataError(where, what, "give http://, https:// or data:, or a path.")


def listed(images: ImageSource | Sequence[ImageSource]) -> list[ImageSource]:
    """One image or several as a list."""
    return [images] if isinstance(images, ImageSource) else list(images)


def frames_of(video: Video, limits: PixelLimits, where: str) -> list[tuple[str, ImageSource]]:
    """The frames that the model sees, each with its place for messages; those of a file are
    decoded, others are not opened yet.

    Raises:
        DataError: the file cannot be read, PyAV is missing, or there are no frames.
    """

    def taken(total: int) -> list[int]:
        return frame_indices(total, limits.min_frames, limits.max_frames)

    if isinstance(video, str | Path):
        file = os.path.expanduser(video)
        if _SCHEME.match(file):
            what = f"{file} is a URL, and videos are read from files."
            raise DataError(where, what, "download it, and give its path.")
        total, _, _ = check_video(file, where)
        return [(where, frame) for frame in read_video(file, where, taken(total))]
    if not video:
        raise DataError(where, "has no frames.", "give a file, or one frame at least.")
    return [(f"{where}, frame {i + 1}", video[i]) for i in taken(len(video))]


def _named(source: ImageSource) -> str:
    """The source in messages; a path as it is opened."""
    if isinstance(source, Image.Image):
        return "the image"
    if isinstance(source, bytes):
        return f"the image of {len(source):,} bytes"
    if isinstance(source, str) and _SCHEME.match(source) and not source.startswith(REFERENCE):
        return source if len(source) <= _SHOWN else f"{source[:_SHOWN]}..."
    return os.path.expanduser(source)


def _of_bytes(content: bytes, name: str, where: str) -> Image.Image:
    if not content:
        raise DataError(where, f"{name} is empty.", "replace or remove it.")
    try:
        return Image.open(io.BytesIO(content))
    except Image.DecompressionBombError:
        what = f"{name} has too many pixels to be an honest image."
        raise DataError(where, what, "scale it down.") from None
    except Exception:  # Pillow's plugins raise whatever their libraries do
        page = content.lstrip()[:9].lower().startswith((b"<!doctype", b"<html"))
        what = f"{name} is {'a web page' if page else 'no image Pillow can read'}."
        raise DataError(where, what, "replace or remove it.") from None


def _has_end(image: Image.Image) -> bool:
    """Whether an opened JPEG, which stands where its pixels begin, has an end behind them."""
    file: Any = getattr(image, "fp", None)
    if file is None:  # decoded already
        return True
    pixels = file.tell()
    content = file.read()
    file.seek(pixels)
    return JPEG_END in content


def _of_data_url(url: str, where: str) -> bytes:
    head, comma, content = url.partition(",")
    data = unquote_to_bytes(content)
    if not head.lower().endswith(";base64") and comma:
        return data
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except ValueError as error:
        what = f"{_named(url)} cannot be read: {error}."
        raise DataError(where, what, 'write "data:image/png;base64," and the file.') from None


def _downloaded(url: str, where: str) -> bytes:
    opener = urllib.request.OpenerDirector()
    for handler in (  # none of ftp: and file:, where a server may send us on to
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    opener.addheaders = [("User-Agent", f"vlmtune/{__version__}")]
    start = time.monotonic()
    content = bytearray()
    try:
        with opener.open(quote(url, safe=punctuation), timeout=SILENCE) as response:
            while chunk := response.read1(_CHUNK):
                content += chunk
                if len(content) > LARGEST:
                    reason = f"it is larger than {LARGEST:,} bytes"
                    break
                if time.monotonic() - start > PATIENCE:
                    reason = f"it takes longer than {PATIENCE:g} seconds"
                    break
            else:
                return bytes(content)
    except HTTPError as error:
        reason = f"the server says {error.code} {error.reason}"
        error.close()
    except TimeoutError:
        reason = f"the server is silent for {SILENCE:g} seconds"
    except Exception as error:  # of sockets, of TLS, of HTTP, and of URLs that are none
        cause = getattr(error, "reason", error)
        timed_out = isinstance(cause, TimeoutError)
        reason = f"the server is silent for {SILENCE:g} seconds" if timed_out else str(cause)
    raise DataError(where, f"{url} cannot be fetched: {reason}.", "check the URL and connection.")
