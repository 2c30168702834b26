"""Models from a Hugging Face hub, in huggingface_hub's own cache and by its account of what there is.

Its own download forgets what came when it ends early, and trusts the hub's bytes; quant.fetch does neither.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from quant.checkpoint import CONFIG, INDEX, PICKLES, TEXT_FILES, WEIGHTS, read_config, weight_files
from quant.errors import BadSource, DiskFull, DownloadBroken
from quant.fetch import PATIENCE, Remote, fetch
from quant.files import disk_full_is_typed, replace_synced, shown
from quant.gguf.parts import gguf_files, gguf_types
from quant.progress import Progress, Report

_REPO = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}"
_ID = re.compile(rf"({_REPO})(?::([A-Za-z0-9_]{{1,24}}))?(?:@(.+))?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,127}", re.ASCII)
_CHECKSUM = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
STEP = 1 << 20  # bytes between two reports


@dataclass(frozen=True, slots=True)
class HubId:
    repo: str
    revision: str | None
    type: str | None = None  # of the GGUF file to take


def parse_hub_id(ref: str, revision: str | None) -> HubId | None:
    """ "org/name", "org/name:Q4_K_M" (a GGUF file), each with "@revision"; None for anything else.

    Raises BadSource for two revisions.
    """
    match = _ID.fullmatch(ref)
    if match is None or ".." in ref:
        return None
    repo, kind, pinned = match.groups()
    if pinned and revision and pinned != revision:
        raise BadSource(f"two revisions are given: {pinned:.80} and {revision:.80}")
    wanted = pinned or revision
    if wanted and (not _REVISION.fullmatch(wanted) or ".." in wanted):
        raise BadSource("the revision is not a branch, tag or commit")
    return HubId(repo, wanted, kind)


@dataclass(frozen=True, slots=True)
class Listing:
    """What a revision of a repository holds."""

    commit: str
    files: Mapping[str, Remote]  # by path; those without a checksum in the listing have "" there

    def bytes(self, names: Iterable[str]) -> int:
        return sum(self.files[name].size for name in names)


@dataclass(frozen=True, slots=True)
class Hub:
    endpoint: str | None = None  # None: huggingface_hub's own, from HF_ENDPOINT
    folder: Path | None = None  # where snapshots are kept; None: huggingface_hub's own, from HF_HOME

    def snapshot(
        self, wanted: HubId, *, local_only: bool, report: Report, include: tuple[str, ...] = ()
    ) -> Path:
        """The snapshot's folder, named by its commit, or for a GGUF file its first part in there.

        Downloads what is missing: a checkpoint's texts and safetensors, the parts of the GGUF file, or with
        `include` the texts and what matches one of these patterns.

        Raises BadSource, and DiskFull before anything large is downloaded. A hub that cannot be reached is no
        error where the snapshot is there already.
        """
        with _hub_errors(wanted, local_only), disk_full_is_typed():
            if local_only:
                return self._local(wanted)
            listing = self._listing(wanted)
            if listing is None:
                return self._whole(wanted)
            pull = _Pull(self, wanted, listing, report)
            return pull.gguf() if wanted.type else pull.matching(include) if include else pull.checkpoint()

    def _local(self, wanted: HubId) -> Path:
        """The texts must be there; which weights must, the caller learns from them."""
        from huggingface_hub import snapshot_download

        found = snapshot_download(
            wanted.repo,
            revision=wanted.revision,
            endpoint=self.endpoint,
            cache_dir=self.folder,
            local_files_only=True,
        )
        folder = Path(found)
        if wanted.type is None:
            return folder
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")]
        return folder / gguf_files(names, wanted.type)[0]

    def _whole(self, wanted: HubId) -> Path:
        """What is here of a hub that cannot be reached. Raises DownloadBroken where weights are missing."""
        found = self._local(wanted)
        if wanted.type:
            return found
        names = frozenset(path.name for path in found.iterdir() if path.exists())
        index = {INDEX} & names
        if WEIGHTS not in names and not (index and {*weight_files(found, names)} <= names):
            raise DownloadBroken(f"{wanted.repo} is not wholly on this machine, and no hub can be reached")
        return found

    def _listing(self, wanted: HubId) -> Listing | None:
        """None: the hub cannot be reached."""
        from huggingface_hub import hf_hub_url

        info = self._info(wanted)
        if info is None:
            return None
        commit = str(info.sha)
        files = {}
        for file in info.siblings or ():
            url = hf_hub_url(wanted.repo, file.rfilename, revision=commit, endpoint=self.endpoint)
            checksum = file.lfs["sha256"] if file.lfs else file.blob_id
            files[file.rfilename] = Remote(
                name=file.rfilename, url=url, size=file.size or 0, checksum=checksum or ""
            )
        return Listing(commit, files)

    def _info(self, wanted: HubId) -> Any:
        """huggingface_hub's account of the repository; asked again where the answer broke off."""
        from huggingface_hub import HfApi, errors

        for _ in range(PATIENCE):
            try:
                return HfApi(endpoint=self.endpoint).model_info(
                    wanted.repo, revision=wanted.revision, files_metadata=True, timeout=20
                )
            except errors.HfHubHTTPError:  # it answered
                raise
            except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:  # type: ignore[attr-defined]  # its client's
                if type(error).__name__ != "RemoteProtocolError":
                    return None
        return None

    def _require_room(self, folder: Path, needed: int) -> None:
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise DiskFull(f"the download needs {needed:,} bytes, but {free:,} are free")


