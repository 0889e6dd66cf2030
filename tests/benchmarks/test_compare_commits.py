"""benchmarks.compare_commits: what two commits compute, compile and how fast."""

import json
import math
from types import SimpleNamespace

import pytest
from compile_ahead import hash_of

from benchmarks import compare_commits
from benchmarks.compare_commits import Commit, compare_losses, compare_speed, main


@pytest.fixture
def small_cases(monkeypatch):
    """The cases of the benchmarks, small."""
    text = compare_commits._one_commit().replace('torch.device("cpu"))', 'torch.device("cpu"), quick=True)')
    assert "quick=True" in text
    monkeypatch.setattr(compare_commits, "_one_commit", lambda: text)


def test_the_same_files_give_the_same_bits():
    row = compare_losses(Commit(None), Commit(None), "digits", steps=6, repeats=1)
    assert row["equal"]
    assert (row["training_steps"], row["validation_steps"]) == (4, 2)


def test_losses_that_differ_in_one_bit_are_told_by_step_and_status(monkeypatch, capsys):
    def run(self, *arguments):
        last = 2.0 if first else math.nextafter(2.0, 3.0)
        first.clear()
        return json.dumps({"kind": ["train", "valid"], "loss": [(1.0).hex(), last.hex()], "seconds": [0.0, 1.0]})

    first = [True]
    monkeypatch.setattr(Commit, "run", run)
    monkeypatch.setattr(compare_commits, "Commit", lambda _: Commit(None))
    assert main(["HEAD", "--recipes", "digits", "--steps", "2", "--repeats", "1"]) == 1
    assert "DIFFERENT at step 1: valid 2 and valid 2" in capsys.readouterr().out


def test_operations_take_turns(small_cases, capsys):
    (row,) = compare_speed(Commit(None), Commit(None), ["gated_linear train"], seconds=0.1)
    assert row["case"].startswith("gated_linear train 32x64x48")
    assert row["rounds"] >= 7
    assert row["low"] <= row["new_to_old"] <= row["high"]
    assert "gated_linear train" in capsys.readouterr().out


def test_a_side_that_ends_is_told(small_cases):
    commit = Commit(None)
    process = commit.turns()
    with pytest.raises(compare_commits.UserError, match="ended with status 1"):
        compare_commits._ask(process, {"case": "there is no such case"})


def test_an_unknown_commit_is_named(capsys):
    with pytest.raises(compare_commits.UserError, match="0123abcdef: there is no such commit"):
        main(["0123abcdef"])


def test_kernels_that_differ_in_instructions_alone_are_changed(monkeypatch):
    hashes = iter([{"a": "1", "b": "2", "gone": "3"}, {"a": "1", "b": "other", "new": "4"}])

    def run(self, script, option, path):
        assert (script, option) == ("tests/compile_table.py", "--hashes")
        with open(path, "w") as file:
            json.dump(next(hashes), file)

    monkeypatch.setattr(Commit, "run", run)
    found = compare_commits.compare_kernels(Commit(None), Commit(None), [])
    assert found == {"configurations": 2, "changed": ["b"], "removed": ["gone"], "added": ["new"]}


def test_a_hash_is_of_instructions_not_of_their_place_in_a_file():
    ptx = """
    .visible .entry kernel(
    {
$L__func_begin0:
\t.loc\t1 20 0                           // kernels/gates.py:20:0
\tmov.u32 \t%r1, %ctaid.x;
$L__tmp1:
\t.loc\t1 21 0
\tret;
}
\t.file\t1 "/one/kernels/gates.py"
\t.section\t.debug_abbrev
"""
    moved = ptx.replace("1 20 0", "1 33 0").replace("gates.py:20", "gates.py:33").replace("/one/", "/another/")
    assert hash_of(moved) == hash_of(ptx)
    assert hash_of(ptx.replace("%r1", "%r2")) != hash_of(ptx)


def test_a_commit_gets_a_folder_where_its_own_kernels_are_found(monkeypatch, tmp_path):
    monkeypatch.setattr(compare_commits, "FOLDERS", tmp_path)
    run, built = compare_commits.subprocess.run, []

    def without_building(command, **options):
        if "setup.py" in command:
            built.append(command)
            return SimpleNamespace(returncode=0)
        return run(command, **options)

    monkeypatch.setattr(compare_commits.subprocess, "run", without_building)
    for commit in ("HEAD", "HEAD"):  # the second time it is there
        folder = Commit(commit).folder
    code = "import stn_fast.kernels.gates as gates; print(gates.__file__)"
    assert Commit("HEAD").run("-c", code).strip() == str(folder / "stn_fast/kernels/gates.py")
    assert len(built) == 1


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ([("train", "0x1p+0")], [("train", "0x1p+0")], None),
        ([("train", "0x1p+0")], [("valid", "0x1p+0")], "step 0: train 1 and valid 1"),
        ([("train", "0x1p+0")] * 2, [("train", "0x1p+0")], "2 and 1 losses"),
    ],
)
def test_runs_part_where_a_kind_a_loss_or_their_number_differs(before, after, told):
    assert compare_commits._difference(before, after) == told


@pytest.mark.parametrize("arguments", [["--steps", "1"], ["--repeats", "0"]])
def test_too_few_steps_to_compare_are_refused(arguments):
    with pytest.raises(compare_commits.UserError, match="at least 2"):
        main(["HEAD", *arguments])


def test_a_choice_of_operations_or_kernels_asks_for_them(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(compare_commits, "Commit", lambda name: Commit(None))
    monkeypatch.setattr(compare_commits, "compare_speed", lambda old, new, ops, seconds: asked.append(ops) or [])
    same = dict(configurations=1, changed=[], removed=[], added=[])
    monkeypatch.setattr(compare_commits, "compare_kernels", lambda old, new, only: asked.append(only) or same)
    assert main(["HEAD", "--recipes", "--ops", "perturb", "--only", "sm90"]) == 0
    assert asked == [["sm90"], ["perturb"]]
