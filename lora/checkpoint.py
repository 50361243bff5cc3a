"""A model's weights on disk, found by the names they have in the model, without loading it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    rename_source_key,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from .. import models  # noqa: F401  registers the families
from ..core.checkpoints import ADAPTER_CONFIG
from ..core.errors import ModelError
from ..models.ovis2_5.build import unpartitioned
from .tensor_files import Header, map_file, mapped, read_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx*")

SAMPLED_VALUES = 16
"""Of each tensor, in a fingerprint."""


@dataclass(frozen=True)
class Place:
    """Where a parameter is: its file, and its name in there."""

    shard: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass
class Checkpoint:
    """Attributes:
    source: Folder or Hub name, as given.
    shards: The files of its weights.
    model: The model on the meta device: names, shapes and kinds of modules, no values.
    places: Of each parameter that is stored as it is, by its name in the model.
    fused: Parameters that transformers computes from several stored tensors, or parts of one.
    tied: Parameter to the parameter it shares its values with.
    """

    source: str
    folder: Path
    config: PreTrainedConfig
    shards: list[Path]
    headers: dict[Path, Header]
    model: PreTrainedModel
    places: dict[str, Place]
    fused: set[str]
    tied: dict[str, str]
    renamings: list[WeightRenaming]
    _maps: dict[Path, Tensor] = field(default_factory=dict)

    @classmethod
    def open(cls, source: str, *, whole: bool = True) -> "Checkpoint":
        """Read the headers of its files.

        Args:
            whole: Whether a parameter without values is an error.

        Raises:
            ModelError: there is no complete, unquantised model in safetensors files.
        """
        where = f"model {source}"
        folder = find_folder(source, where, ignore=[*OTHER_WEIGHTS, "original/*"])
        config = _read_config(folder, where)
        shards, promised = _shards(folder, where)
        headers = {shard: read_header(shard) for shard in shards}
        for name, file in promised.items():
            if name not in headers[folder / file].tensors:
                raise ModelError(
                    str(folder / file),
                    f"lacks the tensor {name}, which {INDEX} says is there",
                    "download or save the model again",
                )
        model = empty_model(config, where)
        found = cls(source, folder, config, shards, headers, model, {}, set(), {}, [])
        found._find_places()
        found._find_ties()
        if whole:
            found._check_complete(where)
        return found

    def read(self, name: str) -> Tensor:
        """A parameter's values, mapped from its file: read them, never write into them."""
        place = self.places[name]
        return self.read_entry(place.shard, place.name)

    def read_entry(self, shard: Path, name: str) -> Tensor:
        """As `read`, by file and the name in it."""
        if shard not in self._maps:
            self._maps[shard] = map_file(shard)
        return mapped(self._maps[shard], self.headers[shard], name)

    def parameter(self, name: str) -> str:
        """The model's own name for one of another transformers version, or the name itself."""
        if name in self.places or name in self.tied or name in self.fused:
            return name
        renamed = apply_renamings(name, self.renamings)
        return renamed if renamed in self.places or renamed in self.tied else name

    def file_name(self, name: str) -> str:
        """What a tied parameter that is not stored would be called in these files."""
        if self.places[self.tied[name]].name == self.tied[name]:
            return name
        usual = [r for r in self.renamings if r.was_used() or not isinstance(r, PrefixChange)]
        backwards = [renaming.reverse_transform() for renaming in reversed(usual)]
        stored = apply_renamings(name, backwards)  # type: ignore[arg-type]
        return stored if apply_renamings(stored, self.renamings) == name else name

    def _find_places(self) -> None:
        # As transformers 5.23 finds them, convert_and_load_state_dict_in_model.
        state, prefix = self.model.state_dict(), self.model.base_model_prefix
        mapping = get_model_conversion_mapping(self.model)
        self.renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        targets = {p: c.target_patterns for c in converters for p in c.source_patterns}
        for shard, header in self.headers.items():
            for stored, entry in header.tensors.items():
                name, pattern = rename_source_key(stored, self.renamings, converters, prefix, state)
                if name not in state and stored in state:
                    name, pattern = rename_source_key(stored, [], [], prefix, state)
                if pattern is not None:
                    first, *_ = patterns = targets[pattern]
                    self.fused.update(name.replace(first, target) for target in patterns)
                elif name in state:
                    self.places[name] = Place(shard, stored, entry.dtype, entry.shape)

    def _check_complete(self, where: str) -> None:
        if self.fused:  # which parameters come of those tensors is not known one by one
            return
        for name, _ in self.model.named_parameters():
            if name not in self.places and name not in self.tied:
                raise ModelError(
                    where,
                    f"has no values for {name} in its files",
                    "download or save the model again",
                )

    def _find_ties(self) -> None:
        # As PreTrainedModel.tie_weights does: two stored tensors that differ are not tied.
        for name, source in self.model.all_tied_weights_keys.items():
            if name in self.places and source not in self.places:
                name, source = source, name
            if source not in self.places:
                continue
            if name not in self.places or torch.equal(self.read(name), self.read(source)):
                self.tied[name] = source


