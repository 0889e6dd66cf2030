"""The digest of the package's sources: what changes it, and how rows of other sources are counted."""

from importlib.util import find_spec
from pathlib import Path

import pytest

import stn_fast
from stn_fast.comparison.sources import of_other_sources, sources_digest


@pytest.fixture
def package(tmp_path):
    """A package with a linked folder, as a clone's, and a file for the extension."""
    for name in ("package/a.py", "package/sub/b.py", "linked/c.py", "_C.so"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "package/kernels").symlink_to("../linked", target_is_directory=True)
    return tmp_path


def digest(folder):
    return sources_digest(folder / "package", folder / "_C.so")


@pytest.mark.parametrize("name", ["package/a.py", "package/sub/b.py", "linked/c.py", "_C.so"])
def test_a_change_of_any_source_changes_the_digest(package, name):
    before = digest(package)
    (package / name).write_text("changed")
    assert digest(package) != before


def test_files_that_are_no_sources_do_not_change_the_digest(package):
    before = digest(package)
    (package / "package/__pycache__").mkdir()
    (package / "package/__pycache__/a.pyc").write_text("compiled")
    assert digest(package) == before
    (package / "package/a.py").rename(package / "package/z.py")
    assert digest(package) != before


def test_the_digest_of_the_package_covers_its_kernels_and_its_extension(monkeypatch):
    read, names = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda path: names.append(path.name) or read(path))
    assert sources_digest() == sources_digest(Path(stn_fast.__path__[0]))
    assert {"trainer.py", "gated_linear_matmul.py", Path(find_spec("stn_fast._C").origin).name} <= set(names)


def test_rows_of_other_sources_are_counted():
    rows = [{"sources": name} for name in "aab"]
    assert of_other_sources(rows, "a") == "1 of 3 rows were made by other sources of the package."
    assert of_other_sources(rows[:2], "a") is None
