"""Models of vectors: what `similarity` makes of them, and the command on them."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
)

from vlmtune.cli.main import main
from vlmtune.core.errors import DataError, ModelError
from vlmtune.evaluation.dual_encoder import DualEncoder, is_dual_encoder, similarity

COLOURS = ("red", "green", "blue", "white", "black")


@pytest.fixture
def images(tmp_path) -> list[str]:
    """One of each colour."""
    for colour in COLOURS:
        Image.new("RGB", (20, 24), colour).save(tmp_path / f"{colour}.png")
    return [str(tmp_path / f"{colour}.png") for colour in COLOURS]


@pytest.fixture(scope="module")
def trained_clip(tiny_clip, tmp_path_factory) -> Path:
    """It knows each of `COLOURS` by its name."""
    encoder = DualEncoder.load(str(tiny_clip), device="cpu")
    squares = [Image.new("RGB", (20, 24), colour) for colour in COLOURS]
    inputs = encoder.processor(text=[*COLOURS], images=squares, padding=True, return_tensors="pt")
    model = encoder.model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(**inputs, return_loss=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.01
    folder = tmp_path_factory.mktemp("trained") / "clip"
    model.save_pretrained(folder)
    encoder.processor.save_pretrained(folder)
    return folder


def write_records(folder: Path, captions: dict[str, list[str]]) -> Path:
    file = folder / "captions.json"
    records = [{"image": f"{name}.png", "captions": texts} for name, texts in captions.items()]
    file.write_text(json.dumps(records), "utf-8")
    return file


def evaluate(model: Path, data: Path, *words: str) -> int:
    flags = ["--model", str(model), "--data", str(data), "--output", str(data.parent / "out")]
    return main(["evaluate", *flags, "--image_folder", str(data.parent), *words])


def metrics(folder: Path) -> dict:
    return json.loads((folder / "out" / "metrics.json").read_text("utf-8"))


def test_similarities_are_the_cosines_of_the_model(tiny_clip, images):
    texts = ["red", "a long one", "blue"]
    found = similarity(DualEncoder.load(str(tiny_clip), device="cpu"), images, texts, batch_size=2)
    encoder = DualEncoder.load(str(tiny_clip), device="cpu")
    squares = [Image.open(path) for path in images]
    inputs = encoder.processor(text=texts, images=squares, padding=True, return_tensors="pt")
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    with torch.no_grad():
        expected = model(**inputs).logits_per_image / model.logit_scale.exp()
    assert found.shape == (5, 3)
    torch.testing.assert_close(found, expected)
    assert found.std() > 0.01


def test_text_of_siglip_has_the_same_vector_beside_any_other(tiny_clip):
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    tokenizer = DualEncoder.load(str(tiny_clip), device="cpu").processor.tokenizer
    tokenizer.model_input_names = ["input_ids"]  # as SigLIP's, which gives no mask
    text = {"vocab_size": 54, "max_position_embeddings": 16, "projection_size": 32, **tower}
    vision = {"image_size": 16, "patch_size": 8, **tower}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    processor = SiglipProcessor(SiglipImageProcessorPil(), tokenizer)
    encoder = DualEncoder(model, processor)
    alone, beside = encoder.of_texts(["red"]), encoder.of_texts(["red", "much longer one"])
    torch.testing.assert_close(alone[0], beside[0])
    ids = torch.tensor([tokenizer("red")["input_ids"] + [53] * 11])
    assert ids.shape == (1, 16)
    with torch.no_grad():
        expected = model.get_text_features(ids).pooler_output
    torch.testing.assert_close(alone, torch.nn.functional.normalize(expected))


def test_image_that_cannot_be_read_is_an_error(tiny_clip):
    encoder = DualEncoder.load(str(tiny_clip), device="cpu")
    with pytest.raises(DataError, match="does not exist"):
        similarity(encoder, ["gone.png"], ["red"])


def test_what_is_a_dual_encoder(tiny_clip, tiny_ovis):
    assert is_dual_encoder(AutoConfig.from_pretrained(tiny_clip))
    assert not is_dual_encoder(AutoConfig.from_pretrained(tiny_ovis))


def test_folder_without_weights_is_an_error(tiny_clip, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_clip / "config.json").read_bytes())
    with pytest.raises(ModelError, match="cannot be loaded: "):
        DualEncoder.load(str(tmp_path), device="cpu")


def test_trained_clip_finds_each_image_by_its_name(trained_clip, images, tmp_path, capsys):
    data = write_records(tmp_path, {colour: [colour] for colour in COLOURS})
    assert evaluate(trained_clip, data) == 0
    result = metrics(tmp_path)
    found = {name: entry["value"] for name, entry in result["metrics"].items()}
    assert found == {
        **{f"{way}_accuracy": 1.0 for way in ("image_to_text", "text_to_image", "contrastive")},
        **{
            f"{way}_recall@{cutoff}": 1.0
            for way in ("image_to_text", "text_to_image")
            for cutoff in (1, 5, 10)
        },
    }
    assert result["metrics"]["contrastive_accuracy"] | {"value": 0} == {
        "value": 0, "low": 1.0, "high": 1.0, "n": 5, "images": 5, "texts": 5
    }  # fmt: skip
    assert result["answers"] is None
    assert set(result["left_out"]) == {
        "exact_match", "vqa_accuracy", "anls", "relaxed_accuracy", "bleu", "cider", "rouge_l",
        "loss",
    }  # fmt: skip
    told = capsys.readouterr().out
    assert "pool: 5 images, 5 texts; chance at 1: 0.2000\n" in told
    assert not (tmp_path / "out" / "predictions.jsonl").exists()


def test_trained_clip_finds_no_image_by_the_name_of_another(trained_clip, images, tmp_path):
    names = [*COLOURS[1:], COLOURS[0]]
    captions = {colour: [name] for colour, name in zip(COLOURS, names, strict=True)}
    assert evaluate(trained_clip, write_records(tmp_path, captions)) == 0
    found = {name: entry["value"] for name, entry in metrics(tmp_path)["metrics"].items()}
    assert found["contrastive_accuracy"] == found["image_to_text_recall@1"] == 0.0
    assert found["image_to_text_recall@5"] == found["text_to_image_recall@5"] == 1.0


def test_image_of_several_captions_is_found_by_each_and_a_broken_one_is_reported(
    trained_clip, images, tmp_path, capsys
):
    (tmp_path / "blue.png").write_bytes(b"no image")
    texts = {"red": ["red", "green"], "green": ["green"], "blue": ["blue"]}
    assert evaluate(trained_clip, write_records(tmp_path, texts), "--metrics", "contrastive") == 1
    result = metrics(tmp_path)
    found = result["metrics"]["text_to_image_accuracy"]
    assert (found["value"], found["images"], found["texts"]) == (pytest.approx(2 / 3), 2, 3)
    # Of two equal texts the first one is taken, which is that of the red image.
    assert result["metrics"]["image_to_text_accuracy"]["value"] == 0.5
    [error] = result["errors"]
    assert error["record"] == 3
    assert "blue.png is no image Pillow can read" in error["error"]
    assert "1 of 3 records have an error, the first:" in capsys.readouterr().out


def test_where_one_image_is_left_the_metric_is_left_out(tiny_clip, images, tmp_path, capsys):
    Path(images[1]).unlink()
    assert evaluate(tiny_clip, write_records(tmp_path, {"red": ["red"], "green": ["green"]})) == 1
    result = metrics(tmp_path)
    assert (result["metrics"], [error["record"] for error in result["errors"]]) == ({}, [2])
    told = capsys.readouterr().out
    assert told.startswith("metric     value   95 % interval")
    assert "left out: contrastive: fewer than two images can be read\n" in told


def test_texts_that_are_cut_are_told_of(tiny_clip, images, tmp_path, capsys):
    data = write_records(tmp_path, {"red": ["a" * 14, "a" * 15], "green": ["green"]})
    assert evaluate(tiny_clip, data) == 0
    assert "note: 1 of 3 texts are cut to 16 tokens\n" in capsys.readouterr().err
    found = metrics(tmp_path)["metrics"]["contrastive_accuracy"]
    assert found["cut_to_the_length_limit"] == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--metrics", "cider"], "metrics, cider:\n  the model makes vectors of images and texts"),
        (["--metrics", "loss"], "metrics, loss:\n  the model makes vectors of images and texts"),
        (["--load_in_4bit"], "load_in_4bit:\n  has no effect on a model of vectors"),
        (["--max_pixels", "9999"], "max_pixels:\n  has no effect on a model of vectors"),
    ],
)
def test_what_a_dual_encoder_cannot_do_is_refused(words, told, tiny_clip, images, tmp_path, capsys):
    data = write_records(tmp_path, {"red": ["red"], "green": ["green"]})
    assert evaluate(tiny_clip, data, *words) == 1
    assert f"ConfigError: command line, {told}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_image_alone_has_no_contrastive_accuracy(tiny_clip, images, tmp_path, capsys):
    data = write_records(tmp_path, {"red": ["red", "a red one"]})
    assert evaluate(tiny_clip, data, "--metrics", "contrastive") == 1
    assert "fewer than two images have a text" in capsys.readouterr().err
