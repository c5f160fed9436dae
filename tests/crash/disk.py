# SPDX-License-Identifier: MIT
"""A disk of our own whose power can be cut: an ext4 in a file, loop-mounted, that forgets what was never synced."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
import time
from pathlib import Path

EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2


def why_not() -> str:
    """Why there can be no power cuts on this machine; "" where there can."""
    if os.geteuid():
        return "power cuts need root, for loop-mounted file systems"
    for program in ("mkfs.ext4", "mount", "losetup"):
        if shutil.which(program) is None:
            return f"power cuts need {program}"
    with tempfile.TemporaryDirectory() as folder:
        disk = Disk(Path(folder), megaoctets=8)
        try:
            disk.mount()
        except OSError as problem:
            return f"power cuts need loop devices: {problem}"
        disk.unmount()
    return ""


class Disk:
    """An ext4 in the file `folder`/image, to be mounted on `path`. `inodes`: how many it has; None is as many as usual."""

    def __init__(self, folder: Path, *, megaoctets: int = 64, inodes: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.image, self.path = folder / "image", folder / "mounted"
        self.path.mkdir()
        with open(self.image, "wb") as file:
            file.truncate(megaoctets << 20)
        _run("mkfs.ext4", "-q", "-F", *(() if inodes is None else ("-N", str(inodes))), str(self.image))

    def mount(self, options: str = "") -> None:
        """Raises OSError where that is not possible."""
        # `mount` may lose the race for a free loop device against another test.
        _run("mount", "-o", ",".join(filter(None, ("loop", options))), str(self.image), str(self.path), tries=5)

    def unmount(self) -> None:
        """Raises OSError while somebody has something open there. The loop device goes with it."""
        _run("umount", str(self.path), tries=50)

    def lose_power(self) -> None:
        """Nothing that is not on the disk now will ever be. Whoever still works on it reads EIO."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(descriptor)

    def come_back(self, options: str = "") -> None:
        """The machine starts again after `lose_power`: the journal is replayed. Nobody has anything open any more."""
        self.unmount()
        self.mount(options)

    def cut_the_power(self) -> None:
        """Both."""
        self.lose_power()
        self.come_back()

    def remember(self) -> None:
        """Keep a copy of the file system as it is, mounted, now."""
        self.unmount()
        _run("cp", "--sparse=always", str(self.image), f"{self.image}.copy")
        self.mount()

    def recall(self) -> None:
        """Be the remembered copy again."""
        self.unmount()
        _run("cp", "--sparse=always", f"{self.image}.copy", str(self.image))
        self.mount()

    def check(self) -> None:
        """Look at the unmounted file system from end to end. Raises OSError where anything is amiss."""
        _run("e2fsck", "-f", "-n", str(self.image))


def _run(*words: str, tries: int = 1) -> None:
    for left in reversed(range(tries)):
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode == 0:
            return
        if left:
            time.sleep(0.05)
    raise OSError(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
