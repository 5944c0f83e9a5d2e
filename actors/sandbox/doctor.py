"""What this machine gives the sandbox, for people: `doctor_report()`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from actors.sandbox.cell import Cell, interpreter
from actors.sandbox.confine import PROFILES
from actors.sandbox.languages import LANGUAGES, Language
from actors.sandbox.pool import PACKAGES, find_packages, interpreter_trees, usable_cores
from actors.sandbox.selftest import REMEDY, try_profile
from protocol.errors import InfrastructureFault
from protocol.registry import resolve


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorReport:
    """The sandbox on this machine."""

    profile: str
    """The isolation in force; empty where none holds and judged programs are refused."""
    profiles: dict[str, str]
    """Each profile: "holds", or why not."""
    remedy: str
    """What would give a stronger profile; empty when the strongest holds."""
    languages: dict[str, str]
    """Each language: "ready", or what is missing."""
    packages: tuple[str, ...]
    """Python packages that judged programs may import."""
    cells: int
    """One per usable core."""
    interpreter: str
    user: str

    def __str__(self) -> str:
        lines = [f"sandbox: {self.profile or 'REFUSED, no isolation holds'} ({self.user}, {self.cells} cells, {self.interpreter})"]
        lines += [f"  profile {name}: {state}" for name, state in self.profiles.items()]
        lines += [f"  language {name}: {state}" for name, state in self.languages.items()]
        lines += [f"  packages for programs: {', '.join(self.packages) or 'none'}"]
        return "\n".join([*lines, *([f"  {self.remedy}"] if self.remedy else [])])


def doctor_report() -> DoctorReport:
    """Try every profile with the probe of the self-test, and look for every language. Takes about half a second."""
    packages = find_packages(PACKAGES)
    profiles = {}
    for profile in PROFILES:
        try:
            holes = try_profile(profile, lambda name: Cell(name, interpreter_trees(), packages))
            profiles[profile] = f"a program could {', '.join(holes)}" if holes else "holds"
        except InfrastructureFault as error:
            profiles[profile] = str(error)
    chosen = next((profile for profile in PROFILES if profiles[profile] == "holds"), "")
    languages: dict[str, Language] = {name: resolve(name, LANGUAGES, "language")() for name in LANGUAGES}
    return DoctorReport(
        profile=chosen,
        profiles=profiles,
        remedy="" if chosen == PROFILES[0] else REMEDY,
        languages={name: language.missing() or "ready" for name, language in languages.items()},
        packages=tuple(name for name in PACKAGES if name in packages),
        cells=usable_cores(),
        interpreter=interpreter(),
        user="root" if os.geteuid() == 0 else f"uid {os.geteuid()}",
    )
