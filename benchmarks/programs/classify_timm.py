"""A folder labelled as timm's `inference.py` does it; that script is in timm's repository and not in its package.

The same steps, imports and defaults (timm 1.0): model and weights by name, here `local-dir:`; `create_dataset` and
`create_loader` with prefetcher, 2 workers and batches of 256 unless told otherwise; top-k of softmax; names of classes
from the model's own configuration; a table written by pandas as CSV and printed as JSON.
"""

from __future__ import annotations

import argparse
import logging
import time

import numpy as np
import pandas as pd
import torch
from timm.data import CustomDatasetInfo, DatasetInfoLabelMapper, create_dataset, create_loader, resolve_data_config
from timm.models import create_model
from timm.utils import AverageMeter, setup_default_logging

log = logging.getLogger("inference")


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("model", help="a bundle")
    options.add_argument("data", help="a folder of images")
    options.add_argument("results", help="the CSV file to write")
    options.add_argument("--batch-size", type=int, default=256)
    options.add_argument("--workers", type=int, default=2)
    given = options.parse_args()
    setup_default_logging()
    device = torch.device("cpu")
    model = create_model(f"local-dir:{given.model}", pretrained=True)
    settings = dict(model.pretrained_cfg)
    log.info("%d parameters", sum(parameter.numel() for parameter in model.parameters()))
    data_config = resolve_data_config({}, model=model)
    model = model.to(device).eval()
    dataset = create_dataset(root=given.data, name="", split="validation", class_map="")
    loader = create_loader(
        dataset,
        batch_size=given.batch_size,
        use_prefetcher=True,
        num_workers=given.workers,
        device=device,
        img_dtype=torch.float32,
        **data_config,
    )
    names = CustomDatasetInfo(label_names=settings["label_names"])
    to_label = np.vectorize(DatasetInfoLabelMapper(names, label_type="description"), otypes=[object])
    batch_time, end = AverageMeter(), time.time()
    labels, outputs = [], []
    with torch.inference_mode():
        for number, (images, _) in enumerate(loader):
            output, indices = model(images).softmax(-1).topk(1)
            labels.append(to_label(indices.cpu().numpy()))
            outputs.append(output.float().cpu().numpy())
            batch_time.update(time.time() - end)
            end = time.time()
            if number % 10 == 0:
                log.info("[%d/%d] %.3f s", number, len(loader), batch_time.val)
    columns = {
        "filename": loader.dataset.filenames(basename=False),
        "label": list(np.concatenate(labels).squeeze(-1)),
        "prob": list(np.concatenate(outputs).astype(np.float32).squeeze(-1)),
    }
    table = pd.DataFrame(data=columns).set_index("filename")
    table.to_csv(given.results)
    print(table.reset_index().set_index("filename").to_json(orient="index", indent=4))


if __name__ == "__main__":
    main()
