"""`vlmtune evaluate`: a model's answers to a data set, their scores, and a page to look at."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configs.load import COMMAND_LINE
from ..configs.schema import DataConfig
from ..core.checkpoints import RUN_FILE, run_config
from ..core.errors import ConfigError
from ..core.logging import quiet_hosts, say
from ..data.sources import Source, resolve_sources
from ..evaluation.folder import PAGE, PREDICTIONS, RESULT, check_folder, make_folder
from ..evaluation.samples import read_samples
from ..evaluation.tokenizer import TOKENIZERS, tokenize
from ..evaluation.wanted import METRICS, Kind, named_metrics, possible_metrics
from ..inference.sampling import DRAWN
from .inference_flags import (
    add_model_flags,
    add_sampling_flags,
    answer_settings,
    check_budget,
    check_model,
    hide_bars,
    load_inference,
    sampling_of,
)
from .page import percent

if TYPE_CHECKING:
    from ..evaluation.dual_encoder import DualEncoder
    from ..inference.vlm import VLMInference

OF_ANSWERS = (
    *("adapter", "load_in_4bit", "attn_implementation", "min_pixels", "max_pixels", "thinking"),
    *("thinking_budget", "do_sample", *DRAWN, "repetition_penalty", "seed"),
)
"""Flags without effect on a model that writes no answers."""


def main(argv: Sequence[str]) -> int:
    """Evaluate what the words after `evaluate` name, and print the metrics.

    Returns:
        0; 1 where a record could not be answered or read.

    Raises:
        VLMTuneError: flags, model or data are bad, or the output cannot be written.
        SystemExit: 0 after `--help`, 2 for an unknown flag or one without a proper value.
    """
    given = _parser().parse_args(argv)
    check_model(given)
    check_budget(given)
    names, required = named_metrics(given.metrics, given.stage)
    sampling, run = sampling_of(given), _run_of(given)
    sources = _sources(given, run)
    if {"bleu", "cider", "rouge_l"} & set(names):
        tokenize(["a"], given.tokenizer)
    output = given.output or _default_output(given, sources)
    settings = answer_settings(given, sources) | {"limit": given.limit}
    check_folder(output, sources, settings, given.limit)
    samples = read_samples(sources, given.limit)

    quiet_hosts()
    # Imported here: it takes seconds, and the checks above catch most mistakes before.
    from ..evaluation.run import Evaluation, evaluate, kind_of

    kind = kind_of(given.model)
    metrics, left_out = possible_metrics(names, kind, samples, required)
    _check_flags(given, kind)
    make_folder(output)
    done = evaluate(
        Evaluation(
            load=lambda: _load(given, kind),
            run=run,
            sources=sources,
            samples=samples,
            metrics=metrics,
            output=output,
            settings=settings,
            sampling=sampling,
            enable_thinking=given.thinking,
            batch_size=given.batch_size,
            limit=given.limit,
            tokenizer=given.tokenizer,
            left_out=left_out,
            about={
                "model": given.model,
                "adapter": given.adapter,
                "data": [source.path for source in sources],
                "split": given.split,
                "stage": given.stage,
            },
        )
    )
    if done is None:
        return 0  # of a process whose work the first one has scored
    result, rows = done
    from .evaluation_page import write_page

    (output / PAGE).unlink(missing_ok=True)
    write_page(output / PAGE, result, rows)
    print("\n".join(_lines(result)), flush=True)
    say(f"{output}: {RESULT}, {PAGE}{f', {PREDICTIONS}' if rows else ''}")
    return 1 if result["errors"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlmtune evaluate",
        usage="vlmtune evaluate --model M [--adapter A] --data FILE [--metrics all] [--output DIR] "
        "[flags]",
        description="Let a model answer the last question of each record, score the answers "
        "without their thoughts against the record's references, answers or own answer, and write "
        f"{PREDICTIONS}, {RESULT} and {PAGE}. It can be stopped and started again, and run under "
        "torchrun; with other metrics it scores the answers that are there. A model like CLIP is "
        "scored by how well its vectors of images and texts find each other.",
        epilog="Exit code: 0; 1 after an error, also of one record. More: docs/evaluation.md",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        help="JSON, JSON lines, parquet, datasets folder, Hub dataset, or a set of --datainfo",
    )
    parser.add_argument(
        "--split",
        choices=("train", "val", "test"),
        help="in place of --data: what the model was trained on, its evaluation data, or the "
        "evaluation set of the name test, as its run file says",
    )
    parser.add_argument(
        "--image_folder",
        metavar="DIR",
        help="what relative media paths start from (default: that of the model's run)",
    )
    parser.add_argument("--datainfo", metavar="F", help="file that names sets")
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N records")
    parser.add_argument(
        "--metrics",
        default="all",
        metavar="NAMES",
        help=f"all that model and data allow, or of {', '.join(METRICS)}, joined by commas "
        "(default: all)",
    )
    parser.add_argument(
        "--stage",
        type=_positive,
        metavar="N",
        help="of training: all is then bleu, cider, rouge_l, contrastive and loss for stage 1, and "
        "the metrics of answers and loss for later ones",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder (default: evaluation/DATA in the folder of the adapter or model)",
    )
    parser.add_argument(
        "--batch_size",
        type=_positive,
        default=8,
        metavar="N",
        help="records run together (default: 8)",
    )
    parser.add_argument(
        "--tokenizer",
        choices=TOKENIZERS,
        default=TOKENIZERS[0],
        help="of captions: our own, or the one in Java of the COCO scores, with pycocoevalcap "
        f"(default: {TOKENIZERS[0]})",
    )
    add_model_flags(parser)
    add_sampling_flags(parser)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _folders(given: argparse.Namespace) -> list[Path]:
    """Where the model lies, the last adapter first."""
    adapters = (Path(name) for name in reversed(given.adapter))
    without_weights = (p if p.exists() else Path(str(p).rpartition(":")[0]) for p in adapters)
    return [path for path in (*without_weights, Path(given.model)) if path.is_dir()]


def _run_of(given: argparse.Namespace) -> dict[str, Any]:
    """Config of the run that trained the adapter, or the model; empty without a run file."""
    return next(filter(None, map(run_config, _folders(given))), {})


def _sources(given: argparse.Namespace, run: dict[str, Any]) -> list[Source]:
    """Raises ConfigError where no data is named, or a folder is not there."""
    folder = given.image_folder
    if folder and not Path(folder).expanduser().is_dir():
        raise _refused("image_folder", f"there is no folder {folder}", "check the path")
    if given.data:
        return resolve_sources(given.data, folder or run.get("image_folder"), given.datainfo)
    if not given.split:
        fix = "name the file, or give --split val where the model has a run file"
        raise _refused("data", "is not given", fix)
    if not run:
        what = f"needs the {RUN_FILE} of the model, and there is none"
        raise _refused("split", what, "give --data")
    names = _split(run, given.split)
    datainfo = given.datainfo or run.get("datainfo")
    return resolve_sources(names, folder or run.get("image_folder"), datainfo)


def _split(run: dict[str, Any], split: str) -> list[str]:
    """The data of a run's split."""
    data = DataConfig(run["data_path"], run.get("eval_data_path") or [])
    if split == "train":
        return data.data_path
    sets = data.eval_sets
    if split in sets:
        return sets[split]
    names = [name for of_set in sets.values() for name in of_set]
    if split == "test" or not names:
        what = f"the run has no {'set named test' if split == 'test' else 'evaluation data'}"
        raise _refused("split", what, "give --data")
    return names


