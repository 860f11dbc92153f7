import io
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import yaml

from ladderfast import cli


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe file that trains in well under a second; runs go below an empty folder."""
    monkeypatch.chdir(tmp_path)
    content = {
        "title": "A Ladder in a second",
        "published": "1.06 ± 0.37 %",
        "model": {"class_path": "ladderfast.models.LadderNetwork", "init_args": {"layers": [64, 12, 10]}},
        "data": {"class_path": "ladderfast.data.Digits", "init_args": {"num_labels": 40}},
        "objective": {
            "class_path": "ladderfast.training.LadderObjective",
            "init_args": {"denoising_weights": [10, 1, 0.1]},
        },
        "epochs": 2,
        "batch_labelled": 20,
        "batch_unlabelled": 260,
        "accelerator": "cpu",
        "threads": 1,
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return path


def call(capsys, *argv):
    code = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *argv, code=2):
    """The one line on stderr with which the command refuses."""
    found, out, err = call(capsys, *argv)
    assert found == code, err
    assert out == ""
    assert err.startswith("ladderfast")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def test_train_evaluate_and_continue(recipe, capsys):
    code, out, err = call(
        capsys, "train", recipe, "--seed", 3, "--model.noise_std", "0.2", "--learning-rate=0.01"
    )
    assert code == 0
    assert "small: epoch 2/2, test error" in err
    line, report = out.splitlines()
    assert line.startswith("A Ladder in a second: test error ")
    assert line.endswith("published: 1.06 ± 0.37 %")
    assert report == "runs/small-seed3/report.html"
    resolved = yaml.safe_load((recipe.parent / "runs/small-seed3/recipe.yaml").read_text(encoding="utf-8"))
    assert resolved["model"]["init_args"]["noise_std"] == 0.2
    assert (resolved["seed"], resolved["learning_rate"], resolved["name"]) == (3, 0.01, "small")

    code, evaluated, _ = call(capsys, "evaluate", "runs/small-seed3", "--accelerator", "cpu")
    assert code == 0
    assert evaluated.splitlines()[0] == line
    assert evaluated.splitlines()[1].startswith("test_cross_entropy ")
    message = refused(capsys, "evaluate", "runs/small-seed3", "--textures", "moved")
    assert "unknown field data.textures" in message  # only images of textures have them

    assert "already holds a run" in refused(capsys, "train", recipe, "--seed", 3)
    message = refused(capsys, "train", recipe, "--seed", 3, "--resume", "--epochs", 3)
    assert "epochs was 2 in runs/small-seed3 and cannot become 3" in message
    code, out, _ = call(capsys, "train", recipe, "--seed", 3, "--resume")
    assert code == 0
    assert out.splitlines() == [line, report]
    code, out, _ = call(capsys, "train", recipe, "--seed", 3, "--overwrite", "--out", "runs/small-seed3")
    assert code == 0
    assert out.splitlines()[0] != line  # other fields than before


def test_compare_sets_a_baseline_beside(recipe, capsys):
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    content["model"]["init_args"]["combinator"] = "none"
    content["objective"]["init_args"]["denoising_weights"] = [0, 0, 0]
    (recipe.parent / "plain.yaml").write_text(yaml.safe_dump(content))
    code, out, _ = call(capsys, "train", recipe, "--compare", "plain.yaml", "--seeds", 2, "--out", "both")
    assert code == 0
    head, plain, small, said, _, names, *beside, report = out.splitlines()
    assert head.split() == ["test", "error", "in", "%", "seed", "1", "seed", "2", "mean"]
    assert [plain.split()[0], small.split()[0]] == ["plain", "small"]
    means = []
    for row in (plain, small):
        means.append(" ".join(row.split()[3:]))
        mean, spread = map(float, means[-1].split(" ± "))
        errors = [float(error) for error in row.split()[1:3]]
        assert mean == pytest.approx(sum(errors) / 2, abs=0.01)
        assert spread == pytest.approx(abs(errors[0] - errors[1]) / 2**0.5, abs=0.02)
    assert said.startswith(f"small has a test error of {means[1]} %, plain of {means[0]} %: ")
    assert names.split() == ["plain", "small"]
    shown = {name: values for name, *values in map(str.split, beside)}
    assert {"test_cross_entropy", "epochs", "seconds", "parameters"} <= set(shown)
    assert shown["epochs"] == ["2", "2"]
    assert all(len(values) == 2 for values in shown.values())
    assert not {"test_error", "test_error_std", "seed", "seeds"} & set(shown)
    assert report == "both/report.html"
    for folder in ("both", "both/plain"):
        assert (recipe.parent / folder / "results.json").exists()
    assert means[0].split()[0] in (recipe.parent / report).read_text(encoding="utf-8")

    code, out, _ = call(capsys, "train", recipe, "--compare", "plain.yaml", "--out", "one")
    assert code == 0
    said, *_, report = out.splitlines()
    assert said.startswith(f"small has a test error of {small.split()[1]} %, plain of {plain.split()[1]} %: ")
    assert report == "one/report.html"
    assert "already holds a run" in refused(
        capsys, "train", recipe, "--compare", "plain.yaml", "--out", "one"
    )
    assert "another recipe than small" in refused(capsys, "train", recipe, "--compare", recipe)


def test_compare_needs_one_figure_for_both(recipe, capsys):
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    content["model"] = {
        "class_path": "ladderfast.models.SWWAE",
        "init_args": {"architecture": "(2)3c-2p", "image_shape": [8, 8]},
    }
    content["objective"] = {
        "class_path": "ladderfast.training.SWWAEObjective",
        "init_args": {"lambda_nll": 0, "lambda_rec": 1},
    }
    (recipe.parent / "auto.yaml").write_text(yaml.safe_dump(content))
    said = refused(capsys, "train", recipe, "--compare", "auto.yaml")
    assert "judged by the same figure; small is by the test error, auto by the reconstruction error" in said
    assert not (recipe.parent / "runs").exists()


def test_recipes_is_a_table_with_the_published_figures(capsys):
    code, out, _ = call(capsys, "recipes")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["recipe", "paper", "row", "published", "figure"]
    row = next(line for line in lines if line.startswith("mnist_100_full "))
    assert "Rasmus et al. 2015" in row
    assert row.endswith("1.06 ± 0.37 %")
    assert any(line.startswith("digits_baseline ") for line in lines)


@pytest.mark.skipif(os.name != "posix", reason="other systems have no broken pipes")
@pytest.mark.parametrize("command", ["recipes", "info"])  # more and less than a buffer
def test_a_reader_that_has_gone_is_no_error(command):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "ladderfast", command],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("argv", [["recipes"], ["train", "--help"]])
def test_characters_that_cannot_be_shown_are_replaced(monkeypatch, argv):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert cli.main(argv) == 0
    assert b"?" in written.getvalue()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("argv", [["recipes"], ["evaluate", "--help"]])  # more and less than a buffer
def test_output_that_cannot_be_written_is_said_in_one_line(monkeypatch, capsys, argv):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(argv) == 1
    assert capsys.readouterr().err == "ladderfast: error: standard output: No space left on device\n"
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it where it is closed
    assert cli.main(["recipes"]) == 1
    assert capsys.readouterr().err == "ladderfast: error: standard output: Bad file descriptor\n"
    assert cli.main(["train", "nothing"]) == 2
    assert "there is no recipe 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize("at", ["last step", "report"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_at_the_end_of_the_baseline_stops_the_comparison(
    recipe, capsys, monkeypatch, at, number, code
):
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    (recipe.parent / "plain.yaml").write_text(yaml.safe_dump(content))
    from ladderfast.training import run

    once = [number]
    name, owner = ("write_results", run) if at == "report" else ("result_of", run)
    inner = getattr(owner, name)

    def signalled(*arguments):
        if once:
            signal.raise_signal(once.pop())
        return inner(*arguments)

    monkeypatch.setattr(owner, name, signalled)
    command = ("train", "small.yaml", "--compare", "plain.yaml", "--out", "both")
    found, out, err = call(capsys, *command)
    assert (found, out) == (code, "")
    assert err.splitlines()[-1] == "stopped after step 10, the last; saved in both/plain"
    assert (recipe.parent / "both/plain/results.json").exists()
    assert not (recipe.parent / "both/recipe.yaml").exists()
    assert call(capsys, *command, "--resume")[0] == 0
    assert (recipe.parent / "both/results.json").exists()


def test_ctrl_c_amid_imports_ends_the_process(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    usual = signal.default_int_handler
    before = signal.signal(signal.SIGINT, usual)  # whatever an earlier test may have made of it
    try:
        with cli._importing():
            signal.raise_signal(signal.SIGINT)  # to this thread: os.kill lets the system choose
        assert codes == [130]
        assert signal.getsignal(signal.SIGINT) is usual
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_class_in_the_working_directory_is_found(recipe, capsys, monkeypatch):
    """As by the console script, which has the folder of scripts at the head of the path."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", os.getcwd())])
    (recipe.parent / "my_own_digits.py").write_text("from ladderfast.data import Digits as Mine\n")
    recipe.write_text(
        recipe.read_text(encoding="utf-8").replace("ladderfast.data.Digits", "my_own_digits.Mine")
    )
    code, out, err = call(capsys, "train", recipe, "--help")
    assert (code, err) == (0, "")
    assert "data: ladderfast.data.digits.Digits" in out


