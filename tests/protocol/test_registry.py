"""Names to objects, and errors that help."""

import pytest

from protocol.errors import UnknownName
from protocol.registry import check_name, resolve

TABLE = {"codec": "protocol.codec:encode", "gone": "protocol.nowhere:x", "half": "protocol.codec:nothing"}


def test_names_and_own_paths() -> None:
    from protocol.codec import decode, encode

    assert resolve("codec", TABLE, "thing") is encode
    assert resolve("protocol.codec:decode", TABLE, "thing") is decode


def test_unknown_names_list_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"thing 'codek' is not known; did you mean 'codec'\? Known: codec, gone, half"):
        resolve("codek", TABLE, "thing")


def test_missing_modules_and_attributes_are_told_apart() -> None:
    with pytest.raises(UnknownName, match=r"no module named 'protocol\.nowhere'"):
        resolve("gone", TABLE, "thing")
    with pytest.raises(UnknownName, match="has no 'nothing'"):
        resolve("half", TABLE, "thing")


@pytest.mark.parametrize("name", ["", "a:", ":b", "a b:c", "os.system('x'):y"])
def test_odd_paths_are_refused_without_an_import(name: str) -> None:
    with pytest.raises(UnknownName):
        check_name(name, TABLE, "thing")
