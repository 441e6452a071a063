"""Devices that several processes measure on."""

import threading
import warnings
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from hardware_profiles import load_target, measuring
from hardware_profiles.measuring import exclusive


def test_a_device_is_measured_on_by_one_at_a_time_whatever_the_operating_point(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_SILENT_S", 0.0)
    entered = threading.Event()
    told: list[str] = []

    def other() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with exclusive(load_target("host:int8")):
                entered.set()
        told.extend(str(w.message) for w in caught)

    waiting = threading.Thread(target=other)
    with exclusive(load_target("host:fp32")):
        (lock,) = (own_home / "locks").iterdir()
        with pytest.raises(Timeout):
            FileLock(lock).acquire(timeout=0)
        waiting.start()
        assert not entered.wait(0.3)
        with exclusive(load_target("raspberry_pi_4")):
            pass
    assert entered.wait(10)
    waiting.join()
    assert told == ["host:int8: another process measures on this device; waiting for it to end"]
    with pytest.raises(ZeroDivisionError), exclusive(load_target("host")):
        raise ZeroDivisionError
    with exclusive(load_target("host")):
        pass


def test_measuring_needs_no_writable_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").write_text("no directory")
    monkeypatch.setenv("NASBENCH_HOME", str(tmp_path / "home"))
    with exclusive(load_target("host")):
        pass
