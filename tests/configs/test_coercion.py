import pytest

from vlmtune.configs.coercion import coerce, kinds_of
from vlmtune.core.errors import ConfigError


def from_file(value, annotation, key="key"):
    return coerce(value, annotation, key=key, source="file x.json", from_command_line=False)


def from_command_line(value, annotation, key="key"):
    return coerce(value, annotation, key=key, source="command line", from_command_line=True)


@pytest.mark.parametrize(
    ("annotation", "kinds"),
    [
        ("int", {"int"}),
        ("dict[str, Any] | str | None", {"dict", "str", "None"}),
        ("None | str | list[str]", {"None", "str", "list"}),
        ("str | None | Literal[False]", {"str", "None", "bool"}),
        ("IntervalStrategy | str", {"IntervalStrategy", "str"}),
    ],
)
def test_kinds_are_the_outer_types_of_the_union(annotation, kinds):
    assert kinds_of(annotation) == kinds


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        pytest.param("1e-5", "float", 1e-5, id="float"),
        pytest.param("500", "float", 500, id="whole-number-stays-whole"),
        pytest.param("0.4", "float", 0.4, id="fraction-of-the-run"),
        pytest.param("1e3", "int", 1000, id="int-in-scientific-form"),
        pytest.param("-1", "int", -1, id="negative-int"),
        pytest.param("true", "bool", True, id="true"),
        pytest.param("False", "bool", False, id="False"),
        pytest.param("1", "bool", True, id="1"),
        pytest.param("0", "bool | None", False, id="0"),
        pytest.param('{"num_cycles":1}', "dict | str | None", {"num_cycles": 1}, id="json"),
        pytest.param("zero1.json", "dict | str | None", "zero1.json", id="path-stays-text"),
        pytest.param("8", "int | str | None", 8, id="number-in-a-union"),
        pytest.param("auto", "int | str | None", "auto", id="word-in-a-union"),
        pytest.param("true", "bool | str | None", True, id="bool-in-a-union"),
        pytest.param("false", "str | None | Literal[False]", False, id="literal-false"),
        pytest.param("10", "str", "10", id="digits-of-a-string"),
        pytest.param("a.json | b.json", "list[str]", ["a.json", "b.json"], id="joined-list"),
        pytest.param('["a|b", "c"]', "list[str]", ["a|b", "c"], id="json-list"),
        pytest.param("", "list[str]", [], id="empty-list"),
        pytest.param("labels", "list[str] | None", ["labels"], id="list-of-one"),
        pytest.param(
            "a.json | b.json", "list[str] | dict[str, Any]", ["a.json", "b.json"], id="list-or-dict"
        ),
        pytest.param(
            '{"a": "x|y"}', "list[str] | dict[str, Any]", {"a": "x|y"}, id="dict-before-list"
        ),
        pytest.param('{"a": 2}', "dict[str, Any]", {"a": 2}, id="json-object"),
        pytest.param("tensorboard", "None | str | list[str]", "tensorboard", id="list-or-string"),
    ],
)
def test_text_becomes_the_annotated_type(text, annotation, value):
    result = from_command_line(text, annotation)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize("text", ["null", "none", "None"])
def test_null_text_is_none_on_the_command_line_where_the_field_is_optional(text):
    assert from_command_line(text, "str | None") is None
    assert from_command_line(text, "str") == text
    assert from_file(text, "str | None") == text


@pytest.mark.parametrize("text", ["null", "none"])
def test_report_to_none_stays_the_word_the_host_knows(text):
    assert from_command_line(text, "None | str | list[str]", key="report_to") == "none"


def test_a_bare_no_of_yaml_is_the_strategy_no():
    assert from_file(False, "IntervalStrategy | str", key="eval_strategy") == "no"


@pytest.mark.parametrize(
    ("value", "annotation", "what"),
    [
        ("1.5", "int", "'1.5' is not a whole number"),
        (1.5, "int", "1.5 is not a whole number"),
        (True, "int", "True is not a whole number"),
        ("ten", "float", "'ten' is not a number"),
        ("nan", "float", "'nan' is not a number"),
        (True, "float | None", "True is not a number or null"),
        ("maybe", "bool", "'maybe' is not true or false"),
        (2, "bool", "2 is not true or false"),
        (5, "str", "5 is not a string"),
        ({"a": 1}, "list[str]", "{'a': 1} is not a list of strings"),
        (["a", 1], "list[str]", "['a', 1] is not a list of strings"),
        ([""], "list[str]", "[''] is not a list of strings"),
        ([1], "list[str] | dict[str, Any]", "[1] is not a list of strings or a JSON object"),
        ("a", "dict[str, Any]", "'a' is not a JSON object"),
        ([1], "dict | str | None", "[1] is not a string or a JSON object or null"),
    ],
)
def test_a_wrong_type_is_named_with_the_expected_one(value, annotation, what):
    with pytest.raises(ConfigError) as caught:
        from_file(value, annotation, key="some_key")
    assert caught.value.where == "file x.json, some_key"
    assert caught.value.what == what
    assert caught.value.fix == f'give "some_key" {what.partition(" is not ")[2]}'


def test_broken_json_for_keyword_arguments_is_an_error():
    with pytest.raises(ConfigError, match=r"'\{a' is not a JSON object or null"):
        from_command_line("{a", "dict | str | None", key="lr_scheduler_kwargs")


def test_a_bare_flag_needs_a_boolean_field():
    assert from_command_line(True, "bool") is True
    with pytest.raises(ConfigError, match="a bare flag is not a string"):
        from_command_line(True, "str", key="model_path")
