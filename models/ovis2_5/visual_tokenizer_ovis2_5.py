"""From image features to embeddings: a distribution over a visual vocabulary picks table rows."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_ovis2_5 import NUM_INDICATORS, Ovis2_5Config
from .vision_ovis2_5 import Grid, Siglip2Navit


class VisualTokenizer(nn.Module):
    """Vision encoder plus the head over the visual vocabulary without its indicators.

    Source: Ovis2.5 technical report (arXiv:2508.11737), section 2; AIDC-AI/Ovis 2.5.0.
    """

    def __init__(self, config: Ovis2_5Config):
        super().__init__()
        vit, words = config.vit_config, config.visual_vocab_size - NUM_INDICATORS
        self.vit = Siglip2Navit(vit)
        self.head = nn.Sequential(
            nn.Linear(vit.hidden_size * vit.hidden_stride**2, words, bias=False),
            nn.LayerNorm(words, eps=1e-5),
        )

    def forward(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Probabilities `[n, V - 4]` of the visual words, softmax in float32."""
        logits = self.head(self.vit(pixel_values, grids))
        return F.softmax(logits, dim=-1, dtype=torch.float32).to(logits.dtype)


class VisualEmbeddingTable(nn.Embedding):
    """`vte`: mixed by probabilities for visual words, looked up for indicators."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings `[n, H]` of probabilities `[n, V - 4]`, or of integer rows `[n]`."""
        if tokens.is_floating_point():
            return tokens @ self.weight[: tokens.shape[-1]].to(tokens.dtype)
        return super().forward(tokens)
