"""Train a Vision Transformer.

    python train.py                                          the default: handwritten digits, in about a minute
    python train.py photos                                   your own pictures, a folder for each class
    python train.py experiment=fashion_mnist_cpu             a whole recipe from conf/experiment
    python train.py -m model.patch_size=2,4 seed=0,1,2       every combination, and a table
    python train.py --help                                   what can be changed

`vit train` is the same from anywhere.  Everything a run can vary is in conf/; what it does is in vit/training/run.py.
"""

import sys

from vit.training.app import train_main

if __name__ == "__main__":
    sys.exit(train_main())
