"""JSON that is checked, files that are whole or not there, and folders that one process holds alone."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from ragjax.errors import InputError

PARTIAL = ".partial"  # ends the name of what is being written
LOCK = ".lock"
LFS = b"version https://git-lfs"  # how a file begins that Git LFS has not fetched
DEEPEST = 100  # levels of JSON
LARGEST_JSON = 256 << 20  # bytes; what is read whole


def cache_folder() -> Path:
    """Where downloads are kept: $RAGJAX_CACHE, else $XDG_CACHE_HOME/ragjax, else ~/.cache/ragjax."""
    if own := os.environ.get("RAGJAX_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ragjax"


def parse_json(data: bytes | str, where: str | Path) -> Any:
    """The value of a JSON text in UTF-8; `where` names it in errors. Of a key that stands twice the last one counts.

    Raises `InputError` for anything malformed, and for what is nested more than `DEEPEST` deep. Escapes may bring
    halves of surrogate pairs: see `unicode_json`.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        value = json.loads(text)
        if text.count("[") + text.count("{") > DEEPEST and _is_deep(value):
            raise RecursionError
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise InputError(f"{where}: not JSON ({error.msg} at {line}column {error.colno})") from None
    except ValueError:  # Python's own bound on what it converts
        raise InputError(f"{where}: not JSON: a number has thousands of digits") from None
    except RecursionError:
        raise InputError(f"{where}: not JSON: nested too deeply") from None
    return value


def unicode_json(data: bytes | str, where: str | Path) -> Any:
    """As `parse_json`; halves of surrogate pairs are refused, too."""
    value = parse_json(data, where)
    escaped = "\\u" in data if isinstance(data, str) else b"\\u" in data
    if escaped and not is_unicode(json.dumps(value, ensure_ascii=False)):
        raise InputError(f"{where}: holds half of a \\ud800-\\udfff pair, which is no Unicode text")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        level = [of for of in level if isinstance(of, dict | list)]
        if not level:
            return False
        level = [item for of in level for item in (of.values() if isinstance(of, dict) else of)]
    return any(isinstance(of, dict | list) for of in level)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8; JSON's escapes and the command line can bring lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_json(path: Path, what: str = "a Hugging Face checkpoint folder has one") -> dict[str, Any]:
    """The JSON object in a file. Raises `InputError` naming it; `what` says why one is expected there."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_JSON + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: missing; {what}") from None
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(data) > LARGEST_JSON:
        raise InputError(f"{path}: larger than {LARGEST_JSON >> 20} MiB; {what}")
    value = unicode_json(data, path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, not {type(value).__name__}")
    return value


def shown(value: object) -> str:
    """A value from a file as an error message quotes it: in ASCII and short."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@contextmanager
def atomic_write(*paths: Path) -> Iterator[tuple[BinaryIO, ...]]:
    """Opens PATH.partial for each path and renames all of them at the end; removes them when anything fails.

    Raises `InputError` for what the operating system refuses, such as a full disk.
    """
    partials = [path.with_name(path.name + PARTIAL) for path in paths]
    try:
        with ExitStack() as stack:
            files = tuple(stack.enter_context(partial.open("wb")) for partial in partials)
            yield files
            for file in files:  # else a machine that dies later could leave an empty file under the final name
                file.flush()
                os.fsync(file.fileno())
        for partial, path in zip(partials, paths, strict=True):
            os.replace(partial, path)
    except OSError as error:
        where = paths[0].parent if len(paths) > 1 else paths[0]
        if error.errno == errno.ENOSPC:
            raise InputError(f"{where}: the disk is full; the partial file was removed; free some space") from None
        raise InputError(f"{where}: cannot be written ({error.strerror or error})") from None
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


def write_jsonl(path: Path, records: Iterable[dict]) -> None:
    """Writes one JSON object a line; `path` is whole or untouched."""
    with atomic_write(path) as (file,):
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def check_writable(folder: Path) -> None:
    """Raises `InputError` unless files can be written in `folder`, or in a new one of that name; leaves nothing."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be created ({error.strerror}); choose another output") from None
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another output") from None
    finally:
        with suppress(OSError):  # another process may have put something there by now
            for path in missing:
                path.rmdir()


@contextmanager
def partial_folder(folder: Path) -> Iterator[Path]:
    """A new empty folder beside `folder`, to be filled and then renamed or emptied; gone at the end.

    Raises `InputError` where it cannot be created.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be created ({error.strerror}); choose another folder") from None
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def exclusive_lock(folder: Path, doing: str) -> Iterator[None]:
    """Holds `folder`, created where there is none, until the end or the death of this process.

    Raises `InputError` where it cannot be created, and while another process holds it, saying what that is `doing`.
    """
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: cannot be created ({error.strerror}); choose another folder") from None
        with (folder / LOCK).open("a") as lock:
            if not lock_file(lock):
                raise InputError(f"{folder}: another process {doing}")
            # one that held it may have deleted it together with its folder, and a third may lock a new file
            if os.path.exists(lock.name) and os.path.samestat(os.stat(lock.name), os.fstat(lock.fileno())):
                yield
                return


def lock_file(file: IO[Any]) -> bool:
    """Locks an open file for this process alone, until it is closed or the process dies; False where another holds it.

    Raises `InputError` where the system or the file system has no locks.
    """
    from filelock import lock_descriptor

    try:
        return lock_descriptor(file.fileno(), blocking=False)
    except OSError as error:
        raise InputError(f"{file.name}: cannot be locked ({error.strerror}); choose another file system") from None
