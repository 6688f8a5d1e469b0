"""A folder labelled by transformers' image-classification pipeline, as its documentation calls it."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from transformers import pipeline


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("model", help="a folder that transformers loads")
    options.add_argument("data", help="a folder of images")
    options.add_argument("results", help="the CSV file to write")
    options.add_argument("--batch-size", type=int, default=1)
    given = options.parse_args()
    classify = pipeline("image-classification", model=given.model, device="cpu")
    paths = sorted(str(path) for path in Path(given.data).iterdir())
    answers = classify(paths, top_k=1, batch_size=given.batch_size)
    with open(given.results, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["filename", "label", "prob"])
        rows.writerows([path, best["label"], best["score"]] for path, (best,) in zip(paths, answers, strict=True))


if __name__ == "__main__":
    main()
