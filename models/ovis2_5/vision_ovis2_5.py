"""NaViT-style SigLIP2 encoder: images of any size, concatenated along one axis of patches.

Shape suffixes: N patches of the whole batch, D width, H heads, K head size.

Source: AIDC-AI/Ovis 2.5.0 (`modeling_siglip2_navit`), facts in its published configuration.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention import Segments, attend_within
from .configuration_ovis2_5 import Siglip2NavitConfig

Grid = tuple[int, int, int]
"""Frames, rows and columns of patches of one image or video."""


@dataclass(frozen=True)
class PatchLayout:
    """Where the patches of a batch stand and which of them see each other.

    Attributes:
        rows_N, columns_N: Patch coordinates in merge-block order, int64 on the CPU.
        frame_lengths: Patches of each frame; full attention stays inside a frame.
        window_order_N: Permutation that puts the patches of a window side by side, or None when no
            layer is windowed.
        window_lengths: Patches of each window, in that order.
    """

    rows_N: Tensor
    columns_N: Tensor
    frame_lengths: list[int]
    window_order_N: Tensor | None
    window_lengths: list[int]


@lru_cache(maxsize=1024)
def merge_block_coordinates(rows: int, columns: int, stride: int) -> tuple[Tensor, Tensor]:
    """Row and column of every patch of a frame, block by block of `stride` x `stride` patches."""
    index = torch.arange(rows * columns).reshape(rows // stride, stride, columns // stride, stride)
    index = index.transpose(1, 2).reshape(-1)
    return index // columns, index % columns


def patch_layout(grids: Sequence[Grid], config: Siglip2NavitConfig) -> PatchLayout:
    stride, window = config.hidden_stride, config.window_cells
    windowed = len(config.full_attention_layers) < config.num_hidden_layers
    rows, columns, frame_lengths, window_lengths = [], [], [], []
    order, offset = [], 0
    for frames, height, width in grids:
        row, column = merge_block_coordinates(height, width, stride)
        rows += [row] * frames
        columns += [column] * frames
        frame_lengths += [height * width] * frames
        if not windowed:
            continue
        tiles_across = -(-(width // stride) // window)
        tile = row // stride // window * tiles_across + column // stride // window
        order_of_frame = torch.argsort(tile, stable=True)
        lengths_of_frame = torch.bincount(tile).tolist()
        for _ in range(frames):
            order.append(order_of_frame + offset)
            window_lengths += lengths_of_frame
            offset += height * width
    return PatchLayout(
        rows_N=torch.cat(rows),
        columns_N=torch.cat(columns),
        frame_lengths=frame_lengths,
        window_order_N=torch.cat(order) if windowed else None,
        window_lengths=window_lengths,
    )


def rope_angles(rows_N: Tensor, columns_N: Tensor, head_dim: int) -> Tensor:
    """Float32 `[N, head_dim / 2]`: the row's angles, then the column's. Computed at each call, so
    no cast of the model can round them."""
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32, device=rows_N.device) / half
    frequencies = 1.0 / 10000.0**exponents
    return torch.cat([rows_N[:, None] * frequencies, columns_N[:, None] * frequencies], dim=-1)


def rotate(x_NHK: Tensor, cos_N1K: Tensor, sin_N1K: Tensor) -> Tensor:
    """Half-split rotary embedding in float32, cast back; `cos` and `sin` hold K / 2 columns."""
    first, second = x_NHK.float().chunk(2, dim=-1)
    rotated = (first * cos_N1K - second * sin_N1K, second * cos_N1K + first * sin_N1K)
    return torch.cat(rotated, dim=-1).to(x_NHK.dtype)


class Siglip2Attention(nn.Module):
    def __init__(self, config: Siglip2NavitConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_ND: Tensor, rope: tuple[Tensor, Tensor] | None, segments: Segments
    ) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (
            project(hidden_ND).unflatten(-1, (self.num_heads, self.head_dim))
            for project in projections
        )
        if rope is not None:
            query, key = rotate(query, *rope), rotate(key, *rope)
        if self.config._attn_implementation == "flash_attention_2":
            output = self._flash_attend(query, key, value, segments)
        else:
            output = attend_within(query, key, value, segments)
        return self.out_proj(output.flatten(1))

    def _flash_attend(
        self, query: Tensor, key: Tensor, value: Tensor, segments: Segments
    ) -> Tensor:
        output, _ = ALL_ATTENTION_FUNCTIONS["flash_attention_2"](
            self,
            *(x.transpose(0, 1)[None] for x in (query, key, value)),
            attention_mask=None,
            scaling=self.head_dim**-0.5,
            cu_seq_lens_q=segments.bounds,
            cu_seq_lens_k=segments.bounds,
            max_length_q=segments.longest,
            max_length_k=segments.longest,
            is_causal=False,
        )
        return output[0]


class Siglip2MLP(nn.Module):
    def __init__(self, config: Siglip2NavitConfig):
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(hidden_ND)))


class Siglip2EncoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: Siglip2NavitConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Siglip2Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Siglip2MLP(config)

    def forward(
        self, hidden_ND: Tensor, rope: tuple[Tensor, Tensor] | None, segments: Segments
    ) -> Tensor:
        hidden_ND = hidden_ND + self.self_attn(self.layer_norm1(hidden_ND), rope, segments)
        return hidden_ND + self.mlp(self.layer_norm2(hidden_ND))


class PatchConvolution(nn.Conv2d):
    """A convolution whose stride is its kernel, applied to flat patches `[N, channels * p * p]`."""

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.weight.flatten(1), self.bias)


class PositionTable(nn.Embedding):
    """Square table of learned positions, resized to each image's grid."""

    def forward(self, grids: Sequence[Grid], stride: int) -> Tensor:
        side = int(self.num_embeddings**0.5)
        table = self.weight.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        resized: dict[tuple[int, int], Tensor] = {}
        for _, height, width in grids:
            if (height, width) not in resized:
                positions = F.interpolate(
                    table, size=(height, width), mode="bicubic", align_corners=False
                )
                row, column = merge_block_coordinates(height, width, stride)
                index = (row * width + column).to(positions.device)
                resized[height, width] = positions[0].flatten(1).T[index]
        return torch.cat([resized[grid[1:]] for grid in grids for _ in range(grid[0])])


