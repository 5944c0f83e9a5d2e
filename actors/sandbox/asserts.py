"""The job that holds the tests of a call problem and judges what the other cell answers.

Runs the data set's own test code with stand-ins for the judged names: a stand-in sends the call to the judged process and hands
back plain data. Expected values, comparisons and `assert` are here, out of the reach of the judged code. The verdicts go to
descriptor 4, which the judged process does not have.

    {"setup": "source", "tests": ["source", ...], "remote": ["f", ...], "stop": true}       asserts
    {"cases": [[args, [expected, ...]], ...], "function": "f", "tolerant": false, "stop": true}  arguments and the results that will do
"""

from __future__ import annotations

import builtins
import gc
import json
import math
import os
import sys
import types
from typing import Any, NoReturn

from actors.sandbox import values
from actors.sandbox.channel import Channel

_FLOAT_TOLERANCE = 1e-6
_leave = os._exit


class Gone(BaseException):
    """The judged process ended or broke the format. Not an Exception: test code must not catch it."""


class FromCandidate:
    """Marks an exception that the judged code raised."""


class Remote:
    """Calls into the judged process."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.decoder = values.Decoder(handle=lambda number: Thing(self, number))

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply, which is a dictionary but otherwise unchecked. Raises Gone, or what the judged code raised."""
        try:
            self._channel.send(request)
            reply = self._channel.receive()
        except (EOFError, OSError) as error:
            raise Gone(str(error)) from None
        if not isinstance(reply, dict):
            raise Gone("a reply that is not an object")
        if "error" in reply:
            raise _exception(str(reply["error"]), str(reply.get("message", "")))
        return reply

    def value(self, reply: dict[str, Any]) -> Any:
        try:
            return self.decoder.decode(reply.get("value"))
        except values.NotPlain as error:
            raise Gone(str(error)) from None

    def call(self, on: dict[str, Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        sent = [values.encode(argument, _number) for argument in arguments]
        named = {name: values.encode(argument, _number) for name, argument in keywords.items()}
        reply = self.ask({"op": "call", "on": on, "args": sent, "kwargs": named})
        changed = reply.get("args")
        if isinstance(changed, list):
            for original, data in zip((*arguments, *keywords.values()), changed, strict=False):
                _update(original, self.value({"value": data}))
        return self.value(reply)


def _number(value: object) -> int | None:
    return object.__getattribute__(value, "_number") if isinstance(value, Thing) else None


def _update(original: Any, changed: Any) -> None:
    """What the call did to an argument, done to the test's own object."""
    if type(original) is not type(changed):
        return
    if isinstance(original, list):
        original[:] = changed
    elif isinstance(original, dict | set):
        original.clear()
        original.update(changed)


def _exception(name: str, message: str) -> BaseException:
    """The builtin exception of that name, so that a test may expect it; marked as the judged code's."""
    kind = getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        kind = RuntimeError
    marked = type(name, (kind, FromCandidate), {"__init__": Exception.__init__})
    raised: BaseException = marked(message)
    return raised


class Name:
    """Stands in for a function or class of the judged module."""

    def __init__(self, remote: Remote, on: dict[str, Any]) -> None:
        self._remote = remote
        self._on = on

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._remote.call(self._on, arguments, keywords)


class Thing(values.Opaque):
    """Stands in for an object that stays in the judged process."""

    def __init__(self, remote: Remote, number: int) -> None:
        object.__setattr__(self, "_class_name", "object of the program's own class")
        object.__setattr__(self, "_remote", remote)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> Any:
        reply = self._remote.ask({"op": "get", "h": self._number, "attr": name})
        if reply.get("method"):
            return Name(self._remote, {"h": self._number, "attr": name})
        return self._remote.value(reply)

    def __setattr__(self, name: str, value: Any) -> None:
        self._remote.ask({"op": "set", "h": self._number, "attr": name, "value": values.encode(value, _number)})


def list_node(items: list[Any]) -> values.ListNode | None:
    """The linked list of `items`."""
    head = None
    for item in reversed(items):
        head = values.ListNode(item, head)
    return head


def tree_node(items: list[Any]) -> values.TreeNode | None:
    """The tree of `items` in level order, None for no child."""
    tree: values.TreeNode | None = values.Decoder().decode({"T": [None if item is None else [values.encode(item)] for item in items]})
    return tree


def is_same_list(left: Any, right: Any) -> bool:
    """Whether two linked lists hold the same values."""
    return bool(_node_data(left, values.ListNode) == _node_data(right, values.ListNode))


def is_same_tree(left: Any, right: Any) -> bool:
    """Whether two trees have the same shape and values."""
    return bool(_node_data(left, values.TreeNode) == _node_data(right, values.TreeNode))


def _node_data(node: Any, kind: type) -> Any:
    if node is not None and type(node) is not kind:
        raise TypeError(f"{type(node).__name__}, expected {kind.__name__} or None")
    return values.encode(node)


def same(found: Any, wanted: Any, tolerant: bool) -> bool:
    """Equality of results and JSON data, in which a tuple is a list; with `tolerant`, floats may differ by 1e-6."""
    if isinstance(found, tuple):
        found = list(found)
    if isinstance(wanted, list) and isinstance(found, list):
        return len(found) == len(wanted) and all(same(a, b, tolerant) for a, b in zip(found, wanted, strict=True))
    if isinstance(wanted, dict) and isinstance(found, dict):
        keyed = {str(key): value for key, value in found.items()}
        return keyed.keys() == wanted.keys() and all(same(keyed[key], value, tolerant) for key, value in wanted.items())
    if tolerant and isinstance(wanted, float) and isinstance(found, float | int):
        return math.isclose(found, wanted, rel_tol=_FLOAT_TOLERANCE, abs_tol=_FLOAT_TOLERANCE)
    return bool(found == wanted)


def run(source: bytes) -> NoReturn:
    """Judge, write the verdicts to descriptor 4, exit."""
    gc.enable()
    task = json.loads(source)
    remote = Remote(Channel(3))
    verdicts: list[list[str]] = []
    try:
        for test in _tests(task, remote):
            verdicts.append(_judge(test))
            if task["stop"] and verdicts[-1][0] != "accepted":
                break
    except Gone as end:
        verdicts.append(["gone", str(end)])
    except BaseException as error:  # the setup of the tests failed: the judged code is its only variable part
        verdicts.append(_verdict_of(error))
    with os.fdopen(4, "wb") as out:
        out.write(values.to_json(verdicts))
    _leave(0)


def _tests(task: dict[str, Any], remote: Remote) -> Any:
    """The tests as functions without arguments that raise when they fail."""
    if "cases" in task:
        function = Name(remote, {"name": task["function"]})
        for arguments, answers in task["cases"]:
            yield lambda arguments=arguments, answers=answers: _expect(function(*arguments), answers, task["tolerant"])
        return
    module = types.ModuleType("tests")
    names = vars(module)
    sys.modules["tests"] = module
    names |= {"list_node": list_node, "tree_node": tree_node, "is_same_list": is_same_list, "is_same_tree": is_same_tree}
    names |= {"ListNode": values.ListNode, "TreeNode": values.TreeNode, "inf": math.inf, "nan": math.nan}
    stand_ins = {name: Name(remote, {"name": name}) for name in task["remote"]}
    if task["setup"]:
        names |= stand_ins
        exec(compile(task["setup"], "setup.py", "exec", dont_inherit=True), names)
    names |= stand_ins
    for test in task["tests"]:
        code = compile(test, "test.py", "exec", dont_inherit=True)
        yield lambda code=code: exec(code, names)


def _expect(found: Any, answers: list[Any], tolerant: bool) -> None:
    if not any(same(found, wanted, tolerant) for wanted in answers):
        raise AssertionError(f"{repr(found)[:100]}, expected {repr(answers[0])[:100]}")


def _judge(test: Any) -> list[str]:
    try:
        test()
    except Gone:
        raise
    except BaseException as error:
        return _verdict_of(error)
    return ["accepted", ""]


def _verdict_of(error: BaseException) -> list[str]:
    text = f"{type(error).__name__}: {str(error)[:200]}"
    if isinstance(error, FromCandidate):
        return ["memory_limit" if type(error).__name__ == "MemoryError" else "runtime_error", text]
    return ["wrong_answer", text]
