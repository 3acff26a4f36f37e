"""One line a sample, written as soon as it is known, so that an evaluation that was cut off goes on.

<output>/evaluation.json   what is evaluated, and how; another one is refused
<output>/samples.jsonl     a JSON object a line, appended to, never rewritten
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from ring_rl.atomic_file import write_whole
from ring_rl.config import describe_differences, from_mapping, to_mapping

__all__ = ["SampleLog", "read_samples"]

T = TypeVar("T")

_IDENTITY, _SAMPLES = "evaluation.json", "samples.jsonl"


class SampleLog(Generic[T]):
    """The records of one evaluation; a context manager that lets no second process write beside it.

    Args:
        folder: Missing, or that of the same evaluation.
        record_type: The dataclass of a line.
        key: What tells records apart; a second record with one key is refused when it is read.
        identity: Plain JSON that says what is evaluated, and how. What an older evaluation did not write down at all is
            not compared.
        may_differ: Dotted paths of it that change which samples are evaluated, and none of their results.

    Raises:
        ValueError: The folder holds another evaluation, a damaged one, or another process writes there.
    """

    def __init__(
        self,
        folder: Path,
        *,
        record_type: type[T],
        key: Callable[[T], Hashable],
        identity: Mapping[str, Any],
        may_differ: tuple[str, ...] = (),
    ):
        self._key = key
        folder.mkdir(parents=True, exist_ok=True)
        self._file = _open_and_lock(folder / _SAMPLES)
        try:
            _check_identity(folder / _IDENTITY, json.loads(json.dumps(identity)), may_differ)
            whole = _drop_torn_end(self._file)
            self.records: dict[Hashable, T] = _parsed(folder / _SAMPLES, whole, record_type, key)
        except BaseException:
            self._file.close()
            raise

    def append(self, records: Iterable[T]) -> None:
        """Writes records through to the disk.

        Raises:
            ValueError: One of them is there already.
        """
        records = list(records)
        for record in records:
            if self._key(record) in self.records:
                raise ValueError(f"a sample is evaluated twice: {self._key(record)}; each needs a key of its own")
            self.records[self._key(record)] = record
        self._file.write("".join(json.dumps(to_mapping(record)) + "\n" for record in records).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Lets others write."""
        self._file.close()

    def __enter__(self) -> SampleLog[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_samples(folder: Path, *, record_type: type[T], key: Callable[[T], Hashable]) -> list[T]:
    """All whole records of an evaluation's folder, in the order of writing.

    Raises:
        FileNotFoundError: There is no evaluation.
        ValueError: A line is damaged, or there twice.
    """
    file = folder / _SAMPLES
    if not file.exists():
        raise FileNotFoundError(f"{folder} holds no {_SAMPLES}; evaluate first: experiments/evaluate_lm.py")
    content = file.read_bytes()
    return list(_parsed(file, content[: content.rfind(b"\n") + 1], record_type, key).values())


def _open_and_lock(file: Path) -> IO[bytes]:
    stream = file.open("ab+")
    try:
        # The system gives a flock back when its holder dies, however it dies.
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise ValueError(f"another process is writing {file}; wait for it, or choose another output") from None
    return stream


def _check_identity(file: Path, identity: Mapping[str, Any], may_differ: tuple[str, ...]) -> None:
    if not file.exists():
        if file.with_name(_SAMPLES).stat().st_size:
            raise ValueError(f"{file.parent} holds samples, but no {_IDENTITY}; choose another output")
        write_whole(file, json.dumps(identity, indent=2) + "\n")
        return
    try:
        saved = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON ({error}); choose another output") from None
    unsaid = tuple(key for key in identity if key not in saved)
    if differences := describe_differences(saved, identity, ignore=(*may_differ, *unsaid)):
        raise ValueError(
            f"{file.parent} holds another evaluation ({'; '.join(differences)}); choose another output, or give the "
            "saved values to go on with it"
        )


def _drop_torn_end(stream: IO[bytes]) -> bytes:
    """The whole lines; what a crash left of one more is cut off, and that sample is evaluated again."""
    stream.seek(0)
    content = stream.read()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        stream.truncate(len(whole))
    return whole


def _parsed(file: Path, content: bytes, record_type: type[T], key: Callable[[T], Hashable]) -> dict[Hashable, T]:
    records: dict[Hashable, T] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            record = from_mapping(record_type, json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"{file}, line {number} is damaged ({error}); move the folder away and begin again"
            ) from None
        if key(record) in records:
            raise ValueError(
                f"{file}, line {number} repeats the sample {key(record)}; move the folder away and begin again"
            )
        records[key(record)] = record
    return records
