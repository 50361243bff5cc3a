"""What a run says when memory, a process, a loader or a file fails under it."""

import json
import os
import re
import signal
import socket
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from vlmtune.cli.main import main
from vlmtune.core.errors import TrainingError
from vlmtune.sft.failures import batch_in_words, explained, unwritable

ROOT = Path(__file__).parents[2]
BATCH = "samples a, b (2 x 7 tokens, 4,096 pixels)"


def test_a_batch_is_named_by_samples_tokens_and_pixels():
    batch = {"input_ids": torch.zeros(2, 7), "pixel_values": torch.zeros(64, 3 * 8 * 8)}
    assert batch_in_words(["a", "b"], batch) == BATCH
    del batch["pixel_values"]
    assert batch_in_words([], batch) == "samples none (2 x 7 tokens, 0 pixels)"


def caught(action) -> Exception:
    with pytest.raises((RuntimeError, MemoryError)) as error:
        action()
    return error.value


@pytest.mark.parametrize(
    "action",
    [
        pytest.param(lambda: torch.empty(2**58), id="torch"),
        pytest.param(lambda: bytearray(2**62), id="python"),
    ],
)
def test_out_of_memory_names_the_batch_and_two_things_to_change(action):
    failure = explained(caught(action), 4, BATCH)
    assert isinstance(failure, TrainingError)
    assert failure.where == f"rank 0, step 4, {BATCH}"
    assert failure.what.startswith("out of memory: ")
    assert "halve per_device_train_batch_size and double gradient_accumulation" in failure.fix
    assert "lower packing_length, multimodal_max_length or the pixel limits" in failure.fix


def test_a_gpu_out_of_memory_is_told_alike():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nDetails")
    failure = explained(error, 4, BATCH)
    assert failure is not None
    assert failure.what == "out of memory: CUDA out of memory. Tried to allocate 2 GiB."


class Dying:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_loader_process_is_told():
    failure = explained(caught(lambda: next(iter(DataLoader(Dying(), num_workers=1)))), 4, BATCH)
    assert failure is not None
    assert failure.what.startswith("a loader process died: DataLoader worker (pid")
    assert "lower dataloader_num_workers or dataloader_prefetch_factor" in failure.fix


def test_a_full_disk_in_a_step_is_told():
    with pytest.raises(OSError) as error:
        text_to(Path())
    failure = explained(error.value, 4, BATCH)
    assert failure is not None
    assert failure.where == f"rank 0, step 4, {BATCH}"
    assert failure.what.startswith("the disk is full: ")
    assert "free space or lower save_total_limit" in failure.fix


@pytest.mark.parametrize(
    "action",
    [
        pytest.param(lambda: Path("absent").read_text(), id="path"),
        pytest.param(lambda: torch.ones(2, 3) @ torch.ones(2, 3), id="shape"),
        pytest.param(lambda: torch.load(os.devnull), id="file"),
    ],
)
def test_other_errors_are_left_as_they_are(action):
    with pytest.raises(Exception) as error:
        action()
    assert explained(error.value, 4, BATCH) is None


