"""What a run is told from outside: command-line flags first, then QUANTSERVE_* variables, then defaults.

Every wrong value is one line, and all lines are reported together.
"""

import difflib
import ipaddress
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

LogLevel = Literal["debug", "info", "warning", "error"]

PACKAGED_MODELS = Path(__file__).parent / "default.yaml"
PREFIX = "QUANTSERVE_"
KEY = re.compile(r"[!-~]+")


class SettingsError(Exception):
    """`problems` holds one line for each wrong value."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def default_cache() -> Path:
    return Path.home() / ".cache" / "quantserve"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run's settings. Paths are absolute where they were read from flags or variables."""

    cache: Path = field(default_factory=default_cache)
    models: Path = PACKAGED_MODELS
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys_file: Path | None = None  # None: any key is accepted and only salts the prefix cache
    admin_keys_file: Path | None = None  # None: admin routes answer loopback peers only
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # besides those of the file
    admin_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_hosts: tuple[str, ...] = ()  # of the Host header, besides loopback and `host`; "*": every one
    key_concurrency: int | None = None  # requests of one key that run at once
    key_rate: int | None = None  # requests of one key in a minute
    allow_no_key: bool = False  # bind beyond loopback without API keys (containers, trusted networks)
    log_level: LogLevel = "info"
    log_format: Literal["text", "json"] = "text"
    tls_certificate: Path | None = None  # PEM files; both or none
    tls_key: Path | None = None
    build_wait_s: float = 600.0  # how long a plain request waits for a build or a load
    ping_s: float = 15.0  # between two comments that keep a stream alive
    body_limit: int = 4 * 1024**2  # bytes of one request body
    body_wait_s: float = 30.0  # from the head of a request to the end of its body
    write_wait_s: float = 60.0  # for a client that reads nothing of its answer, before it is cut
    queue_limit: int = 256  # requests that may wait for one engine
    default_context: int = 4096  # tokens, for models that name no context
    lark_grammars: bool = False  # take grammars from requests, besides schemas, expressions and choices
    cache_max_bytes: int | None = None  # None: what the disk holds
    memory_budget: int | None = None  # bytes that all engines may hold; None: most of the machine's
    gpu_memory_budget: int | None = None  # the same of each GPU
    measure_budget_s: float = 20.0  # that a first load waits for a quick measurement; 0: for none
    jobs_at_once: int = 1  # builds and measurements; downloads have a queue of their own


Reader = Callable[[str], object]


def _file(text: str) -> Path:
    path = Path(text).expanduser().absolute()
    if not path.is_file():
        raise ValueError(f"no such file: {text}")
    return path


def _keys_file(text: str) -> Path:
    path = _file(text)
    if not read_keys(path):
        raise ValueError(f"{text} holds no key (one a line, # starts a comment)")
    return path


def _keys(text: str) -> tuple[str, ...]:
    """Keys between commas. The message never shows one."""
    keys = tuple(key for part in text.split(",") if (key := part.strip()))
    if not keys or not all(map(KEY.fullmatch, keys)):
        raise ValueError("keys are visible ASCII characters, with commas between them")
    return keys


def _hosts(text: str) -> tuple[str, ...]:
    names = tuple(name for part in text.split(",") if (name := part.strip()))
    for name in names:
        if name != "*" and not re.fullmatch(r"[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]+\]", name):
            raise ValueError(f"{name!r} is not a host name (names without ports, commas between them, or *)")
    return names


def _folder(text: str) -> Path:
    path = Path(text).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"{text} is not a folder")
    return path


def _host(text: str) -> str:
    if not re.fullmatch(r"[\w.:%-]+|\[[\w.:%-]+\]", text):
        raise ValueError(f"{text!r} is not a host name or address")
    return text.strip("[]")


def _whole(low: int, high: int) -> Reader:
    def read(text: str) -> int:
        if not re.fullmatch(r"\d{1,12}", text) or not low <= int(text) <= high:
            raise ValueError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return read


def _seconds(text: str) -> float:
    if not re.fullmatch(r"\d{1,9}(\.\d+)?", text) or float(text) == 0:
        raise ValueError(f"{text!r} is not a number of seconds above 0")
    return float(text)


def _budget(text: str) -> float:
    return 0.0 if text == "0" else _seconds(text)


UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([kmgt]i?b)?", text.strip().lower())
    size = int(float(found[1]) * UNITS[found[2] or ""]) if found else 0
    if size < 1:
        raise ValueError(f"{text!r} is not a size such as 500MB, 20GiB or a number of bytes")
    return size


