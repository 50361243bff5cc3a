"""docs/check.md lists every code of a finding as the table in data/findings.py has it."""

import re
from pathlib import Path

from vlmtune.data.findings import CODES

TEXT = (Path(__file__).parents[2] / "docs/check.md").read_text("utf-8")
PAGE = re.sub(r"\\([|<])", r"\1", TEXT)


def test_page_has_every_code_with_its_severity_meaning_and_fix():
    rows = re.findall(
        r"^\| `([\w-]+)` \| (error|warning) \| (.+) \| (yes)? ?\|$", PAGE, re.MULTILINE
    )
    assert {name: (severity, meaning, fix == "yes") for name, severity, meaning, fix in rows} == {
        name: (code.severity, code.meaning, code.fixable) for name, code in CODES.items()
    }
    assert len(rows) == len(CODES)
