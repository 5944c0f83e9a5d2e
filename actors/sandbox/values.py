"""Plain data between processes: what crosses from judged code to the judge, as JSON with tags.

Only the types below exist on the wire. An object of any other class arrives as `Opaque`, which refuses every comparison, so an
object that calls itself equal to everything proves nothing. Objects of classes that the program defined itself can stay in its
process and be named by a number (`Handle`).

| Python | JSON |
|---|---|
| None, bool, str, float, int below 2**63 | itself |
| list | array |
| larger int, bytes, Decimal | {"i": hex}, {"b": hex}, {"D": text} |
| tuple, set, frozenset, range | {"t": [...]}, {"s": [...]}, {"z": [...]}, {"r": [start, stop, step]} |
| dict | {"d": [[key, value], ...]} |
| complex, Fraction | {"c": [real, imaginary]}, {"F": [numerator, denominator]} |
| an iterator | {"y": [...]}, drained |
| ListNode, TreeNode | {"L": [values]}, {"T": [values in level order, null for no child]} |
| a builtin class | {"C": name} |
| anything else | {"h": number} or {"o": class name} |
"""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any, NoReturn

MAX_DEPTH = 200
MAX_ITEMS = 200_000
"""Of a drained iterator, a linked list or a tree: what is longer, or never ends, is opaque."""


class ListNode:
    """Node of a singly linked list, as problem statements define it."""

    def __init__(self, val: Any = 0, next: ListNode | None = None) -> None:
        self.val = val
        self.next = next


class TreeNode:
    """Node of a binary tree, as problem statements define it."""

    def __init__(self, val: Any = 0, left: TreeNode | None = None, right: TreeNode | None = None) -> None:
        self.val = val
        self.left = left
        self.right = right


class Opaque:
    """Something that is not plain data. Every comparison with it is an error and not an answer."""

    def __init__(self, class_name: str) -> None:
        self._class_name = class_name

    def _refuse(self, *_: object) -> NoReturn:
        raise TypeError(f"a {self._class_name} is not plain data and cannot be judged")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __bool__ = __len__ = __iter__ = __contains__ = __call__ = __hash__ = _refuse

    def __repr__(self) -> str:
        return f"<{self._class_name}>"


class NotPlain(Exception):
    """A value that has no form on the wire."""


Keep = Callable[[object], int | None]
"""Called for an object of unknown class; returns its number if it shall stay where it is."""


def keep_nothing(_: object) -> None:
    """Unknown objects become opaque."""


def encode(value: object, keep: Keep = keep_nothing, depth: int = 0) -> Any:
    """`value` as JSON data. Subclasses of plain types count as the plain type, read by the base class's own methods. Raises NotPlain."""
    kind = type(value)
    if value is None or kind is bool or kind is str or kind is float:
        return value
    if kind is int:
        return value if -(1 << 63) <= value < 1 << 63 else {"i": hex(value)}  # type: ignore[operator, arg-type]
    if depth > MAX_DEPTH:
        raise NotPlain("data nested too deeply")
    below = depth + 1
    for base, tag in _SEQUENCES:
        if isinstance(value, base):
            items = [encode(item, keep, below) for item in base.__iter__(value)]
            return {tag: items} if tag else items
    if isinstance(value, dict):
        return {"d": [[encode(key, keep, below), encode(item, keep, below)] for key, item in dict.items(value)]}
    for base, convert in _SCALARS:
        if isinstance(value, base):
            return convert(value)
    if kind is type and value.__module__ == "builtins":
        return {"C": value.__name__}  # type: ignore[attr-defined]
    if kind.__name__ == "ListNode" and hasattr(value, "next"):
        return {"L": [encode(item, keep, below) for item in _list_values(value)]}
    if kind.__name__ == "TreeNode" and hasattr(value, "left"):
        return {"T": [None if node is None else [encode(node.val, keep, below)] for node in _tree_nodes(value)]}
    if kind.__module__ in ("builtins", "itertools") and hasattr(kind, "__iter__"):
        return _encode_iterable(value, keep, below)
    if kind.__module__ == "numpy" and hasattr(value, "tolist"):
        plain = value.tolist()
        return encode(plain, keep, below) if not isinstance(plain, list) else {"o": "numpy.ndarray"}
    number = keep(value)
    return {"o": kind.__name__} if number is None else {"h": number}


