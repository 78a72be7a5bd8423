"""Every algorithm on every engine equals the float64 oracle: 3 SGD steps, uneven token counts,
radius scaled."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from tests import ranks
from tests.conftest import engine_of
from tests.parity import build
from tests.parity.worker import ADAPTED
from tram_ds.algorithms.table import ALGORITHMS

pytestmark = pytest.mark.parity

TOLERANCE = 1e-6  # relative, fp32 against float64
# for layouts that differ from a matrix engine in memory only
SOME = ("asam", "tram_prev", "tram_x", "asam_mesa")
# every use of the output head's weight: read, copied, kept from pass 1 to 2, and in two graphs
UNTIED = ("base", "tram_prev", "tram_x", "asam_r3f", "functional_sam")


Rows = Callable[[str], dict[str, dict[str, float]]]


@pytest.fixture(scope="session")
def rows(kept: str) -> Rows:
    """An engine's whole table, found once."""

    @functools.cache
    def found(engine: str) -> dict[str, dict[str, float]]:
        world = {"single": 1, "fsdp2_hybrid": 4}.get(engine, 2)
        algorithms = () if engine in build.MATRIX else UNTIED if "untied" in engine else SOME
        return ranks.run("tests.parity.worker", kept, engine, *algorithms, world=world)

    return found


def test_a_worker_is_given_all_tests_of_an_engine(request: pytest.FixtureRequest) -> None:
    """By the first parameter, or an engine would be tested as a whole on each of two workers."""
    known = {*build.MATRIX, *build.VARIANTS, "fsdp2_hybrid", "fsdp2_untied"}
    tests = [item for item in request.session.items if item.path == request.path]
    found = {engine_of(item.nodeid) for item in tests if item is not request.node}
    assert tests and found <= known


def check(row: dict[str, float]) -> None:
    assert row["theta"] <= TOLERANCE
    assert row["moved"] > 0.05, "the oracle itself must have gone somewhere"
    for key in ("loss", "distance", "perturbed_loss"):
        assert row[key] <= 1e-5, key


@pytest.mark.parametrize("form", (1, 2, "lean"))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("engine", build.MATRIX)
def test_equals_the_oracle(rows: Rows, engine: str, algorithm: str, form: int | str) -> None:
    """With 1 or 2 micro-batches; `lean`: 2, logits in chunks, and theta_{t-1} looked at ahead of
    time."""
    check(rows(engine)[f"{algorithm}/{form}"])


@pytest.mark.parametrize("row", ("tram_prev/relative", "tram_x/auto"))
@pytest.mark.parametrize("engine", build.MATRIX)
def test_a_radius_that_remembers_equals_the_oracle(rows: Rows, engine: str, row: str) -> None:
    """rho times d over its running mean; rho over the mean of the first distances, times d."""
    check(rows(engine)[row])


@pytest.mark.parametrize("engine", build.MATRIX)
def test_an_ascent_by_norms_alone_equals_the_oracle(rows: Rows, engine: str) -> None:
    check(rows(engine)["asam/norms"])


@pytest.mark.parametrize("engine", build.MATRIX)
def test_a_preconditioned_ascent_equals_the_oracle(rows: Rows, engine: str) -> None:
    """With Adam, by its second moments with the step's own gradient in them."""
    check(rows(engine)["functional_sam/precondition"])


@pytest.mark.parametrize("engine", build.MATRIX)
def test_a_descent_on_noise_equals_the_oracle(rows: Rows, engine: str) -> None:
    """Pass 2 on the z of pass 1; the word embedding learns by the tied head alone."""
    check(rows(engine)["tram_x/descent_noise"])


@pytest.mark.parametrize("algorithm", ADAPTED)
@pytest.mark.parametrize("engine", build.ADAPTED)
def test_adapters_equal_the_oracle_and_the_base_stays(
    rows: Rows, engine: str, algorithm: str
) -> None:
    """The base sharded too on FSDP2 and ZeRO-3; theta_0 of tram_init is the model at the adapters'
    own start."""
    row = rows(engine)[f"{algorithm}/adapted"]
    check(row)
    assert row["frozen"] == 0.0


@pytest.mark.parametrize("form", (2, "lean"))
@pytest.mark.parametrize("algorithm", UNTIED)
@pytest.mark.parametrize("engine", ("fsdp2_untied",))
def test_an_embedding_and_a_head_of_their_own_equal_the_oracle(
    rows: Rows, engine: str, algorithm: str, form: int | str
) -> None:
    """Untied, they are units of FSDP2 of their own, which are gathered apart from the root."""
    check(rows(engine)[f"{algorithm}/{form}"])


@pytest.mark.parametrize("engine", ("fsdp2_untied",))
def test_an_embedding_that_gets_no_gradient_equals_the_oracle(rows: Rows, engine: str) -> None:
    """Untied, the word embedding below the noise of the descent learns nothing."""
    check(rows(engine)["tram_x/descent_noise"])


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", SOME)
@pytest.mark.parametrize("engine", (*build.VARIANTS, "fsdp2_hybrid"))
def test_offload_hybrid_and_persistent_parameters_equal_the_oracle(
    rows: Rows, engine: str, algorithm: str
) -> None:
    """zero3_persistent keeps every parameter gathered: copying shards without regathering would
    train plain Adam."""
    check(rows(engine)[f"{algorithm}/2"])
    check(rows(engine)[f"{algorithm}/lean"])
