"""Ovis2.5 under the module and tensor names of the published checkpoints."""

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ...core.errors import ModelError
from .configuration_ovis2_5 import (
    IMAGE_BEGIN_ID,
    NUM_INDICATORS,
    VIDEO_BEGIN_ID,
    VIDEO_END_ID,
    VISUAL_ATOM_ID,
    Ovis2_5Config,
)
from .vision_ovis2_5 import Grid
from .visual_tokenizer_ovis2_5 import VisualEmbeddingTable, VisualTokenizer


class Backbone:
    """`Ovis2_5` without its head, for callers of `model.base_model(...)` such as TRL's fused head.

    No module, so the parameters keep their one published path (docs/decisions/0002).
    """

    # Asked by transformers when it looks for parallel plans.
    _tp_plan = None
    _pp_plan = None

    def __init__(self, model: "Ovis2_5"):
        self.config = model.config
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return self._model.hidden_states(*args, **kwargs)


class Ovis2_5(PreTrainedModel, GenerationMixin):
    """Image and text to text.

    Inputs, with B samples of T tokens and N patches in the whole batch:
        input_ids: int64 `[B, T]`; every image is a begin indicator, its atoms and an end indicator
            (the negative ids of `configuration_ovis2_5`).
        pixel_values: `[N, 3 * patch_size ** 2]`, all images in order of occurrence, or None.
        grid_thws: int64 `[images, 3]`: frames, rows and columns of patches.
        labels: int64 `[B, T]`, unshifted, -100 where no loss applies.

    Raises:
        ModelError: the ids and the pixels do not describe the same images.

    Source: AIDC-AI/Ovis 2.5.0 and AIDC-AI/Ovis2.5-9B.
    """

    config_class = Ovis2_5Config
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities: ClassVar[list[str]] = ["image", "video", "text"]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_flash_attn = True
    _supports_sdpa = True
    # transformers adds those of the language model.
    _no_split_modules: ClassVar[list[str]] = ["Siglip2EncoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]

    def __init__(self, config: Ovis2_5Config):
        super().__init__(config)
        self.llm = AutoModelForCausalLM.from_config(config.llm_config)
        self.visual_tokenizer = VisualTokenizer(config)
        self.vte = VisualEmbeddingTable(config.visual_vocab_size, config.llm_config.hidden_size)
        self.post_init()
        self._freeze_unused()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        # Loading makes every parameter trainable again.
        (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze_unused()
        return loaded

    def save_pretrained(self, save_directory, *args, state_dict=None, **kwargs):
        if state_dict is not None:
            # ZeRO-1 and 2 hand over the tied head as a tensor of its own.
            tied = self.all_tied_weights_keys
            state_dict = {k: v for k, v in state_dict.items() if k not in tied}
        return super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)

    def _freeze_unused(self) -> None:
        self.visual_tokenizer.vit.vision_model.post_layernorm.requires_grad_(False)

    @property
    def base_model(self) -> Backbone:
        return Backbone(self)

    @property
    def module_aliases(self) -> dict[str, str]:
        """Short names of parts, beside their module paths, for `train_modules`."""
        last = self.config.vit_config.num_hidden_layers - 1
        layers = "visual_tokenizer.vit.vision_model.encoder.layers"
        return {"visual_tokenizer.vit.last_block": f"{layers}.{last}"}

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.llm.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.llm.get_decoder()

    def _apply(self, fn, recurse=True):
        # A cast of the model (`.half()`, DeepSpeed's bf16) must not round the RoPE frequencies.
        kept = {
            name: b
            for name, b in self.named_buffers()
            if name.endswith("inv_freq") and not b.is_meta
        }
        super()._apply(fn, recurse)
        for name, frequencies in kept.items():
            owner, _, leaf = name.rpartition(".")
            device = self.get_buffer(name).device
            setattr(self.get_submodule(owner), leaf, frequencies.to(device, torch.float32))
        return self

    def enable_input_require_grads(self) -> None:
        """Let gradients begin behind frozen embeddings, of text and of patches: reentrant
        checkpointing follows inputs that require them."""
        super().enable_input_require_grads()
        tower = self.visual_tokenizer.vit.vision_model

        def require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if any(p.requires_grad for p in tower.encoder.parameters()):
                output.requires_grad_(True)

        self._require_grads_hooks.append(tower.embeddings.register_forward_hook(require_grad))

    def embed_images(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Embeddings `[n, hidden_size]` of the visual tokens of all images, in order."""
        return self._visual_rows(pixel_values, grids)[:-NUM_INDICATORS]

    def _visual_rows(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Those embeddings and the `NUM_INDICATORS` of the indicators behind them."""
        return self.visual_tokenizer.embed(pixel_values, grids, self.vte)

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        grid_thws: Tensor | None = None,
    ) -> Tensor:
        """Embeddings `[B, T, hidden_size]` with every image in its place."""
        embeds = self.get_input_embeddings()(input_ids.clamp(min=0))
        atoms = input_ids == VISUAL_ATOM_ID
        grids = [] if grid_thws is None else grid_thws.tolist()
        self._check_images(input_ids, atoms, pixel_values, grids)
        if pixel_values is not None:
            rows = self._visual_rows(pixel_values, [(t, h, w) for t, h, w in grids])
            ids = input_ids.flatten()
            places = (ids < 0).nonzero()[:, 0]
            found = ids[places]
            is_atom = found == VISUAL_ATOM_ID
            indicators = len(rows) - NUM_INDICATORS + IMAGE_BEGIN_ID - found
            sources = torch.where(is_atom, is_atom.cumsum(0) - 1, indicators)
            filling = rows.to(embeds.dtype).index_select(0, sources)
            embeds = embeds.flatten(0, 1).index_copy(0, places, filling).view_as(embeds)
        elif self._vision_must_run():
            embeds = embeds + self._unseen_image(embeds)
        return embeds

    def _check_images(
        self,
        input_ids: Tensor,
        atoms: Tensor,
        pixel_values: Tensor | None,
        grids: Sequence[Sequence[int]],
    ) -> None:
        patches = sum(t * h * w for t, h, w in grids)
        tokens = patches // self.config.vit_config.hidden_stride**2
        rows = 0 if pixel_values is None else len(pixel_values)
        if pixel_values is not None and not pixel_values.is_floating_point():
            raise ModelError(
                "Ovis2_5.forward",
                f"pixel_values are {pixel_values.dtype}: bytes that are not normalised yet.",
                "pass them through the image processor's normalise first.",
            )
        begins = (input_ids == IMAGE_BEGIN_ID) | (input_ids == VIDEO_BEGIN_ID)
        unknown = (input_ids < 0) & ((input_ids > VISUAL_ATOM_ID) | (input_ids < VIDEO_END_ID))
        found = torch.stack([atoms.sum(), begins.sum(), unknown.sum()]).tolist()
        if found == [tokens, len(grids), 0] and rows == patches:
            return
        what = [
            f"input_ids hold {found[0]} visual tokens (by row {atoms.sum(dim=-1).tolist()}) of "
            f"{found[1]} images, the grids of {len(grids)} images {tokens}."
        ]
        if rows != patches:
            what.append(f"pixel_values have {rows} rows, the grids {patches} patches.")
        if found[2]:
            what.append(f"input_ids hold {sorted(set(input_ids[unknown].tolist()))}.")
        raise ModelError(
            "Ovis2_5.forward",
            " ".join(what),
            "expand each placeholder with the processor and pass that image's pixels with it.",
        )

    def _vision_must_run(self) -> bool:
        """Whether a batch without images must still touch every vision parameter: other ranks
        wait for its gradients, and under ZeRO-3 for its part of the weights. In training always,
        so that one process takes the same optimizer steps as several."""
        return self.training or is_deepspeed_zero3_enabled()

    def _unseen_image(self, like: Tensor) -> Tensor:
        """A zero that depends on every vision parameter, with gradients that are exactly zero."""
        vit = self.config.vit_config
        side = vit.hidden_stride
        patches = like.new_zeros(side**2, vit.num_channels * vit.patch_size**2)
        rows = self._visual_rows(patches, [(1, side, side)]).to(like.dtype)
        # A product with 0 would turn an overflow into NaN; `where` never reads the value.
        return torch.where(torch.zeros_like(rows, dtype=torch.bool), rows, 0.0).sum()

    def hidden_states(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        grid_thws: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Last hidden states `[B, T, hidden_size]` of the language model, after its final norm."""
        if inputs_embeds is None:
            if input_ids is None:
                raise ModelError(
                    "Ovis2_5.forward", "neither input_ids nor inputs_embeds is given.", "pass one."
                )
            inputs_embeds = self.embed(input_ids, pixel_values, grid_thws)
        return self.get_decoder()(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        grid_thws: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        outputs = self.hidden_states(
            input_ids, attention_mask, pixel_values, grid_thws, inputs_embeds, **kwargs
        )
        logits = self.get_output_embeddings()(outputs.last_hidden_state)
        loss = None if labels is None else causal_lm_loss(logits, labels, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        grid_thws: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """`GenerationMixin.generate` of the language model on the merged embeddings: what comes
        back are the new tokens only, `[B, new]`. Pad prompts on the left."""
        if kwargs.get("inputs_embeds") is None:
            if input_ids is None:
                raise ModelError("Ovis2_5.generate", "input_ids are missing.", "pass input_ids.")
            kwargs["inputs_embeds"] = self.embed(input_ids, pixel_values, grid_thws)
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
        settings = copy.deepcopy(kwargs.pop("generation_config", None) or self.generation_config)
        unused = settings.update(**kwargs)
        penalty, settings.repetition_penalty = settings.repetition_penalty or 1.0, 1.0
        if penalty != 1.0:
            # transformers (5.23) would spare as many new tokens as the row has padding.
            given = unused.get("logits_processor") or ()
            penalties = [RepetitionPenaltyLogitsProcessor(penalty), *given]
            unused["logits_processor"] = LogitsProcessorList(penalties)
        return self.llm.generate(
            attention_mask=attention_mask, generation_config=settings, **unused
        )


def causal_lm_loss(
    logits_BTV: Tensor, labels_BT: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Mean cross-entropy over labels != -100, each predicted one position earlier; the sum divided
    by `num_items_in_batch` where the trainer counts tokens over several batches."""
    logits, labels = logits_BTV[:, :-1].float().flatten(0, 1), labels_BT[:, 1:].flatten()
    total = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)
