"""`vlmtune preview`: samples as the trainer will see them, token by token."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configs.load import COMMAND_LINE
from ..configs.schema import RunConfig
from ..core.errors import ConfigError
from ..core.logging import note, quiet_hosts, say
from .page import check_target
from .planned import check_flags, check_present, planned_config, title_of

if TYPE_CHECKING:
    import numpy as np

    from ..collators.sample import SampleEncoder
    from ..data.dataset import PreparedData
    from ..data.sources import Source

Chosen = dict[str, Any]
"""What `collators.preview.preview_sample` takes of one sample."""

FLAGS = ("--index", "--random", "--longest", "--html", "--json")


def main(argv: Sequence[str]) -> None:
    """Show what the words after `preview` ask for.

    Raises:
        VLMTuneError: the config, the data or a file is bad, there is no such sample, or the page
            cannot be written.
        SystemExit: 0 after `--help`, 2 for a flag without a proper value.
    """
    given, words = _parser().parse_known_args(argv)
    check_flags(words, FLAGS)
    config = planned_config(words)
    if given.html:
        check_target(given.html)
    _check_choice(config, given)
    check_present(config)
    for line in config.notes:
        note(line)
    quiet_hosts()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Imported here: it takes seconds, and load_config catches most mistakes before.
    from ..collators.preview import images_of, preview_sample
    from ..models.loading import load_processor
    from ..sft.data import sample_encoder

    encoder = sample_encoder(config, load_processor(str(config.model.model_path)))
    choose = _streamed if config.data.streaming else _prepared
    chosen = list(choose(config, encoder, given))
    previews = [preview_sample(encoder, **one) for one in chosen]
    if given.html:
        from .preview_page import write_page

        images = [images_of(encoder, one["row"]) for one in chosen]
        write_page(given.html, previews, images, f"Preview of {title_of(words)}")
        say(f"Wrote {given.html}")
    if given.json:
        _print(json.dumps([preview.to_dict() for preview in previews]))
    elif not given.html:
        from .preview_text import in_colour, lines

        width = shutil.get_terminal_size((100, 24)).columns
        _print("\n".join(lines(previews, width, in_colour())))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlmtune preview",
        usage="vlmtune preview CONFIG [--key value ...] [--index 0,5,17 | --random 5 | --longest 3]"
        "\n                       [--html OUT.html] [--json]",
        description="Show samples as the trainer will see them: every token, whether it is "
        "trained, and the images as resized. Reads the data and the tokenizer, no weights. CONFIG "
        "and keys are those of vlmtune train. With packing all samples of a row are shown, and "
        "numbers are those of the rows of the first epoch on one GPU.",
        epilog="More: docs/check.md",
        allow_abbrev=False,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--index",
        type=_numbers,
        default=[0],
        metavar="N,N",
        help="numbers of the samples, from 0 (default: 0)",
    )
    which.add_argument("--random", type=_count, metavar="N", help="N samples, others each time")
    which.add_argument(
        "--longest", type=_count, metavar="N", help="the N samples of most tokens, or fullest rows"
    )
    parser.add_argument(
        "--html", type=Path, metavar="OUT", help="write a page, with the images and every id"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def _numbers(text: str) -> list[int]:
    """Example: "0,5,17" is [0, 5, 17]."""
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f'"{text}" is not like 0,5,17')
    return list(dict.fromkeys(map(int, words)))


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f'"{text}" is not a number above 0')
    return int(text)


def _check_choice(config: RunConfig, given: argparse.Namespace) -> None:
    """Raises ConfigError for what cannot be chosen from, or read, without more work."""
    if not config.model.model_path:
        raise ConfigError(
            "llm_name_or_path, vit_name_or_path",
            "the model is built when the run begins, and a preview reads its tokenizer",
            "build it with vlmtune models build-ovis2_5, and give its folder as model_path",
        )
    if config.data.streaming and (given.random or given.longest):
        raise ConfigError(
            f"{COMMAND_LINE}, {'random' if given.random else 'longest'}",
            "a stream does not know its samples before it reads them",
            "give --index, which counts the records of the files, or --streaming false",
        )


def _streamed(
    config: RunConfig, encoder: "SampleEncoder", given: argparse.Namespace
) -> Iterator[Chosen]:
    """Records by their place in all files together."""
    sources = _sources(config)
    every = ((s, at, record) for s in sources for at, record in s.records())
    found: dict[int, Chosen] = {}
    count = 0
    for index, (source, at, record) in enumerate(every):
        count += 1
        if index in given.index:
            row = encoder.row(source.parse(at, record))
            found[index] = {"index": index, "row": row, "source": source, "record": record}
        if len(found) == len(given.index):
            break
    _check_indices(given.index, count, "record", len(found))
    yield from (found[index] for index in given.index)


def _prepared(
    config: RunConfig, encoder: "SampleEncoder", given: argparse.Namespace
) -> Iterator[Chosen]:
    """Samples, or those of packed rows, of the data that training uses."""
    from ..collators.preview import RowPlace
    from ..data.dataset import ArrowRows
    from ..sft.data import prepare

    sources = _sources(config)
    train = prepare(config, sources, encoder)
    if train.left_out:
        first = train.left_out[0]
        note(f"{len(train.left_out):,} left out, the first is {first['where']}: {first['what']}")
    lengths = train.column("length")
    places: list[RowPlace | None] = []
    if config.data.packing:
        groups, room = _rows(config, encoder, train)
        indices = []
        for row in _choice(groups.sums(lengths), given, "row"):
            start, total = 0, int(lengths[groups[row]].sum())
            for index in groups[row]:
                indices.append(index)
                places.append(RowPlace(row, start, total, room))
                start += int(lengths[index])
    else:
        indices = _choice(lengths, given, "sample")
        places = [None] * len(indices)
    rows = ArrowRows(train.dataset)
    records = _records(sources, train.sizes, {i: rows[i]["record"] for i in indices})
    for index, place in zip(indices, places, strict=True):
        source, record = records[index]
        row = rows[index]
        yield {"index": index, "row": row, "source": source, "record": record, "place": place}


def _sources(config: RunConfig) -> "list[Source]":
    from ..data.sources import resolve_sources

    data = config.data
    return resolve_sources(data.data_path, data.image_folder, data.datainfo)


def _rows(config: RunConfig, encoder: "SampleEncoder", train: "PreparedData"):
    """The first epoch's rows as one process takes them, and the tokens that one may hold."""
    from ..data.mixing import MixSampler, mix_weights
    from ..sft.arguments import planned_arguments
    from ..sft.batches import train_batches
    from ..sft.data import RunData, seed_of
    from ..sft.memory import meta_model
    from ..sft.rows import check_rows, plan_rows, row_bounds

    args, _ = planned_arguments(config, 1)
    names = [source.name for source in _sources(config)]
    weights = mix_weights(config.data.mix, names)
    sampler = MixSampler(train.sizes, weights, seed_of(args)) if config.data.mix else None
    data = RunData(encoder, train, {}, sampler)
    check_rows(config, data)
    model, _ = meta_model(config)
    batches = train_batches(args, data, plan_rows(config, model, data), 0, 1)
    return batches.order(0), row_bounds(config).tokens * args.per_device_train_batch_size


