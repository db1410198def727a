"""Several processes and streamed weights give what one process gives, and take what the planner says.

The processes talk over gloo, and each group is started once for all cases: see parallel_worker.py.
"""

import contextlib
import dataclasses
import re
import subprocess
import time

import parallel_worker as worker
import pytest
import torch
from common import HERE, assert_refused, bad, fork_python, relative, run_main, write_t5

import live
import magi
import outputs
import parallel
import planner
import sample
from checkpoints import read_json


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    worker.write_models(folder)
    return folder


@pytest.fixture(scope="module")
def results(models):
    """Ranks -> what each of them found."""
    for size in (2, 4):
        processes = worker.fork(worker.cases, size, models)
        for process in processes:
            process.join(timeout=300)
        assert [process.exitcode for process in processes] == [0] * size
    return {size: [torch.load(models / f"cases.{size}.{rank}.pt") for rank in range(size)] for size in (2, 4)}


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
def test_several_processes_may_stream(results, alone, size):
    for found in results[size]:
        assert relative(found["streamed"], alone["v2v"]) < 1e-5


@pytest.mark.parametrize("size", [2, 4])
def test_tiles_are_dealt_out(results, models, size):
    for u, v in zip(worker.tiles(models), results[size][0]["tiles"], strict=True):
        assert relative(u, v) < 1e-6


def test_only_the_first_process_encodes_the_text(results):
    assert [found["asked"] for found in results[4]] == [["a ball"], [], [], []]
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


def test_at_most_two_layers_are_held(models, monkeypatch):
    seen = worker.watch_layers(monkeypatch)
    dit = parallel.load_dit(models / "base", stream="disk")
    x, t = torch.randn(1, 16, 6, 4, 4), torch.zeros(1, 1)
    with torch.no_grad():
        for _ in range(3):
            dit(x, t, torch.randn(1, 1, 14, 12), torch.ones(1, 1, 14))
    assert len(seen) >= 9 and {count for _, count in seen} <= {1, 2}  # the next one's first may be coming
    assert all(u.untyped_storage().nbytes() <= 4 for u in dit.layers[1].state_dict().values())


def test_a_read_that_fails_spoils_no_later_forward(models):
    dit = parallel.load_dit(models / "base", stream="disk")
    read, failing = dit.streamed.read, [1]

    def read_or_fail(i):
        if i in failing:
            failing.remove(i)
            raise OSError("the disk is gone")
        return read(i)

    dit.streamed.read = read_or_fail
    inputs = torch.randn(1, 16, 6, 4, 4), torch.zeros(1, 1), torch.randn(1, 1, 14, 12), torch.ones(1, 1, 14)
    with torch.no_grad():
        with pytest.raises(OSError, match="the disk is gone"):
            dit(*inputs)
        assert relative(dit(*inputs), parallel.load_dit(models / "base")(*inputs)) < 1e-5


def test_the_branches_of_a_step_read_each_layer_once(models, monkeypatch):
    seen, steps = worker.watch_layers(monkeypatch), []
    dit = parallel.load_dit(models / "base", stream="disk")
    run = dataclasses.replace(worker.RUN, num_frames=72)
    for _ in magi.sample(dit, **worker.drawn(dit.cfg, 0, run), progress=steps.append):
        pass
    dit.streamed.thread.shutdown()  # what is on its way arrives
    layers = [i for i, _ in seen]
    assert layers == list(range(3)) * len(steps) + [0]


def test_streamed_t5_is_t5():
    captions = ["a red ball bounces", "a blue square"]
    whole, streamed = (parallel.T5(HERE / "tiny" / "t5", 64, stream=stream) for stream in (None, "disk"))
    assert torch.equal(whole(captions)[0], streamed(captions)[0])


def test_a_streamed_t5_may_have_a_decoder_which_is_not_read(tmp_path):
    """So do folders that are not converted."""
    from transformers import T5Config, T5ForConditionalGeneration

    write_t5(tmp_path / "t5", 32)
    T5ForConditionalGeneration(T5Config.from_pretrained(tmp_path / "t5")).save_pretrained(tmp_path / "t5")
    whole, streamed = (parallel.T5(tmp_path / "t5", 16, stream=stream) for stream in (None, "disk"))
    assert torch.equal(whole(["a red ball"])[0], streamed(["a red ball"])[0])


def test_unknown_ways_of_streaming_are_refused(models):
    with bad("stream 'tape' is not 'cpu' or 'disk'"):
        parallel.load_dit(models / "base", stream="tape")


def test_an_fp8_model_computes_in_bfloat16_here_too(models):
    """Another dtype was an error within PyTorch at the first forward."""
    with bad("dtype 'float32' is not that of an fp8 model, which computes in 'bfloat16'"):
        parallel.load_dit(models / "fp8", dtype="float32")


def test_slices_change_nothing(models, alone, monkeypatch):
    monkeypatch.setattr(parallel, "SLICE", 7)
    for name in ("t2v", "v2v", "fp8"):
        assert relative(worker.run_case(models, name), alone[name]) < 1e-5


