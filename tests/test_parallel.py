"""Several processes and streamed weights give what one process gives, and take what the planner says.

The processes talk over gloo and are started once for all cases: see parallel_worker.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import parallel_worker as worker
import pytest
import torch

import magi
import parallel


HERE = Path(__file__).parent.parent


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def start(job: str, size: int, folder, **more) -> list[subprocess.Popen]:
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=f"{HERE}:{HERE / 'tests'}")
    command = [sys.executable, str(HERE / "tests" / "parallel_worker.py"), job]
    return [subprocess.Popen([*command, str(rank), str(size), str(folder)], env=env, text=True, **more)
            for rank in range(size)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    worker.write_models(folder)
    return folder


@pytest.fixture(scope="module")
def results(models):
    """Ranks -> what each of them found."""
    running = {size: start("cases", size, models) for size in (2, 4)}
    for processes in running.values():
        for process in processes:
            assert process.wait(timeout=300) == 0
    return {size: [torch.load(models / f"cases.{size}.{rank}.pt") for rank in range(size)] for size in running}


@pytest.fixture(scope="module")
def alone(models):
    return {name: worker.run_case(models, name) for name in worker.CASES}


@pytest.mark.parametrize("name", worker.CASES)
@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_make_the_same_video(results, alone, size, name):
    for found in results[size]:
        assert found[name].shape == alone[name].shape
        assert relative(found[name], alone[name]) < 1e-5
