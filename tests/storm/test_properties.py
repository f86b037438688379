"""The short profile of `make storm`: a few inputs of each subject, fresh each time; hypothesis shrinks failures."""

import contextlib
import os

from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded

from fastcifar.errors import UserError
from tests.storm import recipes, stores

SEED = int(os.environ.get("FASTCIFAR_TEST_SEED") or int.from_bytes(os.urandom(4), "big"))
SHORT = settings(database=None, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))


@seeded(SEED)
@settings(SHORT, max_examples=150)
@given(recipes.mutated())
def test_a_mutated_recipe_is_refused_or_survives(content):
    with contextlib.suppress(UserError):
        recipes.check(content)


@seeded(SEED)
@settings(SHORT, max_examples=60)
@given(stores.DAMAGE)
def test_a_damaged_store_is_noticed(drawn):
    with contextlib.suppress(UserError):
        stores.check(drawn)