def find_folder(source: str, where: str, ignore: Sequence[str] = ()) -> Path:
    """A local folder, or a Hub repository's files, all but those that match `ignore`."""
    if Path(source).is_dir():
        return Path(source)
    no_folder = ModelError(
        where,
        f"{Path(source).absolute()} is no folder",
        "name a folder of transformers files or a Hub name",
    )
    if Path(source).exists() or source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise no_folder
    try:
        return Path(snapshot_download(source, ignore_patterns=list(ignore)))
    except HFValidationError:
        raise no_folder from None
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "no answer")
        raise ModelError(
            where,
            f"is no folder here and cannot be had from the Hub: {reason.strip()}",
            "name a folder of transformers files or a Hub name; HF_TOKEN opens gated models",
        ) from None


def fingerprint(checkpoint: Checkpoint) -> str:
    """`sha256:...` of names, shapes and some values of all parameters. The files, their names for
    the tensors, and a copy in another dtype make no difference; a fine-tuned sibling does."""
    # A tied pair may be stored under either name.
    pairs = checkpoint.model.all_tied_weights_keys
    names = {
        pairs[name] if pairs.get(name) in checkpoint.tied else name: name
        for name in checkpoint.places.keys() - checkpoint.tied.keys()
    }
    digest = hashlib.sha256()
    for name in sorted(names):
        values = checkpoint.read(names[name])
        count = min(values.numel(), SAMPLED_VALUES)
        spread = torch.arange(count) * (values.numel() - 1) // max(count - 1, 1)
        sampled = values.view(-1)[spread].to(torch.bfloat16)
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(sampled.view(torch.int16).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def empty_model(config: PreTrainedConfig, where: str) -> PreTrainedModel:
    """The model of a config without values, as `from_pretrained` of the Auto class for images and
    text, else for text, builds it."""
    kinds = (
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
        (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
    )
    auto = next((auto for mapping, auto in kinds if type(config) in mapping), AutoModel)
    try:
        with unpartitioned(), torch.device("meta"):
            return auto.from_config(config)
    except (ValueError, ImportError) as error:
        raise ModelError(
            where,
            f"cannot be built: {str(error).splitlines()[0]}",
            "name a model that transformers or vlmtune has without remote code",
        ) from None


def _read_config(folder: Path, where: str) -> PreTrainedConfig:
    if (folder / ADAPTER_CONFIG).exists():
        raise ModelError(
            where, "is an adapter, not a model", "name the model that the adapter was trained on"
        )
    file = folder / "config.json"
    if not file.exists():
        raise ModelError(where, "has no config.json", "name a folder that save_pretrained wrote")
    try:
        said = json.loads(file.read_text("utf-8"))
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            str(file),
            f"cannot be read: {str(error).strip().splitlines()[0]}",
            "name a model that transformers or vlmtune has without remote code",
        ) from None
    if said.get("quantization_config"):
        raise ModelError(
            where,
            "is quantised: its weights are rounded already",
            "name the unquantised model, as --base where it is for a merge",
        )
    return config


def _shards(folder: Path, where: str) -> tuple[list[Path], dict[str, str]]:
    """The weight files, and the file of each tensor as the index has it."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS], {}
    index = folder / INDEX
    if not index.exists():
        others = sorted(f.name for kind in OTHER_WEIGHTS for f in folder.glob(kind))
        raise ModelError(
            where,
            f"has no {WEIGHTS}" + (f", only {others[0]}" if others else ""),
            "save it again with save_pretrained, which writes safetensors"
            if others
            else "download or save it again",
        )
    try:
        promised = json.loads(index.read_text("utf-8"))["weight_map"]
        shards = [folder / name for name in sorted(set(promised.values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(
            str(index), "is no index of safetensors files", "download or save the model again"
        ) from None
    for shard in shards:
        if not shard.exists():
            raise ModelError(
                where,
                f"lacks {shard.name}, one of the {len(shards)} files of its weights",
                "download or copy that file, or save the model again",
            )
    return shards, promised
