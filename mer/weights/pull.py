"""Fetching a model from a hub into its cache: what is needed of it, each file from where it was cut off."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import queue
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

import httpx2
from attrs import field, frozen
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from mer.errors import CheckpointError, HubError
from mer.weights import hub
from mer.weights.checkpoint import read_index
from mer.weights.convert import BESIDE
from mer.weights.hub import INDEX, Name, Variant

# Files at a time: one connection alone does not fill a fast line.
_AT_ONCE: Final = 4
# Bytes from which on a file that was cut off is worth going on with.
_LARGE: Final = 4 << 20
# Attempts in a row that bring nothing, where huggingface_hub makes none by itself, and the pause between.
_TRIES: Final = 4
_PAUSE_S: Final = 2.0
# How long an attempt that has failed waits for what is on its way.
_PARTING_S: Final = 10.0
_PASSING: Final = (500, 502, 503, 504)
# Room that is left on the device.
_MARGIN: Final = 64 << 20
# Named where a repository has nothing else.
_NOT_READ: Final = (".bin", ".pth", ".pt", ".onnx", ".msgpack", ".h5", ".npz")

Progress = Callable[[int, int], None]


@frozen
class Remote:
    """A file of a repository. size: bytes. etag: what the cache calls its content.

    sha256: of the content, known of large files only.
    """

    name: str
    size: int
    etag: str
    sha256: str | None


@frozen
class Repository:
    """What a hub has under a name. commit: what its revision is now.

    architecture: general.architecture of its GGUF files, where the hub says it.
    """

    name: Name
    commit: str
    files: dict[str, Remote] = field(repr=False)
    architecture: str | None = None

    @property
    def variants(self) -> list[Variant]:
        """The models among its GGUF files."""
        return hub.gguf_variants(list(self.files))

    def size(self, names: Sequence[str]) -> int:
        """Bytes of these files."""
        return sum(self.files[name].size for name in names)


def look_up(name: Name) -> Repository:
    """Ask the hub what it has under this name. Raises HubError."""
    if constants.is_offline_mode():
        raise HubError(f"{name}: HF_HUB_OFFLINE is set, so nothing is fetched; unset it")
    with _explained(name):
        info = HfApi().model_info(
            name.repo, revision=name.revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        )
    files = {}
    for each in info.siblings or []:
        sha256 = each.lfs.sha256 if each.lfs else None
        files[each.rfilename] = Remote(each.rfilename, each.size or 0, sha256 or each.blob_id or "", sha256)
    return Repository(name, str(info.sha), files, (info.gguf or {}).get("architecture"))


def choose(repository: Repository) -> Variant | None:
    """Which GGUF model is meant; None: the safetensors. Raises HubError where there is neither."""
    name, variants = repository.name, repository.variants
    if name.quant is None and any(map(_is_weights, repository.files)):
        return None
    if name.quant is None and not variants:
        other = next((file for file in sorted(repository.files) if file.endswith(_NOT_READ)), None)
        found = f"; {other} is in a format that mer does not read" if other else ""
        raise HubError(f"{name}: the repository has neither safetensors nor GGUF files{found}")
    try:
        return hub.choose(name, variants, "on the hub")
    except CheckpointError as error:
        raise HubError(str(error)) from None


def fetch_texts(repository: Repository) -> Path:
    """Fetch what the model has beside its weights, in safetensors; their directory. Raises HubError."""
    names = [name for name in (*BESIDE, INDEX) if name in repository.files]
    if "config.json" not in names:
        raise HubError(f"{repository.name}: the repository has no config.json, so it is no model to run")
    _point(repository, early=True)
    _fetch(repository, names, lambda done, total: None)
    return _snapshot(repository)


def weights_of(repository: Repository, variant: Variant | None) -> list[str]:
    """The files with the weights; in safetensors `fetch_texts` was there before. Raises HubError."""
    if variant is not None:
        return list(variant.files)
    names = sorted(filter(_is_weights, repository.files))
    index = read_index(_snapshot(repository))
    if index:
        names = sorted(set(index.values()))
    elif "model.safetensors" in names:
        names = ["model.safetensors"]
    for name in names:
        if name not in repository.files:
            raise HubError(f"{repository.name}: {INDEX} names {name}, which the repository has not")
    return names


def fetch_weights(repository: Repository, names: Sequence[str], progress: Progress) -> Path:
    """Fetch these files; the path of the first. progress: is told bytes that are there, and all.

    Raises HubError, also before anything is fetched where the device has no room for it.
    """
    _point(repository, early=True)
    missing = repository.size(names) - there(repository, names)
    folder = hub.folder_of(repository.name.repo)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if missing + _MARGIN > free:
        raise HubError(
            f"{repository.name}: {missing:,} bytes are to come, {folder} has room for {free:,}; make room, "
            "or place the cache elsewhere (HF_HOME)"
        )
    _fetch(repository, names, progress)
    _point(repository, early=False)
    return _snapshot(repository) / names[0]


def there(repository: Repository, names: Sequence[str]) -> int:
    """Bytes of these files that the cache has."""
    return sum(_there(repository, repository.files[name]) for name in names)


def _there(repository: Repository, remote: Remote) -> int:
    blob = hub.folder_of(repository.name.repo) / "blobs" / remote.etag
    if blob.exists() or (_snapshot(repository) / remote.name).exists():
        return remote.size
    try:
        return min(_partial(blob).stat().st_size, remote.size)
    except FileNotFoundError:
        return remote.size if blob.exists() else 0  # just now, maybe


def _is_weights(name: str) -> bool:
    """Whether a file is one of the model's own safetensors, not a copy of all of them or an adapter's."""
    others = name.startswith(("consolidated", "adapter_"))
    return "/" not in name and name.endswith(".safetensors") and not others


def _snapshot(repository: Repository) -> Path:
    return hub.folder_of(repository.name.repo) / "snapshots" / repository.commit


def _partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _point(repository: Repository, *, early: bool) -> None:
    """Say in the cache which commit the revision is.

    Before the files are there only where there is no older snapshot, which is usable until this one is whole.
    """
    name = repository.name
    if name.revision == repository.commit or (early and hub.snapshot_of(name)):
        return
    with _explained(name):
        ref = hub.folder_of(name.repo) / "refs" / name.revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        new = ref.with_name(f"{ref.name}.{uuid.uuid4().hex[:8]}.tmp")
        new.write_text(repository.commit)
        new.replace(ref)


class _Tracker:
    """Counts bytes of all files; ends the threads that fetch them when somebody must stop."""

    def __init__(self, done: int, total: int, progress: Progress) -> None:
        self._done, self._total, self._progress = done, total, progress
        self._lock = threading.Lock()
        self.stopped = False

    def add(self, n: int) -> None:
        if self.stopped:
            raise InterruptedError
        with self._lock:
            self._done += n
            self._progress(min(self._done, self._total), self._total)

    def bar(self) -> Any:
        """What huggingface_hub takes for tqdm's class."""
        add = self.add

        class Bar:
            total: int | None = None

            def __init__(self, *_: Any, **__: Any) -> None:
                pass

            def __enter__(self) -> Bar:
                return self

            def __exit__(self, *_: Any) -> None:
                pass

            def update(self, n: float | None = 1) -> None:
                add(int(n or 0))

            def update_transfer(self, n: float | None = 1) -> None:
                pass  # the same bytes, before they are in the file

            def set_postfix_str(self, *_: Any, **__: Any) -> None:
                pass

            set_transfer_postfix_str = set_postfix_str

            def close(self) -> None:
                pass

        return Bar


