"""Safetensors files by their bytes: 8 bytes of header length, a JSON header, tensors."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import ModelError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Of safetensors files; the others it knows hold quantised or complex numbers."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a safetensors file: its bytes are `[start, stop)` after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of its tensors, in the order it says it.

    Attributes:
        begin: Where the header ends and the tensors begin, in bytes from the file's start.
    """

    begin: int
    metadata: dict[str, str]
    tensors: dict[str, Entry]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.begin + max((entry.stop for entry in self.tensors.values()), default=0)

    def serialized(self) -> bytes:
        """The header's bytes; `begin` is their number."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        said: dict[str, object] = {"__metadata__": self.metadata} if self.metadata else {}
        for name, entry in self.tensors.items():
            said[name] = {
                "dtype": names[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [entry.start, entry.stop],
            }
        text = json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # tensors begin aligned
        return len(text).to_bytes(8, "little") + text


def read_header(file: Path) -> Header:
    """The header of a safetensors file: 8 bytes of length, then JSON.

    Raises:
        ModelError: the file cannot be read, is no safetensors file, was not written to its end, or
            holds quantised numbers.
    """
    again = "download or save it again"
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > size - 8:
                raise ModelError(
                    str(file),
                    f"is cut short or no safetensors file: it has {size:,} bytes, less than its "
                    "header",
                    again,
                )
            said = json.loads(opened.read(length))
        metadata = said.pop("__metadata__", {})
        entries = {name: (v["dtype"], v["shape"], *v["data_offsets"]) for name, v in said.items()}
        end = max((stop for *_, stop in entries.values()), default=0)
    except OSError as error:
        raise ModelError(str(file), f"cannot be read: {error.strerror}", again) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(str(file), "is no safetensors file", again) from None
    if size < 8 + length + end:
        raise ModelError(
            str(file), f"is cut short: it has {size:,} of {8 + length + end:,} bytes", again
        )
    tensors = {}
    for name, (dtype, shape, start, stop) in entries.items():
        if dtype not in DTYPES:
            raise ModelError(
                str(file),
                f"holds {name} in {dtype}, a quantised type",
                "name the model in float32, bfloat16 or float16",
            )
        tensors[name] = Entry(DTYPES[dtype], tuple(shape), start, stop)
    return Header(8 + length, metadata, tensors)


def map_file(file: Path) -> Tensor:
    """uint8 `[bytes]`: the file's pages, read when they are looked at."""
    return torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)


def mapped(pages: Tensor, header: Header, name: str) -> Tensor:
    """A tensor of a mapped file."""
    entry = header.tensors[name]
    piece = pages[header.begin + entry.start : header.begin + entry.stop]
    if piece.storage_offset() % entry.dtype.itemsize:
        piece = piece.clone()
    return piece.view(entry.dtype).view(entry.shape)
