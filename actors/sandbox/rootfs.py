"""The file system of a cell: a few read-only directories of the host and a small writable /tmp.

Every visible tree is cloned before anything is covered, made read-only with all mounts below it, and attached to a fresh tmpfs
that becomes the root. Home directories, /etc, /proc, /sys, /run and the rest of /dev do not exist in it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from actors.sandbox import linux

SYSTEM_TREES = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/dev/null", "/dev/urandom", "/etc/ld.so.cache")
"""What programs and compilers need: libraries, headers, tools and two devices."""

_SCAFFOLD = "/tmp"  # covered by the new root while it is built, in the cell's own mount namespace only


def build(trees: Sequence[str], packages: Mapping[str, str]) -> None:
    """Make a root of `trees` (at their own paths) and `packages` (name under /packages -> host path) the caller's root.

    The caller is in a mount namespace of its own. Raises OSError where the kernel refuses a step.
    """
    linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE)
    wanted = {path: path for path in (*SYSTEM_TREES, *trees) if os.path.lexists(path)}
    wanted |= {f"/packages/{name}": path for name, path in packages.items()}
    links = {target: str(Path(path).readlink()) for target, path in wanted.items() if target == path and Path(path).is_symlink()}
    is_directory = {target: Path(path).is_dir() for target, path in wanted.items()}
    clones: dict[str, int] = {}
    for target, path in wanted.items():
        if target not in links and not any(target.startswith(f"{above}/") for above in clones):
            clones[target] = linux.clone_tree(os.path.realpath(path))
    linux.mount("tmpfs", _SCAFFOLD, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "size=1m,nr_inodes=1k,mode=755")
    os.chdir(_SCAFFOLD)
    for target, clone in clones.items():
        place = Path(_SCAFFOLD + target)
        if is_directory[target]:
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        is_device = target.startswith("/dev/")
        linux.restrict_tree(clone, linux.ATTR_RDONLY | linux.ATTR_NOSUID | (0 if is_device else linux.ATTR_NODEV))
        linux.attach_tree(clone, str(place))
        os.close(clone)
    for target, destination in links.items():
        place = Path(_SCAFFOLD + target)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(destination)
    Path(_SCAFFOLD + "/tmp").mkdir()
    linux.pivot_root_here()
    linux.mount(None, "/", None, linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV)


def mount_tmp(num_bytes: int, *, executable: bool = False) -> None:
    """A fresh, empty /tmp over what is there."""
    flags = linux.MS_NOSUID | linux.MS_NODEV | (0 if executable else linux.MS_NOEXEC)
    linux.mount("tmpfs", "/tmp", "tmpfs", flags, f"size={num_bytes},nr_inodes=1k,mode=1777")


def tmp_files() -> int:
    """Inodes in use in /tmp."""
    state = os.statvfs("/tmp")
    return state.f_files - state.f_ffree