# ------------------------------------------------------------------------------------------------ the planner


def assert_as_planned(found: dict, within: float = 0.1) -> None:
    planned = found["plan"]
    assert found["cache"] == planned["cache"]
    total = planned["weights"] + planned["passing"] + planned["cache"] + planned["activations"]
    assert total == pytest.approx(found["all"], rel=within), (total, found)


@pytest.mark.parametrize("stream", [None, "disk"])
@pytest.mark.parametrize("model", worker.MEASURED)
def test_one_process_takes_what_is_planned(models, monkeypatch, model, stream):
    monkeypatch.setattr(parallel, "SLICE", parallel.SLICE)  # which measure changes
    found = worker.measure(models, model, stream)
    assert_as_planned(found)
    if stream is None:
        assert found["weights"] == found["plan"]["weights"]


def test_two_processes_take_what_is_planned(results):
    for found in results[2]:
        for model, memory in found["memory"].items():
            # the smallest takes 2 MB in all, of which moments that the plan leaves out are a larger part
            assert_as_planned(memory, within=0.15 if model == "base" else 0.1)
            assert memory["weights"] == pytest.approx(memory["plan"]["weights"], rel=0.02)


def test_a_small_model_is_planned_with_its_own_vae_and_t5():
    t5, vae = HERE / "tiny" / "t5", parallel.load_vae(HERE / "tiny" / "vae")
    planned = planner.needs(*magi.PRESETS["tiny"], vae.cfg, read_json(t5 / "config.json"))
    assert planned.vae == sum(u.nbytes for u in vae.state_dict().values())
    assert planned.t5 == pytest.approx((t5 / "model.safetensors").stat().st_size, rel=0.01)
    assert planned.total < planner.GIB / 10


def test_the_goals_fit():
    presets = magi.PRESETS
    ways = lambda name, card, R=1: planner.smallest_change(*presets[name], card, R)
    assert ways("24B-distill-fp8", 24, 8) == ways("24B-base", 80, 8) == ways("4.5B-base", 24) == "as it is"
    assert ways("24B-base", 24) == "--stream cpu"
    one = dataclasses.replace(presets["4.5B-distill-fp8"].sampler, window=1, kv_ranges=(2,))
    assert planner.fits(planner.needs(presets["4.5B-distill-fp8"].dit, one).total, 12)


def test_the_readmes_table_is_the_planners():
    """For each model and machine the first way that fits, and what it takes; one cell has a second way."""
    readme = (HERE / "README.md").read_text()
    titles, rows = re.search(r"^\| model \|(.*) \|\n\|[-|]*\n((?:\|.*\n)*)", readme, re.M).groups()
    rows = [[cell.strip() for cell in row.strip("| ").split("|")] for row in rows.splitlines()]
    names = {
        name: name.replace("-", " ").replace("distill", "distilled")
        for name in (n for n in magi.PRESETS if n != "tiny")
    }
    assert [row[0] for row in rows] == [*names.values()]
    for name, (_, *cells) in zip(names, rows, strict=True):
        dit, run = magi.PRESETS[name]
        for title, cell in zip(titles.split("|"), cells, strict=True):
            R, card = map(int, re.findall(r"\d+", title))
            way = planner.smallest_change(dit, run, card, R)
            stream, settings = planner.CHANGES[way]
            memory = planner.needs(dit, dataclasses.replace(run, **settings), R=R, stream=stream)
            flags = way.removesuffix(" --height 480 --width 832")
            flags = f" `{flags}`" * (way != "as it is") + ", 480x832" * (flags != way)
            assert cell.partition(", or")[0] == f"{memory.total / planner.GIB:.1f}{flags}", (name, title)


def test_the_flag_prints_the_plan(capsys):
    with contextlib.suppress(SystemExit):
        sample.main(["--plan", "--model", "24B-base"])
    middle, large = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert middle == "24 GB --stream cpu as it is".split()
    assert large == "80 GB as it is as it is".split()


def test_a_released_model_is_planned_before_it_is_here():
    """README's line, as it is, before anything is downloaded."""
    lines = printed(sample.main, "--model", "models/24B-base")
    assert lines == printed(sample.main, "--model", "24B-base")
    code, _, err = run_main(sample.main, "--plan", "--model", "models/24B")
    assert code == 2 and "no model in 'models/24B'" in err


def printed(main, *flags) -> list[list[str]]:
    """The words of each line of a plan."""
    code, out, err = run_main(main, "--plan", *flags)
    assert code == 0 and not err
    return [line.split() for line in out.splitlines()]


@pytest.mark.parametrize("main, flags", [(live.main, []), (sample.main, ["--prompt", "-"])])
def test_a_t5_that_stays_is_planned_with_the_rest(main, flags):
    lines = printed(main, "--model", "4.5B-distill", "--window", 1, *flags)
    assert lines[2][:2] == ["1", "-"] and lines[2][-1] == "27.06"  # 18.19 and 8.87 of T5
    assert [line[0] for line in lines[2:4]] == ["1", "1"] and lines[4][
        0
    ] == "--stream"  # not several processes
    assert lines[-2] == "24 GB --stream cpu".split()
    code, _, err = run_main(main, "--plan", "4x48", *flags)
    assert code == 2 and "4 GPUs cannot share this run: give --plan 1x48\n" in err


