"""A real run that reads its data while it trains."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


def test_a_stream_on_two_processes_resumes_to_the_same_weights(forked, losses, tmp_path):
    keys = {
        "streaming": "true",
        "shuffle_buffer": 50,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "dataloader_num_workers": 2,
    }
    done, whole = forked(2, name="whole", **keys)
    assert done.returncode == 0, done.stderr
    assert "samples  a stream, 0 eval" in done.stderr
    cut = tmp_path / "cut"
    shutil.copytree(whole / "checkpoint-3", cut / "checkpoint-3")
    # Another number of workers reads the same stream.
    keys |= {"output_dir": cut, "resume_from_checkpoint": "true", "dataloader_num_workers": 0}
    done, _ = forked(2, name="cut", **keys)
    assert done.returncode == 0, done.stderr
    assert losses(cut) == losses(whole)[3:]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (cut, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