def _choice(tokens: "np.ndarray", given: argparse.Namespace, what: str) -> list[int]:
    """The numbers asked for, of samples or rows of so many tokens each."""
    import numpy as np

    if given.random:
        drawn = np.random.default_rng().permutation(len(tokens))[: given.random]
        return sorted(drawn.tolist())
    if given.longest:
        return np.argsort(-tokens, kind="stable")[: given.longest].tolist()
    known = [index for index in given.index if index < len(tokens)]
    _check_indices(given.index, len(tokens), what, len(known))
    return given.index


def _check_indices(indices: Sequence[int], count: int, what: str, found: int) -> None:
    if found < len(indices):
        raise ConfigError(
            f"{COMMAND_LINE}, index",
            f"there is no {max(indices)}: the data has {count:,} {what}{'' if count == 1 else 's'}",
            f"give numbers from 0 to {count - 1}" if count else "add records",
        )


def _records(
    sources: "Sequence[Source]", sizes: Sequence[int], wanted: dict[int, int]
) -> "dict[int, tuple[Source, Any]]":
    """Source and record of samples, read anew.

    Args:
        sizes: Samples of each source; they lie one source after another.
        wanted: Number of a sample -> the record's position in its source.
    """
    found: dict[int, tuple[Source, Any]] = {}
    start = 0
    for source, size in zip(sources, sizes, strict=True):
        here = {wanted[i]: i for i in wanted if start <= i < start + size}
        start += size
        last = max(here, default=0)
        for position, record in source.records() if here else ():
            if position in here:
                found[here[position]] = source, record
            if position >= last:
                break
    return found


def _print(text: str) -> None:
    """To stdout, also where that cannot hold a character."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    print(text)
