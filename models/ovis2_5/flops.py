"""Useful floating-point operations of training on a sample, from its counts alone."""

from collections.abc import Collection

import numpy as np

from .configuration_ovis2_5 import NUM_INDICATORS, Ovis2_5Config

STAGES = ("vit", "visual_head", "table", "llm", "head")
"""The parts in the order that a sample passes them: vision encoder, head over the visual words,
their embedding table, language model, and its head over words."""

Counts = np.ndarray


def training_flops(
    config: Ovis2_5Config,
    tokens: Counts,
    trained_tokens: Counts,
    patches: Counts,
    patches_squared: Counts,
    *,
    trained: Collection[str] = STAGES,
    adapted: Collection[str] = (),
) -> np.ndarray:
    """Operations, float64, of the forward and backward pass of samples, one of each count each.

    A matrix product of m x k and k x n takes 2mkn. Backward takes as much again for the gradients
    of the weights of a trained stage, and as much again for those of the inputs from the first
    trained or adapted stage onwards: with all trained, twice the forward pass. Nothing is counted
    for padding or for what is computed again.

    Args:
        tokens: Of the expanded sample; attention stays within it, and is causal.
        trained_tokens: The head runs at these alone.
        patches: Of all images and frames.
        patches_squared: The sum of squares of each frame's patches; attention stays within it.
        trained: Stages whose weights are trained.
        adapted: Stages whose weights are frozen and that hold trained adapters.
    """
    products, attention = forward_flops(config, tokens, trained_tokens, patches, patches_squared)
    total, reached = np.zeros(np.shape(tokens)), False
    for stage in STAGES:
        own = stage in trained or stage in adapted
        # The input of a single product needs no gradient where nothing before it is trained.
        inputs = reached or (own and stage in attention)
        reached = reached or own
        total += products[stage] * (1 + inputs + (stage in trained))
        total += attention.get(stage, 0.0) * (1 + 2 * reached)
    return total


def forward_flops(
    config: Ovis2_5Config,
    tokens: Counts,
    trained_tokens: Counts,
    patches: Counts,
    patches_squared: Counts,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Operations, float64, of the forward pass by stage: of products with weights, and of
    attention, which has none.

    Left out, together under 1 % at the published sizes: norms, activations, softmax, rotary
    embeddings, position tables, adapters, and the image that a batch without any runs unseen.
    Attention within windows is taken as if all windows were whole.

    Raises:
        AttributeError: the language model's config has other names than Qwen2, Qwen3 and Llama.
    """
    llm, vit = config.llm_config, config.vit_config
    tokens, trained_tokens, patches, patches_squared = (
        np.asarray(count, np.float64)
        for count in (tokens, trained_tokens, patches, patches_squared)
    )
    size = getattr(llm, "head_dim", None) or llm.hidden_size // llm.num_attention_heads
    queries, keys = size * llm.num_attention_heads, size * llm.num_key_value_heads
    llm_layer = llm.hidden_size * (2 * queries + 2 * keys + 3 * llm.intermediate_size)
    width, merge = vit.hidden_size, vit.hidden_stride**2
    vit_layer = width * (4 * width + 2 * vit.intermediate_size)
    embedding = vit.num_channels * vit.patch_size**2 * width
    words = config.visual_vocab_size - NUM_INDICATORS
    full = len(vit.full_attention_layers)
    windowed = vit.num_hidden_layers - full
    pairs_in_windows = np.minimum(patches * vit.window_cells**2 * merge, patches_squared)
    products = {
        "vit": patches * (vit.num_hidden_layers * vit_layer + embedding),
        "visual_head": patches / merge * (merge * width * words),
        "table": patches / merge * (words * llm.hidden_size),
        "llm": tokens * (llm.num_hidden_layers * llm_layer),
        "head": trained_tokens * (llm.hidden_size * llm.vocab_size),
    }
    attention = {
        "vit": 2 * width * (full * patches_squared + windowed * pairs_in_windows),
        "llm": 2 * queries * llm.num_hidden_layers * (tokens * (tokens + 1) / 2),
    }
    return {k: 2 * v for k, v in products.items()}, {k: 2 * v for k, v in attention.items()}
