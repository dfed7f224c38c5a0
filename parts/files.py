"""Files that are complete or absent: atomic writes, one writer for each folder, and readers that notice damage."""

import contextlib
import math
import os
import shutil

import numpy as np

try:
    import fcntl
except ImportError:  # Windows has no flock: two writers are not noticed there
    fcntl = None

HELD = set()  # file descriptors of the folders that this process has locked
NUMBER = (int, float)
NAMES = {int: "a whole number", float: "a number", str: "a text", list: "a list", dict: "an object"}

# -----------------------------------------------------------------------------
# writing


def partial_name(path):
    """The name under which a file or a folder is written until it is complete."""
    return f"{path}.partial"


@contextlib.contextmanager
def naming(path, *aliases):
    """Make the system's errors name `path` where they name no file, as on a full disk, or one of the aliases."""
    try:
        yield
    except OSError as error:
        if not error.strerror or error.filename not in (None, *aliases):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def sync(file):
    """Return when the content of an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder):
    """Return when the names in a folder are on the disk: else a loss of power may undo a rename. Not on Windows."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def whole(path, mode="wb", **options):
    """A file to write that gets the name `path` when it is complete. An error removes it and keeps an older file.

    options: as for open; text is UTF-8. Raises OSError that names `path`, for example where the disk is full.
    """
    partial = partial_name(path)
    if "b" not in mode:
        options.setdefault("encoding", "utf-8")
    try:
        with naming(path, partial):
            with open(partial, mode, **options) as file:
                yield file
                sync(file)
            os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise


# -----------------------------------------------------------------------------
# folders


@contextlib.contextmanager
def locked(folder):
    """Lock a folder, and make it where it is missing: no other process then gets its lock.

    The lock belongs to the system: it ends with the process, however that ends, and leaves no file behind. Raises
    ValueError, one line, where another process has it. On file systems without locks everybody gets it.
    """
    handle = lock(str(folder))
    HELD.add(handle)
    try:
        yield
    finally:
        HELD.discard(handle)
        if handle is not None:
            os.close(handle)


def lock(folder):
    """The descriptor that holds the lock of a folder; None on Windows. Raises ValueError as `locked` does."""
    while True:
        os.makedirs(folder, exist_ok=True)
        if not fcntl:
            return None
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ValueError(f"{folder} is in use by another run: wait for its end or choose another folder") from None
        except OSError:
            return handle  # this file system has no locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(folder), os.fstat(handle)):
                return handle
        os.close(handle)  # another process renamed or removed the folder before we had its lock: try again


def let_go():
    """Close the locks that a forked process has inherited, so that they end with the process that took them."""
    for handle in HELD - {None}:
        os.close(handle)
    HELD.clear()


def empty(folder):
    """Remove everything in a folder, but not the folder itself, as the lock is on it."""
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.remove(entry.path)


# -----------------------------------------------------------------------------
# reading


class FileArray:
    """A file of numbers as an array of a shape; each slice of its rows is read from the disk.

    It is not memory-mapped: where somebody cuts a mapped file short, the system kills (SIGBUS) the process that reads
    it. A slice of this array then has fewer rows.
    """

    def __init__(self, path, dtype, shape):
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115
        self.dtype = np.dtype(dtype)
        self.shape = shape

    def __getitem__(self, rows):
        first, last, _ = rows.indices(self.shape[0])
        row_bytes = self.dtype.itemsize * math.prod(self.shape[1:])
        content = os.pread(self.file.fileno(), row_bytes * max(0, last - first), row_bytes * first)
        complete = len(content) // row_bytes * row_bytes
        return np.frombuffer(content[:complete], self.dtype).reshape(-1, *self.shape[1:])


def open_array(path, dtype, shape):
    """The numbers of a file as an array that is read slice by slice. Raises ValueError for a file of another size."""
    size = os.path.getsize(path)
    needed = math.prod(shape) * np.dtype(dtype).itemsize
    if size != needed:
        raise ValueError(f"{os.path.basename(path)} has {size} bytes, not {needed}")
    if not size:
        return np.zeros(shape, dtype)
    if not hasattr(os, "pread"):  # Windows, where nobody can cut a mapped file short
        return np.memmap(path, dtype, "r", shape=shape)
    return FileArray(path, dtype, shape)


def need(found, wanted, where):
    """Check the fields of a dict that was read from a file, as JSON or a checkpoint gives it.

    wanted: {field: type, tuple of types, dict of the same kind, or function(value) that is true for a right value}. A
    field whose name ends in "?" may be missing or None. Numbers have to be finite, and True is not a number. Raises
    ValueError, one line that says that `where` is damaged, in which field and why.
    """
    if not isinstance(found, dict):
        raise ValueError(f"{where} is damaged: it holds {short(found)}, not an object with fields")
    for name, kind in wanted.items():
        field = name.removesuffix("?")
        value = found.get(field)
        if value is None and field != name:
            continue
        if field not in found:
            raise ValueError(f"{where} is damaged: {field} is missing")
        if isinstance(kind, dict):
            need(value, kind, f"{str(where).rstrip(',')}, {field},")
        elif isinstance(kind, type | tuple):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            if not is_sound(value, kinds):
                words = " or ".join(NAMES.get(k, k.__name__) for k in kinds if k is not int or float not in kinds)
                raise ValueError(f"{where} is damaged: {field} is {short(value)}, not {words}")
        elif not kind(value):
            raise ValueError(f"{where} is damaged: {field} is {short(value)}")


def short(value):
    """A value for a message: one line of at most 60 characters."""
    return f"{' '.join(repr(value).split()):.60}"


def is_sound(value, kinds):
    """Whether a value is of one of these types and, if it is a number, finite; a bool is not an int."""
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) and not (isinstance(value, float) and not math.isfinite(value))
