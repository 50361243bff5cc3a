"""What a run writes, watches and listens to while it trains."""

import json
import signal
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..core.distributed import watched_by_torchrun
from ..core.errors import ConfigError
from ..core.logging import say
from .isolation import check_isolation, probe_samples
from .modules import GradientNorms, TrainedModule, base_optimizer, table

LOG_FILE = "log.jsonl"


class JsonLinesLog(TrainerCallback):
    """Appends every logged value to `log.jsonl` in the output folder, one object per line."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ):
        path = self._file(args)
        if not state.is_world_process_zero or not path.exists():
            return
        # What a killed run logged after its last checkpoint is run, and logged, again.
        lines = path.read_text("utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) <= state.global_step > 0]
        path.write_text("".join(kept), "utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **kwargs,
    ):
        if not state.is_world_process_zero:
            return
        path = self._file(args)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")

    @staticmethod
    def _file(args: TrainingArguments) -> Path:
        return Path(args.output_dir or ".") / LOG_FILE


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):  # the kill cut this line
        return float("inf")


class FreshAdam(TrainerCallback):
    """Sets Adam's step count to 0 at the start of a run: DeepSpeed 0.19 makes the states of stage 0
    in half precision by a step without gradients, which would count in the bias correction."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ):
        if state.global_step == 0:
            for values in base_optimizer(kwargs["optimizer"]).state.values():
                if "step" in values:
                    values["step"] = values["step"] * 0


class GradientReport(TrainerCallback):
    """After the first optimizer step with an image (any step, for data without one): the norm of
    each module's gradient, as a table. Without an image in `PATIENCE` steps it gives up.

    Raises:
        ConfigError: a requested module got no gradient, or one that is exactly zero.
    """

    PATIENCE = 100

    def __init__(self, modules: list[TrainedModule], has_images: bool):
        self.norms = GradientNorms(modules)
        self.has_images = has_images
        self.saw_image = not has_images
        self._hook: Any = None
        self._steps = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ):
        optimizer = base_optimizer(kwargs["optimizer"])
        self._hook = optimizer.register_step_pre_hook(self.norms.read)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ):
        if self._hook is None:
            return
        norms = self.norms.take(args.device)
        self._steps += 1
        if norms is None or not _on_any_rank(self.saw_image, args.device):
            if self._steps == self.PATIENCE:
                self._stop_looking()
                say(f"\nNo image in {self._steps} steps: gradients by module were not looked at.")
            return
        self._stop_looking()
        rows = [(name, f"{norm:.3e}") for name, norm in norms.items()]
        say(f"\nGradients of step {state.global_step + 1}, averaged and clipped:")
        say(table([("module", "norm"), *rows]))
        if silent := [name for name, norm in norms.items() if norm == 0.0]:
            kinds = {"lora": "lora_parts", "biases": "lora_bias"}
            key = kinds.get(silent[0].partition(" ")[0], "train_modules")
            raise ConfigError(
                f"{key}, {', '.join(silent)}",
                f"the gradient is exactly zero after step {state.global_step + 1}",
                "remove it, or "
                + (
                    "see whether its output reaches the loss and whether fp16 underflows"
                    if self.has_images
                    else "train on data with images: this data has none"
                ),
            )

    def _stop_looking(self) -> None:
        self._hook.remove()
        self._hook = None


class IsolationProbe(TrainerCallback):
    """Before the first step: raises ModelError for a model that mixes the samples of a row."""

    def __init__(self, trainer: Trainer, images: bool):
        self.trainer, self.images = trainer, images

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ):
        samples = probe_samples(self.trainer.processing_class, self.images)
        check_isolation(kwargs["model"], samples, self.trainer.accelerator.autocast())


class StopOnSignal(TrainerCallback):
    """SIGUSR1 on any process: a checkpoint after the current step, then the end. SIGTERM too,
    except under torchrun, which sends it to the others when one process has failed."""

    def __init__(self):
        self.requested = False
        self._heard = False
        self._saved: int | None = None
        self._group: Any = None
        self._before: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ):
        if threading.current_thread() is threading.main_thread():
            heard = [signal.SIGUSR1] if watched_by_torchrun() else [signal.SIGUSR1, signal.SIGTERM]
            for number in heard:
                self._before[number] = signal.signal(number, self._hear)
        if args.world_size > 1:
            # Of its own on the CPU: asking the GPU would wait for it at every step.
            waiting = timedelta(seconds=args.ddp_timeout)
            self._group = torch.distributed.new_group(timeout=waiting, backend="gloo")

    def release(self) -> None:
        """Give the signals back to whom they belonged to."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: Any) -> None:
        self._heard = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ):
        if state.global_step < state.max_steps and _on_any_rank(
            self._heard, torch.device("cpu"), self._group
        ):
            self.requested = True
            control.should_training_stop = True
            # The host would load the best model, and with a limit of 1 remove the newest.
            args.load_best_model_at_end, args.save_total_limit = False, None

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ):
        self._saved = state.global_step

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ):
        if not self.requested:
            return
        if state.epoch is not None and state.epoch % 1:
            # The host ends an epoch that was broken off like a whole one.
            control.should_evaluate = control.should_log = False
        control.should_save = control.should_evaluate or self._saved != state.global_step


def _on_any_rank(flag: bool, device: torch.device, group: Any = None) -> bool:
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return flag
    flags = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=group)
    return bool(flags)
