"""Merge LoRA adapters into their base model, as `vlmtune merge` does.

    python scripts/merge_lora_adapters.py --adapter_path outputs/lora --output_path outputs/merged

Every flag of `vlmtune merge` works, also under its name there; --base_model_path is --base.
"""

import sys

from vlmtune.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["merge", *sys.argv[1:]]))
