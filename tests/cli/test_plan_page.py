"""The plan page in a real browser: plots to scale, tables as given, nothing run."""

from dataclasses import replace

import pytest

from vlmtune.cli.plan_page import GB, write_page
from vlmtune.core.errors import ConfigError
from vlmtune.sft.forecast import (
    Compute,
    Costliest,
    DataForecast,
    Disk,
    Doubt,
    EngineMemory,
    Forecast,
    Histogram,
    Layout,
    ModuleCount,
    Parameters,
    SampleRef,
    Setting,
    SourceCount,
    Steps,
)

SAMPLE = SampleRef(17, "train.json", 18, "coco_17", 4096, 1024, 12)
NONE = Histogram([], [], 0.0, 0.0, 0.0)
TERMS = {"weights": 20 * GB, "moments": 50 * GB, "activations": 10 * GB}
SHARDED = {"weights": 5 * GB, "moments": 10 * GB, "activations": 10 * GB}


def engine(name: str, terms: dict[str, int], **more) -> EngineMemory:
    return EngineMemory(
        **{
            "name": name,
            "terms": terms,
            "peak": sum(terms.values()),
            "dominant": max(terms, key=lambda term: terms[term]),
            "moment": "backward",
            "host": 0,
            "fits": sum(terms.values()) <= 72 * GB,
            "configured": False,
            "refused": "",
            **more,
        }
    )


def data(name: str, **more) -> DataForecast:
    return DataForecast(
        **{
            "name": name,
            "sources": [SourceCount("a.json", 40, 1.0, 40), SourceCount("b.json", 10, 2.0, 20)],
            "samples": 50,
            "per_epoch": 60,
            "left_out": {},
            "tokens": 4000,
            "trained_tokens": 1000,
            "visual_tokens": 2000,
            "with_media": 45,
            "truncated": 2,
            "cut_tokens": 34,
            "longest": [SAMPLE],
            "lengths": Histogram([10.0, 20.0, 30.0, 50.0], [8, 2, 4], 19.5, 18.0, 50.0),
            "visual": Histogram([4.0, 8.0], [45], 6.0, 6.0, 8.0),
            "supervised": Histogram([0.0, 0.5, 1.0], [30, 20], 0.4, 0.25, 0.9),
            **more,
        }
    )


FORECAST = Forecast(
    config="run.json",
    model="AIDC-AI/Ovis2.5-9B",
    output_dir="outputs/run",
    precision="bf16",
    gpus=8,
    gpu_memory=80 * GB,
    reserve=0.1,
    settings=[
        Setting("learning_rate", 1e-05, 2e-05, "file run.json"),
        Setting("packing", True, False, "command line"),
        Setting("data_path", ["a.json", "b.json"], None, "file run.json"),
        Setting("train_modules", "llm:2e-5", None, "computed"),
    ],
    notes=["lora_rank is lora_r here"],
    parameters=Parameters(9174000000, 8720000000, [ModuleCount("llm", 8720000000, 0.95, 2e-5)]),
    train=data("train", left_out={"no trained token is left": 3}),
    evaluation=[data("eval", per_epoch=50)],
    layouts=[
        Layout("random", 0.5, 8000, 60, 8, 1.5, False),
        Layout("packing", 0.05, 4000, 9, 2, 1.25, True),
    ],
    steps=Steps(1, 2, 8, 16, 4, 12, 3.0, 1),
    costliest=Costliest(3, 5, 4096, 1000, 2048, True, [SAMPLE]),
    engines=[engine("none", TERMS), engine("zero3", SHARDED, configured=True, host=9 * GB),
             engine("zero3_offload", {"step": GB}, refused="no optimizer of its own")],
    left_out_of_memory=["the CUDA context"],
    compute=Compute(1e15, 3e15, 1e14, 5e14, 2e14, 0.4, 989.0, 5.25, 42.0, 3, 0.5, 131000.0),
    disk=Disk(18 * GB, 109 * GB, 6, 2, 18 * GB, 300 * GB),
    doubts=[Doubt("save_steps", "2000 is longer than the run of 12", "lower it.")],
)  # fmt: skip


@pytest.fixture
def show(tmp_path, open_page):
    """`show(forecast, width=1280, dark=False)` is the browser with its page."""

    def write_and_open(forecast=FORECAST, **screen):
        file = tmp_path / f"page-{len(list(tmp_path.iterdir()))}.html"
        write_page(file, forecast)
        return open_page(file, **screen)

    return write_and_open


def texts(browser, css: str) -> list[str]:
    """Of the elements that are seen."""
    return [e.text for e in browser.find_elements("css selector", css) if e.is_displayed()]


