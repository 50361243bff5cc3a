"""Log-probabilities of labels from a language model's head, without the logits of all rows.

Shape suffixes: S supervised rows, C rows of one chunk, V words, H width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = {"cpu": 2**27}
DEVICE_CHUNK_BYTES = 2**29
"""Of one chunk of float32 rows. Every chunk reads and writes the whole float32 gradient
of the weight, so a GPU, where that takes longer than small matmuls, gets larger ones."""
PARTS = 16
"""A chunk's statistics are taken in this many parts, each with two more buffers of its size."""


def rows_per_chunk(words: int, device: torch.device, buffers: int = 1) -> int:
    """Rows of `words` float32 numbers that fit in a chunk `buffers` times."""
    size = CHUNK_BYTES.get(device.type, DEVICE_CHUNK_BYTES)
    return max(1, size // (4 * words * buffers))


def rows_per_call(module: nn.Module, rows: Tensor, words: int, buffers: int) -> int:
    """The same for calls of a whole module. All rows where ZeRO-3 has partitioned it: each call
    gathers its weights, which all ranks must do equally often."""
    if any(hasattr(p, "ds_id") for p in module.parameters()):
        return max(1, len(rows))
    return rows_per_chunk(words, rows.device, buffers)


def matmul_dtype(rows: Tensor) -> torch.dtype:
    """What a matrix product with `rows` is computed in here: autocast's dtype, else their own."""
    kind = rows.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right` with a float32 `total`, no product rounded before it is added."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def inside(module: nn.Module, compute: Callable[[Tensor], Any], rows: Tensor) -> Any:
    """`compute(rows)` as one call of `module`, so that its hooks surround it: ZeRO-3 gathers the
    module's weights by them, in the forward and in the backward pass."""
    own = module.__dict__.get("forward")
    module.forward = compute
    try:
        return module(rows)
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def active(module: Any) -> nn.Module:
    """The module that is computed: below PEFT's wrapper around a fully trained copy, that copy."""
    if "modules_to_save" not in module._modules:
        return module
    if module.disable_adapters or not module.active_adapters:
        return module.original_module
    return module.modules_to_save[module.active_adapters[0]]


def label_log_probs(
    head: nn.Module, hidden_SH: Tensor, labels_S: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of labels under the logits `head(hidden_SH)`.

    Softmax in float32; at no time are there logits of more than a chunk of rows.

    Args:
        head: A linear layer, also below adapters or quantised.
        labels_S: int64, each a word.

    Returns:
        Log-probabilities and, without gradient, the entropies of the distributions, float32 `[S]`,
        and whether the label is the likeliest word, bool `[S]`.
    """
    linear: Any = active(head)
    if type(linear) is nn.Linear:
        weight, bias = linear.weight, linear.bias
        return inside(linear, lambda h: LabelLogProbs.apply(h, weight, bias, labels_S), hidden_SH)

    # The layer's own forward. Not with the trained weights of a plain one: the gradient of each
    # chunk would be another tensor of their size.
    def chunk(hidden_CH: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = head(hidden_CH).float()
        picked = -F.cross_entropy(logits, labels_C, reduction="none")
        _, entropy, is_top1, *_ = label_statistics(logits.detach(), labels_C)
        return picked, entropy, is_top1

    # Of a packed or partitioned weight the shape is another one.
    words = getattr(linear, "out_features", None) or linear.weight.shape[0]
    rows = rows_per_call(head, hidden_SH, words, buffers=3)
    chunks = zip(hidden_SH.split(rows), labels_S.split(rows), strict=True)
    outputs = [checkpoint(chunk, *inputs, use_reentrant=False) for inputs in chunks]
    log_probs, entropy, is_top1 = map(torch.cat, zip(*outputs, strict=True))
    return log_probs, entropy, is_top1


def label_statistics(
    logits_CV: Tensor, labels_C: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probability, entropy, whether the label is the likeliest word, the largest logit and its
    probability, each `[C]`."""
    parts = []
    size = -(-len(labels_C) // PARTS) or 1
    for logits, labels in zip(logits_CV.split(size), labels_C.split(size), strict=True):
        top, word = logits.max(dim=-1)
        logits = logits - top[:, None]
        picked = logits.gather(1, labels[:, None])[:, 0]
        exps = logits.exp()
        total = exps.sum(dim=-1)
        entropy = total.log() - exps.mul_(logits).sum(dim=-1) / total
        parts.append((picked - total.log(), entropy, word == labels, top, 1 / total))
    log_prob, entropy, is_top1, top, top_prob = map(torch.cat, zip(*parts, strict=True))
    return log_prob, entropy, is_top1, top, top_prob


class LabelLogProbs(torch.autograd.Function):
    """Of a linear head, in chunks of rows whose logits the backward pass computes again; the
    gradients of weight and bias are summed in float32 and rounded once."""

    @staticmethod
    def forward(
        ctx: Any, hidden_SH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_S: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.dtype = matmul_dtype(hidden_SH)
        rows = rows_per_chunk(len(weight_VH), hidden_SH.device)
        with torch.autocast(hidden_SH.device.type, enabled=False):
            weight = weight_VH.to(ctx.dtype)
            buffer = logit_buffer(hidden_SH, weight, rows)
            parts = []
            for hidden, labels in zip(hidden_SH.split(rows), labels_S.split(rows), strict=True):
                logits = fill_logits(buffer, hidden.to(ctx.dtype), weight, bias_V)
                parts.append(label_statistics(logits, labels))
        log_probs, entropy, is_top1, *top = map(torch.cat, zip(*parts, strict=True))
        ctx.save_for_backward(hidden_SH, weight_VH, bias_V, labels_S, *top)
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_SH, weight_VH, bias_V, labels_S, top_S, top_prob_S = ctx.saved_tensors
        grad_S = grads[0]
        of_hidden, of_weight, of_bias, _ = ctx.needs_input_grad
        weight = weight_VH.to(ctx.dtype)
        d_hidden = torch.empty_like(hidden_SH) if of_hidden else None
        d_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if of_weight else None
        d_bias = torch.zeros_like(bias_V, dtype=torch.float32) if of_bias else None
        rows = rows_per_chunk(len(weight_VH), hidden_SH.device)
        buffer = logit_buffer(hidden_SH, weight, rows)
        for start in range(0, len(hidden_SH), rows):
            chunk = slice(start, start + rows)
            hidden, grad = hidden_SH[chunk].to(ctx.dtype), grad_S[chunk]
            logits = fill_logits(buffer, hidden, weight, bias_V)
            scale = -grad * top_prob_S[chunk]
            d_logits = logits.sub_(top_S[chunk, None]).exp_().mul_(scale[:, None])
            d_logits[torch.arange(len(grad), device=grad.device), labels_S[chunk]] += grad
            if d_bias is not None:
                d_bias += d_logits.sum(dim=0)
            d_logits = d_logits.to(ctx.dtype)
            if d_hidden is not None:
                d_hidden[chunk] = d_logits @ weight
            if d_weight is not None:
                add_product(d_weight, d_logits.T, hidden)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight_VH.dtype),
            None if d_bias is None else d_bias.to(bias_V.dtype),
            None,
        )


def logit_buffer(hidden_SH: Tensor, weight_VH: Tensor, rows: int) -> Tensor:
    shape = min(rows, len(hidden_SH)), len(weight_VH)
    return torch.empty(shape, dtype=torch.float32, device=hidden_SH.device)


def fill_logits(
    buffer: Tensor, hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None
) -> Tensor:
    """The logits of these rows in the first rows of the float32 buffer."""
    logits = buffer[: len(hidden_CH)]
    if hidden_CH.dtype == logits.dtype:
        torch.mm(hidden_CH, weight_VH.T, out=logits)
    elif hidden_CH.is_cuda:
        torch.mm(hidden_CH, weight_VH.T, out_dtype=logits.dtype, out=logits)
    else:
        logits.copy_(hidden_CH @ weight_VH.T)
    return logits if bias_V is None else logits.add_(bias_V)
