"""Model families. Importing this package registers them with transformers' Auto classes."""

import json
from pathlib import Path

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils.hub import cached_file

from ..core.checkpoints import ADAPTER_CONFIG
from .ovis2_5.configuration_ovis2_5 import Ovis2_5Config, OvisConfig
from .ovis2_5.modeling_ovis2_5 import Ovis2_5
from .ovis2_5.processing_ovis2_5 import Ovis2_5Processor

__all__ = ["Ovis2_5", "Ovis2_5Config", "Ovis2_5Processor"]

AutoConfig.register("ovis2_5", Ovis2_5Config)
AutoConfig.register("ovis", OvisConfig)
AutoModelForImageTextToText.register(Ovis2_5Config, Ovis2_5)
AutoProcessor.register(Ovis2_5Config, Ovis2_5Processor)

HUB_KEYS = frozenset(
    ["revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download", "proxies"]
)
_processor_by_files = AutoProcessor.from_pretrained


def _processor_by_model_type(pretrained_model_name_or_path, **kwargs):
    # Published Ovis2.5 folders name SiglipProcessor in preprocessor_config.json, and AutoProcessor
    # believes that file before the model type.
    hub = {k: v for k, v in kwargs.items() if k in HUB_KEYS}
    try:
        settings, _ = Ovis2_5Config.get_config_dict(pretrained_model_name_or_path, **hub)
    except OSError:
        settings = {}
    ours = settings.get("model_type") in ("ovis2_5", "ovis")
    if ours or (not settings and _adapts_ovis2_5(pretrained_model_name_or_path, **hub)):
        return Ovis2_5Processor.from_pretrained(pretrained_model_name_or_path, **kwargs)
    return _processor_by_files(pretrained_model_name_or_path, **kwargs)


def _adapts_ovis2_5(source, **hub) -> bool:
    """Whether a folder without config.json is an adapter of an Ovis2.5."""
    try:
        file = cached_file(source, ADAPTER_CONFIG, **hub)
        mapping = json.loads(Path(str(file)).read_text("utf-8")).get("auto_mapping") or {}
    except OSError:
        return False
    return mapping.get("base_model_class") == Ovis2_5.__name__


AutoProcessor.from_pretrained = staticmethod(_processor_by_model_type)
