"""The probe before a packed run: models that keep samples apart pass, the others are refused."""

import socket
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoProcessor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmtune.core.errors import ModelError
from vlmtune.models import Ovis2_5
from vlmtune.sft.isolation import check_isolation, packed_row, probe_samples

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
MIXING = {
    "mamba": {},
    "recurrent_gemma": {**HEADS, "lru_width": 32, "num_key_value_heads": 1},
    "lfm2": {**HEADS, "layer_types": ["conv", "full_attention"]},
}


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


def texts() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 96, (1, n), generator=generator)} for n in (37, 29)]


@pytest.fixture(scope="module")
def processor(tiny_ovis) -> Any:
    return AutoProcessor.from_pretrained(tiny_ovis)


@pytest.mark.parametrize("images", [True, False])
def test_probe_samples_are_two_with_images_only_where_asked(processor, images):
    samples = probe_samples(processor, images)
    assert len(samples) == 2
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    assert len(set(lengths)) == 2
    assert all(("pixel_values" in sample) == images for sample in samples)


def test_a_row_holds_the_samples_one_after_the_other(processor):
    first, second = probe_samples(processor, images=True)
    row = packed_row([first, second])
    cut = first["input_ids"].shape[1]
    end = cut + second["input_ids"].shape[1]
    assert torch.equal(row["input_ids"][0, :cut], first["input_ids"][0])
    assert torch.equal(row["input_ids"][0, cut:], second["input_ids"][0])
    assert row["position_ids"][0].tolist() == [*range(cut), *range(end - cut)]
    assert row["cu_seq_lens_q"].tolist() == row["cu_seq_lens_k"].tolist() == [0, cut, end]
    assert row["cu_seq_lens_q"].dtype == torch.int32
    assert row["max_length_q"] == row["max_length_k"] == max(cut, end - cut)
    assert len(row["grid_thws"]) == len(first["grid_thws"]) + len(second["grid_thws"])
    assert len(row["pixel_values"]) == row["grid_thws"].prod(-1).sum()


@pytest.mark.parametrize("implementation", ["packed", "sdpa", "eager"])
@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("autocast", [nullcontext, bfloat16])
def test_a_model_that_keeps_samples_apart_passes(
    tiny_ovis, processor, implementation, images, autocast
):
    model = Ovis2_5.from_pretrained(tiny_ovis, attn_implementation=implementation)
    check_isolation(model, probe_samples(processor, images), autocast())


@pytest.mark.parametrize("autocast", [nullcontext, bfloat16])
@pytest.mark.parametrize("family", MIXING)
def test_a_model_that_mixes_along_the_row_is_refused(family, autocast):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SIZES, **MIXING[family]))
    with pytest.raises(ModelError) as error:
        check_isolation(model, texts(), autocast())
    assert type(model).__name__ in error.value.where
    assert "set packing to false" in error.value.fix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_that_sees_the_whole_row_is_refused(tiny_ovis, processor, dtype):
    def whole_row(module, query, key, value, attention_mask, **kwargs):
        return sdpa_attention_forward(module, query, key, value, None, is_causal=True)

    ALL_ATTENTION_FUNCTIONS.register("whole_row", whole_row)
    try:
        model = Ovis2_5.from_pretrained(tiny_ovis, attn_implementation="whole_row", dtype=dtype)
        with pytest.raises(ModelError) as error:
            check_isolation(model, probe_samples(processor, images=True))
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping["whole_row"]
    assert error.value.where == "packing: true with Ovis2_5"
    assert "attn_implementation whole_row" in error.value.what


def test_a_sample_that_reads_other_positions_alone_is_refused():
    """Nothing leaks from one to the other, but the row is not what the model was trained on."""
    config = CONFIG_MAPPING["gpt2"](vocab_size=96, n_embd=32, n_layer=1, n_head=2)
    model = AutoModelForCausalLM.from_config(config)
    model.transformer.wpe.weight.data.normal_()
    check_isolation(model, texts())

    def count_on(module, args):
        return (torch.arange(args[0].shape[1])[None],)

    model.transformer.wpe.register_forward_pre_hook(count_on)
    with pytest.raises(
        ModelError, match=r"logits change by 0 of their spread .*alone by 0?\.?[1-9]"
    ):
        check_isolation(model, texts())


def test_modes_random_numbers_and_gradients_stay_as_they_were(tiny_ovis, processor):
    model = Ovis2_5.from_pretrained(tiny_ovis, attn_implementation="packed").train()
    model.visual_tokenizer.eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    before = torch.get_rng_state()
    check_isolation(model, probe_samples(processor, images=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_adapters_are_run_without_dropout_and_the_model_is_named(tiny_ovis, processor):
    def adapted(implementation: str) -> Any:
        model = Ovis2_5.from_pretrained(tiny_ovis, attn_implementation=implementation)
        settings = LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.5)
        adapted = get_peft_model(model, settings)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return adapted.train()

    samples = probe_samples(processor, images=True)
    check_isolation(adapted("packed"), samples)
    model = adapted("sdpa")
    # As a caller's mask of ones does: transformers then sees one sample in the row.
    add_ones(model)
    with pytest.raises(ModelError, match="packing: true with Ovis2_5:"):
        check_isolation(model, samples)


def add_ones(model) -> None:
    def hook(module, args, kwargs):
        ids = kwargs["input_ids"]
        return args, {**kwargs, "attention_mask": torch.ones_like(ids)}

    model.get_base_model().register_forward_pre_hook(hook, with_kwargs=True)


IN_ZERO = """
import torch, deepspeed
from transformers import AutoProcessor
from transformers.integrations import HfDeepSpeedConfig
from vlmtune.core.errors import ModelError
from vlmtune.models import Ovis2_5
from vlmtune.sft.isolation import check_isolation, probe_samples

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed(dist_backend="gloo")
settings = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "torch_adam": True}},
    "zero_force_ds_cpu_optimizer": False,
}
live = HfDeepSpeedConfig(settings)
model = Ovis2_5.from_pretrained(folder, attn_implementation="packed")
engine, *_ = deepspeed.initialize(model=model, config=settings)
processor = AutoProcessor.from_pretrained(folder)
for images in (True, False):
    check_isolation(model, probe_samples(processor, images))
print("sharded", all(p.ds_tensor.numel() < p.ds_numel for p in model.parameters()), flush=True)
sample = {k: v for k, v in probe_samples(processor, True)[0].items() if k != "attention_mask"}
loss = engine(**sample, labels=sample["input_ids"].clamp(min=-100), use_cache=False).loss
engine.backward(loss)
engine.step()
print("trained", bool(loss.isfinite()), flush=True)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_the_probe_runs_under_zero_3_before_a_step(fork, tiny_ovis, tmp_path):
    told = tmp_path / "told.txt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    known = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [
        fork(IN_ZERO, told, {**known, "RANK": i, "LOCAL_RANK": i}, folder=str(tiny_ovis))
        for i in ("0", "1")
    ]
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0], told.read_text()
    assert told.read_text().count("sharded True") == told.read_text().count("trained True") == 2
