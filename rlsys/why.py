"""`rlsys why`: who waits for whom at this moment, from what the supervisor last wrote and what the operating system shows now."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from protocol.clock import now_s
from rlsys.rundir import holder, read_json, read_status
from rlsys.states import from_data, kernel_view
from rlsys.waits import Explanation, Limits, explain

SUPERVISOR_SILENT_S = 5.0
"""The supervisor writes status.json every second."""


def why(run: Path, *, as_json: bool) -> int:
    """Print the explanation. Exit code 0 also when somebody is to blame: it was asked for and given."""
    content = read_status(run)
    supervisor = holder(run)
    if supervisor is None:
        ended = read_json(run / "exit.json")
        text = "the supervisor is gone without an exit.json"
        if ended:
            text = f"the run is over: {ended.get('outcome', 'unknown')}, {ended.get('reason', 'no reason is on record')}"
        print(json.dumps({"over": True, "sentence": text}) if as_json else text)
        return 0
    if content.get("state") == "ending" and time.time() - content["time_s"] < SUPERVISOR_SILENT_S:
        left = [process["name"] for process in content["processes"]]
        text = f"the run is ending: {content['reason']}" + (f"; still there: {', '.join(left)}" if left else "")
        print(json.dumps({"over": False, "ending": True, "sentence": text, "guilty": []}) if as_json else text)
        return 0
    explanation, about_supervisor = explain_status(content, supervisor)
    if as_json:
        print(json.dumps({"over": False, **explanation.data(), "supervisor": about_supervisor}, indent=1))
        return 0
    print("\n".join([*([f"to blame     {about_supervisor}"] if about_supervisor else []), *explanation.lines()]))
    return 0


def explain_status(content: Mapping[str, Any], supervisor: int) -> tuple[Explanation, str]:
    """The explanation of a run whose supervisor has process id `supervisor`, and what is wrong with the supervisor, if anything."""
    later_s = max(0.0, time.time() - content["time_s"])
    kernel = kernel_view({process["pid"] for process in content["processes"]} | {supervisor})
    about = ""
    if later_s > SUPERVISOR_SILENT_S:
        how = "is stopped" if kernel.get(supervisor, (False, False, 0.0))[0] else "hangs"
        about = f"the supervisor (process {supervisor}) {how}: it has written nothing for {later_s:.0f} s"
    states = []
    for process in content["processes"]:
        state = from_data(process, later_s)
        stopped = kernel.get(process["pid"], (state.stopped, False, 0.0))[0]
        states.append(replace(state, stopped=stopped, computing=state.computing and not stopped))
    return explain(states, Limits(**content["limits"]), now_s()), about
