"""Folders that survive a crash: JSON written whole or not at all, lines appended one by one, settings never mixed.

A folder of results holds ``config.json`` (the settings it was started with). Starting again in it with the same
settings goes on; with others it is refused, and the difference is named.
"""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import yaml

from .runtime import StkitError

BOM = b"\xef\xbb\xbf"  # some editors put it before UTF-8 text


def clean(value):
    """The same value as plain JSON: NaN and infinities become None, tuples lists, numpy scalars numbers."""
    if isinstance(value, Mapping):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    if hasattr(value, "tolist"):
        return clean(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_json(value, indent: int | None = None) -> str:
    """JSON text without NaN, keys in the order given."""
    return json.dumps(clean(value), ensure_ascii=False, allow_nan=False, indent=indent)


def explain(error: OSError) -> str:
    """One line for an OSError, with the fix where there is one."""
    where = f"{error.filename}: " if error.filename else ""
    fixes = {
        errno.ENOSPC: "the disk is full: free some space and run the same command again, it goes on where it was",
        errno.EROFS: "the file system is read-only: choose another --out",
        errno.EACCES: "no permission: choose another folder or change its permissions",
        errno.EPERM: "no permission: choose another folder or change its permissions",
        errno.ENOENT: "no such file or folder",
        errno.EISDIR: "is a folder, a file was expected",
        errno.ENOTDIR: "a folder was expected",
        errno.EEXIST: "a file is in the way, a folder was expected",
    }
    return where + fixes.get(error.errno, error.strerror or str(error))


def write_text(path: str | Path, text: str | bytes) -> None:
    """Write a file whole or not at all (temporary name, synced, renamed)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # what the user asked for, not the temporary name
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value) -> None:
    """Write one JSON object, indented, whole or not at all."""
    write_text(path, to_json(value, indent=2) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[Mapping]) -> None:
    """Write JSON Lines, whole or not at all."""
    write_text(path, "".join(to_json(row) + "\n" for row in rows))


def replace_folder(target: Path, write: Callable[[Path], object]) -> Path:
    """Write a folder beside its place and put it there when it is whole."""
    temporary, old = target.with_name(f".{target.name}.tmp"), target.with_name(f".{target.name}.old")
    for path in (temporary, old):
        shutil.rmtree(path, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return target


def read_json(path: str | Path):
    """Read one JSON value; a StkitError names the file and the line where it breaks."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise StkitError(explain(error)) from error
    except UnicodeDecodeError as error:
        raise StkitError(f"{path}: not UTF-8 text: save it as UTF-8 JSON") from error
    if not text.strip():
        raise StkitError(f"{path}: the file is empty, JSON was expected")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StkitError(f"{path}: not JSON ({error}): fix the file or write it anew") from error


def read_yaml(path: str | Path):
    """Read one YAML value of plain types."""
    path = Path(path)
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StkitError(explain(error)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StkitError(f"{path}: not YAML ({' '.join(str(error).split())[:160]})") from error


def write_yaml(path: str | Path, value) -> None:
    """Write one YAML value, keys in the order given, whole or not at all."""
    write_text(path, yaml.safe_dump(clean(value), sort_keys=False, allow_unicode=True, width=120))


def _not_a_number(text: str):
    raise ValueError(f"{text} is not JSON")


def read_lines(path: str | Path) -> Iterator[tuple[int, object, str]]:
    """The lines of a JSON Lines file that aren't blank: (line number, value, problem); the value is None if it has one.

    Raises:
        StkitError: the file can't be read, or is empty.
    """
    try:
        data = Path(path).read_bytes().removeprefix(BOM)
    except OSError as error:
        raise StkitError(explain(error)) from error
    if not data.strip():
        raise StkitError(f"{path}: the file is empty, one JSON object a line was expected")
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8"), parse_constant=_not_a_number), ""
        except (ValueError, RecursionError) as error:
            yield number, None, f"not a whole JSON object ({error}): write the line anew"


def read_partial_jsonl(path: str | Path) -> list[dict]:
    """The whole lines of a file that a killed process was appending to; a half-written last line is cut off on disk."""
    path = Path(path)
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            why = f"not JSON ({error}): delete that line, its question is asked again"
            raise StkitError(f"{path}:{number}: {why}") from error
    return rows


def append_jsonl(path: str | Path, row: Mapping) -> None:
    """Append one line and flush it to the file, so that a killed run loses at most the line it was at."""
    with open(path, "ab") as file:
        file.write((to_json(row) + "\n").encode())


def differences(old: Mapping, new: Mapping, prefix: str = "") -> list[str]:
    """Where two settings differ, as "key: old -> new" lines (nested keys joined by dots)."""
    found = []
    for key in sorted(set(old) | set(new), key=str):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return found


def refuse_other(
    folder: str | Path, settings: Mapping, name: str = "config.json", part: str = "", beside: Iterable[str] = (),
    given_only: bool = False,
) -> bool:  # fmt: skip
    """Refuse a folder of results that were made with other settings, before anything is written or computed.

    Args:
        settings: what must be equal for the results to belong together.
        name: the file in the folder that holds them, JSON or YAML by its ending.
        part: the key under which that file holds ``settings``, of which only those given are compared; "" for all.
        beside: keys of that file that are not compared.
        given_only: compare the keys of ``settings`` only, as long as the others are not known yet.

    Returns:
        True when earlier work with the same settings is there, False for a fresh folder.

    Raises:
        StkitError: the folder holds work made with other settings, or files of something else.
    """
    folder, settings = Path(folder), json.loads(to_json(settings))
    if folder.exists() and not folder.is_dir():
        raise StkitError(f"{folder}: is a file, an output folder was expected")
    if not (folder / name).exists():
        if folder.exists() and any(p for p in folder.iterdir() if not p.name.startswith(".")):
            raise StkitError(f"{folder} is not empty and has no {name}: choose another --out")
        return False
    before = (read_yaml if name.endswith(".yaml") else read_json)(folder / name)
    before = {k: v for k, v in before.items() if k not in beside} if isinstance(before, dict) else {}
    if part:
        before = before.get(part) if isinstance(before.get(part), dict) else {}
    if part or given_only:
        before = {k: v for k, v in before.items() if k in settings}
    if other := differences(before, settings, f"{part}." if part else ""):
        named = [line if len(line) < 120 else line[:117] + "..." for line in other[:6]]
        named += [f"and {len(other) - 6} more"] * (len(other) > 6)
        what = f"{folder} was made with other settings ({'; '.join(named)})"
        raise StkitError(f"{what}: choose another --out or delete it")
    return True


def claim(
    folder: str | Path, settings: Mapping, name: str = "config.json", beside: Mapping[str, object] | None = None
) -> bool:
    """Start or go on in a folder of results.

    Args:
        folder: made when it isn't there.
        settings: what must be equal for the results to belong together.
        name: the file in the folder that holds them, JSON or YAML by its ending.
        beside: written into that file too, but not compared (the command line, say); other keys than the settings'.

    Returns:
        True when earlier work with the same settings is there, False for a fresh folder.

    Raises:
        StkitError: the folder holds work made with other settings, or files of something else.
    """
    folder, settings, beside = Path(folder), json.loads(to_json(settings)), beside or {}
    if refuse_other(folder, settings, name, beside=tuple(beside)):
        return True
    folder.mkdir(parents=True, exist_ok=True)
    (write_yaml if name.endswith(".yaml") else write_json)(folder / name, settings | dict(beside))
    return False
