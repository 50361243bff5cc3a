"""A new Ovis2.5 from a causal language model and a SigLIP or SigLIP2 vision tower.

Both are taken over bit for bit; only the visual head and the table of visual embeddings are new, so
training starts with `visual_tokenizer` (stage 1). The reference names no initialisation for them;
`new_parts` says what is done here and why.
"""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed as host
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ... import __version__
from ...core.errors import ModelError
from .configuration_ovis2_5 import NUM_INDICATORS, Ovis2_5Config, Siglip2NavitConfig
from .image_processing_ovis2_5 import Ovis2_5ImageProcessor
from .modeling_ovis2_5 import Ovis2_5
from .processing_ovis2_5 import CHAT_TEMPLATE, Ovis2_5Processor

SOURCES_FILE = "build.json"
LOCK_FILE = ".build.lock"
TOWERS = ("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model")
PAD_TOKEN = "<|endoftext|>"
THINK_TAGS = ("<think>", "</think>")
PROBE_TEXT = f"user\nIs it 5?\n{Ovis2_5Processor.empty_think}Yes, a square."


def build_ovis2_5(
    llm: str,
    vit: str,
    output: Path,
    *,
    chat_template: str | None = None,
    visual_vocab_size: int = 65536,
    seed: int = 0,
) -> None:
    """Write a complete Ovis2.5 folder; the same arguments write the same bytes.

    Args:
        llm: Folder or Hub name of a causal language model with its tokenizer.
        vit: Folder or Hub name of a SigLIP or SigLIP2 model, or of its vision tower alone.
        output: Where to write; may exist, but must hold no model.
        chat_template: A Jinja file or its text; None writes the published template.
        visual_vocab_size: Rows of the visual embedding table, the four indicators included.
        seed: Of the new parts, and of the embeddings of added tokens.

    Raises:
        ModelError: a source cannot be read or does not fit, the template does not write what
            training writes, or `output` holds a model.
    """
    output = Path(output)
    if (output / "config.json").exists():
        raise ModelError(
            f"output {output.resolve()}",
            "already holds a model.",
            "name another folder, or delete this one.",
        )
    if visual_vocab_size <= NUM_INDICATORS:
        raise ModelError(
            "visual_vocab_size",
            f"is {visual_vocab_size}, but {NUM_INDICATORS} rows are indicators.",
            "give more rows; the published models have 65536.",
        )
    check_language_config(llm)
    vit_config = tower_config(vit)
    image_processor = Ovis2_5ImageProcessor(
        patch_size=vit_config.patch_size, hidden_stride=vit_config.hidden_stride
    )
    tokenizer, ends = chat_tokenizer(llm)
    template = CHAT_TEMPLATE
    if chat_template is not None:
        template = read_template(chat_template)
        check_template(template, tokenizer)
    processor = Ovis2_5Processor(image_processor, tokenizer, chat_template=template)
    check_tokenizer(processor, llm)

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        language_model = load_language_model(llm)
        text_scale = embedding_scale(language_model, llm)
        grow_embeddings(language_model, max(tokenizer.get_vocab().values()) + 1)
        model = assemble(language_model, vit_config, tower_weights(vit), visual_vocab_size)
        new_parts(model, text_scale)
    check_head(model, llm)
    model.generation_config = generation_config(language_model, tokenizer, ends)
    sources = {
        "llm": llm,
        "vit": vit,
        "visual_vocab_size": visual_vocab_size,
        "seed": seed,
        "vlmtune": __version__,
    }
    write(model, processor, output, sources)


