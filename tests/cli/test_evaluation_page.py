"""The page of an evaluation in a real browser: what is seen, shown on request, and never run."""

from pathlib import Path

import pytest
from PIL import Image

from vlmtune.cli.evaluation_page import ROWS, THUMBNAIL, write_page
from vlmtune.core.errors import ConfigError

ATTACKS = [
    "<script>window.hacked = 1</script>",
    "\"'><img src=x onerror='window.hacked = 1'>",
    "</p></td></table><style>* { display: none }</style>",
]


def row(record: int = 1, answer: str = "four", **more) -> dict:
    return {
        "record": record,
        "source": "data.json",
        "id": f"id-{record}",
        "prompt": "<image>\nWhich digit is this?",
        "images": [],
        "video": None,
        "references": ["four"],
        "thinking": "",
        "answer": answer,
        "unfinished_thought": False,
        "ended": "stop",
        "tokens": 3,
        "error": None,
        "scores": {"exact_match": float(answer == "four")},
        **more,
    }


def result(**more) -> dict:
    entry = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 8}
    return {
        "model": "outputs/run1",
        "adapter": [],
        "data": ["data.json"],
        "split": "val",
        "stage": None,
        "records": 8,
        "metrics": {
            "exact_match": entry,
            "cider": {**entry, "value": 1.23456, "tokenizer": "ptb_python"},
            "loss": {**entry, "tokens": 1234, "cut_to_the_length_limit": 2},
            "contrastive_accuracy": {**entry, "images": 8, "texts": 40},
        },
        "left_out": {"contrastive": "the model makes no vectors"},
        "answers": {
            "thoughts": 0.5,
            "unfinished_thoughts": 0.125,
            "ended_by_length": 0.25,
            "without_reference": 0.0,
            "tokens": 12.345,
        },
        "errors": [],
        "settings": {"max_new_tokens": 96},
        "versions": {"torch": "2.13.0"},
        **more,
    }


@pytest.fixture
def show(tmp_path, open_page):
    """`show(rows, **of_result)` is the browser with their page."""

    def write_and_open(rows, width: int = 1280, dark: bool = False, **of_result):
        file = tmp_path / f"page-{len(list(tmp_path.iterdir()))}.html"
        write_page(file, result(**of_result), rows)
        return open_page(file, width, dark)

    return write_and_open


def find(browser, css: str):
    return browser.find_element("css selector", css)


def texts(browser, css: str) -> list[str]:
    """Of the elements that are seen."""
    return [e.text for e in browser.find_elements("css selector", css) if e.is_displayed()]


def records(browser) -> list[int]:
    """Of the rows that are seen, in order."""
    places = texts(browser, "tbody td:nth-child(2) .muted")
    return [int(place.split()[1]) for place in places]


def test_head_tells_metrics_shares_and_settings(show):
    browser = show([row()])
    assert texts(browser, "h1") == ["Evaluation of outputs/run1 on data.json"]
    names, figures = (texts(browser, f"header > .facts {tag}") for tag in ("dt", "dd"))
    facts = dict(zip(names, figures, strict=True))
    assert facts == {
        "records": "8",
        "split": "val",
        "with a thought": "50.0%",
        "unfinished where asked for": "12.5%",
        "ended by length": "25.0%",
        "without a reference": "0.0%",
        "tokens per answer": "12.3",
        "errors": "0",
    }
    assert texts(browser, "header tbody tr") == [
        "exact_match 0.5000 0.2500 to 0.7500 8",
        "cider 1.2346 0.2500 to 0.7500 8 tokenizer ptb_python",
        "loss 0.5000 0.2500 to 0.7500 8 1,234 tokens, 2 cut to the length limit",
        "contrastive_accuracy 0.5000 0.2500 to 0.7500 8 8 images, 40 texts",
    ]
    assert texts(browser, "header li") == []
    for summary in browser.find_elements("css selector", "header summary"):
        summary.click()
    assert texts(browser, "header li") == ["contrastive: the model makes no vectors"]
    assert texts(browser, "header details .facts div") == ["max_new_tokens\n96", "torch\n2.13.0"]


def test_errors_and_the_worst_answers_come_first(show):
    browser = show(
        [
            row(1),
            row(2, "five", scores={"exact_match": 0.0, "anls": 0.5}),
            row(3, "six", scores={"exact_match": 0.0, "anls": 0.0}),
            row(4, scores={}),
            row(5, "", error="data.json, record 5: gone. Fix: find it"),
        ]
    )
    assert records(browser) == [5, 3, 2, 1, 4]
    assert texts(browser, "tbody tr.wrong .said") == ["six", "five"]
    assert texts(browser, "tbody tr:first-child .error") == [
        "data.json, record 5: gone. Fix: find it"
    ]
    assert texts(browser, "tbody tr:nth-child(3) dl div") == ["exact_match\n0", "anls\n0.5"]


