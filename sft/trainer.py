"""The two trainers. Data, masks and batches come from our collator; both run the host's loop."""

from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ..collators.padded import PaddedCollator


class VLMSFTTrainer(SFTTrainer):
    """TRL's trainer with its fused head and token metrics, on batches of our collator.

    `SFTConfig` must carry `skip_prepare_dataset` and `remove_unused_columns=False`, as
    `sft.arguments.training_arguments` sets them: the rows are tokenized by the collator.
    """


class VLMTrainer(Trainer):
    """transformers' own trainer on the same batches; the loss is the model's."""


def make_trainer(
    kind: str,
    model: PreTrainedModel,
    args: SFTConfig,
    collator: PaddedCollator,
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """`kind` is `trl` or `standard`."""
    trainer_class = VLMSFTTrainer if kind == "trl" else VLMTrainer
    return trainer_class(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=collator.encoder.processor,
        callbacks=callbacks,
    )
