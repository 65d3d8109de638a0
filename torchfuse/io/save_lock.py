"""A lock that is held while something is written, and that the system releases when its holder dies."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["SaveLock"]


class SaveLock:
    """An exclusive lock on a file that exists only while it is held, or after its holder was killed.

    While it is held, temporary files beside it are leftovers of killed processes.

    Args:
        file: the lock file; its directory must exist.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     lock, other = SaveLock(Path(folder, "lock")), SaveLock(Path(folder, "lock"))
        ...     print(lock.acquire())
        ...     try:
        ...         other.acquire(wait=False)
        ...     except BlockingIOError:
        ...         print("held")
        ...     lock.release()
        ...     print(os.listdir(folder))
        True
        held
        []
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._handle: int | None = None

    def acquire(self, *, wait: bool = True) -> bool:
        """Take the lock.

        Args:
            wait: whether to wait for another holder, which may be in the same process.

        Returns:
            Whether the lock is held. False where files cannot be locked or the lock file cannot be
            opened: other writers may be at work then.

        Raises:
            BlockingIOError: if ``wait`` is False and there is another holder.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            return False
        while True:
            try:
                handle = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError:
                return False
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if os.path.samestat(os.fstat(handle), os.stat(self._file)):
                    self._handle = handle
                    return True
            except FileNotFoundError:
                pass  # as with another file of this name: the holder before removed it, so open again
            except BlockingIOError:
                raise
            except OSError:
                return False
            finally:
                if self._handle is None:
                    os.close(handle)

    def release(self) -> None:
        """Release the lock and remove its file; nothing happens if it is not held."""
        if self._handle is None:
            return
        import fcntl

        self._file.unlink(missing_ok=True)
        # Explicitly: processes that were forked meanwhile have the file open, too, and closing it here
        # would leave it locked until they end.
        fcntl.flock(self._handle, fcntl.LOCK_UN)
        os.close(self._handle)
        self._handle = None
