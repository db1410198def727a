"""Several processes and streamed weights give what one process gives, and take what the planner says.

The processes talk over gloo and are started once for all cases: see parallel_worker.py.
"""

import dataclasses
import os
import subprocess
import sys

import parallel_worker as worker
import pytest
import torch
from common import HERE, bad, relative

import magi
import parallel


def start(job: str, size: int, folder, **more) -> list[subprocess.Popen]:
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=f"{HERE}:{HERE / 'tests'}")
    command = [sys.executable, str(HERE / "tests" / "parallel_worker.py"), job]
    return [
        subprocess.Popen([*command, str(rank), str(size), str(folder)], env=env, text=True, **more)
        for rank in range(size)
    ]


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
    return {
        size: [torch.load(models / f"cases.{size}.{rank}.pt") for rank in range(size)] for size in running
    }


@pytest.fixture(scope="module")
def alone(models):
    return {name: worker.run_case(models, name) for name in worker.CASES}


@pytest.mark.parametrize("size, name", [(2, name) for name in worker.CASES] +
                         [(4, name) for name in worker.OF_FOUR])  # fmt: skip
def test_several_processes_make_the_same_video(results, alone, size, name):
    for found in results[size]:
        assert found[name].shape == alone[name].shape
        assert relative(found[name], alone[name]) < 1e-5


@pytest.mark.parametrize("size", [2, 4])
def test_tiles_are_dealt_out(results, models, size):
    for u, v in zip(worker.tiles(models), results[size][0]["tiles"], strict=True):
        assert relative(u, v) < 1e-6


def test_only_the_first_process_encodes_the_text(results):
    assert [found["calls"] for found in results[4]] == [["a ball"], [], [], []]
    assert all(found["text"].equal(torch.ones(3)) for found in results[4])


@pytest.mark.parametrize("size", [2, 4])
def test_counts_that_do_not_divide_the_heads_are_refused(results, size):
    for found in results[size]:
        assert found["errors"][0] == f"{size} processes cannot share 3 key/value heads: start 1 or 3"


def test_what_fails_on_one_process_fails_on_all(results):
    assert {found["errors"][1] for found in results[4]} == {"process 3 of 4: no such device"}


@pytest.mark.parametrize("name", ["t2v", "v2v", "fp8", "LoRA"])
def test_streamed_weights_change_not_one_bit(models, name):
    whole = worker.run_case(models, name, copied=True)
    for source in ("cpu", "disk"):
        assert torch.equal(worker.run_case(models, name, source), whole)


def test_at_most_two_layers_are_held(models):
    dit = parallel.load_dit(models / "base", stream="disk")
    fetch, counts = dit.streamed.fetch, []

    def counted(i):
        counts.append(len(dit.streamed.held))  # with this one
        return fetch(i)

    dit.streamed.fetch = counted
    x, t = torch.randn(1, 16, 6, 4, 4), torch.zeros(1, 1)
    for _ in range(3):
        dit(x, t, torch.randn(1, 1, 14, 12), torch.ones(1, 1, 14))
    assert len(counts) >= 12 and set(counts) <= {1, 2}  # the next forward's first may be on its way
    assert all(u.untyped_storage().nbytes() <= 4 for u in dit.layers[2].state_dict().values())


def test_streamed_t5_is_t5():
    captions = ["a red ball bounces", "a blue square"]
    whole, streamed = (parallel.T5(HERE / "tiny" / "t5", 64, stream=stream) for stream in (None, "disk"))
    assert torch.equal(whole(captions)[0], streamed(captions)[0])


def test_unknown_ways_of_streaming_are_refused(models):
    with bad("stream 'tape' is not 'cpu' or 'disk'"):
        parallel.load_dit(models / "base", stream="tape")


def test_slices_change_nothing(models, alone, monkeypatch):
    monkeypatch.setattr(parallel, "SLICE", 7)
    for name in ("t2v", "v2v", "fp8"):
        assert relative(worker.run_case(models, name), alone[name]) < 1e-5


# ------------------------------------------------------------------------------------------------ the planner


def assert_as_planned(found: dict) -> None:
    planned = found["plan"]
    assert found["cache"] == planned["cache"]
    total = planned["weights"] + planned["passing"] + planned["cache"] + planned["activations"]
    assert 0.9 < total / found["all"] < 1.1, (total, found)


@pytest.mark.parametrize("stream", [None, "disk"])
@pytest.mark.parametrize("model", worker.MIDDLES)
def test_one_process_takes_what_is_planned(models, monkeypatch, model, stream):
    monkeypatch.setattr(parallel, "SLICE", parallel.SLICE)  # which measure changes
    found = worker.measure(models, model, stream)
    assert_as_planned(found)
    if stream is None:
        assert found["weights"] == found["plan"]["weights"]


def test_two_processes_take_what_is_planned(results):
    for found in results[2]:
        for memory in found["memory"].values():
            assert_as_planned(memory)
            assert memory["weights"] == pytest.approx(memory["plan"]["weights"], rel=0.02)


def test_the_goals_fit():
    presets = magi.PRESETS
    ways = lambda name, card, R=1: parallel.smallest_change(*presets[name], card, R)[0]
    assert ways("24B-distill-fp8", 24, 8) == ways("24B-base", 80, 8) == ways("4.5B-base", 24) == "as it is"
    assert ways("24B-base", 24) == "--stream cpu"
    one = dataclasses.replace(presets["4.5B-distill-fp8"].sampler, window=1, kv_ranges=(2,))
    assert parallel.fits(parallel.needs(presets["4.5B-distill-fp8"].dit, one), 12)


# --------------------------------------------------------------------------------------------------- failures


def test_a_killed_process_takes_the_others_with_it(models):
    first, second = start("forever", 2, models, stdout=subprocess.PIPE)
    assert first.stdout.readline() == "running\n"
    second.kill()
    said, _ = first.communicate(timeout=20)
    assert said.splitlines()[-1] == "another process is gone"
    second.communicate()
