"""What a search keeps, and what a killed one leaves behind."""

from pathlib import Path

from quant.search.evidence import Evidence
from quant.search.shelf import PROBE, PROBES, SearchShelf, sweep
from quant.search.target import Target
from tests.quant.search.world import World


def test_sensitivities_serve_every_target_and_tries_their_own(tmp_path: Path) -> None:
    near, far = Target(max_kl=0.02), Target(max_kl=0.1)
    _, evidence = World().search(near)
    shelf = SearchShelf(tmp_path, ["a source"], near)
    assert shelf.load() == Evidence()
    with shelf.held():
        shelf.save(evidence)
    found = shelf.load()
    assert found.tries == evidence.tries
    assert sorted(found.probes, key=str) == sorted(evidence.probes, key=str)
    other = SearchShelf(tmp_path, ["a source"], far).load()
    assert other.tries == ()
    assert {one.alone for one in other.probes} == {one.alone for one in evidence.probes} - {None}
    assert SearchShelf(tmp_path, ["another source"], near).load() == Evidence()


def test_a_killed_search_leaves_no_probe_and_a_running_one_keeps_its_own(tmp_path: Path) -> None:
    shelves = [SearchShelf(tmp_path, [name], Target(max_kl=0.1)) for name in ("killed", "running")]
    for shelf in shelves:
        (shelf.folder / PROBES / "variants").mkdir(parents=True)
        (shelf.folder / PROBE).touch()
    with shelves[1].held():
        (shelves[1].folder / PROBE).touch()
        sweep(tmp_path)
        assert not list(shelves[0].folder.iterdir())
        assert (shelves[1].folder / PROBE).exists()
