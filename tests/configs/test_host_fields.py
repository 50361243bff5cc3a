import dataclasses

from trl import SFTConfig

from vlmtune.configs.coercion import kinds_of
from vlmtune.configs.host_fields import host_fields
from vlmtune.configs.legacy import NO_EFFECT, RENAMED, SWITCHES


def test_parsed_names_equal_the_real_dataclass_fields():
    assert set(host_fields()) == {f.name for f in dataclasses.fields(SFTConfig) if f.init}


def test_every_annotation_is_of_kinds_we_coerce_or_a_host_enum():
    kinds = set().union(*(kinds_of(annotation) for annotation in host_fields().values()))
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
