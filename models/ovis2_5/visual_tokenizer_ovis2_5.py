"""From image features to embeddings: a distribution over a visual vocabulary picks table rows.

Shape suffixes: N visual tokens, C of one chunk, D width of the features, W visual words, V words
and indicators, H width of the embeddings.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..supervised_head import (
    active,
    add_product,
    inside,
    matmul_dtype,
    rows_per_call,
    rows_per_chunk,
)
from .configuration_ovis2_5 import NUM_INDICATORS, Ovis2_5Config
from .vision_ovis2_5 import Grid, Siglip2Navit

BUFFERS = 3
"""Of a chunk's rows over the visual words in its forward pass; in its backward pass five."""


class VisualEmbeddingTable(nn.Embedding):
    """`vte`: mixed by probabilities for visual words, looked up for indicators."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings `[n, H]` of probabilities `[n, V - 4]`, or of integer rows `[n]`."""
        if tokens.is_floating_point():
            return tokens @ self.weight[: tokens.shape[-1]].to(tokens.dtype)
        return super().forward(tokens)


class VisualTokenizer(nn.Module):
    """Vision encoder plus the head over the visual vocabulary without its indicators.

    Source: Ovis2.5 technical report (arXiv:2508.11737), section 2; AIDC-AI/Ovis 2.5.0.
    """

    def __init__(self, config: Ovis2_5Config):
        super().__init__()
        vit, self.words = config.vit_config, config.visual_vocab_size - NUM_INDICATORS
        self.vit = Siglip2Navit(vit)
        self.head = nn.Sequential(
            nn.Linear(vit.hidden_size * vit.hidden_stride**2, self.words, bias=False),
            nn.LayerNorm(self.words, eps=1e-5),
        )

    def forward(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Probabilities `[n, V - 4]` of the visual words, softmax in float32."""
        return probabilities(self.head(self.vit(pixel_values, grids)))

    def embed(self, pixel_values: Tensor, grids: Sequence[Grid], table: nn.Module) -> Tensor:
        """Embeddings `[n + 4, H]` of the visual tokens and behind them of the indicators: those of
        `table(forward(...))`, but the probabilities exist for one chunk of tokens at a time, in the
        backward pass again."""
        features_ND = self.vit(pixel_values, grids)
        linear, norm = map(active, active(self.head))  # type: ignore[arg-type]
        rows = active(table)
        if (type(linear), type(norm), type(rows)) != (
            nn.Linear,
            nn.LayerNorm,
            VisualEmbeddingTable,
        ):
            return self._embed_by_modules(features_ND, table)
        weights = linear.weight, norm.weight, norm.bias, rows.weight, norm.eps

        def in_table(features_ND: Tensor) -> Tensor:
            return inside(norm, in_norm, features_ND)

        def in_norm(features_ND: Tensor) -> Tensor:
            return inside(linear, lambda x: ExpectedEmbedding.apply(x, *weights), features_ND)

        return inside(rows, in_table, features_ND)

    def _embed_by_modules(self, features_ND: Tensor, table: nn.Module) -> Tensor:
        """With the modules' own forwards, such as those of adapters."""
        # Not for trained plain weights: a chunk's gradient would be another tensor of their size.
        size = rows_per_call(self.head, features_ND, self.words, BUFFERS)
        chunks = [
            checkpoint(lambda x: table(probabilities(self.head(x))), chunk, use_reentrant=False)
            for chunk in features_ND.split(size)
        ]
        last = torch.arange(self.words, self.words + NUM_INDICATORS, device=features_ND.device)
        indicators = table(last)
        return torch.cat([*(chunk.to(indicators.dtype) for chunk in chunks), indicators])


def probabilities(logits: Tensor) -> Tensor:
    return F.softmax(logits, dim=-1, dtype=torch.float32).to(logits.dtype)


class ExpectedEmbedding(torch.autograd.Function):
    """`softmax(layer_norm(features @ weight.T)) @ table`, then the rest of the table's rows, in
    chunks of features whose probabilities the backward pass computes again; the gradients of all
    weights are summed in float32 and rounded once."""

    @staticmethod
    def forward(
        ctx: Any,
        features_ND: Tensor,
        weight_WD: Tensor,
        scale_W: Tensor,
        shift_W: Tensor,
        table_VH: Tensor,
        eps: float,
    ) -> Tensor:
        kind = features_ND.device.type
        ctx.dtype, ctx.eps = matmul_dtype(features_ND), eps
        ctx.autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        ctx.save_for_backward(features_ND, weight_WD, scale_W, shift_W, table_VH)
        words, tokens = len(weight_WD), len(features_ND)
        embeddings = table_VH.new_empty(
            (tokens + len(table_VH) - words, table_VH.shape[1]),
            dtype=torch.promote_types(ctx.dtype, table_VH.dtype),
        )
        weight, table = weight_WD.to(ctx.dtype), table_VH[:words].to(ctx.dtype)
        size = rows_per_chunk(words, features_ND.device, BUFFERS)
        for start in range(0, tokens, size):
            features = features_ND[start : start + size].to(ctx.dtype)
            probs = normed_probabilities(ctx, features @ weight.T, scale_W, shift_W)
            embeddings[start : start + len(features)] = probs.to(ctx.dtype) @ table
        embeddings[tokens:] = table_VH[words:]
        return embeddings

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        features_ND, weight_WD, scale_W, shift_W, table_VH = ctx.saved_tensors
        words, tokens = len(weight_WD), len(features_ND)
        weight, table = weight_WD.to(ctx.dtype), table_VH[:words].to(ctx.dtype)
        sums = [
            torch.zeros_like(w, dtype=torch.float32) if needed else None
            for w, needed in zip(
                (weight_WD, scale_W, shift_W, table_VH), ctx.needs_input_grad[1:5], strict=True
            )
        ]
        d_weight, d_scale, d_shift, d_table = sums
        d_features = torch.empty_like(features_ND) if ctx.needs_input_grad[0] else None
        if d_table is not None:
            d_table[words:] += grads[0][tokens:]
        size = rows_per_chunk(words, features_ND.device, BUFFERS)
        for start in range(0, tokens, size):
            chunk = slice(start, min(start + size, tokens))
            features, grad = features_ND[chunk].to(ctx.dtype), grads[0][chunk].to(ctx.dtype)
            logits = (features @ weight.T).requires_grad_()
            scale, shift = scale_W.detach(), shift_W.detach()
            scale.requires_grad_(d_scale is not None)
            shift.requires_grad_(d_shift is not None)
            with torch.enable_grad():
                probs = normed_probabilities(ctx, logits, scale, shift)
            if d_table is not None:
                add_product(d_table[:words], probs.detach().to(ctx.dtype).T, grad)
            probs.backward((grad @ table.T).to(probs.dtype))
            del probs
            if d_scale is not None:
                d_scale += scale.grad
            if d_shift is not None:
                d_shift += shift.grad
            d_logits = logits.grad
            if d_features is not None:
                d_features[chunk] = d_logits @ weight
            if d_weight is not None:
                add_product(d_weight, d_logits.T, features)
        kept = (weight_WD, scale_W, shift_W, table_VH)
        rounded = [None if d is None else d.to(w.dtype) for d, w in zip(sums, kept, strict=True)]
        return d_features, *rounded, None


def normed_probabilities(ctx: Any, logits_CW: Tensor, scale_W: Tensor, shift_W: Tensor) -> Tensor:
    """As the modules compute them in the forward pass's autocast."""
    enabled, dtype = ctx.autocast
    with torch.autocast(logits_CW.device.type, dtype=dtype, enabled=enabled):
        return probabilities(F.layer_norm(logits_CW, scale_W.shape, scale_W, shift_W, ctx.eps))
