"""Runs as processes of their own: signals, two processes over gloo, a full disk, what the terminal sees."""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from vit.training.config import CONF


def finish(process, timeout=240):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def folder_of(tmp_path, name="digits"):
    (folder,) = (tmp_path / "runs" / name).iterdir()
    return folder


def test_the_last_lines_are_the_figures_and_what_to_type_next(script, tmp_path):
    status, out, err = finish(script("trainer.max_epochs=1"))
    assert status == 0, err
    folder = folder_of(tmp_path)
    last = out.strip().splitlines()
    assert last[0].startswith("val")
    assert last[1].startswith("test")
    assert last[-3:] == [
        f"evaluate   python {CONF.parent / 'eval.py'} checkpoint={folder}",
        f"classify   vit classify {folder} IMAGE...",
        f"look       tensorboard --logdir {tmp_path / 'runs'}",
    ]
    assert "Traceback" not in err
    assert last[-1] in (folder / "train.log").read_text()


def test_ctrl_c_ends_with_a_checkpoint_and_the_closing_lines(script, tmp_path):
    process = script("trainer.max_epochs=10000", stderr=(tmp_path / "err").open("w"))
    deadline = time.monotonic() + 120
    while not list((tmp_path).glob("runs/digits/*/checkpoints/last.ckpt")):
        assert time.monotonic() < deadline, (tmp_path / "err").read_text()
        assert process.poll() is None, (tmp_path / "err").read_text()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    status, out, _ = finish(process)
    err = (tmp_path / "err").read_text()
    assert status == 130, err
    assert "Traceback" not in err
    folder = folder_of(tmp_path)
    assert f"go on      python {CONF.parent / 'train.py'} resume={folder}" in out
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] > 0


@pytest.mark.parametrize(("optimizer", "tolerance"), [("optim=sgd", 1e-6), ("optim=muon", 1e-5)])
def test_two_processes_train_the_weights_that_one_does_and_count_each_image_once(
    script, tmp_path, optimizer, tolerance
):
    options = (optimizer, "optim.lr=0.01", "trainer.max_steps=4", "augment=medium", "ema.decay=0.9")
    for name, trainer in (("two", "ddp_cpu"), ("one", "cpu")):
        status, _, err = finish(script(f"trainer={trainer}", f"run.name={name}", *options))
        assert status == 0, err
    last = "checkpoints/last.ckpt"
    two, one = (torch.load(folder_of(tmp_path, name) / last, weights_only=True) for name in ("two", "one"))
    assert two["global_step"] == one["global_step"] == 4
    for key, value in one["state_dict"].items():
        if key.endswith("k_norm.bias"):
            continue  # softmax does not see it: its gradient is rounding noise, which Adam makes steps of
        assert float((value - two["state_dict"][key]).abs().max()) < tolerance, key
    for block, figures in one["vit"]["metrics"].items():
        for key, value in figures.items():
            assert two["vit"]["metrics"][block][key] == pytest.approx(value, abs=1e-5)


def test_a_disk_that_fills_up_ends_the_run_in_one_line(script, tmp_path):
    def small_files():
        # a file may grow to 20 kB: enough for the configuration and the log, too little for a checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    # coverage would end with a traceback of its own on such a disk
    environment = {key: "" for key in os.environ if key.startswith("COVERAGE")}
    status, _, err = finish(script("trainer.max_epochs=1", preexec_fn=small_files, env=environment))
    assert status == 2
    assert "Traceback" not in err
    assert "cannot write" in err.strip().splitlines()[-1]
    assert list((folder_of(tmp_path) / "checkpoints").glob("*")) == []


@pytest.mark.skipif(sys.platform != "linux", reason="file modes")
def test_a_root_that_is_a_file_is_named(script, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = finish(script(f"run.root={tmp_path / 'file'}"))
    assert status == 2
    assert f"run.root={tmp_path / 'file'}" in err.strip().splitlines()[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_worker_that_the_system_kills_ends_the_run_with_a_line(script, tmp_path):
    for name in ("dark", "light"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (16, 16), (i, i, 200 * (name == "light"))).save(tmp_path / "photos" / name / f"{i}.png")
    photos = ["data=folder", f"data.root={tmp_path / 'photos'}", "data.image_size=16", "data.patch_size=4"]
    process = script(
        *photos, *("data.resident=false", "data.workers=1", "data.batch_size=4", "trainer.max_epochs=100000")
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 200
    while not (workers := children.read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(int(workers[0]), signal.SIGKILL)
    status, _, err = finish(process)
    assert status == 2, err
    assert "Traceback" not in err
    assert "data.workers=0" in err.strip().splitlines()[-1]
