"""When a process that died is started again, and when the run ends instead. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from protocol.settings import Settings

Limit = Annotated[int, Field(ge=0, strict=True)]


class RestartSettings(Settings):
    """How often processes that die or hang are replaced before the run ends."""

    generator: Limit = Field(10, description="restarts of one generator actor within window_s; one more death ends the run")
    rewarder: Limit = Field(10, description="of one reward actor")
    dispatcher: Limit = Field(10, description="of the dispatcher")
    learner: Limit = Field(10, description="of the learner group: all ranks are replaced together")
    dashboard: Limit = Field(10, description="of the dashboard")
    window_s: float = Field(600.0, gt=0, description="deaths longer ago than this no longer count")
    backoff_s: float = Field(0.2, gt=0, description="pause before the first restart; it doubles with each death in the window")
    max_backoff_s: float = Field(30.0, gt=0, description="longest pause")


@dataclass(frozen=True, slots=True)
class Restart:
    """Start it again after `delay_s`."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the run, and why."""

    reason: str


@dataclass(slots=True)
class _History:
    deaths: list[float] = field(default_factory=list)
    first_cause: str = ""
    last_error: str = ""


class RestartPolicy:
    """What each death leads to. Times are seconds of any clock that does not go back."""

    def __init__(self, settings: RestartSettings) -> None:
        self._settings = settings
        self._histories: dict[str, _History] = {}

    def died(self, unit: str, role: str, now_s: float, cause: str, error: str) -> Restart | GiveUp:
        """`unit` (one process, or "learner" for the group) died: `cause` in words, `error` what it reported itself, if anything."""
        settings, history = self._settings, self._histories.setdefault(unit, _History())
        history.deaths = [at for at in history.deaths if now_s - at <= settings.window_s]
        if not history.deaths:
            history.first_cause, history.last_error = cause, ""
        limit: int = getattr(settings, role)
        if limit == 0:
            return GiveUp(cause)
        if error and error == history.last_error:
            return GiveUp(f"{cause}; the same as before its restart")
        if len(history.deaths) >= limit:
            times = f"{len(history.deaths) + 1} times within {settings.window_s:g} s, restarts.{role} allows {limit}"
            return GiveUp(f"{unit} died {times}; first: {history.first_cause}; now: {cause}")
        history.deaths.append(now_s)
        history.last_error = error
        return Restart(min(settings.max_backoff_s, settings.backoff_s * 2 ** (len(history.deaths) - 1)))