_SEQUENCES: tuple[tuple[Any, str], ...] = ((list, ""), (tuple, "t"), (set, "s"), (frozenset, "z"))
_SCALARS: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (bool, bool),
    (int, lambda value: encode(int.__int__(value))),
    (float, float.__float__),
    (str, str.__str__),
    (bytes, lambda value: {"b": bytes.hex(value)}),
    (bytearray, lambda value: {"b": bytearray.hex(value)}),
    (complex, lambda value: {"c": [complex.__getattribute__(value, "real"), complex.__getattribute__(value, "imag")]}),
    (Decimal, lambda value: {"D": Decimal.__str__(value)}),
    (Fraction, lambda value: {"F": [hex(value.numerator), hex(value.denominator)]}),
    (range, lambda value: {"r": [value.start, value.stop, value.step]}),
)


def _encode_iterable(value: Any, keep: Keep, depth: int) -> Any:
    items: list[Any] = []
    for item in value:
        items.append(encode(item, keep, depth))
        if len(items) > MAX_ITEMS:
            return {"o": type(value).__name__}
    return {"s" if type(value).__name__ in ("dict_keys", "dict_items") else "y": items}


def _list_values(node: Any) -> list[Any]:
    values = []
    while node is not None:
        values.append(node.val)
        node = node.next
        if len(values) > MAX_ITEMS:
            raise NotPlain("a linked list without an end")
    return values


def _tree_nodes(root: Any) -> list[Any]:
    """Level order with None for missing children, without the trailing ones."""
    nodes = [root]
    for node in nodes:
        if node is not None:
            nodes += [node.left, node.right]
        if len(nodes) > MAX_ITEMS:
            raise NotPlain("a tree without an end")
    while nodes and nodes[-1] is None:
        nodes.pop()
    return nodes


class Decoder:
    """JSON data back to Python. `list_node` and `tree_node` are the classes to build; `handle` gives the object of a number."""

    def __init__(self, list_node: Any = ListNode, tree_node: Any = TreeNode, handle: Callable[[int], Any] | None = None) -> None:
        self._list_node = list_node
        self._tree_node = tree_node
        self._handle = handle

    def decode(self, data: Any) -> Any:
        """Raises NotPlain for anything that `encode` does not write."""
        if isinstance(data, list):
            return [self.decode(item) for item in data]
        if not isinstance(data, dict):
            return data
        if len(data) != 1:
            raise NotPlain(f"{len(data)} keys in a tagged value, expected 1")
        ((tag, content),) = data.items()
        try:
            return self._tagged(tag, content)
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise NotPlain(f"malformed value with tag {str(tag)[:20]!r}: {error}") from None

    def _tagged(self, tag: str, content: Any) -> Any:
        simple: dict[str, Callable[[Any], Any]] = {
            "i": lambda text: int(text, 16),
            "b": bytes.fromhex,
            "D": Decimal,
            "c": lambda parts: complex(float(parts[0]), float(parts[1])),
            "F": lambda parts: Fraction(int(parts[0], 16), int(parts[1], 16)),
            "r": lambda parts: range(*parts),
            "o": lambda name: Opaque(str(name)[:60]),
            "d": lambda pairs: {self.decode(key): self.decode(item) for key, item in pairs},
            "C": _builtin_class,
            "L": self._linked_list,
            "T": self._tree,
        }
        if tag in simple:
            return simple[tag](content)
        if tag == "h" and self._handle is not None:
            return self._handle(int(content))
        collections: dict[str, Callable[[list[Any]], Any]] = {"t": tuple, "s": set, "z": frozenset, "y": iter}
        return collections[tag]([self.decode(item) for item in content])

    def _linked_list(self, values: list[Any]) -> Any:
        head = None
        for value in reversed(values):
            head = self._list_node(self.decode(value), head)
        return head

    def _tree(self, nodes: list[Any]) -> Any:
        if not nodes or nodes[0] is None:
            return None
        built = [None if node is None else self._tree_node(self.decode(node[0])) for node in nodes]
        children = iter(built[1:])
        for node in built:
            if node is not None:
                node.left = next(children, None)
                node.right = next(children, None)
        return built[0]


def _builtin_class(name: str) -> type:
    found = getattr(builtins, name)
    if not isinstance(found, type):
        raise ValueError("not a class")
    return found


def to_json(data: Any) -> bytes:
    """Bytes of encoded data; floats keep every bit."""
    return json.dumps(data, separators=(",", ":")).encode()
