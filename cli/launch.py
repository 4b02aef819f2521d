"""Becomes another program that ends with its parent and, where asked, is not root.

Run as a script, `python -I launch.py PARENT_PID DEATH_SIGNAL IDENTITY PROGRAM ARGUMENT...`: it takes the identity, asks
the kernel for DEATH_SIGNAL when the thread that started it ends, and replaces itself by PROGRAM. Doing this in a small
process of its own, instead of between fork and exec, keeps it safe in programs that have threads.

IDENTITY is `same`, `namespace:UID` (a user namespace in which the caller appears as UID: files keep their owner, and
folders that only root may enter stay reachable) or `user:UID:GID` (the process really becomes that user). PostgreSQL
needs one of the latter two when root starts it. The death signal is set last, since a change of identity clears it.

Imports only the standard library and nothing of Bitmill.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_CLONE_NEWUSER = 0x10000000
_PR_SET_PDEATHSIG = 1


def enter_user_namespace(uid: int) -> None:
    """From here on this process is `uid` in a user namespace of its own; outside nothing changes.

    Raises OSError where the kernel or a sandbox does not permit it.
    """
    outside_uid, outside_gid = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWUSER) != 0:
        raise OSError(ctypes.get_errno(), "user namespaces are not permitted here")
    Path("/proc/self/uid_map").write_text(f"{uid} {outside_uid} 1")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/gid_map").write_text(f"{uid} {outside_gid} 1")


def become_user(uid: int, gid: int) -> None:
    """Give root away for good."""
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def take_identity(identity: str) -> None:
    kind, *numbers = identity.split(":")
    if kind == "namespace":
        enter_user_namespace(int(numbers[0]))
    elif kind == "user":
        become_user(int(numbers[0]), int(numbers[1]))


def die_with_parent(parent: int, death_signal: int) -> None:
    """Have the kernel send `death_signal` when the parent ends, and end now if it has ended already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, death_signal) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        sys.exit(128 + death_signal)


def main(arguments: list[str]) -> None:
    parent, death_signal, identity, *program = arguments
    take_identity(identity)
    die_with_parent(int(parent), int(death_signal))
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.execv(program[0], program)  # noqa: S606 - a program and its arguments, no shell


if __name__ == "__main__":
    main(sys.argv[1:])
