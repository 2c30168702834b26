"""A few hundred spoilt requests against the toy; `make test-hostile` sends thousands to a real model."""

import asyncio
import random
from pathlib import Path

import pytest

from tests.hostile.mutants import Report, attack, made
from tests.hostile.operators import GENTLE, RAW, ROUGH, VALID, mutant
from tests.server.api.support import application, client
from tests.server.pool.support import toy, write_gguf


def test_there_are_many_operators_and_a_seed_gives_the_same_mutants() -> None:
    assert len({*GENTLE, *ROUGH, *RAW}) >= 15
    one, other = ([m.data for m in made("toy", 5, 200)] for _ in range(2))
    assert one == other
    assert one != [m.data for m in made("toy", 6, 200)]
    used = {name for m in made("toy", 1, 2000) for name in m.operators}
    assert used == {operator.__name__ for operator in (*GENTLE, *ROUGH, *RAW)}
    paths = {path for path, _ in VALID}
    assert {mutant("toy", random.Random(seed)).path for seed in range(300)} == paths


async def test_no_spoilt_request_makes_the_server_fail(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = Report()
    model = toy(write_gguf(tmp_path / "toy.gguf"), context=512, parallel=4)
    async with application(tmp_path, model) as app, client(app) as http:
        await asyncio.wait_for(attack(http, made("toy", 1, 300), report), 120)
    assert not report.faults, report.faults[:5]
    assert report.sent == 300
    assert report.reached >= 0.3 * report.sent
    assert "unexpected" not in caplog.text
