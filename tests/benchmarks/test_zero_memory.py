"""The arithmetic of benchmarks/zero_memory.py against real architectures and real tensors."""

import contextlib
import gc
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vlmtune.configs.recompute import parse_recompute
from vlmtune.models import Ovis2_5, Ovis2_5Config, supervised_head
from vlmtune.models.ovis2_5.configuration_ovis2_5 import NUM_INDICATORS
from vlmtune.models.ovis2_5.visual_tokenizer_ovis2_5 import BUFFERS, ExpectedEmbedding
from vlmtune.models.supervised_head import label_log_probs
from vlmtune.sft.memory import Batch, Counts, checkpoint_bytes, count, estimate, state_bytes
from vlmtune.sft.traced_layers import LiveMemory

ROOT = Path(__file__).parents[2]
SCRIPT = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks/zero_memory.py")))
STATES = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "zero_states.py")))

TOKENS, SIDE = 200, 16
PATCHES = SIDE * SIDE
RUNS = (
    "zero0",
    "zero1",
    "zero2+accumulation",
    "zero3",
    "zero2_offload+accumulation",
    "zero3_offload_all",
    "zero0+float32",
    "zero3+float32",
    "zero2+lora",
    "zero3+lora",
    "zero2+visual",
    "zero3+visual",
)
# Runs whose activations are measured without weights that were gathered.
ACTIVATIONS = {
    "": "zero1",
    "float32": "zero1+float32",
    "lora": "zero1+lora",
    "visual": "zero1+visual",
}


@pytest.mark.parametrize(("size", "total"), [("2B", 2_570_429_672), ("9B", 9_174_807_784)])
def test_the_architectures_have_the_published_number_of_parameters(size, total):
    found = SCRIPT.counts_of(size)
    assert found.counts.total == total == sum(found.parts.values())
    assert found.counts.total - found.trained == 2 * 1152  # post_layernorm
    assert found.counts.largest == 151936 * {"2B": 2048, "9B": 4096}[size]
    assert found.counts.kept == 4 * total


def test_stage_1_trains_the_visual_tokenizer_without_its_unused_norm():
    found = SCRIPT.counts_of("9B", SCRIPT.STAGE_1)
    assert found.trained == 413_534_448 + 302_102_520 - 2 * 1152
    assert found.counts.total == 9_174_807_784


# Exact bytes of 1,000 parameters, 600 of them trained, on two GPUs; 50 bytes are quantised.
@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ("none", (4050, 0, 4800, 4800, 1400, 7200, 0)),
        ("zero0", (2050, 2400, 4800, 1200, 1200, 6000, 0)),
        ("zero1", (2050, 1200, 2400, 1800, 1_000_000_000, 2400, 0)),
        ("zero2", (2050, 1200, 2400, 600, 4 * 64 + 4 * 400, 2400, 0)),
        ("zero3", (1050, 1200, 2400, 600, 2 * 64 + 4 * 400 + 2000, 3000, 0)),
        ("zero2_offload", (2050, 0, 0, 0, 4 * 64 + 6 * 400, 0, 10_800 + 1600)),
        ("zero3_offload", (1050, 0, 0, 0, 2 * 64 + 4 * 400 + 2000, 0, 10_800)),
        ("zero3_offload_all", (0, 0, 0, 0, 2 * 64 + 4 * 400 + 2000, 0, 10_800 + 2000)),
    ],
)
def test_terms_of_each_engine(engine, expected):
    counts = Counts(
        total=1000, trained=(200, 400), largest=500, hidden_size=8, kept=4000, packed=50
    )
    parameters = SCRIPT.Parameters(counts, matrices=700, parts={})
    terms = SCRIPT.memory(parameters, SCRIPT.read_zero(engine), gpus=2)
    assert tuple(terms.values()) == expected


@pytest.mark.parametrize(
    ("optimizer", "moments", "temporary"),
    [
        ("adamw_torch", 8 * 300, 4 * 300),
        ("adamw_torch_fused", 8 * 300, 0),
        ("lion_32bit", 4 * 300, 0),
        ("sgd", 0, 0),
    ],
)
def test_terms_of_other_optimizers(optimizer, moments, temporary):
    counts = Counts(total=1000, trained=(200, 400), largest=500, hidden_size=8, kept=4000)
    terms = state_bytes(counts, SCRIPT.read_zero("zero2"), 2, optimizer=optimizer)
    assert (terms["moments"], terms["step"]) == (moments, 4 * 300 + temporary)


