"""Stored results as a table of the numbers to reach, plots, and docs/benchmarks.md."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plots import PLOTS, draw

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
NO_RESULT, NO_GPU = "no result yet", "no GPU result yet"
Result = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One number of the table; `met` is None where there is no result or no goal."""

    row: str
    what: str
    goal: str
    ours: str
    met: bool | None
    script: str


def read_results() -> dict[str, Result]:
    """Script -> its stored result."""
    return {
        file.stem: json.loads(file.read_text("utf-8")) for file in sorted(RESULTS.glob("*.json"))
    }


def at_least(value: float, goal: float, unit: str = "x") -> tuple[str, bool]:
    return f"{value:g}{unit}", value >= goal


def at_most(value: float, goal: float, unit: str = "") -> tuple[str, bool]:
    return f"{value:.3g}{unit}", value <= goal


def collation(r: Result) -> list[Line]:
    found, cases = [], r["cases"]
    for photos in ("photos", "aligned"):
        case = cases[f"qwen2_5_vl {photos} messages"]
        masked = cases[f"qwen2_5_vl {photos} assistant_only"]
        name = {"photos": "photos", "aligned": "photos that need no resize"}[photos]
        for how, key, measured, goal in (
            ("with decode", "with_decode", case, 5),
            ("without decode", "without_decode", case, 9),
            ("with decode, against `assistant_only_loss`", "with_decode", masked, 20),
        ):
            what = f"collation, {name}, {how}: TRL's time over ours"
            value = at_least(measured[key]["ratio"], goal)
            found.append(Line("1", what, f"≥ {goal}x", *value, "collation"))
    for family, goal in (("qwen2_5_vl", 1 / 8), ("ovis2_5", 1 / 4)):
        ratio = cases[f"{family} photos messages"]["bytes_ratio"]
        what = f"pixel bytes to the device, {family}: ours over TRL's"
        value = at_most(ratio, goal)
        found.append(Line("2", what, f"≤ 1/{round(1 / goal)}", *value, "collation"))
    return found


def packing(r: Result) -> list[Line]:
    waste, seconds = r["waste"], r["plan_seconds"]["8k"]["median"]
    name = "packing"
    found = [
        Line(
            "3",
            f"padding waste in rows of {n}",
            f"≤ {goal:.1%}",
            f"{waste[f'packed_{n}']:.2%}",
            waste[f"packed_{n}"] <= goal,
            name,
        )
        for n, goal in (("8k", 0.005), ("4k", 0.01))
    ]
    what = f"plan of {r['samples']:,} samples"
    found.append(Line("3", what, "≤ 3 s", *at_most(seconds, 3, " s"), name))
    for data, worlds in r["imbalance"].items():
        most = max(world["all_steps"] for world in worlds.values())
        worst = max(world["worst"] for world in worlds.values())
        what = f"rank balance, {', '.join(worlds)} GPUs, {data}: largest over mean cost, all steps"
        told = f"{most:.4f} (worst step {worst:.3f})"
        found.append(Line("13", what, "≤ 1.05", told, most <= 1.05, name))
    return found


def packed_training(r: Result) -> list[Line]:
    name, differences = "packed_training", dict(r["isolation"])
    # What the comparison shows where the bounds of samples are taken away.
    differences.pop("without_bounds", None)
    isolation = max(differences.values())
    what = "packed over TRL's padded batches of 8: real tokens/s, small model"
    return [
        Line("4", what, "≥ 1.7x", *at_least(r["ratio"], 1.7), name),
        Line(
            "4",
            "packed against padded: loss of each sample",
            "≤ 1e-5",
            *at_most(r["loss_difference"], 1e-5),
            name,
        ),
        Line("5", "isolation, text and vision", "≤ 1e-6", *at_most(isolation, 1e-6), name),
    ]


def loss_head(r: Result) -> list[Line]:
    name, trl, full = "loss_head", r["peak_over_trl"], r["peak_over_full"]
    frozen = r["frozen_peak_over_trl"]
    lines = [
        ("peak over full logits, the gradients that remain left out", full["above_gradients"], 0.1),
        ("peak over full logits, with them", full["peak"], 0.1),
        ("peak over TRL's kernel, the gradients that remain left out", trl["above_gradients"], 0.6),
        ("peak over TRL's kernel, with them", trl["peak"], 0.6),
        (
            "peak over TRL's kernel, frozen head, the gradients that remain left out",
            frozen["above_gradients"],
            0.6,
        ),
        ("peak over TRL's kernel, frozen head, with them", frozen["peak"], 0.6),
        ("time over TRL's kernel", r["time_over_trl"], 1.0),
        ("time over full logits", r["time_over_full"], 1.0),
    ]
    return [
        Line("6", f"loss head: {what}", f"≤ {goal:g}", *at_most(value, goal), name)
        for what, value, goal in lines
    ]


