"""What a source text names: a folder, a GGUF file or a hub id. Looks at the disk, never at the network."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quant.errors import QuantError
from server.catalog.model import DEFAULT_VARIANT, NAME, CatalogError, Model

HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+(?::[A-Za-z0-9_]{1,24})?)(?:@([\w./-]+))?")
REVISION = re.compile(r"\w[\w./-]*")


@dataclass(frozen=True, slots=True)
class Reference:
    kind: Literal["folder", "gguf", "hub"]
    source: str  # absolute path, or the hub id without its revision
    revision: str | None = None

    @property
    def base_name(self) -> str:
        return base_name(self.source)


def base_name(source: str) -> str:
    """The last part of a path or hub id, as a model id; of a split GGUF file what its parts share."""
    last = re.sub(r"-\d{5}-of-\d{5}$", "", Path(source).name.removesuffix(".gguf"))
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).lstrip("._-")[:96] or "model"


def read_reference(text: str, base: Path) -> Reference:
    """`text` as a path relative to the folder `base`, or else as a hub id ("org/name", "org/name@revision",
    "org/name:Q4_K_M").

    A folder that exists wins over a hub id of the same spelling. Raises ValueError with one line.
    """
    if "://" in text:
        raise ValueError(f"{text!r} is a URL: name a folder, a GGUF file or hub id (org/name)")
    path = Path(
        os.path.abspath(base / Path(text).expanduser())
    )  # links keep their names: a hub cache has them
    if path.is_dir():
        return Reference("folder", str(_checked_folder(path, text)))
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(
                f"{text!r} is a file but not a .gguf file: name the folder that holds config.json"
            )
        return Reference("gguf", str(path))
    hub = None if text.startswith((".", "/", "~")) or text.endswith(".gguf") else HUB_ID.fullmatch(text)
    if hub is None or ".." in text:
        raise ValueError(f"{text!r}: no such folder or GGUF file")
    return Reference("hub", hub[1], hub[2])


def _checked_folder(path: Path, text: str) -> Path:
    if not (path / "config.json").is_file():
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"; to serve a GGUF file name it: {text.rstrip('/')}/{ggufs[0]}" if ggufs else ""
        raise ValueError(f"{text!r} holds no config.json{hint}")
    return path


def gguf_type(path: str) -> str:
    """The file type that a GGUF file says it has ("q4_0"). Raises ValueError where the file is not sound."""
    from quant.gguf.header import read_header

    try:
        found = read_header(Path(path)).file_type
        return "gguf" if found == "unknown" else found
    except (QuantError, OSError) as error:
        raise ValueError(str(error)) from error


def folder_format(path: str) -> str | None:
    """The format of a folder's quantized checkpoint, None for full precision.

    Raises ValueError for a format that nobody here reads. What else is wrong the first load tells.
    """
    from quant.checkpoint import CONFIG, CONFIG_LIMIT
    from quant.files import read_json
    from quant.ready import own_format

    try:
        config = read_json(Path(path) / CONFIG, CONFIG_LIMIT)
    except (QuantError, OSError):
        return None
    try:
        return own_format(config)
    except QuantError as error:
        raise ValueError(str(error)) from error


def own_type(found: Reference) -> str | None:
    """What a source that is served as it is calls itself; None for one that variants are made of.

    Raises ValueError. Of a hub id that names no type nothing is known before it is pulled.
    """
    match found.kind:
        case "gguf":
            return gguf_type(found.source)
        case "folder":
            return folder_format(found.source)
        case "hub":
            _, _, kind = found.source.partition(":")
            return kind.lower() or None


def model_from_source(text: str, base: Path | None = None) -> Model:
    """What `quantserve serve SOURCE` serves: preloaded, under the source's base name. Raises CatalogError."""
    try:
        found = read_reference(text, base or Path.cwd())
        own = own_type(found)
    except ValueError as error:
        raise CatalogError([str(error)]) from error
    assert NAME.fullmatch(found.base_name)
    return Model(
        id=found.base_name,
        source=found.source,
        revision=found.revision,
        variants=() if own else (DEFAULT_VARIANT,),
        default=own or DEFAULT_VARIANT,
        preload=True,
    )
