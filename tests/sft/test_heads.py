"""The loss at supervised positions under both trainers, adapters and ZeRO-3: as the plain formula
has it."""

import copy
import socket
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, Trainer
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from vlmtune.core.errors import ModelError
from vlmtune.models import Ovis2_5, supervised_head
from vlmtune.sft.heads import use_supervised_head

WORDS = 120


@pytest.fixture(autouse=True)
def chunks_of_three_rows(monkeypatch):
    monkeypatch.setattr(supervised_head, "CHUNK_BYTES", {"cpu": 3 * 4 * WORDS})


def qwen(**settings) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        initializer_range=0.3,
        **settings,
    )
    return Qwen3ForCausalLM(config)


def batch(rows: int = 3, length: int = 11, seed: int = 0) -> dict[str, Tensor]:
    """Every third position is supervised, and none at all of the last row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, WORDS, (rows, length), generator=generator)
    labels = torch.where(torch.arange(length) % 3 == 0, ids, -100)
    if rows > 1:
        labels[-1] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def plain_loss(model: Any, inputs: dict[str, Tensor], items: int | None = None) -> Tensor:
    given = {key: value for key, value in inputs.items() if key != "labels"}
    logits, labels = model(**given).logits[:, :-1].float(), inputs["labels"][:, 1:]
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return total / (items or (labels != -100).sum())


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rel: float = 2e-6) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max()
        assert error <= rel * gradient.abs().max().clamp(min=1e-3), name


def ovis_batch(model: Ovis2_5) -> dict[str, Tensor]:
    """Two samples with an image of two by two visual tokens each."""
    vit = model.config.vit_config
    side = 2 * vit.hidden_stride
    text = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    image = torch.tensor([[-301, *[-300] * 4, -302]]).expand(2, -1)
    ids = torch.cat([text[:, :3], image, text[:, 3:]], dim=1)
    labels = torch.where((torch.arange(15) > 10) & (ids > 0), ids, -100)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": torch.randn(2 * side**2, vit.num_channels * vit.patch_size**2),
        "grid_thws": torch.tensor([[1, side, side]] * 2),
    }


@pytest.mark.parametrize("items", [None, 40])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_are_those_of_the_plain_formula(tied, items):
    model, inputs = qwen(tie_word_embeddings=tied), batch()
    loss = plain_loss(model, inputs, items)
    expected = gradients(model, loss)
    use_supervised_head(model)
    count = None if items is None else torch.tensor(items)
    output = model(**inputs, num_items_in_batch=count)
    assert output["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    assert_same(gradients(model, output.loss), expected)


def test_ovis_with_images_under_a_frozen_head(tiny_ovis):
    model = Ovis2_5.from_pretrained(tiny_ovis).train()
    model.get_output_embeddings().weight.requires_grad_(False)
    inputs = ovis_batch(model)
    loss = model(**inputs, num_items_in_batch=7).loss
    expected = gradients(model, loss)
    use_supervised_head(model)
    output = model(**inputs, num_items_in_batch=7)
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert_same(gradients(model, output.loss), expected)


def test_statistics_are_those_of_trls_fused_head():
    model, inputs = qwen(), batch()
    with torch.no_grad():
        guesses = model(inputs["input_ids"]).logits.argmax(dim=-1)
        inputs["labels"][0, 1:5] = guesses[0, :4]
    theirs, ours = copy.deepcopy(model), copy.deepcopy(model)
    for patched in (theirs, ours):
        add_fused_lm_head(patched, outputs=("log_probs", "entropy", "is_top1"))
    use_supervised_head(ours)
    expected = theirs(**inputs, fused_lm_head=True, use_cache=False)
    found = ours(**inputs, fused_lm_head=True, use_cache=False)
    for name in ("log_probs", "entropy"):
        assert found[name].sum().item() == pytest.approx(expected[name].sum().item(), rel=1e-6)
    for name in ("is_top1", "label_mask"):
        assert found[name].sum().item() == expected[name].sum().item() >= 4, name
    # What loss_type "dft" makes of them.
    weighted = [(-o.log_probs * o.log_probs.exp().detach()).sum() for o in (found, expected)]
    assert_same(gradients(ours, weighted[0]), gradients(theirs, weighted[1]))


def test_a_batch_without_supervised_tokens_gives_every_parameter_a_gradient_of_zero():
    model, inputs = qwen(), batch()
    use_supervised_head(model)
    inputs["labels"].fill_(-100)
    output = model(**inputs)
    assert output.loss.item() == 0.0
    found = gradients(model, output.loss)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert all(gradient.count_nonzero() == 0 for gradient in found.values())


def test_without_labels_the_models_own_forward_runs():
    model, inputs = qwen().eval(), batch()
    ids = inputs["input_ids"]
    expected, new = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    add_fused_lm_head(model)
    use_supervised_head(model)
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), new)
    with pytest.raises(ValueError, match="not_an_argument"):
        model.generate(ids, max_new_tokens=4, not_an_argument=1)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["frozen-head", "lora-on-the-head", "trained-head"],
)
def test_an_adapted_model_gives_the_loss_and_gradients_of_the_plain_formula(settings):
    model = get_peft_model(qwen(), LoraConfig(init_lora_weights=False, **settings))
    inputs = batch()
    loss = plain_loss(model, inputs)
    expected = gradients(model, loss)
    use_supervised_head(model)
    output = model(**inputs)
    assert output.log_probs.shape == (6,)
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert_same(gradients(model, output.loss), expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [("final_logit_softcapping", 30.0), ("logit_scale", 0.0625), ("output_router_logits", True)],
)
def test_a_model_that_changes_its_logits_is_refused_with_the_field(field, value):
    model = qwen()
    setattr(model.config, field, value)
    with pytest.raises(ModelError) as error:
        use_supervised_head(model)
    assert error.value.where == f"qwen3 config, {field}"
    assert f"is {value}, which" in error.value.what
    setattr(model.config, field, 1 if field == "logit_scale" else None)
    use_supervised_head(model)


@pytest.fixture
def tokenizer(ovis_goldens):
    return AutoTokenizer.from_pretrained(ovis_goldens / "tokenizer")


def trainer_of(kind: str, model: Any, tokenizer: Any, folder: Any, **settings) -> Trainer:
    rows = [{k: v[0].tolist() for k, v in batch(rows=1, seed=i).items()} for i in range(8)]
    args = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        learning_rate=0.1,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        optim="sgd",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=False,
        bf16=False,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        **settings,
    )
    trainer_class = SFTTrainer if kind == "trl" else Trainer
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        data_collator=lambda rows: {k: torch.tensor([r[k] for r in rows]) for k in rows[0]},
        processing_class=tokenizer,
    )
    use_supervised_head(model)
    return trainer


def stepped(model: Any, rows: list[int]) -> float:
    """One step of gradient descent on these samples with the plain formula."""
    whole = [batch(rows=1, seed=i) for i in rows]
    together = {key: torch.cat([one[key] for one in whole]) for key in whole[0]}
    loss = plain_loss(model, together)
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    return loss.item()


@pytest.mark.parametrize("kind", ["trl", "standard"])
def test_steps_of_both_trainers_are_those_of_the_plain_formula(kind, tokenizer, tmp_path):
    model = qwen()
    reference = copy.deepcopy(model).train()
    expected = [stepped(reference, [0, 1, 2, 3]), stepped(reference, [4, 5, 6, 7])]
    trainer = trainer_of(kind, model, tokenizer, tmp_path)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in logs] == pytest.approx(expected, rel=1e-6)
    assert_same(dict(model.named_parameters()), dict(reference.named_parameters()), 1e-5)
    assert kind == "standard" or {"entropy", "mean_token_accuracy"} <= logs[0].keys()


def test_evaluation_and_label_smoothing_see_what_they_read(tokenizer, tmp_path):
    model = qwen()
    trainer = trainer_of("trl", model, tokenizer, tmp_path, label_smoothing_factor=0.1)
    trainer.train()
    inputs = batch()
    with torch.no_grad():
        logs = model(inputs["input_ids"]).logits[:, :-1].log_softmax(dim=-1)
        labels = inputs["labels"][:, 1:]
        picked = logs.gather(2, labels.clamp(min=0)[..., None])[..., 0]
        smooth = -(0.9 * picked + 0.1 * logs.mean(dim=-1))[labels != -100].mean()
        trainer.model.eval()
        found = trainer.compute_loss(model, dict(inputs))
    assert found.item() == pytest.approx(smooth.item(), rel=1e-6)


ZERO3 = """
import json, sys
import deepspeed, torch
from deepspeed.utils import safe_get_full_grad
from torch.distributed import get_rank
from transformers.integrations import HfDeepSpeedConfig
from vlmtune.models import Ovis2_5, supervised_head
from vlmtune.sft.heads import use_supervised_head

