import errno
import multiprocessing
import os

import pytest

from parts.files import locked, need, whole


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "a.txt"
    with whole(path, "w") as f:
        f.write("grüße\n")
    with pytest.raises(KeyboardInterrupt), whole(path, "w") as f:
        f.write("half")
        raise KeyboardInterrupt
    assert path.read_bytes() == "grüße\n".encode()
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_error_of_the_disk_names_the_file(tmp_path):
    path = tmp_path / "a.bin"
    with pytest.raises(OSError, match="No space left") as caught, whole(path) as f:
        f.write(b"1")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(path)
    assert os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError) as caught, whole(tmp_path / "no" / "b.bin"):
        pass
    assert caught.value.filename == str(tmp_path / "no" / "b.bin")


def ask(folder, answers):
    try:
        with locked(folder):
            answers.put("")
    except ValueError as error:
        answers.put(str(error))


def test_a_folder_has_one_holder(tmp_path):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()

    def another():
        process = context.Process(target=ask, args=(str(tmp_path / "x"), answers))
        process.start()
        process.join()
        return answers.get()

    with locked(tmp_path / "x"):
        assert "is in use by another run" in another()
        os.replace(tmp_path / "x", tmp_path / "y")  # as a finished token folder gets its name
        assert another() == ""
    assert another() == ""


@pytest.mark.parametrize(
    "found, says",
    [
        ({"a": 1, "b": {"c": "x"}}, ""),
        ({"a": 1, "b": {"c": "x"}, "d": None}, ""),
        ([], r"f is damaged: it holds \[\], not an object"),
        ({"b": {"c": "x"}}, "f is damaged: a is missing"),
        ({"a": True, "b": {"c": "x"}}, "f is damaged: a is True, not a whole number"),
        ({"a": 1, "b": {"c": 2}}, "f, b, is damaged: c is 2, not a text"),
        ({"a": 1, "b": 3}, "f, b, is damaged: it holds 3"),
        ({"a": 1, "b": {"c": "x"}, "d": float("nan")}, "f is damaged: d is nan, not a number"),
        ({"a": 1, "b": {"c": "x"}, "e": -1}, "f is damaged: e is -1"),
    ],
)
def test_fields_are_there_and_of_their_kind(found, says):
    wanted = {"a": int, "b": {"c": str}, "d?": (int, float), "e?": lambda e: e > 0}
    if not says:
        need(found, wanted, "f")
        return
    with pytest.raises(ValueError, match=says):
        need(found, wanted, "f")
