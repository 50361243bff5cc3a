"""The processor of a checkpoint, with what is wrong with the checkpoint in words."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor

from ..core.checkpoints import ADAPTER_CONFIG, MODEL_FORM, require_model
from ..core.errors import ModelError
from . import Ovis2_5Config, Ovis2_5Processor


def has_vocabulary(tokenizer: Any) -> bool:
    """Whether it knows text: without tokenizer.json transformers (5.23) makes one of the few tokens
    in other files."""
    return bool(tokenizer.encode("text", add_special_tokens=False))


def load_processor(path: str) -> Ovis2_5Processor:
    """Raises ModelError when the checkpoint cannot be read or is of another family."""
    where = f"model_path {path}"
    if (Path(path) / ADAPTER_CONFIG).is_file() and not (Path(path) / "config.json").is_file():
        raise ModelError(
            where,
            "is an adapter",
            "give its base as model_path and the adapter as adapter_path to train on, or merge "
            "it first: vlmtune merge",
        )
    require_model(path)
    try:
        config = AutoConfig.from_pretrained(path)
        if isinstance(config, Ovis2_5Config):
            processor = AutoProcessor.from_pretrained(path)
            if not has_vocabulary(processor.tokenizer):
                raise ValueError("its tokenizer has no vocabulary")
            return processor
    except ModelError:
        raise
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(where, f"cannot be loaded: {reason}", MODEL_FORM) from error
    raise ModelError(
        where,
        f'has model_type "{config.model_type}"',
        'use an Ovis2.5 checkpoint (model_type "ovis2_5" or "ovis")',
    )
