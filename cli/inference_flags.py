"""Flags of the commands that load a model and let it answer, and what they name."""

import argparse
import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configs.load import COMMAND_LINE
from ..core.checkpoints import require_model
from ..core.distributed import launched_by_torchrun, local_rank, rank
from ..core.errors import ConfigError, ModelError
from ..core.logging import quiet_hosts
from ..data.sources import Source
from ..inference.sampling import DRAWN, Sampling

if TYPE_CHECKING:
    from ..inference.tools import Tool
    from ..inference.vlm import VLMInference

PLACES, BLOCK = 512, 4096
"""A weight file is known by so many blocks of so many bytes: one of them lies in any stretch of a
512th of it."""


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        required=True,
        metavar="M",
        help="folder or Hub name; an adapter's folder loads its base with the adapter",
    )
    group.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="A[:WEIGHT]",
        help="PEFT folder or Hub name on top of it, with a weight (default: 1); again for several, "
        "whose sum is added",
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights (default: that of the folder on a GPU, float32 on a CPU)",
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    group.add_argument("--load_in_4bit", action="store_true", help="weights of 4 bits (NF4)")
    group.add_argument(
        "--attn_implementation", metavar="NAME", help="sdpa, flash_attention_2, eager, ..."
    )
    group.add_argument(
        "--min_pixels",
        type=int,
        metavar="N",
        help="smaller images are enlarged to this (default: as it was trained, else 448 * 448)",
    )
    group.add_argument(
        "--max_pixels",
        type=int,
        metavar="N",
        help="larger ones are reduced to this (default: as it was trained, else 1792 * 1792, with "
        "several images or a video 896 * 896)",
    )


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """`given.thinking` is None where neither of its two flags is given."""
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--thinking",
        action="store_true",
        default=None,
        help="let the model write a thought before its answer",
    )
    group.add_argument("--no_thinking", dest="thinking", action="store_false", help="do not")
    group.add_argument(
        "--thinking_budget",
        type=int,
        metavar="N",
        help="tokens after which a thought is closed (default: no limit)",
    )
    group.add_argument(
        "--max_new_tokens",
        type=int,
        default=1024,
        metavar="N",
        help="most tokens of an answer, its thought included (default: 1024)",
    )
    group.add_argument(
        "--do_sample",
        action="store_true",
        help="draw tokens instead of taking the likeliest; the next three imply it",
    )
    group.add_argument("--temperature", type=float, metavar="T")
    group.add_argument("--top_p", type=float, metavar="P")
    group.add_argument("--top_k", type=int, metavar="K")
    group.add_argument("--repetition_penalty", type=float, metavar="R")
    group.add_argument("--seed", type=int, metavar="N", help="of the drawing")


def add_tools_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tools", nargs="+", choices=("crop",), default=[], help="what the model may call"
    )


def check_model(given: argparse.Namespace) -> None:
    """See that what is named can be there, without importing torch, which takes seconds.

    Raises:
        ModelError: a folder is missing.
        ConfigError: the pixel limits exclude each other.
    """
    require_model(given.model)
    for adapter in map(_path_of, given.adapter):
        try:
            require_model(adapter)
        except ModelError as error:
            where, fix = f"adapter {Path(adapter).resolve()}", "give a PEFT folder, or a Hub name"
            raise ModelError(where, error.what, fix) from None
    least, most = given.min_pixels, given.max_pixels
    for flag, value in (("min_pixels", least), ("max_pixels", most)):
        if value is not None and value < 1:
            raise ConfigError(f"{COMMAND_LINE}, {flag}", f"{value} is below 1", "give 1 or more")
    if least and most and least > most:
        raise ConfigError(
            f"{COMMAND_LINE}, min_pixels",
            f"{least} is more than max_pixels, {most}",
            "give a smaller one, or leave one of them out",
        )


def load_inference(given: argparse.Namespace) -> "VLMInference":
    """The model that the flags name; under torchrun on the GPU of this process.

    Raises:
        ModelError, ConfigError: as `check_model`, or it cannot be loaded.
    """
    check_model(given)
    quiet_hosts()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Imported here: it takes seconds, and the checks above catch most mistakes before.
    import torch

    from ..inference.vlm import VLMInference

    hide_bars()
    device = given.device
    if device is None and launched_by_torchrun() and torch.cuda.is_available():
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if processes > gpus:
            what = f"torchrun has started {processes} processes where there are GPUs for {gpus}"
            raise ConfigError("device", what, "start fewer, or give --device cpu")
        torch.cuda.set_device(local_rank())
        device = f"cuda:{local_rank()}"
    return VLMInference(
        given.model,
        given.adapter or None,
        dtype=given.dtype,
        device=device,
        load_in_4bit=given.load_in_4bit,
        attn_implementation=given.attn_implementation,
        min_pixels=given.min_pixels,
        max_pixels=given.max_pixels,
    )


def hide_bars() -> None:
    """No bar of loading weights but on a terminal, for one process."""
    from transformers.utils.logging import disable_progress_bar

    if rank() or not sys.stderr.isatty():
        disable_progress_bar()


def sampling_of(given: argparse.Namespace) -> Sampling:
    """Raises ConfigError for values that cannot be, or that exclude each other."""
    return Sampling(
        max_new_tokens=given.max_new_tokens,
        do_sample=given.do_sample or any(getattr(given, key) is not None for key in DRAWN),
        temperature=given.temperature,
        top_p=given.top_p,
        top_k=given.top_k,
        repetition_penalty=given.repetition_penalty,
        thinking_budget=given.thinking_budget,
        seed=given.seed,
    )


def check_budget(given: argparse.Namespace) -> None:
    """Raises ConfigError for a budget of thoughts where `--no_thinking` says for good that there
    are none."""
    if given.thinking_budget and given.thinking is False:
        raise ConfigError(
            f"{COMMAND_LINE}, thinking_budget",
            "has no effect with --no_thinking",
            "keep one of them",
        )


def tools_of(given: argparse.Namespace) -> "list[Tool]":
    """What `--tools` names."""
    from ..inference.tools import TOOLS  # imported late, as torch is

    return [TOOLS[name] for name in given.tools]


def answer_settings(given: argparse.Namespace, sources: Sequence[Source]) -> dict[str, Any]:
    """What answers to the records of these sources depend on, as `inference.files` keeps it.

    Raises:
        DataError: a source cannot be read.
    """
    keys = ("model", "adapter", "dtype", "load_in_4bit", "attn_implementation", "min_pixels")
    settings = {key: getattr(given, key) for key in (*keys, "max_pixels", "thinking")}
    settings |= asdict(sampling_of(given))
    for path in (given.model, *map(_path_of, given.adapter)):
        settings[f"fingerprint of {path}"] = _weights_fingerprint(Path(path))
    for source in sources:
        settings[f"fingerprint of {source.path}"] = source.fingerprint()[:12]
    return settings


def _weights_fingerprint(folder: Path) -> str | None:
    """Changes when a model is trained anew; None for what is no folder here."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for i in range(PLACES):
                file.seek(max(0, size - BLOCK) * i // (PLACES - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:12]


def _path_of(adapter: str) -> str:
    """Without its weight, as `lora.adapter.parse_adapter` reads it."""
    path, colon, weight = adapter.rpartition(":")
    if not colon or Path(adapter).exists():
        return adapter
    try:
        float(weight)
    except ValueError:
        return adapter
    return path