def test_help_names_every_field_with_its_value(capsys):
    code, out, _ = call(capsys, "train", "mnist_1000_full", "--help")
    assert code == 0
    assert "--resume" in out
    assert "--model.noise_std [0.3, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]" in out
    assert "--data.num_labels 1000" in out
    assert "--epochs 150\n        passes over the unlabelled samples" in out
    assert call(capsys, "train", "--help")[0] == 0
    for command in ((), ("evaluate",), ("recipes",)):
        with_help = call(capsys, *command, "--help")
        assert with_help[0] == 0
        assert "usage: ladderfast" in with_help[1]


def test_info(capsys, monkeypatch):
    import ladderfast.info

    monkeypatch.setattr(ladderfast.info, "main", lambda: 0)
    assert call(capsys, "info")[0] == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train"], "train needs a RECIPE"),
        (["train", "nothing"], "there is no recipe 'nothing'"),
        (["train", "nothing.yaml"], "there is no recipe file nothing.yaml"),
        (["train", "{recipe}", "--epoch", "3"], "unknown field epoch; did you mean epochs?"),
        (["train", "{recipe}", "--epochs", "three"], "epochs must be int, got 'three'"),
        (["train", "{recipe}", "--epochs"], "--epochs needs a value"),
        (["train", "{recipe}", "--epochs", "--out", "x"], "--epochs needs a value"),
        (["train", "{recipe}", "--epochs", "2", "--epochs", "1"], "--epochs is given twice"),
        (["train", "{recipe}", "--seed", "2", "--seed=1"], "--seed is given twice"),
        (["train", "{recipe}", "--data-dir", "a", "--data_dir", "b"], "--data_dir is given twice"),
        (["train", "{recipe}", "--threads", "1025"], "threads must be at most 1024, got 1025"),
        (["train", "{recipe}", "--name", "x/y"], "name must be usable as that of a folder"),
        (["train", "{recipe}", "--seed", "x"], "seed must be int, got 'x'"),
        (
            ["train", "{recipe}", "--model.noise_std", "loud"],
            "model.noise_std must be float | Sequence[float], got 'loud'",
        ),
        (["train", "{recipe}", "--model.layers", "[64]"], "model: layers must have at least two widths"),
        (
            ["train", "{recipe}", "--data.num_labels", "5000"],
            "data: num_labels=5000 needs 500 samples of class",
        ),
        (["train", "{recipe}", "--data-dir", "x"], "unknown field data.data_dir"),
        (["train", "{recipe}", "--batch_unlabelled", "5000"], "batch_unlabelled must be from 1 to 1300"),
        (["train", "{recipe}", "--batch_unlabelled", "1"], "batch_unlabelled must be at least 2"),
        (["train", "{recipe}", "--batch_labelled", "1"], "batch_labelled must be at least 2, as a batch is"),
        (["train", "{recipe}", "--data.num_labels", "1"], "num_labels must be at least 2, as the statistics"),
        (
            ["train", "{recipe}", "--objective.denoising_weights", "[1, 1, 1, 1]"],
            "denoising_weights must have 3 entries, one a layer 0..L of the model's layers",
        ),
        (
            ["train", "digits_baseline", "--objective.denoising_weights", "[1, 0, 0, 0, 0, 0]"],
            'denoising_weights[0] must be 0 where the layer\'s combinator is "none"',
        ),
        (
            ["train", "{recipe}", "--model.layers", "[60, 16, 10]"],
            "layers must begin with the 64 values of a sample of Digits, got 60",
        ),
        (
            ["train", "{recipe}", "--model.layers", "[64, 16, 9]"],
            "layers must end with a unit for each of Digits's 10 classes, got 9",
        ),
        (["train", "{recipe}", "--accelerator", "abacus"], "accelerator='abacus'"),
        (["train", "{recipe}", "--resume", "--overwrite"], "exclude each other"),
        (["train", "{recipe}", "--seeds", "0"], "seeds must be at least 1, got 0"),
        (["train", "{recipe}", "--seeds", "x"], "invalid int value: 'x'"),
        (["train", "{recipe}", "--seeds", "2", "--devices", "2"], "seeds=2 needs one device"),
        (["train", "{recipe}", "another"], "unrecognized arguments: another"),
        (
            ["train", "mnist_100_full", "--data-dir", "nowhere"],
            "train-images-idx3-ubyte (or train-images-idx3-ubyte.gz)",
        ),
        (["evaluate"], "required: RUN_FOLDER"),
        (["evaluate", "nowhere"], "nowhere holds no checkpoint of a run"),
        (["recipes", "more"], "unrecognized arguments: more"),
    ],
)
def test_wrong_input_is_refused_in_one_line(recipe, capsys, argv, message):
    assert message in refused(capsys, *(a.format(recipe=recipe) for a in argv))
    assert not (recipe.parent / "runs").exists()


