"""A PEFT adapter on disk: what it does to which parameter of its base."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import _get_module_names_tied_with_embedding, get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_FILE
from ..core.errors import ModelError
from .checkpoint import Checkpoint, Place, find_folder, fingerprint
from .quantization import Quantization
from .tensor_files import Header, map_file, mapped, read_header

PREFIX = "base_model.model."

PIECE = 1 << 22
"""Elements of a large tensor that are compared together."""

MERGE_WITH_PEFT = "merge it with PEFT's merge_and_unload"
UNSUPPORTED = {
    "alora_invocation_tokens": "an activated LoRA, which has no merged form; serve it with PEFT",
    "arrow_config": "a router between adapters, which has no merged form; serve it with PEFT",
    "use_qalora": f"a QALoRA; {MERGE_WITH_PEFT}",
    "velora_config": f"a VeLoRA; {MERGE_WITH_PEFT}",
    "monteclora_config": f"a MonteCLoRA; {MERGE_WITH_PEFT}",
    "use_bdlora": f"a block-diagonal LoRA; {MERGE_WITH_PEFT}",
    "kasa_config": f"a KaSA; {MERGE_WITH_PEFT}",
    "layer_replication": f"an adapter on replicated layers; {MERGE_WITH_PEFT}",
    "target_parameters": f"an adapter on bare parameters; {MERGE_WITH_PEFT}",
    "trainable_token_indices": f"an adapter on single tokens; {MERGE_WITH_PEFT}",
    "megatron_config": f"an adapter on Megatron layers; {MERGE_WITH_PEFT}",
}
"""Settings of LoraConfig (PEFT 0.21) that give `lora_A` and `lora_B` another meaning."""

REWRITES_BASE = ("pissa", "corda", "olora", "lora_ga", "loftq", "mica")
"""Values of init_lora_weights that change the weights below the adapter when it is made."""

TENSOR = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A"
    r"|lora_embedding_B|lora_magnitude_vector)(\.weight)?"
)


COPIED = re.compile(r"\.(original_module|modules_to_save\.[^.]+)\.")
"""In names of biases that PEFT saves a second time, with bias "all" and modules_to_save."""


@dataclass(frozen=True)
class LowRank:
    """`scaling * B @ A` on a module's weight, by the names of the tensors in the adapter's file.

    Attributes:
        a: `[r, in]`, of an embedding `[r, rows]`.
        b: `[out, r]`, of an embedding `[width, r]`.
        magnitude: Of DoRA (arXiv:2402.09353), `[out]` or `[width]`.
        embedding: Whether the module is one.
        transposed: Whether the weight is stored as `[in, out]`: of embeddings and Conv1D.
    """

    a: str
    b: str
    scaling: float
    magnitude: str | None
    embedding: bool
    transposed: bool


@dataclass(frozen=True)
class Change:
    """What an adapter does to one parameter, in this order.

    Attributes:
        full: Name of the trained values that stand in place of the base's.
        shared: Whether they do so for a tied parameter too.
        low_rank: Added to them.
        bias: Name of a vector added to a bias, times `scaling`.
    """

    full: str | None = None
    shared: bool = False
    low_rank: LowRank | None = None
    bias: str | None = None
    scaling: float = 1.0

    @property
    def is_sum(self) -> bool:
        """Whether it adds to the base's values, so that it can be weighted."""
        return self.full is None and not (self.low_rank and self.low_rank.magnitude)


