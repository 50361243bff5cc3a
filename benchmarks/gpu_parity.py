"""The part of gpu_suite.py that compares outputs: ours and TRL's, samples packed and alone."""

import json
from typing import Any

import numpy as np
import torch
from gpu_parts import BATCH, Setting, Timer, build_model, data_keys, trl_dataset, trl_processor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from vlmtune.collators.packed import PackedCollator
from vlmtune.collators.padded import PaddedCollator
from vlmtune.configs.load import load_config
from vlmtune.models.attention import Segments, attend_within, packing_attention
from vlmtune.models.loading import load_processor
from vlmtune.sft.arguments import training_arguments
from vlmtune.sft.data import load_data
from vlmtune.sft.heads import use_supervised_head


def parity(setting: Setting) -> dict:
    """Whether both sides compute the same: ids, pixels, losses, and samples packed and alone."""
    processor = load_processor(str(setting.folder / "2b"))
    keys = {**data_keys(setting, "2b"), "output_dir": str(setting.folder / "out")}
    file = setting.folder / "parity.json"
    file.write_text(json.dumps(keys), "utf-8")
    config = load_config([str(file)])
    data = load_data(config, training_arguments(config), processor)
    records = json.loads((setting.folder / "data.json").read_text("utf-8"))
    dataset = trl_dataset(setting)
    said = {record["conversations"][1]["value"]: i for i, record in enumerate(records)}
    theirs = [dataset[i] for i in (*range(BATCH - 1), len(dataset) - 1)]
    assert data.train is not None
    of_ours = [said[row["completion"].removesuffix("<|im_end|>")] for row in theirs]
    rows = [data.train.dataset[i] for i in of_ours]
    collator = DataCollatorForVisionLanguageModeling(
        trl_processor(setting, "2b"), completion_only_loss=True
    )
    image_processor = processor.image_processor
    batches = {
        "trl": dict(collator(theirs)),
        "padded": PaddedCollator(data.encoder)(rows),
        "packed": PackedCollator(data.encoder)(rows),
    }
    for batch in batches.values():
        batch.pop("sample_ids", None)
        for name, value in batch.items():
            batch[name] = value.to(setting.device) if torch.is_tensor(value) else value
        if batch["pixel_values"].dtype == torch.uint8:
            batch["pixel_values"] = image_processor.normalise(batch["pixel_values"])
    names = ("attention_mask", "labels", "pixel_values", "grid_thws")
    padded, mask = batches["padded"], batches["padded"]["attention_mask"]
    equal = {name: torch.equal(padded[name], batches["trl"][name]) for name in names}
    equal["input_ids"] = torch.equal(padded["input_ids"] * mask, batches["trl"]["input_ids"] * mask)

    model = build_model(setting, "2b", torch.float32, packing_attention(None)).eval()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    found: dict[str, Any] = {"equal_to_trl": equal, "losses": {}}
    autocast = torch.autocast(setting.device, torch.bfloat16)
    with torch.no_grad(), autocast:
        found["losses"]["trl"] = model(**batches["trl"], fused_lm_head=True).loss.item()
        use_supervised_head(model)
        for name in ("padded", "packed"):
            found["losses"][name] = model(**batches[name]).loss.item()
        found["packed_from_alone_bf16"] = isolation(model, data.encoder, rows, image_processor)
    with torch.no_grad():
        found["packed_from_alone_fp32"] = isolation(model, data.encoder, rows, image_processor)
    return {**found, "attention": attention_paths(setting)}


def isolation(model: Any, encoder: Any, rows: list, image_processor: Any) -> dict[str, float]:
    """How far logits of samples in one row are from those of each alone."""

    def logits_of(some: list) -> torch.Tensor:
        batch = PackedCollator(encoder)(some)
        del batch["sample_ids"], batch["labels"]
        batch = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in batch.items()}
        if "pixel_values" in batch:
            batch["pixel_values"] = image_processor.normalise(batch["pixel_values"])
        return model(**batch, use_cache=False).logits[0].float()

    together, start, worst, same = logits_of(rows), 0, 0.0, 0
    for row in rows:
        alone = logits_of([row])
        part = together[start : start + len(alone)]
        worst = max(worst, (part - alone).abs().max().item())
        same += int((part.argmax(-1) == alone.argmax(-1)).sum())
        start += len(alone)
    return {
        "largest_difference": worst,
        "spread_of_logits": round(together.std().item(), 4),
        "same_top1": round(same / start, 5),
    }


def attention_paths(setting: Setting) -> dict:
    """Forward and backward of one layer's attention over a row: inside segments, and with a block
    mask over the whole row. The kernel for segments is the varlen one where there is one."""
    lengths = np.diff([0, *sorted(np.random.default_rng(0).choice(setting.row_tokens, 12, False))])
    lengths = [int(n) for n in lengths if n] + [setting.row_tokens - int(lengths.sum())]
    shape = (setting.row_tokens, 16, 128)
    made = [torch.randn(shape, device=setting.device, dtype=setting.half) for _ in range(4)]
    towards = made.pop()
    for tensor in made:
        tensor.requires_grad_()
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    sample = sample.to(setting.device)
    mask = (sample[:, None] == sample).tril()
    segments = Segments.of(lengths, torch.device(setting.device))

    def masked() -> torch.Tensor:
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in made)
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return output[0].transpose(0, 1)

    ways = {"segments": lambda: attend_within(*made, segments, causal=True), "mask": masked}
    count, found, outputs = 20 if setting.device == "cuda" else 1, {}, {}
    for name, way in ways.items():
        for _ in range(3):
            way().backward(towards)
        with Timer(setting.device) as timer:
            for _ in range(count):
                outputs[name] = way()
                outputs[name].backward(towards)
        found[f"{name}_ms"] = round(timer.seconds / count * 1000, 3)
    apart = (outputs["segments"].float() - outputs["mask"].float()).abs().max().item()
    return {**found, "tokens": setting.row_tokens, "segments": len(lengths), "difference": apart}
