"""Real tokens per second of training, padded and packed, and what packed samples see of another.

    python benchmarks/packed_training.py

A random Ovis2.5 of small size, its parts in about the proportions of the 2B model's work, in
float32 on one thread. Both sides run `SFTTrainer.training_step`, forward and backward without
recompute, over the same samples (`synthetic.llava_like`, with real JPEG files), in turn, process
time:

- `trl`: batches of 8 in random order, padded to their longest, sdpa and TRL's own head.
- `packed`: rows of up to 8,192 tokens, our attention inside the samples, our head.

The 16 samples are every 24th part of many by length; their random order is one, of 200, that pads
as batches of the whole mix do, 45 % (`packing.py`). Collation is outside (`collation.py`),
normalising pixels is inside ours. Equal are the loss of every sample (`loss_difference`, goal 1e-5)
and the gradients of the whole set (`gradient_difference`, relative to each tensor's largest).
`isolation` is the largest difference between a sample's logits in a packed row and alone (goal
1e-6), for the language models that pack, and of image embeddings (`vision`); `without_bounds` is
the same where samples do see each other.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from measuring import environment, summary
from synthetic import (
    SEED,
    llava_like,
    photo,
    sentence,
    train_tokenizer,
    vocabulary,
)
from torch import Tensor
from torch.nn import functional as F
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from vlmtune.collators.packed import PackedCollator
from vlmtune.collators.padded import PaddedCollator
from vlmtune.collators.sample import SampleEncoder
from vlmtune.data.conversation import Conversation, Turn
from vlmtune.data.images import PixelLimits
from vlmtune.data.packing import RowBounds, Samples, pack
from vlmtune.models import Ovis2_5, Ovis2_5Config, Ovis2_5Processor
from vlmtune.models.attention import packing_attention
from vlmtune.models.ovis2_5.image_processing_ovis2_5 import Ovis2_5ImageProcessor
from vlmtune.sft.heads import use_supervised_head

SAMPLES, BATCH, ROW, ROUNDS = 16, 8, 8192, 3
TYPICAL_WASTE = 0.45
IGNORED = -100
GOALS = {"ratio": 1.7, "loss_difference": 1e-5, "isolation": 1e-6}
LANGUAGE_MODELS = ("qwen3", "qwen2", "llama")
Batch = dict[str, Any]


def main() -> None:
    torch.set_num_threads(1)
    draw = np.random.default_rng(SEED)
    words = vocabulary(draw)
    processor = Ovis2_5Processor(Ovis2_5ImageProcessor(), train_tokenizer(draw, words))
    limits = PixelLimits(4096, 1792**2, 4096, 1792**2, 4096, 1792**2, 1, 1)
    encoder = SampleEncoder(processor, limits, ROW, ROW, "as_is")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = sample_rows(draw, words, encoder, folder)
        save_model(folder / "model", processor, "qwen3")
        batches = all_batches(draw, rows, encoder)
        trl = make_trainer(folder, "sdpa", processor)
        ours = make_trainer(folder, packing_attention(None), processor)
        use_supervised_head(model_of(ours))
        real_tokens = torch.cat([batch["attention_mask"].flatten() for batch in batches["trl"]])
        result = {
            "benchmark": "packed_training",
            "goal": GOALS,
            "samples": SAMPLES,
            "tokens": sum(row["length"] for row in rows),
            "parameters": sum(p.numel() for p in model_of(trl).parameters()),
            "padded_waste": round(1 - float(real_tokens.float().mean()), 3),
            "loss_difference": loss_difference(trl, ours, batches),
            **timed(trl, ours, rows, batches),
            **gradient_difference(trl, ours),
        }
        result["isolation"] = isolation(folder, processor, encoder, rows)
    assert result["loss_difference"] <= GOALS["loss_difference"]
    libraries = ("torch", "transformers", "trl", "accelerate")
    print(json.dumps({**result, "equal": True, **environment(*libraries)}))


def sample_rows(
    draw: np.random.Generator, words: list[str], encoder: SampleEncoder, folder: Path
) -> list[dict[str, Any]]:
    """Rows of a prepared dataset: an image, or none, a question and an answer."""
    columns = llava_like(draw, 24 * SAMPLES)
    typical = np.argsort(columns["length"], kind="stable")[12::24]
    columns = {name: values[typical] for name, values in columns.items()}
    per_word = len(encoder.processor.text_ids(sentence(draw, words, 1000))) / 1000
    rows = []
    for i, (length, trained, patches, cells) in enumerate(
        zip(
            *(columns[name] for name in ("length", "trained_tokens", "patches", "cells")),
            strict=True,
        )
    ):
        said, asked = (
            sentence(draw, words, max(1, round(tokens / per_word)))
            for tokens in (trained, length - patches // 4 - trained)
        )
        images = []
        if patches:
            images = [str(folder / f"{i}.jpg")]
            photo(draw, *(32 * cells).tolist()).save(images[0], quality=90)
        turns = [Turn("user", "<image>" * len(images) + asked), Turn("assistant", said, True)]
        rows.append(encoder.row(Conversation(str(i), turns, images, source="made", record=i + 1)))
    return rows


def save_model(folder: Path, processor: Ovis2_5Processor, language_model: str) -> None:
    torch.manual_seed(SEED)
    config = Ovis2_5Config(
        llm_config={
            "model_type": language_model,
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 192,
            "intermediate_size": 576,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "max_position_embeddings": ROW,
        },
        vit_config={
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        visual_vocab_size=384,
    )
    Ovis2_5(config).save_pretrained(folder)


def all_batches(
    draw: np.random.Generator, rows: list[dict[str, Any]], encoder: SampleEncoder
) -> dict[str, list[Batch]]:
    """Micro-batches of all samples for each way, `sample_ids` naming their rows."""
    lengths, patches = (np.array([row[key] for row in rows]) for key in ("length", "patches"))
    orders = [draw.permutation(SAMPLES) for _ in range(200)]
    at_random = min(orders, key=lambda order: abs(padding(lengths[order]) - TYPICAL_WASTE))
    packed = pack(at_random, Samples(lengths, patches, lengths.astype(float)), RowBounds(ROW))
    padded, one_row = PaddedCollator(encoder), PackedCollator(encoder)
    batches = {
        "trl": [padded([rows[i] for i in part]) for part in at_random.reshape(-1, BATCH)],
        "packed": [one_row([rows[i] for i in row]) for row in packed],
    }
    for batch in batches["trl"]:  # TRL's collator normalises
        if "pixel_values" in batch:
            pixels = encoder.processor.image_processor.normalise(batch["pixel_values"])
            batch["pixel_values"] = pixels
    return batches


def padding(lengths: np.ndarray) -> float:
    """Share of the tokens that is padding, of neighbours in batches of 8."""
    longest = lengths.reshape(-1, BATCH).max(axis=1)
    return float(1 - lengths.sum() / (longest.sum() * BATCH))


def make_trainer(folder: Path, attention: str, processor: Ovis2_5Processor) -> SFTTrainer:
    model = Ovis2_5.from_pretrained(
        folder / "model", dtype="float32", attn_implementation=attention
    )
    args = SFTConfig(
        output_dir=str(folder / "output"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",
    )
    return SFTTrainer(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list([{"id": "made"}]),
        processing_class=processor,
        data_collator=lambda rows: {},
    )


def step(trainer: SFTTrainer, batch: Batch, tokens: int) -> None:
    """Forward and backward of a micro-batch, as in one step of the whole set."""
    trainer.training_step(model_of(trainer), inputs_of(trainer, batch), torch.tensor(tokens))


def model_of(trainer: SFTTrainer) -> torch.nn.Module:
    assert trainer.model is not None
    return trainer.model


def inputs_of(trainer: SFTTrainer, batch: Batch) -> Batch:
    inputs = {key: value for key, value in batch.items() if key != "sample_ids"}
    if "pixel_values" in inputs and inputs["pixel_values"].dtype == torch.uint8:
        processor: Any = trainer.processing_class
        inputs["pixel_values"] = processor.image_processor.normalise(inputs["pixel_values"])
    return inputs


def epoch(trainer: SFTTrainer, batches: Sequence[Batch], rows: list[dict[str, Any]]) -> float:
    """Process time of all micro-batches; the gradients of the whole set are left."""
    model = model_of(trainer).train()
    model.zero_grad()
    tokens = sum(row["trained_tokens"] for row in rows)
    began = time.process_time()
    for batch in batches:
        step(trainer, batch, tokens)
    return time.process_time() - began


def loss_difference(trl: SFTTrainer, ours: SFTTrainer, batches: dict[str, list[Batch]]) -> float:
    """The largest over all samples, between TRL's padded and our packed rows."""
    theirs, packed = sample_losses(trl, batches["trl"]), sample_losses(ours, batches["packed"])
    assert theirs.keys() == packed.keys() and len(theirs) == SAMPLES
    return max(abs(theirs[name] - packed[name]) for name in theirs)


