"""Memory of one training run of Ovis2.5 per GPU, by arithmetic on the real architectures.

    python benchmarks/zero_memory.py             one JSON line
    python benchmarks/zero_memory.py --table     the Markdown tables of docs/zero.md
    python benchmarks/zero_memory.py --output benchmarks/results/zero_memory.json

Nothing is trained and no GPU is needed: parameters are counted on the meta device, settings are
read from configs/zero, and every term is a formula, those of states in vlmtune.sft.memory. What
`vlmtune plan` says of a config is traced instead. docs/zero.md explains each term and names its
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
from vlmtune.models.ovis2_5.memory import loss_head_bytes, visual_head_bytes
from vlmtune.sft.cost_forecast import ENGINES, RESERVE
from vlmtune.sft.memory import Counts, checkpoint_bytes, count, peak, state_bytes

GB = 10**9
GPUS = (1, 2, 4, 8)
CARDS = (24, 40, 80, 141)
# ZeRO-0 needs the memory of a run without ZeRO and starts Adam one step late in bf16.
CHOICES = tuple(engine for engine in ENGINES if engine != "zero0")

STAGE_1 = ("visual_tokenizer.",)
"""What stage 1 of the three-stage recipe trains."""

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
class Parameters:
    """Parameters of a model; `matrices` are those that autocast casts: every matrix, a tied one
    once, but no table that is only looked up."""

    counts: Counts
    matrices: int
    parts: dict[str, int]

    @property
    def trained(self) -> int:
        return sum(self.counts.trained)


def count_parameters(config: Ovis2_5Config, train: tuple[str, ...] = ("",)) -> Parameters:
    """Counts on the meta device; `train` names the trained modules, all by default. What no
    gradient reaches is never trained."""
    with torch.device("meta"):
        model = Ovis2_5(config)
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        parameter.requires_grad_(parameter.requires_grad and name.startswith(train))
    looked_up = ["position_embedding"]
    if not config.llm_config.tie_word_embeddings:
        looked_up.append("embed_tokens")
    cast = (p for name, p in named.items() if not any(t in name for t in looked_up))
    parts = {
        part: sum(p.numel() for name, p in named.items() if name.startswith(f"{part}."))
        for part in ("llm", "visual_tokenizer.vit", "visual_tokenizer.head", "vte")
    }
    return Parameters(count(model), sum(p.numel() for p in cast if p.dim() > 1), parts)


@cache
def counts_of(size: str, train: tuple[str, ...] = ("",)) -> Parameters:
    return count_parameters(ovis_config(size), train)


def read_zero(engine: str) -> dict:
    """The `zero_optimization` block of a shipped file; empty for a run without DeepSpeed."""
    if engine == "none":
        return {}
    file = files("vlmtune.configs") / "zero" / f"{engine}.json"
    return json.loads(file.read_text(encoding="utf-8"))["zero_optimization"]


def memory(
    parameters: Parameters, zero: dict, gpus: int, accumulation: bool = False
) -> dict[str, int]:
    """`state_bytes` with the optimizer `adamw_torch`; without DeepSpeed `backward` holds the casts
    of all matrices, which a run without recompute keeps."""
    terms = state_bytes(parameters.counts, zero, gpus, accumulation=accumulation)
    return terms if zero else {**terms, "backward": 2 * parameters.matrices}


def traffic(parameters: Parameters, zero: dict, gpus: int) -> tuple[int, int]:
    """Bytes over one GPU's PCIe link in an optimizer step of one micro-batch with gradient
    checkpointing: GPU to host, host to GPU."""
    own, shard = -(-parameters.trained // gpus), -(-parameters.counts.total // gpus)
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
    rows.append(["all", *(f"{c.counts.total:,}" for c in counts.values())])
    rows.append(["trained with `all`", *(f"{c.trained:,}" for c in counts.values())])
    stage_1 = [counts_of(size, STAGE_1) for size in _LLM]
    rows.append(["trained with `visual_tokenizer`", *(f"{c.trained:,}" for c in stage_1)])
    rows.append(["largest tensor", *(f"{c.counts.largest:,}" for c in counts.values())])
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
            model, optimizer = checkpoint_bytes(counts_of(size).counts, read_zero(engine))
            rows.append([size, label, *map(gigabytes, [model, optimizer, model + optimizer])])
    return table(["model", "engine", "model", "optimizer state", "one checkpoint"], rows)


def result() -> dict:
    """What is stored as benchmarks/results/zero_memory.json, without its date."""
    models = {}
    for size in _LLM:
        counts = counts_of(size)
        models[size] = {
            "parameters": counts.counts.total,
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
