"""Time to end a thought that reaches its budget: with the key/value cache kept, or encoded again.

    python benchmarks/thinking_budget.py > benchmarks/results/thinking_budget.json

A random Ovis2.5 is asked about one photo and thinks until `--budget` tokens are written; then its
thought is ended with the same text on both sides, and it answers:

- `ours`: `vlmtune.inference.generation.generate`, one pass over image and prompt; the text that
  ends the thought is read in one step, on the cache that is there.
- `reference`: as AIDC-AI/Ovis 2.5.0 does it, two calls of the model's `generate`; the second
  encodes the image again and reads prompt, thought and that text.

On a CPU the model has about a quarter of the widths and depths of Ovis2.5-2B, one thread, process
time; on a GPU, which is used where there is one, the sizes of the 2B model and time by the clock.
float32; the sides take turns, after one round to warm up. `seconds` are of the whole reply,
`closing_seconds` from the last token of the thought to the first of the answer. Equal are the
tokens of every round. Prints one JSON line.
"""

import argparse
import datetime
import json
import runpy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measuring import environment, summary
from synthetic import ROOT, SEED, photo
from transformers.generation.streamers import BaseStreamer

from vlmtune.collators.rendering import encode, render_prompt
from vlmtune.data.conversation import Turn
from vlmtune.inference.generation import EARLY_STOP, Sampling, generate
from vlmtune.models import Ovis2_5, Ovis2_5Config, Ovis2_5Processor
from vlmtune.models.ovis2_5.image_processing_ovis2_5 import Ovis2_5ImageProcessor

