"""What a merge that cannot be done says, and that nothing is left under the output's name."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmtune.cli.main import main
from vlmtune.core.errors import ModelError
from vlmtune.lora.merge import merge

INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00005.safetensors"


@pytest.fixture
def model(base, tmp_path) -> Path:
    """A copy that may be broken."""
    return shutil.copytree(base("bfloat16"), tmp_path / "model")


@pytest.fixture
def trained(base, adapter, tmp_path) -> Path:
    """A copy that may be broken."""
    return shutil.copytree(adapter(base("bfloat16")), tmp_path / "trained")


@pytest.fixture
def refused(model, trained, tmp_path, capsys):
    """Runs the command, expects exit code 1 and no output, and returns what it said."""

    def run(*words: str, base: Path | None = None) -> str:
        before = sorted(tmp_path.iterdir())
        flags = ["--adapter", str(trained), "--base", str(base or model), *words]
        assert main(["merge", *flags, "--output", str(tmp_path / "merged")]) == 1
        assert sorted(tmp_path.iterdir()) == before
        told = capsys.readouterr().err.splitlines()
        where = next(i for i, line in enumerate(told) if line.startswith("ModelError: "))
        return "\n".join(told[where:])

    return run


def cut(file: Path, size: int) -> None:
    os.truncate(file, size)


def edit(file: Path, **changes) -> None:
    settings = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**settings, **changes}), "utf-8")


def test_a_base_without_one_of_its_files(model, refused):
    (model / SECOND).unlink()
    assert refused() == (
        f"ModelError: model {model}:\n"
        f"  lacks {SECOND}, one of the 5 files of its weights.\n"
        "  Fix: download or copy that file, or save the model again."
    )


def test_a_base_whose_file_was_cut_short(model, refused):
    size = (model / SECOND).stat().st_size
    cut(model / SECOND, size - 2)
    assert refused() == (
        f"ModelError: {model / SECOND}:\n"
        f"  is cut short: it has {size - 2:,} of {size:,} bytes.\n"
        "  Fix: download or save it again."
    )


def test_an_adapter_whose_weights_were_cut_short(trained, refused):
    cut(trained / "adapter_model.safetensors", 1000)
    assert "adapter_model.safetensors:\n  is cut short or no safetensors file" in refused()


def test_an_adapter_without_config(trained, refused):
    (trained / "adapter_config.json").unlink()
    assert refused() == (
        f"ModelError: adapter {trained}:\n"
        "  has no adapter_config.json.\n"
        "  Fix: name the folder that PEFT's save_pretrained wrote."
    )


def test_an_adapter_of_another_rank_than_its_config_says(trained, refused):
    edit(trained / "adapter_config.json", r=8)
    assert "lora_A.weight has rank 4, but adapter_config.json says 8" in refused()


def test_an_adapter_of_a_base_with_other_shapes(refused, checkpoint):
    assert "which needs [4, " in refused(base=checkpoint("full_single_untied"))


def test_an_adapter_of_a_base_with_other_modules(model, trained, refused):
    edit(model / "config.json", vit_config={**vit(model), "num_hidden_layers": 1})
    told = refused()
    assert "  changes visual_tokenizer.vit.vision_model.encoder.layers.1." in told
    assert f", which {model} does not have." in told
    fix = "give the model it was trained on, as its config says "
    assert f"  Fix: {fix}" in told


def vit(model: Path) -> dict:
    return json.loads((model / "config.json").read_text("utf-8"))["vit_config"]


def test_an_adapter_of_other_weights_of_the_same_shapes(trained, refused):
    (trained / "vlmtune_run.json").write_text('{"base": {"fingerprint": "sha256:00"}}', "utf-8")
    told = refused()
    assert "was trained on other weights than those of" in told
    assert 'remove "base" from its vlmtune_run.json' in told


def test_an_adapter_that_does_not_name_its_base(trained, tmp_path):
    edit(trained / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ModelError, match="does not name its base") as caught:
        merge(None, [(str(trained), 1.0)], tmp_path / "merged")
    assert caught.value.fix == "give the model it was trained on as --base"


def test_an_adapter_whose_base_is_gone(trained, tmp_path):
    edit(trained / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(ModelError, match=r"gone is no folder") as caught:
        merge(None, [(str(trained), 1.0)], tmp_path / "merged")
    assert caught.value.where == f"adapter {trained}, base {tmp_path / 'gone'}"
    assert caught.value.fix == "give the model it was trained on as --base"


@pytest.mark.parametrize("output", ["model", "model/merged", "trained", "trained/a/b", "."])
def test_an_output_that_shares_files_with_a_source(model, trained, tmp_path, output):
    before = sorted(tmp_path.rglob("*"))
    for overwrite in (False, True):
        with pytest.raises(ModelError, match="are one folder, or one is inside the other"):
            merge(str(model), [(str(trained), 1.0)], tmp_path / output, overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_with_other_files_is_not_overwritten(model, trained, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/thesis.txt").write_text("years", "utf-8")
    with pytest.raises(ModelError, match="holds other files and no model"):
        merge(str(model), [(str(trained), 1.0)], tmp_path / "merged", overwrite=True)
    assert (tmp_path / "merged/thesis.txt").read_text("utf-8") == "years"


def test_a_value_that_is_not_finite_is_named_and_an_earlier_output_stays(model, trained, tmp_path):
    merge(str(model), [(str(trained), 1.0)], tmp_path / "merged")
    before = {f.name: f.read_bytes() for f in (tmp_path / "merged").iterdir()}
    file = trained / "adapter_model.safetensors"
    values = load_file(file)
    name = "base_model.model.llm.model.layers.1.mlp.up_proj.lora_B.weight"
    values[name][3, 0] = torch.inf
    save_file(values, file)
    with pytest.raises(ModelError, match=r"tensor llm\.model\.layers\.1\.mlp\.up_proj\.weight"):
        merge(str(model), [(str(trained), 1.0)], tmp_path / "merged", overwrite=True)
    assert {f.name: f.read_bytes() for f in (tmp_path / "merged").iterdir()} == before
    assert {f.name for f in tmp_path.iterdir()} == {"model", "trained", "merged"}


def test_overwriting_replaces_the_whole_folder(model, trained, tmp_path):
    merge(str(model), [(str(trained), 0.5)], tmp_path / "merged")
    (tmp_path / "merged/old.txt").write_text("", "utf-8")
    half = load_file(tmp_path / "merged" / SECOND)
    with pytest.raises(ModelError, match="already holds a model"):
        merge(str(model), [(str(trained), 1.0)], tmp_path / "merged")
    merge(str(model), [(str(trained), 1.0)], tmp_path / "merged", overwrite=True)
    whole = load_file(tmp_path / "merged" / SECOND)
    assert any(not torch.equal(half[name], whole[name]) for name in half)
    assert not (tmp_path / "merged/old.txt").exists()
    assert {f.name for f in tmp_path.iterdir()} == {"model", "trained", "merged"}


def test_an_output_that_is_a_link_fills_the_folder_it_points_to(model, trained, tmp_path):
    disk, link = tmp_path / "disk", tmp_path / "link"
    disk.mkdir()
    link.symlink_to(disk)
    for weight, overwrite in ((0.5, False), (1.0, True), (1.0, True)):
        merge(str(model), [(str(trained), weight)], link, overwrite=overwrite)
        origin = json.loads((disk / "vlmtune_merge.json").read_text("utf-8"))
        assert origin["adapters"][0]["weight"] == weight
        assert link.is_symlink() and (disk / SECOND).is_file()
        assert {f.name for f in tmp_path.iterdir()} == {"model", "trained", "disk", "link"}


def test_a_file_of_the_base_that_cannot_be_read(model, trained, refused):
    (model / "vocab.json").unlink(missing_ok=True)
    (model / "vocab.json").symlink_to("gone")
    assert refused() == (
        f"ModelError: base {model}:\n"
        "  vocab.json cannot be read: No such file or directory.\n"
        "  Fix: download or copy the model again."
    )


@pytest.mark.parametrize("head", [b"license: [apache\n a: b: c", b"license: \xff"])
def test_a_card_of_the_base_that_cannot_be_read_is_noted(model, trained, tmp_path, capsys, head):
    (model / "README.md").write_bytes(b"---\n" + head + b"\n---\n")
    merge(str(model), [(str(trained), 1.0)], tmp_path / "merged")
    noted = f"{model}/README.md cannot be read, so the model card names no licence"
    assert noted in capsys.readouterr().err
    card = (tmp_path / "merged/README.md").read_text("utf-8")
    assert "# merged\n" in card and "license" not in card


def test_an_index_that_nothing_reads_beside_one_whole_file_is_not_copied(model, trained, tmp_path):
    tensors = {n: t for f in model.glob("*.safetensors") for n, t in load_file(f).items()}
    for file in model.glob("*.safetensors"):
        file.unlink()
    save_file(tensors, model / "model.safetensors")
    merge(str(model), [(str(trained), 1.0)], tmp_path / "merged")
    assert (model / INDEX).exists() and not (tmp_path / "merged" / INDEX).exists()
    assert load_file(tmp_path / "merged/model.safetensors").keys() == tensors.keys()


def test_a_check_that_fails_leaves_no_output(model, trained, tmp_path):
    seen = []

    def check(base: str, folder: Path) -> None:
        seen.append((base, (folder / "config.json").exists(), (folder / SECOND).exists()))
        raise ModelError("merged", "is wrong", "look")

    with pytest.raises(ModelError, match="is wrong"):
        merge(str(model), [(str(trained), 1.0)], tmp_path / "merged", check=check)
    assert seen == [(str(model), True, True)]
    assert {f.name for f in tmp_path.iterdir()} == {"model", "trained"}


COMMAND = "from vlmtune.cli.main import main; sys.exit(main(['merge', *sys.argv[1:]]))"


def start(model: Path, trained: Path, output: Path, before: str = "") -> subprocess.Popen:
    flags = ["--adapter", trained, "--base", model, "--output", output]
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys\n{before}\n{COMMAND}", *flags],
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_file_that_cannot_grow_further_is_a_full_disk(model, trained, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300000, 300000))"
    run = start(model, trained, tmp_path / "merged", limit)
    told = run.communicate(timeout=120)[1]
    assert run.returncode == 1, told
    assert f"output {tmp_path / 'merged'}:\n  cannot be written: the disk is full (" in told
    assert {f.name for f in tmp_path.iterdir()} == {"model", "trained"}


def test_a_disk_without_room_for_the_output(model, trained, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk]).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        with pytest.raises(ModelError, match="the disk is full") as caught:
            merge(str(model), [(str(trained), 1.0)], disk / "merged")
        assert "0.00 GiB are free" in caught.value.what
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


# Stops the writing for good after the first file, where the test can kill the process.
STALL = """
import time
from vlmtune.lora.merged_weights import WeightWriter
write, files = WeightWriter.write, []
def stalling(self, shard, *rest):
    if files:
        time.sleep(600)
    files.append(shard)
    write(self, shard, *rest)