def test_filter_shows_exactly_the_rows_of_its_kind(show):
    cut = {"ended": "length", "tokens": 16}
    browser = show(
        [
            row(1),
            row(2, "five"),
            row(3, "", thinking="hm", unfinished_thought=True, **cut),
            row(4, "six", **cut),
            row(5, "", error="broken"),
        ]
    )
    shown = {}
    for label in browser.find_elements("css selector", ".tools label"):
        label.click()
        shown[label.text] = records(browser)
    assert shown == {
        "all (5)": [5, 2, 3, 4, 1],
        "errors (1)": [5],
        "wrong (3)": [2, 3, 4],
        "right (1)": [1],
        "thought unfinished (1)": [3],
        "ended by length (2)": [3, 4],
    }
    assert texts(browser, "tbody .warning") == [
        "no answer: the thought was not finished",
        "ended by length, at 16 tokens",
        "ended by length, at 16 tokens",
    ]


def test_thoughts_are_folded_and_references_told_once(show):
    thought = "<think>\nby eye\n</think>\n\nfour"
    browser = show([row(thinking="let me see", references=["4", thought, "4"])])
    cells = texts(browser, ".answers td")
    assert cells[1:4] == [
        "Which digit is this?\nrecord 1 · id-1",
        "4 × 2\nfour\nThought",
        "four\nThought",
    ]
    for summary in browser.find_elements("css selector", "tbody summary"):
        summary.click()
    assert texts(browser, ".answers td")[2:4] == [
        "4 × 2\nfour\nThought\nby eye",
        "four\nThought\nlet me see",
    ]


def test_thumbnails_stand_beside_the_question(show, tmp_path):
    for name, size in {"small": (48, 32), "large": (640, 320)}.items():
        Image.new("RGB", size, "teal").save(tmp_path / f"{name}.png")
    files = [str(tmp_path / f"{name}.png") for name in ("small", "large", "gone", "small", "x")]
    browser = show([row(images=files, prompt="<image>\n<image>\nWhich is <image>?")])
    images = browser.find_elements("css selector", "td img")
    sizes = [(i.get_property("naturalWidth"), i.get_property("naturalHeight")) for i in images]
    assert sizes == [(48, 32), (THUMBNAIL, THUMBNAIL // 2), (48, 32)]
    assert [i.get_attribute("alt") for i in images] == [files[0], files[1], files[3]]
    assert texts(browser, ".answers td:first-child .muted") == [files[2], "and 1 more"]
    assert texts(browser, "td:nth-child(2) p")[0] == "Which is <image>?"
    browser = show([row(video="clip.mp4")])
    assert texts(browser, ".answers td:first-child") == ["clip.mp4"]


def test_scores_of_captions_alone_are_neither_right_nor_wrong(show):
    browser = show([row(n, scores={"cider": value}) for n, value in ((1, 2.0), (2, 0.5))])
    assert records(browser) == [2, 1]
    assert texts(browser, ".tools label") == ["all (2)"]


def test_without_answers_there_is_no_table_of_them(show):
    browser = show([], answers=None)
    assert browser.find_elements("css selector", "main") == []


def test_page_of_many_answers_shows_the_worst_and_says_so(show):
    browser = show([row(n, "four" if n % 2 else "five") for n in range(1, ROWS + 102)])
    assert len(browser.find_elements("css selector", ".answers tbody tr")) == ROWS
    assert f"The worst {ROWS:,} of {ROWS + 101:,} answers." in find(browser, ".tools").text
    assert len(browser.find_elements("css selector", "tr.wrong")) == (ROWS + 101) // 2


def test_data_stays_text(show):
    script, image, closing = ATTACKS
    browser = show(
        [
            row(
                prompt=script,
                answer=image,
                id=closing,
                references=[script, closing],
                thinking=closing,
                images=[image],
                scores={image: 1.0},
            )
        ],
        model=script,
        left_out={script: image},
        errors=[{"record": 1, "error": closing}],
        settings={image: script},
    )
    assert browser.execute_script("return window.hacked") is None
    for summary in browser.find_elements("css selector", "summary"):
        summary.click()
    assert texts(browser, "h1") == [f"Evaluation of {script} on data.json"]
    assert texts(browser, "header li") == [f"{script}: {image}", f"record 1: {closing}"]
    assert texts(browser, "td:nth-child(2) p") == [script, f"record 1 · {closing}"]
    assert texts(browser, "td:nth-child(3) p") == [script, closing]
    assert texts(browser, "td:nth-child(4) p") == [image, closing]
    assert texts(browser, "td:nth-child(1) .muted") == [image]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_page_is_readable(width, dark, show, faint_text, tmp_path):
    Image.new("RGB", (640, 320), "teal").save(tmp_path / "a.png")
    names = ("exact_match", "vqa_accuracy", "relaxed_accuracy", "bleu_4", "cider", "loss")
    rows = [
        row(1, "x" * 300, images=[str(tmp_path / "a.png")] * 6, scores=dict.fromkeys(names, 0.123)),
        row(2, thinking="hm", ended="length", references=["a", "a"]),
        row(3, "", error="y" * 200, images=["folder/" * 30 + "b.png"]),
        row(4, "", unfinished_thought=True, references=[]),
    ]
    browser = show(rows, width, dark, errors=[{"record": 3, "error": "y" * 200}])
    for summary in browser.find_elements("css selector", "summary"):
        summary.click()
    assert browser.execute_script("return document.documentElement.scrollWidth") == width
    assert faint_text(browser) == []


def test_page_is_never_written_over(tmp_path):
    file: Path = tmp_path / "page.html"
    file.write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        write_page(file, result(), [row()])
    assert file.read_text() == "mine"
