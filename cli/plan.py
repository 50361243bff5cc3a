"""`vlmtune plan`: what a run will do, need and cost, before anything is trained."""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..configs.schema import RunConfig
from ..core.distributed import launched_by_torchrun
from ..core.errors import ConfigError
from ..core.logging import note, quiet_hosts
from .page import check_target
from .planned import check_flags, check_present, planned_config, title_of

DESCRIPTION = """\
What a run will do, need and cost: its settings and where they come from, its data, steps, trained
parameters, memory under each ZeRO stage, time and disk, and what is probably not meant. Needs no
GPU and no weights."""

EPILOG = """\
The data is read, checked and kept as training keeps it, so that the run itself starts at once; of
the model only config.json, tokenizer and preprocessor are read. Every key of the config is a flag
here too: plan variants without writing files.

  vlmtune plan configs/presets/ovis2_5_full.json --gpus 8 --deepspeed configs/zero/zero2.json

How memory is counted, and what is left out: docs/zero.md. More: docs/check.md"""

FLAGS = ("--gpus", "--gpu_memory", "--mfu", "--tflops", "--html", "--json")


def main(argv: Sequence[str]) -> None:
    """Print the plan that the words after `plan` ask for.

    Raises:
        VLMTuneError: what training would refuse before its first step, or a number out of range.
        SystemExit: 0 after `--help`, 2 for a wrong word after one of the flags below.
    """
    # Keys of the config may be written with dashes, and so may these.
    words = [re.sub(r"^--[^=]*", lambda m: m[0][:2] + m[0][2:].replace("-", "_"), w) for w in argv]
    options, config_words = _parser().parse_known_args(words)
    _check(options)
    check_flags(config_words, FLAGS)
    config = planned_config(config_words)
    _check_planned(config)
    check_present(config)
    for line in config.notes:
        note(line)
    quiet_hosts()
    # Imported here: it takes seconds, and most mistakes are found before.
    from ..sft.run_forecast import forecast

    gpus = options.gpus or _gpus_here()
    memory = round(options.gpu_memory * 1e9)
    plan = forecast(config, gpus, memory, options.mfu, options.tflops, title_of(config_words))
    if options.json:
        print(json.dumps(asdict(plan), ensure_ascii=False))
    else:
        from .plan_text import plan_text

        print(plan_text(plan))
    if options.html:
        from .plan_page import write_page

        write_page(options.html, plan)
        note(f"the same with plots: {options.html}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlmtune plan",
        usage="vlmtune plan CONFIG [--key value ...] [--gpus N] [--gpu_memory GB] [--mfu M]\n"
        "                    [--tflops T] [--html OUT.html] [--json]\n"
        "       vlmtune plan RECIPE --stage NAME ...",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="GPUs of the run (default: those here, or 1)"
    )
    parser.add_argument(
        "--gpu_memory", type=float, default=80, metavar="GB", help="of each, 10^9 bytes (80)"
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        metavar="M",
        help="share of its operations that a GPU spends on the model's (0.4, to be measured)",
    )
    parser.add_argument(
        "--tflops",
        type=float,
        default=989,
        metavar="T",
        help="10^12 operations a second of a GPU (989: H100, bf16 without sparsity)",
    )
    parser.add_argument("--html", type=Path, metavar="OUT", help="a page with plots, too")
    parser.add_argument("--json", action="store_true", help="all of it as JSON instead of text")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raises ConfigError for numbers out of range, and for a page that cannot be written."""
    if launched_by_torchrun():
        raise ConfigError("command line", "a plan is one process", "start it without torchrun")
    if options.gpus is not None and options.gpus < 1:
        raise ConfigError("command line, gpus", f"is {options.gpus}", "give 1 or more")
    for key in ("gpu_memory", "mfu", "tflops"):
        value = getattr(options, key)
        if not 0 < value < float("inf"):
            raise ConfigError(f"command line, {key}", f"is {value:g}", "give a number above 0")
    if options.mfu > 1:
        raise ConfigError(
            "command line, mfu", f"is {options.mfu:g}", "give a share, such as 0.4 for 40 %"
        )
    if options.html:
        check_target(options.html)


def _check_planned(config: RunConfig) -> None:
    """Raises ConfigError for a run whose steps or shapes cannot be known before it."""
    if config.data.streaming:
        raise ConfigError(
            "streaming",
            "is true, and what is read while training cannot be counted before",
            "plan with --streaming false, which prepares all of the data once",
        )
    if not config.training.get("do_train", True):
        raise ConfigError("do_train", "is false: nothing is trained", "leave it out to plan a run")
    if not config.model.model_path:
        raise ConfigError(
            "llm_name_or_path, vit_name_or_path",
            "the model is built when the run begins, and a plan reads its config.json",
            "build it with vlmtune models build-ovis2_5, and give its folder as model_path",
        )


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count() or 1
