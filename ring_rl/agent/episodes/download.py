"""Downloads that resume, and archives that are unpacked with distrust."""

from __future__ import annotations

import errno
import http.client
import json
import re
import shutil
import stat
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ring_rl.atomic_file import atomic_file

__all__ = ["Unpacked", "download", "unpack"]

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Unpacked:
    """Files written, and files that were there already with the same content."""

    written: int
    already_there: int


def download(url: str, path: Path, *, attempts: int, timeout_seconds: float, progress: bool) -> Path:
    """Fetches `url` into `path`, resuming an earlier attempt.

    What has arrived waits in `<path>.part`, with what identifies the server's file in `<path>.part.json`: a resumed
    download asks for the rest of that very file (`If-Range`), and starts again if the server has another one or
    does not resume. `path` appears only once all of it has arrived.

    Args:
        url: http or https.
        path: Where to; if it exists nothing is fetched and nothing overwritten.
        attempts: How often to connect before giving up; only attempts that bring nothing new count.
        timeout_seconds: Without any data.
        progress: Whether to show a progress bar with the time left.

    Raises:
        FileNotFoundError: the server does not have it, or the folder is missing.
        OSError: no connection, an answer other than expected, a body that ends early, or too little disk space. What
            has arrived is kept, and the same call goes on from there.
        ValueError: a URL that is not http.
    """
    if path.exists():
        return path
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url must start with http:// or https://, got {url!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {path.parent}; create it first")
    part = path.with_name(f"{path.name}.part")
    failures = 0
    with _progress_bar(f"fetching {path.name}", shown=progress) as bar:
        while True:
            before = _size(part)
            try:
                _fetch_rest(url, part, timeout_seconds=timeout_seconds, bar=bar)
                break
            except _InterruptedTransferError as problem:
                failures = 0 if _size(part) > before else failures + 1
                if failures >= attempts:
                    raise OSError(f"{problem}; {_size(part)} bytes are kept, run the same command to go on") from None
    if path.exists():
        raise FileExistsError(f"{path} appeared during the download and is not overwritten; {part} has the download")
    part.rename(path)
    _identity_path(part).unlink(missing_ok=True)
    return path


def unpack(archive: Path, folder: Path, *, largest_bytes: int, progress: bool) -> Unpacked:
    """Unpacks a zip archive of plain files into `folder`, which must exist.

    Everything is looked at before anything is written: names that leave the folder, links, encryption, names that
    occur twice, the declared sizes against `largest_bytes` and the disk, and the checksum of every member.
    A file that exists with the same content is left alone, so that an interrupted call can be repeated.

    Cost: reads the archive twice.

    Raises:
        FileNotFoundError: no such archive or folder.
        FileExistsError: a file exists with other content; it is not overwritten.
        OSError: too little disk space.
        ValueError: not a zip archive, a damaged one, or one with a member named above.
    """
    if not archive.is_file():
        raise FileNotFoundError(f"no such archive: {archive}; fetch it first")
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}; create it first")
    damaged = f"{archive} is damaged or no zip archive; remove it and fetch it again"
    try:
        with zipfile.ZipFile(archive) as file:
            members = _checked_members(file, archive, largest_bytes)
            total = sum(member.file_size for member in members)
            _require_space(folder, total)
            with _progress_bar("checking", shown=progress) as bar:
                for member in bar.members(members):
                    with file.open(member) as content:
                        while content.read(_CHUNK_BYTES):  # reading to the end compares the checksum
                            pass
            written = 0
            with _progress_bar("unpacking", shown=progress) as bar:
                for member in bar.members(members):
                    written += _extract(file, member, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"{damaged} ({str(error) or type(error).__name__})") from None
    return Unpacked(written, len(members) - written)


class _InterruptedTransferError(Exception):
    """A transfer that may succeed when tried again."""


def _fetch_rest(url: str, part: Path, *, timeout_seconds: float, bar: _Bar) -> None:
    offset = _size(part)
    identity = _read_identity(part, url)
    if identity is None:
        offset = 0
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"})
    if offset and identity:
        request.add_header("Range", f"bytes={offset}-")
        request.add_header("If-Range", identity)
    try:
        with urllib.request.urlopen(request, timeout=timeout_seconds) as response:
            _receive(response, url, part, offset, bar)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range", "") == f"bytes */{offset}":
            return  # all of it had arrived before
        if error.code == 416:
            part.unlink(missing_ok=True)
            raise _InterruptedTransferError(f"{url} changed on the server") from None
        if error.code in (404, 410):
            raise FileNotFoundError(f"{url} is not on the server (HTTP {error.code}); check its parts") from None
        if error.code in (408, 429) or error.code >= 500:
            raise _InterruptedTransferError(f"{url}: the server answers HTTP {error.code}") from None
        raise OSError(f"{url}: the server refuses with HTTP {error.code}; check the URL and your access") from None
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise _InterruptedTransferError(f"{url}: the connection broke ({type(error).__name__})") from None
    except urllib.error.URLError as error:
        raise _InterruptedTransferError(f"{url}: no connection ({error.reason})") from None


