"""A folder labelled by a bare script: NumPy, Pillow and ONNX Runtime, in a loop, nothing checked: a floor."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import onnxruntime
from PIL import Image


def main(model: str, data: str, results: str) -> None:
    session = onnxruntime.InferenceSession(f"{model}/model.onnx", providers=["CPUExecutionProvider"])
    description = json.loads(session.get_modelmeta().custom_metadata_map["vit"])
    height, width = description["preprocessing"]["image_size"]
    mean = np.float32(description["preprocessing"]["mean"])
    std = np.float32(description["preprocessing"]["std"])
    with open(results, "w", encoding="utf-8") as file:
        file.write("filename,label,prob\n")
        for name in sorted(os.listdir(data)):
            path = os.path.join(data, name)
            image = Image.open(path).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
            pixels = (np.asarray(image, dtype=np.float32) / 255 - mean) / std
            (logits,) = session.run(["logits"], {"image": pixels.transpose(2, 0, 1)[None]})[0]
            powers = np.exp(logits - logits.max())
            best = int(powers.argmax())
            file.write(f"{path},{description['class_names'][best]},{powers[best] / powers.sum()}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
