"""A run of one process, whatever a cluster or another program has left in its environment."""

from __future__ import annotations

import os
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TINY = ["trainer=cpu", "trainer.threads=1", "trainer.max_steps=1", "data.max_images=40", "data.batch_size=32"]
TINY += ["model.width=8", "model.depth=1", "model.heads=1", "export.onnx=false", "logging=none", "run.root=runs"]

NUMBERS = ["0", "1", "2", "7", "-1", "", "x"]
RANKS = ["RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "PMI_RANK"]
SIZES = ["WORLD_SIZE", "SLURM_NTASKS", "JSM_NAMESPACE_SIZE", "PMI_SIZE"]
OTHERS = {
    **dict.fromkeys(["LOCAL_WORLD_SIZE", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_NTASKS_PER_NODE"], NUMBERS),
    **dict.fromkeys(["SLURM_LOCALID", "SLURM_NODEID", "SLURM_NNODES", "SLURM_NPROCS", "SLURM_GPUS"], NUMBERS),
    **dict.fromkeys(["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"], NUMBERS),
    **dict.fromkeys(["PMIX_RANK", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "LSB_JOBID"], NUMBERS),
    "MASTER_ADDR": ["127.0.0.1", "node1", "", "no such host"],
    "SLURM_JOB_NAME": ["train", "bash", "interactive"],
    "SLURM_NODELIST": ["node1", "node[1-4]", ""],
    "SLURM_JOB_NODELIST": ["node[01,02]"],
    "TORCHELASTIC_RUN_ID": ["none", "7", ""],
    "LSB_HOSTS": ["batch node1 node1", ""],
    "LSB_DJOB_RANKFILE": ["/nowhere", ""],
}


@st.composite
def variables(draw):
    """Up to eight variables; in half the cases none that make the process one of several."""
    claims = draw(st.booleans())
    values = {**OTHERS, **dict.fromkeys(RANKS, NUMBERS if claims else ["0"])}
    values |= dict.fromkeys(SIZES, NUMBERS if claims else ["1"])
    names = draw(st.sets(st.sampled_from(sorted(values)), min_size=1, max_size=8))
    return {name: draw(st.sampled_from(values[name])) for name in sorted(names)}


SAYS = "is set, but this run is one process, on its own"


def check(result, environment, folder):
    said = f"{environment}: {result['err']}"
    assert result["status"] == 0, said
    assert "Traceback" not in result["err"], said
    assert os.listdir(folder) == ["runs"], said
    (run,) = (folder / "runs" / "digits").iterdir()
    assert (run / "metrics.json").is_file(), said
    assert (run / "checkpoints" / "last.ckpt").is_file(), said
    lines = [line for line in result["err"].splitlines() if SAYS in line]
    assert len(lines) <= 1, said
    if lines:
        name = lines[0].partition("=")[0]
        assert lines[0].startswith(f"{name}={environment[name]} {SAYS}"), said
    usual = {**dict.fromkeys(RANKS, "0"), **dict.fromkeys(SIZES, "1")}
    assert bool(lines) == any(environment.get(name, value) != value for name, value in usual.items()), said


def try_out(count, forked, tmp_path):
    folder = tmp_path / "here"

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(variables())
    def trains(environment):
        folder.mkdir()
        try:
            check(forked(*TINY, environment=environment, folder=folder), environment, folder)
        finally:
            shutil.rmtree(folder)

    trains()


def test_variables_of_other_programs_do_not_change_a_run_of_one_process(forked, tmp_path):
    try_out(4, forked, tmp_path)


@pytest.mark.slow
def test_a_hundred_combinations_of_variables(forked, tmp_path):
    try_out(100, forked, tmp_path)


ALONE = [
    {"RANK": "1"},
    {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"},
    {"LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "7"},
]


@pytest.mark.parametrize("environment", [ALONE[0], *(pytest.param(each, marks=pytest.mark.slow) for each in ALONE[1:])])
def test_a_program_that_starts_with_them(script, tmp_path, environment):
    place = tmp_path / "here"  # Lightning reads some of them when it is imported
    place.mkdir()
    process = script(*TINY, env=environment, cwd=place)
    out, err = process.communicate(timeout=240)
    check({"status": process.returncode, "out": out, "err": err}, environment, place)
