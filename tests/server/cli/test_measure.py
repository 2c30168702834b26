"""`quantserve measure` and `report`: the command that a report prints measures the same again."""

import json
import shlex
from pathlib import Path
from typing import Any

from tests.quant.checkpoints import write_checkpoint
from tests.server.cli.conftest import Cli

MIXTURE = {"method": "llama", "format": "gguf", "type": "q4_0", "overrides": [["ffn_down", "q8_0"]]}


def test_custom_variants_are_measured_again_by_their_reports_command(cli: Cli, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "small")
    first = cli("measure", source, "--recipe", json.dumps(MIXTURE), "--texts", "8", "--cache", "one")
    assert first.returncode == 0, first.stderr
    (found,) = reports(cli, "report", source, "--json", "--cache", "one")
    assert found["id"].startswith("small:custom-")
    words = shlex.split(found["command"])
    assert words[:2] == ["quantserve", "measure"]
    elsewhere = cli(*words[1:], "--cache", "two")  # where nothing is built
    assert elsewhere.returncode == 0, elsewhere.stderr
    (again,) = reports(cli, "report", source, "--json", "--cache", "two")
    assert again["id"] == found["id"]
    assert again["measurement"]["reference"]["text"] == found["measurement"]["reference"]["text"]
    assert again["recipe"] == found["recipe"] == MIXTURE
    texts = [[tokens for _, tokens in one["measurement"]["texts"]] for one in (again, found)]
    assert texts[0] == texts[1]
    name = found["id"].partition(":")[2]
    by_name = cli("measure", source, "--variants", name, "--cache", "one")
    assert by_name.returncode == 0, by_name.stderr
    assert name in by_name.stdout
    unknown = cli("measure", source, "--variants", "custom-00000000", "--cache", "one")
    assert unknown.returncode == 1
    assert "--recipe JSON" in unknown.stderr


def reports(cli: Cli, *arguments: str | Path) -> list[dict[str, Any]]:
    done = cli(*arguments)
    assert done.returncode == 0, done.stderr
    decoder, text, found = json.JSONDecoder(), done.stdout.strip(), []
    while text:
        one, end = decoder.raw_decode(text)
        found.append(one)
        text = text[end:].strip()
    return found