def boxes(browser, css: str) -> list[dict]:
    """Left, top, width, height, class and tooltip of the shapes, left and top in their picture."""
    return browser.execute_script(
        """return [...document.querySelectorAll(arguments[0])].map((e) => {
          const b = e.getBoundingClientRect(), s = e.closest("svg").getBoundingClientRect();
          return {left: (b.x - s.x) / s.width, top: (b.y - s.y) / s.height,
            width: b.width / s.width, height: b.height / s.height,
            colour: getComputedStyle(e).fill, title: e.querySelector("title")?.textContent};
        })""",
        css,
    )


def test_memory_is_drawn_to_one_scale_with_the_limits(show):
    browser = show()
    parts = boxes(browser, "#memory rect")
    assert [part["title"] for part in parts] == [
        "weights: 20.0 GB", "moments: 50.0 GB", "activations: 10.0 GB",
        "weights: 5.0 GB", "moments: 10.0 GB", "activations: 10.0 GB", "optimizer step: 1.0 GB",
    ]  # fmt: skip
    whole = 1.02 * 80
    # A pixel of stroke.
    close = {"abs": 0.003}
    widths = [20, 50, 10, 5, 10, 10, 1]
    assert [p["width"] * whole for p in parts] == pytest.approx(widths, abs=0.003 * whole)
    assert [p["left"] * whole for p in parts] == pytest.approx([0, 20, 70, 0, 5, 15, 0], abs=0.25)
    marks = boxes(browser, "#memory line")
    lefts = [72 / whole, 80 / whole] * 3
    assert [mark["left"] for mark in marks] == pytest.approx(lefts, **close)
    colours = [part["colour"] for part in parts]
    assert colours[:3] == colours[3:6]
    assert len(set(colours)) == 4
    assert texts(browser, "#memory .key li") == [
        "weights",
        "moments",
        "activations",
        "optimizer step",
    ]
    assert texts(browser, "#memory .name, #memory .value") == [
        "none", "80.0 GB too much", "zero3 this run", "25.0 GB fits",
        "zero3_offload", "1.0 GB refused",
    ]  # fmt: skip
    assert texts(browser, "#memory tbody tr") == [
        "none 20.0 GB 50.0 GB 10.0 GB 0 80.0 GB moments backward 0",
        "zero3 this run 5.0 GB 10.0 GB 10.0 GB 0 25.0 GB moments backward 9.0 GB",
        "zero3_offload 0 0 0 1.0 GB 1.0 GB optimizer step backward 0 no optimizer of its own",
    ]


