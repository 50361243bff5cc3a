"""The loss curve of a run."""

from pathlib import Path
from typing import Any


def draw_losses(history: list[dict[str, Any]], path: Path) -> None:
    """Training and evaluation losses over optimizer steps; nothing where none was logged."""
    from matplotlib.figure import Figure  # half a second that no run waits for at its start

    names = sorted({key for entry in history for key in entry if _is_loss(key)})
    if not names:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in ["loss", *(n for n in names if n != "loss")]:
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        axes.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 30 else None)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per trained token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _is_loss(key: str) -> bool:
    return key == "loss" or (key.startswith("eval_") and key.endswith("_loss"))
