"""`train_modules` on a model: what is trained, at which rate, in which optimizer group."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..configs.schema import ModelConfig
from ..configs.train_modules import TrainModule, parse_train_modules
from ..core.errors import ConfigError
from ..models.parts import FREEZES, paths_under


@dataclass(frozen=True)
class TrainedModule:
    """A requested module with what it trains: parameter name -> parameter, at one rate."""

    name: str
    learning_rate: float
    parameters: dict[str, nn.Parameter]

    @property
    def size(self) -> int:
        # Under ZeRO-3 a parameter itself is empty.
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.parameters.values())


def apply_train_modules(
    model: nn.Module, settings: ModelConfig, learning_rate: float
) -> list[TrainedModule]:
    """Freeze all but the requested modules; a parameter belongs to the most specific name.

    Args:
        model: As loaded; what its family never trains is frozen already and stays so. Short names
            of its parts are in its `module_aliases`, name -> module path.
        learning_rate: Of entries without one of their own.

    Raises:
        ConfigError: a name is unknown or trains nothing, or two overlap with none more specific.
    """
    entries = parse_train_modules(settings.train_modules)
    named = dict(model.named_parameters(remove_duplicate=False))
    trainable = {p: name for name, p in model.named_parameters() if p.requires_grad}
    covered = {e: _under(e.name, model, named) & trainable.keys() for e in entries}
    for entry, parameters in covered.items():
        if not parameters:
            raise _bad(f'"{entry.name}" has no parameter to train', "remove it")
    frozen = _frozen(settings, model, named)
    owner = _owners(covered)
    for parameter in trainable:
        parameter.requires_grad_(parameter in owner and parameter not in frozen)
    modules = []
    for entry in entries:
        own = {
            name: p for p, name in trainable.items() if owner.get(p) is entry and p not in frozen
        }
        if not own:
            reason = "is frozen" if covered[entry] <= frozen else "belongs to more specific names"
            raise _bad(f'every parameter of "{entry.name}" {reason}', "remove it")
        modules.append(TrainedModule(entry.name, entry.learning_rate or learning_rate, own))
    return modules


def parameter_groups(
    modules: Sequence[TrainedModule], decayed: Collection[str], weight_decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups, one or two for each module: `decayed` names its parameters with weight
    decay. The key `module` says whose group it is."""
    groups = []
    for module in modules:
        for decay in (True, False):
            parameters = [p for n, p in module.parameters.items() if (n in decayed) == decay]
            if parameters:
                groups.append(
                    {
                        "params": parameters,
                        "lr": module.learning_rate,
                        "weight_decay": weight_decay if decay else 0.0,
                        "module": module.name,
                    }
                )
    return groups


def module_table(modules: Sequence[TrainedModule]) -> str:
    rows = [("module", "parameters", "learning rate", "dtype")]
    for module in modules:
        kinds = sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters.values()})
        rows.append((module.name, f"{module.size:,}", f"{module.learning_rate:g}", "/".join(kinds)))
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in rows
    )


@dataclass
class GradientNorms:
    """Norm of each module's gradient in one optimizer step, as the optimizer gets it: averaged
    over processes and clipped.

    It is read where the optimizer is stepped, the one place that every engine passes: DDP with
    whole parameters, ZeRO with this rank's flat part of a group, ZeRO-3 in several calls.
    """

    modules: Sequence[TrainedModule]
    _squares: dict[str, torch.Tensor | float] = field(default_factory=dict)
    _elements: dict[str, int] = field(default_factory=dict)

    def read(self, optimizer: Optimizer, *_: Any) -> None:
        """An optimizer's step pre-hook."""
        for group in optimizer.param_groups:
            name = group["module"]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
                    self._squares[name] = self._squares.get(name, 0.0) + norm.square()
                self._elements[name] = self._elements.get(name, 0) + parameter.numel()

    def take(self, device: torch.device) -> dict[str, float] | None:
        """Module -> norm over all processes; None when the optimizer was not stepped."""
        if not self._elements:
            return None
        squares = [float(self._squares.get(m.name, 0.0)) for m in self.modules]
        # Padding of flat parts is far smaller than what other ranks hold.
        split = sum(self._elements.values()) < sum(m.size for m in self.modules)
        self._squares.clear()
        self._elements.clear()
        if split:
            summed = torch.tensor(squares, dtype=torch.float32, device=device)
            torch.distributed.all_reduce(summed)
            squares = summed.tolist()
        return {m.name: s**0.5 for m, s in zip(self.modules, squares, strict=True)}


def base_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer inside the wrappers of accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _under(path: str, model: nn.Module, named: dict[str, nn.Parameter]) -> set[nn.Parameter]:
    below = paths_under(path, model, "train_modules")
    return {p for name, p in named.items() if name in below}


def _frozen(
    settings: ModelConfig, model: nn.Module, named: dict[str, nn.Parameter]
) -> set[nn.Parameter]:
    frozen: set[nn.Parameter] = set()
    for key, path in FREEZES.items():
        if getattr(settings, key):
            frozen |= _under(path, model, named)
    return frozen


def _owners(covered: dict[TrainModule, set[nn.Parameter]]) -> dict[nn.Parameter, TrainModule]:
    for (a, of_a), (b, of_b) in combinations(covered.items(), 2):
        shared = of_a & of_b
        if shared and (of_a == of_b or shared not in (of_a, of_b)):
            raise _bad(
                f'"{a.name}" and "{b.name}" overlap, and neither is part of the other',
                "name each parameter once, or one module inside the other",
            )
    widest_first: Iterable[TrainModule] = sorted(covered, key=lambda e: -len(covered[e]))
    return {parameter: entry for entry in widest_first for parameter in covered[entry]}


def _bad(what: str, fix: str) -> ConfigError:
    return ConfigError("train_modules", what, fix)