def ensure_base(
    llm: str,
    vit: str,
    output: Path,
    *,
    chat_template: str | None = None,
    visual_vocab_size: int = 65536,
    seed: int = 0,
) -> Path:
    """`output`, built from these sources unless it is there already. Processes that call this at
    the same time wait for the first.

    Raises:
        ModelError: `output` holds a model built from something else, or as `build_ovis2_5`.
    """
    output = Path(output)
    if not (output / "config.json").exists():
        make_folder(output)
        with FileLock(output / LOCK_FILE), unpartitioned():
            if not (output / "config.json").exists():
                build_ovis2_5(
                    llm,
                    vit,
                    output,
                    chat_template=chat_template,
                    visual_vocab_size=visual_vocab_size,
                    seed=seed,
                )
    record = output / SOURCES_FILE
    built = json.loads(record.read_text("utf-8")) if record.exists() else {}
    for key, wanted in (("llm", llm), ("vit", vit), ("visual_vocab_size", visual_vocab_size)):
        found = built.get(key)
        if found != wanted and not _same_folder(found, wanted):
            raise ModelError(
                f"model {output.resolve()}",
                f"was built with {key} {found}, not {wanted}."
                if built
                else f"has no {SOURCES_FILE}: it was not built from {llm} and {vit}.",
                "name another folder, or delete this one to have it built again.",
            )
    return output


@contextmanager
def unpartitioned() -> Iterator[None]:
    """Hides a run's ZeRO-3 config, under which transformers partitions whatever it loads."""
    live = host._hf_deepspeed_config_weak_ref
    host.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        host._hf_deepspeed_config_weak_ref = live


def check_language_config(llm: str) -> None:
    """Refuse what `AutoModelForCausalLM` cannot load, or loads as something else."""
    where = f"language model {llm}"
    config = _read(AutoConfig.from_pretrained, llm, where)
    _refuse_quantized(config, where)
    kind = config.model_type
    fix = "name a causal language model, such as a Qwen3, Llama or GPT-2 one"
    if config.is_encoder_decoder:
        raise ModelError(where, f"is an encoder-decoder model ({kind}).", fix)
    text_alone = config.get_text_config() is config and hasattr(config, "hidden_size")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not text_alone:
        raise ModelError(where, f"is a {kind} model, not a language model alone.", fix)


def tower_config(vit: str) -> Siglip2NavitConfig:
    """The tower's sizes as `vit_config`.

    SigLIP and the fixed-size SigLIP2 embed patches by a convolution, SigLIP2 NaFlex by a linear
    layer; a positive `num_patches` stands for the latter.
    """
    where = f"vision tower {vit}"
    config = _read(AutoConfig.from_pretrained, vit, where)
    if config.model_type not in TOWERS:
        raise ModelError(
            where,
            f"is a {config.model_type} model.",
            "name a SigLIP or SigLIP2 model, such as google/siglip2-so400m-patch16-512.",
        )
    _refuse_quantized(config, where)
    vision: Any = getattr(config, "vision_config", config)
    linear = vision.model_type == "siglip2_vision_model"
    patch_size, channels = vision.patch_size, vision.num_channels
    num_patches = vision.num_patches if linear else -1
    side = math.isqrt(num_patches) if linear else 0
    image_size = side * patch_size if linear else vision.image_size
    head_size = vision.hidden_size / vision.num_attention_heads
    problems = [
        (not isinstance(patch_size, int), f"patch_size {patch_size} is not a number"),
        (not isinstance(image_size, int), f"image_size {image_size} is not a number"),
        (linear and side**2 != num_patches, f"num_patches {num_patches} is not a square"),
        (channels != 3, f"num_channels is {channels}, images have 3"),
        (
            head_size % 4 != 0,
            f"the attention heads have {head_size:g} elements, which 2-D RoPE cannot split in four",
        ),
    ]
    for wrong, what in problems:
        if wrong:
            raise ModelError(where, f"{what}.", "name a tower of another size.")
    return Siglip2NavitConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_hidden_layers,
        num_attention_heads=vision.num_attention_heads,
        num_patches=num_patches,
        image_size=image_size,
        patch_size=patch_size,
        hidden_act=vision.hidden_act,
        layer_norm_eps=vision.layer_norm_eps,
        attention_dropout=vision.attention_dropout,
    )


