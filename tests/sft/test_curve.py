"""The loss curve as a picture."""

import pytest
from matplotlib.figure import Figure
from PIL import Image

from vlmtune.sft.curve import draw_losses

HISTORY = [
    {"step": 1, "loss": 3.0, "learning_rate": 0.1},
    {"step": 2, "loss": 2.0, "learning_rate": 0.1},
    {"step": 2, "eval_loss": 2.5, "eval_runtime": 1.0},
    {"step": 2, "eval_digits_loss": 2.25},
    {"step": 4, "loss": 1.0, "grad_norm": 1.0},
    {"step": 4, "train_loss": 2.0},
]


@pytest.fixture
def drawn(monkeypatch):
    """Label -> points of each line of the figure that is saved."""
    lines: dict[str, list[tuple[float, float]]] = {}
    save = Figure.savefig

    def saving(figure, *args, **kwargs):
        for line in figure.axes[0].get_lines():
            points = zip(line.get_xdata(), line.get_ydata(), strict=True)
            lines[str(line.get_label())] = [(float(x), float(y)) for x, y in points]
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", saving)
    return lines


def test_training_and_evaluation_losses_are_drawn_over_steps(tmp_path, drawn):
    draw_losses(HISTORY, tmp_path / "loss.png")
    assert drawn == {
        "loss": [(1, 3.0), (2, 2.0), (4, 1.0)],
        "eval_loss": [(2, 2.5)],
        "eval_digits_loss": [(2, 2.25)],
    }
    with Image.open(tmp_path / "loss.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (960, 540))


@pytest.mark.parametrize("history", [[], [{"step": 1, "grad_norm": 1.0}]])
def test_nothing_is_drawn_where_no_loss_was_logged(history, tmp_path):
    draw_losses(history, tmp_path / "loss.png")
    assert list(tmp_path.iterdir()) == []


def test_evaluation_losses_alone_are_drawn(tmp_path, drawn):
    draw_losses([{"step": 0, "eval_loss": 2.5}], tmp_path / "loss.png")
    assert drawn["eval_loss"] == [(0, 2.5)]
