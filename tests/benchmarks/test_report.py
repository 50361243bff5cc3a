"""The table, the plots and the page of benchmarks/run_all.py from given results."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BROKEN = "raise SystemExit('it broke')"
WORKS = "import json; print('noise'); print(json.dumps({'machine': '2 CPU cores', 'answer': 42}))"
LOSS_HEAD = {
    "date": "2026-11-21",
    "machine": "2 CPU cores",
    "versions": {"torch": "2.13.0"},
    "peak": {
        name: {"peak_gib": total, "above_gradients_gib": rest}
        for name, total, rest in (
            ("full", 7.0, 7.0),
            ("gathered", 1.25, 0.36),
            ("trl", 1.5, 0.6),
            ("ours", 1.2, 0.3),
            ("trl_frozen", 0.6, 0.6),
            ("ours_frozen", 0.3, 0.3),
        )
    },
    "peak_over_full": {"peak": 0.171, "above_gradients": 0.043},
    "peak_over_trl": {"peak": 0.8, "above_gradients": 0.5},
    "frozen_peak_over_trl": {"peak": 0.5, "above_gradients": 0.45},
    "time_over_trl": 0.41,
    "time_over_full": 1.0,
}
VISUAL_HEAD = {
    "above_gradients_over_plain": 0.12,
    "full_width_over_plain": 0.68,
    "time_over_plain": 1.3,
}
GPU_SUITE = {
    "date": "2026-11-21",
    "machine": {"gpu": "H200", "driver": "1", "python": "3.11", "versions": {"torch": "2.11"}},
    "parts": {
        "packed_2b": {"data_wait_share": 0.0125},
        "lora_9b": {"failed": "out of memory"},
    },
    "compared": {"mfu_packed_2b": 0.5512, "packed_2b_over_trl_tuned_2b": 2.5},
}


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("report")


@pytest.fixture
def run_all(report, monkeypatch, tmp_path):
    """The suite with scripts and results of its own, `command(*words)`."""
    module = importlib.import_module("run_all")
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    for owner in (module, report):
        monkeypatch.setattr(owner, "ROOT", tmp_path)
        monkeypatch.setattr(owner, "RESULTS", tmp_path / "benchmarks/results")

    def command(scripts: dict[str, str], *words: str) -> None:
        for name, code in scripts.items():
            (tmp_path / f"benchmarks/{name}.py").write_text(code, "utf-8")
        monkeypatch.setattr(module, "SCRIPTS", tuple(scripts))
        monkeypatch.setattr(sys, "argv", ["run_all.py", "--only", ",".join(scripts), *words])
        module.main()

    return command


def test_every_number_stands_beside_its_goal_as_met_or_missed(report):
    rows = [
        (line.what, line.goal, line.ours, report.verdict(line))
        for line in report.table({"loss_head": LOSS_HEAD})
        if line.row == "6"
    ]
    assert rows == [
        (
            "loss head: peak over full logits, the gradients that remain left out",
            "≤ 0.1",
            "0.043",
            "met",
        ),
        ("loss head: peak over full logits, with them", "≤ 0.1", "0.171", "missed"),
        (
            "loss head: peak over TRL's kernel, the gradients that remain left out",
            "≤ 0.6",
            "0.5",
            "met",
        ),
        ("loss head: peak over TRL's kernel, with them", "≤ 0.6", "0.8", "missed"),
        (
            "loss head: peak over TRL's kernel, frozen head, the gradients that remain left out",
            "≤ 0.6",
            "0.45",
            "met",
        ),
        ("loss head: peak over TRL's kernel, frozen head, with them", "≤ 0.6", "0.5", "met"),
        ("loss head: time over TRL's kernel", "≤ 1", "0.41", "met"),
        ("loss head: time over full logits", "≤ 1", "1", "met"),
    ]


def test_the_visual_head_misses_its_goal_with_the_gradients_that_remain(report):
    rows = [
        (line.what, line.ours, report.verdict(line))
        for line in report.table({"visual_head": VISUAL_HEAD})
        if line.row == "7"
    ]
    over = "visual head: peak over the plain formula"
    assert rows == [
        (f"{over}, the gradients that remain left out", "0.12", "met"),
        (f"{over}, with them, at full width", "0.68", "missed"),
        ("visual head: time over the plain formula", "1.3", ""),
    ]


def test_without_results_every_row_says_so(report):
    lines = report.table({})
    assert [line.row for line in lines] == [str(n) for n in (*range(1, 12), 13)]
    assert {line.ours for line in lines if line.row in ("8", "9")} == {"no GPU result yet"}
    assert {line.ours for line in lines if line.row not in ("8", "9")} == {"no result yet"}
    assert all(line.met is None for line in lines)


def test_a_gpu_part_that_failed_gives_its_reason(report):
    lines = {
        (line.row, line.what): (line.ours, line.met)
        for line in report.table({"gpu_suite": GPU_SUITE})
        if line.script == "gpu_suite"
    }
    assert lines == {
        ("4", "ours packed over TRL tuned, 2B on the GPU"): ("2.5x", None),
        ("8", "MFU, 2B, full, H200"): ("55.1%", True),
        ("8", "MFU, 9B, LoRA, H200"): ("out of memory", None),
        ("9", "data wait, 2B, full"): ("1.25%", False),
        ("9", "data wait, 9B, LoRA"): ("out of memory", None),
    }


def test_the_stored_results_all_fit_the_table_and_the_plots(report, tmp_path):
    results = report.read_results()
    assert results
    report.write_report(results, tmp_path)
    page = (tmp_path / "benchmarks.md").read_text("utf-8")
    assert report.markdown_table(results) in page
    shown = {plot.name for plot in report.PLOTS if plot.script in results}
    assert {file.stem for file in (tmp_path / "benchmarks").glob("*.svg")} == shown
    assert all(f"](benchmarks/{name}.svg)" in page for name in shown)


def test_the_page_in_docs_is_the_one_of_the_stored_results(report, tmp_path):
    report.write_report(report.read_results(), tmp_path)
    written = (tmp_path / "benchmarks.md").read_text("utf-8")
    assert (ROOT / "docs/benchmarks.md").read_text("utf-8") == written


def test_a_plot_is_the_same_file_each_time(report, tmp_path):
    plot = next(plot for plot in report.PLOTS if plot.name == "loss_head")
    for name in ("one", "two"):
        report.draw(plot, LOSS_HEAD, tmp_path / f"{name}.svg")
    one, two = ((tmp_path / f"{name}.svg").read_bytes() for name in ("one", "two"))
    assert one == two
    assert b"ours, frozen" in one
    assert b"<dc:date>" not in one


def test_a_broken_script_fails_the_command_after_the_others_ran(run_all, tmp_path, capsys):
    kept = {"date": "2026-01-01", "machine": "m"}
    results = tmp_path / "benchmarks/results"
    (results / "broken.json").write_text(json.dumps(kept), "utf-8")
    with pytest.raises(SystemExit, match="failed: broken"):
        run_all({"broken": BROKEN, "works": WORKS})
    assert "it broke" in capsys.readouterr().err
    assert json.loads((results / "broken.json").read_text()) == kept
    works = json.loads((results / "works.json").read_text())
    assert works["answer"] == 42
    assert works["machine"].endswith(", 2 CPU cores") and works["date"] > "2026-01-01"
    assert "| `works` |" in (tmp_path / "docs/benchmarks.md").read_text("utf-8")


def test_the_table_alone_runs_nothing(run_all, tmp_path):
    run_all({"broken": BROKEN}, "--table")
    assert (tmp_path / "docs/benchmarks.md").exists()
    assert not list((tmp_path / "benchmarks/results").iterdir())