@dataclass(eq=False)
class Adapter:
    """Attributes:
    weight: What its change is multiplied with.
    changes: By the parameter's name as the adapter has it.
    quantization: Of the weights it was trained on; None where they were not quantised or a tool
        that does not say so trained it.
    base: Folder or Hub name of the model it was trained on, None if it does not say.
    fingerprint: Of that model, None if it does not say.
    """

    source: str
    folder: Path
    weight: float
    config: LoraConfig
    changes: dict[str, Change]
    quantization: Quantization | None
    base: str | None
    fingerprint: str | None
    header: Header
    pages: Tensor

    @classmethod
    def open(cls, source: str, weight: float = 1.0) -> "Adapter":
        """Read what it says of itself and the header of its weights.

        Raises:
            ModelError: it is not whole, not LoRA, or of a kind that is no sum with the base.
        """
        where = f"adapter {source}"
        folder = find_folder(source, where)
        config = _read_config(folder, where)
        file = folder / ADAPTER_WEIGHTS
        if not file.exists():
            others = sorted(f.name for f in folder.glob("adapter_model*"))
            raise ModelError(
                where,
                f"has no {ADAPTER_WEIGHTS}" + (f", only {others[0]}" if others else ""),
                "save it again with save_pretrained, which writes safetensors",
            )
        header = read_header(file)
        if not header.tensors:
            raise ModelError(str(file), "holds no tensors", "save the adapter again")
        run = _read_run(folder)
        try:
            return cls(
                source,
                folder,
                weight,
                config,
                dict(_changes(config, header, where)),
                Quantization.from_run(run),
                config.base_model_name_or_path or None,
                (run.get("base") or {}).get("fingerprint"),
                header,
                map_file(file),
            )
        except (TypeError, AttributeError) as error:
            raise ModelError(
                where,
                f"its {ADAPTER_CONFIG} or {RUN_FILE} cannot be understood: {error}",
                "copy both again from the run",
            ) from None

    def read(self, name: str) -> Tensor:
        """A tensor of its file, mapped: read it, never write into it."""
        return mapped(self.pages, self.header, name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.header.tensors[name].shape


def parse_adapter(text: str) -> tuple[str, float]:
    """`PATH` or `PATH:WEIGHT`; a path that exists is one, colon or not.

    Raises:
        ModelError: the weight is not a finite number.
    """
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not path or not math.isfinite(value):
        raise ModelError(
            f"adapter {text}", f'"{weight}" is no number', "write PATH, or PATH:0.5 with a weight"
        )
    return path, value


def check_fits(adapter: Adapter, checkpoint: Checkpoint) -> dict[str, Change]:
    """What the adapter does to the parameters of this model, by the model's names for them.

    Raises:
        ModelError: it names a module or has a shape that the model does not have, or says that it
            was trained on other weights.
    """
    where = f"adapter {adapter.source}"
    named = "" if adapter.base is None else f", as its config says {adapter.base}"
    other_base = f"give the model it was trained on{named}"
    fitted = {}
    # PEFT finds no tied head where only the model inside has one, as in Ovis2.5.
    tying = adapter.config.ensure_weight_tying and _get_module_names_tied_with_embedding(
        checkpoint.model
    )
    for given, change in adapter.changes.items():
        name = checkpoint.parameter(given)
        if name in checkpoint.fused:
            raise ModelError(
                where,
                f"changes {given}, which is stored in one tensor with others",
                "merge this adapter with PEFT's merge_and_unload",
            )
        if name not in checkpoint.places and name not in checkpoint.tied:
            raise ModelError(
                where, f"changes {given}, which {checkpoint.source} does not have", other_base
            )
        place = checkpoint.places.get(name) or checkpoint.places[checkpoint.tied[name]]
        change = _for_module(change, name, checkpoint, where)
        in_a_copy = change.full and not change.shared
        for tensor, shape, wanted in _shapes(adapter, change, place.shape):
            if shape != wanted:
                raise ModelError(
                    where,
                    f"{tensor} has shape {list(shape)}, but {given} of {checkpoint.source} has "
                    f"{list(place.shape)}, which needs {list(wanted)}",
                    other_base,
                )
        if in_a_copy and tying:
            fitted[name] = replace(change, shared=True)
        elif not (change.shared and _is_copy(adapter, change, checkpoint, place)):
            fitted[name] = change
        elif change.low_rank:
            fitted[name] = replace(change, full=None, shared=False)
    if adapter.fingerprint and adapter.fingerprint != fingerprint(checkpoint):
        raise ModelError(
            where,
            f"was trained on other weights than those of {checkpoint.source}: they have the same "
            "shapes, but another fingerprint",
            f'{other_base}; to use it on these weights all the same, remove "base" from its '
            f"{RUN_FILE}",
        )
    return fitted


def _for_module(change: Change, name: str, checkpoint: Checkpoint, where: str) -> Change:
    """The change as the kind of module needs it."""
    if change.low_rank is None:
        return change
    path = name.rpartition(".")[0]
    module, embedding = checkpoint.model.get_submodule(path), change.low_rank.embedding
    # An embedding with a forward of its own, such as vte, computes something else than PEFT's.
    right = type(module) is nn.Embedding if embedding else isinstance(module, nn.Linear | Conv1D)
    if not right:
        raise ModelError(
            where,
            f"adapts {path} as {'an embedding' if embedding else 'a linear layer'}, but it is "
            f"{type(module).__name__}",
            f"train that module fully instead (modules_to_save), or {MERGE_WITH_PEFT}",
        )
    if isinstance(module, Conv1D):
        return replace(change, low_rank=replace(change.low_rank, transposed=True))
    return change


def _is_copy(adapter: Adapter, change: Change, checkpoint: Checkpoint, place: Place) -> bool:
    """Whether the trained values are the base's own: PEFT saves embeddings and biases whole, be
    they trained or not."""
    assert change.full
    ours, theirs = adapter.read(change.full), checkpoint.read_entry(place.shard, place.name)
    exact = torch.promote_types(ours.dtype, theirs.dtype)
    pieces = zip(ours.reshape(-1).split(PIECE), theirs.reshape(-1).split(PIECE), strict=True)
    return all(torch.equal(a.to(exact), b.to(exact)) for a, b in pieces)


def _shapes(
    adapter: Adapter, change: Change, shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Tensors of a change with the shapes they have and need."""
    if change.full:
        yield change.full, adapter.shape(change.full), shape
    if change.bias:
        yield change.bias, adapter.shape(change.bias), shape
    if low := change.low_rank:
        rank = adapter.shape(low.a)[0]
        rows, columns = shape[::-1] if low.transposed else shape
        yield low.a, adapter.shape(low.a), (rank, columns)
        yield low.b, adapter.shape(low.b), (rows, rank)
        if low.magnitude:
            yield low.magnitude, adapter.shape(low.magnitude), (rows,)


def _read_config(folder: Path, where: str) -> LoraConfig:
    file = folder / ADAPTER_CONFIG
    if not file.exists():
        whole = (folder / "config.json").exists()
        raise ModelError(
            where,
            f"has no {ADAPTER_CONFIG}" + (", it is a whole model" if whole else ""),
            "name the folder that PEFT's save_pretrained wrote",
        )
    try:
        said = json.loads(file.read_text("utf-8"))
        kind = said["peft_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelError(
            str(file), "is no PEFT config", "name the folder that PEFT's save_pretrained wrote"
        ) from None
    if kind != "LORA":
        raise ModelError(where, f"is a {kind} adapter, not LoRA", MERGE_WITH_PEFT)
    for key, what in UNSUPPORTED.items():
        if said.get(key):
            kind, fix = what.split("; ")
            raise ModelError(where, f"is {kind} ({key})", fix)
    drawn = str(said.get("init_lora_weights", True)).lower()
    if drawn.startswith(REWRITES_BASE):
        raise ModelError(
            where,
            f"was made with init_lora_weights {drawn}, which also changed the weights below it",
            "save it with path_initial_model_for_weight_conversion, which makes it a plain LoRA, "
            f"or {MERGE_WITH_PEFT}",
        )
    config = LoraConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    return config


def _read_run(folder: Path) -> dict[str, Any]:
    file = folder / RUN_FILE
    try:
        return json.loads(file.read_text("utf-8")) if file.exists() else {}
    except ValueError:
        raise ModelError(
            str(file), "is not JSON", "copy it again from the run, or delete it"
        ) from None


def _changes(config: LoraConfig, header: Header, where: str) -> Iterator[tuple[str, Change]]:
    """Every change by parameter name; each tensor of the file belongs to one."""
    modules: dict[str, dict[str, str]] = {}
    full: dict[str, str] = {}
    for name in header.tensors:
        path = name.removeprefix(PREFIX)
        if path == name:
            raise ModelError(
                where,
                f"holds {name}, which is no tensor of a PEFT adapter",
                "name the folder that PEFT's save_pretrained wrote",
            )
        if found := TENSOR.fullmatch(path):
            modules.setdefault(found["module"], {})[found["kind"]] = name
        elif ".lora_" in path:
            raise ModelError(where, f"holds {name}, whose meaning is not known", MERGE_WITH_PEFT)
        elif COPIED.sub(".", name) == name or COPIED.sub(".", name) not in header.tensors:
            full[path.replace(".base_layer.", ".")] = name
    sums = {
        f"{path}.weight": _low_rank(path, tensors, config, header, where)
        for path, tensors in modules.items()
    }
    for parameter in sums.keys() | full.keys():
        values = full.get(parameter)
        shared = values is not None and not _in_a_copy(parameter, config)
        yield parameter, Change(values, shared, sums.get(parameter))
    for path, tensors in modules.items():
        if bias := tensors.get("lora_B.bias"):
            low = sums[f"{path}.weight"]
            yield f"{path}.bias", Change(full.get(f"{path}.bias"), bias=bias, scaling=low.scaling)


def _in_a_copy(parameter: str, config: LoraConfig) -> bool:
    """Whether PEFT trained it in a copy of its module, beside the base's: then a parameter that
    was tied to it keeps its values (PEFT 0.21, `_set_trainable`)."""
    parts = parameter.split(".")
    modules = [".".join(parts[:n]) for n in range(1, len(parts))]
    saved = config.modules_to_save or ()
    return any(module.endswith(name) for module in modules for name in saved)


def _low_rank(
    path: str, tensors: dict[str, str], config: LoraConfig, header: Header, where: str
) -> LowRank:
    embedding = "lora_embedding_A" in tensors or "lora_embedding_B" in tensors
    a, b = "lora_A.weight", "lora_B.weight"
    if embedding:
        a, b = "lora_embedding_A", "lora_embedding_B"
    for kind in (a, b):
        if kind not in tensors:
            raise ModelError(
                where, f"has no {path}.{kind}, but its counterpart", "save or copy it again"
            )
    shape_a, shape_b = (header.tensors[tensors[kind]].shape for kind in (a, b))
    for kind, shape in ((a, shape_a), (b, shape_b)):
        if len(shape) < 2 or 0 in shape:
            raise ModelError(
                where,
                f"holds a part of {path}.{kind} alone, of shape {list(shape)}",
                "save it again, under ZeRO-3 with stage3_gather_16bit_weights_on_model_save",
            )
    if len(shape_a) != 2 or len(shape_b) != 2:
        raise ModelError(
            where, f"adapts {path} with tensors of {len(shape_a)} dimensions", MERGE_WITH_PEFT
        )
    rank_key = get_pattern_key(list(config.rank_pattern or ()), path)
    alpha_key = get_pattern_key(list(config.alpha_pattern or ()), path)
    rank = (config.rank_pattern or {}).get(rank_key, config.r)
    alpha = (config.alpha_pattern or {}).get(alpha_key, config.lora_alpha)
    for kind, found in ((a, shape_a[0]), (b, shape_b[1])):
        if found != rank:
            raise ModelError(
                where,
                f"{path}.{kind} has rank {found}, but {ADAPTER_CONFIG} says {rank}",
                f"set r, or rank_pattern for this module, in {ADAPTER_CONFIG} to the rank it was "
                "trained with, or copy config and weights of the same run",
            )
    magnitude = tensors.get("lora_magnitude_vector")
    if config.use_dora and magnitude is None:
        raise ModelError(
            where,
            f"is a DoRA (use_dora), but {path} has no lora_magnitude_vector",
            "copy config and weights of the same run",
        )
    scaling = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
    return LowRank(tensors[a], tensors[b], scaling, magnitude, embedding, transposed=embedding)