def _fetch(repository: Repository, names: Sequence[str], progress: Progress) -> None:
    # It says on stderr what is told here by progress and errors.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    tracker = _Tracker(there(repository, names), repository.size(names), progress)
    tracker.add(0)
    todo: queue.SimpleQueue[Remote] = queue.SimpleQueue()
    done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    for name in names:
        todo.put(repository.files[name])

    def work() -> None:
        while not tracker.stopped:
            try:
                _fetch_file(repository, todo.get_nowait(), tracker)
                done.put(None)
            except queue.Empty:
                return
            except BaseException as error:
                done.put(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(_AT_ONCE, len(names)))]
    for thread in threads:
        thread.start()
    try:
        with _explained(repository.name):
            for _ in names:
                error = done.get()
                if error is not None:
                    raise error
    except HubError:
        # They hold files that the next attempt in this process wants.
        tracker.stopped = True
        deadline = time.monotonic() + _PARTING_S
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))
        raise
    finally:
        # After Ctrl-C nobody waits for what is on its way.
        tracker.stopped = True


def _fetch_file(repository: Repository, remote: Remote, tracker: _Tracker) -> None:
    repo, commit = repository.name.repo, repository.commit
    if (_snapshot(repository) / remote.name).exists():
        return
    # Larger ones come over the hub's own protocol only, which keeps nothing of a file that was cut off.
    if _LARGE <= remote.size <= constants.MAX_HTTP_DOWNLOAD_SIZE:
        url = hf_hub_url(repo, remote.name, revision=commit)
        etag = get_hf_file_metadata(url, headers=build_hf_headers(), retry_on_errors=True).etag
        blob = hub.folder_of(repo) / "blobs" / (etag or remote.etag)
        if not blob.exists():
            _download(url, blob, remote, tracker)
    # Links a file to its blob, and fetches one that is not there.
    hf_hub_download(repo, remote.name, revision=commit, tqdm_class=tracker.bar())


