"""What a run will be, as plain data: `asdict` of a `Forecast` is JSON."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """A key whose value differs from its default, as the run will use it.

    Attributes:
        default: None also for a key without a default, such as `data_path`.
        source: "file PATH", "file PATH, stage NAME", "command line" or "computed".
    """

    key: str
    value: object
    default: object
    source: str


@dataclass(frozen=True)
class SampleRef:
    """A sample of the data: its index in the prepared data, and where it was written."""

    index: int
    file: str
    record: int
    id: str
    tokens: int
    patches: int
    cut: int
    """Tokens that the length limit took away."""


@dataclass(frozen=True)
class Histogram:
    """Counts of equal bins: bin i holds values from `edges[i]` up to `edges[i + 1]`, the last one
    that too. Empty lists where there is no value."""

    edges: list[float]
    counts: list[int]
    mean: float
    median: float
    largest: float


@dataclass(frozen=True)
class SourceCount:
    """A data file or set: its samples, how often an epoch passes them, and samples per epoch."""

    name: str
    samples: int
    passes: float
    per_epoch: int


@dataclass(frozen=True)
class DataForecast:
    """One set of samples: the training data, or an evaluation set.

    Attributes:
        name: "train", "eval", or "eval NAME" of a named evaluation set.
        samples: Prepared ones; `per_epoch` as many as an epoch draws.
        left_out: Reason -> samples that training leaves out for it.
        visual_tokens: Of images and frames, without those that begin and end them.
        truncated: Samples that the length limit cut; `cut_tokens` is what they lost.
        lengths: Tokens of a sample.
        visual: Visual tokens of a sample with media.
        supervised: Share of trained tokens of a sample, 0 to 1.
    """

    name: str
    sources: list[SourceCount]
    samples: int
    per_epoch: int
    left_out: dict[str, int]
    tokens: int
    trained_tokens: int
    visual_tokens: int
    with_media: int
    truncated: int
    cut_tokens: int
    longest: list[SampleRef]
    lengths: Histogram
    visual: Histogram
    supervised: Histogram


@dataclass(frozen=True)
class Layout:
    """One way to put an epoch's samples into micro-batches.

    Attributes:
        name: "random", "sequential", "group_by_length" or "packing".
        padding: Share of the computed tokens that belong to no sample, 0 to 1; with packing what
            is left empty of its rows, which is not computed.
        tokens: Computed tokens of an epoch, padding included.
        micro_batches: Of all processes in an epoch.
        steps: Optimizer steps of an epoch.
        waiting: Largest over mean cost of the processes of a step, summed over the epoch; 1 where
            all have the same.
        configured: Whether the run does it so.
    """

    name: str
    padding: float
    tokens: int
    micro_batches: int
    steps: int
    waiting: float
    configured: bool


@dataclass(frozen=True)
class Steps:
    """Optimizer steps, and the global batch of one of them: samples, or rows with packing."""

    per_device: int
    accumulation: int
    gpus: int
    global_batch: int
    per_epoch: int
    total: int
    epochs: float
    warmup: int


@dataclass(frozen=True)
class Costliest:
    """The micro-batch of the first epoch that keeps the most for its backward pass.

    Attributes:
        step: Optimizer step that computes it, from 1.
        process: Which one, from 0.
        tokens: Computed at once, padding included; `trained_tokens` and `patches` likewise.
        padded: Whether there is padding.
    """

    step: int
    process: int
    tokens: int
    trained_tokens: int
    patches: int
    padded: bool
    samples: list[SampleRef]


@dataclass(frozen=True)
class ModuleCount:
    """A trained module: its parameters, their share of all parameters, and its learning rate."""

    name: str
    parameters: int
    share: float
    learning_rate: float


@dataclass(frozen=True)
class Parameters:
    """Parameters of the model with its adapters, and what is trained of them."""

    total: int
    trained: int
    modules: list[ModuleCount]


@dataclass(frozen=True)
class EngineMemory:
    """Memory of one GPU under one engine, in bytes, at its worst moment of the costliest batch.

    Attributes:
        name: "none" (one copy per GPU, no DeepSpeed), "zero2", "zero3_offload" and so on, or
            "yours" for a DeepSpeed file that is none of the shipped ones.
        terms: What is alive then; their sum is `peak`.
        dominant: Name of the largest term.
        moment: "backward" or "optimizer step".
        host: Of the machine's memory, for all its GPUs together.
        fits: Whether the peak is within the GPU's memory less the reserve.
        configured: Whether the run uses it.
        refused: Why the run cannot use it, "" where it can.
    """

    name: str
    terms: dict[str, int]
    peak: int
    dominant: str
    moment: str
    host: int
    fits: bool
    configured: bool
    refused: str


@dataclass(frozen=True)
class Compute:
    """Floating-point operations, and how long they take.

    Attributes:
        flops_per_epoch: Useful operations of forward and backward; `flops` those of the run.
        padded: Of the run, on top: on padding.
        recomputed: Of the run, on top: what the backward pass computes again.
        evaluated: Of all its evaluations, on top.
        hours: Of all steps at `mfu` of `tflops` per GPU: useful operations and those on padding
            count, as in MFU; what is recomputed does not. `gpu_hours` are of all GPUs.
        evaluation_hours: Of `evaluations`, at the same rate. Loading and saving come on top.
        tokens_per_second: Of all GPUs together in training, without padding.
    """

    flops_per_epoch: float
    flops: float
    padded: float
    recomputed: float
    evaluated: float
    mfu: float
    tflops: float
    hours: float
    gpu_hours: float
    evaluations: int
    evaluation_hours: float
    tokens_per_second: float


@dataclass(frozen=True)
class Disk:
    """Bytes on disk.

    Attributes:
        weights, optimizer: Of one checkpoint, all processes together.
        saves: Checkpoints that the run writes; `kept` are those that stay.
        final: The finished model or adapter.
        most: What the run takes at most, while it replaces a checkpoint too.
    """

    weights: int
    optimizer: int
    saves: int
    kept: int
    final: int
    most: int


@dataclass(frozen=True)
class Doubt:
    """Something in a plan that is probably not meant: the key, what happens, and what to do."""

    key: str
    what: str
    fix: str


@dataclass(frozen=True)
class Forecast:
    """Everything that `vlmtune plan` tells.

    Attributes:
        gpu_memory: Of one GPU, in bytes; `reserve` is the share of it that the plan leaves free.
        evaluation: One for each evaluation set.
        layouts: The configured one and others, to compare.
        left_out_of_memory: What the memory estimate does not count.
    """

    config: str
    model: str
    output_dir: str
    precision: str
    gpus: int
    gpu_memory: int
    reserve: float
    settings: list[Setting]
    notes: list[str]
    parameters: Parameters
    train: DataForecast
    evaluation: list[DataForecast]
    layouts: list[Layout]
    steps: Steps
    costliest: Costliest
    engines: list[EngineMemory]
    left_out_of_memory: list[str]
    compute: Compute
    disk: Disk
    doubts: list[Doubt]