def test_memory_of_a_small_model_is_drawn_to_the_scale_of_its_own(show):
    small = engine("none", {"weights": GB // 4, "moments": 3 * GB // 4}, configured=True)
    browser = show(replace(FORECAST, engines=[small]))
    widths = [part["width"] for part in boxes(browser, "#memory rect")]
    assert widths == pytest.approx([0.25 / 1.02, 0.75 / 1.02], abs=0.003)
    assert boxes(browser, "#memory line") == []
    assert texts(browser, "#memory > p")[0] == (
        "At the costliest micro-batch. The scale ends far below the 80 GB of a GPU and what the "
        "plan would use of it, 72.0 GB."
    )


def test_long_lists_of_samples_scroll_in_their_box(show):
    many = replace(FORECAST.costliest, samples=[SAMPLE] * 100)
    browser = show(replace(FORECAST, costliest=many))
    box = browser.find_element("css selector", "#batches .long .wide")
    assert box.size["height"] == 24 * 16
    assert int(box.get_property("scrollHeight")) > 100 * 20


def test_histograms_are_to_scale(show):
    columns = boxes(show(), "#data .plots:first-of-type figure:first-child rect")
    assert [c["title"] for c in columns] == ["10 to 20: 8", "20 to 30: 2", "30 to 50: 4"]
    assert [c["height"] for c in columns] == pytest.approx([1, 0.25, 0.5], abs=0.01)
    assert [c["top"] + c["height"] for c in columns] == pytest.approx([1] * 3, abs=0.01)
    assert [c["left"] for c in columns] == pytest.approx([0, 1 / 3, 2 / 3], abs=0.01)


def test_histograms_tell_their_numbers(show):
    browser = show()
    assert texts(browser, "#data figcaption") == [
        "Tokens per sample\nmean 20, median 18, largest 50",
        "Visual tokens per sample with media\nmean 6, median 6, largest 8",
        "Supervised share of a sample\nmean 40%, median 25%, largest 90%",
    ]
    assert texts(browser, ".axis") == ["10\n30\n50", "4\n6\n8", "0%\n50%\n100%"]
    browser.find_element("css selector", "summary").click()
    assert len(texts(browser, "#data figcaption")) == 6


def test_packing_is_drawn_without_the_padding_of_the_others(show):
    browser = show()
    parts = boxes(browser, "#batches rect")
    assert [part["title"] for part in parts] == ["4,000 tokens", "4,000 of padding", "4,000 tokens"]
    assert [part["width"] for part in parts] == pytest.approx([0.5] * 3, abs=0.003)
    assert texts(browser, "#batches .name, #batches .value") == [
        "random", "50.0% padding", "packing this run", "5.0% empty, not computed"
    ]  # fmt: skip


def test_numbers_of_the_forecast_are_there(show):
    browser = show()
    assert texts(browser, "header") == [
        "Plan of run.json\n"
        "AIDC-AI/Ovis2.5-9B · bf16 · 8 GPUs of 80 GB · into outputs/run\n"
        "samples per epoch\n60\noptimizer steps\n12\nparameters trained\n8.72 B of 9.17 B\n"
        "expected time\n5.2 h\nmemory per GPU\n25.0 GB fits"
    ]
    assert texts(browser, "#data tbody tr") == [
        "train 50 60 45 4,000 25.0% 50.0% 2 34 3",
        "eval 50 50 45 4,000 25.0% 50.0% 2 34 0",
        "a.json 40 1 40",
        "b.json 10 2 20",
        "train 3 no trained token is left",
        "17 train.json 18 coco_17 4,096 1,024 12",
    ]
    assert texts(browser, "#batches > p") == [
        "16 rows a step (1 per GPU × 8 × 2 accumulated), 4 steps an epoch, 12 in 3 epochs, 1 of "
        "them warmup.",
        "Step 3, process 5: 4,096 tokens with padding, 1,000 trained ones, and 2,048 patches at "
        "once.",
    ]
    assert texts(browser, "#settings tbody tr") == [
        "learning_rate 1e-05 2e-05 file run.json",
        "packing true false command line",
        'data_path ["a.json", "b.json"] file run.json',
        "train_modules llm:2e-5 computed",
    ]
    assert texts(browser, "#settings > ul") == ["lora_rank is lora_r here"]
    assert texts(browser, "#work tbody tr") == ["llm 8,720,000,000 95.0% 2e-05"]
    facts = dict(text.split("\n") for text in texts(browser, "#work .facts div"))
    assert facts == {
        "at an MFU of 0.4 of 989 TFLOPS": "5.2 h",
        "GPU hours": "42.0",
        "3 evaluations on top": "30.0 min",
        "tokens a second": "131,000",
        "operations of an epoch": "1 PFLOP",
        "of the run": "3 PFLOP",
        "on padding, on top": "0.1 PFLOP",
        "computed again, on top": "0.5 PFLOP",
        "of evaluations, on top": "0.2 PFLOP",
        "disk at most": "300.0 GB",
        "a checkpoint": "18.0 GB + 109.0 GB optimizer",
        "checkpoints": "6, of which 2 stay",
        "finished model": "18.0 GB",
    }
    assert texts(browser, ".problems li") == [
        "save_steps\n2000 is longer than the run of 12.\nFix: lower it."
    ]


def test_what_is_not_there_is_left_out(show):
    train = data("train", lengths=NONE, visual=NONE, supervised=NONE)
    one = replace(train, sources=train.sources[:1])
    compute, steps = replace(FORECAST.compute, evaluations=0), replace(FORECAST.steps, epochs=1.0)
    browser = show(
        replace(
            FORECAST,
            train=one,
            evaluation=[],
            compute=compute,
            steps=steps,
            doubts=[],
            notes=[],
            left_out_of_memory=[],
        )
    )
    assert "evaluations" not in browser.find_element("id", "work").text
    assert "12 in 1 epoch, " in texts(browser, "#batches > p")[0]
    assert browser.find_elements("css selector", "figure, .problems, #settings ul, details") == []
    assert texts(browser, "#data h3") == ["Longest samples"]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_is_readable_at_360_pixels(show, faint_text, dark):
    long = replace(SAMPLE, file="folder/" * 40, id="i" * 100)
    browser = show(
        replace(FORECAST, config="c" * 90, train=data("train", longest=[long])),
        width=360,
        dark=dark,
    )
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360
    assert faint_text(browser) == []


def test_data_stays_text_and_no_script_is_allowed(show):
    attack = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    browser = show(
        replace(
            FORECAST,
            config=attack,
            settings=[Setting(attack, attack, [attack], attack)],
            doubts=[Doubt(attack, attack, attack)],
            train=data(attack, longest=[replace(SAMPLE, id=attack, file=attack)]),
        )
    )
    assert browser.execute_script("return window.hacked") is None
    assert browser.find_elements("css selector", "script, img") == []
    assert browser.title == f"Plan of {attack}"
    cells = texts(browser, "#settings td")
    assert cells[0] == cells[1] == cells[3] == attack
    policy = browser.find_element("css selector", "meta[http-equiv]").get_attribute("content")
    assert "script-src 'none'" in policy


def test_page_is_not_written_over(tmp_path):
    file = tmp_path / "page.html"
    file.write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        write_page(file, FORECAST)
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]
