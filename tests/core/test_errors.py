"""Messages of the exception tree, here and after a trip through a process."""

import pickle

import pytest
from torch.utils.data import DataLoader

from vlmtune.core.errors import ConfigError, DataError, ModelError, TrainingError, VLMTuneError

PARTS = ("train.json, record 17", "2 placeholders, but 1 file", "list both files")
TEXT = "train.json, record 17:\n  2 placeholders, but 1 file.\n  Fix: list both files."


@pytest.mark.parametrize(
    ("kind", "standard"),
    [
        (ConfigError, ValueError),
        (DataError, ValueError),
        (ModelError, ValueError),
        (TrainingError, RuntimeError),
    ],
)
def test_a_message_says_where_what_and_how_to_fix_it(kind, standard):
    error = kind(*PARTS)
    assert str(error) == TEXT
    assert (error.where, error.what, error.fix) == PARTS
    assert isinstance(error, standard) and isinstance(error, VLMTuneError)


def test_sentences_that_end_get_no_second_mark():
    error = DataError("file", "What is this?", "Say it.")
    assert str(error) == "file:\n  What is this?\n  Fix: Say it."


def test_a_pickled_error_is_the_same_error():
    again = pickle.loads(pickle.dumps(DataError(*PARTS)))
    assert type(again) is DataError
    assert (str(again), again.where, again.what, again.fix) == (TEXT, *PARTS)


def test_a_code_is_no_part_of_the_message_and_is_kept_by_pickling():
    error = DataError(*PARTS, "image-marks-many")
    again = pickle.loads(pickle.dumps(error))
    assert str(error) == str(again) == TEXT
    assert error.code == again.code == "image-marks-many"
    assert DataError(*PARTS).code == DataError(f"DataError: {TEXT}").code == ""


def test_the_end_of_a_traceback_gives_the_parts_again():
    earlier = "Traceback (most recent call last):\n  File 'a.py', line 3, in load\n"
    cause = "OSError: broken\n\nThe above exception was the direct cause:\n\n"
    error = DataError(f"Caught DataError in worker 0.\n{earlier}{cause}DataError: {TEXT}\n")
    assert str(error) == TEXT
    assert (error.where, error.what, error.fix) == (PARTS[0], f"{PARTS[1]}.", f"{PARTS[2]}.")


def test_a_qualified_name_in_the_traceback_is_left_out():
    error = DataError(f"Traceback:\nvlmtune.core.errors.DataError: {TEXT}\n")
    assert error.where == PARTS[0]


class Broken:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise DataError(*PARTS)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_loader_process_arrives_with_its_parts(workers):
    with pytest.raises(DataError) as caught:
        next(iter(DataLoader(Broken(), num_workers=workers)))
    assert str(caught.value) == TEXT
    assert caught.value.where == PARTS[0]
