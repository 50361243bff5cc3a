"""Bytes of the backward pass of the two heads on a GPU, beside what the layers keep."""

import torch
from transformers import PreTrainedConfig

from ..supervised_head import rows_per_chunk
from .configuration_ovis2_5 import NUM_INDICATORS, Ovis2_5Config
from .visual_tokenizer_ovis2_5 import BUFFERS

CUDA = torch.device("cuda")


def loss_head_bytes(
    llm: PreTrainedConfig,
    tokens: int,
    half: bool = True,
    *,
    trained: bool = True,
    cast: bool = True,
) -> int:
    """Bytes of a chunk in the backward pass of `label_log_probs`, and the float32 gradient of its
    weight; of a float32 weight that is counted as its gradient.

    Args:
        tokens: The trained ones.
        half: Whether the weight is in half precision, else in float32.
        trained: Whether the weight is.
        cast: Whether products are in half precision.
    """
    rows = min(tokens, rows_per_chunk(llm.vocab_size, CUDA))
    logits = llm.vocab_size * rows * (6 if cast else 4)
    return logits + (4 * llm.vocab_size * llm.hidden_size if half and trained else 0)


def visual_head_bytes(
    config: Ovis2_5Config,
    tokens: int,
    half: bool = True,
    *,
    head: bool = True,
    table: bool = True,
    cast: bool = True,
) -> int:
    """The same of `ExpectedEmbedding` for `tokens` visual tokens; `head` and `table` say whether
    those weights are trained."""
    vit = config.vit_config
    words = config.visual_vocab_size - NUM_INDICATORS
    rows = min(tokens, rows_per_chunk(words, CUDA, BUFFERS))
    sums = head * words * vit.hidden_size * vit.hidden_stride**2
    sums += table * config.visual_vocab_size * config.llm_config.hidden_size
    return (24 if cast else 32) * rows * words + (4 * sums if half else 0)
