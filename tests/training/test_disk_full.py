from __future__ import annotations

import errno
import logging
import sys
from types import SimpleNamespace

import pytest

from ring_rl.training.disk_full import EchoSilencer, means_no_space


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "words of any language"), True),
        (OSError(errno.EDQUOT, "quota"), True),
        (ValueError("RESOURCE_EXHAUSTED: write: No space left on device [os_error_code='28']"), True),
        (chained(RuntimeError("save failed"), OSError(errno.ENOSPC, "full")), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (ValueError("RESOURCE_EXHAUSTED: out of device memory"), False),
        (None, False),
    ],
)
def test_only_a_full_disk_means_no_space(error, expected):
    assert means_no_space(error) is expected


def test_echoes_are_dropped_and_all_else_passed_on(monkeypatch, caplog):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    before = sys.unraisablehook
    silencer = EchoSilencer()
    silencer.start()
    echo = SimpleNamespace(exc_value=RuntimeError("Event loop is closed"))
    other = SimpleNamespace(exc_value=RuntimeError("a bug"))
    sys.unraisablehook(echo)
    sys.unraisablehook(other)
    assert seen == [other]
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).error("full", exc_info=OSError(errno.ENOSPC, "No space left on device"))
        logging.getLogger(logger).error("bug", exc_info=KeyError("bug"))
    assert [record.message for record in caplog.records] == ["bug", "bug"]
    silencer.stop()
    assert sys.unraisablehook is before


def test_a_hook_set_meanwhile_stays(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    silencer = EchoSilencer()
    silencer.start()
    later = lambda _: None  # noqa: E731
    sys.unraisablehook = later
    silencer.stop()
    assert sys.unraisablehook is later
