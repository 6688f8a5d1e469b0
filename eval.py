"""Evaluate a trained model.

    python eval.py runs/digits/2026-01-01_10-00-00                 the test images of the data it was trained on
    python eval.py checkpoint=MODEL split=val                      its validation images
    python eval.py checkpoint=MODEL data=folder data.root=photos   other images, matched to its classes by name
    python eval.py --help                                          all arguments

Prints the figures and writes them, with a confusion matrix, a reliability diagram and the most confident mistakes, to
evaluation/ in the run folder, or to output=FOLDER.  What happens is in vit/evaluation/report.py; what the figures mean
in docs/evaluation.md.  `vit eval` is the same from anywhere.
"""

import sys

from vit.training.eval_app import eval_main

if __name__ == "__main__":
    sys.exit(eval_main())
