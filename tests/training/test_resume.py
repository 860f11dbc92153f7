"""A run that was stopped, killed or damaged and then continued ends with the same bits as one that was not."""

import os
import random
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch

from ladderfast.training import Run, checkpoint


def files(folder):
    state = checkpoint.load(folder)
    kept = {k: state[k] for k in ("epoch", "step_in_epoch", "result", "terms", "costs")}
    kept["result"] = {k: v for k, v in kept["result"].items() if k != "seconds"}
    history = [{k: v for k, v in row.items() if k != "steps_per_second"} for row in state["history"]]
    return state, kept, history, (folder / "metrics.csv").read_bytes()


def assert_same(folder, reference):
    got, want = files(folder), files(reference)
    assert got[1:] == want[1:]
    for name, value in want[0]["model"].items():
        assert torch.equal(got[0]["model"][name], value), name
    for index, moments in want[0]["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(got[0]["optimizer"]["state"][index][name], value), (index, name)
    assert torch.equal(got[0]["random"][0]["cpu"], want[0]["random"][0]["cpu"])


class Stopped(Exception):
    pass


def stop_at(run, step):
    """Have the run die before it trains step number `step` + 1, with nothing saved for the occasion."""
    inner = run._train_step

    def train_step():
        if run.global_step == step:
            raise Stopped
        return inner()

    run._train_step = train_step
    with pytest.raises(Stopped):
        run.fit()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    from small_recipe import RECIPE

    folder = tmp_path_factory.mktemp("reference")
    Run(RECIPE, folder=folder, progress=False, epochs=4).fit()
    return folder


@pytest.mark.parametrize("stops", [[0], [2], [5], [6, 9], [3, 4, 13, 19]])
def test_a_crash_at_any_step(small, tmp_path, reference, stops):
    for step in stops:
        run = Run(small, folder=tmp_path, progress=False, resume=True, epochs=4, checkpoint_steps=2)
        stop_at(run, step)
        with open(tmp_path / "metrics.csv", "a", encoding="utf-8") as file:
            file.write("9,99,1.5")  # as of a process that died while it wrote, after its last checkpoint
    run = Run(small, folder=tmp_path, progress=False, resume=True, epochs=4, checkpoint_steps=3)
    assert run.global_step == stops[-1] // 2 * 2 or run.global_step % 5 == 0
    run.fit()
    assert_same(tmp_path, reference)


def test_a_damaged_checkpoint(small, tmp_path, reference):
    run = Run(small, folder=tmp_path, progress=False, epochs=4, checkpoint_steps=1)
    stop_at(run, 9)
    path = tmp_path / checkpoint.NEWEST
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.warns(RuntimeWarning, match="going back"):
        run = Run(small, folder=tmp_path, progress=False, resume=True)
    assert run.global_step == 8
    run.fit()
    assert_same(tmp_path, reference)


def test_fields_keep_their_values_and_those_that_matter_are_held_to_them(small, tmp_path, reference):
    stop_at(Run(small, folder=tmp_path, progress=False, epochs=4, checkpoint_steps=2), 7)
    with pytest.raises(ValueError, match=r"epochs was 4 in .* and cannot become 5 in its continuation"):
        Run(small, folder=tmp_path, resume=True, epochs=5)
    with pytest.raises(ValueError, match=r"model\.noise_std was 0\.3 in "):
        Run(small, folder=tmp_path, resume=True, model={"noise_std": 0.2})
    with pytest.raises(ValueError, match=r"holds a run of small, not of digits"):
        Run("digits", folder=tmp_path, resume=True)
    run = Run(small, folder=tmp_path, progress=False, resume=True, log_every=3)
    assert (run.recipe.epochs, run.recipe.log_every) == (4, 3)
    run.fit()
    assert_same(tmp_path, reference)


def test_a_finished_run_is_not_trained_again(small, tmp_path, reference):
    shutil.copytree(reference, tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    run = Run(small, folder=tmp_path / "run", progress=False, resume=True)
    assert run.finished
    result = run.fit()
    assert result == checkpoint.load(reference)["result"]
    assert (tmp_path / "run" / "report.html").exists()  # the process may have died over it
    assert_same(tmp_path / "run", reference)


def test_an_interrupted_run_goes_on_in_the_same_process(small, tmp_path, reference):
    run = Run(small, folder=tmp_path, progress=False, epochs=4)
    stop_at(run, 8)
    del run._train_step
    run.fit()
    assert_same(tmp_path, reference)


DRIVER = """
    import os, sys, time, random, signal
    sys.path.insert(0, {tests!r})
    import sklearn.datasets, torch
    from small_recipe import RECIPE
    from ladderfast.training import Run, report

    # Every part of the run is a fork of this process, which has imported everything and computed nothing.
    # Part by part: die after so many seconds of training, by that signal; at last, none.
    def part(folder, seconds=None, number=None):
        ready, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                run = Run(RECIPE, folder=folder, progress=True, resume=True, epochs=30, checkpoint_steps=3,
                          batch_unlabelled=130)
                os.write(write, b"x")
                run.fit()
                os._exit(0)
            except KeyboardInterrupt:
                os._exit(130)
            except SystemExit as stop:
                os._exit(stop.code)
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(99)
        os.read(ready, 1)
        if seconds is not None:
            time.sleep(seconds)
            try:
                os.kill(child, number)
            except ProcessLookupError:
                pass
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print("part", seconds, number, "ended with", code, flush=True)
        return code

    assert part("reference") == 0
    generator = random.Random({seed})
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL]
    codes = {{signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}}
    hits = 0
    for number in signals:
        code = part("killed", generator.uniform(0.0, 0.3), number)
        assert code in (codes[number], 0), code
        hits += code != 0
    assert part("killed") == 0
    assert hits >= 2, hits
"""


def test_killed_at_random_moments(tmp_path):
    seed = random.randrange(10**6)
    script = textwrap.dedent(DRIVER).format(seed=seed, tests=os.path.dirname(__file__))
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ,
    )
    said = f"seed {seed}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, said
    if "ended with 143" in done.stdout or "ended with 130" in done.stdout:
        assert "stopped after step" in done.stderr, said
        assert "--resume continues" in done.stderr, said
    assert_same(tmp_path / "killed", tmp_path / "reference")