supervised_head.CHUNK_BYTES = {"cpu": 3 * 4 * 400}
deepspeed.init_distributed("gloo")
model = Ovis2_5.from_pretrained(tiny)
head, linear = model.get_output_embeddings(), model.visual_tokenizer.head[0]
if adapted:
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(model, config)
settings = json.load(open("configs/zero/zero3.json"))
settings["train_batch_size"] = 2
settings["train_micro_batch_size_per_gpu"], settings["gradient_accumulation_steps"] = 1, 1
settings["gradient_clipping"], settings["bf16"] = 0.0, {"enabled": False}
zero = settings["zero_optimization"]
zero |= {"reduce_bucket_size": 10000, "stage3_prefetch_bucket_size": 0}
zero["stage3_param_persistence_threshold"] = 0
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.SGD(trained, lr=0.5)
settings["zero_allow_untested_optimizer"] = True
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
use_supervised_head(model)
engine.train()
host = HfDeepSpeedConfig(settings)  # tells a text-only rank to run vision in evaluation too
result = []
for step in range(2):
    inputs = torch.load(f"{folder}/batch-{get_rank()}-{step}.pt")
    partitioned = head.weight.numel() + linear.weight.numel() if not adapted else 0
    assert partitioned == 0
    output = engine(**inputs, num_items_in_batch=torch.tensor(items))
    engine.backward(2 * output.loss)  # the mean over two ranks of a sum over all tokens
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = {n: safe_get_full_grad(p).clone() for n, p in names.items()}
    result.append((output.loss.detach(), gradients))
    engine.step()
