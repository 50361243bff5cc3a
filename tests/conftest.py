"""Fixtures for every room: the golden numbers, checkpoint folders made from them, a browser."""

import json
import multiprocessing
import os
import runpy
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Read by huggingface_hub when it is imported: no test may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Prepared data of the runs that tests start.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="vlmtune-datasets-")

import pytest

CHROMIUM_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync --disable-quic "
    "--disable-extensions --hide-scrollbars --force-color-profile=srgb"
)
# Ratios of text and what is behind it, as WCAG 2.2 defines them, of all text that is seen.
CONTRASTS = """
const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const colour = (css) => css.match(/[\\d.]+/g).map(Number);
return [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() &&
  [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())).map((e) => {
  let behind = e;
  while (behind && colour(getComputedStyle(behind).backgroundColor)[3] === 0)
    behind = behind.parentElement;
  const pair = [getComputedStyle(e).color, getComputedStyle(behind).backgroundColor];
  const [dark, bright] = pair.map(colour).map(light).sort((a, b) => a - b);
  return [(bright + 0.05) / (dark + 0.05), e.textContent.slice(0, 40)];
});
"""

LLAVA_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('There is no system turn.') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% for part in m.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking %}{{ '<think>\n' }}{% endif %}{% endif %}"
)

ROOT = Path(__file__).parents[1]
HUNG = 240
"""Seconds after which a process counts as hung."""
OVIS_GOLDENS = Path(__file__).parent / "goldens" / "ovis2_5"


@pytest.fixture(scope="session")
def ovis_goldens() -> Path:
    return OVIS_GOLDENS


@pytest.fixture
def checkpoint(tmp_path):
    """`checkpoint(case, key=value, llm_config={...})` is a folder in the published layout: one
    case's model and preprocessor beside the tokenizer, with those keys of config.json changed."""

    def build(case: str = "full_single_untied", **changes) -> Path:
        folder = tmp_path / f"checkpoint-{len(list(tmp_path.glob('checkpoint-*')))}"
        shutil.copytree(OVIS_GOLDENS / "tokenizer", folder)
        for name in ("model.safetensors", "preprocessor_config.json"):
            shutil.copy(OVIS_GOLDENS / case / name, folder)
        config = json.loads((OVIS_GOLDENS / case / "config.json").read_text("utf-8"))
        for key, value in changes.items():
            config[key] = {**config[key], **value} if key.endswith("_config") else value
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
        return folder

    return build


@pytest.fixture(scope="session")
def tiny_ovis(tmp_path_factory) -> Path:
    """A complete Ovis2.5 folder with a tiny random model."""
    folder = tmp_path_factory.mktemp("tiny") / "ovis2_5"
    script = runpy.run_path(str(ROOT / "scripts/make_tiny_ovis2_5.py"))
    script["build"](ROOT / "sample_data/train.json", folder)
    return folder


FLUENT = [
    {
        "id": "digit",
        "image": "digit_0675.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhich digit is this?"},
            {"from": "gpt", "value": "It is a four."},
        ],
    },
    {
        "id": "larger",
        "image": ["digit_0605.png", "digit_0654.png"],
        "conversations": [
            {"from": "human", "value": "<image>\n<image>\nWhich image shows the larger digit?"},
            {"from": "gpt", "value": "The first image."},
        ],
    },
    {
        "id": "larger-thinking",
        "image": ["digit_0605.png", "digit_0654.png"],
        "conversations": [
            {"from": "human", "value": "<image>\n<image>\nWhich image shows the larger digit?"},
            {
                "from": "gpt",
                "value": "<think>\nThe first shows 6, the second shows 5.\n</think>\n\n"
                "The first, since 6 is larger than 5.",
            },
        ],
    },
    {
        "id": "box",
        "image": "digit_0675.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhere is the digit?"},
            {"from": "gpt", "value": "At <box>(250,125),(750,875)</box>."},
        ],
    },
    {
        "id": "crop",
        "image": ["digit_0675.png", "crop.png"],
        "conversations": [
            {"from": "human", "value": "<image>\nLook closely. Which digit is this?"},
            {
                "from": "gpt",
                "value": "I look.\n<tool_call>Crop [250, 125, 750, 875]</tool_call>"
                "<tool_response><image></tool_response>\nSeen closely, it is a four.",
            },
        ],
    },
    {
        "id": "colours",
        "conversations": [
            {"from": "human", "value": "Name a colour."},
            {"from": "gpt", "value": "Blue."},
            {"from": "human", "value": "And another one?"},
            {"from": "gpt", "value": "<think>\nNot blue.\n</think>\n\nGreen."},
            {"from": "human", "value": "Which was the first?"},
            {"from": "gpt", "value": "Blue was the first."},
        ],
    },
    {
        "id": "greeting",
        "conversations": [
            {"from": "system", "value": "Be kind."},
            {"from": "human", "value": "Say hello."},
            {"from": "gpt", "value": "Grüße, 你好 👋!"},
        ],
    },
]
"""What `fluent_ovis` answers, word by word; each record is one question or dialogue it knows."""


