"""Output of the command lines: a reader that goes away, any encoding, control characters, and closed streams."""

import io
import os
import subprocess
import sys

import pytest

from stn_fast import command_line
from stn_fast.command_line import run_command
from stn_fast.errors import UserError
from stn_fast.terminal import Output, printable

TRAIN = [sys.executable, "-m", "stn_fast.train", "digits", "--max-steps", "2"]


def shell(line):
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True)


@pytest.mark.parametrize("module", ["train", "plot", "contact_sheet"])
def test_help_into_a_pipe_that_nobody_reads_ends_quietly(module):
    done = shell(f"'{sys.executable}' -m stn_fast.{module} --help | true; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stderr) == (141, "")


def test_a_configuration_into_a_pipe_that_nobody_reads_ends_quietly():
    done = shell(f"'{sys.executable}' -m stn_fast.train --print-config | true; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("pipe", ["| true", "2>&1 | head -1", "2> >(true)", ">&- 2>&-", "2>&-", ">&-"])
def test_a_run_whose_output_nobody_reads_goes_on_to_its_end(tmp_path, pipe):
    command = " ".join(f"'{word}'" for word in [*TRAIN, "--run-dir", tmp_path / "run"])
    done = shell(f"{command} {pipe}; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    left = {path.name for path in (tmp_path / "run").iterdir()} - {".lock"}
    assert left == {"config.yaml", "metrics.jsonl", "result.json", "schedule.png", "checkpoints"}
    picture = " ".join(f"'{word}'" for word in [sys.executable, "-m", "stn_fast.plot", tmp_path / "run"])
    done = shell(f"{picture} | true; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_output_that_cannot_be_written_is_one_line_and_status_1():
    done = shell(f"'{sys.executable}' -m stn_fast.train --print-config >/dev/full")
    assert (done.returncode, done.stderr) == (1, "error: cannot write to standard output (No space left on device)\n")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252", "utf-8"])
def test_a_run_ends_well_in_every_encoding(tmp_path, encoding):
    directory = tmp_path / "läuft σ 走\udcff"
    done = subprocess.run(
        [*TRAIN, "--run-dir", directory], env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True
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


def test_text_stays_as_it_is_where_it_can_be_printed():
    assert printable("σ = 0.5, läuft 走 $x_1$ \\n") == "σ = 0.5, läuft 走 $x_1$ \\n"
    assert printable("a\tb\u202ec\x7f") == "a\\tb\\u202ec\\x7f"


def test_streams_are_put_back(monkeypatch):
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
