"""python -m stn_fast.train: exit statuses, one-line errors, signals, and what it leaves behind."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import yaml
from run_files import rows

from stn_fast import train
from stn_fast.training import checkpoint
from stn_fast.training.signals import SIGNALS
from stn_fast.training.trainer import Trainer

# As this process was started with them: whoever runs it in the background may have had it ignore Ctrl-C.
HANDLERS = {number: signal.getsignal(number) for number in SIGNALS}

SHORT = ["--epochs", "4", "--set", "method.warmup_epochs=1", "--set", "schedule.checkpoint_epochs=2"]

KILL_AT_STEP = """
import os, signal, sys
from stn_fast import train
from stn_fast.training.trainer import Trainer
advance = Trainer._advance
def advance_and_die(trainer):
    advance(trainer)
    if trainer.step == 31:
        os.kill(os.getpid(), signal.SIGKILL)
Trainer._advance = advance_and_die
train.main(sys.argv[1:])
"""


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)


def signal_at(monkeypatch, step, number):
    advance = Trainer._advance

    def advance_and_signal(trainer):
        advance(trainer)
        if trainer.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "_advance", advance_and_signal)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of SHORT that nothing disturbed."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main([*SHORT, "--run-dir", str(directory)]) == 0
    return directory


@pytest.mark.parametrize("name", ["train", "plot", "contact_sheet", "compare", "explore"])
def test_help_loads_nothing_heavy(name):
    script = (
        f"import sys, runpy; sys.argv = ['x', '--help']\n"
        f"try:\n    runpy.run_module('stn_fast.{name}', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'triton', 'numpy', 'matplotlib', 'sklearn', 'scipy', 'tqdm', 'optuna'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_printing_the_configuration_loads_nothing_heavy(capsys):
    assert train.main(["--print-config", "--seed", "3", "--method", "fixed", "--train-fraction", "0.5"]) == 0
    said = capsys.readouterr().out
    assert "seed: 3" in said
    assert "train_fraction: 0.5" in said
    assert "name: fixed" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--epoch", "3"], "unknown argument '--epoch': did you mean '--epochs'?"),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["--seed", "1_0"], "argument --seed: invalid int value: '1_0'"),
        (["--train-fraction", "0_1e-0"], "argument --train-fraction: invalid float value"),
        (["--set", "schedule={epochs: 1, epochs: 2}"], "key 'epochs' is given twice"),
        (["digit"], "unknown recipe 'digit': did you mean 'digits'?"),
        (["--method", "delta"], "did you mean 'delta-stn'?"),
        (["--set", "optimiser.learning_rate=1"], "did you mean 'optimizer'?"),
        (["--config", "absent.yaml"], "absent.yaml: No such file"),
        (["--epochs", "0"], "schedule.epochs (--epochs) = 0: must be at least 1"),
        (["--train-fraction", "2"], "train_fraction (--train-fraction) = 2.0: must be above 0 and at most 1"),
        (["--train-fraction", "half"], "argument --train-fraction: invalid float value: 'half'"),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(arguments, says, capsys):
    assert train.main(arguments) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_an_impossible_run_directory_is_one_line_and_status_2(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    for directory, says in ((file, "is a file"), (file / "below", "cannot be written (Not a directory)")):
        assert train.main(["--run-dir", str(directory)]) == 2
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1


def test_data_that_are_not_finite_are_one_line_and_status_2(tmp_path, capsys, monkeypatch):
    import sklearn.datasets

    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    pixels[5, 7] = float("nan")
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda return_X_y: (pixels, labels))
    assert train.main(["--run-dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "split holds nan in inputs" in said
    assert said.count("\n") == 1


def test_a_run_leaves_everything_it_should(whole):
    left = {path.name for path in whole.iterdir()} - {".lock"}
    assert left == {"config.yaml", "data.json", "metrics.jsonl", "result.json", "schedule.png", "checkpoints"}
    result = json.loads((whole / "result.json").read_text())
    wanted = {"recipe", "method", "seed", "steps", "wall_seconds", "valid_loss", "test_loss", "test_accuracy"}
    assert wanted | {"hyperparameters", "best_step", "ended_by", "steps_per_second", "versions"} <= result.keys()
    assert {"stn_fast", "torch", "python", "platform", "threads"} <= result["versions"].keys()
    assert (result["recipe"], result["method"], result["seed"]) == ("digits", "stn", 0)
    assert (whole / "schedule.png").read_bytes().startswith(b"\x89PNG")


def test_the_saved_configuration_repeats_the_run(whole, tmp_path):
    again = tmp_path / "again"
    assert train.main(["--config", str(whole / "config.yaml"), "--run-dir", str(again)]) == 0
    assert rows(again) == rows(whole)


def test_a_run_ends_with_a_table_of_the_hyperparameters(whole, capsys):
    assert train.main([*SHORT, "--run-dir", str(whole)]) == 0
    said = capsys.readouterr()
    assert "is finished" in said.err
    for name in ("input_dropout", "weight_decay", "best validation loss", "test accuracy", " a second", str(whole)):
        assert name in said.out


@pytest.mark.parametrize(
    ("number", "status", "step"),
    [(signal.SIGTERM, 143, 14), (signal.SIGTERM, 143, 22), (signal.SIGINT, 130, 14), (signal.SIGUSR1, 143, 22)],
)
def test_a_signal_leaves_a_checkpoint_from_which_the_run_goes_on(whole, tmp_path, capsys, number, status, step):
    directory = tmp_path / "stopped"
    arguments = [*SHORT, "--run-dir", str(directory)]
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, step, number)
        assert train.main(arguments) == status
    said = capsys.readouterr().err
    assert "resumes it" in said
    assert (directory / "checkpoints" / f"step-{step:08d}").is_dir()
    assert not (directory / "result.json").exists()
    assert train.main(arguments) == 0
    assert f"after step {step}" in capsys.readouterr().err
    assert rows(directory) == rows(whole)


def test_signal_handlers_are_restored(whole):
    assert {number: signal.getsignal(number) for number in HANDLERS} == HANDLERS


def test_a_process_killed_outright_resumes_to_the_same_numbers(whole, tmp_path):
    directory = tmp_path / "killed"
    arguments = [*SHORT, "--run-dir", str(directory)]
    assert python("-c", KILL_AT_STEP, *arguments).returncode == -signal.SIGKILL
    done = python("-m", "stn_fast.train", *arguments)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr
    assert rows(directory) == rows(whole)


def test_divergence_is_status_1_and_one_line(tmp_path, capsys):
    hot = ["--set", "optimizer.learning_rate=1e6", "--set", "optimizer.momentum=0", "--set", "optimizer.clip=null"]
    assert train.main([*SHORT, *hot, "--run-dir", str(tmp_path / "hot")]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: the ")
    assert "lower optimizer.learning_rate" in said


def test_a_run_with_other_settings_in_the_directory_is_status_2(whole, capsys):
    assert train.main([*SHORT, "--run-dir", str(whole), "--seed", "9"]) == 2
    said = capsys.readouterr().err
    assert "seed: 0 -> 9" in said
    assert "--no-resume" in said


def test_a_full_disk_is_status_1_and_one_line_and_the_run_goes_on_later(whole, tmp_path, capsys):
    directory = tmp_path / "full"
    arguments = [*SHORT, "--run-dir", str(directory)]

    def fail_later(path, *contents, write_through=checkpoint.write_through):
        if checkpoint.steps(directory / "checkpoints"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_through(path, *contents)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_through", fail_later)
        assert train.main(arguments) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: cannot write {directory}/checkpoints/step-")
    assert "No space left on device" in said
    assert train.main(arguments) == 0
    assert rows(directory) == rows(whole)


def test_as_many_checkpoints_stay_as_are_asked_for_also_on_resume_and_the_numbers_are_the_same(whole, tmp_path):
    """Every epoch is the best so far, and saved."""
    directory = tmp_path / "kept"

    def kept_after(steps, kept):
        pairs = ("schedule.checkpoint_epochs=1", f"schedule.max_steps={steps}", f"schedule.checkpoints_kept={kept}")
        flags = [argument for pair in pairs for argument in ("--set", pair)]
        assert train.main([*SHORT, *flags, "--run-dir", str(directory)]) == 0
        return checkpoint.steps(directory / "checkpoints")

    assert kept_after(22, 3) == [0, 9, 22]
    assert kept_after(36, 2) == [22, 36]
    assert kept_after(49, 4) == [22, 36, 49]
    assert rows(directory) == rows(whole)


def test_a_log_that_cannot_be_written_is_status_1_and_one_line(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").mkdir(parents=True)
    assert train.main([*SHORT, "--run-dir", str(tmp_path), "--no-resume"]) == 1
    about, said = capsys.readouterr().err.splitlines()
    assert about.startswith("digits, stn: 900 training, 400 validation, 497 test examples; ")
    assert said.startswith(f"error: cannot write {tmp_path}")


def printed(arguments, capsys):
    """What --print-config prints for ``arguments``."""
    assert train.main([*arguments, "--print-config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["text", "fashion-mnist-small"])
def test_a_configuration_file_names_its_recipe(tmp_path, capsys, name):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(printed([name, "--seed", "3"], capsys)))
    whole = printed(["--config", str(file)], capsys)
    assert (whole["recipe"], whole["seed"]) == (name, 3)
    assert printed([name, "--config", str(file)], capsys) == whole
    file.write_text(f"recipe: {name}\nseed: 4\n")
    part = printed(["--config", str(file)], capsys)
    assert part == {**whole, "seed": 4}


@pytest.mark.parametrize(
    ("arguments", "precision"),
    [
        ([], "fp32"),
        (["--device", "cuda"], "bf16"),
        (["--device", "cuda", "--set", "precision=fp32"], "fp32"),
        (["cifar10", "--device", "cuda"], "fp32"),
        (["cifar10", "--device", "cuda", "--set", "precision=auto"], "bf16"),
    ],
)
def test_printing_the_configuration_shows_the_precision_of_the_run(arguments, precision, capsys):
    assert printed(arguments, capsys)["precision"] == precision


def test_a_configuration_file_without_a_recipe_is_for_the_one_that_is_named(tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text("seed: 4\n")
    assert printed(["--config", str(file)], capsys)["recipe"] == "digits"
    assert printed(["ptb", "--config", str(file)], capsys)["recipe"] == "ptb"


@pytest.mark.parametrize(
    ("text", "arguments", "says"),
    [
        ("recipe: text\n", ["ptb"], "the first argument is the recipe 'ptb', but {file} is for 'text': leave out"),
        ("recipe: text\n", ["digits"], "the first argument is the recipe 'digits', but {file} is for 'text'"),
        ("recipe: texts\n", [], "unknown recipe 'texts': did you mean 'text'?"),
        ("recipe:\n", [], "recipe (the first argument) = None: must be the name of a recipe in {file}: digits, "),
        ("recipe: [text]\n", [], "recipe (the first argument) = ['text']: must be the name of a recipe in {file}"),
        ("recipe: text\nsched: {}\n", [], "unknown key 'sched' in {file}: did you mean 'schedule'?"),
        ("recipe: text\n", ["--set", "recipe=ptb"], "'ptb': this runs 'text'; name another as the first argument"),
    ],
)
def test_a_recipe_that_is_unclear_is_one_line_and_status_2(tmp_path, capsys, text, arguments, says):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert train.main([*arguments, "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert says.format(file=file) in said
    assert said.count("\n") == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_configuration_can_come_from_a_pipe_which_is_read_once(tmp_path, capsys):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("recipe: text\nseed: 4\n",), daemon=True)
    writer.start()
    config = printed(["--config", str(pipe)], capsys)
    writer.join()
    assert (config["recipe"], config["seed"]) == ("text", 4)


@pytest.mark.parametrize(("name", "root"), [("text", "."), ("cifar10", "nowhere")])
def test_a_run_directory_of_another_recipe_is_one_short_line_and_status_2(whole, capsys, name, root):
    assert train.main([name, "--run-dir", str(whole), "--data-root", root]) == 2
    said = capsys.readouterr().err
    assert said == (
        f"error: {whole} holds a run of the recipe 'digits', not '{name}': "
        "choose another --run-dir, or start over with --no-resume\n"
    )


def test_many_other_settings_are_counted(whole, capsys):
    pairs = ["method.train_steps=3", "optimizer.momentum=0", "schedule.batch_size=9", "train_fraction=.5", "threads=2"]
    flags = [argument for pair in pairs for argument in ("--set", pair)]
    assert train.main([*SHORT, *flags, "--run-dir", str(whole)]) == 2
    assert "train_fraction: 1.0 -> 0.5): choose" in capsys.readouterr().err
    assert train.main([*SHORT, *flags, "--run-dir", str(whole), "--seed", "1", "--method", "fixed"]) == 2
    said = capsys.readouterr().err
    assert said.count(" -> ") == 5
    assert "; and 2 more): choose another --run-dir" in said