def test_a_config_of_ones_own_may_leave_out_what_deepspeed_has_defaults_for():
    counts = Counts(total=1000, trained=(600,), largest=600, hidden_size=8, kept=4000)
    assert state_bytes(counts, {"stage": 2}, 2)["backward"] == 2 * 500_000_000 + 4 * 600
    whole = state_bytes(counts, {"stage": 3, "offload_optimizer": {"device": "none"}}, 2)
    assert whole["backward"] == 2 * 500_000_000 + 4 * 600 + 2 * 1000
    assert (whole["master"], whole["step"], whole["host"]) == (4 * 300, 600 + 8 * 300, 0)


def test_the_worst_moment_is_in_backward_or_in_the_optimizer_step():
    terms = {"weights": 1, "master": 2, "moments": 4, "gradients": 8, "backward": 16, "step": 50}
    assert SCRIPT.peak(terms, activation_bytes=32) == 7 + 56
    assert SCRIPT.peak(terms, activation_bytes=20) == 7 + 50


def layered(llm_layers: int, vit_layers: int) -> Ovis2_5Config:
    return Ovis2_5Config(
        llm_config={
            "model_type": "qwen3",
            "vocab_size": 300,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": llm_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "tie_word_embeddings": True,
        },
        vit_config={
            "hidden_size": 96,
            "intermediate_size": 224,
            "num_hidden_layers": vit_layers,
            "num_attention_heads": 4,
            "patch_size": 8,
            "image_size": 64,
        },
        visual_vocab_size=516,
    )


def saved_bytes(model: Ovis2_5, run) -> int:
    """Unique storages that autograd keeps of `run`, without parameters and their bf16 copies."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {shape for p in model.parameters() for shape in (p.shape, p.shape[::-1])}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.shape not in shapes:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    total = sum(storage.nbytes() for storage in storages.values())
    del result
    return total


def measured_layers(half: bool) -> tuple[int, int]:
    """Saved bytes of one more layer: of the language model, of the vision encoder."""
    found = {}
    for llm_layers, vit_layers in ((1, 1), (2, 1), (1, 2)):
        model = Ovis2_5(layered(llm_layers, vit_layers)).train()
        model = model.bfloat16() if half else model
        autocast = contextlib.nullcontext() if half else torch.autocast("cpu", torch.bfloat16)
        embeds = model.get_input_embeddings()(torch.arange(TOKENS)[None]).detach().requires_grad_()
        pixels = torch.randn(PATCHES, 192)
        with autocast:
            found[llm_layers, vit_layers] = (
                saved_bytes(
                    model,
                    lambda m=model, e=embeds: m.hidden_states(inputs_embeds=e, use_cache=False),
                ),
                saved_bytes(
                    model, lambda m=model, p=pixels: m.visual_tokenizer.vit(p, [(1, SIDE, SIDE)])
                ),
            )
    return found[2, 1][0] - found[1, 1][0], found[1, 2][1] - found[1, 1][1]


@pytest.mark.parametrize("half", [True, False], ids=["bf16", "autocast"])
def test_a_layer_keeps_the_bytes_of_the_formula(half):
    config = layered(1, 1)
    llm, vit = measured_layers(half)
    assert llm == pytest.approx(TOKENS * SCRIPT.llm_layer_bytes(config.llm_config, half), rel=0.02)
    assert vit == pytest.approx(PATCHES * SCRIPT.vit_layer_bytes(config.vit_config, half), rel=0.02)


def kept_when_checkpointing(llm_layers: int, vit_layers: int) -> int:
    model = Ovis2_5(layered(llm_layers, vit_layers)).bfloat16().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    embeds = torch.randn(1, TOKENS, 64, dtype=torch.bfloat16, requires_grad=True)
    pixels = torch.randn(PATCHES, 192)

    def run():
        return (
            model.hidden_states(inputs_embeds=embeds, use_cache=False),
            model.visual_tokenizer.vit(pixels, [(1, SIDE, SIDE)]),
        )

    return saved_bytes(model, run)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.* is deprecated")
def test_checkpointing_keeps_the_input_of_each_layer_and_nothing_else_of_it():
    kept = kept_when_checkpointing(1, 1)
    assert kept_when_checkpointing(2, 1) == kept + TOKENS * 2 * 64
    assert kept_when_checkpointing(1, 2) == kept + PATCHES * 2 * 96


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 20 rows of so many numbers, on the CPU as on a GPU."""

    def apply(numbers: int) -> None:
        monkeypatch.setattr(supervised_head, "CHUNK_BYTES", {})
        monkeypatch.setattr(supervised_head, "DEVICE_CHUNK_BYTES", 20 * 4 * numbers)

    return apply


