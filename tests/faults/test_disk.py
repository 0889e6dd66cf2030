"""Every call of a run that changes the disk, failing in turn with each error."""

import errno

import pytest
from disk_faults import calls_of, check_fault, tiny
from failing_disk import ERRORS, KINDS


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_says_what_it_could_not_write_and_goes_on_later(tmp_path, kind, error):
    whole = tiny(tmp_path / "whole")
    calls = [call for call in calls_of(tmp_path / "calls") if call[0] == kind]
    assert calls
    for call in calls:
        check_fault(call, error, whole, tmp_path / "run")
