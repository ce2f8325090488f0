"""What TensorBoard shows of a run: every metric as a scalar, the use of every code as a histogram.

One event file a process, written and flushed at every report, so that a kill loses nothing that was reported. A run
that goes on from a save begins its file with the mark at which readers drop what earlier files say of that step and
later ones.

Source: event.proto and summary.proto of TensorFlow, as tensorboardX carries them; SessionLog.START is its `purge_step`.
Its SummaryWriter is not used: it writes through a queue and a thread, and names the file after the host.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from gemma_qat.numerics.formats import FORMATS
from gemma_qat.train.points import Point


class TensorBoard:
    """A listener that writes points into `directory`; nothing is there before the first."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._file = directory, None

    def __call__(self, point: Point) -> None:
        """Adds the scalars and histograms of a point."""
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=n, simple_value=v) for n, v in point.metrics.items()]
        histograms = [_histogram(name, counts) for name, counts in point.code_use.items()]
        file = self._file = self._file or _begin(self._directory, point.step)
        _write(file, step=point.step, summary=Summary(value=[*scalars, *histograms]))

    def close(self) -> None:
        """Closes the file, if there is one."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _begin(directory: Path, step: int) -> Any:
    from tensorboardX.proto.event_pb2 import SessionLog
    from tensorboardX.record_writer import RecordWriter

    directory.mkdir(parents=True, exist_ok=True)
    # Readers take files in the order of their names; two processes may begin in the same second.
    file = RecordWriter(str(directory / f"events.out.tfevents.{time.time_ns() // 1000}"))
    _write(file, file_version="brain.Event:2")
    _write(file, step=step, session_log=SessionLog(status=SessionLog.START))
    return file


def _write(file: Any, **content: Any) -> None:
    from tensorboardX.proto.event_pb2 import Event

    file.write(Event(wall_time=time.time(), **content).SerializeToString())
    file.flush()


def _histogram(name: str, counts: np.ndarray) -> Any:
    """A bar of width 1 a code: `min` and `max` are the edges of the outermost bars."""
    from tensorboardX.proto.summary_pb2 import HistogramProto, Summary

    number = FORMATS[name]
    codes = np.arange(number.code_min, number.code_max + 1, dtype=float)
    histogram = HistogramProto(
        min=codes[0] - 0.5, max=codes[-1] + 0.5, num=float(counts.sum()), sum=float(counts @ codes),
        sum_squares=float(counts @ codes**2), bucket_limit=(codes + 0.5).tolist(),
        bucket=counts.astype(float).tolist(),
    )  # fmt: skip
    return Summary.Value(tag=f"codes/{name}", histo=histogram)
