"""Memory of one training run of Ovis2.5 per GPU, by arithmetic on the real architectures.

    python benchmarks/zero_memory.py             one JSON line
    python benchmarks/zero_memory.py --table     the Markdown tables of docs/zero.md
    python benchmarks/zero_memory.py --output benchmarks/results/zero_memory.json

Nothing is trained and no GPU is needed: parameters are counted on the meta device, settings are
read from configs/zero, and every term is a formula. docs/zero.md explains each term and names its
source; tests/benchmarks compares the formulas with tensors that really live in a tiny run.
"""

import argparse
import datetime
import json
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from vlmtune.models import Ovis2_5, Ovis2_5Config
from vlmtune.models.ovis2_5.configuration_ovis2_5 import NUM_INDICATORS
from vlmtune.models.ovis2_5.visual_tokenizer_ovis2_5 import BUFFERS
from vlmtune.models.supervised_head import rows_per_chunk

GB = 10**9
GPUS = (1, 2, 4, 8)
CARDS = (24, 40, 80, 141)
RESERVE = 0.10
"""Share of a card left for the CUDA context, NCCL and fragmentation: assumed, not measured."""

ENGINES = (
    "none",
    "zero0",
    "zero1",
    "zero2",
    "zero3",
    "zero2_offload",
    "zero3_offload",
    "zero3_offload_all",
)
# ZeRO-0 needs the memory of a run without ZeRO and starts Adam one step late in bf16.
CHOICES = tuple(engine for engine in ENGINES if engine != "zero0")

STAGE_1 = ("visual_tokenizer.",)
"""What stage 1 of the three-stage recipe trains."""

# deepspeed 0.19.8: reduce_bucket_size in runtime/zero/config.py, and what runtime/engine.py takes
# for the all-reduce of stage 0.
DEFAULT_BUCKET = 500_000_000

CUDA = torch.device("cuda")