with torch.no_grad():
    model.eval()
    result.append(model(**inputs).loss)
torch.save(result, f"{folder}/result-{get_rank()}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora-on-the-head"])
def test_two_ranks_under_zero3_have_the_losses_and_gradients_of_one_process(
    fork, tiny_ovis, tmp_path, adapted
):
    model: Any = Ovis2_5.from_pretrained(tiny_ovis)
    inputs = [ovis_batch(model) for _ in range(2)]
    inputs[1]["labels"][:, :13] = -100
    # The second rank's second batch has neither an image nor a supervised token.
    text = {key: inputs[0][key][:, 9:] for key in ("input_ids", "attention_mask", "labels")}
    text["labels"] = torch.full_like(text["labels"], -100)
    steps = [[inputs[0], inputs[1]], [inputs[1], text]]
    for step, of_ranks in enumerate(steps):
        for rank, one in enumerate(of_ranks):
            torch.save(one, tmp_path / f"batch-{rank}-{step}.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        known = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    names = {"tiny": str(tiny_ovis), "folder": str(tmp_path), "items": 9, "adapted": adapted}
    told = tmp_path / "told.txt"
    ranks = [
        fork(
            ZERO3,
            told,
            {**known, "RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": "2"},
            **names,
        )
        for i in range(2)
    ]
    if adapted:
        torch.manual_seed(0)
        config = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        model = get_peft_model(model, config)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    expected = []
    for of_ranks in steps:
        losses = [plain_loss(model, one, 9) for one in of_ranks]
        expected.append((losses, gradients(model, losses[0] + losses[1])))
        optimizer.step()
    with torch.no_grad():
        model.eval()
        final = plain_loss(model, steps[1][0])
    for process in ranks:
        process.join(200)
        assert process.exitcode == 0, told.read_text()
    for rank in range(2):
        *found, evaluated = torch.load(tmp_path / f"result-{rank}.pt")
        for (loss, grads), (losses, reference) in zip(found, expected, strict=True):
            assert loss.item() == pytest.approx(losses[rank].item(), rel=1e-5, abs=1e-9)
            assert_same(grads, {n: reference[n] for n in grads}, rel=1e-4)
        if rank == 0:
            assert evaluated.item() == pytest.approx(final.item(), rel=1e-5)
