import dataclasses
from enum import EnumMeta
from typing import get_args

import pytest
from trl import SFTConfig

from vlmtune.configs.coercion import kinds_of
from vlmtune.configs.host_fields import host_enums, host_fields
from vlmtune.configs.legacy import NO_EFFECT, RENAMED, SWITCHES

FIELDS = [f for f in dataclasses.fields(SFTConfig) if f.init]


def test_parsed_names_equal_the_real_dataclass_fields():
    assert set(host_fields()) == {f.name for f in FIELDS}


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f.name)
def test_parsed_default_help_and_choices_equal_the_real_ones(field):
    parsed = host_fields()[field.name]
    made = field.default_factory is not dataclasses.MISSING
    assert parsed.default == (field.default_factory() if made else field.default)
    assert parsed.help == field.metadata.get("help", "").replace("%%", "%")
    # The choices of the two log levels are computed.
    computed = field.name in ("log_level", "log_level_replica")
    assert parsed.choices == (
        None if computed or "choices" not in field.metadata else tuple(field.metadata["choices"])
    )


def test_the_owner_is_the_package_whose_class_declares_the_field_last():
    fields = host_fields()
    assert [fields[name].owner for name in ("seed", "logging_steps", "loss_type")] == [
        "transformers",
        "trl",
        "trl",
    ]


def test_values_of_enums_equal_the_real_ones():
    real = {
        kind.__name__: tuple(member.value for member in kind)
        for field in FIELDS
        for kind in (field.type, *get_args(field.type))
        if isinstance(kind, EnumMeta)
    }
    assert len(real) >= 5
    assert {name: host_enums()[name] for name in real} == real


def test_every_annotation_is_of_kinds_we_coerce_or_a_host_enum():
    kinds = set().union(*(kinds_of(field.annotation) for field in host_fields().values()))
    assert kinds - {"bool", "int", "float", "str", "list", "dict", "None"} == {
        "HubStrategy",
        "IntervalStrategy",
        "OptimizerNames",
        "ParallelismConfig",
        "SaveStrategy",
        "SchedulerType",
    }


def test_only_what_our_collator_does_itself_is_taken_away_from_the_host():
    # Fails when the host brings back a key that we translate or ignore.
    assert set(host_fields()) & {*RENAMED, *NO_EFFECT, *SWITCHES} == {
        "assistant_only_loss",
        "chat_template_path",
        "completion_only_loss",
        "dataset_kwargs",
        "dataset_num_proc",
        "dataset_text_field",
        "eos_token",
        "eval_packing",
        "max_length",
        "packing_strategy",
        "pad_to_multiple_of",
        "pad_token",
        "padding_free",
        "remove_unused_columns",
        "shuffle_dataset",
        "truncation_mode",
    }


def test_targets_of_old_names_exist_with_the_meaning_we_rely_on():
    fields = {f.name: f for f in dataclasses.fields(SFTConfig)}
    assert fields["warmup_steps"].type is float
    sampling = fields["train_sampling_strategy"].metadata["choices"]
    assert {"random", "sequential", "group_by_length"} <= set(sampling)
