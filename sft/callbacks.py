"""What a run writes while it trains."""

import json
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

LOG_FILE = "log.jsonl"


class JsonLinesLog(TrainerCallback):
    """Appends every logged value to `log.jsonl` in the output folder, one object per line."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ):
        if state.is_world_process_zero and state.global_step == 0:
            self._file(args).unlink(missing_ok=True)

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
