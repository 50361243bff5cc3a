"""The loss of both trainers: of the supervised positions only."""

import functools
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from ..collators.rendering import IGNORE_INDEX
from ..core.errors import ModelError
from ..models.supervised_head import label_log_probs

UNSUPPORTED = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
    "output_router_logits",
)


@dataclass
class SupervisedOutput(ModelOutput):
    """What both trainers read of a forward pass with labels.

    Attributes:
        loss: Negative log-likelihood of the supervised tokens, their mean or, with
            `num_items_in_batch`, their sum over that count.
        log_probs: Of the supervised tokens, float32 `[S]`.
        entropy: Of the distributions they were predicted from, float32 `[S]`, without gradient.
        is_top1: Whether the token was the likeliest, bool `[S]`.
        label_mask: Which positions predict a supervised token, bool `[B, T]`.
        aux_loss: Always None; TRL asks for it.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


def use_supervised_head(model: PreTrainedModel | PeftModel) -> None:
    """Let `model(..., labels=labels)` compute the head at supervised positions only and return a
    `SupervisedOutput`. Without labels its forward stays as it is.

    After TRL's `add_fused_lm_head`, whose flag `fused_lm_head` then changes nothing.

    Raises:
        ModelError: the model changes its logits behind the head, or adds a loss of experts.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    text_config = base.config.get_text_config()
    for field in UNSUPPORTED:
        value = getattr(text_config, field, None)
        if value is True or value not in (None, False, 1):
            raise ModelError(
                f"{text_config.model_type} config, {field}",
                f"is {value}, which the loss at supervised positions would leave out",
                "use a language model without it",
            )
    own_forward = base.forward

    # With the model's own signature: the host and `generate` check keyword arguments against it.
    @functools.wraps(type(base).forward)
    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return own_forward(*args, **kwargs)
        kwargs.pop("fused_lm_head", None)
        items = kwargs.pop("num_items_in_batch", None)
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        mask = targets != IGNORE_INDEX
        # Before the backbone: a GPU would have to finish that before it could tell the count.
        rows = mask.flatten().nonzero()[:, 0]
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        log_probs, entropy, is_top1 = label_log_probs(
            self.get_output_embeddings(),
            hidden.flatten(0, 1).index_select(0, rows),
            targets.flatten()[rows],
        )
        count = torch.as_tensor(len(rows) if items is None else items).clamp(min=1)
        loss = -log_probs.sum() / count
        return SupervisedOutput(loss, log_probs, entropy, is_top1, label_mask=mask)

    base.forward = MethodType(forward, base)
