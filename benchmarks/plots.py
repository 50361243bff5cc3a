"""Stored results as bars, docs/benchmarks/*.svg."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLOURS = ("#4269d0", "#efb118")
Result = dict[str, Any]


@dataclass(frozen=True)
class Plot:
    """Bars: for each label a value of each series."""

    name: str
    script: str
    title: str
    unit: str
    bars: Callable[[Result], dict[str, dict[str, float]]]
    """Series -> label -> value."""


PLOTS = (
    Plot(
        "collation",
        "collation",
        "Collation of a sample, decode included (Qwen2.5-VL, photos)",
        "CPU ms",
        lambda r: {
            side: {
                label: r["cases"][f"qwen2_5_vl photos {mode}"]["with_decode"][f"{key}_ms"]["median"]
                for label, mode in (
                    ("messages", "messages"),
                    ("prompt, completion", "prompt_completion"),
                    ("assistant only", "assistant_only"),
                )
            }
            for side, key in (("TRL", "trl"), ("ours", "ours"))
        },
    ),
    Plot(
        "padding",
        "packing",
        "Padding of 665,000 samples with lengths like LLaVA's",
        "% of all tokens",
        lambda r: {
            "waste": {name.replace("_", " "): 100 * share for name, share in r["waste"].items()}
        },
    ),
    Plot(
        "balance",
        "packing",
        "Cost of the dearest process of a step over the mean, by GPUs",
        "ratio",
        lambda r: {
            name: {world: found[key] for world, found in r["imbalance"]["llava_like"].items()}
            for name, key in (("rows in random order", "shuffled"), ("planned", "all_steps"))
        },
    ),
    Plot(
        "packed_training",
        "packed_training",
        "Training a small model on a CPU",
        "real tokens/s",
        lambda r: {
            "speed": {
                label: r["real_tokens_per_s"][name]["median"]
                for label, name in (("TRL, padded", "trl"), ("ours, packed", "packed"))
            }
        },
    ),
    Plot(
        "loss_head",
        "loss_head",
        "Loss head, 4,096 tokens, 16 % supervised: peak above weights",
        "GiB",
        lambda r: {
            series: {
                name.replace("_", ", "): r["peak"][name][key]
                for name in ("full", "gathered", "trl", "ours", "trl_frozen", "ours_frozen")
            }
            for series, key in (
                ("with the gradients that remain", "peak_gib"),
                ("without", "above_gradients_gib"),
            )
        },
    ),
    Plot(
        "visual_head",
        "visual_head",
        "Visual head, 9,408 patches: peak above weights and their gradients",
        "GiB",
        lambda r: {
            "peak": {name: found["above_gradients_gib"] for name, found in r["peak"].items()}
        },
    ),
)


def draw(plot: Plot, result: Result, file: Path) -> None:
    """The same bytes for the same numbers, with one version of matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    series = plot.bars(result)
    labels = list(next(iter(series.values())))
    height = 0.8 / len(series)
    style = {"svg.hashsalt": "vlmtune", "svg.fonttype": "none", "font.size": 9}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(7, 0.9 + 0.32 * len(labels) * len(series)))
        for i, (name, values) in enumerate(series.items()):
            places = [row + (i - (len(series) - 1) / 2) * height for row in range(len(labels))]
            drawn = axes.barh(places, list(values.values()), height, label=name, color=COLOURS[i])
            axes.bar_label(drawn, [f"{value:,.4g}" for value in values.values()], padding=3)
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel(plot.unit)
        axes.set_title(plot.title, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        if len(series) > 1:
            axes.legend(frameon=False)
        figure.tight_layout()
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, format="svg", metadata={"Date": None})
        pyplot.close(figure)
