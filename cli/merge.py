"""`vlmtune merge`: adapters into the weights of their base."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.logging import note, quiet_hosts

if TYPE_CHECKING:
    from ..lora.merge import MergeReport

QUESTION = """\
The adapter was trained on weights quantised to {bits} bits. Merge it onto
  original     the weights of the base as they are
  dequantized  what it was trained on: those weights quantised and dequantised again
Which? [original] """


def main(argv: Sequence[str]) -> None:
    """Merge what the words after `merge` ask for, and print what came of it.

    Raises:
        ModelError: base, adapters and options do not fit together, the output cannot be written,
            or with `--verify` the merged model is wrong; there is no output then.
        SystemExit: 0 after `--help`, 2 for an unknown or missing flag.
    """
    parser = argparse.ArgumentParser(
        prog="vlmtune merge",
        description="Write base + adapter as a model folder with the base's files, names and "
        "shards, in less memory than the largest of its weight files.",
        epilog="More: docs/lora.md",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--adapter",
        "--adapter_path",
        required=True,
        action="append",
        metavar="A[:WEIGHT]",
        help="PEFT folder or Hub name, with a weight (default: 1); again for several, whose sum "
        "is added",
    )
    parser.add_argument(
        "--output", "--output_path", required=True, type=Path, metavar="O", help="folder to write"
    )
    parser.add_argument(
        "--base",
        "--base_model_path",
        metavar="B",
        help="folder or Hub name of the model (default: the one that the adapter names)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of all weights (default: each as in the base)",
    )
    parser.add_argument(
        "--onto",
        choices=("original", "dequantized"),
        help="for an adapter trained on quantised weights: the base's own, or those it was trained "
        "on (default: asks on a terminal, else original)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model in the output")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="check the merged model as vlmtune verify does, before the output gets its name",
    )
    parser.add_argument("--data", metavar="FILE", help="conversations for --verify")
    parser.add_argument("--image_folder", metavar="DIR", help="of --data")
    parser.add_argument(
        "--compute_dtype",
        choices=("float32", "bfloat16", "float16"),
        help="what --verify runs the models in (default: float32)",
    )
    parser.add_argument("--device", help="of --verify (default: a GPU if there is one)")
    given = parser.parse_args(argv)
    checking = (given.data, given.image_folder, given.compute_dtype, given.device)
    if any(checking) and not given.verify:
        parser.error("--data, --image_folder, --compute_dtype and --device need --verify")
    quiet_hosts()
    # Imported here: it takes seconds, and argparse catches most mistakes before.
    from ..lora.adapter import Adapter, parse_adapter
    from ..lora.merge import merge

    adapters = [parse_adapter(text) for text in given.adapter]
    onto = given.onto
    if onto is None and sys.stdin.isatty():
        opened = [Adapter.open(source, weight) for source, weight in adapters]
        bits = next((a.quantization.bits for a in opened if a.quantization), None)
        onto = _ask(QUESTION.format(bits=bits)) if bits else None

    def check(base: str, folder: Path) -> None:
        from ..lora.verify import verify

        found = verify(
            base,
            adapters,
            str(folder),
            data=given.data,
            image_folder=given.image_folder,
            compute_dtype=given.compute_dtype or "float32",
            device=given.device,
        )
        print(found.report())
        found.check()

    report = merge(
        given.base,
        adapters,
        given.output,
        dtype=given.dtype,
        onto=onto or "original",
        overwrite=given.overwrite,
        check=check if given.verify else None,
    )
    print(summary(report))
    if not report.changed:
        note("no value differs from the base: the adapter does nothing, or less than rounding")


def summary(report: "MergeReport") -> str:
    """What was merged, for a person."""
    adapters = " + ".join(
        source if weight == 1 else f"{weight:g} x {source}" for source, weight in report.adapters
    )
    files = "1 file" if report.shards == 1 else f"{report.shards} files"
    lines = [
        f"{report.output}: {report.base} + {adapters}",
        f"  {report.size / 1e6:,.1f} MB of weights in {files}"
        f"{', ' + report.dtype if report.dtype else ''}, {report.seconds:.1f} s",
        f"  {report.changed} of {report.adapted} adapted tensors changed, by at most "
        f"{report.largest:.3g}",
    ]
    if report.untied:
        lines.append(
            "  embeddings and output head share their weights in the base; the adapter changed "
            "them apart, so they are two tensors now"
        )
    if rounding := report.rounding:
        other = "dequantized" if report.onto == "original" else "original"
        lines.append(
            f"  merged onto the {report.onto} weights; quantising them for training changed them "
            f"by at most {rounding.largest:.3g}, on average {rounding.mean:.3g}, "
            f"{rounding.relative:.2%} of their norm (--onto {other} takes the others)"
        )
    return "\n".join(lines)


def _ask(question: str) -> str:
    while True:
        try:
            answer = input(question).strip().lower()
        except EOFError:
            return "original"
        if answer in ("", "original", "dequantized"):
            return answer or "original"
