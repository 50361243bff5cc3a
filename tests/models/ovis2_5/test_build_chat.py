"""A new model's tokenizer and chat template write what training writes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from vlmtune.collators.rendering import encode, render, render_prompt
from vlmtune.core.errors import ModelError
from vlmtune.data.conversation import Turn
from vlmtune.models import Ovis2_5Processor
from vlmtune.models.ovis2_5.build import build_ovis2_5
from vlmtune.models.ovis2_5.processing_ovis2_5 import CHAT_TEMPLATE

LLMS = ["qwen3", "llama", "llama-legacy", "gpt2"]
TURNS = [
    Turn("system", "Be brief."),
    Turn("user", "<image>\nWhat is it?"),
    Turn("assistant", "A square.", True),
    Turn("user", "And <|im_end|>, </s>,  <|endoftext|> or 图?"),
    Turn("assistant", "<think>\nText.\n</think>\n\nMarks.", True),
    Turn("user", "Which is larger?"),
    Turn("assistant", " five", True),
]


def processor_of(folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder)


def test_complete_tokenizer_stays_as_it_is(language_model, built):
    before = AutoTokenizer.from_pretrained(language_model("qwen3"))
    after = processor_of(built("qwen3")).tokenizer
    assert type(after) is type(before)
    assert after.get_vocab() == before.get_vocab()
    assert repr(after.added_tokens_decoder) == repr(before.added_tokens_decoder)
    assert (after.eos_token, after.pad_token) == (before.eos_token, before.pad_token)
    assert (after.eos_token, after.pad_token) == ("<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize(
    ("llm", "added"),
    [
        ("gpt2", ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]),
        ("llama", ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|endoftext|>"]),
    ],
)
def test_missing_tokens_are_added_behind_the_others(language_model, built, llm, added):
    before = AutoTokenizer.from_pretrained(language_model(llm)).get_vocab()
    tokenizer = processor_of(built(llm)).tokenizer
    expected = {token: len(before) + i for i, token in enumerate(added)}
    assert tokenizer.get_vocab() == before | expected
    special = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
    assert [special[token] for token in added[:4]] == [True, True, False, False]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"


@pytest.mark.parametrize("llm", LLMS)
def test_training_prefix_is_the_prompt(built, llm):
    processor = processor_of(built(llm))
    sample = encode(render(TURNS, processor), processor, [4])
    end = processor.control_id("<|im_end|>")
    answers = [i for i, turn in enumerate(TURNS) if turn.trained]
    start = 0
    for i in answers:
        thinks = "<think>" in TURNS[i].text
        prompt = render_prompt(TURNS[:i], processor, enable_thinking=thinks)
        ids = encode(prompt, processor, [4]).ids
        assert sample.ids[: len(ids)] == ids
        assert set(sample.labels[start : len(ids)]) == {-100}
        start = sample.ids.index(end, len(ids)) + 1
        assert sample.labels[len(ids) : start] == sample.ids[len(ids) : start]
    assert start == len(sample.ids)


@pytest.mark.parametrize("llm", LLMS)
def test_nothing_is_lost_and_no_text_becomes_a_control_token(built, llm):
    processor = processor_of(built(llm))
    tokenizer = processor.tokenizer
    ids = [i for i in encode(render(TURNS, processor), processor, [4]).ids if i >= 0]
    block = processor.empty_think
    written = "".join(
        f"<|im_start|>{turn.role}\n"
        f"{block if turn.trained and '<think>' not in turn.text else ''}{turn.text}<|im_end|>\n"
        for turn in TURNS
    ).removesuffix("\n")
    found = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if llm == "llama-legacy":  # puts a space before each piece of text
        found, written = found.replace(" ", ""), written.replace(" ", "")
    assert found == written.replace("<image>", "")

    start, end = (processor.control_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    others = {tokenizer.bos_token_id, tokenizer.pad_token_id}
    others |= set(tokenizer.convert_tokens_to_ids(["</s>", "<|endoftext|>"])) - {
        tokenizer.unk_token_id
    }
    assert [i for i in ids if i in {start, end, *others}] == [start, end] * len(TURNS)


def test_llama_alone_would_begin_with_its_bos_token(built):
    tokenizer = processor_of(built("llama")).tokenizer
    assert tokenizer("five")["input_ids"][0] == tokenizer.bos_token_id == 1


@pytest.mark.parametrize("llm", LLMS)
def test_template_path_and_training_path_give_the_same_ids(built, llm):
    processor = processor_of(built(llm))
    turns = [TURNS[0], Turn("user", "<image>\nWhat is it?")]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    ]
    text = processor.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    image = Image.new("RGB", (56, 56), "red")
    batch = processor(text=text, images=image, min_pixels=56**2, max_pixels=56**2)
    expected = encode(render_prompt(turns, processor), processor, [4]).ids
    assert batch["input_ids"].tolist() == [expected]
    assert torch.equal(batch["grid_thws"], torch.tensor([[1, 4, 4]]))


@pytest.mark.parametrize("llm", ["llama", "gpt2", "qwen3"])
def test_text_is_tokenized_as_a_whole_rendered_chat_is(built, llm):
    """What serving engines do: no tokenization by pieces."""
    processor = processor_of(built(llm))
    turns = [TURNS[0], Turn("user", "Which is larger?")]
    ids = encode(render_prompt(turns, processor), processor).ids
    whole = processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert processor.tokenizer(whole, add_special_tokens=False)["input_ids"] == ids


def test_source_template_is_replaced_by_the_published_one(language_model, built):
    source = AutoTokenizer.from_pretrained(language_model("gpt2"))
    assert "eos_token" in source.chat_template
    assert processor_of(built("gpt2")).chat_template == CHAT_TEMPLATE


GIVEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)


@pytest.mark.parametrize("as_file", [True, False])
def test_given_template_is_written(language_model, tower, tmp_path, as_file):
    (tmp_path / "chat.jinja").write_text(GIVEN, "utf-8")
    given = str(tmp_path / "chat.jinja") if as_file else GIVEN
    sources = str(language_model("gpt2")), str(tower("conv"))
    build_ovis2_5(*sources, tmp_path / "out", chat_template=given, visual_vocab_size=68)
    processor = processor_of(tmp_path / "out")
    assert type(processor) is Ovis2_5Processor
    assert processor.chat_template == GIVEN
    text = processor.apply_chat_template(
        [{"role": "user", "content": "Hi."}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "what"),
    [
        pytest.param(
            "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}",
            "writes '[system] Be brief.[user] Hello.[assistant] Hi.[user] Hello.', but training "
            "writes '<|im_start|>system\\nBe brief.<|im_end|>\\n<|im_start|>user\\nHello.",
            id="other-turns",
        ),
        pytest.param(
            DEFAULT_SYSTEM + GIVEN,
            "writes '<|im_start|>system\\nYou are kind.<|im_end|>\\n<|im_start|>user\\nHello.",
            id="system-prompt-of-its-own",
        ),
        pytest.param(
            GIVEN.replace("<image>", ""),
            "but training writes '<|im_start|>user\\n<image>\\nWhat is it?<|im_end|>",
            id="without-images",
        ),
        pytest.param(
            GIVEN.replace("{% if add_generation_prompt %}", "{% if false %}"),
            "<|im_end|>\\n', but training writes",
            id="no-generation-prompt",
        ),
        pytest.param("{% for m in messages %}", "cannot be rendered", id="broken"),
        pytest.param("{{ raise_exception('no') }}", "cannot be rendered: no", id="refusing"),
        pytest.param("gone.jinja", "cannot be read", id="missing-file"),
    ],
)
def test_template_that_writes_something_else_is_refused(
    language_model, tower, tmp_path, template, what
):
    sources = str(language_model("gpt2")), str(tower("conv"))
    with pytest.raises(ModelError) as error:
        build_ovis2_5(*sources, tmp_path / "out", chat_template=template)
    assert "chat template" in error.value.where
    assert what in error.value.what
    assert not (tmp_path / "out").exists()


def test_tokenizer_that_changes_text_is_refused(language_model, tower, tmp_path):
    shutil.copytree(language_model("gpt2"), tmp_path / "llm")
    backend = Tokenizer(WordLevel({"<unk>": 0, "user": 1, "is": 2, "it": 3}, unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = Lowercase(), Whitespace()
    lower = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    lower.save_pretrained(tmp_path / "llm")
    kind = json.loads((tmp_path / "llm" / "tokenizer_config.json").read_text("utf-8"))
    assert kind["tokenizer_class"] != "GPT2Tokenizer"
    with pytest.raises(ModelError, match="cannot write a chat") as error:
        build_ovis2_5(str(tmp_path / "llm"), str(tower("conv")), tmp_path / "out")
    assert error.value.where == f"tokenizer of {tmp_path / 'llm'}"
