"""Text goes to the reader piece by piece, and the pieces joined are the text."""

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer

from vlmtune.inference.streaming import TextStreamer

IDS = [0, 1, 2, 3, 1, 2]


@pytest.fixture
def sentencepiece() -> PreTrainedTokenizerFast:
    words = {"▁a": 0, "\n": 1, "▁b": 2, "▁c": 3, "x": 4}
    tokenizer = Tokenizer(WordLevel(words, unk_token="x"))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def write(streamer) -> None:
    for ids in ([[4, 4]], *([index] for index in IDS)):  # the prompt, then each new token
        streamer.put(torch.tensor(ids))
    streamer.end()


def test_spaces_of_a_sentencepiece_tokenizer_stay(sentencepiece):
    pieces: list[str] = []
    write(TextStreamer(sentencepiece, pieces.append))
    assert "".join(pieces) == sentencepiece.decode(IDS) == "a\n b c\n b"
    assert len(pieces) == len(IDS) + 1


def test_the_streamer_of_transformers_still_drops_them(sentencepiece):
    theirs = TextIteratorStreamer(sentencepiece, skip_prompt=True)
    write(theirs)
    assert "".join(theirs) == "a\nb c\nb"