def _level(text: str) -> str:
    if text.lower() not in ("debug", "info", "warning", "error"):
        raise ValueError(f"{text!r} is not one of debug, info, warning, error")
    return text.lower()


def _flag(text: str) -> bool:
    if text.lower() not in ("0", "1", "true", "false", "yes", "no"):
        raise ValueError(f"{text!r} is not 1 or 0")
    return text.lower() in ("1", "true", "yes")


def _format(text: str) -> str:
    if text.lower() not in ("text", "json"):
        raise ValueError(f"{text!r} is not text or json")
    return text.lower()


READERS: Mapping[str, Reader] = {
    "cache": _folder,
    "models": _file,
    "host": _host,
    "port": _whole(1, 65535),
    "api_keys_file": _keys_file,
    "admin_keys_file": _keys_file,
    "api_keys": _keys,
    "admin_keys": _keys,
    "allowed_hosts": _hosts,
    "key_concurrency": _whole(1, 1_000_000),
    "key_rate": _whole(1, 1_000_000),
    "allow_no_key": _flag,
    "log_level": _level,
    "log_format": _format,
    "tls_certificate": _file,
    "tls_key": _file,
    "build_wait_s": _seconds,
    "ping_s": _seconds,
    "body_limit": _bytes,
    "body_wait_s": _seconds,
    "write_wait_s": _seconds,
    "queue_limit": _whole(1, 1_000_000),
    "default_context": _whole(16, 16_777_216),
    "lark_grammars": _flag,
    "cache_max_bytes": _bytes,
    "memory_budget": _bytes,
    "gpu_memory_budget": _bytes,
    "measure_budget_s": _budget,
    "jobs_at_once": _whole(1, 64),
}
VARIABLES = {name: PREFIX + name.removesuffix("_s").upper() for name in READERS} | {
    "log_level": PREFIX + "LOG"
}


def read_settings(
    environ: Mapping[str, str], fields: Collection[str] = READERS.keys(), **flags: str | None
) -> Settings:
    """Settings with the named fields read and the others at their defaults.

    `flags` are the texts given on the command line, by field name; None is "not given". Raises SettingsError.
    An empty variable counts as not set, as container files pass optional variables on.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name in fields:
        flag, variable = flags.get(name), VARIABLES[name]
        text = environ.get(variable) or None if flag is None else flag
        if text is None:
            continue
        try:
            values[name] = READERS[name](text)
        except (ValueError, OSError) as error:
            label = variable if flag is None else flag_of(name)
            problems.append(f"{label}: {error}")
    if (values.get("tls_certificate") is None) != (values.get("tls_key") is None):
        problems.append(f"{VARIABLES['tls_certificate']} and {VARIABLES['tls_key']}: give both or none")
    if problems:
        raise SettingsError(problems)
    if "models" not in values and (here := Path("models.yaml").absolute()).is_file():
        values["models"] = here
    return Settings(**values)


def flag_of(name: str) -> str:
    return "--" + VARIABLES[name].removeprefix(PREFIX).lower().replace("_", "-")


def refuse_open_bind(settings: Settings) -> str | None:
    """Why this host may not be bound without keys, or None. Other names than localhost count as not local."""
    if settings.api_keys_file or settings.api_keys or settings.allow_no_key or is_loopback(settings.host):
        return None
    return (
        f"refusing to listen on {settings.host} without API keys: give --api-keys-file, "
        "or --allow-no-key where the network itself is trusted"
    )


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def misspelt(environ: Mapping[str, str]) -> list[str]:
    """A line for each QUANTSERVE_* variable that nobody reads but that is nearly the name of one."""
    lines = []
    for name in sorted(environ):
        known = name in VARIABLES.values() or not name.startswith(PREFIX)
        if not known and (near := difflib.get_close_matches(name, VARIABLES.values(), 1, 0.85)):
            lines.append(f"{name} is not a setting: did you mean {near[0]}?")
    return lines


def read_keys(path: Path) -> tuple[str, ...]:
    """Keys of a file, one a line; blank lines and lines that start with # do not count.

    Raises ValueError naming file and line, but never the key, where a key could not stand in an HTTP header.
    """
    keys = []
    for number, line in enumerate(path.read_bytes().decode("utf-8", "replace").splitlines(), 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not KEY.fullmatch(key):
            raise ValueError(f"{path}:{number}: a key is visible ASCII characters without spaces")
        keys.append(key)
    return tuple(keys)
