"""The data of a run: settings, processor and files to checked samples."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import datasets

from ..collators.rendering import Thinking
from ..collators.sample import SampleEncoder
from ..configs.schema import RunConfig
from ..core.distributed import rank, world_size
from ..core.errors import ConfigError, DataError
from ..core.logging import say
from ..data.dataset import PreparedData, prepare_dataset
from ..data.images import PixelLimits
from ..data.mixing import MixSampler, mix_weights
from ..data.sources import Source, resolve_sources
from ..data.stream import RecordStream
from ..models import Ovis2_5Processor

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from trl.trainer.sft_config import SFTConfig

LEDGER_FILE = "bad_samples.jsonl"


@dataclass(frozen=True)
class RunData:
    """What a run trains and evaluates on; an unnamed evaluation set has the name "".

    Attributes:
        train: The training samples, or None where they are streamed.
        sampler: Their indices by epoch where `mix` is given.
        stream: Micro-batches of this process where the training data is streamed.
    """

    encoder: SampleEncoder
    train: PreparedData | None
    evaluation: dict[str, PreparedData]
    sampler: MixSampler | None = None
    stream: RecordStream | None = None

    def for_host(self) -> datasets.Dataset | datasets.IterableDataset:
        """What the host's constructor sees; our loaders read the rows."""
        if self.stream is not None:
            return self.stream.for_host()
        assert self.train is not None
        return self.train.dataset


def load_data(config: RunConfig, args: "SFTConfig", processor: Ovis2_5Processor) -> RunData:
    """The checked data of a run, with samples that were left out in the ledger.

    Raises:
        ConfigError: `datainfo`, `mix` or `streaming` does not fit.
        DataError: a file or sample is bad.
    """
    encoder = sample_encoder(config, processor)
    data, folder = config.data, Path(args.output_dir or ".")
    sources = resolve_sources(data.data_path, data.image_folder, data.datainfo)
    weights = mix_weights(data.mix, [source.name for source in sources])
    train = sampler = stream = None
    if data.streaming:
        stream = record_stream(config, args, sources, encoder, folder / LEDGER_FILE)
    else:
        train = prepare(config, sources, encoder)
        sampler = MixSampler(train.sizes, weights, seed_of(args)) if data.mix else None
        say_counts(sources, weights, train, sampler)
    evaluation = {}
    for name, paths in data.eval_sets.items():
        evaluated = resolve_sources(paths, data.image_folder, data.datainfo)
        evaluation[name] = prepare(config, evaluated, encoder)
    # A resumed stream goes on with its ledger.
    training = config.training.get("do_train", True)
    if rank() == 0 and training and not (stream and args.resume_from_checkpoint):
        prepared = [*([train] if train else []), *evaluation.values()]
        write_ledger(folder, [entry for data in prepared for entry in data.left_out])
    return RunData(encoder, train, evaluation, sampler, stream)


def write_ledger(folder: Path, left_out: list[dict[str, Any]]) -> None:
    """Each sample left out, with its reason, one object per line."""
    path = folder / LEDGER_FILE
    if not left_out:
        path.unlink(missing_ok=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in left_out)
    path.write_text(lines, "utf-8", errors="backslashreplace")


def seed_of(args: "TrainingArguments") -> int:
    return args.seed if args.data_seed is None else args.data_seed


def say_counts(
    sources: Sequence[Source],
    weights: Sequence[float],
    train: PreparedData,
    sampler: MixSampler | None,
) -> None:
    """A line for each set: its samples, passes and samples per epoch."""
    if len(sources) == 1 and sampler is None:
        return
    if sampler is not None and not len(sampler):
        raise ConfigError("mix", "no sample is drawn in an epoch", "raise a number of passes")
    width = max(len(source.name) for source in sources)
    say(f"  {'set':{width}} {'samples':>11} {'passes':>7} {'per epoch':>11}")
    per_epoch = train.sizes if sampler is None else sampler.samples
    for source, size, weight, count in zip(sources, train.sizes, weights, per_epoch, strict=True):
        say(f"  {source.name:{width}} {size:>11,} {weight:>7g} {count:>11,}")


def record_stream(
    config: RunConfig,
    args: "SFTConfig",
    sources: Sequence[Source],
    encoder: SampleEncoder,
    ledger: Path,
) -> RecordStream:
    """The stream of this process, after a look at the first record of each source.

    Raises:
        DataError: a source cannot be read or has no record.
    """
    for source in sources:
        if next(source.records(), None) is None:
            raise DataError(source.path, "there is no record.", "add records, or leave it out.")
    return RecordStream(
        sources,
        encoder.row,
        batch=args.per_device_train_batch_size,
        seed=seed_of(args),
        shuffle_buffer=config.data.shuffle_buffer,
        skip_bad=config.data.on_bad_sample == "skip",
        ledger=ledger,
        rank=rank(),
        world=world_size(),
    )


def sample_encoder(config: RunConfig, processor: Ovis2_5Processor) -> SampleEncoder:
    data = config.data
    return SampleEncoder(
        processor=processor,
        limits=PixelLimits(**{name: getattr(data, name) for name in PixelLimits.__annotations__}),
        multimodal_max_length=data.multimodal_max_length,
        text_max_length=data.text_max_length,
        thinking=cast(Thinking, data.thinking),
        jpeg_draft=data.jpeg_draft,
        decode_files=data.on_bad_sample == "skip",
    )


def prepare(config: RunConfig, sources: Sequence[Source], encoder: SampleEncoder) -> PreparedData:
    processor = encoder.processor
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    del tokenizer["truncation"], tokenizer["padding"]  # encoding resets them
    settings = {
        "tokenizer": tokenizer,
        "split_special_tokens": processor.tokenizer.split_special_tokens,
        "image_processor": processor.image_processor.to_dict(),
        "limits": asdict(encoder.limits),
        "lengths": [encoder.multimodal_max_length, encoder.text_max_length],
        "thinking": encoder.thinking,
    }
    return prepare_dataset(
        sources,
        check_files=encoder.check_files,
        encode=encoder.columns,
        skip_bad=config.data.on_bad_sample == "skip",
        fingerprint=hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
    )
