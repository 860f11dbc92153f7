"""Where data are kept, and how they get there."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def cache_folder(name: str) -> Path:
    """Where the data called `name` are kept unless `data_dir` says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ladderfast" / name


def download_file(name: str, urls: Sequence[str], target: Path, *, check: Callable[[Path], object]) -> None:
    """Fetch a file from the first of `urls` that has it whole; `name` is for messages.

    check: raises ValueError for a file that is not what it should be; nothing takes the target's name before.

    Raises ImportError without pooch, OSError where no address serves.
    """
    try:
        import pooch
    except ImportError as error:
        raise ImportError('download needs pooch: pip install "ladderfast[train]"') from error
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")  # another process may fetch the same file
    failures = []
    for url in urls:
        try:
            with _DownloadProgress(name) as progress:
                fetch = pooch.HTTPDownloader(progressbar=progress, chunk_size=1 << 16, timeout=30)
                fetch(url, str(part), None)
            check(part)
            os.replace(part, target)
            return
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            failures.append(f"{url} ({str(error).splitlines()[0]})")
        finally:
            part.unlink(missing_ok=True)
    raise OSError(f"could not download {name}: tried {'; '.join(failures)}")


class _DownloadProgress:
    """rich's progress bar behind the interface that pooch asks for."""

    def __init__(self, name: str) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._progress = Progress(*columns, transient=True)
        self._task = self._progress.add_task(name, total=None)

    def __enter__(self) -> _DownloadProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    @property
    def total(self) -> float | None:
        return self._progress.tasks[0].total

    @total.setter
    def total(self, total: int) -> None:
        self._progress.update(self._task, total=total or None)

    def update(self, size: int) -> None:
        self._progress.advance(self._task, size)

    def reset(self) -> None:
        self._progress.reset(self._task, total=self.total)

    def close(self) -> None:
        pass