def gradient_difference(trl: SFTTrainer, ours: SFTTrainer) -> dict[str, float]:
    """Of what the last epoch of each has left: TRL's, and our packed one."""
    pairs = zip(model_of(trl).parameters(), model_of(ours).parameters(), strict=True)
    known = [(p.grad, q.grad) for p, q in pairs if p.grad is not None and q.grad is not None]
    differences = [float((g - h).abs().max() / g.abs().max()) for g, h in known if g.any()]
    assert max(differences) < 1e-4
    return {"gradient_difference": max(differences), "gradients_compared": len(differences)}


@torch.no_grad()
def sample_losses(trainer: SFTTrainer, batches: list[Batch]) -> dict[str, float]:
    """Mean loss of each sample's trained tokens, from the logits of its row."""
    losses = {}
    model = model_of(trainer).eval()
    for batch in batches:
        inputs = inputs_of(trainer, batch)
        labels = F.pad(inputs.pop("labels")[:, 1:], (0, 1), value=IGNORED)
        if "cu_seq_lens_q" in batch:
            logits = model(**inputs, use_cache=False).logits[0]
            bounds = batch["cu_seq_lens_q"].tolist()
            parts = [(logits[a:b], labels[0, a:b]) for a, b in pairwise(bounds)]
        else:
            parts = list(zip(model(**inputs, use_cache=False).logits, labels, strict=True))
        for name, (logits, targets) in zip(batch["sample_ids"], parts, strict=True):
            losses[name] = float(F.cross_entropy(logits, targets, ignore_index=IGNORED))
    return losses


