"""A signal to one of two processes; tests/faults/test_rank_signals.py has all phases and signals."""

from signalled_runs import check_signal, launch


def test_a_signal_to_one_process_in_an_evaluation_ends_both_and_the_run_goes_on_exactly(tmp_path):
    folders = whole, signalled = tmp_path / "whole", tmp_path / "signalled"
    for folder in folders:
        folder.mkdir()
    launch(whole)
    assert check_signal(signalled, "evaluation", "SIGUSR1", whole / "run") == 12
