"""Predictions in files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import TextIO

from qat.predict.predictor import Prediction


def write_json(predictions: Iterable[Prediction], file: TextIO) -> int:
    """Write a list of objects, one on each line; returns how many."""
    count = 0
    for count, prediction in enumerate(predictions, 1):
        file.write("[\n" if count == 1 else ",\n")
        file.write(json.dumps(asdict(prediction)))
    file.write("\n]\n" if count else "[]\n")
    return count


def write_csv(predictions: Iterable[Prediction], file: TextIO) -> int:
    """Write one line for every input and rank; returns how many inputs."""
    count, writer = 0, csv.writer(file)
    writer.writerow(["file", "rank", "class", "probability"])
    for p in predictions:
        pairs = enumerate(zip(p.classes, p.probabilities, strict=True), 1)
        writer.writerows([p.file, rank, name, value] for rank, (name, value) in pairs)
        count += 1
    return count
