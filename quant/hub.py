"""Checkpoints from a Hugging Face hub, by huggingface_hub, which is imported when it is needed."""

import io
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from quant.checkpoint import CONFIG, INDEX, TEXT_FILES, WEIGHTS, read_config, weight_files
from quant.errors import BadSource, DiskFull, DownloadBroken
from quant.files import disk_full_is_typed
from quant.progress import Progress, Report

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,127}", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubId:
    repo: str
    revision: str | None


def parse_hub_id(ref: str, revision: str | None) -> HubId | None:
    """ "org/name" or "org/name@revision"; None for anything else. Raises BadSource for two revisions."""
    repo, _, pinned = ref.partition("@")
    if not _ID.fullmatch(repo) or ".." in ref:
        return None
    if pinned and revision and pinned != revision:
        raise BadSource(f"two revisions are given: {pinned} and {revision}")
    wanted = pinned or revision
    if wanted and (not _REVISION.fullmatch(wanted) or ".." in wanted):
        raise BadSource("the revision is not a branch, tag or commit")
    return HubId(repo, wanted)


@dataclass(frozen=True, slots=True)
class Hub:
    endpoint: str | None = None  # None: huggingface_hub's own, from HF_ENDPOINT
    folder: Path | None = None  # where snapshots are kept; None: huggingface_hub's own, from HF_HOME

    def snapshot(self, wanted: HubId, *, local_only: bool, report: Report) -> Path:
        """Folder of the snapshot, named by its commit. Downloads what is missing.

        Raises BadSource, and DiskFull before anything is downloaded. A hub that cannot be reached is no error
        where the snapshot is there already.
        """
        with _hub_errors(wanted, local_only), disk_full_is_typed():
            if local_only:
                return self._local(wanted)
            sizes = self._sizes(wanted)
            return self._whole(wanted) if sizes is None else self._pull(wanted, sizes, report)

    def _local(self, wanted: HubId) -> Path:
        """The texts must be there; which weights must, the caller learns from them."""
        patterns = [*TEXT_FILES, INDEX]
        return self._download(wanted.repo, wanted.revision, allow_patterns=patterns, local_files_only=True)

    def _whole(self, wanted: HubId) -> Path:
        """What is here of a hub that cannot be reached. Raises DownloadBroken where weights are missing."""
        folder = self._local(wanted)
        names = frozenset(path.name for path in folder.iterdir())
        weights = weight_files(folder, names) if {INDEX, WEIGHTS} & names else (WEIGHTS,)
        if not all((folder / name).exists() for name in weights):
            raise DownloadBroken(f"{wanted.repo} is not wholly on this machine, and no hub can be reached")
        return folder

    def _pull(self, wanted: HubId, sizes: dict[str, int], report: Report) -> Path:
        """Texts first: a model that is refused costs no download of weights."""
        if CONFIG not in sizes:
            hint = "; it holds GGUF files: name one that you downloaded" if _has_gguf(sizes) else ""
            raise BadSource(f"{wanted.repo} has no {CONFIG}{hint}")
        texts = [name for name in sizes if name in {*TEXT_FILES, INDEX} or _is_config(name)]
        folder = self._download(wanted.repo, wanted.revision, allow_patterns=texts)
        read_config(folder)
        weights = weight_files(folder, frozenset(sizes))
        missing = [name for name in weights if not (folder / name).exists()]
        self._require_room(folder, sum(sizes.get(name, 0) for name in missing))
        if not missing:
            return folder
        patterns = [*texts, *weights]
        return self._download(wanted.repo, folder.name, allow_patterns=patterns, tqdm_class=_bar(report))

    def _download(self, repo: str, revision: str | None, **options: Any) -> Path:
        from huggingface_hub import snapshot_download

        options.setdefault("tqdm_class", _bar(None))
        found = snapshot_download(
            repo, revision=revision, endpoint=self.endpoint, cache_dir=self.folder, **options
        )
        return Path(found)

    def _sizes(self, wanted: HubId) -> dict[str, int] | None:
        """Bytes of each file at the top of the repository. None: the hub cannot be reached."""
        from huggingface_hub import HfApi, errors

        try:
            info = HfApi(endpoint=self.endpoint).model_info(
                wanted.repo, revision=wanted.revision, files_metadata=True, timeout=20
            )
        except errors.HfHubHTTPError:  # it answered
            raise
        except (errors.HTTPError, errors.OfflineModeIsEnabled):  # type: ignore[attr-defined]  # its client's
            return None
        return {file.rfilename: file.size or 0 for file in info.siblings or () if "/" not in file.rfilename}

    def _require_room(self, folder: Path, needed: int) -> None:
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise DiskFull(f"the download needs {needed:,} bytes, but {free:,} are free")


def _is_config(name: str) -> bool:
    return "config" in name and name.endswith(".json")


def _has_gguf(sizes: dict[str, int]) -> bool:
    return any(name.endswith(".gguf") for name in sizes)


@contextmanager
def _hub_errors(wanted: HubId, local_only: bool) -> Iterator[None]:
    """huggingface_hub's errors as one line each."""
    from huggingface_hub import errors

    at = f"{wanted.repo}@{wanted.revision}" if wanted.revision else wanted.repo
    try:
        yield
    except errors.GatedRepoError as error:
        raise BadSource(
            f"{wanted.repo} asks for permission on its hub page before it can be downloaded"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise BadSource(f"{wanted.repo} has no revision {wanted.revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise BadSource(f"there is no folder and no hub repository {wanted.repo}") from error
    except (errors.LocalEntryNotFoundError, FileNotFoundError) as error:
        kind = BadSource if local_only else DownloadBroken
        raise kind(f"{at} is not, or not wholly, on this machine, and was not downloaded") from error
    except (errors.HTTPError, errors.XetDownloadError, ValueError, EOFError) as error:  # type: ignore[attr-defined]
        raise _broken(at, error) from error


def _broken(at: str, error: Exception) -> BadSource:
    """Answers of a hub are final, but for those that say to come back later."""
    from huggingface_hub import errors

    text = f"{at} could not be downloaded ({type(error).__name__})"
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        return DownloadBroken(text) if status in {408, 429} or status >= 500 else BadSource(text)
    return BadSource(text) if isinstance(error, ValueError) else DownloadBroken(text)


def _bar(report: Report | None) -> type[Any]:
    """A progress bar that draws nothing and reports bytes."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **{**options, "file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            drawn: bool | None = super().update(n)
            if report and self.unit == "B" and self.total:
                report(Progress("pull", int(self.n), int(self.total), "bytes"))
            return drawn

        def __enter__(self) -> Self:
            return self

    return Bar
