"""Which tower is computed again, as written in `recompute`."""

import pytest

from vlmtune.configs.recompute import parse_recompute
from vlmtune.core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "llm", "visual_tokenizer"),
    [
        ("none", "none", "none"),
        ("selective", "selective", "selective"),
        ("full", "full", "full"),
        ("llm:full", "full", "none"),
        ("visual_tokenizer:selective", "none", "selective"),
        (" llm : full | visual_tokenizer : selective ", "full", "selective"),
        ("visual_tokenizer:none|llm:selective", "selective", "none"),
    ],
)
def test_every_tower_has_a_policy(text, llm, visual_tokenizer):
    found = parse_recompute(text)
    assert list(found.items()) == [("llm", llm), ("visual_tokenizer", visual_tokenizer)]


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("selectiv", '"selectiv" is no policy', "did you mean selective"),
        ("", '"" is no policy', "known are none, selective, full"),
        ("llm:ful", '"ful" is no policy', "did you mean full"),
        ("llm:", '"" is no policy', "known are none, selective, full"),
        ("lm:full", '"lm" is no tower', "did you mean llm"),
        ("vte:full", '"vte" is no tower', "known are llm, visual_tokenizer"),
        ("llm:full|", '"" is no tower', "known are llm, visual_tokenizer"),
        ("llm:full|llm:none", '"llm" is given twice', "keep one of them"),
    ],
)
def test_a_mistake_is_named(text, what, fix):
    with pytest.raises(ConfigError) as caught:
        parse_recompute(text)
    error = caught.value
    assert (error.where, error.what, error.fix) == ("recompute", what, fix)