def _default_output(given: argparse.Namespace, sources: Sequence[Source]) -> Path:
    data = "-".join(source.name.replace("/", "-") for source in sources)
    if folders := _folders(given):
        return folders[0] / "evaluation" / data
    return Path("evaluation", given.model.replace("/", "-"), data)


def _check_flags(given: argparse.Namespace, kind: Kind) -> None:
    useless = [key for key in OF_ANSWERS if getattr(given, key)] if kind == "dual_encoder" else []
    if useless:
        what = "has no effect on a model of vectors of images and texts"
        raise _refused(useless[0], what, "leave it out")


def _load(given: argparse.Namespace, kind: Kind) -> "VLMInference | DualEncoder":
    if kind != "dual_encoder":
        return load_inference(given)
    from ..evaluation.dual_encoder import DualEncoder

    hide_bars()
    return DualEncoder.load(given.model, given.dtype, given.device)


def _lines(result: dict[str, Any]) -> Iterator[str]:
    """The result as a table, and what is to be said besides."""
    metrics = result["metrics"]
    width = max(map(len, ("metric", *metrics)))
    yield f"{'metric':{width}}{'value':>10}   {'95 % interval':<19}{'n':>8}"
    for name, found in metrics.items():
        interval = f"{found['low']:.4f} to {found['high']:.4f}"
        yield f"{name:{width}}{found['value']:>10.4f}   {interval:<19}{found['n']:>8,}"
    for pool in {(f["images"], f["texts"]) for f in metrics.values() if "texts" in f}:
        yield f"pool: {pool[0]:,} images, {pool[1]:,} texts; chance at 1: {1 / pool[0]:.4f}"
    if shares := result["answers"]:
        unfinished = shares.get("unfinished_thoughts")
        cut = "" if unfinished is None else f"unfinished where asked for: {percent(unfinished)}; "
        yield (
            f"answers with a thought: {percent(shares['thoughts'])}; {cut}"
            f"ended by length: {percent(shares['ended_by_length'])}; "
            f"without a reference: {percent(shares['without_reference'])}"
        )
    for why in dict.fromkeys(result["left_out"].values()):
        names = [name for name, reason in result["left_out"].items() if reason == why]
        yield f"left out: {', '.join(names)}: {why}"
    if errors := result["errors"]:
        yield f"{len(errors):,} of {result['records']:,} records have an error, the first:"
        yield f"  {errors[0]['error']}"


def _refused(flag: str, what: str, fix: str) -> ConfigError:
    return ConfigError(f"{COMMAND_LINE}, {flag}", what, fix)
