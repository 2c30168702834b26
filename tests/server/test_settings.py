"""Settings: flags over variables over defaults, and each wrong value one line."""

from pathlib import Path

import pytest

from server import settings as module
from server.settings import (
    PACKAGED_MODELS,
    SettingsError,
    misspelt,
    read_keys,
    read_settings,
    refuse_open_bind,
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder without a models.yaml."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = read_settings({})
    assert settings == module.Settings(cache=tmp_path / ".cache" / "quantserve", models=PACKAGED_MODELS)
    assert (settings.host, settings.port, settings.body_limit) == ("127.0.0.1", 8000, 4_194_304)


def test_flags_beat_variables_and_empty_variables_are_not_set(tmp_path: Path) -> None:
    environ = {
        "QUANTSERVE_PORT": "9000",
        "QUANTSERVE_HOST": "",
        "QUANTSERVE_CACHE": str(tmp_path),
        "PORT": "x",
    }
    settings = read_settings(environ, port="9001", host=None)
    assert (settings.port, settings.host, settings.cache) == (9001, "127.0.0.1", tmp_path)
    assert read_settings(environ).port == 9000


def test_models_are_found_in_order(tmp_path: Path, elsewhere: Path) -> None:
    one, two, here = tmp_path / "one.yaml", tmp_path / "two.yaml", elsewhere / "models.yaml"
    for file in (one, two, here):
        file.touch()
    assert read_settings({"QUANTSERVE_MODELS": str(two)}, models=str(one)).models == one
    assert read_settings({"QUANTSERVE_MODELS": str(two)}).models == two
    assert read_settings({}).models == here
    here.unlink()
    assert read_settings({}).models == PACKAGED_MODELS
    with pytest.raises(SettingsError, match=r"^--models: no such file: gone.yaml$"):
        read_settings({}, models="gone.yaml")


def test_the_packaged_default_is_there() -> None:
    assert PACKAGED_MODELS.is_file()


WRONG = [
    ("PORT", "eighty", "'eighty' is not a whole number from 1 to 65535"),
    ("PORT", "65536", "'65536' is not a whole number"),
    ("PORT", "-1", "'-1' is not a whole number"),
    ("HOST", "a b", "'a b' is not a host name or address"),
    ("CACHE", "/dev/null", "/dev/null is not a folder"),
    ("MODELS", "gone.yaml", "no such file: gone.yaml"),
    ("API_KEYS_FILE", "gone", "no such file: gone"),
    ("API_KEYS_FILE", "/dev/null", "no such file: /dev/null"),
    ("LOG", "loud", "'loud' is not one of debug, info, warning, error"),
    ("ALLOW_NO_KEY", "maybe", "'maybe' is not 1 or 0"),
    ("BUILD_WAIT", "0", "'0' is not a number of seconds above 0"),
    ("BUILD_WAIT", "inf", "'inf' is not a number of seconds"),
    ("PING", "ten", "'ten' is not a number of seconds"),
    ("BODY_LIMIT", "4 parsecs", "'4 parsecs' is not a size"),
    ("CACHE_MAX_BYTES", "0", "'0' is not a size"),
    ("QUEUE_LIMIT", "0", "'0' is not a whole number from 1"),
    ("DEFAULT_CONTEXT", "1", "'1' is not a whole number from 16"),
]


@pytest.mark.parametrize(("variable", "text", "expected"), WRONG)
def test_a_wrong_value_is_one_line(variable: str, text: str, expected: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings({f"QUANTSERVE_{variable}": text})
    (line,) = caught.value.problems
    assert line.startswith(f"QUANTSERVE_{variable}: ")
    assert expected in line


def test_all_wrong_values_at_once_named_as_they_were_given() -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings({"QUANTSERVE_PORT": "x", "QUANTSERVE_LOG": "y"}, host="a b", log_level="z")
    labels = [line.partition(":")[0] for line in caught.value.problems]
    assert labels == ["--host", "QUANTSERVE_PORT", "--log"]


def test_only_the_named_fields_are_read() -> None:
    assert read_settings({"QUANTSERVE_PORT": "x"}, ("cache",)).port == 8000


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("500MB", 500_000_000), ("20 GiB", 20 * 2**30), ("1.5kb", 1500), ("2TB", 2 * 10**12)],
)
def test_sizes(text: str, size: int) -> None:
    assert read_settings({"QUANTSERVE_CACHE_MAX_BYTES": text}).cache_max_bytes == size


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert refuse_open_bind(read_settings({}, host=host)) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "localhost.example.org"])
def test_beyond_loopback_needs_a_key_or_a_word(host: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# mine\nsecret\n")
    refusal = refuse_open_bind(read_settings({}, host=host))
    assert refusal is not None
    assert "\n" not in refusal
    assert host in refusal
    assert refuse_open_bind(read_settings({}, host=host, api_keys_file=str(keys))) is None
    assert refuse_open_bind(read_settings({"QUANTSERVE_ALLOW_NO_KEY": "1"}, host=host)) is None


def test_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# for the web page\n\n  one \ntwo#2\n")
    assert read_keys(file) == ("one", "two#2")
    file.write_text("good\nverysecret key\n")
    with pytest.raises(ValueError, match="keys:2: ") as caught:
        read_keys(file)
    assert "verysecret" not in str(caught.value)
    with pytest.raises(SettingsError, match="keys:2: "):
        read_settings({}, api_keys_file=str(file))
    file.write_text("# none\n")
    with pytest.raises(SettingsError, match="holds no key"):
        read_settings({}, admin_keys_file=str(file))


def test_misspelt_variables_are_named() -> None:
    environ = {"QUANTSERVE_PROT": "1", "QUANTSERVE_PORT": "2", "QUANTSERVE_SOMETHING_ELSE": "3", "PORTT": "4"}
    assert misspelt(environ) == ["QUANTSERVE_PROT is not a setting: did you mean QUANTSERVE_PORT?"]