def chat_tokenizer(llm: str) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """The language model's tokenizer with the tokens of our rendering, as far as they are missing,
    and the ids that ended its texts. Turns end in `<|im_end|>`, which becomes the eos token."""
    tokenizer = _read(AutoTokenizer.from_pretrained, llm, f"tokenizer of {llm}")
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        # transformers makes an empty one where there are no files.
        fix = "name a language model with its tokenizer's files."
        raise ModelError(f"tokenizer of {llm}", "has no words.", fix)
    end, pad = tokenizer.eos_token, tokenizer.pad_token
    turns = [Ovis2_5Processor.turn_start, Ovis2_5Processor.turn_end]
    if pad in (None, end, Ovis2_5Processor.turn_end):
        pad = PAD_TOKEN
    for tokens, special in ((turns, True), (THINK_TAGS, False), ([pad], True)):
        known = tokenizer.get_added_vocab()
        missing = [
            AddedToken(token, special=special, normalized=False)
            for token in tokens
            if token not in known
        ]
        if missing:
            tokenizer.add_tokens(missing)
    tokenizer.eos_token, tokenizer.pad_token = Ovis2_5Processor.turn_end, pad
    return tokenizer, [] if end is None else [tokenizer.convert_tokens_to_ids(end)]


def check_tokenizer(processor: Ovis2_5Processor, llm: str) -> None:
    """Refuse a tokenizer that cannot write a chat: lower case only, newlines lost, ... Spaces do
    not count: those of SentencePiece add one where a piece of text starts."""
    read = processor.tokenizer.decode(
        processor.text_ids(PROBE_TEXT), clean_up_tokenization_spaces=False
    )
    if read.replace(" ", "") != PROBE_TEXT.replace(" ", ""):
        raise ModelError(
            f"tokenizer of {llm}",
            f"cannot write a chat: {PROBE_TEXT!r} comes back as {read!r}.",
            "name a language model whose tokenizer keeps text as it is.",
        )


def read_template(given: str) -> str:
    """The Jinja text of a file, or `given` itself where it is Jinja."""
    if "{{" in given or "{%" in given:
        return given
    try:
        return Path(given).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"chat template {given}", f"cannot be read: {error}.", "name a Jinja file."
        ) from None


