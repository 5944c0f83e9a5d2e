"""The job that holds judged code and answers calls to it. The tests are in another cell (`asserts.py`).

    request   {"op": "call", "on": {"name": "f"} or {"h": 3, "attr": "m"}, "args": [...], "kwargs": {...}}
              {"op": "get", "h": 3, "attr": "left"}    {"op": "set", "h": 3, "attr": "left", "value": ...}
    reply     {"value": ..., "args": [...]}   args only where the call changed them
              {"method": true}                the attribute is callable
              {"error": "ValueError", "message": "..."}

The judged code shares this process and may answer what it likes: nothing here is trusted by the other side but the plain data.
"""

from __future__ import annotations

import gc
import os
import sys
import types
from typing import Any, NoReturn

from actors.sandbox import values
from actors.sandbox.channel import Channel

_leave = os._exit  # judged code may replace the attribute
_CONTEST_MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "builtins", "typing"),
)


def contest_names() -> dict[str, object]:
    """What platforms for `class Solution` problems import before a submission; the later module wins, builtins near the last."""
    names: dict[str, object] = {}
    for module_name in _CONTEST_MODULES:
        module = __import__(module_name)
        public = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
        names |= {name: getattr(module, name) for name in public}
    names |= {module_name: sys.modules[module_name] for module_name in (*_CONTEST_MODULES, "sys", "os", "json")}
    return names | {"ListNode": values.ListNode, "TreeNode": values.TreeNode}


class Server:
    """Answers calls to the names of one module until the other end closes."""

    def __init__(self, module: types.ModuleType, channel: Channel) -> None:
        self._module = module
        self._channel = channel
        self._kept: list[object] = []
        names = vars(module)
        self._decoder = values.Decoder(
            names.get("ListNode", values.ListNode), names.get("TreeNode", values.TreeNode), self._kept.__getitem__
        )

    def _keep(self, value: object) -> int | None:
        """Objects of the module's own classes stay here."""
        if type(value).__module__ != self._module.__name__:
            return None
        self._kept.append(value)
        return len(self._kept) - 1

    def serve(self) -> None:
        """Until the other end closes or the code ends the process."""
        while True:
            try:
                request = self._channel.receive()
            except EOFError:
                return
            try:
                reply = self._answer(request)
            except Exception as error:  # judged code may raise anything; the other side makes a verdict of the reply
                reply = {"error": type(error).__name__, "message": str(error)[:300]}
            self._channel.send(reply)

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["op"] == "call":
            return self._call(request)
        target = self._kept[request["h"]]
        if request["op"] == "set":
            setattr(target, request["attr"], self._decoder.decode(request["value"]))
            return {"value": None}
        value = getattr(target, request["attr"])
        return {"method": True} if callable(value) else {"value": values.encode(value, self._keep)}

    def _call(self, request: dict[str, Any]) -> dict[str, Any]:
        on = request["on"]
        target = self._find(on["name"]) if "name" in on else getattr(self._kept[on["h"]], on["attr"])
        arguments = self._decoder.decode(request["args"])
        keywords = {name: self._decoder.decode(value) for name, value in request["kwargs"].items()}
        reply = {"value": values.encode(target(*arguments, **keywords), self._keep)}
        try:
            after = [values.encode(argument) for argument in (*arguments, *keywords.values())]
        except values.NotPlain:
            return reply
        return reply if after == [*request["args"], *request["kwargs"].values()] else reply | {"args": after}

    def _find(self, name: str) -> Any:
        """A function of the module, or a method of its `Solution`."""
        if hasattr(self._module, name):
            return getattr(self._module, name)
        if hasattr(self._module, "Solution"):
            return getattr(self._module.Solution(), name)
        raise NameError(f"name {name!r} is not defined")


def run(source: bytes, names: dict[str, object]) -> NoReturn:
    """Import `source` as module "solution", beginning with `names`, and answer calls on descriptor 3."""
    gc.enable()
    module = types.ModuleType("solution")
    vars(module).update(names)
    sys.modules["solution"] = module
    exec(compile(source, "solution.py", "exec", dont_inherit=True), vars(module))
    Server(module, Channel(3)).serve()
    _leave(0)