class Siglip2Embeddings(nn.Module):
    def __init__(self, config: Siglip2NavitConfig):
        super().__init__()
        self.config = config
        if config.num_patches > 0:
            features = config.num_channels * config.patch_size**2
            self.patch_embedding = nn.Linear(features, config.hidden_size)
            positions = config.num_patches
        else:
            self.patch_embedding = PatchConvolution(
                config.num_channels,
                config.hidden_size,
                kernel_size=config.patch_size,
                stride=config.patch_size,
            )
            positions = (config.image_size // config.patch_size) ** 2
        if config.preserve_original_pe:
            self.position_embedding = PositionTable(positions, config.hidden_size)

    def forward(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        hidden_ND = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        if self.config.preserve_original_pe:
            hidden_ND = hidden_ND + self.position_embedding(grids, self.config.hidden_stride)
        return hidden_ND


class Siglip2Encoder(nn.Module):
    def __init__(self, config: Siglip2NavitConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.layers = nn.ModuleList(
            Siglip2EncoderLayer(config) for _ in range(config.num_hidden_layers)
        )

    def forward(self, hidden_ND: Tensor, grids: Sequence[Grid]) -> Tensor:
        layout = patch_layout(grids, self.config)
        device, order = hidden_ND.device, layout.window_order_N
        rope = None
        if self.config.use_rope:
            head_dim = self.config.hidden_size // self.config.num_attention_heads
            angles = rope_angles(
                layout.rows_N.to(device), layout.columns_N.to(device), head_dim
            ).unsqueeze(1)
            rope = (angles.cos(), angles.sin())
        if order is not None:
            order = order.to(device)
            hidden_ND = hidden_ND[order]
            rope = None if rope is None else (rope[0][order], rope[1][order])
        full = self.config.full_attention_layers
        frames = Segments.of(layout.frame_lengths, device)
        windows = frames if order is None else Segments.of(layout.window_lengths, device)
        for index, layer in enumerate(self.layers):
            hidden_ND = layer(hidden_ND, rope, frames if index in full else windows)
        return hidden_ND if order is None else hidden_ND[torch.argsort(order)]


class Siglip2VisionModel(nn.Module):
    def __init__(self, config: Siglip2NavitConfig):
        super().__init__()
        self.embeddings = Siglip2Embeddings(config)
        self.encoder = Siglip2Encoder(config)
        # Part of every checkpoint, read by no forward: kept for the file, frozen by the model.
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        return self.encoder(self.embeddings(pixel_values, grids), grids)


class Siglip2Navit(nn.Module):
    """Patches to merged features.

    Args of `forward`:
        pixel_values: Normalised patches in merge-block order, `[N, 3 * patch_size ** 2]`.
        grids: Frames, rows and columns of each image; their products add up to N.

    Returns:
        `[N / stride ** 2, D * stride ** 2]`: the last layer's output, without `post_layernorm`.
    """

    def __init__(self, config: Siglip2NavitConfig):
        super().__init__()
        self.merge = config.hidden_stride**2
        self.vision_model = Siglip2VisionModel(config)

    def forward(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        return self.vision_model(pixel_values, grids).unflatten(0, (-1, self.merge)).flatten(1)
