"""Peak memory and time of Ovis2.5's visual head: the plain formula against ours, chunk by chunk.

    python benchmarks/visual_head.py > benchmarks/results/visual_head.json

The largest image of Ovis2.5-2B: 9,408 patches, 2,352 visual tokens of 4 x 1,152 features; a linear
layer over 65,532 visual words, layer norm, softmax, and the product with a table 2,048 wide.
`plain` is that formula under autograd, `ours` computes it for a chunk of tokens at a time and again
in the backward pass. float32, one thread.

Memory: a process per variant, side by side, with all tokens and words. Widths are divided by
`--shrink`: what fills the memory is `[tokens, words]`, and products of full width take minutes
(`--shrink 1` measures them). `peak_gib` is the peak of RssAnon above weights and features,
`above_gradients_gib` leaves the gradients out that remain; `full_width_over_plain` is calculated
with gradients of full width, those that each variant has at its peak.
Time: CPU seconds of forward and backward in one process, the variants in turn, with a quarter of
the widths and an eighth of the tokens, two chunks of ours; there output and all gradients are
compared.
Prints one JSON line.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from measuring import Peak, environment, start_part, summary
from synthetic import SEED

TOKENS, MERGED, PATCH_WIDTH, WIDTH = 2352, 4, 1152, 2048
WORDS, INDICATORS = 65_532, 4
TIMED_SHRINK = 4
VARIANTS = ("plain", "ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--words", type=int, default=WORDS)
    parser.add_argument("--shrink", type=int, default=16)
    parser.add_argument("--part", choices=("time", *VARIANTS), help="run one part")
    options = parser.parse_args()
    if options.part:
        import torch

        torch.set_num_threads(1)
        if options.part == "time":
            found = measure_time(options.tokens // 8, options.words, options.rounds)
        else:
            found = measure_peak(options.part, options.tokens, options.words, options.shrink)
        print(json.dumps(found))
        return
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda part: start_part(__file__, part, options), VARIANTS)
        peaks = dict(zip(VARIANTS, found, strict=True))
    result = {
        "tokens": options.tokens,
        "patches": options.tokens * MERGED,
        "words": options.words,
        "widths": [MERGED * PATCH_WIDTH, WIDTH],
        "peak_widths_divided_by": options.shrink,
        "rounds": options.rounds,
        "peak": peaks,
        "peak_over_plain": round(peaks["ours"]["peak_gib"] / peaks["plain"]["peak_gib"], 3),
        "above_gradients_over_plain": round(
            peaks["ours"]["above_gradients_gib"] / peaks["plain"]["above_gradients_gib"], 3
        ),
        "full_width_over_plain": full_width_ratio(peaks, options.words, options.shrink),
        **start_part(__file__, "time", options),
        **environment("torch", "transformers"),
    }
    print(json.dumps(result))


def full_width_ratio(peaks: dict[str, dict], words: int, shrink: int) -> float:
    """Peaks with the gradients of full width that live then: ours has those of head and table,
    plain that of the table."""
    head, table = words * MERGED * PATCH_WIDTH, (words + INDICATORS) * WIDTH
    missing = 4 / 2**30 * (1 - 1 / shrink)
    ours = peaks["ours"]["peak_gib"] + missing * (head + table)
    return round(ours / (peaks["plain"]["peak_gib"] + missing * table), 3)


@dataclass(frozen=True)
class Inputs:
    """The visual tokenizer with given features in the place of its encoder, and the table."""

    tokenizer: Any
    table: Any
    features: Any
    towards: Any
    """The gradient of the embeddings `[tokens, H]`."""

    @property
    def wanted(self) -> dict[str, Any]:
        """What gets a gradient."""
        linear, norm = self.tokenizer.head
        return {
            "features": self.features,
            "head": linear.weight,
            "norm.weight": norm.weight,
            "norm.bias": norm.bias,
            "table": self.table.weight,
        }


def make_inputs(tokens: int, words: int, shrink: int) -> Inputs:
    import torch

    from vlmtune.models import Ovis2_5Config
    from vlmtune.models.ovis2_5.visual_tokenizer_ovis2_5 import (
        VisualEmbeddingTable,
        VisualTokenizer,
    )

    class Given(torch.nn.Module):
        def __init__(self, features: torch.Tensor):
            super().__init__()
            self.features = features

        def forward(self, pixel_values: Any, grids: Any) -> torch.Tensor:
            return self.features

    torch.manual_seed(SEED)
    config = Ovis2_5Config(
        llm_config={"hidden_size": WIDTH // shrink},
        vit_config={"hidden_size": PATCH_WIDTH // shrink, "num_hidden_layers": 0},
        visual_vocab_size=words + INDICATORS,
    )
    tokenizer = VisualTokenizer(config)
    features = torch.randn(tokens, MERGED * PATCH_WIDTH // shrink).requires_grad_()
    tokenizer.vit = Given(features)
    table = VisualEmbeddingTable(config.visual_vocab_size, config.hidden_size)
    return Inputs(tokenizer, table, features, torch.randn(tokens, config.hidden_size))


def embeddings(variant: str, inputs: Inputs) -> Any:
    tokenizer, table = inputs.tokenizer, inputs.table
    if variant == "plain":
        return table(tokenizer(None, None))
    return tokenizer.embed(None, None, table)[:-INDICATORS]


def warm_up(variant: str) -> None:
    """Start what torch starts once."""
    inputs = make_inputs(8, 16, shrink=64)
    embeddings(variant, inputs).backward(inputs.towards)


def measure_peak(variant: str, tokens: int, words: int, shrink: int) -> dict:
    warm_up(variant)
    inputs = make_inputs(tokens, words, shrink)
    began = time.process_time()
    with Peak() as peak:
        embeddings(variant, inputs).backward(inputs.towards)
    remaining = sum(tensor.grad.nbytes for tensor in inputs.wanted.values())
    return {
        "peak_gib": round(peak.bytes / 2**30, 3),
        "above_gradients_gib": round((peak.bytes - remaining) / 2**30, 3),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def measure_time(tokens: int, words: int, rounds: int) -> dict:
    """Seconds of both, and how far ours is from plain, over the largest value of each."""
    import torch

    for variant in VARIANTS:
        warm_up(variant)
    inputs = make_inputs(tokens, words, TIMED_SHRINK)
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    results: dict[str, dict[str, Any]] = {}
    for i in range(rounds):
        for variant in VARIANTS:
            for tensor in inputs.wanted.values():
                tensor.grad = None
            began = time.process_time()
            output = embeddings(variant, inputs)
            output.backward(inputs.towards)
            seconds[variant].append(time.process_time() - began)
            if i == 0:
                gradients = {name: tensor.grad for name, tensor in inputs.wanted.items()}
                results[variant] = {"output": output.detach(), **gradients}
        if i == 0:
            plain, ours = results["plain"], results["ours"]
            differences = {
                name: float((ours[name] - value).abs().max() / value.abs().max())
                for name, value in plain.items()
            }
            results.clear()
    medians = {variant: summary(values, 2) for variant, values in seconds.items()}
    return {
        "timed_tokens": tokens,
        "timed_widths_divided_by": TIMED_SHRINK,
        "cpu_seconds": medians,
        "time_over_plain": round(medians["ours"]["median"] / medians["plain"]["median"], 3),
        "difference": differences,
        "equal": max(differences.values()) < 1e-5,
        "torch_threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
