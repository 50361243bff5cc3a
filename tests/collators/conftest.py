"""The processor of the golden model cases, one whose tokenizer fuses newlines, and encoders."""

import json
from dataclasses import fields

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vlmtune.collators.sample import SampleEncoder
from vlmtune.data.images import PixelLimits
from vlmtune.models import Ovis2_5Processor
from vlmtune.models.ovis2_5.image_processing_ovis2_5 import Ovis2_5ImageProcessor


@pytest.fixture(scope="session")
def processor(ovis_goldens) -> Ovis2_5Processor:
    tokenizer = AutoTokenizer.from_pretrained(ovis_goldens / "tokenizer")
    return Ovis2_5Processor(Ovis2_5ImageProcessor(patch_size=4), tokenizer)


@pytest.fixture(scope="session")
def fusing_processor(processor) -> Ovis2_5Processor:
    """Bytes, the added tokens, and two merges: newlines become one token by twos and threes, as
    the published tokenizer does with many of them."""
    vocabulary = {byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))}
    vocabulary |= {"ĊĊ": 256, "ĊĊĊ": 257}
    backend = Tokenizer(BPE(vocabulary, [("Ċ", "Ċ"), ("ĊĊ", "Ċ")]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_tokens(
        [
            AddedToken(token, normalized=False)
            for token in sorted(processor.tokenizer.get_added_vocab())
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>")
    assert len(tokenizer("\n\n\n")["input_ids"]) == 1
    return Ovis2_5Processor(processor.image_processor, tokenizer)


@pytest.fixture
def make_encoder(processor, ovis_goldens):
    """`make_encoder(case, key=value)` encodes with the arguments of a golden case, so changed."""

    def make(case: str = "full_multi_tied", **changes) -> SampleEncoder:
        given = json.loads((ovis_goldens / case / "samples.json").read_text("utf-8"))
        arguments = {**given["training_args"], **changes}
        limits = PixelLimits(**{f.name: arguments.pop(f.name) for f in fields(PixelLimits)})
        return SampleEncoder(processor, limits, **arguments)

    return make
