"""Seeds of random tests: PHALANX_TEST_SEED repeats a run; without it each run has its own, printed at the top."""

import os
import random

import pytest

SEED = int(os.environ.get("PHALANX_TEST_SEED") or random.SystemRandom().randrange(10**6))


def pytest_report_header() -> str:
    return f"PHALANX_TEST_SEED={SEED}"


@pytest.fixture(scope="session")
def seed() -> int:
    return SEED