def _receive(response: http.client.HTTPResponse, url: str, part: Path, offset: int, bar: _Bar) -> None:
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != offset:
            raise OSError(f"{url}: the server resumes elsewhere than asked; remove {part} and try again")
        total = int(found[2])
    else:
        offset = 0  # the server sends everything: it does not resume, or its file is another one now
        length = response.headers.get("Content-Length")
        total = None if length is None else int(length)
        _write_identity(part, url, response.headers)
    _require_space(part.parent, 0 if total is None else total - offset)
    bar.start(offset, total)
    with part.open("ab" if offset else "wb") as file:
        while chunk := response.read(_CHUNK_BYTES):
            file.write(chunk)
            bar.advance(len(chunk))
    arrived = _size(part)
    if total is not None and arrived < total:
        raise _InterruptedTransferError(f"{url}: the connection closed after {arrived} of {total} bytes")
    if total is not None and arrived > total:
        part.unlink()
        raise OSError(f"{url}: the server sent {arrived} bytes where it announced {total}; try again")


def _identity_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_identity(part: Path, url: str) -> str | None:
    """What a resumed request shows to get the same file; None if it cannot be told."""
    try:
        saved = json.loads(_identity_path(part).read_text())
        return saved["identity"] if saved["url"] == url else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_identity(part: Path, url: str, headers: http.client.HTTPMessage) -> None:
    # Only strong validators may be used in If-Range.
    tag = headers.get("ETag")
    identity = tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")
    with atomic_file(_identity_path(part), overwrite=True) as temporary:
        temporary.write_text(json.dumps({"url": url, "identity": identity}))


def _checked_members(file: zipfile.ZipFile, archive: Path, largest_bytes: int) -> list[zipfile.ZipInfo]:
    members, names = [], set()
    for member in file.infolist():
        path = PurePosixPath(member.filename)
        kind = stat.S_IFMT(member.external_attr >> 16)
        if "\\" in member.filename or ":" in member.filename or path.is_absolute() or ".." in path.parts:
            problem = "leaves the folder"
        elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            problem = "is a link or a device"
        elif member.flag_bits & 1:
            problem = "is encrypted"
        elif path in names:
            problem = "occurs twice"
        else:
            names.add(path)
            if not member.is_dir():
                members.append(member)
            continue
        raise ValueError(f"{archive}: member {member.filename!r} {problem}; nothing was unpacked, remove the archive")
    total = sum(member.file_size for member in members)
    if total > largest_bytes:
        raise ValueError(
            f"{archive} would unpack to {total} bytes, more than the limit of {largest_bytes}; nothing was unpacked, "
            "raise the limit if you trust it"
        )
    return members


def _extract(file: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path) -> bool:
    """Writes one member; False if the same file was there already."""
    target = folder / PurePosixPath(member.filename)
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{target.parent} is a link that leaves {folder}; remove it")
    if target.is_file() and target.stat().st_size == member.file_size and _checksum(target) == member.CRC:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_file(target, overwrite=False) as temporary,
        file.open(member) as content,
        temporary.open("wb") as output,
    ):
        shutil.copyfileobj(content, output, _CHUNK_BYTES)
    return True


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _require_space(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if wanted > free:
        message = f"{wanted} bytes are wanted and {free} are free; make room or choose another folder"
        raise OSError(errno.ENOSPC, message, str(folder))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class _Bar:
    """A progress bar over bytes, or over the members of an archive."""

    def __init__(self, progress: Progress, description: str) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=None)

    def start(self, completed: int, total: int | None) -> None:
        self._progress.update(self._task, completed=completed, total=total)

    def advance(self, amount: int) -> None:
        self._progress.advance(self._task, amount)

    def members(self, members: list[zipfile.ZipInfo]) -> Iterator[zipfile.ZipInfo]:
        self.start(0, sum(member.file_size for member in members))
        for member in members:
            yield member
            self.advance(member.file_size)


@contextmanager
def _progress_bar(description: str, *, shown: bool) -> Iterator[_Bar]:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=True) as progress:
        yield _Bar(progress, description)