WAITING = """
import sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from vlmtune.sft.failures import explained
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2,
                        timeout=timedelta(seconds=2))
dist.barrier()
if rank == 1:
    if end == "leaves":
        sys.exit()
    time.sleep(60)
try:
    dist.all_reduce(torch.ones(1))
except RuntimeError as error:
    print(explained(error, 4, "samples a"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["sleeps", "leaves"])
def test_a_silent_and_a_vanished_process_are_told_from_gloos_own_errors(end, fork, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [tmp_path / f"rank{rank}" for rank in (0, 1)]
    ranks = [
        fork(WAITING, file, {"RANK": str(rank)}, rank=rank, port=port, end=end)
        for rank, file in enumerate(files)
    ]
    try:
        ranks[0].join(60)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    told = files[0].read_text("utf-8")
    assert told.startswith("rank 0, step 4, samples a:\n  another process did not answer: ")
    assert "raise ddp_timeout (seconds), or lower dataloader_num_workers" in told


def text_to(path: Path):
    with Path("/dev/full").open("w") as file:
        file.write("a")


def state_to(path: Path):
    torch.save(torch.zeros(2**20), "/dev/full")


def small_state_to(path: Path):
    torch.save(torch.zeros(3), "/dev/full")


def weights_to(path: Path):
    save_file({"a": torch.zeros(2)}, path / "absent" / "a.safetensors")


# What is written to /dev/full finds a full disk.
@pytest.mark.parametrize(
    ("write", "kind", "reason"),
    [
        (text_to, OSError, "the disk is full"),
        (state_to, RuntimeError, "unexpected pos"),
        (small_state_to, RuntimeError, "iostream error"),
        (weights_to, SafetensorError, "No such file or directory"),
    ],
)
def test_a_failed_save_names_the_folder_and_removes_what_it_began(write, kind, reason, tmp_path):
    aside = tmp_path / ".partial"
    aside.mkdir()
    (aside / "half").touch()
    with pytest.raises(TrainingError) as error, unwritable(aside, "checkpoint"):
        write(aside)
    assert isinstance(error.value.__cause__, kind)
    assert error.value.where == f"rank 0, checkpoint in {tmp_path}"
    assert "cannot be written: " in error.value.what and reason in error.value.what
    assert "GiB were free); what was complete before is untouched" in error.value.what
    assert "free space or lower save_total_limit" in error.value.fix
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("writev [127.0.0.1]:1234: Connection reset by peer"),
        torch.distributed.DistBackendError("NCCL error: remote process exited"),
    ],
)
def test_other_errors_while_saving_are_left_as_they_are(error, tmp_path):
    aside = tmp_path / ".partial"
    aside.mkdir()
    with pytest.raises(type(error)) as found, unwritable(aside, "checkpoint"):
        raise error
    assert found.value is error
    assert aside.exists()


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(8):
        Image.new("RGB", (64, 64), (30 * i,) * 3).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


@pytest.fixture
def data(tmp_path, pictures) -> Path:
    turns = [{"from": "human", "value": "<image>\nHow bright?"}, {"from": "gpt", "value": "Very."}]
    records = [{"id": p.stem, "image": str(p), "conversations": turns} for p in pictures]
    file = tmp_path / "train.json"
    file.write_text(json.dumps(records), "utf-8")
    return file


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_breaks_during_the_run_is_told_with_step_and_sample(
    workers, data, pictures, tiny_ovis, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    whole = {
        "model_path": tiny_ovis,
        "data_path": data,
        "eval_data_path": "[]",
        "output_dir": tmp_path / "out",
        "per_device_train_batch_size": 2,
        "dataloader_num_workers": workers,
        "dataloader_shuffle": "false",
        "max_steps": 4,
        "report_to": "none",
        "use_cpu": "true",
        "logging_steps": 1,
    }
    flags = [word for key, value in whole.items() for word in (f"--{key}", str(value))]
    load, whole_file = Image.Image.load, pictures[5].read_bytes()

    def broken_after_the_check(image, *args):
        if getattr(image, "filename", None) == str(pictures[0]):
            pictures[5].write_bytes(whole_file[:70])
        return load(image, *args)

    # The check decodes no PNG: the first picture is loaded by the first batch.
    monkeypatch.setattr(Image.Image, "load", broken_after_the_check)
    assert main(["train", "configs/presets/quickstart.json", *flags]) == 1
    told = capsys.readouterr().err
    assert f"DataError: rank 0, step 3: {data}, record 6" in told
    assert '(id "5")' in told and str(pictures[5]) in told
    assert "Traceback" not in told
    steps = (tmp_path / "out" / "log.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in steps] == [1, 2]


@pytest.mark.slow
def test_a_rank_that_no_longer_answers_is_told_with_step_and_batch(ranks, tiny_ovis, tmp_path):
    folder = tmp_path / "out"
    keys = {
        "model_path": tiny_ovis,
        "eval_data_path": "[]",
        "output_dir": folder,
        "per_device_train_batch_size": 2,
        "max_steps": 100000,
        "ddp_timeout": 6,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": "true",
        "use_cpu": "true",
    }
    flags = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    run = ranks(["train", "configs/presets/quickstart.json", *flags], folder, 2)
    try:
        run.wait_for(lambda: run.logged() >= 3)
        run.signal(signal.SIGSTOP, ranks=[1])
        run.processes[0].join(60)
    finally:
        for process in run.processes:
            process.kill()
    assert run.codes() == [1, -signal.SIGKILL]
    told = run.told.read_text("utf-8").partition("TrainingError: ")[2]
    where, what, fix = (line.strip() for line in told.splitlines()[:3])
    step = len((folder / "log.jsonl").read_text("utf-8").splitlines()) + 1
    samples = r"samples [a-z]+-\d{4}, [a-z]+-\d{4} \(2 x \d+ tokens, [\d,]+ pixels\):"
    assert re.fullmatch(f"rank 0, step {step}, {samples}", where)
    assert what.startswith("another process did not answer: ")
    assert "raise ddp_timeout (seconds), or lower dataloader_num_workers" in fix
