"""The processor of a checkpoint that is not whole."""

import shutil

import pytest

from vlmtune.core.errors import ModelError
from vlmtune.models.loading import load_processor


def test_folder_without_its_tokenizer_file_is_refused(tiny_ovis, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_ovis, folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="cannot be loaded: its tokenizer has no vocabulary"):
        load_processor(str(folder))