# config.json of AIDC-AI/Ovis2.5-2B and AIDC-AI/Ovis2.5-9B.
_VIT = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
_LLM = {
    "2B": {
        "hidden_size": 2048,
        "num_hidden_layers": 28,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "9B": {
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}
_LLM_BOTH = {
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
}


@dataclass(frozen=True)
class Sample:
    """One training sample: all its tokens, and the patches of its image (four to a token)."""

    tokens: int
    patches: int


# The longest sample and the largest image of configs/presets, and a sample of 768 x 768 pixels.
SAMPLES = {
    "2B": {"longest": Sample(6000, 9408), "medium": Sample(1024, 2304)},
    "9B": {"longest": Sample(6000, 12544), "medium": Sample(1024, 2304)},
}


def ovis_config(size: str) -> Ovis2_5Config:
    return Ovis2_5Config(llm_config={**_LLM_BOTH, **_LLM[size]}, vit_config=_VIT)


@dataclass(frozen=True)
class Counts:
    """Parameters of a model; `trained` leaves out what no gradient reaches."""

    total: int
    trained: int
    largest: int
    matrices: int
    hidden_size: int
    parts: dict[str, int]


def count_parameters(config: Ovis2_5Config, train: tuple[str, ...] = ("",)) -> Counts:
    """Counts on the meta device; `train` names the trained modules, all by default."""
    with torch.device("meta"):
        model = Ovis2_5(config)
    named = list(model.named_parameters())
    parts = {
        part: sum(p.numel() for name, p in named if name.startswith(f"{part}."))
        for part in ("llm", "visual_tokenizer.vit", "visual_tokenizer.head", "vte")
    }
    trained = [p for name, p in named if p.requires_grad and name.startswith(train)]
    # What autocast casts: every matrix, a tied one once, but no table that is only looked up.
    looked_up = ["position_embedding"]
    if not config.llm_config.tie_word_embeddings:
        looked_up.append("embed_tokens")
    matrices = [p for name, p in named if p.dim() > 1 and not any(t in name for t in looked_up)]
    return Counts(
        total=sum(p.numel() for _, p in named),
        trained=sum(p.numel() for p in trained),
        largest=max(p.numel() for _, p in named),
        matrices=sum(p.numel() for p in matrices),
        hidden_size=config.llm_config.hidden_size,
        parts=parts,
    )


@cache
def counts_of(size: str, train: tuple[str, ...] = ("",)) -> Counts:
    return count_parameters(ovis_config(size), train)


def read_zero(engine: str) -> dict:
    """The `zero_optimization` block of a shipped file; empty for a run without DeepSpeed."""
    if engine == "none":
        return {}
    file = files("vlmtune.configs") / "zero" / f"{engine}.json"
    return json.loads(file.read_text(encoding="utf-8"))["zero_optimization"]


def memory(counts: Counts, zero: dict, gpus: int, accumulation: bool = False) -> dict[str, int]:
    """Bytes of one GPU by term, and of the host's memory for all of its `gpus` GPUs together.

    `weights`, `master` and `moments` always live. `gradients` and `backward` (buffers, gathered
    weights) come on top while the activations live; `step` comes on top inside the optimizer step,
    when those are gone. The optimizer is `adamw_torch` with one group.
    """
    total, trained, largest = counts.total, counts.trained, counts.largest
    if not zero:
        gradients = 4 * trained * (2 if gpus > 1 else 1)
        return {
            "weights": 4 * total,
            "master": 0,
            "moments": 8 * trained,
            "gradients": gradients,
            "backward": 2 * counts.matrices,
            "step": gradients + 4 * trained,
            "host": 0,
        }
    stage, offload = zero["stage"], "offload_optimizer" in zero
    own = trained if stage == 0 else -(-trained // gpus)
    shard = -(-total // gpus) if stage == 3 else total
    twice = 2 if accumulation and stage == 2 else 1
    bucket = zero.get("reduce_bucket_size", DEFAULT_BUCKET)
    if bucket == "auto":
        bucket = counts.hidden_size**2
    if stage == 0:
        bucket = min(trained, bucket)
    backward = 2 * bucket * (2 if stage == 2 and zero["overlap_comm"] else 1)
    if stage >= 2:
        backward += 4 * largest
    if stage == 3:
        backward += 2 * min(total, zero["stage3_max_live_parameters"] + largest)
    terms = {
        "weights": 2 * shard,
        "master": 4 * own,
        "moments": 8 * own,
        "gradients": {0: 2 * trained, 1: 2 * trained + 2 * own}.get(stage, 2 * own * twice),
        "backward": backward,
        "step": 8 * own,
        "host": 0,
    }
    if stage == 0:
        terms["step"] += terms["gradients"]
    if stage == 3:
        terms["step"] = terms["gradients"] + 8 * min(own, zero["sub_group_size"])
    if offload:
        terms.update(master=0, moments=0, step=0, gradients=2 * own * (twice - 1))
        terms["host"] = 18 * trained
        if stage == 2:
            terms["backward"] += 2 * largest
            terms["host"] += 2 * largest * gpus + 2 * trained * (twice - 1)
    if "offload_param" in zero:
        terms["weights"] = 0
        terms["host"] += 2 * total
    return terms


def traffic(counts: Counts, zero: dict, gpus: int) -> tuple[int, int]:
    """Bytes over one GPU's PCIe link in an optimizer step of one micro-batch with gradient
    checkpointing: GPU to host, host to GPU."""
    own, shard = -(-counts.trained // gpus), -(-counts.total // gpus)
    if zero["stage"] == 2:
        return 4 * own, 2 * own
    if "offload_param" in zero:
        return 6 * own, 2 * own + 3 * 2 * shard
    return 6 * own, 4 * own


def llm_layer_bytes(llm: PreTrainedConfig, half: bool = True) -> int:
    """Bytes per token that one decoder layer (Qwen3) keeps for backward, with fused attention.

    `half`: bf16 weights, as under DeepSpeed; else float32 weights under bf16 autocast.
    """
    width, inner = llm.hidden_size, llm.intermediate_size
    queries = llm.num_attention_heads * llm.head_dim
    keys = llm.num_key_value_heads * llm.head_dim
    statistics = 8 + 8 * llm.num_attention_heads + 4 * llm.num_key_value_heads
    return (16 if half else 26) * width + 10 * queries + 10 * keys + 8 * inner + statistics


def vit_layer_bytes(vit: PreTrainedConfig, half: bool = True) -> int:
    """Bytes per patch that one encoder layer keeps for backward, with fused attention."""
    statistics = 16 + 4 * vit.num_attention_heads
    return (18 if half else 26) * vit.hidden_size + 4 * vit.intermediate_size + statistics


def loss_head_bytes(llm: PreTrainedConfig, tokens: int, half: bool = True) -> int:
    """Bytes of a chunk in the backward pass of `label_log_probs` on a GPU, all tokens trained, and
    the float32 gradient of its weight; of a float32 weight that is counted as its gradient."""
    rows = min(tokens, rows_per_chunk(llm.vocab_size, CUDA))
    return llm.vocab_size * (6 * rows + (4 * llm.hidden_size if half else 0))


def visual_head_bytes(config: Ovis2_5Config, tokens: int, half: bool = True) -> int:
    """The same of `ExpectedEmbedding` for `tokens` visual tokens, with head and table."""
    vit = config.vit_config
    words = config.visual_vocab_size - NUM_INDICATORS
    rows = min(tokens, rows_per_chunk(words, CUDA, BUFFERS))
    head = words * vit.hidden_size * vit.hidden_stride**2
    table = config.visual_vocab_size * config.llm_config.hidden_size
    return 24 * rows * words + (4 * (head + table) if half else 0)


def activations(
    config: Ovis2_5Config, sample: Sample, checkpointing: bool, half: bool = True
) -> dict[str, int]:
    """Bytes that the layers of both towers keep for backward (`llm`, `vit`), and what is alive
    beside them in turn: a head's chunk and gradients, a layer that is recomputed."""
    llm, vit = config.llm_config, config.vit_config
    llm_layer = llm_layer_bytes(llm, half) * sample.tokens
    vit_layer = vit_layer_bytes(vit, half) * sample.patches
    width = 2 if half else 4
    if checkpointing:
        kept = {
            "llm": width * llm.hidden_size * llm.num_hidden_layers * sample.tokens,
            "vit": width * vit.hidden_size * vit.num_hidden_layers * sample.patches,
            "layer": max(llm_layer, vit_layer),
        }
    else:
        kept = {
            "llm": llm_layer * llm.num_hidden_layers,
            "vit": vit_layer * vit.num_hidden_layers,
            "layer": 0,
        }
    return {
        **kept,
        "loss_head": loss_head_bytes(llm, sample.tokens, half),
        "visual_head": visual_head_bytes(config, sample.patches // vit.hidden_stride**2, half),
    }


def alive(parts: dict[str, int]) -> int:
    """Bytes of `activations` at the worst moment."""
    largest = max(parts[name] for name in ("layer", "loss_head", "visual_head"))
    return parts["llm"] + parts["vit"] + largest


def checkpoint_bytes(counts: Counts, zero: dict, bf16: bool = True) -> tuple[int, int]:
    """Bytes on disk of the model and of the optimizer's files of one checkpoint, all ranks."""
    model = (2 if zero and bf16 else 4) * counts.total
    if not zero:
        return model, 8 * counts.trained
    weights_again = 0 if zero["stage"] == 3 else model
    return model, 12 * counts.trained + weights_again


def peak(terms: dict[str, int], activation_bytes: int) -> int:
    """The larger of the two worst moments: in backward, and in the optimizer step."""
    backward = terms["gradients"] + terms["backward"] + activation_bytes
    return terms["weights"] + terms["master"] + terms["moments"] + max(backward, terms["step"])


def run_peak(size: str, engine: str, gpus: int, sample: str, checkpointing: bool = True) -> int:
    """Bytes of one GPU at its worst moment, one sample per micro-batch, all parts trained."""
    config, zero = ovis_config(size), read_zero(engine)
    kept = activations(config, SAMPLES[size][sample], checkpointing, half=bool(zero))
    return peak(memory(counts_of(size), zero, gpus), alive(kept))


def first_that_fits(size: str, gpus: int, card: int, sample: str) -> str | None:
    for engine in CHOICES:
        if run_peak(size, engine, gpus, sample) <= card * GB * (1 - RESERVE):
            return engine
    return None


def gigabytes(count: int) -> str:
    return f"{count / GB:.1f}"


def gpu_range(gpus: list[int]) -> str:
    return str(gpus[0]) if len(gpus) == 1 else f"{gpus[0]}-{gpus[-1]}"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables() -> dict[str, str]:
    """Every table of docs/zero.md by its name there."""
    pages = {"parameters": _parameter_table(), "activations": _activation_table()}
    for size in _LLM:
        pages[f"states {size}"] = _state_table(size)
        pages[f"peak {size}"] = _peak_table(size)
        pages[f"choice {size}"] = _choice_table(size)
    pages["stage 1"] = _stage_1_table()
    pages["host"] = _host_table()
    pages["disk"] = _disk_table()
    return pages


def _parameter_table() -> str:
    counts = {size: counts_of(size) for size in _LLM}
    parts = counts["2B"].parts
    rows = [[f"`{part}`", *(f"{c.parts[part]:,}" for c in counts.values())] for part in parts]
    rows.append(["all", *(f"{c.total:,}" for c in counts.values())])
    rows.append(["trained with `all`", *(f"{c.trained:,}" for c in counts.values())])
    stage_1 = [counts_of(size, STAGE_1) for size in _LLM]
    rows.append(["trained with `visual_tokenizer`", *(f"{c.trained:,}" for c in stage_1)])
    rows.append(["largest tensor", *(f"{c.largest:,}" for c in counts.values())])
    return table(["part", *_LLM], rows)


def _state_table(size: str) -> str:
    names = ("weights", "master", "moments", "gradients", "backward", "step")
    rows = []
    for engine in ENGINES:
        cells = {}
        for gpus in GPUS:
            terms = memory(counts_of(size), read_zero(engine), gpus)
            cells.setdefault(tuple(gigabytes(terms[name]) for name in names), []).append(gpus)
        rows += [[engine, gpu_range(gpus), *cell] for cell, gpus in cells.items()]
    header = ["engine", "GPUs", "weights", "fp32 copy", "Adam moments", "gradients"]
    return table([*header, "beside activations", "inside the step"], rows)


def _stage_1_table() -> str:
    rows = []
    for engine in ENGINES:
        cells = [
            memory(counts_of(size, STAGE_1), read_zero(engine), gpus)
            for size in _LLM
            for gpus in GPUS
        ]
        rows.append([engine, *(gigabytes(peak(terms, 0)) for terms in cells)])
    return table(["engine", *(f"{size}, {gpus}" for size in _LLM for gpus in GPUS)], rows)


def _activation_table() -> str:
    rows = []
    for size, samples in SAMPLES.items():
        config = ovis_config(size)
        for name, sample in samples.items():
            for checkpointing in (False, True):
                kept = activations(config, sample, checkpointing)
                autocast = activations(config, sample, checkpointing, half=False)
                parts = [kept[n] for n in ("llm", "vit", "loss_head", "visual_head")]
                rows.append(
                    [
                        f"{size} {name}",
                        f"{sample.tokens:,}",
                        f"{sample.patches:,}",
                        "on" if checkpointing else "off",
                        *map(gigabytes, [*parts, alive(kept), alive(autocast)]),
                    ]
                )
    header = ["sample", "tokens", "patches", "gradient checkpointing", "LLM layers", "ViT layers"]
    return table([*header, "loss head", "visual head", "all, bf16", "all, autocast"], rows)


def _peak_table(size: str) -> str:
    rows = []
    for engine in ENGINES:
        peaks = [run_peak(size, engine, gpus, s) for s in ("longest", "medium") for gpus in GPUS]
        rows.append([engine, *map(gigabytes, peaks)])
    header = [f"{sample}, {gpus}" for sample in ("longest", "medium") for gpus in GPUS]
    return table(["engine", *header], rows)


def _choice_table(size: str) -> str:
    rows = []
    for gpus in GPUS:
        fits = [first_that_fits(size, gpus, card, "longest") or "-" for card in CARDS]
        rows.append([str(gpus), *fits])
    return table(["GPUs", *(f"{card} GB" for card in CARDS)], rows)


def _host_table() -> str:
    rows = []
    for size in _LLM:
        for engine in ENGINES:
            zero = read_zero(engine)
            if "offload_optimizer" not in zero:
                continue
            for gpus in GPUS:
                sent = traffic(counts_of(size), zero, gpus)
                host = memory(counts_of(size), zero, gpus)["host"]
                rows.append([size, engine, str(gpus), *map(gigabytes, [host, *sent])])
    header = ["model", "engine", "GPUs", "host memory, all GPUs"]
    return table([*header, "GPU to host per step", "host to GPU per step"], rows)


def _disk_table() -> str:
    rows = []
    for size in _LLM:
        for engine, label in (("none", "none"), ("zero1", "zero0, 1, 2"), ("zero3", "zero3")):
            model, optimizer = checkpoint_bytes(counts_of(size), read_zero(engine))
            rows.append([size, label, *map(gigabytes, [model, optimizer, model + optimizer])])
    return table(["model", "engine", "model", "optimizer state", "one checkpoint"], rows)


def result() -> dict:
    """What is stored as benchmarks/results/zero_memory.json, without its date."""
    models = {}
    for size in _LLM:
        counts = counts_of(size)
        models[size] = {
            "parameters": counts.total,
            "trained": counts.trained,
            "parts": counts.parts,
            "bytes": {
                engine: {str(gpus): memory(counts, read_zero(engine), gpus) for gpus in GPUS}
                for engine in ENGINES
            },
            "activations": {
                name: {
                    "checkpointing": activations(ovis_config(size), sample, True),
                    "plain": activations(ovis_config(size), sample, False),
                }
                for name, sample in SAMPLES[size].items()
            },
            "first_that_fits": {
                str(gpus): {
                    str(card): first_that_fits(size, gpus, card, "longest") for card in CARDS
                }
                for gpus in GPUS
            },
        }
    packages = ("torch", "transformers", "accelerate", "deepspeed")
    return {"versions": {name: version(name) for name in packages}, "models": models}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the Markdown tables")
    parser.add_argument("--output", type=Path, help="store the dated JSON here")
    arguments = parser.parse_args()
    if arguments.table:
        for name, text in tables().items():
            print(f"<!-- {name} -->\n{text}\n")
    else:
        line = json.dumps({"date": datetime.date.today().isoformat(), **result()})
        print(line)
        if arguments.output:
            arguments.output.write_text(line + "\n", encoding="utf-8")