def timed(
    trl: SFTTrainer, ours: SFTTrainer, rows: list[dict[str, Any]], batches: dict[str, list[Batch]]
) -> dict[str, Any]:
    """Real tokens per second of both, and ours over TRL's."""
    tokens = sum(row["length"] for row in rows)
    rates = {name: [] for name in batches}
    for _ in range(ROUNDS):
        for name, parts in batches.items():
            seconds = epoch(trl if name == "trl" else ours, parts, rows)
            rates[name].append(tokens / seconds)
    found = {name: summary(values, 0) for name, values in rates.items()}
    ratio = round(found["packed"]["median"] / found["trl"]["median"], 2)
    return {"real_tokens_per_s": found, "ratio": ratio}


@torch.no_grad()
def isolation(
    folder: Path, processor: Ovis2_5Processor, encoder: SampleEncoder, rows: list[dict[str, Any]]
) -> dict[str, float]:
    """Largest difference between what samples give in a packed row and alone."""
    samples = sorted(rows, key=lambda row: row["length"])[:4]
    samples += [row for row in rows if row["patches"] and row not in samples][:2]
    one_row = PackedCollator(encoder)
    found = {}
    for name in LANGUAGE_MODELS:
        place = folder / name
        save_model(place, processor, name)
        model = Ovis2_5.from_pretrained(
            place, dtype="float32", attn_implementation=packing_attention(None)
        ).eval()
        together, alone = (
            torch.cat([logits_of(model, processor, one_row(part)) for part in parts])
            for parts in ([samples], [[sample] for sample in samples])
        )
        found[name] = float((together - alone).abs().max())
    mixed = one_row(samples)
    mixed = {k: v for k, v in mixed.items() if not k.startswith(("cu_seq", "max_length", "posit"))}
    found["without_bounds"] = float((logits_of(model, processor, mixed) - alone).abs().max())
    seen = [one_row([row]) for row in samples if row["patches"]]
    normalise = processor.image_processor.normalise
    pixels, grids = [normalise(b["pixel_values"]) for b in seen], [b["grid_thws"] for b in seen]
    together = model.embed_images(torch.cat(pixels), as_grids(torch.cat(grids)))
    alone = torch.cat(
        [model.embed_images(p, as_grids(g)) for p, g in zip(pixels, grids, strict=True)]
    )
    return {**found, "vision": float((together - alone).abs().max())}


def as_grids(grid_thws: Tensor) -> list[tuple[int, int, int]]:
    return [(t, h, w) for t, h, w in grid_thws.tolist()]


def logits_of(model: Ovis2_5, processor: Ovis2_5Processor, batch: Batch) -> Tensor:
    inputs = {k: v for k, v in batch.items() if k not in ("sample_ids", "labels")}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = processor.image_processor.normalise(inputs["pixel_values"])
    return model(**inputs, use_cache=False).logits[0]


if __name__ == "__main__":
    main()