def visual_head(r: Result) -> list[Line]:
    name, time = "visual_head", f"{r['time_over_plain']:g}"
    lines = [
        ("the gradients that remain left out", r["above_gradients_over_plain"]),
        ("with them, at full width", r["full_width_over_plain"]),
    ]
    return [
        *(
            Line(
                "7",
                f"visual head: peak over the plain formula, {what}",
                "≤ 1/3",
                *at_most(value, 1 / 3),
                name,
            )
            for what, value in lines
        ),
        Line("7", "visual head: time over the plain formula", "", time, None, name),
    ]


def gpu_suite(r: Result) -> list[Line]:
    name, parts, found = "gpu_suite", r["parts"], r.get("compared", {})
    lines = []
    for part, what in (("packed_2b", "2B, full"), ("lora_9b", "9B, LoRA")):
        told = parts.get(part, {}).get("failed", NO_GPU)
        share = found.get(f"mfu_{part}")
        value = (told, None) if share is None else (f"{share:.1%}", share >= 0.55)
        lines.append(Line("8", f"MFU, {what}, {r['machine'].get('gpu')}", "≥ 55 %", *value, name))
        wait = parts.get(part, {}).get("data_wait_share")
        value = (told, None) if wait is None else (f"{wait:.2%}", wait <= 0.01)
        lines.append(Line("9", f"data wait, {what}", "≤ 1 %", *value, name))
    for key, what, goal in (
        ("packed_2b_over_padded_2b", "packed over batches of 8, 2B on the GPU: real tokens/s", 1.7),
        ("packed_2b_over_trl_tuned_2b", "ours packed over TRL tuned, 2B on the GPU", None),
        ("packed_2b_over_trl_default_2b", "ours packed over TRL's defaults, 2B on the GPU", None),
    ):
        if key in found:
            met = None if goal is None else found[key] >= goal
            goal_text = "" if goal is None else f"≥ {goal}x"
            lines.append(Line("4", what, goal_text, f"{found[key]:g}x", met, name))
    return lines


def merge_memory(r: Result) -> list[Line]:
    what = "merge: peak memory over the largest weight file, PEFT's bits"
    value = at_most(r["ours"]["peak_over_largest_file"], 1.1)
    return [Line("10", what, "≤ 1.1", *value, "merge_memory")]


def start(r: Result) -> list[Line]:
    name, first = "start", r["first_step"]
    lines = [
        Line("11", what, "≤ 0.3 s", *at_most(r[key]["cpu"]["median"], 0.3, " s"), name)
        for what, key in (("`--help`", "help"), ("an error in the config", "config_error"))
    ]
    for kind, key in (("CPU time", "cpu_ratio"), ("time by the clock", "wall_ratio")):
        what = f"launch to first step over a bare TRL script, {kind}"
        lines.append(Line("11", what, "≤ 1.1", *at_most(first[key], 1.1), name))
    return lines


TABLE: dict[str, tuple[Callable[[Result], list[Line]], tuple[tuple[str, str, str], ...]]] = {
    "collation": (
        collation,
        (("1", "collation: TRL's time over ours", "≥ 5x, 9x, 20x"), ("2", "pixel bytes", "≤ 1/8")),
    ),
    "packing": (packing, (("3", "padding waste, plan", "≤ 0.5 %"), ("13", "balance", "≤ 1.05"))),
    "packed_training": (
        packed_training,
        (("4", "packed over padded", "≥ 1.7x"), ("5", "isolation", "≤ 1e-6")),
    ),
    "loss_head": (loss_head, (("6", "loss head: peak", "≤ 1/10 of full, ≤ 0.6 of TRL's"),)),
    "visual_head": (visual_head, (("7", "visual head: peak over the plain formula", "≤ 1/3"),)),
    "gpu_suite": (gpu_suite, (("8", "MFU", "≥ 55 %"), ("9", "data wait", "≤ 1 %"))),
    "merge_memory": (merge_memory, (("10", "merge: peak memory over the largest file", "≤ 1.1"),)),
    "start": (start, (("11", "start", "≤ 0.3 s"),)),
}
"""Script -> its lines, and what stands in their place while it has no result."""


def table(results: Mapping[str, Result]) -> list[Line]:
    lines = []
    for script, (lines_of, missing) in TABLE.items():
        if script in results:
            lines += lines_of(results[script])
        else:
            told = NO_GPU if script == "gpu_suite" else NO_RESULT
            lines += [Line(*what, told, None, script) for what in missing]
    return sorted(lines, key=lambda line: int(line.row))


def verdict(line: Line) -> str:
    return {True: "met", False: "missed", None: ""}[line.met]


