"""The host's settings of a run: scaled rate, best model, DeepSpeed, and what is refused."""

import json
import math
from pathlib import Path

import pytest

from vlmtune.configs.load import load_config
from vlmtune.core.errors import ConfigError
from vlmtune.sft.arguments import global_batch, training_arguments

EVALUATED = {"eval_data_path": "e.json", "eval_strategy": "steps", "eval_steps": 5}
PATIENT = {**EVALUATED, "early_stopping_patience": 3}


@pytest.fixture
def arguments(tmp_path):
    """`arguments(key=value)` are the host's settings of a config with those keys."""

    def of(**keys):
        given = {"model_path": "m", "data_path": "d", "output_dir": str(tmp_path)} | keys
        words = [
            word
            for key, value in given.items()
            for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
        ]
        return training_arguments(load_config([*words, "--use_cpu", "true"]))

    return of


@pytest.mark.parametrize(
    ("per_device", "accumulation", "processes", "base_batch", "expected"),
    [
        (8, 4, 1, 8, 4e-5),
        (8, 4, 1, 32, 2e-5),
        (1, 8, 1, 32, 1e-5),
        (2, 4, 4, 8, 4e-5),
        (3, 1, 1, 7, 2e-5 * math.sqrt(3 / 7)),
    ],
)
def test_base_learning_rate_grows_with_the_root_of_the_batch(
    arguments, monkeypatch, per_device, accumulation, processes, base_batch, expected
):
    # Under WORLD_SIZE itself the host would wait for the other processes.
    monkeypatch.setattr("vlmtune.sft.arguments.world_size", lambda: processes)
    args = arguments(
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        base_learning_rate=2e-5,
        base_batch_size=base_batch,
    )
    assert global_batch(args) == per_device * accumulation * processes
    assert args.learning_rate == pytest.approx(expected, rel=1e-12)


def test_learning_rate_is_not_scaled(arguments):
    assert arguments(learning_rate=3e-5, per_device_train_batch_size=32).learning_rate == 3e-5


def best(args) -> tuple:
    return (
        args.load_best_model_at_end,
        args.metric_for_best_model,
        args.greater_is_better,
        str(args.eval_strategy.value),
        str(args.save_strategy.value),
    )


def test_early_stopping_keeps_the_model_with_the_lowest_loss(arguments):
    args = arguments(**PATIENT)
    assert best(args) == (True, "eval_loss", False, "steps", "steps")
    assert (args.eval_steps, args.save_steps) == (5, 5)
    args = arguments(eval_data_path="e.json", eval_strategy="epoch", early_stopping_patience=1)
    assert best(args) == (True, "eval_loss", False, "epoch", "epoch")


def test_what_the_user_gave_stands(arguments):
    args = arguments(**PATIENT, load_best_model_at_end=False, save_strategy="no")
    assert best(args)[0] is False
    assert best(args)[4] == "no"
    args = arguments(**PATIENT, save_steps=10, metric_for_best_model="mean_token_accuracy")
    assert best(args)[:3] == (True, "mean_token_accuracy", True)
    assert args.save_steps == 10


def test_without_early_stopping_nothing_is_kept_or_saved_for_it(arguments):
    args = arguments(**EVALUATED, save_strategy="no")
    assert best(args) == (False, None, None, "steps", "no")


def test_eval_steps_alone_evaluate_every_so_many_steps(arguments):
    assert best(arguments(eval_data_path="e.json", eval_steps=5))[3] == "steps"
    assert best(arguments(eval_steps=5))[3] == "no"


@pytest.mark.parametrize(
    ("keys", "known"),
    [
        ({}, "eval_loss or eval_mean_token_accuracy or eval_entropy"),
        ({"trainer": "standard"}, "eval_loss"),
        (
            {"eval_data_path": {"a": "a.json", "b": "b.json"}},
            "eval_loss or eval_a_loss or eval_b_loss",
        ),
        (
            {"eval_metrics": ["exact_match", "bleu"], "trainer": "standard"},
            "eval_loss or eval_exact_match or eval_bleu_1 or eval_bleu_2 or eval_bleu_3 or "
            "eval_bleu_4",
        ),
        (
            {"eval_data_path": {"a": "a.json", "b": "b.json"}, "eval_metrics": ["cider"]},
            "eval_loss or eval_a_loss or eval_b_loss or eval_a_cider or eval_b_cider",
        ),
    ],
)
def test_an_unknown_metric_is_refused_with_the_known_ones(arguments, keys, known):
    with pytest.raises(ConfigError) as error:
        arguments(**(PATIENT | {"metric_for_best_model": "accuracy"} | keys))
    assert error.value.where == "metric_for_best_model"
    assert error.value.what == '"accuracy" is no metric of an evaluation'
    assert error.value.fix == f"give {known}"


@pytest.mark.parametrize("metric", ["a_loss", "eval_b_loss", "loss"])
def test_a_metric_of_one_of_several_sets_is_known(arguments, metric):
    keys = {"eval_data_path": {"a": "a.json", "b": "b.json"}, "metric_for_best_model": metric}
    assert best(arguments(**(PATIENT | keys)))[:3] == (True, metric, False)


@pytest.mark.parametrize(
    ("metrics", "sets", "best_by"),
    [
        ("cider", "e.json", "cider"),
        ("exact_match|cider", "e.json", "eval_cider"),
        ("anls", "e.json", "anls"),
        ("bleu", "e.json", "bleu_4"),
        ("bleu", '{"a": "a.json"}', "eval_a_bleu_1"),
        ("vqa_accuracy", '{"a": "a.json"}', "a_vqa_accuracy"),
    ],
)
def test_of_answers_the_greater_metric_is_the_better(arguments, metrics, sets, best_by):
    keys = {**PATIENT, "eval_data_path": sets, "eval_metrics": metrics}
    assert best(arguments(**keys, metric_for_best_model=best_by))[:3] == (True, best_by, True)


