"""Ask a quickstart model, or an adapter on its base, about the held-out images; print the score.

    python scripts/score_quickstart.py --model outputs/quickstart/model --data sample_data/eval.json

Writes predictions.json and score.json into the model folder. Exits 1 below the target.
"""

import argparse
import json
import sys
from pathlib import Path

from vlmtune import inference
from vlmtune.core.logging import quiet_hosts
from vlmtune.data.sources import Source
from vlmtune.evaluation.answer_metrics import exact_match

TARGET = 0.90
CHANCE = 0.10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("outputs/quickstart/model"))
    parser.add_argument("--data", type=Path, default=Path("sample_data/eval.json"))
    parser.add_argument("--image_folder", default="sample_data/images")
    arguments = parser.parse_args()

    source = Source("eval", str(arguments.data), arguments.image_folder)
    records = (source.parse(i, record) for i, record in source.records())
    asked = [record for record in records if record.id.startswith("eval-digit")]
    questions = [{"image": r.images[0], "prompt": r.turns[0].text} for r in asked]
    quiet_hosts()
    model = inference.VLMInference(str(arguments.model))
    replies = model.batch_inference(questions, max_new_tokens=16)
    rows = []
    for record, reply in zip(asked, replies, strict=True):
        expected = record.turns[-1].text
        row = {"image": record.images[0], "expected": expected, "said": reply.answer}
        rows.append({**row, "correct": exact_match(reply.answer, [expected]) == 1})

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