class _Pull:
    """One revision of one repository on its way into huggingface_hub's cache."""

    def __init__(self, hub: Hub, wanted: HubId, listing: Listing, report: Report) -> None:
        from huggingface_hub import constants

        self._hub, self._wanted, self._listing, self._report = hub, wanted, listing, report
        root = hub.folder or Path(constants.HF_HUB_CACHE)
        self._root = root / f"models--{wanted.repo.replace('/', '--')}"
        self._folder = self._root / "snapshots" / listing.commit
        self._top = frozenset(name for name in listing.files if "/" not in name)

    def checkpoint(self) -> Path:
        """Texts first: a model that is refused costs no download of weights."""
        if CONFIG not in self._top:
            raise BadSource(f"{self._wanted.repo} has no {CONFIG}{self._hint()}")
        self._fetch(self._texts(), quietly=True)
        read_config(self._folder)
        self._fetch(weight_files(self._folder, self._top))
        self._point()
        return self._folder

    def gguf(self) -> Path:
        assert self._wanted.type is not None
        names = gguf_files(self._listing.files, self._wanted.type)
        self._fetch(names)
        self._point()
        return self._folder / names[0]

    def matching(self, patterns: tuple[str, ...]) -> Path:
        """Pickles never come."""
        names = [name for name in self._listing.files if any(fnmatchcase(name, one) for one in patterns)]
        wanted = [name for name in names if PurePosixPath(name).suffix not in PICKLES]
        if names and not wanted:
            raise BadSource(f"{shown(names[0])} is a pickle, which is never opened")
        if not wanted:
            raise BadSource(f"{self._wanted.repo} has no file that matches {' or '.join(patterns):.80}")
        self._fetch(dict.fromkeys([*self._texts(), *wanted]))
        self._point()
        return self._folder

    def _texts(self) -> list[str]:
        return [name for name in self._top if name in {*TEXT_FILES, INDEX} or _is_config(name)]

    def _hint(self) -> str:
        if not any(name.endswith(".gguf") for name in self._listing.files):
            return ""
        types = sorted(gguf_types(self._listing.files))
        how = f": name one as {self._wanted.repo}:{types[0]} (of {', '.join(types):.80})" if types else ""
        return f"; it holds GGUF files{how}"

    def _fetch(self, names: Iterable[str], *, quietly: bool = False) -> None:
        missing = [name for name in names if not (self._folder / name).exists()]
        if not missing:
            return
        self._root.mkdir(parents=True, exist_ok=True)
        total, done, told = self._listing.bytes(missing), 0, 0
        if not quietly:
            self._hub._require_room(self._root, total)

        def advance(count: int) -> None:
            nonlocal done, told
            done += count
            if not quietly and (done == total or abs(done - told) >= STEP):
                told = done
                self._report(Progress("pull", done, total, "bytes"))

        for name in missing:
            blob = fetch(self._checked(name), self._root / "blobs", advance)
            _link(self._folder / name, blob)

    def _checked(self, name: str) -> Remote:
        """The file with its checksum; hubs that do not list it send it with the file. Raises BadSource."""
        from huggingface_hub import get_hf_file_metadata

        remote = self._listing.files[name]
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise BadSource(f"{shown(name)} would lie outside of the snapshot")
        if not remote.checksum:
            found = get_hf_file_metadata(remote.url, endpoint=self._hub.endpoint)
            remote = replace(remote, checksum=found.etag or "", size=found.size or remote.size)
        if not _CHECKSUM.fullmatch(remote.checksum):
            raise BadSource(f"the hub gives no checksum of {shown(name)}")
        return remote

    def _point(self) -> None:
        """From the branch or tag to the commit, as huggingface_hub does for those who are offline later."""
        revision = self._wanted.revision or "main"
        if revision != self._listing.commit:
            ref = self._root / "refs" / revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            replace_synced(ref, self._listing.commit.encode())


def _link(place: Path, blob: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = place.with_name(f"{place.name}.{os.getpid()}.link")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(blob, place.parent))
    fresh.replace(place)


def _is_config(name: str) -> bool:
    return "config" in name and name.endswith(".json")


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
