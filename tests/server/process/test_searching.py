"""A search from end to end: real files, real engines, a checkpoint of two small blocks."""

from pathlib import Path

import pytest

from quant.layout import read_layout
from quant.measure.gate import Gate
from quant.measure.measurement import read_measurement
from quant.search.found import Found
from quant.search.metrics import METRICS
from quant.search.target import Target
from quant.source import open_source
from quant.store import VariantStore
from server.process.builder import Reporter
from server.process.orders import SearchOrder
from server.process.searcher import search
from tests.quant.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source"), hidden=256)


async def found(source: Path, folder: Path, target: Target) -> Found:
    order = SearchOrder(
        cache=str(folder / "cache"),
        source=str(source),
        target=target,
        gate=Gate(max_times_rounding=None),  # random weights, and little to calibrate on
        default_context=128,
        threads=1,
        texts=8,
        measured_texts=8,
        groups=4,
        budget_s=1.0,
    )
    return await search(order, Reporter(folder / "progress.json"))


@pytest.mark.slow
async def test_a_mixture_within_bits_is_found_built_and_measured_and_again_at_once(
    source: Path, tmp_path: Path
) -> None:
    target = Target(target_bpw=5.0)
    answer = await found(source, tmp_path, target)
    winner = answer.winner
    assert winner is not None, answer.why
    assert winner.bits_per_weight <= 5.0
    assert winner.full
    meeting = [one for one in answer.tries if one.meets]
    assert winner.kl.value == min(one.kl.value for one in meeting)
    assert {one.type for one in answer.sensitivities} <= {"q4_k", "q5_k"}
    assert all(set(one.guesses) == set(METRICS) for one in answer.sensitivities)
    assert [one.metric for one in answer.compared] == list(METRICS)
    store = VariantStore(tmp_path / "cache")
    variant = store.find(winner.key)
    assert variant is not None
    assert variant.manifest.bytes == winner.bytes
    measured = read_measurement(variant.path, variant.manifest)
    assert measured is not None
    assert measured.kl.mean == winner.kl
    built = {one.key for one in store.list()}
    again = await found(source, tmp_path, target)
    assert again == answer
    assert {one.key for one in store.list()} == built
    assert not list((tmp_path / "cache" / "searches").rglob("*.gguf"))


@pytest.mark.slow
async def test_linears_of_four_and_eight_bits_are_mixed(source: Path, tmp_path: Path) -> None:
    layout = read_layout(open_source(str(source), cache=tmp_path))
    linears = sum(weight.elements for _, weight in layout.linears)
    bits = (16 * (layout.elements - linears) + 6.5 * linears) / layout.elements
    target = Target(target_bpw=bits, format="compressed-tensors")
    answer = await found(source, tmp_path, target)
    winner = answer.winner
    assert winner is not None, answer.why
    assert winner.kl.value == min(one.kl.value for one in answer.tries if one.meets)
    mixture = next(one for one in answer.tries if one.stage == "mixture")
    assert bits - 1 < mixture.bits_per_weight <= bits
    schemes = {scheme["bits"] for _, scheme in mixture.recipe["overrides"] if scheme}
    assert {mixture.recipe["scheme"]["bits"], *schemes} == {4, 8}
    assert {one.type for one in answer.sensitivities} == {"int4"}
    assert all(set(one.guesses) == set(METRICS) for one in answer.sensitivities)


async def test_what_nothing_can_meet_is_said_without_trying(source: Path, tmp_path: Path) -> None:
    answer = await found(source, tmp_path, Target(max_bytes=1000))
    assert (answer.winner, answer.tries, answer.sensitivities) == (None, (), ())
    assert "nothing in the space of the search has at most 1,000 bytes" in answer.why