def test_keys_of_answers_that_have_no_effect_are_told(arguments, capsys):
    arguments(**EVALUATED, eval_metrics="cider", eval_generate_samples=5)
    assert "has no effect" not in capsys.readouterr().err
    arguments(**EVALUATED, eval_generate_samples=5)
    told = capsys.readouterr().err
    assert "note: eval_generate_samples has no effect: there are no eval_metrics\n" in told


@pytest.mark.parametrize(
    ("keys", "where", "what"),
    [
        (
            {"early_stopping_patience": 2},
            "early_stopping_patience",
            "nothing is evaluated during training",
        ),
        (
            {"eval_metrics": ["cider"]},
            "eval_metrics",
            "are given, but there is no eval_data_path",
        ),
        (
            {"early_stopping_patience": 2, "eval_data_path": "e.json"},
            "early_stopping_patience",
            "nothing is evaluated during training",
        ),
        (
            {"eval_strategy": "epoch"},
            "eval_strategy",
            'is "epoch", but there is no eval_data_path',
        ),
        ({"do_train": False}, "do_train", "is false, and there is no eval_data_path"),
        (
            {"trainer": "standard", "label_smoothing_factor": 0.1},
            "label_smoothing_factor",
            "is not shifted by the standard trainer for this model",
        ),
        (
            {"auto_find_batch_size": True},
            "auto_find_batch_size",
            "would change the global batch, by which a run is resumed",
        ),
        (
            {"push_to_hub": True, "hub_strategy": "every_save"},
            "hub_strategy",
            '"every_save" would push unfinished models',
        ),
        ({"fp16": True}, "fp16", "float16 is not computed on a CPU"),
        ({"torch_dtype": "float16"}, "torch_dtype", "float16 is not computed on a CPU"),
        (
            {"train_sampling_strategy": "batch_rebalance"},
            "train_sampling_strategy",
            '"batch_rebalance" is an order of the host, which our batches do not follow',
        ),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size", "is 0"),
        ({"max_steps": 0}, "max_steps", "is 0, so nothing would be trained"),
        ({"num_train_epochs": 0}, "num_train_epochs", "is 0, so nothing would be trained"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 3}}},
            "deepspeed, zero_optimization.stage3_gather_16bit_weights_on_model_save",
            "is not true, so the saved model would have no weights",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(arguments, keys, where, what):
    with pytest.raises(ConfigError) as error:
        arguments(**keys)
    assert (error.value.where, error.value.what) == (where, what)


@pytest.mark.parametrize(
    ("block", "instead"),
    [
        ("optimizer", "optim, learning_rate and weight_decay"),
        ("scheduler", "lr_scheduler_type and warmup_steps"),
    ],
)
@pytest.mark.parametrize("in_a_file", [True, False])
def test_a_deepspeed_config_that_builds_the_optimizer_is_refused(
    arguments, tmp_path, block, instead, in_a_file
):
    settings: dict | str = {"zero_optimization": {"stage": 2}, block: {"type": "AdamW"}}
    if in_a_file:
        file = tmp_path / "ds.json"
        file.write_text(json.dumps(settings), "utf-8")
        settings = str(file)
    with pytest.raises(ConfigError) as error:
        arguments(deepspeed=settings)
    assert error.value.where == f"deepspeed, {block}"
    assert "the learning rates of train_modules would be lost" in error.value.what
    assert error.value.fix == f"remove the block; {instead} set the same"


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "No such file"), ("{broken", "Expecting property name")]
)
def test_a_deepspeed_file_that_cannot_be_read_is_named_with_its_place(
    arguments, tmp_path, monkeypatch, content, reason
):
    monkeypatch.chdir(tmp_path)
    if content:
        Path("ds.json").write_text(content, "utf-8")
    with pytest.raises(ConfigError) as error:
        arguments(deepspeed="ds.json")
    assert error.value.where == f"deepspeed {tmp_path / 'ds.json'}"
    assert error.value.what.startswith("cannot be read: ")
    assert reason in error.value.what


def test_deepspeed_is_left_out_where_nothing_is_trained(arguments, capsys):
    keys = {"do_train": False, "eval_data_path": "e.json"}
    args = arguments(**keys, deepspeed={"zero_optimization": {"stage": 2}})
    assert args.deepspeed is None
    assert (
        "note: deepspeed has no effect: evaluation alone can use stage 3" in capsys.readouterr().err
    )


def test_what_our_collator_needs_cannot_be_lost(arguments):
    args = arguments()
    assert (args.remove_unused_columns, args.max_length) == (False, None)
    assert args.dataset_kwargs == {"skip_prepare_dataset": True}
    assert (args.bf16, args.fp16, args.ddp_find_unused_parameters) == (False, False, False)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, (True, False)),
        ({"bf16": True}, (True, False)),
        ({"torch_dtype": "float32"}, (False, False)),
    ],
)
def test_a_half_dtype_is_what_the_model_computes_in(arguments, keys, expected):
    args = arguments(**keys)
    assert (args.bf16, args.fp16) == expected


def test_a_stream_skips_by_itself(arguments):
    assert arguments(streaming=True, max_steps=3).ignore_data_skip is True
    assert arguments().ignore_data_skip is False
