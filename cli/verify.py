"""`vlmtune verify`: whether a merged model is its base with its adapters."""

import argparse
from collections.abc import Sequence

from ..core.logging import quiet_hosts


def main(argv: Sequence[str]) -> None:
    """Verify what the words after `verify` ask for, and print the report.

    Raises:
        ModelError: after the report, when the merged model is wrong; or a folder cannot be read.
        DataError: the data is bad.
        SystemExit: 0 after `--help`, 2 for an unknown or missing flag.
    """
    parser = argparse.ArgumentParser(
        prog="vlmtune verify",
        description="Run base, base + adapter and merged model on the same samples, compare files, "
        "weights and logits, and fail when the merged model is not base + adapter.",
        epilog="More: docs/lora.md",
        allow_abbrev=False,
    )
    parser.add_argument("--base", required=True, metavar="B", help="folder or Hub name")
    parser.add_argument(
        "--adapter",
        required=True,
        action="append",
        metavar="A[:WEIGHT]",
        help="PEFT folder or Hub name, with the weight it was merged with; again for each of them",
    )
    parser.add_argument("--merged", required=True, metavar="M", help="folder to verify")
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="conversations to run, read as training reads them (default: made ones, with noise "
        "as images)",
    )
    parser.add_argument(
        "--image_folder", metavar="DIR", help="of --data (default: that of the adapter's run)"
    )
    parser.add_argument(
        "--samples", type=int, default=8, metavar="N", help="how many are run (default: 8)"
    )
    parser.add_argument(
        "--compute_dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="what the models run in; float32 shows the rounding of the merged weights alone "
        "(default: float32)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    given = parser.parse_args(argv)
    quiet_hosts()
    # Imported here: it takes seconds, and argparse catches most mistakes before.
    from ..lora.adapter import parse_adapter
    from ..lora.verify import verify

    found = verify(
        given.base,
        [parse_adapter(text) for text in given.adapter],
        given.merged,
        data=given.data,
        image_folder=given.image_folder,
        samples=given.samples,
        compute_dtype=given.compute_dtype,
        device=given.device,
    )
    print(found.report())
    found.check()
