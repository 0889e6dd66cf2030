"""A disk that fails: each call of writing a checkpoint, and some of every kind and file of a run.

tests/faults/test_disk.py has all calls of a run with all errors.
"""

import errno

import pytest
import torch
from disk_faults import calls_of, check_fault, tiny
from failing_disk import ERRORS, KINDS, FailingDisk

from stn_fast.training import checkpoint
from stn_fast.training.disk import CannotWrite

NO_SPACE, NO_PERMISSION, BROKEN = errno.ENOSPC, errno.EACCES, errno.EIO
PARTIAL = "runs/tiny/checkpoints/.step-00000002.partial"


def state(step):
    return {"weights": torch.full((3,), float(step)), "step": step}


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
def test_no_call_that_fails_harms_the_checkpoint_before(tmp_path, error):
    def second_write(disk, root):
        checkpoint.write(root, 1, state(1), 1)
        with disk.patched():
            checkpoint.write(root, 2, state(2), 2)

    complete = FailingDisk(tmp_path)
    second_write(complete, tmp_path / "complete")
    calls = [(kind, path.replace("complete", "checkpoints"), count) for kind, path, count in complete.calls]
    assert {kind for kind, *_ in calls} == {*KINDS}
    for number, call in enumerate(calls):
        folder = tmp_path / str(number)
        folder.mkdir()
        root = folder / "checkpoints"
        with pytest.raises(CannotWrite, match=rf"cannot write {root}/step-00000002 \({ERRORS[error]}\)"):
            second_write(FailingDisk(folder, call, error), root)
        renamed = call[0] == "fsync" and call[1] == "checkpoints"  # it only may not be on the disk yet
        assert checkpoint.read_newest(root, "cpu", pytest.fail)[1]["step"] == (2 if renamed else 1), call
        assert {path.name for path in root.iterdir()} <= {"step-00000001", "step-00000002", ".step-00000002.partial"}
        checkpoint.write(root, 2, state(2), 2)
        assert checkpoint.read_newest(root, "cpu", pytest.fail)[1]["step"] == 2
        assert checkpoint.steps(root) == [1, 2]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("undisturbed") / "tiny")


SOME = [
    (("mkdir", "runs/tiny", 0), NO_PERMISSION),
    (("open", "runs/tiny/.lock", 0), NO_PERMISSION),
    (("rename", "runs/tiny/.config.yaml..partial", 0), BROKEN),
    (("write", "runs/tiny/.data.json..partial", 0), NO_SPACE),
    (("write", "runs/tiny/metrics.jsonl", 2), NO_SPACE),
    (("fsync", "runs/tiny/metrics.jsonl", 1), BROKEN),
    (("mkdir", PARTIAL, 0), NO_PERMISSION),
    (("write", f"{PARTIAL}/tensors.safetensors", 3), NO_SPACE),
    (("fsync", f"{PARTIAL}/state.json", 0), BROKEN),
    (("rename", PARTIAL, 0), BROKEN),
    (("open", "runs/tiny/.result.json..partial", 0), NO_PERMISSION),
]


@pytest.mark.parametrize(
    ("call", "error"), SOME, ids=lambda value: str(value) if isinstance(value, int) else "-".join(value[:2])
)
def test_a_run_says_what_it_could_not_write_and_goes_on_later(undisturbed, tmp_path, call, error):
    check_fault(call, error, undisturbed, tmp_path / "run")


def test_all_files_of_a_run_are_among_its_calls(tmp_path):
    """The names above are those of a run; none of its files is written by another way."""
    calls = calls_of(tmp_path)
    assert {call[:2] for call, _ in SOME} <= {call[:2] for call in calls}
    opened = " ".join(path for kind, path, _ in calls if kind == "open")
    for path in (tmp_path / "runs" / "tiny").rglob("*"):
        assert path.is_dir() or path.name in opened
