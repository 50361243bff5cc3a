"""`vlmtune infer` as it is typed: what it prints, writes and refuses, and how fast."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from vlmtune.cli.answer_text import how_it_ended
from vlmtune.cli.inference_flags import add_model_flags, add_sampling_flags, answer_settings
from vlmtune.cli.main import main
from vlmtune.data.sources import Source
from vlmtune.inference import Reply, Sampling

THOUGHT = "The first shows 6, the second shows 5."
ANSWER = "The first, since 6 is larger than 5."
LARGER = ["--prompt", "Which image shows the larger digit?"]


@pytest.fixture
def infer(fluent_ovis, tmp_path, monkeypatch, capsys):
    """`infer(word, ...)` is exit code, stdout and stderr, with the images and `records.json` of the
    model in the working directory."""
    shutil.copytree(fluent_ovis / "images", tmp_path / "images")
    shutil.copy(fluent_ovis / "records.json", tmp_path)
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        flags = ["--model", str(fluent_ovis), "--device", "cpu", "--max_new_tokens", "96"]
        code = main(["infer", *flags, *words])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


def digit(number: str) -> str:
    return f"images/digit_{number}.png"


def test_answer_to_a_question_about_an_image(infer):
    asked = infer("--image", digit("0675"), "--prompt", "Which digit is this?")
    assert asked == (0, "It is a four.\n", "")


def test_question_without_media_with_a_system_prompt(infer):
    asked = infer("--prompt", "Say hello.", "--system", "Be kind.")
    assert asked == (0, "Grüße, 你好 👋!\n", "")


def test_thought_stands_before_the_answer(infer):
    asked = infer("--image", digit("0605"), digit("0654"), *LARGER, "--thinking")
    assert asked == (0, f"thinking:\n{THOUGHT}\n\nanswer:\n{ANSWER}\n", "")
    asked = infer("--image", digit("0605"), "--image", digit("0654"), *LARGER, "--no_thinking")
    assert asked == (0, "The first image.\n", "")


def test_thought_is_dimmed_on_a_terminal(infer, monkeypatch):
    read, written = os.openpty()
    for name, value in (("TERM", "xterm"), ("NO_COLOR", "")):
        monkeypatch.setenv(name, value)
    with os.fdopen(written, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert infer("--image", digit("0605"), digit("0654"), *LARGER, "--thinking")[0] == 0
    told = b""
    with suppress(OSError):  # the other end is closed
        while part := os.read(read, 1 << 16):
            told += part
    os.close(read)
    told = told.decode().replace("\x1b[0m\x1b[2m", "")
    assert told == f"\x1b[2m{THOUGHT}\x1b[0m\r\n\r\n{ANSWER}\r\n"


def test_answer_that_is_cut_off_says_so(infer):
    words = ["--image", digit("0605"), digit("0654"), *LARGER, "--thinking"]
    code, out, told = infer(*words, "--max_new_tokens", "5")
    assert (code, out.startswith("thinking:\n")) == (0, True)
    assert told == "note: the thought was cut off at 5 new tokens\n"


def test_question_that_cannot_be_answered_leaves_stdout_empty(infer):
    code, out, told = infer("--image", digit("0675"), "--prompt", "<image> or <image>?")
    assert (code, out) == (1, "")
    assert told.startswith('DataError: request:\n  2 "<image>" placeholders, but 1 given.')


def test_call_that_cannot_be_answered_is_told():
    reply = Reply.of("An <image>. <tool_call>Crop []</tool_call>", [], "tool_call")
    told = "the answer ends at a call that stands behind the text of a mark, such as <image>"
    assert how_it_ended(reply, Sampling()) == told


def test_json_has_the_boxes_in_pixels_of_the_image(infer):
    code, out, told = infer("--image", digit("0675"), "--prompt", "Where is the digit?", "--json")
    found = json.loads(out)
    assert (code, told) == (0, "")
    assert 0 < found.pop("seconds") < 60
    assert found.pop("tokens") > 5
    answer = "At <box>(250,125),(750,875)</box>."
    assert found == {
        "text": answer,
        "thinking": "",
        "answer": answer,
        "unfinished_thought": False,
        "ended": "stop",
        "tool_rounds": 0,
        "error": None,
        "boxes": [[16, 8, 48, 56]],
        "points": [],
    }


def test_json_of_one_image_has_its_boxes_and_points_where_there_are_none(infer):
    asked = infer("--image", digit("0675"), "--prompt", "Which digit is this?", "--json")
    found = json.loads(asked[1])
    assert (found["answer"], found["boxes"], found["points"]) == ("It is a four.", [], [])


def test_json_of_several_images_has_thought_and_answer(infer):
    words = ["--image", digit("0605"), digit("0654"), *LARGER, "--thinking", "--json"]
    found = json.loads(infer(*words)[1])
    assert (found["thinking"], found["answer"], "boxes" in found) == (THOUGHT, ANSWER, False)


def test_tool_is_called(infer):
    words = ["--image", digit("0675"), "--prompt", "Look closely. Which digit is this?"]
    _, out, _ = infer(*words, "--tools", "crop")
    assert out == (
        "I look.\n<tool_call>Crop [250, 125, 750, 875]</tool_call>"
        "<tool_response><image></tool_response>\nSeen closely, it is a four.\n"
    )


def test_data_file_is_answered_once(infer):
    words = ["--data", "records.json", "--image_folder", "images", "--output", "out.jsonl"]
    words += ["--tools", "crop"]
    assert infer(*words) == (0, "", "out.jsonl: 7 records\n")
    content = Path("out.jsonl").read_text("utf-8")
    rows = [json.loads(line) for line in content.splitlines()]
    expected = [
        r["conversations"][-1]["value"] for r in json.loads(Path("records.json").read_text())
    ]
    assert [row["references"] for row in rows] == [[text] for text in expected]
    assert [row["answer"] for row in rows] == [text.split("\n\n")[-1] for text in expected]
    told = "out.jsonl is there already, made with these settings\nout.jsonl: 7 records\n"
    assert infer(*words, "--batch_size", "2") == (0, "", told)
    assert Path("out.jsonl").read_text("utf-8") == content
    code, _, told = infer(*words, "--thinking", "--seed", "3")
    assert code == 1
    assert "thinking was not given, is true; seed was not given, is 3." in told


def test_record_that_cannot_be_answered_is_told_and_in_the_exit_code(infer):
    records = json.loads(Path("records.json").read_text("utf-8"))[:3]
    records[1]["image"][0] = "gone.png"
    Path("some.json").write_text(json.dumps(records), "utf-8")
    words = ["--data", "some.json", "--image_folder", "images", "--output", "out.jsonl"]
    code, _, told = infer(*words)
    assert code == 1
    assert told.startswith(
        "out.jsonl: 3 records\n1 could not be answered, the first: some.json, record 2 "
        '(id "larger"), image 1: images/gone.png does not exist. Fix: '
    )
    assert (infer(*words)[0], infer(*words, "--limit", "1", "--output", "one.jsonl")[0]) == (1, 0)


def test_terminated_run_keeps_what_is_answered_and_goes_on(infer):
    records = json.loads(Path("records.json").read_text("utf-8"))
    Path("many.json").write_text(json.dumps(records * 8), "utf-8")
    words = ["--data", "many.json", "--image_folder", "images", "--output", "out.jsonl"]
    words += ["--batch_size", "1"]
    part = Path("out.jsonl.parts/rank-0.jsonl")

    def stop() -> None:
        while not (part.exists() and part.stat().st_size):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    code, _, told = infer(*words)
    thread.join()
    kept = "What is done is kept in out.jsonl.parts; the same command goes on from there."
    assert (code, told) == (143, f"{kept}\nStopped.\n")
    first = part.read_text("utf-8").splitlines()[0]
    assert not Path("out.jsonl").exists()
    part.write_text(first.replace("four", "five") + "\n", "utf-8")
    assert infer(*words, "--batch_size", "8") == (0, "", "out.jsonl: 56 records\n")
    rows = [json.loads(line) for line in Path("out.jsonl").read_text("utf-8").splitlines()]
    assert [row["answer"] for row in rows[::7]] == ["It is a five.", *["It is a four."] * 7]


REFUSED = [
    (["--image", "a.png", "--prompt", "Q", "--data", "d.json", "--output", "o.jsonl"], "image:"),
    (["--image", "a.png"], "prompt:"),
    (["--prompt", "Q", "--limit", "3"], "limit:\n  has no effect without --data."),
    (["--data", "d.json"], "output:\n  is not given."),
    (["--data", "d.json", "--output", "o", "--image_folder", "no"], "there is no folder no."),
    (["--data", "no.json", "--output", "o.jsonl"], "no.json:\n  there is no such file."),
    (
        ["--data", "d.json", "--output", "no/o.jsonl"],
        "output no/o.jsonl:\n  there is no folder no.",
    ),
    (["--data", "d.json", "--output", "other.jsonl"], "limit was 5, is not given"),
    (["--data", "d.json", "--output", "d.json"], "output d.json:\n  is there already"),
    (["--image", "a.png", "--video", "v.mp4", "--prompt", "Q"], "video:"),
    (["--image", "no.png", "--prompt", "Q"], "image:\n  no.png does not exist."),
    (["--video", "no.mp4", "--prompt", "Q"], "video:\n  no.mp4 does not exist."),
    (["--prompt", "Q", "--thinking_budget", "9"], "has no effect without --thinking."),
    (["--data", "d.json", "--output", "o", "--no_thinking", "--thinking_budget", "9"], "--no_"),
    (
        ["--prompt", "Q", "--thinking", "--thinking_budget", "64", "--max_new_tokens", "64"],
        "leaves",
    ),
    (["--prompt", "Q", "--temperature", "0"], "temperature:"),
    (["--prompt", "Q", "--adapter", "./no:0.5"], "no:\n  there is no such folder."),
    (["--prompt", "Q", "--min_pixels", "9", "--max_pixels", "8"], "9 is more than max_pixels, 8."),
    (["--prompt", "Q", "--model", "./no"], "no:\n  there is no such folder."),
]


def test_mistakes_are_refused_at_once_without_torch(tmp_path):
    (tmp_path / "model").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "d.json").write_text('[{"conversations": [{"from": "human", "value": "Q"}]}]')
    (tmp_path / "other.jsonl").write_text("")
    (tmp_path / "other.jsonl.settings.json").write_text('{"limit": 5}')
    command = (
        "import sys, time\nbegun = time.process_time()\n"
        "from vlmtune.cli.main import main\n"
        f"for words in {[words for words, _ in REFUSED]}:\n"
        "    code = main(['infer', '--model', 'model', *words])\n"
        "    print('--', file=sys.stderr)\n"
        "    print(code, 'torch' in sys.modules, time.process_time() - begun < 0.3)\n"
        "    begun = time.process_time()\n"
    )
    words = [sys.executable, "-c", command]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines() == ["1 False True"] * len(REFUSED), done.stderr
    told = done.stderr.split("--\n")[:-1]
    for (_, expected), text in zip(REFUSED, told, strict=True):
        assert expected in text


def test_model_that_was_trained_anew_is_another_one(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(5_000_000))
    (tmp_path / "data.json").write_text("[]")
    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    add_sampling_flags(parser)
    given = parser.parse_args(["--model", str(tmp_path), "--adapter", f"{tmp_path}:0.5"])
    sources = [Source("data", str(tmp_path / "data.json"))]
    settings = answer_settings(given, sources)
    assert settings["adapter"] == [f"{tmp_path}:0.5"]
    time.sleep(0.01)
    weights.touch()
    (tmp_path / "score.json").write_text("{}")
    assert answer_settings(given, sources) == settings
    content = bytearray(weights.read_bytes())
    content[1_234_567:1_250_000] = b"\1" * 15_433
    weights.write_bytes(content)
    changed = answer_settings(given, sources)
    assert [key for key in settings if settings[key] != changed[key]] == [
        f"fingerprint of {tmp_path}"
    ]
    (tmp_path / "data.json").write_text("[1]")
    assert (
        answer_settings(given, sources)[f"fingerprint of {tmp_path}/data.json"]
        != (settings[f"fingerprint of {tmp_path}/data.json"])
    )
