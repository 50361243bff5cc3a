"""Peak memory and time of the loss head: full logits, gathered rows, TRL's kernel, ours.

    python benchmarks/loss_head.py > benchmarks/results/loss_head.json

One row of 4,096 tokens, 16 % of them supervised, 1,536 wide, 151,936 words, float32, one thread.
`full` scores every position, as transformers' own loss does; the others get the supervised rows
alone, TRL's kernel with the tiles and outputs of its SFTTrainer. `frozen` means a head that is not
trained.

Memory: a process per variant, two at a time. `peak_gib` is the peak of RssAnon above weights and
hidden states; `above_gradients_gib` leaves out the gradients that remain, which every variant that
trains the head has. `full` ends at its peak, before the two matrix products of the backward pass.
`full` and `frozen`, whose peaks hold no gradient of a weight, are an eighth as wide, to be sooner
done. Losses and norms of gradients of variants of one width are compared.
Time: CPU seconds of forward and backward in one process, the variants in turn, on an eighth of the
tokens and half of the words; `full`, whose every product has six times the rows, once. There losses
and all gradients are compared with those of `full`.
Prints one JSON line.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from measuring import Peak, environment, start_part, summary
from synthetic import SEED

TOKENS, WIDTH, WORDS, SUPERVISED = 4096, 1536, 151_936, 0.16
TRL_TILE = 32768
"""Words of a tile in TRL 1.16 (`_CHUNKED_LOGPROB_CHUNK_SIZE`)."""
TRL_OUTPUTS = ("log_probs", "entropy", "is_top1")
"""What its SFTTrainer asks the kernel for."""
GATHERED = ("gathered", "trl", "ours")
FROZEN = ("trl_frozen", "ours_frozen")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--words", type=int, default=WORDS)
    parser.add_argument("--part", choices=("time", "full", *GATHERED, *FROZEN), help="run one part")
    options = parser.parse_args()
    if options.part:
        import torch

        torch.set_num_threads(1)
        if options.part == "time":
            found = measure_time(options.tokens // 8, options.words // 2, options.rounds)
        else:
            found = measure_peak(options.part, options.tokens, options.words)
        print(json.dumps(found))
        return
    with ThreadPoolExecutor(2) as pool:  # a lane each: the slowest part beside the short ones
        parts = ("trl", "ours", "gathered", "full", *FROZEN)
        found = pool.map(lambda part: start_part(__file__, part, options), parts)
        peaks = dict(zip(parts, found, strict=True))
    full, trl, ours = (peaks[name] for name in ("full", "trl", "ours"))
    timed = start_part(__file__, "time", options)
    for name, found in peaks.items():
        timed["equal"] &= agree(found, peaks["gathered" if name in GATHERED else "trl_frozen"])
    result = {
        "tokens": options.tokens,
        "supervised": peaks["ours"]["supervised"],
        "width": WIDTH,
        "words": options.words,
        "rounds": options.rounds,
        "peak": peaks,
        "peak_over_full": ratio(ours, full),
        "peak_over_trl": ratio(ours, trl),
        "frozen_peak_over_trl": ratio(peaks["ours_frozen"], peaks["trl_frozen"]),
        **timed,
        **environment("torch", "transformers", "trl"),
    }
    print(json.dumps(result))


def agree(one: dict, other: dict) -> bool:
    """Whether loss and norms of gradients are those of another part, as far as it has them."""
    numbers = [(one["loss"], other["loss"])]
    norms = one["gradient_norms"]
    numbers += [(value, other["gradient_norms"][key]) for key, value in norms.items()]
    return all(abs(a - b) < 1e-5 * abs(b) for a, b in numbers)


def ratio(ours: dict, theirs: dict) -> dict[str, float]:
    return {
        key.removesuffix("_gib"): round(ours[key] / theirs[key], 3)
        for key in ("peak_gib", "above_gradients_gib")
    }


@dataclass(frozen=True)
class Inputs:
    """A head without bias, hidden states `[1, T, H]` that want a gradient, and labels `[1, T]`
    with answers of 1 to 8 sentences; each label is predicted one position earlier."""

    head: Any
    hidden: Any
    labels: Any

    @property
    def rows(self) -> tuple[Any, Any]:
        """Hidden states and targets of the supervised positions."""
        kept = self.labels[0, 1:] != -100
        return self.hidden[0, :-1][kept], self.labels[0, 1:][kept]

    @property
    def supervised(self) -> int:
        return int((self.labels[:, 1:] != -100).sum())


def make_inputs(tokens: int, words: int, frozen: bool, width: int = WIDTH) -> Inputs:
    import torch

    torch.manual_seed(SEED)
    head = torch.nn.Linear(width, words, bias=False)
    torch.nn.init.normal_(head.weight, std=0.02)
    head.weight.requires_grad_(not frozen)
    hidden = torch.randn(1, tokens, width).requires_grad_()
    labels = torch.randint(words, (1, tokens))
    trained = torch.zeros(tokens, dtype=torch.bool)
    samples = 8
    for sample in trained.view(samples, -1):  # each ends with its answer
        sample[-round(SUPERVISED * len(sample)) :] = True
    return Inputs(head, hidden, labels.masked_fill(~trained, -100))


def full(inputs: Inputs, hook: Callable[[Any], None] | None = None) -> Any:
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits = inputs.head(inputs.hidden)
    if hook:
        logits.register_hook(hook)
    return ForCausalLMLoss(
        logits, inputs.labels, logits.shape[-1], num_items_in_batch=inputs.supervised
    )


def gathered(inputs: Inputs) -> Any:
    from torch.nn import functional as F

    rows, targets = inputs.rows
    return F.cross_entropy(inputs.head(rows), targets, reduction="sum") / inputs.supervised


def trl(inputs: Inputs) -> Any:
    from trl.kernels import ChunkedLogProbFunction

    rows, targets = inputs.rows
    log_probs, *_ = ChunkedLogProbFunction.apply(
        rows, inputs.head.weight, None, targets, 1.0, TRL_TILE, None, 1.0, TRL_OUTPUTS
    )
    return -log_probs.sum() / inputs.supervised


def ours(inputs: Inputs) -> Any:
    from vlmtune.models.supervised_head import label_log_probs

    rows, targets = inputs.rows
    log_probs, *_ = label_log_probs(inputs.head, rows, targets)
    return -log_probs.sum() / inputs.supervised


LOSSES: dict[str, Callable[[Inputs], Any]] = {
    "full": full,
    "gathered": gathered,
    "trl": trl,
    "ours": ours,
}


def warm_up(names: Iterable[str]) -> None:
    """Import what they need and start what torch starts once."""
    for name in names:
        LOSSES[name](make_inputs(64, 8, frozen=False, width=4)).backward()


def measure_peak(part: str, tokens: int, words: int) -> dict:
    name, frozen, _ = part.partition("_frozen")
    warm_up([name])
    inputs = make_inputs(tokens, words, bool(frozen), WIDTH if part in GATHERED else WIDTH // 8)
    began = time.process_time()
    with Peak() as peak, suppress(PeakPassed):
        loss = full(inputs, peak_passed) if name == "full" else LOSSES[name](inputs)
        loss.backward()
    tensors = {"weight": inputs.head.weight, "hidden": inputs.hidden}
    gradients = {key: t.grad for key, t in tensors.items() if t.grad is not None}
    remaining = sum(gradient.nbytes for gradient in gradients.values())
    return {
        "peak_gib": round(peak.bytes / 2**30, 3),
        "above_gradients_gib": round((peak.bytes - remaining) / 2**30, 3),
        "cpu_seconds": round(time.process_time() - began, 1),
        "loss": loss.item(),
        "gradient_norms": {key: gradient.norm().item() for key, gradient in gradients.items()},
        "supervised": inputs.supervised,
    }


class PeakPassed(Exception):
    """What is left of the backward pass needs less memory."""


def peak_passed(d_logits: Any) -> None:
    raise PeakPassed


def measure_time(tokens: int, words: int, rounds: int) -> dict:
    """Seconds of each variant, and how far loss and gradients lie from those of `full`."""
    import torch

    warm_up(LOSSES)
    inputs = make_inputs(tokens, words, frozen=False)
    weight, hidden = inputs.head.weight, inputs.hidden
    seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
    differences: dict[str, dict[str, float]] = {}

    def run(name: str) -> tuple[Any, Any, Any]:
        weight.grad = hidden.grad = None
        began = time.process_time()
        loss = LOSSES[name.removesuffix("_frozen")](inputs)
        loss.backward()
        if name in seconds:
            seconds[name].append(time.process_time() - began)
        return loss.detach(), hidden.grad, weight.grad

    loss, d_hidden, d_weight = run("full")
    scale = {"loss": 1.0, "hidden": d_hidden.abs().max(), "weight": d_weight.abs().max()}

    def compare(name: str, got: tuple[Any, Any, Any]) -> None:
        expected = {"loss": loss, "hidden": d_hidden, "weight": d_weight}
        differences[name] = {
            key: float((expected[key] - value).abs().max() / scale[key])
            for key, value in zip(expected, got, strict=True)
            if value is not None
        }

    for _ in range(rounds):
        for name in GATHERED:
            got = run(name)
            if name not in differences:
                compare(name, got)
            del got
    weight.requires_grad_(False)
    for name in FROZEN:
        compare(name, run(name))
    medians = {name: summary(values, 2) for name, values in seconds.items()}
    return {
        "timed_tokens": tokens,
        "timed_words": words,
        "timed_supervised": inputs.supervised,
        "cpu_seconds": medians,
        "time_over_trl": round(medians["ours"]["median"] / medians["trl"]["median"], 3),
        "time_over_full": round(medians["ours"]["median"] / medians["full"]["median"], 3),
        "difference_from_full": differences,
        "equal": all(worst < 1e-5 for found in differences.values() for worst in found.values()),
        "torch_threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
