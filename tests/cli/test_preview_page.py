"""The preview page in a real browser: what is seen, hovered, filtered, and never run."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmtune.cli.main import main
from vlmtune.cli.preview_page import MAX_PIXELS, write_page
from vlmtune.collators.pieces import Piece, Token
from vlmtune.collators.preview import Medium, Preview, Problem, RowPlace
from vlmtune.core.errors import ConfigError

ROOT = Path(__file__).parents[2]
TRAINED, UNDERLINE = (211, 240, 218), (26, 127, 55)
DARK_TRAINED, DARK_UNDERLINE = (18, 57, 31), (63, 185, 80)
ATTACKS = [
    "<script>window.hacked = 1</script>",
    "\"'><img src=x onerror='window.hacked = 1'>",
    "</div></article><style>* { display: none }</style>",
    "&lt;b&gt; &amp;quot;",
]


def piece(kind: str, *texts: str, trained: bool = False, first: int = 100) -> Piece:
    """Of one token per text, with ids from `first`."""
    ids = range(first, first + len(texts))
    return Piece(
        kind,
        trained,
        [Token([i], [i if trained else -100], t) for i, t in zip(ids, texts, strict=True)],
    )


def media(kind: str = "image", number: int = 0, tokens: int = 6) -> Piece:
    ids = [-301, *[-300] * tokens, -302]
    name = f"⟨{kind} {number + 1}: 2×3 → {tokens} tokens⟩"
    return Piece(kind, False, [Token(ids, [-100] * len(ids), name)], number)


def medium(file: str = "a.png", width: int = 96, height: int = 64) -> Medium:
    return Medium("image", file, 300, 200, width, height, (1, 4, 6), 6, 1, 1)


def preview(index: int = 0, pieces=None, media=(), problems=(), **more) -> Preview:
    pieces = pieces or [
        piece("prompt", "Hi", "!\n"),
        piece("answer", "Yes", ",", " two", trained=True),
        piece("stop", "<|im_end|>", trained=True, first=9),
    ]
    return Preview(
        **{
            "index": index,
            "source": "train.json",
            "record": index + 1,
            "id": f"id-{index}",
            "length": sum(p.length for p in pieces),
            "trained_tokens": sum(p.length for p in pieces if p.trained),
            "cut": 0,
            "pieces": pieces,
            "media": list(media),
            "problems": [Problem(code, "warning", "f", "what", "fix") for code in problems],
            **more,
        }
    )


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def show(tmp_path, open_page):
    """`show(previews, images)` is the browser with their page."""

    def write_and_open(previews, images=None, **screen):
        file = tmp_path / f"page-{len(list(tmp_path.iterdir()))}.html"
        write_page(file, previews, images or [[] for _ in previews], "A title")
        return open_page(file, **screen)

    return write_and_open


def find(browser, css: str):
    return browser.find_element("css selector", css)


def texts(browser, css: str) -> list[str]:
    """Of the elements that are seen."""
    return [e.text for e in browser.find_elements("css selector", css) if e.is_displayed()]


def hover(browser, element) -> str:
    from selenium.webdriver import ActionChains

    moves = ActionChains(browser, duration=0)
    moves.scroll_to_element(element).move_to_element(element).perform()
    return find(browser, "#tip").text


def pixels(browser, element, below: int = 0) -> np.ndarray:
    """What is drawn where the element is, and `below` pixels further down."""
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    box = browser.execute_script(
        "const b = arguments[0].getBoundingClientRect(); return [b.x, b.y, b.right, b.bottom]",
        element,
    )
    screen = Image.open(BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    left, top, right, bottom = (round(n) for n in box)
    return np.array(screen.crop((left, top, right, bottom + below)))


def share(drawn: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((drawn == colour).all(-1).mean())


def test_pointer_on_a_token_shows_its_id_label_and_position(show):
    emoji = Token([5, 6, 7], [5, 6, 7], "😀")
    pieces = [
        piece("prompt", "Look", "\n"),
        media(),
        piece("answer", " yes", trained=True, first=872),
        Piece("answer", True, [emoji]),
    ]
    browser = show([preview(pieces=pieces)], [[]])
    tokens = browser.find_elements("css selector", ".pieces i")
    assert [hover(browser, token) for token in tokens] == [
        '"Look"\nid 100\nlabel -100 (not trained)\nposition 0',
        '"\\n"\nid 101\nlabel -100 (not trained)\nposition 1',
        '"⟨image 1: 2×3 → 6 tokens⟩"\nids -301, -300 × 6, -302\n'
        "labels -100 × 8 (not trained)\nposition 2 to 9",
        '" yes"\nid 872\nlabel 872 (trained)\nposition 10',
        '"😀"\nids 5, 6, 7\nlabels 5, 6, 7 (trained)\nposition 11 to 13',
    ]
    assert hover(browser, find(browser, "h1")) == ""


def test_arrow_keys_go_from_token_to_token_and_escape_leaves(show):
    from selenium.webdriver import Keys

    browser = show([preview()])
    pieces, tip = find(browser, ".pieces"), find(browser, "#tip")
    seen = []
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.ESCAPE):
        pieces.send_keys(key)
        seen.append(tip.text.split("\n")[0])
    assert seen == ['"Hi"', '"!\\n"', '"Hi"', ""]
    find(browser, "[name=trained]").click()
    pieces.send_keys(Keys.ARROW_RIGHT)
    assert tip.text.startswith('"Yes"')


@pytest.mark.parametrize(
    ("dark", "colour", "line"),
    [(False, TRAINED, UNDERLINE), (True, DARK_TRAINED, DARK_UNDERLINE)],
    ids=["light", "dark"],
)
def test_trained_text_alone_has_the_colour_and_the_underline(show, dark, colour, line):
    browser = show([preview()], dark=dark)
    drawn = {
        name: pixels(browser, find(browser, f".piece.{name} .text"))
        for name in ("prompt", "answer", "stop")
    }
    words = browser.find_elements("css selector", ".answer i")
    assert share(drawn["prompt"], colour) == share(drawn["prompt"], line) == 0
    for name in ("answer", "stop"):
        assert share(drawn[name], colour) > 0.01
        assert share(drawn[name], line) > 0.001
    assert len(words) == 3
    for word in words:
        assert share(pixels(browser, word), colour) > 0.4
        rows = pixels(browser, word, below=4)[:, 1:-1]
        assert any((row == line).all() for row in rows)  # a line from end to end
    assert texts(browser, ".kind") == ["prompt\n2 tokens", "answer\n3 tokens · trained",
                                       "stop\n1 token · trained"]  # fmt: skip


def test_thumbnail_is_the_resized_image_pixel_by_pixel(show):
    images = [noise(96, 64), noise(64, 192, seed=1)]
    sample = preview(
        pieces=[media(), media(number=1), piece("answer", "a", trained=True)],
        media=[medium("a.png"), medium("b.png", 64, 192)],
    )
    browser = show([preview(5), sample], [[], images])
    shown = browser.find_elements("css selector", "figure img")
    assert len(shown) == 2
    for element, image in zip(shown, images, strict=True):
        assert np.array_equal(pixels(browser, element), np.array(image))
    assert texts(browser, "figcaption") == [
        "image 1 a.png\n300×200 → 96×64 px\n4×6 patches → 6 tokens",
        "image 2 b.png\n300×200 → 64×192 px\n4×6 patches → 6 tokens",
    ]


def test_large_image_is_small_until_it_is_clicked(show):
    image = noise(700, 500)
    browser = show([preview(media=[medium(width=700, height=500)])], [[image]])
    picture, button = find(browser, "figure img"), find(browser, "figure button")
    assert max(picture.size.values()) <= 240
    assert button.get_attribute("aria-expanded") == "false"
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    assert np.array_equal(pixels(browser, picture), np.array(image))
    button.click()
    assert max(picture.size.values()) <= 240


def test_image_beyond_the_limit_is_shown_smaller_and_says_so(show):
    width, height = 2048, 1024
    browser = show([preview(media=[medium()])], [[Image.new("RGB", (width, height), "teal")]])
    natural = browser.execute_script(
        "const i = document.querySelector('img'); return [i.naturalWidth, i.naturalHeight]"
    )
    assert natural == [1448, 724]
    assert natural[0] * natural[1] <= MAX_PIXELS < 1449 * 725
    assert texts(browser, "figcaption")[0].endswith("6 tokens\nshown at 1448×724")


def test_video_shows_its_frames_and_the_next_medium_keeps_its_own(show):
    video = Medium("video", "v.mp4", 300, 200, 96, 64, (2, 4, 6), 12, 4, 90)
    frames = [noise(96, 64, seed) for seed in range(5)]
    browser = show([preview(media=[video, medium("z.png")])], [frames])
    figures = browser.find_elements("css selector", "figure")
    counts = [len(figure.find_elements("css selector", "img")) for figure in figures]
    assert counts == [4, 1]
    assert np.array_equal(pixels(browser, find(browser, "figure:last-child img")), frames[4])
    assert texts(browser, "figcaption")[0] == (
        "video 1 v.mp4\n4 of 90 frames, 300×200 → 96×64 px\n2×4×6 patches → 12 tokens"
    )


def test_filter_by_problem_hides_exactly_the_other_samples(show):
    from selenium.webdriver.support.ui import Select

    problems = [["too-long"], [], ["box-outside", "too-long", "too-long"], ["too-long-ago"]]
    browser = show([preview(i, problems=codes) for i, codes in enumerate(problems)])
    chooser = Select(find(browser, "[name=problem]"))
    shown = {}
    for option in chooser.options:
        chooser.select_by_visible_text(option.text)
        headings = [heading.split()[-1] for heading in texts(browser, "article h2")]
        shown[option.text] = (headings, find(browser, "output").text)
    everything = ["id-0", "id-1", "id-2", "id-3"]
    assert shown == {
        "all samples (4)": (everything, "4 of 4 samples shown"),
        "any problem (3)": (["id-0", "id-2", "id-3"], "3 of 4 samples shown"),
        "no problem (1)": (["id-1"], "1 of 4 samples shown"),
        "box-outside (1)": (["id-2"], "1 of 4 samples shown"),
        "too-long (2)": (["id-0", "id-2"], "2 of 4 samples shown"),
        "too-long-ago (1)": (["id-3"], "1 of 4 samples shown"),
    }


def test_problems_are_told_with_their_fix(show):
    error = Problem("no-supervision", "error", "conversations", "nothing is left", "drop it?")
    browser = show([preview(problems=["too-long"]), preview(1, cut=34)])
    assert texts(browser, ".problems li") == ["too-long warning f\nwhat.\nFix: fix."]
    assert texts(browser, "header .facts") == ["samples\n2\ntokens\n12\ntrained\n8 (66.7%)"]
    assert texts(browser, "header tbody tr") == ["0 id-0 6 4 too-long", "1 id-1 6 4"]
    assert texts(browser, "header .key li") == ["prompt 4", "answer 6", "stop 2"]
    assert texts(browser, "article > p") == [
        "6 tokens · 4 trained (66.7%)",
        "6 tokens · 4 trained (66.7%) · 34 cut away by the length limit",
    ]
    browser = show([preview(problems=[]), preview(1, problems=[])])
    assert texts(browser, ".tools")[0].startswith("No problems found")
    browser = show([Preview(**{**vars(preview()), "problems": [error]})])
    assert texts(browser, ".problems li.error") == [
        "no-supervision error conversations\nnothing is left.\nFix: drop it?"
    ]


def test_only_trained_hides_what_is_not(show):
    nothing = preview(1, pieces=[piece("prompt", "a", "b")])
    browser = show([preview(), nothing])
    find(browser, "[name=trained]").click()
    assert texts(browser, ".kind b") == ["answer", "stop"]
    assert texts(browser, ".nothing") == ["Nothing of it is trained."]
    find(browser, "[name=trained]").click()
    assert texts(browser, ".kind b") == ["prompt", "answer", "stop", "prompt"]
    assert texts(browser, ".nothing") == []


def test_packed_rows_show_their_samples_in_order_and_to_scale(show):
    def place(row: int, start: int, tokens: int) -> RowPlace:
        return RowPlace(row, start, tokens, 24)

    previews = [
        preview(7, place=place(0, 0, 12)),
        preview(3, place=place(0, 6, 12), problems=["too-long"]),
        preview(7, place=place(4, 0, 6)),
    ]
    browser = show(previews)
    assert texts(browser, ".row > h2") == [
        "Row 0 · 2 samples · 12 of 24 tokens (50.0% full)",
        "Row 4 · 1 sample · 6 of 24 tokens (25.0% full)",
    ]
    rows = browser.find_elements("css selector", ".row")
    assert [texts(row, "h2 .index") for row in rows] == [["Sample 7", "Sample 3"], ["Sample 7"]]
    assert [texts(row, "article > p") for row in rows] == [
        ["6 tokens · 4 trained (66.7%) · 50.0% of row 0"] * 2,
        ["6 tokens · 4 trained (66.7%) · 100.0% of row 4"],
    ]  # fmt: skip
    bar = rows[0].find_element("css selector", ".bar")
    shares = [p.size["width"] for p in bar.find_elements("css selector", "rect")]
    assert shares == pytest.approx([bar.size["width"] / 4] * 2, abs=1.5)

    from selenium.webdriver.support.ui import Select

    Select(find(browser, "[name=problem]")).select_by_value("code too-long")
    assert texts(browser, ".row > h2")[0].startswith("Row 0")
    assert len(texts(browser, ".row > h2")) == 1


def test_data_stays_text(show):
    sample = preview(
        pieces=[piece("prompt", *ATTACKS), piece("answer", *ATTACKS, trained=True)],
        media=[medium(ATTACKS[1])],
        id=ATTACKS[1],
        source=ATTACKS[0],
    )
    problem = Problem("too-long", "warning", *ATTACKS[:3])
    sample = Preview(**{**vars(sample), "problems": [problem]})
    other = preview(1, id=ATTACKS[2])
    browser = show([sample, other], [[noise(8, 8)], []])
    assert browser.execute_script("return window.hacked") is None
    assert [
        e.get_property("textContent") for e in browser.find_elements("css selector", ".answer i")
    ][: len(ATTACKS)] == ATTACKS
    assert texts(browser, "article h2") == [f"Sample 0 {ATTACKS[1]}", f"Sample 1 {ATTACKS[2]}"]
    assert texts(browser, "article .muted")[0] == f"{ATTACKS[0]}, record 1"
    assert texts(browser, ".problems li") == [
        f"too-long warning {ATTACKS[0]}\n{ATTACKS[1]}.\nFix: {ATTACKS[2]}."
    ]
    assert hover(browser, find(browser, ".answer i")).startswith(json.dumps(ATTACKS[0]))


def test_no_script_but_the_pages_own_is_run(tmp_path, open_page, chromium):
    file = tmp_path / "page.html"
    write_page(file, [preview()], [[]], "A title")
    foreign = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    page = file.read_text("utf-8")
    (tmp_path / "changed.html").write_text(page.replace("</body>", f"{foreign}</body>"), "utf-8")
    chromium.get((tmp_path / "changed.html").as_uri())
    assert chromium.execute_script("return window.hacked") is None
    refused = chromium.get_log("browser")
    assert len(refused) >= 2
    assert all("Content Security Policy" in entry["message"] for entry in refused)
    chromium.get_log("performance")


def test_every_character_is_there_or_has_a_picture(show):
    given = "a\r\n\tb\x00\x1b\x7f\ud800\u202egnp.exe é 漢 \U0001f600"
    browser = show([preview(pieces=[piece("answer", given, "\n", trained=True)])])
    shown = find(browser, ".answer .text").get_property("textContent")
    assert shown == "a␍\n\tb␀␛␡\ufffd\ufffdgnp.exe é 漢 \U0001f600\n"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_is_readable_at_360_pixels(show, faint_text, dark):
    long = preview(
        pieces=[media(), piece("answer", "x" * 300, trained=True)],
        media=[medium(f"{'folder' * 30}/a.png", 700, 500)],
        problems=["too-long"],
        id="i" * 120,
        place=RowPlace(0, 0, 20, 40),
    )
    browser = show([long, preview(1)], [[noise(700, 500)], []], width=360, dark=dark)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360
    assert faint_text(browser) == []
    hover(browser, find(browser, ".answer i"))
    box = find(browser, "#tip").rect
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360


def test_thirty_thousand_tokens_are_there_in_seconds(show):
    words = [f" w{i}" for i in range(30_000)]
    browser = show([preview(pieces=[piece("answer", *words, trained=True)])])
    milliseconds = browser.execute_script(
        "const t = performance.timing; return t.loadEventEnd - t.navigationStart"
    )
    assert milliseconds < 5000
    assert browser.execute_script("return document.querySelectorAll('i').length") == 30_000
    last = find(browser, ".answer i:last-child")
    assert hover(browser, last).startswith('" w29999"\nid 30099')


def test_command_writes_the_page_of_a_sample_with_two_images_and_a_thought(
    tiny_ovis, tmp_path, open_page, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    file = tmp_path / "page.html"
    words = ["configs/presets/quickstart.json", "--model_path", str(tiny_ovis), "--index", "33"]
    assert main(["preview", *words, "--eval_data_path", "[]", "--html", str(file)]) == 0
    browser = open_page(file)
    assert texts(browser, "article h2") == ["Sample 33 compare-0034"]
    assert texts(browser, ".kind b") == [
        "prompt", "image", "prompt", "image", "prompt", "thought", "answer", "stop"
    ]  # fmt: skip
    trained = [
        e.get_property("textContent")
        for e in browser.find_elements("css selector", ".trained .text")
    ]
    assert trained == [
        "<think>\nThe first image shows 7, the second shows 0.\n</think>\n\n",
        "The first image.",
        "<|im_end|>",
    ]
    shown = browser.find_elements("css selector", "figure img")
    for element, name in zip(shown, ("digit_0042.png", "digit_0560.png"), strict=True):
        with Image.open(ROOT / "sample_data/images" / name) as image:
            assert np.array_equal(pixels(browser, element), np.array(image.convert("RGB")))


def test_page_is_never_written_over_or_half(tmp_path):
    file = tmp_path / "page.html"
    file.write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        write_page(file, [preview()], [[]], "A title")
    assert file.read_text() == "mine"
    with pytest.raises(ConfigError, match="no folder"):
        write_page(tmp_path / "none" / "page.html", [preview()], [[]], "A title")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
