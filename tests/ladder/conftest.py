import pytest

from tests.ladder.fakes import Quiet


@pytest.fixture
def view():
    return Quiet()
