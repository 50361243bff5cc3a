"""`vlmtune models build-ovis2_5`: a new Ovis2.5 from a language model and a vision tower."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..core.logging import quiet_hosts


def main(argv: Sequence[str]) -> None:
    """Build what the words after `build-ovis2_5` ask for.

    Raises:
        ModelError: a source or the template does not fit, or the output folder holds a model.
        SystemExit: 0 after `--help`, 2 for an unknown or missing flag.
    """
    parser = argparse.ArgumentParser(
        prog="vlmtune models build-ovis2_5",
        description="Write a new Ovis2.5, ready for stage 1, from any causal language model and a "
        "SigLIP or SigLIP2 vision tower.",
        epilog="More: docs/build.md",
        allow_abbrev=False,
    )
    parser.add_argument("--llm", required=True, help="folder or Hub name of the language model")
    parser.add_argument("--vit", required=True, help="folder or Hub name of the vision tower")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument(
        "--chat_template", metavar="FILE", help="Jinja file (default: the published template)"
    )
    parser.add_argument(
        "--visual_vocab_size",
        type=int,
        default=65536,
        metavar="N",
        help="rows of the visual embedding table (default: 65536, as published)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the new parts (default: 0)"
    )
    given = parser.parse_args(argv)
    quiet_hosts()
    # Imported here: it takes seconds, and argparse catches most mistakes before.
    from ..models.ovis2_5.build import build_ovis2_5

    build_ovis2_5(
        given.llm,
        given.vit,
        given.output,
        chat_template=given.chat_template,
        visual_vocab_size=given.visual_vocab_size,
        seed=given.seed,
    )
    print(f"{given.output}: an untrained Ovis2.5 of {given.llm} and {given.vit}")
