"""Whether a merged folder is whole: its files, config and tensors against those of its base."""

import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.checkpoints import MERGE_FILE
from ..core.errors import ModelError
from .checkpoint import Checkpoint, fingerprint
from .merged_folder import kept_files

LOADED_FILES = (
    "*config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
    "*.tiktoken",
    "*.py",
)
"""What `from_pretrained` and serving engines read beside the weights."""

FREE_KEYS = frozenset(
    {"dtype", "torch_dtype", "transformers_version", "auto_map", "use_cache"}
    | {"_name_or_path", "_commit_hash", "_attn_implementation", "tie_word_embeddings"}
)
"""Keys of a config that may change without changing what the weights compute; whether the
embeddings are tied is checked with the tensors."""

ELEMENTS = 1 << 18
"""Of a tensor that are looked at together."""


def integrity_problems(base: Checkpoint, merged: Checkpoint) -> list[str]:
    """What is missing, too much or broken in a merged folder; nothing of a model is built, and of
    a tensor only a piece is in memory at a time."""
    return [
        *_origin(base, merged),
        *_files(base.folder, merged.folder),
        *(
            f"config.json: {key} is {new!r}, in the base {old!r}"
            for key, old, new in _differences(base.config.to_dict(), merged.config.to_dict())
        ),
        *_names_and_shapes(base, merged),
        *_not_finite(merged),
        *_not_copied(base, merged),
    ]


def read_merge_file(folder: Path) -> dict[str, Any]:
    """What `vlmtune merge` noted; empty for a merge by another tool.

    Raises:
        ModelError: the file is broken.
    """
    file = folder / MERGE_FILE
    try:
        return json.loads(file.read_text("utf-8")) if file.exists() else {}
    except ValueError:
        raise ModelError(str(file), "is not JSON", "merge again, or delete it") from None


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The elements in order, at most `ELEMENTS` at a time."""
    yield from tensor.reshape(-1).split(ELEMENTS)


def _origin(base: Checkpoint, merged: Checkpoint) -> Iterator[str]:
    made_of = read_merge_file(merged.folder).get("base", {})
    if made_of and made_of.get("fingerprint") != fingerprint(base):
        source = made_of["source"]
        yield f"it was merged onto {source}, whose weights are not those of {base.source}"


def _files(base: Path, merged: Path) -> Iterator[str]:
    # Another tool may have saved them anew; tokenizers are compared by what they do, too.
    compared = {"config.json"} if read_merge_file(merged) else {f.name for f in merged.iterdir()}
    for file in map(Path, kept_files(base)):
        if not any(fnmatch(file.name, pattern) for pattern in LOADED_FILES):
            continue
        copy = merged / file
        if not copy.is_file():
            yield f"{file} is missing"
        elif not copy.stat().st_size and (base / file).stat().st_size:
            yield f"{file} is empty"
        elif file.name not in compared and copy.read_bytes() != (base / file).read_bytes():
            yield f"{file} differs from the base's"


def _differences(
    old: dict[str, Any], new: dict[str, Any], path: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted((old.keys() | new.keys()) - FREE_KEYS):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{path}{key}.")
        elif before != after:
            yield f"{path}{key}", before, after


def ties(checkpoint: Checkpoint) -> set[frozenset[str]]:
    """Pairs of parameters with the same values."""
    return {frozenset(pair) for pair in checkpoint.tied.items()}


def untied(base: Checkpoint, merged: Checkpoint) -> frozenset[str]:
    """Parameters that share their values in the base and no longer do."""
    return frozenset().union(*(ties(base) - ties(merged)))


def _names_and_shapes(base: Checkpoint, merged: Checkpoint) -> Iterator[str]:
    have, shared = merged.places.keys(), ties(base) & ties(merged)
    optional = frozenset().union(*shared)
    needed = (base.places.keys() | untied(base, merged)) - optional
    # What is no parameter of its own: parts of fused ones, and what nothing reads.
    parts, copied = _others(base), _others(merged)
    missing = [*(needed - have), *(min(pair) for pair in shared if not pair & have)]
    missing += parts - copied if base.fused else ()
    for name in sorted(missing):
        yield f"tensor {name} is missing"
    for name in sorted([*(have - needed - optional), *(copied - parts)]):
        yield f"tensor {name} is not in the base"
    for name in sorted(base.places.keys() & have):
        shape, wanted = list(merged.places[name].shape), list(base.places[name].shape)
        if shape != wanted:
            yield f"tensor {name} has the shape {shape}, in the base {wanted}"


def _others(checkpoint: Checkpoint) -> set[str]:
    """Stored tensors that are not one parameter each."""
    parameters = {place.name for place in checkpoint.places.values()}
    return {name for header in checkpoint.headers.values() for name in header.tensors} - parameters


def _not_copied(base: Checkpoint, merged: Checkpoint) -> Iterator[str]:
    """What is no parameter of its own cannot be adapted, so it is the base's."""
    parameters = {name for name, _ in base.model.named_parameters()}
    buffers = {place.name for name, place in base.places.items() if name not in parameters}
    files = {name: shard for shard, header in merged.headers.items() for name in header.tensors}
    for shard, header in base.headers.items():
        for name in header.tensors.keys() & (_others(base) | buffers) & files.keys():
            old, new = base.read_entry(shard, name), merged.read_entry(files[name], name)
            same = old.shape == new.shape and all(
                torch.equal(a.to(b.dtype), b) for a, b in zip(pieces(old), pieces(new), strict=True)
            )
            if not same:
                yield f"tensor {name} differs from the base's, and no adapter can change it"


def _not_finite(merged: Checkpoint) -> Iterator[str]:
    for shard, header in merged.headers.items():
        for name in header.tensors:
            tensor = merged.read_entry(shard, name)
            bad = sum(int((~torch.isfinite(piece)).sum()) for piece in pieces(tensor))
            if bad:
                yield f"tensor {name} holds {bad:,} NaN or Inf"