def test_the_plan_is_of_the_dtype_that_is_asked_for():
    halves, floats = (
        printed(sample.main, "--model", "4.5B-base", "--dtype", d) for d in ("bfloat16", "float32")
    )
    cache = lambda lines: float(lines[2][5])
    assert cache(floats) == pytest.approx(2 * cache(halves), abs=0.02)


def test_the_plan_counts_all_chunks_that_are_seen():
    """The cache of a wide range is counted in full; one that forgets nothing has no end, which is said."""
    cache = lambda *ranges: float(printed(sample.main, "--model", "4.5B-base", "--kv_range", *ranges)[2][5])
    assert cache("60") == pytest.approx(2 * cache("30"), rel=0.1)
    lines = [" ".join(line) for line in printed(sample.main, "--model", "4.5B-base", "--kv_range", "all")]
    assert any("forgets nothing: this is the cache after 24 s" in line for line in lines)
    assert not any("forgets nothing" in " ".join(line) for line in printed(sample.main))


@pytest.mark.parametrize(
    "card, number, size, way",
    [
        ("48", "one", "48", "as it is"),
        ("4x16", "4", "16", "as it is"),
        ("12.5", "one", "12.5", "--stream cpu"),
    ],
)
def test_the_plan_for_a_card_of_ones_own(card, number, size, way):
    head, line = printed(sample.main, card, "--model", "4.5B-distill", "--window", 2)[-2:]
    assert head[:4] == ["A", "card", "of", number] and line == [size, "GB", *way.split()]


def test_several_processes_do_not_keep_all_layers_each():
    *_, memory, _, _, line = printed(sample.main, "8x12", "--model", "24B-base")
    assert line == "12 GB --stream disk".split()
    assert " ".join(memory).startswith("--stream cpu keeps 66.01 GiB of layers in host memory")


def test_a_plan_builds_the_shapes_of_a_model_once(monkeypatch):
    built = []
    real = magi.DiT
    monkeypatch.setattr(magi, "DiT", lambda cfg: built.append(cfg) or real(cfg))
    planner.sizes.cache_clear()
    printed(sample.main, "48", "--model", "4.5B-base")
    assert len(built) == 1


@pytest.mark.parametrize(
    "card, message",
    [
        ("24B", "'24B' is not the GB of a card, such as 48, or 4x48"),
        ("3x48", "3 GPUs cannot share this run: give --plan 1x48 or --plan 2x48"),
    ],
)
def test_cards_that_cannot_be_planned_for_are_refused(card, message):
    assert_refused(sample.main, ["--plan", card, "--model", "4.5B-base"], message)


# --------------------------------------------------------------------------------------------------- failures


def test_an_environment_that_is_half_a_torchruns_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with bad("WORLD_SIZE is 2, but not set: LOCAL_RANK, MASTER_PORT; start with torchrun, or unset"):
        parallel.start("cpu")
    monkeypatch.setenv("WORLD_SIZE", "")
    assert parallel.start("cpu") == "cpu"


def test_a_plan_with_a_text_encoder_of_another_kind(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip", "hidden_size": 768}')
    message = "config.json' is not of a T5 model: give the right folder (--t5)"
    assert_refused(sample.main, ["--plan", "24", "--model", "4.5B-base", "--t5", tmp_path], message)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_takes_the_others_with_it(models, rank):
    (models / "forever.mp4").unlink(missing_ok=True)
    text = worker.drawn(worker.SMALL, 0, worker.RUN)
    outputs.save({"text": text["text"][None], "mask": text["text_mask"][None]}, models / "text.safetensors")
    processes = worker.fork(worker.forever, 2, models)
    while not (models / "forever.mp4").exists():
        assert all(process.is_alive() for process in processes)
        time.sleep(0.05)
    processes[rank].kill()
    processes[1 - rank].join(timeout=20)
    assert processes[1 - rank].exitcode == 1
    said = (models / f"said.{1 - rank}").read_text()
    assert said.splitlines()[-1].startswith("error: another process has stopped") and "Traceback" not in said


def test_torchrun_with_a_count_that_does_not_divide_says_which_do(tmp_path):
    """Forks with the environment that torchrun gives, where it keeps what they share."""
    flags = ["--prompt", "a red ball", "--num_frames", "24", "--out", tmp_path / "a.mp4"]
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    given = {"WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    given["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    processes = []
    for rank in map(str, range(3)):
        streams = dict(more=given | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
        processes.append(fork_python(HERE / "sample.py", *flags, **streams))
    said = "".join(process.communicate()[1] for process in processes)
    assert [process.returncode for process in processes] == [2, 2, 2]
    ours = [line for line in said.splitlines() if line.startswith("error:")]
    assert ours == ["error: 3 processes cannot share 2 key/value heads: start 1 or 2"]