def text_table(results: Mapping[str, Result]) -> str:
    rows = [(x.row, x.what, x.goal, x.ours, verdict(x)) for x in table(results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = (map(str.ljust, row, widths) for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def markdown_table(results: Mapping[str, Result]) -> str:
    rows = [("#", "what", "goal", "ours", "", "script"), ("---",) * 6]
    rows += [(x.row, x.what, x.goal, x.ours, verdict(x), x.script) for x in table(results)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_report(results: Mapping[str, Result], docs: Path) -> None:
    """docs/benchmarks.md whole, and its plots."""
    pictures = []
    for plot in PLOTS:
        if plot.script in results:
            draw(plot, results[plot.script], docs / f"benchmarks/{plot.name}.svg")
            pictures.append(f"![{plot.title}](benchmarks/{plot.name}.svg)")
    page = PAGE.format(
        table=markdown_table(results),
        plots="\n\n".join(pictures),
        also=also(results),
        measured=measured(results),
    )
    (docs / "benchmarks.md").write_text(page, "utf-8")


def also(results: Mapping[str, Result]) -> str:
    """Numbers without a goal, and what explains one."""
    found = []
    if r := results.get("lengths"):
        one, two = (r["seconds_per_100k"][f"{n}_cores"]["wall"]["median"] for n in (1, 2))
        decoding = r["decode_seconds_per_100k"]["median"]
        found.append(
            f"- Exact lengths and tokens of 100,000 samples with a photo each: {one:g} s on one "
            f"core, {two:g} s on two; decoding the photos alone: {decoding:g} s (`lengths`)."
        )
    if r := results.get("loss_head"):
        peak = r["peak"]["ours"]
        stays = peak["peak_gib"] - peak["above_gradients_gib"]
        found.append(
            f"- Of our loss head's peak of {peak['peak_gib']:.2f} GiB, {stays:.2f} are gradients, "
            "nearly all of its weight's, which every variant that trains the head keeps "
            "(`loss_head`)."
        )
        seconds = {name: spent["median"] for name, spent in r["cpu_seconds"].items()}
        plain = seconds["gathered"] / seconds["ours"]
        found.append(
            f"- Its time is that of {r['timed_tokens']} tokens and {r['timed_words']:,} words. "
            f"Plain logits of the supervised rows alone take {plain:.2f} of it, and "
            f"{r['peak']['gathered']['peak_gib']:.2f} GiB (`loss_head`)."
        )
    if r := results.get("visual_head"):
        found.append(
            "- The visual head's peak with gradients at full width is calculated from the one at "
            f"1/{r['peak_widths_divided_by']} of the width: at its peak ours has the float32 "
            "gradients of head and table, the plain formula that of the table (`visual_head`)."
        )
    if r := results.get("data_memory"):
        found.append(
            f"- A process that reads {r['records']:,} text records in random order takes "
            f"{r['read']['above_mb']} MB more than its libraries (`data_memory`)."
        )
    if r := results.get("thinking_budget"):
        times = ", ".join(
            f"{i['closing_ratio']:g}x less time with {size} pixels ({i['ratio']:g}x of the reply)"
            for size, i in r["images"].items()
        )
        found.append(
            "- Ending a thought at its budget on the cache that is there, against encoding image "
            f"and prompt again as the reference does, equal tokens: {times} (`thinking_budget`)."
        )
    if "zero_memory" in results:
        found.append("- Memory per GPU under each file of `configs/zero`: [zero.md](zero.md).")
    return "\n".join(found)


def measured(results: Mapping[str, Result]) -> str:
    """When and where the stored results were measured."""
    rows = ["| result | date | machine | versions |", "| --- | --- | --- | --- |"]
    for name, result in results.items():
        machine, versions = result.get("machine", "arithmetic, no run"), result.get("versions", {})
        if isinstance(machine, dict):
            versions = machine["versions"]
            gpu, driver = machine.get("gpu", "no GPU"), machine.get("driver", "none")
            machine = f"{gpu}, driver {driver}, Python {machine['python']}"
        listed = ", ".join(f"{library} {number}" for library, number in versions.items())
        rows.append(f"| `{name}` | {result['date']} | {machine} | {listed} |")
    return "\n".join(rows)


PAGE = """\
# Benchmarks

<!-- Written by benchmarks/run_all.py from benchmarks/results; edits here are lost. -->

The numbers this package wants to reach, and what was measured. A ratio counts only where both sides
ran in turn in one run and their outputs were compared and equal. The other side is TRL,
transformers or PEFT as their users run them. What each script does is at its top; all of them are
listed in [benchmarks/README.md](../benchmarks/README.md).

{table}

On a CPU the ratios count, not the times; "time" there is process time on one thread. The speed of
whole training runs, MFU and data wait need a GPU. Row 12, resuming, has no benchmark: that resumed
losses are bit-equal and that skipped steps decode nothing is tested (`tests/sft/test_resume.py`).

{plots}

Also measured:

{also}

## How to measure again

    make bench                                  the CPU suite, then this page
    python benchmarks/run_all.py --table        this page from the stored results
    python benchmarks/gpu_suite.py              on one Hopper GPU, at most 8 minutes
    python benchmarks/merge_memory.py > benchmarks/results/merge_memory.json

Other work on the machine makes process time longer, on both sides; run it on an idle one.

## When and where

{measured}
"""
