"""Score a checkpoint on the data of its run, as `vlmtune evaluate` does.

    python scripts/evaluate.py --stage 1 --checkpoint DIR --split val --metrics all

Every flag of `vlmtune evaluate` works; --checkpoint is its --model.
"""

import re
import sys

from vlmtune.cli.main import main

if __name__ == "__main__":
    words = [re.sub("^--checkpoint(?==|$)", "--model", word) for word in sys.argv[1:]]
    sys.exit(main(["evaluate", *words]))
