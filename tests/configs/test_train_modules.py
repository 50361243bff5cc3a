import pytest

from vlmtune.configs.load import load_config
from vlmtune.configs.train_modules import TrainModule, parse_train_modules
from vlmtune.core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("all", [TrainModule("all")]),
        ("visual_tokenizer.head:1e-4", [TrainModule("visual_tokenizer.head", 1e-4)]),
        (
            " vte : 2E-5 | llm ",
            [TrainModule("vte", 2e-5), TrainModule("llm")],
        ),
        (
            "llm.model.layers.20-27:0.5|llm.model.layers.3.mlp",
            [TrainModule("llm.model.layers.20-27", 0.5), TrainModule("llm.model.layers.3.mlp")],
        ),
    ],
)
def test_names_and_rates_are_read_in_their_order(text, entries):
    assert parse_train_modules(text) == entries


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("", '"" has an entry without a name', 'write names joined by "|"'),
        ("llm|", '"llm|" has an entry without a name', 'write names joined by "|"'),
        ("llm||vte", '"llm||vte" has an entry without a name', 'write names joined by "|"'),
        (":1e-4", '":1e-4" has an entry without a name', 'write names joined by "|"'),
        (
            "llm,vte",
            '"llm,vte" is not written like a module',
            "write a dotted path, a range of indices as 20-27",
        ),
        (
            "llm..model",
            '"llm..model" is not written like a module',
            "write a dotted path, a range of indices as 20-27",
        ),
        (
            "llm.layers.20-",
            '"llm.layers.20-" is not written like a module',
            "write a dotted path, a range of indices as 20-27",
        ),
        ("vte:1e-4|llm|vte", '"vte" is given twice', "keep one of them"),
        ("vte:", '"" is no learning rate for vte', "write vte:1e-4"),
        ("vte:fast", '"fast" is no learning rate for vte', "write vte:1e-4"),
        ("vte:0", '"0" is no learning rate for vte', "write vte:1e-4"),
        ("vte:-1e-4", '"-1e-4" is no learning rate for vte', "write vte:1e-4"),
        ("vte:nan", '"nan" is no learning rate for vte', "write vte:1e-4"),
        ("vte:inf", '"inf" is no learning rate for vte', "write vte:1e-4"),
        ("vte:1e-4:2", '"1e-4:2" is no learning rate for vte', "write vte:1e-4"),
    ],
)
def test_a_mistake_is_named(text, what, fix):
    with pytest.raises(ConfigError) as caught:
        parse_train_modules(text)
    assert caught.value.where == "train_modules"
    assert (caught.value.what, caught.value.fix) == (what, fix)


def test_a_mistake_in_a_config_names_its_source():
    words = ["--model_path", "m", "--data_path", "a", "--output_dir", "o"]
    with pytest.raises(ConfigError) as caught:
        load_config([*words, "--train_modules", "vte:x"])
    assert caught.value.where == "command line, train_modules"
