"""Output of the command lines: a reader that goes away, any encoding, control characters, and closed streams."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest

from stn_fast import command_line
from stn_fast.command_line import run_command
from stn_fast.errors import UserError
from stn_fast.terminal import Output, printable
from stn_fast.training.signals import Interrupted

TRAIN = ["stn_fast.train", "digits", "--max-steps", "2"]
FILES = {"config.yaml", "metrics.jsonl", "result.json", "schedule.png", "checkpoints", "data.json"}


def shell(line):
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True)


def run_unread(*arguments, streams=("stdout",)):
    """Runs stn_fast with ``streams`` into a pipe that has no reader: (exit status, what the other streams say)."""
    reader, writer = os.pipe()
    os.close(reader)
    pipes = {name: writer if name in streams else subprocess.PIPE for name in ("stdout", "stderr")}
    done = subprocess.run([sys.executable, "-m", *map(str, arguments)], text=True, **pipes)
    os.close(writer)
    return done.returncode, (done.stdout or "") + (done.stderr or "")


@pytest.mark.parametrize("module", ["train", "plot", "contact_sheet", "compare", "explore"])
def test_help_into_a_pipe_that_nobody_reads_ends_quietly(module):
    assert run_unread(f"stn_fast.{module}", "--help") == (141, "")


def test_a_configuration_into_a_pipe_that_nobody_reads_ends_quietly():
    assert run_unread("stn_fast.train", "--print-config") == (141, "")


def test_an_error_that_nobody_reads_keeps_its_status():
    assert run_unread("stn_fast.train", "--epochs", "0", streams=("stderr",)) == (2, "")
    assert run_unread("stn_fast.plot", "absent", streams=("stdout", "stderr")) == (2, "")


@pytest.mark.parametrize("streams", [("stdout",), ("stdout", "stderr")])
def test_a_run_whose_output_nobody_reads_goes_on_to_its_end(tmp_path, streams):
    status, said = run_unread(*TRAIN, "--run-dir", tmp_path / "run", streams=streams)
    assert status == 0
    assert "BrokenPipe" not in said
    assert {path.name for path in (tmp_path / "run").iterdir()} - {".lock"} == FILES
    status, said = run_unread("stn_fast.plot", tmp_path / "run", streams=streams)
    assert status == 0
    assert "BrokenPipe" not in said


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_a_run_with_closed_streams_goes_on_to_its_end(tmp_path, closed):
    command = " ".join(f"'{word}'" for word in [sys.executable, "-m", *TRAIN, "--run-dir", tmp_path / "run"])
    done = shell(f"{command} {closed}")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} - {".lock"} == FILES
    assert all(json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_output_that_cannot_be_written_is_one_line_and_status_1():
    done = shell(f"'{sys.executable}' -m stn_fast.train --print-config >/dev/full")
    assert (done.returncode, done.stderr) == (1, "error: cannot write to standard output (No space left on device)\n")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_run_ends_well_in_every_encoding(tmp_path, encoding):
    directory = tmp_path / "läuft σ 走\udcff"
    done = subprocess.run(
        [sys.executable, "-m", *TRAIN, "--run-dir", directory],
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert (directory / "result.json").exists()
    assert b"best validation loss" in done.stdout


def test_an_error_is_one_line_without_control_characters(capsys):
    def command():
        raise UserError("there is no \x1b[31mred\nline\r\x9b \udcff σ")

    assert run_command(command) == 2
    assert capsys.readouterr().err == "error: there is no \\x1b[31mred\\nline\\r\\x9b \\udcff σ\n"


def test_an_error_of_the_system_is_one_line_and_status_1(capsys, tmp_path):
    assert run_command(lambda: len((tmp_path / "absent").read_text())) == 1
    assert capsys.readouterr().err == f"error: No such file or directory: {tmp_path / 'absent'}\n"


def test_a_run_that_a_signal_stops_is_one_line_and_the_status_of_the_signal(capsys):
    def command():
        raise Interrupted(signal.SIGINT, 7)

    assert run_command(command) == 130
    assert capsys.readouterr().err == "error: stopped by SIGINT after step 7, with a checkpoint\n"


def test_text_stays_as_it_is_where_it_can_be_printed():
    assert printable("σ = 0.5, läuft 走 $x_1$ \\n") == "σ = 0.5, läuft 走 $x_1$ \\n"
    assert printable("a\tb\u202ec\x7f") == "a\\tb\\u202ec\\x7f"


def test_output_streams_are_restored(monkeypatch):
    before = sys.stdout, sys.stderr
    assert run_command(lambda: 3) == 3
    assert (sys.stdout, sys.stderr) == before
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert run_command(lambda: print("nowhere") or command_line.complain("nowhere", 4)) == 4


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


def test_after_a_failure_nothing_more_is_written():
    output = Output(Broken())
    assert output.write("abc") == 3
    assert output.reader_gone
    output.stream = None  # would raise
    assert output.write("d") == 1
    output.flush()