@pytest.mark.parametrize("content", ["epochs: [", "- 1", "title: x\nepochs: 3\ncolour: red\n"])
def test_a_file_that_is_no_recipe_is_refused_in_one_line(recipe, capsys, content):
    recipe.write_text(content)
    refused(capsys, "train", recipe)


def test_a_damaged_checkpoint_is_said_in_one_line(recipe, capsys):
    assert call(capsys, "train", recipe)[0] == 0
    folder = recipe.parent / "runs/small-seed1"
    (folder / "checkpoint.pt").write_bytes(b"no")
    code, _, err = call(capsys, "evaluate", folder)
    assert code == 0
    assert err.startswith("warning: ")
    assert "going back to" in err
    assert err.count("\n") == 1
    (folder / "checkpoint.previous.pt").write_bytes(b"no")
    assert "cannot be used" in refused(capsys, "evaluate", folder)


def test_a_failure_while_training_has_another_code(recipe, capsys):
    code, _, err = call(capsys, "train", recipe, "--learning_rate", "1e30", "--epochs", "9")
    assert code == 1
    assert "the cost is not finite at step" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_without_the_packages_of_training_one_sentence_says_what_to_install(tmp_path):
    script = """
        import sys
        sys.modules["jsonargparse"] = None
        from ladderfast.cli import main
        assert [main(argv) for argv in (["train", "digits"], ["recipes"], ["evaluate", "x"])] == [2, 2, 2]
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    sentence = 'ladderfast: error: training needs jsonargparse: pip install "ladderfast[train]"'
    assert done.stderr.splitlines() == [sentence] * 3


def test_importing_the_package_imports_nothing_of_training():
    script = (
        "import sys, ladderfast, ladderfast.cli, ladderfast.data; "
        "print([m for m in sys.modules if m.partition('.')[0] in "
        "('lightning', 'lightning_fabric', 'matplotlib', 'jsonargparse', 'sklearn', 'tensorboard', 'rich', 'yaml')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_saves_and_says_so(recipe, number, code):
    command = [sys.executable, "-m", "ladderfast", "train", str(recipe), "--epochs", "100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=recipe.parent, env=os.environ)
    folder = recipe.parent / "runs/small-seed1"
    deadline = time.monotonic() + 60
    while not (folder / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert err.splitlines()[-1].endswith("saved in runs/small-seed1, --resume continues")
    assert "Traceback" not in err
