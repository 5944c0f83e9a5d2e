"""`rlsys timeline`: one trace for a trace viewer and one HTML page, from what a run recorded so far."""

from __future__ import annotations

import json
from pathlib import Path

from rlsys.page import write_page
from rlsys.story import read_story
from rlsys.trace import write_trace
from rlsys.usage import usage


def timeline(run: Path, out: Path | None, *, as_json: bool) -> int:
    """Write `trace.json` and `report.html`, into the run directory unless told otherwise, and say where they are."""
    story = read_story(run)
    folder = out or run
    folder.mkdir(parents=True, exist_ok=True)
    trace, page = folder / "trace.json", folder / "report.html"
    write_trace(story, trace)
    write_page(story, page)
    times = {name: usage(rows, rows[0].start_s, rows[-1].end_s) for name, rows in story.processes.items() if rows}
    if as_json:
        processes = {n: {"wall_s": u.wall_s, "busy_s": u.busy_s, "idle_s": u.idle_s, "work_s": u.work_s} for n, u in times.items()}
        print(json.dumps({"trace": str(trace), "report": str(page), "state": story.state, "processes": processes}))
        return 0
    for name, use in times.items():
        causes = ", ".join(
            f"{n.removeprefix('waiting:')} {s:.1f} s" for n, s in sorted(use.idle_s.items(), key=lambda i: -i[1])[:3] if s >= 0.05
        )
        print(f"  {name:<14} {use.wall_s:7.1f} s  busy {use.busy_share:4.0%}  idle: {causes or 'never'}")
    print(f"report  {page}  (open it in a browser)")
    print(f"trace   {trace}  (open it at https://ui.perfetto.dev or chrome://tracing)")
    return 0
