"""Layers have a response other than 0 in these tests."""

import pytest
from random_response import random_response  # noqa: F401 - a fixture


@pytest.fixture(autouse=True)
def responding(random_response):  # noqa: F811 - the fixture
    pass