@pytest.fixture(scope="session")
def fluent_ovis(tiny_ovis, tmp_path_factory) -> Path:
    """A tiny Ovis2.5 that was trained on `FLUENT` until it says it, greedily, with the run file of
    a training run. `records.json` beside its weights are these records, `images` their images;
    `crop.png` is what the tool call cuts from `digit_0675.png`, 32 x 48 pixels."""
    import torch
    from PIL import Image

    from vlmtune.collators.padded import PaddedCollator
    from vlmtune.collators.sample import SampleEncoder
    from vlmtune.data.conversation import parse_conversation
    from vlmtune.data.images import PixelLimits
    from vlmtune.models import Ovis2_5, Ovis2_5Processor

    folder = tmp_path_factory.mktemp("fluent") / "ovis2_5"
    shutil.copytree(tiny_ovis, folder)
    (folder / "images").mkdir()
    for name in ("digit_0675.png", "digit_0605.png", "digit_0654.png"):
        shutil.copy(ROOT / "sample_data/images" / name, folder / "images")
    with Image.open(folder / "images/digit_0675.png") as image:
        image.crop((16, 8, 48, 56)).save(folder / "images/crop.png")
    (folder / "records.json").write_text(json.dumps(FLUENT), "utf-8")
    preset = json.loads((ROOT / "configs/presets/quickstart.json").read_text("utf-8"))
    limits = {key: preset.get(key, 64 * 64) for key in PixelLimits.__annotations__}
    limits |= {"min_frames": 2, "max_frames": 2}
    settings = {**limits, "thinking": "every_turn", "image_folder": str(folder / "images")}
    (folder / "vlmtune_run.json").write_text(json.dumps({"config": settings}), "utf-8")

    torch.manual_seed(0)
    model = Ovis2_5.from_pretrained(folder).train()
    processor = Ovis2_5Processor.from_pretrained(folder)
    encoder = SampleEncoder(processor, PixelLimits(**limits), 4096, 4096)
    rows = [
        encoder.row(parse_conversation(record, "records.json", i, str(folder / "images")))
        for i, record in enumerate(FLUENT, 1)
    ]
    batch = PaddedCollator(encoder)(rows)
    batch["pixel_values"] = processor.image_processor.normalise(batch["pixel_values"])
    del batch["sample_ids"]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 5e-3, weight_decay=0.0)
    for _ in range(300):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.003:
            break
    else:
        pytest.fail(f"fluent_ovis has not learned its answers: loss {loss.item():.3f}")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def two_ranks() -> Callable[[Callable], list[int | None]]:
    """`two_ranks(call)`: exit codes of two forks that call it, with the environment of a launcher
    that watches neither."""
    import torch
    from torch.distributed import TCPStore

    def run(call: Callable) -> list[int | None]:
        # The store is kept here, as torchrun does: its port is never free for another program.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        known = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": "2",
        }

        def child(rank: int) -> None:
            os.environ.update(known, RANK=str(rank), LOCAL_RANK=str(rank))
            torch.set_num_threads(1)  # others do not survive a fork
            call()

        context = multiprocessing.get_context("fork")
        children = [context.Process(target=child, args=(rank,), daemon=True) for rank in range(2)]
        for process in children:
            process.start()
        for process in children:
            process.join(HUNG)
        return [process.exitcode for process in children]

    return run


@pytest.fixture(scope="session")
def tiny_llava(ovis_goldens, tmp_path_factory) -> Path:
    """A complete folder of another family: a tiny random Llava with a chat template."""
    import torch
    from transformers import (
        AutoModelForImageTextToText,
        AutoTokenizer,
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaProcessor,
    )

    tokenizer = AutoTokenizer.from_pretrained(ovis_goldens / "tokenizer")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    size = {"height": 16, "width": 16}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=LLAVA_TEMPLATE,
        num_additional_image_tokens=1,
    )
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    sizes["num_hidden_layers"] = 2
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, **sizes),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=200,
            initializer_range=0.3,
            eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
            **sizes,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llava")
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A real browser that keeps a log of its console and of what pages ask for."""
    files = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(files):
        pytest.skip("no chromium or chromedriver (Debian: chromium, chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = files[0]
    profile = tmp_path_factory.mktemp("chromium")
    for flag in (*CHROMIUM_FLAGS.split(), f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(files[1]))
    yield browser
    browser.quit()


@pytest.fixture
def open_page(chromium) -> Iterator[Callable]:
    """`open_page(file, width=1280, dark=False)` is the browser with the page. At the end of the
    test, no page may have written to the console or asked for anything but itself."""
    opened = []

    def open_file(file: Path, width: int = 1280, dark: bool = False):
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        chromium.get(file.as_uri())
        opened.append(file.as_uri())
        return chromium

    chromium.get("about:blank")
    for log in ("browser", "performance"):
        chromium.get_log(log)
    yield open_file
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    requests = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in requests if not url.startswith("data:")] == opened
    assert chromium.get_log("browser") == []


@pytest.fixture
def faint_text() -> Callable:
    """`faint_text(browser)`: text of the page with less than the contrast of 4.5 of WCAG AA."""
    return lambda browser: [found for found in browser.execute_script(CONTRASTS) if found[0] < 4.5]
