"""Before the first step: does the costliest micro-batch fit, and what does it take?"""

import copy
import random
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..collators.rendering import IGNORE_INDEX
from ..core.distributed import rank, world_size
from ..core.errors import TrainingError, VLMTuneError
from ..core.logging import say
from ..data.packing import Groups, PackingPlan
from .batches import EpochBatches
from .failures import batch_in_words, explained
from .memory import moment_bytes
from .modules import base_optimizer

if TYPE_CHECKING:
    from .trainer import VLMTrainerMixin

GIB = 2**30
TRL_COUNTS = ("_metrics", "_total_train_tokens")
"""What TRL (1.16) adds up over the micro-batches of a trainer."""


class MemoryProbe(TrainerCallback):
    """Before the first step: forward and backward of each process's costliest micro-batch, and a
    line about the process that took the most memory. Gradients, random numbers and what is counted
    are afterwards as they were.

    Raises:
        TrainingError: there is not enough memory.
    """

    def __init__(self, trainer: "VLMTrainerMixin"):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ):
        batches, train = self.trainer.batches, self.trainer.data.train
        assert batches is not None and train is not None
        if state.global_step >= state.max_steps:
            return
        accumulation = args.gradient_accumulation_steps
        per_epoch = -(-len(batches) // accumulation)
        epoch = state.global_step // per_epoch
        groups = batches.order(epoch)
        padded = not isinstance(batches.order, PackingPlan)
        tokens = computed_tokens(groups, train.column("length"), padded)
        kept = kept_for_backward(self.trainer.model, tokens, groups.sums(train.column("patches")))
        done, last = (
            (step - epoch * per_epoch) * accumulation
            for step in (state.global_step, state.max_steps)
        )
        place = costliest(kept, batches, done, last)
        step = epoch * per_epoch + place // (batches.world * accumulation) + 1
        with as_it_was(self.trainer):
            measured = measure(self.trainer, groups[place], step)
        every: list[Any] = [measured]
        if world_size() > 1:
            every = [None] * world_size()
            torch.distributed.all_gather_object(every, measured)
        say(f"\nProbe: {max(every)[1]}")


def computed_tokens(groups: Groups, lengths: np.ndarray, padded: bool) -> np.ndarray:
    """Positions of each micro-batch, int64, those of padding as well."""
    if not padded:
        return groups.sums(lengths)
    return np.maximum.reduceat(lengths[groups.indices], groups.starts) * groups.sizes()


def kept_for_backward(model: Any, tokens: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """In proportion to what micro-batches keep for their backward passes: a position or a patch
    counts as its tower is wide and deep."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    llm, vit = base.config.llm_config, base.config.vit_config
    return (
        tokens * llm.hidden_size * llm.num_hidden_layers
        + patches * vit.hidden_size * vit.num_hidden_layers
    )


def costliest(kept: np.ndarray, batches: EpochBatches, done: int, last: int) -> int:
    """Which of an epoch's micro-batches, those of all processes, keeps the most of this process's
    from `done` up to `last`."""
    reached = min(len(kept), min(last, len(batches)) * batches.world)
    mine = np.arange(batches.rank + done * batches.world, reached, batches.world)
    if not len(mine):  # only one that fills the step of the others
        return reached - 1
    return int(mine[kept[mine].argmax()])


@contextmanager
def as_it_was(trainer: "VLMTrainerMixin") -> Iterator[None]:
    """Afterwards forget what forward and backward passes have left behind."""
    device, engine = trainer.args.device, _engine(trainer)
    model: Any = trainer.model_wrapped
    modes = {module: module.training for module in model.modules()}
    counts = {k: copy.deepcopy(v) for k, v in vars(trainer).items() if k in TRL_COUNTS}
    drawn, drawn_by_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    random.setstate(drawn)
    np.random.set_state(drawn_by_numpy)
    vars(trainer).update(counts)
    for module, training in modes.items():
        module.training = training
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    model.zero_grad()
    if engine:
        discard_gradients(engine)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def discard_gradients(engine: Any) -> None:
    """Drop what DeepSpeed (0.19) keeps of a backward pass until its optimizer steps."""
    optimizer = engine.optimizer
    optimizer.zero_grad()
    if engine.zero_optimization_stage() == 3:
        optimizer.averaged_gradients.clear()
        optimizer.empty_partition_cache()
        coordinator = optimizer.parameter_offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():  # the order in which parts are gathered ahead
            coordinator._invalidate_trace()
    elif hasattr(optimizer, "all_grad_tensors"):  # of stages 1 and 2
        optimizer.micro_step_id = -1
        for partitions in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            partitions.update(dict.fromkeys(partitions))
    if engine.zero_offload_optimizer():
        optimizer.reset_cpu_buffers()


@contextmanager
def no_step(model: Any, engine: Any) -> Iterator[None]:
    """Backward passes alone: accelerate steps DeepSpeed's optimizer in them, and DDP would order
    the buckets of all later ones by the first."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif engine:
        engine.step = lambda: None
        try:
            yield
        finally:
            del engine.step
    else:
        yield


def measure(trainer: "VLMTrainerMixin", indices: list[int], step: int) -> tuple[int, str]:
    """Forward and backward of these samples; twice where gradients are accumulated, since there a
    micro-batch meets the gradients of another. On a GPU the memory of the optimizer's states,
    which the first step makes, is held meanwhile.

    Returns:
        Bytes of memory, to compare processes by, and in words what was computed and measured.

    Raises:
        TrainingError: there is not enough memory.
    """
    device, accumulation = trainer.args.device, trainer.args.gradient_accumulation_steps
    loader: Any = trainer.get_train_dataloader()
    model: Any = trainer.model_wrapped
    inputs = loader.collate_fn([loader.dataset[i] for i in indices])
    batch = batch_in_words(inputs.pop("sample_ids"), inputs)
    patches = len(inputs.get("pixel_values", ()))
    items = (inputs["labels"] != IGNORE_INDEX).sum().clamp(min=1).to(device)
    states, seconds, ram = states_to_come(trainer), 0.0, highest_ram()
    trainer.current_gradient_accumulation_steps = accumulation
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        held = torch.empty(states if cuda else 0, dtype=torch.uint8, device=device)  # noqa: F841
        with no_step(model, _engine(trainer)):
            for last in (False, True)[accumulation == 1 :]:
                trainer.accelerator.gradient_state._set_sync_gradients(last)
                started = time.perf_counter()
                trainer.uncounted_step(model, dict(inputs), items)
                if cuda:
                    torch.cuda.synchronize(device)
                seconds = time.perf_counter() - started
    except (RuntimeError, MemoryError) as error:
        failure = explained(error, step, batch)
        if failure is None or isinstance(error, VLMTuneError):
            raise
        where = f"probe before the first step, {failure.where}"
        raise TrainingError(where, failure.what, failure.fix) from error
    peak, memory = memory_in_words(device, states, ram)
    of_rank = f"rank {rank()}, " if world_size() > 1 else ""
    return peak, f"{of_rank}step {step}, {batch}, {patches:,} patches: {seconds:.2f} s, {memory}"


def memory_in_words(device: torch.device, states: int, ram: int) -> tuple[int, str]:
    """The peak in bytes, and a line with it; `ram` is what `highest_ram` was before."""
    if device.type == "cuda":
        peak, whole = torch.cuda.max_memory_allocated(device), torch.cuda.mem_get_info(device)[1]
        reserved = torch.cuda.max_memory_reserved(device)
        return peak, (
            f"peak {_gib(peak)}, {_gib(states)} of it held for the optimizer's states, "
            f"{_gib(reserved)} reserved of {_gib(whole)}"
        )
    peak = highest_ram()
    return peak, (
        f"highest RAM {_gib(peak)}, {_gib(peak - ram)} above that before; "
        f"the optimizer's states will add {_gib(states)}"
    )


def highest_ram() -> int:
    """Of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def states_to_come(trainer: "VLMTrainerMixin") -> int:
    """Bytes of the states that the optimizer's first step makes on this process's device: none
    where a checkpoint brought them, ZeRO keeps them on the host, or they are paged, as those leave
    a GPU that is full."""
    name = getattr(trainer.args.optim, "value", trainer.args.optim)
    engine = _engine(trainer)
    sharded = engine and engine.zero_optimization_stage() > 0
    elsewhere = "paged" in name or (sharded and engine.zero_offload_optimizer())
    if elsewhere or base_optimizer(trainer.optimizer).state:
        return 0
    sizes = [
        getattr(parameter, "ds_numel", parameter.numel())
        for module in trainer.modules
        for parameter in module.parameters.values()
    ]
    return moment_bytes([-(-sum(sizes) // world_size())] if sharded else sizes, name)


def _engine(trainer: "VLMTrainerMixin") -> Any:
    """DeepSpeed's, None without it."""
    return trainer.model_wrapped if trainer.is_deepspeed_enabled else None


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