SIDES = (448, 896)
QUESTION = Turn("user", "<image>\nWhat is shown here, and what follows from it?")
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES = {
    "cpu": {
        "language": (512, 1536, 7, 8),
        "key_heads": 4,
        "head": 64,
        "words": 16_384,
        "vision": (288, 1076, 7, 4),
        "visual_words": 4096,
    },
    "cuda": {
        "language": (2048, 6144, 28, 16),
        "key_heads": 8,
        "head": 128,
        "words": 151_936,
        "vision": (1152, 4304, 27, 16),
        "visual_words": 65_536,
    },
}
Inputs = dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--answer", type=int, default=32, help="tokens of the answer")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=SIZES, default=device)
    options = parser.parse_args()
    torch.set_num_threads(1)
    processor = make_processor()
    model = make_model(processor, SIZES[options.device], options.device)
    early_stop = processor.tokenizer.encode(EARLY_STOP)
    machine = environment("torch", "transformers")
    if options.device == "cuda":
        machine["machine"] = f"{torch.cuda.get_device_name()}, {machine['machine']}"
    result = {
        "date": datetime.date.today().isoformat(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": options.device,
        "rounds": options.rounds,
        "budget": options.budget,
        "early_stop_tokens": len(early_stop),
        "answer_tokens": options.answer,
        "images": {},
    }
    for side in SIDES:
        compared = Compared(model, processor, side, options.budget, options.answer)
        result["images"][f"{side}x{side}"] = compared.measure(options.rounds)
    print(json.dumps({**result, **machine}))


def make_processor() -> Ovis2_5Processor:
    """With a token for each word of `EARLY_STOP`, as the published tokenizer has."""
    script = runpy.run_path(str(ROOT / "scripts/make_tiny_ovis2_5.py"))
    return Ovis2_5Processor(
        Ovis2_5ImageProcessor(), script["train_tokenizer"]([EARLY_STOP] * 2, 512)
    )


def make_model(processor: Ovis2_5Processor, sizes: dict[str, Any], device: str) -> Any:
    torch.manual_seed(SEED)
    config = Ovis2_5Config(
        llm_config={
            "model_type": "qwen3",
            **dict(zip(NAMES, sizes["language"], strict=True)),
            "num_key_value_heads": sizes["key_heads"],
            "head_dim": sizes["head"],
            "vocab_size": sizes["words"],
            "eos_token_id": processor.control_id(processor.turn_end),
        },
        vit_config=dict(zip(NAMES, sizes["vision"], strict=True)),
        visual_vocab_size=sizes["visual_words"],
    )
    with torch.device(device):
        model = Ovis2_5(config).eval()
    # Both sides are to write as many tokens as they may.
    model.generation_config.suppress_tokens = [config.llm_config.eos_token_id]
    return model


class Clock(BaseStreamer):
    """When each new token was there."""

    def __init__(self, now: Callable[[], float]):
        self.now, self.times = now, []

    def put(self, value: torch.Tensor) -> None:
        if value.dim() == 1:  # the prompt comes as [1, tokens]
            self.times.append(self.now())

    def end(self) -> None:
        pass


class Compared:
    """Both sides on one photo, with what each gives its vision encoder and its decoder."""

    def __init__(
        self, model: Any, processor: Ovis2_5Processor, side: int, budget: int, answer: int
    ):
        self.model, self.tokenizer = model, processor.tokenizer
        self.budget, self.answer = budget, answer
        self.early_stop = self.tokenizer.encode(EARLY_STOP)
        self.now = time.perf_counter if model.device.type == "cuda" else time.process_time
        picture = photo(np.random.default_rng(SEED), side, side)
        pixels, grid = processor.image_processor.patches([picture], side**2, side**2)
        tokens = processor.image_processor.visual_tokens(grid)
        prompt = render_prompt([QUESTION], processor, enable_thinking=True)
        self.prompt = encode(prompt, processor, [tokens]).ids
        self.image = {
            "pixel_values": torch.from_numpy(pixels).to(model.device),
            "grid_thws": torch.tensor([grid], device=model.device),
        }
        self.images = self.read_at_once = 0

    def measure(self, rounds: int) -> dict[str, Any]:
        tower, decoder = self.model.visual_tokenizer.vit, self.model.get_decoder()
        hooks = [
            tower.register_forward_pre_hook(self._see),
            decoder.register_forward_pre_hook(self._read, with_kwargs=True),
        ]
        try:
            return self._measure(rounds)
        finally:
            for hook in hooks:
                hook.remove()

    def _measure(self, rounds: int) -> dict[str, Any]:
        sides = {"ours": self.ours, "reference": self.reference}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        closing: dict[str, list[float]] = {name: [] for name in sides}
        ran: dict[str, dict[str, int]] = {}
        for i in range(rounds + 1):
            written = {}
            for name, reply in sides.items():
                self.images = self.read_at_once = 0
                began = self.now()
                written[name], thought, answered = reply()
                if i:
                    seconds[name].append(self.now() - began)
                    closing[name].append(answered - thought)
                ran[name] = {"images": self.images, "tokens_read_at_once": self.read_at_once}
            assert written["ours"] == written["reference"], "the replies differ"
        whole = {name: summary(values) for name, values in seconds.items()}
        closed = {name: summary(values) for name, values in closing.items()}
        return {
            "prompt_tokens": len(self.prompt),
            "ran": ran,
            "seconds": whole,
            "closing_seconds": closed,
            "ratio": round(whole["reference"]["median"] / whole["ours"]["median"], 2),
            "closing_ratio": round(closed["reference"]["median"] / closed["ours"]["median"], 2),
            "equal": True,
        }

    def ours(self) -> tuple[list[int], float, float]:
        """The new tokens, and when the last of the thought and the first of the answer came."""
        most = self.budget + len(self.early_stop) + self.answer
        sampling = Sampling(max_new_tokens=most, thinking_budget=self.budget)
        clock = Clock(self.now)
        [found] = generate(
            self.model,
            self._inputs(self.prompt),
            self.tokenizer,
            sampling,
            thinking=True,
            streamer=clock,
        )
        last = self.budget - 1
        return found.ids, clock.times[last], clock.times[last + len(self.early_stop) + 1]

    def reference(self) -> tuple[list[int], float, float]:
        thought, thinking = self._generate(self.prompt, self.budget)
        begun = thought + self.early_stop
        answer, answering = self._generate(self.prompt + begun, self.answer)
        return begun + answer, thinking.times[-1], answering.times[0]

    def _generate(self, ids: list[int], most: int) -> tuple[list[int], Clock]:
        clock = Clock(self.now)
        found = self.model.generate(
            **self._inputs(ids), max_new_tokens=most, do_sample=False, streamer=clock
        )
        return found[0].tolist(), clock

    def _inputs(self, ids: list[int]) -> Inputs:
        input_ids = torch.tensor([ids], device=self.model.device)
        mask = torch.ones_like(input_ids)
        return {"input_ids": input_ids, "attention_mask": mask, **self.image}

    def _see(self, *_: Any) -> None:
        self.images += 1

    def _read(self, _: Any, args: Any, given: dict[str, Any]) -> None:
        embeds = given.get("inputs_embeds")
        tokens = (given["input_ids"] if embeds is None else embeds).shape[1]
        self.read_at_once += tokens if tokens > 1 else 0


if __name__ == "__main__":
    main()
