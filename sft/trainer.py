"""The two trainers. Data, masks and batches come from our collator; both run the host's loop."""

import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ..collators.packed import PackedCollator
from ..collators.padded import PaddedCollator
from ..collators.rendering import IGNORE_INDEX
from ..configs.schema import RunConfig
from ..core.distributed import rank, world_size
from ..core.errors import ConfigError, DataError, VLMTuneError
from .answers import AnswerEvaluation
from .batches import EpochBatches, EpochLoader, Rows, evaluation_batches, outlive_the_step
from .callbacks import GradientReport, IsolationProbe
from .data import RunData, seed_of
from .failures import batch_in_words, explained, unwritable
from .heads import use_supervised_head
from .modules import TrainedModule, parameter_groups
from .output import PARTIAL, describe_run
from .probe import MemoryProbe
from .speed import Speed


class VLMTrainerMixin(Trainer):
    """What both trainers add to the host's loop: optimizer groups by module, batches of fixed
    order, a loss over all evaluation tokens, checkpoints written aside, and lines people read."""

    def __init__(
        self,
        *,
        config: RunConfig,
        data: RunData,
        batches: EpochBatches | None,
        modules: list[TrainedModule],
        facts: dict[str, Any],
        **kwargs: Any,
    ):
        self.config, self.data, self.modules, self.facts = config, data, modules, facts
        self.batches = batches
        self.speed = Speed()
        has_images = data.train is None or data.train.has_images
        self.gradients = GradientReport(modules, has_images)
        self._batch = "before the first batch"
        self._rates: dict[str, float] = {}
        self._empty_batches = 0
        self._checkpoint_root: Path | None = None
        self._evaluated = torch.zeros(2, dtype=torch.float64)
        self.answers = AnswerEvaluation(config, data) if config.loop.eval_metrics else None
        super().__init__(**kwargs)
        use_supervised_head(kwargs["model"])
        self.add_callback(self.gradients)
        if config.data.packing:
            self.add_callback(IsolationProbe(self, has_images))
        if config.loop.probe:
            self.add_callback(MemoryProbe(self))

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if isinstance(self.optimizer, Optimizer):
            return self.optimizer
        optimizer = super().create_optimizer(model)
        whole: Any = self.model  # a PeftModel as well, whose parameters have longer names
        decayed = set(self.get_decay_parameter_names(whole))
        groups = parameter_groups(self.modules, decayed, self.args.weight_decay)
        wanted = {p for group in groups for p in group["params"]}
        # The host fills the optimizer as its kind demands; only the grouping is ours.
        if (
            not isinstance(optimizer, Optimizer)
            or wanted != {p for group in optimizer.param_groups for p in group["params"]}
            or any(
                group.keys() - {"params", *optimizer.defaults} for group in optimizer.param_groups
            )
        ):
            raise ConfigError(
                "optim",
                f"{self.args.optim} makes its own parameter groups, so train_modules cannot",
                "use adamw_torch, adamw_bnb_8bit or another optimizer of plain groups",
            )
        optimizer.param_groups.clear()
        for group in groups:
            optimizer.add_param_group(group)
        return optimizer

    def train(self, *args: Any, **kwargs: Any):
        """The host's `train`.

        Raises:
            TrainingError: out of memory, or another process or loader is gone: with the step and
                the batch.
        """
        try:
            return super().train(*args, **kwargs)
        except (RuntimeError, MemoryError, OSError) as error:
            failure = explained(error, self.state.global_step + 1, self._batch)
            if failure is None or isinstance(error, VLMTuneError):
                raise
            raise failure from error

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed where it had ended, the host would train one step more.
        if self.state.global_step >= self.state.max_steps or self._stopped_early():
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        if stream := self.data.stream:
            return DataLoader(stream, batch_size=None, **self._loading())
        assert self.data.train is not None and self.batches is not None
        loading = self._loading()
        if self.config.data.packing:
            loading["collate_fn"] = PackedCollator(self.data.encoder)
        rows = Rows(self.data.train.dataset)
        return EpochLoader(rows, batch_sampler=self.batches, **loading)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        dataset = eval_dataset
        if not isinstance(dataset, Dataset):
            dataset = self.data.evaluation[dataset or ""].dataset
        batch = self.args.per_device_eval_batch_size
        batches = evaluation_batches(dataset, batch, rank(), world_size())
        # Evaluation data stays the same, so workers need not outlive the pass.
        loading = {**self._loading(), "persistent_workers": False}
        return EpochLoader(Rows(dataset), batch_sampler=batches, **loading)

    def _loading(self) -> dict[str, Any]:
        args = self.args
        # Only forked loaders outlive a SIGTERM to the whole job.
        forked = "fork" if args.dataloader_num_workers and sys.platform == "linux" else None
        return {
            "collate_fn": self.data_collator,
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory and torch.cuda.is_available(),
            "persistent_workers": args.dataloader_persistent_workers,
            "multiprocessing_context": args.dataloader_multiprocessing_context or forked,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "in_order": args.dataloader_in_order,
            "worker_init_fn": outlive_the_step,
            # Its own, so that loading draws nothing from the generator that a resume restores.
            "generator": torch.Generator().manual_seed(seed_of(args)),
        }

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """On the device, with patches as the model takes them: they travel as bytes."""
        inputs = super()._prepare_inputs(inputs)  # type: ignore[arg-type, assignment]
        if "pixel_values" in inputs:
            image_processor = self.data.encoder.processor.image_processor
            inputs["pixel_values"] = image_processor.normalise(inputs["pixel_values"])
        return inputs

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        try:
            batches, items = super().get_batch_samples(
                self.speed.timed(epoch_iterator), num_batches, device
            )
        except DataError as error:
            where = f"rank {rank()}, step {self.state.global_step + 1}: {error.where}"
            raise DataError(where, error.what, error.fix) from error
        # A whole step without trained tokens has a loss of zero, not of 0 / 0.
        return batches, items.clamp(min=1) if isinstance(items, Tensor) else items

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        ids = inputs.pop("sample_ids")
        self._batch = batch_in_words(ids, inputs)
        self.speed.count(inputs, len(ids))
        trained = bool((inputs["labels"] != IGNORE_INDEX).any())
        self._check_labels(trained, ids)
        self.gradients.saw_image |= trained and "pixel_values" in inputs
        return super().training_step(model, inputs, num_items_in_batch)

    def uncounted_step(self, model: nn.Module, inputs: dict[str, Any], items: Tensor) -> Tensor:
        """The host's `training_step` on a micro-batch that is no part of the training."""
        return super().training_step(model, inputs, items)

    def _check_labels(self, trained: bool, ids: list[str]) -> None:
        if not ids:  # it only fills the step
            return
        self._empty_batches = 0 if trained else self._empty_batches + 1
        limit = self.config.loop.max_empty_batches
        if self._empty_batches >= limit:
            raise DataError(
                f"rank {rank()}, step {self.state.global_step + 1}, samples {', '.join(ids)}",
                f"{limit} micro-batches in a row have no token to learn from",
                "raise multimodal_max_length and text_max_length, or mend these samples",
            )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss alone: logits of a whole evaluation set are never kept."""
        inputs.pop("sample_ids")
        inputs = self._prepare_inputs(inputs)
        tokens = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        assert isinstance(loss, Tensor)
        self._evaluated += torch.stack([loss.double() * tokens, tokens.double()]).cpu()
        return loss, None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ):
        """The host's loop with the loss over all tokens of the set, however they are split."""
        self._evaluated.zero_()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        sums = self.accelerator.reduce(self._evaluated.float().to(self.args.device))
        assert isinstance(sums, Tensor) and output.metrics is not None
        total, tokens = sums.tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / max(tokens, 1)
        output.metrics[f"{metric_key_prefix}_trained_tokens"] = int(tokens)
        return output

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics of every set, those of `eval_metrics` too; of several sets also `eval_loss`, over
        the tokens of all."""
        with self.speed.paused():
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if metric_key_prefix != "eval":
            return metrics
        if isinstance(self.eval_dataset, dict) and eval_dataset is None:
            tokens = {name: metrics[f"eval_{name}_trained_tokens"] for name in self.eval_dataset}
            total = sum(metrics[f"eval_{name}_loss"] * count for name, count in tokens.items())
            metrics["eval_loss"] = total / max(sum(tokens.values()), 1)
            self.log({"eval_loss": metrics["eval_loss"]})
        if self.answers:
            step, autocast = self.state.global_step, self.accelerator.autocast()
            with self.speed.paused():
                scores = self.answers.evaluate(self.model, self.args, step, autocast)
            metrics |= scores
            self.log(scores)
        if self.is_in_train and self._stopped_early():
            self.control.should_training_stop = True
        return metrics

    def _stopped_early(self) -> bool:
        """From the log, which a checkpoint holds, so that a resumed run counts on."""
        patience = self.config.loop.early_stopping_patience
        if not patience:
            return False
        key = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        values = [entry[key] for entry in self.state.log_history if key in entry]
        since = evaluations_without_progress(
            values, bool(self.args.greater_is_better), self.config.loop.early_stopping_threshold
        )
        return since >= patience

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        improved = super()._determine_best_metric(metrics, trial)
        # Between two regular saves there would be no checkpoint of the best model.
        self.control.should_save |= improved and self.args.load_best_model_at_end
        return improved

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.speed.take(self.accelerator))
            if len(self._rates) > 1:
                logs.update({f"learning_rate/{name}": rate for name, rate in self._rates.items()})
        super().log(logs, start_time)

    def _get_learning_rate(self) -> float:
        # The host asks between the optimizer's step and the schedule's: these rates were used.
        if isinstance(self.optimizer, Optimizer):
            self._rates = {group["module"]: group["lr"] for group in self.optimizer.param_groups}
        return super()._get_learning_rate()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._checkpoint_root or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint aside and rename it when it is complete, so that a killed or
        failed save leaves the one before as it was."""
        root, name = Path(self.args.output_dir or "."), f"checkpoint-{self.state.global_step}"
        aside = root / PARTIAL
        best = self.state.best_global_step
        first_here = self.args.local_process_index == 0
        if first_here:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._checkpoint_root = aside
        try:
            with self.speed.paused(), unwritable(aside, "checkpoint"):
                Trainer._save_checkpoint(self, model, trial)
                # The host looked for the best one beside the unfinished one.
                kept = root / f"checkpoint-{best}"
                if best and (best == self.state.global_step or kept.exists()):
                    self.state.best_model_checkpoint = str(kept)
                if self.args.should_save:
                    self.state.save_to_json(str(aside / name / "trainer_state.json"))
                    describe_run(self, self.config, self.facts, aside / name)
        finally:
            self._checkpoint_root = None
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            _replace(aside / name, root / name)
        self.accelerator.wait_for_everyone()
        if first_here and self.args.save_on_each_node and not self.is_world_process_zero():
            _replace(aside / name, root / name)
        if first_here:
            shutil.rmtree(aside, ignore_errors=True)
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(root),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )


class VLMSFTTrainer(VLMTrainerMixin, SFTTrainer):
    """TRL's trainer with its token metrics, on batches of our collator.

    `SFTConfig` must carry `skip_prepare_dataset` and `remove_unused_columns=False`, as
    `sft.arguments.training_arguments` sets them: the rows are tokenized already.
    """

    def __init__(self, *, model: nn.Module, **kwargs: Any):
        # TRL (1.16) rounds what is trained on quantised weights to bfloat16.
        kept = {p: p.data for p in model.parameters() if p.requires_grad}
        super().__init__(model=model, **kwargs)
        for parameter, data in kept.items():
            if parameter.dtype != data.dtype:
                parameter.data = data


class VLMTrainer(VLMTrainerMixin):
    """transformers' own trainer on the same batches."""


def make_trainer(
    config: RunConfig,
    model: PreTrainedModel | PeftModel,
    args: SFTConfig,
    data: RunData,
    batches: EpochBatches | None,
    modules: list[TrainedModule],
    callbacks: list[TrainerCallback],
    facts: dict[str, Any],
) -> VLMTrainerMixin:
    """The trainer that the config's `trainer` names.

    Args:
        batches: Of this process for training, None where they are streamed.
        facts: What goes into every run file.
    """
    evaluation = {name: prepared.dataset for name, prepared in data.evaluation.items()}
    trainer_class = VLMSFTTrainer if config.loop.trainer == "trl" else VLMTrainer
    return trainer_class(
        config=config,
        data=data,
        batches=batches,
        modules=modules,
        facts=facts,
        model=model,
        args=args,
        data_collator=PaddedCollator(data.encoder),
        train_dataset=data.for_host(),
        eval_dataset=evaluation.get("", evaluation or None),
        processing_class=data.encoder.processor,
        callbacks=callbacks,
    )


def evaluations_without_progress(values: list[float], greater: bool, threshold: float) -> int:
    """How many of the last values came since one was better by more than `threshold`."""
    best, since = None, 0
    for value in values:
        gain = 0.0 if best is None else (value - best if greater else best - value)
        if best is None or math.isnan(best) or gain > threshold:
            best, since = value, 0
        else:
            since += 1
    return since


def _replace(complete: Path, place: Path) -> None:
    """Move a folder to its place; one that stands there goes first, already superseded."""
    if place.exists():
        shutil.rmtree(place)
    complete.rename(place)
