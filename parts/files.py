"""Files that are whole or not there: atomic writes, one writer for a folder, and the check of a file's fields."""

import contextlib
import math
import os

try:
    import fcntl
except ImportError:  # Windows has no flock: two writers are not noticed there
    fcntl = None

NUMBER = (int, float)
NAMES = {int: "a whole number", float: "a number", str: "a text", list: "a list", dict: "an object"}


@contextlib.contextmanager
def whole(path, mode="wb", **how):
    """A file to write that gets the name `path` when it is complete; an error removes it and an older one stays.

    It is written as `path + ".partial"` and synchronised with the disk before it is renamed. `how` as for open; text is
    UTF-8. Raises OSError that names `path`, where the disk is full for example.
    """
    partial = f"{path}.partial"
    if "b" not in mode:
        how.setdefault("encoding", "utf-8")
    try:
        with open(partial, mode, **how) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(partial)
        if isinstance(error, OSError) and error.strerror and error.filename in (None, partial):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


@contextlib.contextmanager
def locked(folder):
    """Hold a folder, which is made where it is missing, so that no other process that asks for it gets it.

    The lock is the system's own: it ends with the process, however that ends, and leaves no file behind. Raises
    ValueError, one line, where another process holds it. File systems without locks let everybody in.
    """
    folder = str(folder)
    while fcntl:
        os.makedirs(folder, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ValueError(f"{folder} is in use by another run: wait for its end or choose another folder") from None
        except OSError:
            break  # this file system has no locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(folder), os.fstat(handle)):
                break
        os.close(handle)  # it was renamed or removed in between
    else:
        os.makedirs(folder, exist_ok=True)
        handle = None
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def need(found, wanted, where):
    """Check that what was read from a file has the fields it must have, of the types they must have.

    found: a dict, as JSON or a checkpoint gives it. wanted: {field: type, tuple of types, dict of the same kind, or a
    function(value) that is true for a right one}; a field whose name ends in "?" may be missing or None. Numbers have
    to be finite, and True is no number. Raises ValueError, one line: `where` is damaged, which field and why.
    """
    if not isinstance(found, dict):
        raise ValueError(f"{where} is damaged: it holds {found!r:.40}, not an object with fields")
    for name, kind in wanted.items():
        field, optional = name.removesuffix("?"), name.endswith("?")
        value = found.get(field)
        if optional and value is None:
            continue
        if field not in found:
            raise ValueError(f"{where} is damaged: {field} is missing")
        if isinstance(kind, dict):
            need(value, kind, f"{str(where).rstrip(',')}, {field},")
            continue
        if isinstance(kind, type | tuple):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            sound = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
            sound = sound and not (isinstance(value, float) and not math.isfinite(value))
            if not sound:
                words = " or ".join(NAMES.get(k, k.__name__) for k in kinds if k is not int or float not in kinds)
                raise ValueError(f"{where} is damaged: {field} is {value!r:.60}, not {words}")
        elif not kind(value):
            raise ValueError(f"{where} is damaged: {field} is {value!r:.60}")