def check_template(template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare what the template writes with the turns that training writes. The empty think block
    is left to the template: whether answers carry it is the `thinking` setting of a run."""
    system, question = ("system", "Be brief."), ("user", "Hello.")
    answer, picture = ("assistant", "Hi."), ("user", "<image>\nWhat is it?")
    chats = ([system, question, answer, question], [question], [picture, answer, question])
    fix = "write each turn as <|im_start|>role, newline, text, <|im_end|>, newline; or give none."
    for chat in chats:
        wanted = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in chat)
        wanted += "<|im_start|>assistant\n"
        messages = [{"role": role, "content": _content(text)} for role, text in chat]
        try:
            wrote = tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=True, tokenize=False
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ModelError("chat template", f"cannot be rendered: {error}.", fix) from None
        plain = str(wrote).replace(Ovis2_5Processor.empty_think, "")
        if plain.replace("<image>\n", "<image>") != wanted.replace("<image>\n", "<image>"):
            raise ModelError(
                "chat template", f"writes {plain!r}, but training writes {wanted!r}.", fix
            )


def _content(text: str) -> Any:
    if not text.startswith("<image>\n"):
        return text
    return [{"type": "image"}, {"type": "text", "text": text.removeprefix("<image>\n")}]


def load_language_model(llm: str) -> PreTrainedModel:
    model, report = _read(
        AutoModelForCausalLM.from_pretrained,
        llm,
        f"language model {llm}",
        dtype="auto",
        output_loading_info=True,
    )
    _check_complete(report["missing_keys"], f"language model {llm}")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    # Files may hold two matrices although their config says one.
    model.config.tie_word_embeddings = head.weight is embedding.weight
    return model.eval()


@torch.no_grad()
def embedding_scale(language_model: PreTrainedModel, llm: str) -> float:
    """Root mean square of the text embeddings, as the decoder gets them."""
    rows_VH = language_model.get_input_embeddings()(torch.arange(rows_of(language_model)))
    width = language_model.config.hidden_size
    if rows_VH.shape[-1] != width:
        raise ModelError(
            f"language model {llm}",
            f"has embeddings of {rows_VH.shape[-1]} elements for a hidden size of {width}.",
            "name a model whose embeddings are as wide as its layers.",
        )
    return rms(rows_VH)


def rows_of(language_model: PreTrainedModel) -> int:
    weight = language_model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return len(weight)


def grow_embeddings(language_model: PreTrainedModel, rows: int) -> None:
    """Rows for added tokens; transformers draws them close around the mean of the others, so that
    a new token is neither likely nor unlikely. Never fewer rows: many models have spare ones."""
    if rows > rows_of(language_model):
        language_model.resize_token_embeddings(rows)


def rms(values: Tensor) -> float:
    norm = torch.linalg.vector_norm(values, dtype=torch.float32)
    return norm.item() / math.sqrt(values.numel())


def tower_weights(vit: str) -> dict[str, Tensor]:
    """The tower's tensors under our names; its pooling head is left behind.

    The linear patch embedding of NaFlex reads pixels by row, column, channel, ours by channel, row,
    column (transformers 5.23, `convert_image_to_patches`).
    """
    where = f"vision tower {vit}"
    loaded, report = _read(
        AutoModel.from_pretrained, vit, where, dtype="auto", output_loading_info=True
    )
    tower = getattr(loaded, "vision_model", loaded)
    kept = {n: t for n, t in tower.state_dict().items() if not n.startswith("head.")}
    missing = {name.removeprefix("vision_model.") for name in report["missing_keys"]}
    _check_complete(missing & kept.keys(), where)
    patches = "embeddings.patch_embedding.weight"
    if kept[patches].dim() == 2:
        size, channels = tower.config.patch_size, tower.config.num_channels
        by_pixel = kept[patches].unflatten(1, (size, size, channels))
        kept[patches] = by_pixel.permute(0, 3, 1, 2).flatten(1).contiguous()
    return {f"vision_model.{name}": tensor for name, tensor in kept.items()}


def assemble(
    language_model: PreTrainedModel,
    vit_config: Siglip2NavitConfig,
    tower: dict[str, Tensor],
    visual_vocab_size: int,
) -> Ovis2_5:
    """The model around both parts, each in its own dtype; head and table have no values yet."""
    llm_config = language_model.config
    copies = ("vocab_size", "num_attention_heads", "max_position_embeddings")
    config = Ovis2_5Config(
        llm_config=llm_config,
        vit_config=vit_config,
        visual_vocab_size=visual_vocab_size,
        **{key: getattr(llm_config, key) for key in copies if hasattr(llm_config, key)},
    )
    with torch.device("meta"):
        model = Ovis2_5(config)
    model.llm = language_model
    model.visual_tokenizer.vit.load_state_dict(tower, assign=True)
    return model.eval()


@torch.no_grad()
def new_parts(model: Ovis2_5, text_scale: float) -> None:
    """Draw the head and the table so that a visual token starts at the scale of a text token.

    LayerNorm makes the logits of the W visual words unit normal; the squares of their softmax then
    add up to e / W, so a mean of rows drawn with `std` has the scale `std * sqrt(e / W)`.
    Indicators are looked up, not mixed. docs/LOG.md has what 0.02 everywhere does.
    """
    head, table = model.visual_tokenizer.head, model.vte
    for part in (head, table):
        part.to(model.llm.dtype).to_empty(device="cpu")
    linear, norm = head
    assert isinstance(linear, nn.Linear) and isinstance(norm, nn.LayerNorm)
    nn.init.normal_(linear.weight, std=model.config.vit_config.initializer_range)
    norm.reset_parameters()
    words = len(table.weight) - NUM_INDICATORS
    nn.init.normal_(table.weight[:words], std=text_scale * math.sqrt(words / math.e))
    nn.init.normal_(table.weight[words:], std=text_scale)


@torch.no_grad()
def check_head(model: Ovis2_5, llm: str) -> None:
    """Refuse a language model that does more to its last hidden state than multiply it with the
    head (logit scales of Granite and Cohere, soft caps of Gemma2): training would not see it."""
    ids = torch.arange(1, 6)[None]
    ours, theirs = model(input_ids=ids).logits, model.llm(input_ids=ids).logits
    if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-4):
        raise ModelError(
            f"language model {llm}",
            f"scales or caps its logits ({model.config.llm_config.model_type}).",
            "name a model whose head is a plain matrix, such as a Qwen3, Llama or GPT-2 one.",
        )


def generation_config(
    language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: list[int]
) -> GenerationConfig:
    """The language model's, ending at `<|im_end|>` as well. Left behind are settings that
    transformers made up from config.json, or refuses to write (a temperature without sampling)."""
    settings = deepcopy(language_model.generation_config) or GenerationConfig()
    eos = settings.eos_token_id
    found = [tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos]), *ends]
    try:
        settings.validate(strict=True)
        usable = not settings._from_model_config
    except ValueError:
        usable = False
    if not usable:
        settings = GenerationConfig(bos_token_id=settings.bos_token_id)
    settings.eos_token_id = list(dict.fromkeys(i for i in found if i is not None))
    settings.pad_token_id = tokenizer.pad_token_id
    return settings


def write(
    model: Ovis2_5, processor: Ovis2_5Processor, output: Path, sources: dict[str, Any]
) -> None:
    """Write beside the place and move there at the end, config.json last, so a killed build leaves
    no folder that looks finished."""
    make_folder(output)
    partial = output / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, max_shard_size="5GB")
    processor.save_pretrained(partial)
    (partial / SOURCES_FILE).write_text(json.dumps(sources, indent=2) + "\n", "utf-8")
    (partial / "README.md").write_text(model_card(sources, output.name), "utf-8")
    for stale in output.glob("model*.safetensors*"):
        stale.unlink()
    for file in sorted(partial.iterdir(), key=lambda f: f.name == "config.json"):
        file.chmod(0o644)  # transformers writes weights for their owner alone
        file.replace(output / file.name)
    partial.rmdir()


def make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"output {output.resolve()}",
            f"cannot be made: {error.strerror}.",
            "name a folder that can be written.",
        ) from None


def model_card(sources: dict[str, Any], name: str) -> str:
    llm, vit = sources["llm"], sources["vit"]
    hub = [source for source in (llm, vit) if not Path(source).exists()]
    bases = "base_model:\n" + "".join(f"- {source}\n" for source in hub) if hub else ""
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n{bases}"
        f"tags:\n- vlmtune\n---\n\n# {name}\n\n"
        f"An untrained Ovis2.5: language model `{llm}`, vision tower `{vit}`, and a visual head\n"
        f"and embedding table with random weights (seed {sources['seed']}). It cannot see until\n"
        f"they are trained. Load it after `import vlmtune.models` with\n"
        f"`AutoModelForImageTextToText.from_pretrained` and `AutoProcessor.from_pretrained`.\n\n"
        f"Built with vlmtune {sources['vlmtune']}.\n"
    )


def _read(load: Any, source: str, where: str, **kwargs: Any) -> Any:
    try:
        return load(source, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, ModelError):
            raise
        reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        raise ModelError(
            where,
            f"cannot be read: {reason.strip().rstrip('.')}.",
            "name a folder of transformers files or a Hub name.",
        ) from None


def _refuse_quantized(config: PreTrainedConfig, where: str) -> None:
    if getattr(config, "quantization_config", None):
        fix = "name the unquantized model; quantize when you train or serve the result."
        raise ModelError(where, "is quantized.", fix)


def _check_complete(missing: Any, where: str) -> None:
    if missing:
        names = sorted(missing)
        raise ModelError(
            where,
            f"lacks {len(names)} tensors, the first is {names[0]}.",
            "name a complete checkpoint.",
        )


def _same_folder(one: Any, other: Any) -> bool:
    both = isinstance(one, str) and isinstance(other, str)
    return both and Path(one).is_dir() and Path(one).resolve() == Path(other).resolve()