def _download(url: str, blob: Path, remote: Remote, tracker: _Tracker) -> None:
    """Fetch a file to `blob`, going on with what an earlier attempt has left."""
    partial = _partial(blob)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HubError(f"{remote.name} is being fetched by another process; wait for its end") from None
        if file.tell() > remote.size:
            file.truncate(0)
        tries = 0
        while True:
            start = file.seek(0, os.SEEK_END)
            try:
                _continue(url, file, start, remote, tracker)
                break
            except (httpx2.ReadError, HfHubHTTPError) as error:
                if isinstance(error, HfHubHTTPError) and error.response.status_code not in _PASSING:
                    raise
                tries = 1 if file.seek(0, os.SEEK_END) > start else tries + 1
                if tries == _TRIES:
                    raise
            time.sleep(_PAUSE_S * tries)
    with partial.open("rb") as file:
        if remote.sha256 and hashlib.file_digest(file, "sha256").hexdigest() != remote.sha256:
            partial.unlink()
            raise HubError(f"{remote.name}: what came is damaged (its SHA-256 is another); fetch it again")
    partial.replace(blob)


def _continue(url: str, file: BinaryIO, start: int, remote: Remote, tracker: _Tracker) -> None:
    http_get(
        url,
        file,
        resume_size=start,
        headers=build_hf_headers(),
        expected_size=remote.size,
        displayed_filename=remote.name,
        tqdm_class=tracker.bar(),
    )


@contextmanager
def _explained(name: Name) -> Iterator[None]:
    """Turn what may happen into a HubError that says what to do."""
    try:
        yield
    except HFValidationError as error:
        raise HubError(f"{name}: {error}") from error
    except (HfHubHTTPError, httpx2.HTTPError, LocalEntryNotFoundError) as error:
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
        raise HubError(f"{name}: {_reason(name, cause or error)}") from error
    except (ValueError, KeyError) as error:
        raise HubError(f"{name}: {constants.ENDPOINT} does not answer as a hub does ({error})") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise HubError(
                f"{name}: {hub.cache()} is full ({error.strerror}): make room, or place the cache elsewhere "
                "(HF_HOME); what has come is kept"
            ) from error
        if isinstance(error, InterruptedError):
            raise
        where = f"{error.filename}: " if error.filename else ""
        raise HubError(f"{name}: {where}{error.strerror or error}") from error


def _reason(name: Name, error: BaseException) -> str:
    token = "set HF_TOKEN (or: hf auth login)"
    if isinstance(error, GatedRepoError):
        return f"is gated: accept its terms at {constants.ENDPOINT}/{name.repo}, then {token}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{constants.ENDPOINT} has no such model; check the name, or, if it is private, {token}"
    if isinstance(error, RevisionNotFoundError):
        return f"has no revision {name.revision}"
    if not isinstance(error, HfHubHTTPError):
        return f"{constants.ENDPOINT} can't be reached or breaks off ({error}); what has come is kept"
    status = error.response.status_code
    if status == 401:
        return f"{constants.ENDPOINT} does not accept the token: {token}"
    if status == 403:
        return f"{constants.ENDPOINT} refuses it: give the token the right to read the model"
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        when = f"in {wait} seconds" if wait else "later"
        return f"too many requests: the same command goes on, {when}; with a token more are allowed"
    return f"{constants.ENDPOINT} answers {status}; what has come is kept: the same command goes on, later"
