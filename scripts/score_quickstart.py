"""Ask a quickstart model, or an adapter on its base, about the held-out images; print the score.

    python scripts/score_quickstart.py --model outputs/quickstart/model --data sample_data/eval.json

Writes predictions.json and score.json into the model folder. Exits 1 below the target.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmtune.models  # noqa: F401, registers Ovis2.5 with the Auto classes
from vlmtune.collators.rendering import encode, render_prompt
from vlmtune.data.conversation import Conversation, parse_conversation
from vlmtune.data.records import read_records

TARGET = 0.90
CHANCE = 0.10


@torch.no_grad()
def answer(model, processor, conversation: Conversation, pixels: int) -> str:
    """The model's greedy answer to the last question of a conversation."""
    images = [Image.open(path) for path in conversation.images]
    pieces = [processor.image_processor.patches([image], pixels, pixels) for image in images]
    counts = [processor.image_processor.visual_tokens(grid) for _, grid in pieces]
    prompt = encode(render_prompt(conversation.turns[:-1], processor), processor, counts)
    media = {
        "pixel_values": torch.cat([torch.from_numpy(patches) for patches, _ in pieces]),
        "grid_thws": torch.tensor([grid for _, grid in pieces]),
    }
    ids = model.generate(torch.tensor([prompt.ids]), max_new_tokens=16, **media)
    return processor.tokenizer.decode(ids[0], skip_special_tokens=True).strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("outputs/quickstart/model"))
    parser.add_argument("--data", type=Path, default=Path("sample_data/eval.json"))
    parser.add_argument("--image_folder", default="sample_data/images")
    parser.add_argument("--pixels", type=int, default=64 * 64)
    arguments = parser.parse_args()

    # A folder with an adapter loads as its base with the adapter on it.
    model = AutoModelForImageTextToText.from_pretrained(arguments.model).eval()
    processor = AutoProcessor.from_pretrained(arguments.model)
    rows = []
    for index, record in read_records(arguments.data):
        conversation = parse_conversation(
            record, str(arguments.data), index, arguments.image_folder
        )
        if not conversation.id.startswith("eval-digit"):
            continue
        said = answer(model, processor, conversation, arguments.pixels)
        expected = conversation.turns[-1].text
        row = {"image": conversation.images[0], "expected": expected, "said": said}
        rows.append({**row, "correct": said == expected})

    correct = sum(row["correct"] for row in rows)
    score = {"exact_match": correct / len(rows), "questions": len(rows), "chance": CHANCE}
    (arguments.model / "predictions.json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    (arguments.model / "score.json").write_text(json.dumps(score) + "\n", "utf-8")

    right = [row for row in rows if row["correct"]]
    wrong = [row for row in rows if not row["correct"]]
    print(f"\n{'image':40} {'expected':>8} {'said':>6}")
    for row in right[:5] + wrong[:3]:
        mark = "" if row["correct"] else "  wrong"
        print(f"{row['image']:40} {row['expected']:>8} {row['said']:>6}{mark}")
    print(f"\nexact match on held-out digits: {correct}/{len(rows)} = {score['exact_match']:.2f}")
    print(f"chance: {CHANCE:.2f}, target: {TARGET:.2f}")
    print(f"model, score.json, predictions.json: {arguments.model.resolve()}")
    return 0 if score["exact_match"] >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
