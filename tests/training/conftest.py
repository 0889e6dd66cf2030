"""A run of the digits recipe short enough for a test, and the means to compare two runs."""

from pathlib import Path

import pytest
import torch.distributed
from random_response import random_response  # noqa: F401 - a fixture
from run_files import result, rows
from short_run import short

from stn_fast.recipes import digits
from stn_fast.training.run import run


@pytest.fixture
def make_config(tmp_path):
    """make_config("key=value", ..., name="a"): `short` in tmp_path/name."""
    return lambda *pairs, name="run": short(tmp_path / name, *pairs)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The directory of a `short` run that nothing disturbed, to be read only."""
    directory = tmp_path_factory.mktemp("undisturbed") / "whole"
    run(short(directory), digits.build)
    return directory


@pytest.fixture
def train(make_config):
    """Runs the digits recipe under ``make_config``'s arguments; the run directory."""

    def train(*pairs: str, name: str = "run", resume: bool = True) -> Path:
        config = make_config(*pairs, name=name)
        run(config, digits.build, resume=resume)
        return Path(config.directory)

    return train


@pytest.fixture
def same_run():
    """Asserts that two run directories hold the same numbers, bit for bit."""

    def same_run(one: Path, other: Path) -> None:
        assert rows(one) == rows(other)
        assert result(one) == result(other)

    return same_run


@pytest.fixture
def two():
    """The group of two processes, the other of which does not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()
