"""Tables of records: a parquet file, a `datasets` folder or a Hub dataset.

Image bytes stay in the memory-mapped table; a record carries a reference in their place.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import DataError
from .conversation import ImageReference

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

BATCH = 256
"""Rows read at a time; their image bytes are not."""

REFERENCE = "table://"
"""How a reference starts. No path does: paths are normalised to single slashes."""

_IMAGE_COLUMNS = ("image", "images")


@cache
def open_table(source: str) -> "datasets.Dataset":
    """The table, memory-mapped, its rows as Arrow; parquet goes through datasets' Arrow cache once.

    Args:
        source: A parquet file, a folder written by `save_to_disk`, or a Hub dataset
            `owner/name[:split]`, whose split is `train` unless named.

    Raises:
        DataError: it is missing or cannot be read as a table.
    """
    import datasets

    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return _load(source)
    finally:
        if bars:
            datasets.enable_progress_bars()


def _load(source: str) -> "datasets.Dataset":
    import datasets

    path = Path(source)
    try:
        if path.is_dir():
            loaded = datasets.load_from_disk(source)
        elif path.suffix == ".parquet":
            loaded = datasets.load_dataset("parquet", data_files=str(path), split="train")
        else:
            name, _, split = source.partition(":")
            loaded = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # datasets, its Arrow and the Hub client share no base class
        if path.is_dir():
            fix = "name a folder that datasets' save_to_disk wrote, or the files in it."
            raise DataError(str(path.absolute()), f"cannot be read: {_first(error)}", fix) from None
        if path.suffix == ".parquet" and not path.exists():
            fix = "check the path; it is relative to where you start."
            raise DataError(str(path.absolute()), "there is no such file.", fix) from None
        if path.suffix == ".parquet":
            fix = "write the file with pyarrow, pandas or datasets."
            raise DataError(str(path.absolute()), f"cannot be read: {_first(error)}", fix) from None
        raise DataError(
            source,
            f"is no file here, and the Hub gives no such dataset: {_first(error)}",
            "check the path, or the name and split of the dataset and the connection.",
        ) from None
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            splits = ", ".join(map(str, loaded))
            raise DataError(source, f"has splits {splits}.", "name the folder of one split.")
        loaded = loaded["train"]
    assert isinstance(loaded, datasets.Dataset)
    return loaded.with_format("arrow")


def table_records(source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(position, record)`, positions counted from 1, with references for image bytes."""
    dataset = open_table(source)
    for start in range(0, len(dataset), BATCH):
        table: Any = dataset[start : start + BATCH]
        kept = [name for name in table.column_names if name not in _IMAGE_COLUMNS]
        rows = table.select(kept).to_pylist()
        for column in set(table.column_names) - set(kept):
            images = table.column(column)
            for i, row in enumerate(rows):
                at = f"{REFERENCE}{source}#{start + i}.{column}"
                row[column] = _without_bytes(images[i], at)
        yield from enumerate(rows, start=start + 1)


def _without_bytes(value: Any, at: str) -> Any:
    """A path or a reference for an Arrow scalar that holds an image, or a list of those."""
    import pyarrow as pa

    if not value.is_valid:
        return None
    if pa.types.is_list(value.type) or pa.types.is_large_list(value.type):
        return [_without_bytes(element, f"{at}.{i}") for i, element in enumerate(value)]
    if _is_bytes(value.type):
        return ImageReference(at)
    if pa.types.is_struct(value.type) and {"bytes", "path"} <= set(value.keys()):
        return ImageReference(at) if value["bytes"].is_valid else value["path"].as_py()
    return value.as_py()


def read_image(reference: str) -> bytes:
    """The bytes that a reference, `table://SOURCE#ROW.COLUMN[.INDEX]`, stands for.

    Raises:
        LookupError: the table has no such row, column or image any more.
    """
    source, _, place = reference.removeprefix(REFERENCE).rpartition("#")
    row, column, *index = place.split(".")
    table: Any = open_table(source)[int(row)]
    value = table.column(column)[0]
    for i in index:
        value = value[int(i)]
    content = value if _is_bytes(value.type) else value["bytes"]
    if not content.is_valid:
        raise LookupError(reference)
    return content.as_py()


def _is_bytes(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _first(error: Exception) -> str:
    """The first line of a message, which datasets follows with pages of advice."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
