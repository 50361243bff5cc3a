"""A model ready to generate, with its processor and the settings it was trained with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils.hub import cached_file

from ..configs.adapter import AdapterConfig
from ..core.checkpoints import (
    ADAPTER_CONFIG,
    MERGE_FILE,
    MODEL_FORM,
    RUN_FILE,
    require_model,
    run_config,
)
from ..core.distributed import local_rank
from ..core.errors import ConfigError, ModelError
from ..lora.adapter import Adapter, check_fits, parse_adapter
from ..lora.checkpoint import Checkpoint
from ..lora.measure import add_adapters
from ..lora.quantization import Quantization, keep_unpacked, quantization_for
from ..models import Ovis2_5Config
from ..models.loading import has_vocabulary

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Loaded:
    """Attributes:
    model: In evaluation mode, without gradients; a PeftModel where adapters are loaded.
    processor: Its `ProcessorMixin`, of Ovis2.5 an `Ovis2_5Processor`.
    run: Config of the run that trained the adapter, or the model; empty where none is beside it.
    """

    model: Any
    processor: Any
    run: dict[str, Any] = field(default_factory=dict)


def load(
    model: str,
    adapters: Sequence[str] = (),
    *,
    dtype: str = "auto",
    device: str | None = None,
    load_in_4bit: bool = False,
    attn_implementation: str | None = None,
    before: Callable[[Any, dict[str, Any]], None] = lambda processor, run: None,
) -> Loaded:
    """Load a checkpoint of Ovis2.5 or of any other family of image and text to text.

    Args:
        model: Folder or Hub name; an adapter's folder stands for its base with that adapter.
        adapters: On top of it, each `PATH` or `PATH:WEIGHT`.
        dtype: "auto" is that of the config on a GPU and float32 on a CPU; with an adapter that was
            trained on quantised weights, theirs.
        device: By its torch name; None: this process's GPU where there is one.
        load_in_4bit: NF4 with bitsandbytes. An adapter that was trained on quantised weights gets
            them as they were in its training, whatever this says.
        before: Called with `processor` and `run` of `Loaded` before the weights are read.

    Raises:
        ModelError: no processor beside the model, no vision language model, broken weights, an
            adapter that does not fit, or bitsandbytes is missing.
        ConfigError: a dtype or device that cannot be used here.
    """
    device = _device(device)
    if dtype not in DTYPES:
        raise ConfigError("dtype", f'"{dtype}" is unknown', f"give {', '.join(DTYPES)}")
    require_model(model)
    opened = [Adapter.open(*parse_adapter(text)) for text in adapters]
    if _is_adapter(model):
        opened.insert(0, Adapter.open(model))
        model = _base_of(opened[0])
    where = f"model {model}"
    config, processor = _read_config(model, where), _read_processor(model, where)
    sources = [*(str(adapter.folder) for adapter in reversed(opened)), model]
    run = next(filter(None, map(_run_config, sources)), {})
    before(processor, run)
    if dtype == "auto" and torch.device(device).type == "cpu":
        chosen = "float32"
    else:
        chosen = _dtype_of(config) if dtype == "auto" else dtype
    settings: dict[str, Any] = {"dtype": chosen, "attn_implementation": attn_implementation}
    if opened or load_in_4bit:
        checkpoint = Checkpoint.open(model)
        for adapter in opened:
            check_fits(adapter, checkpoint)
        bits = _quantization(checkpoint, opened, dtype, chosen if load_in_4bit else None)
        if bits:
            settings["dtype"] = bits.dtype
            settings["quantization_config"] = bits.host_config(checkpoint.model, bits.dtype)
    loaded: Any = _load_weights(model, where, device, settings)
    if opened:
        loaded = add_adapters(loaded, opened, device)
    loaded.eval().requires_grad_(False)
    return Loaded(loaded, processor, run)


def _device(device: str | None) -> str:
    device = device or (f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(
            "device", f'"{device}" cannot be used here', "give cpu, or cuda where there is a GPU"
        ) from None
    return device


def _is_adapter(model: str) -> bool:
    return bool(_file(model, ADAPTER_CONFIG)) and not _file(model, "config.json")


def _file(source: str, name: str) -> str | None:
    """A file of a folder or Hub repository; None where it has none, or the Hub is out of reach."""
    return cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )


def _base_of(adapter: Adapter) -> str:
    """The model it was trained on, as its config says."""
    where = f"adapter {adapter.source}"
    fix = "give its base as the model, and this folder as the adapter"
    if adapter.base is None:
        raise ModelError(where, "does not name the model it was trained on", fix)
    try:
        require_model(adapter.base)
    except ModelError as error:
        raise ModelError(where, f"its base {adapter.base} is not there", fix) from error
    return adapter.base


def _read_config(model: str, where: str) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ModelError):
            raise
        reason = " ".join(str(error).split())
        raise ModelError(where, f"cannot be loaded: {reason}", MODEL_FORM) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ModelError(
            where,
            f'its model_type "{config.model_type}" is no vision language model',
            "give an Ovis2.5, or another model of images and text that transformers has",
        )
    return config


def _read_processor(model: str, where: str) -> ProcessorMixin:
    fix = "copy the tokenizer's files and preprocessor_config.json there, from what it was made of"
    try:
        processor = AutoProcessor.from_pretrained(model)
    except (OSError, ValueError, ImportError, KeyError, AttributeError) as error:
        if isinstance(error, ModelError):
            raise
        reason = " ".join(str(error).split())
        raise ModelError(where, f"its processor cannot be loaded: {reason}", fix) from error
    if not isinstance(processor, ProcessorMixin):
        raise ModelError(where, f"has a {type(processor).__name__}, but no processor", fix)
    if not has_vocabulary(processor.tokenizer):  # type: ignore[attr-defined]
        raise ModelError(where, "its tokenizer has no vocabulary", fix)
    return processor


def _dtype_of(config: PreTrainedConfig) -> str:
    dtype = config.dtype or config.get_text_config().dtype or torch.bfloat16
    return str(dtype).removeprefix("torch.")


def _quantization(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], dtype: str, in_4bit: str | None
) -> Quantization | None:
    """That of the weights an adapter was trained on, else where `in_4bit` names the dtype of the
    others, NF4 as training does it where nothing else is asked for; parts that an adapter holds
    whole stay as they are."""
    trained_on = next((a.quantization for a in adapters if a.quantization), None)
    if trained_on and dtype not in ("auto", trained_on.dtype):
        raise ConfigError(
            "dtype",
            f"is {dtype}, but an adapter was trained on {trained_on.bits}-bit weights that were "
            f"{trained_on.dtype}",
            f"give {trained_on.dtype}, or leave it out",
        )
    if (trained_on or in_4bit) and find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model {checkpoint.source}",
            "its quantised weights need bitsandbytes, which is not installed",
            "pip install bitsandbytes",
        )
    if trained_on or not in_4bit:
        return trained_on
    whole = tuple(name for a in adapters for name in a.config.modules_to_save or ())
    full = [name for name, _ in checkpoint.model.named_modules() if whole and name.endswith(whole)]
    settings = AdapterConfig(load_in_4bit=True)
    if not isinstance(checkpoint.config, Ovis2_5Config):
        settings.unquantized_parts = ""
    return quantization_for(checkpoint.model, settings, full, in_4bit)


def _load_weights(model: str, where: str, device: str, settings: dict[str, Any]) -> Any:
    try:
        both: Any = AutoModelForImageTextToText.from_pretrained(
            model, device_map={"": device}, output_loading_info=True, **settings
        )
        loaded, info = both
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{len(missing)} tensors are missing, the first is {missing[0]}")
    except torch.OutOfMemoryError as error:
        raise ModelError(
            where, f"does not fit into the memory of {device}", "set load_in_4bit, or use the CPU"
        ) from error
    except (ImportError, OSError, SafetensorError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, ImportError) or "attn_implementation" in reason:
            fix = "leave that setting out, or install what it needs"
        else:
            fix = "give a folder with complete .safetensors files that fit its config.json"
        raise ModelError(where, f"cannot be loaded: {reason}", fix) from error
    keep_unpacked(loaded)
    return loaded


def _run_config(source: str) -> dict[str, Any]:
    file = _file(source, RUN_FILE) or _file(source, MERGE_FILE)
    return run_config(Path(file).parent) if file else {}
