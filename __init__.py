"""vlmtune: fine-tune vision-language models on TRL's SFTTrainer, with masks you can check."""

__version__ = "0.1.0"
