"""`vlmtune config`: the JSON schema of config files, and what a key means."""

import argparse
import json
from collections.abc import Sequence

from ..configs.explain import explain, schema


def main(argv: Sequence[str]) -> None:
    """Print what the words after `config` ask for.

    Raises:
        ConfigError: the key to explain is unknown.
        SystemExit: 0 after `--help`, 2 for an unknown or missing flag.
    """
    parser = argparse.ArgumentParser(
        prog="vlmtune config",
        description="Print the JSON schema of config files and recipes, which editors complete "
        "and check by, or explain one key.",
        epilog="More: docs/check.md",
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--schema", action="store_true", help="JSON Schema, draft 2020-12")
    what.add_argument(
        "--explain",
        metavar="KEY",
        help="what it means, its values and its default; old names say what they became",
    )
    given = parser.parse_args(argv)
    if given.schema:
        print(json.dumps(schema(), indent=2))
    else:
        print(explain(given.explain.replace("-", "_")))
