"""Kills of whole processes, as they are started by the command line."""

from pathlib import Path

import kills


def test_whole_processes_survive_kills(capsys):
    assert kills.main(["--recipes", "digits", "--kills", "4", "--whole-processes"]) == 0
    assert "digits (stn, delta-stn): 4 kills survived" in capsys.readouterr().out
    assert Path(kills.__file__).parent == Path(__file__).parent