WeightWriter.write = stalling
"""


@pytest.mark.slow
def test_a_merge_killed_halfway_leaves_nothing_and_the_next_one_cleans_up(model, trained, tmp_path):
    output, partial = tmp_path / "merged", tmp_path / ".merged.partial"
    run = start(model, trained, output, STALL)
    deadline = time.monotonic() + 120
    while not (partial / "model-00001-of-00005.safetensors").exists():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert not output.exists() and partial.exists()
    merge(str(model), [(str(trained), 1.0)], output)
    assert {f.name for f in tmp_path.iterdir()} == {"model", "trained", "merged"}
    assert load_file(output / SECOND).keys() == load_file(model / SECOND).keys()


def test_an_earlier_output_of_a_merge_killed_between_two_names_comes_back(model, trained, tmp_path):
    output = tmp_path / "merged"
    shutil.copytree(model, tmp_path / ".merged.replaced")
    (tmp_path / ".merged.partial").mkdir()
    with pytest.raises(ModelError, match="already holds a model"):
        merge(str(model), [(str(trained), 1.0)], output)
    assert (output / SECOND).read_bytes() == (model / SECOND).read_bytes()
    merge(str(model), [(str(trained), 1.0)], output, overwrite=True)
    assert {f.name for f in tmp_path.iterdir()} == {"model", "trained", "merged"}
    assert (output / SECOND).read_bytes() != (model / SECOND).read_bytes()