@pytest.mark.parametrize("tokens", [10, 20, 60])
def test_the_loss_head_peaks_at_a_chunk_and_the_sum_of_its_gradient(small_chunks, tokens):
    words, width = 20_000, 64
    small_chunks(words)
    with LiveMemory() as memory:
        head = nn.Linear(width, words, bias=False, dtype=torch.bfloat16)
        hidden = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)
        before = memory.live
        log_probs, *_ = label_log_probs(head, hidden, torch.arange(tokens))
        assert memory.live - before < 100 * tokens
        log_probs.sum().backward()
    llm = SimpleNamespace(vocab_size=words, hidden_size=width)
    expected = SCRIPT.loss_head_bytes(llm, tokens) + head.weight.grad.nbytes
    assert memory.peak - before == pytest.approx(expected, rel=0.03)


# Not on a CPU: the float32 product in a GPU's softmax backward. In one chunk: the one before it.
@pytest.mark.parametrize(("tokens", "unseen"), [(20, 4 + 2), (60, 4)])
def test_the_visual_head_peaks_at_a_chunk_and_the_sums_of_its_gradients(
    small_chunks, tokens, unseen
):
    words, width = 20_000, 16
    small_chunks(words * BUFFERS)
    shapes = ((tokens, width), (words, width), (words,), (words,), (words + NUM_INDICATORS, width))
    with LiveMemory() as memory:
        inputs = [torch.randn(s, dtype=torch.bfloat16, requires_grad=True) for s in shapes]
        before = memory.live
        embeddings = ExpectedEmbedding.apply(*inputs, 1e-5)
        assert memory.live - before == embeddings.nbytes
        embeddings.sum().backward()
    config = SimpleNamespace(
        visual_vocab_size=words + NUM_INDICATORS,
        vit_config=SimpleNamespace(hidden_size=width // 4, hidden_stride=2),
        llm_config=SimpleNamespace(hidden_size=width),
    )
    expected = SCRIPT.visual_head_bytes(config, tokens) - unseen * 20 * words
    assert memory.peak - before == pytest.approx(expected, rel=0.05)


def test_float32_weights_count_the_gradients_of_the_heads_as_gradients_alone():
    config = SCRIPT.ovis_config("2B")
    llm, words = config.llm_config, config.visual_vocab_size
    loss_head, visual_head = (
        function(part, 100) - function(part, 100, half=False)
        for function, part in (
            (SCRIPT.loss_head_bytes, llm),
            (SCRIPT.visual_head_bytes, config),
        )
    )
    assert loss_head == 4 * llm.vocab_size * llm.hidden_size
    assert visual_head == 4 * ((words - NUM_INDICATORS) * 4 * 1152 + words * llm.hidden_size)


def test_activations_are_the_layers_and_what_lives_beside_them():
    config = layered(3, 4)
    sample = SCRIPT.Sample(tokens=100, patches=64)
    llm, vit = SCRIPT.llm_layer_bytes(config.llm_config), SCRIPT.vit_layer_bytes(config.vit_config)
    heads = {
        "loss_head": 300 * (6 * 100 + 4 * 64),
        "visual_head": 24 * 16 * 512 + 4 * (512 * 96 * 4 + 516 * 64),
    }
    off = SCRIPT.activations(config, sample, checkpointing=False)
    assert off == {"llm": 3 * 100 * llm, "vit": 4 * 64 * vit, "layer": 0, **heads}
    assert SCRIPT.activations(config, sample, checkpointing=True) == {
        "llm": 3 * 100 * 2 * 64,
        "vit": 4 * 64 * 2 * 96,
        "layer": 100 * llm,
        **heads,
    }
    assert SCRIPT.alive(off) == 3 * 100 * llm + 4 * 64 * vit + heads["visual_head"]
    assert SCRIPT.alive({"llm": 1, "vit": 2, "layer": 30, "loss_head": 9, "visual_head": 8}) == 33


@pytest.fixture(scope="module")
def lived(tmp_path_factory) -> dict[str, SimpleNamespace]:
    """What two processes measured under every engine."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            str(Path(__file__).parent / "zero_states.py"),
            str(tmp_path_factory.mktemp("checkpoints")),
            *RUNS,
            *ACTIVATIONS.values(),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["run"]: SimpleNamespace(**line) for line in lines}


def counted(words: list[str]) -> Counts:
    with torch.device("meta"):
        return count(STATES.build(words))


def precision(words: list[str]) -> str:
    return "fp32" if "float32" in words else "bf16"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("run", RUNS)
def test_states_gradients_and_step_live_as_the_formulas_say(run, lived):
    found = lived[run]
    counts, kind = counted(found.words), precision(found.words)
    twice = "accumulation" in found.words
    terms = state_bytes(counts, found.zero, 2, precision=kind, accumulation=twice)
    states = terms["weights"] + terms["master"] + terms["moments"] + terms["host"] // 2
    settled = states
    width = 4 if kind == "fp32" else 2
    if found.zero["stage"] == 3:  # its buffers for gradients stay
        settled += terms["gradients"] + width * found.zero["reduce_bucket_size"]
    elif "offload_optimizer" in found.zero:  # so does the one they cross the bus through
        settled += width * max(counts.trained)
    # Of 26 kB of adapters what is rounded up and what stays whole counts.
    tolerance = 0.05 if "lora" in found.words else 0.02
    assert found.settled == pytest.approx(settled, rel=tolerance)
    assert found.step == pytest.approx(max(settled, states + terms["step"]), rel=tolerance)
    activations = lived[ACTIVATIONS["+".join(w for w in found.words if w != "accumulation")]]
    backward = states + terms["gradients"] + terms["backward"] + activations.activations
    assert found.backward == pytest.approx(backward, rel=0.1)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("run", [run for run in RUNS if "lora" not in run])
def test_checkpoints_take_the_space_of_the_formula(run, lived):
    found = lived[run]
    kind = precision(found.words)
    _, optimizer = checkpoint_bytes(counted(found.words), found.zero, precision=kind)
    assert found.disk == pytest.approx(optimizer, rel=0.03)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("run", ["zero2+lora", "zero3+lora"])
def test_checkpoints_of_adapters_hold_no_frozen_weights(run, lived):
    found = lived[run]
    _, optimizer = checkpoint_bytes(counted(found.words), found.zero, adapters=True)
    assert optimizer < found.disk < optimizer + 60_000  # what every file has beside tensors


@pytest.mark.slow
@pytest.mark.long
def test_only_zero_0_in_bf16_counts_an_adam_step_that_saw_no_gradient(lived):
    # The trainer sets it back; deepspeed 0.19.8, runtime/fp16/unfused_optimizer.py.
    assert {run: found.adam_steps for run, found in lived.items()} == {
        run: 3 if run == "zero0" else 2 for run in lived
    }


@pytest.mark.parametrize("size", ["2B", "9B"])
@pytest.mark.parametrize("sample", ["longest", "medium"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_what_a_plan_traces_is_what_the_formulas_say(size, sample, checkpointing):
    with torch.device("meta"):
        model = Ovis2_5(SCRIPT.ovis_config(size))
    counts = SCRIPT.SAMPLES[size][sample]
    terms = estimate(
        model,
        Batch(1, counts.tokens, counts.tokens, counts.patches),
        zero=SCRIPT.read_zero("zero2"),
        gpus=8,
        recompute=parse_recompute("full" if checkpointing else "none"),
        optimizer="adamw_torch",
    )
    parts = SCRIPT.activations(SCRIPT.ovis_config(size), counts, checkpointing)
    # The visual head has its turn when the language model keeps nothing any more.
    in_turn = max(
        parts["llm"] + parts["vit"] + max(parts["layer"], parts["loss_head"]),
        parts["vit"] + parts["visual_head"],
    )
    # Traced are also the gradients between layers.
    assert terms["activations"] == pytest.approx(in_turn, rel=0.1)
    formulas = SCRIPT.run_peak(size, "zero2", 8, sample, checkpointing)
    assert 0.95 * formulas < terms["peak"] < 1.02 * formulas


@pytest.mark.parametrize("size", ["2B", "9B"])
def test_the_choice_is_the_first_engine_that_fits(size):
    for gpus in SCRIPT.GPUS:
        for card in SCRIPT.CARDS:
            choice = SCRIPT.first_that_fits(size, gpus, card, "longest")
            fits = [
                engine
                for engine in SCRIPT.CHOICES
                if SCRIPT.run_peak(size, engine, gpus, "longest") <= card * 0.9e9
            ]
            assert choice == (fits[0] if fits else None)


def test_the_page_holds_exactly_the_tables_of_the_script():
    page = (ROOT / "docs/zero.md").read_text(encoding="utf-8")
    tables = SCRIPT.tables()
    assert sorted(re.findall(r"<!-- (.+) -->", page)) == sorted(tables)
    for name, text in tables.items():
        assert f"<!-- {name} -->\n{text}\n\n" in f"{page}\n"
    assert len(re.findall(r"^\| ---", page, re.MULTILINE)) == len(tables)


def test_the_stored_result_is_what_the_script_computes_today():
    stored = json.loads((ROOT / "benchmarks/results/zero_memory.json").read_text("utf-8"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", stored["date"])
    assert stored["models"] == json.loads(json.dumps(SCRIPT.result()["models"]))


def test_collected_garbage_leaves_the_live_count():
    with LiveMemory() as memory:
        kept = torch.zeros(10)
        torch.zeros(1000)
        gc.collect()
        view = kept[:5]
        assert memory.live == 40
        assert memory.peak == 4040
        del kept, view
    assert memory.live == 0
