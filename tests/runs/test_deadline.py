"""Time limits in the main thread and in others."""

import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from fsp.runs import deadline as deadline_module
from fsp.runs.deadline import OutOfTime, deadline


def spin():
    while True:
        sum(range(100))


def ends(seconds, work, **options):
    try:
        with deadline(seconds, **options):
            return work()
    except OutOfTime:
        return "out of time"


def in_thread(*arguments, **options):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(ends, *arguments, **options).result(60)


@pytest.mark.parametrize("where", [ends, in_thread])
def test_endless_work_is_stopped_in_its_time_and_its_handlers_of_ordinary_exceptions_let_that_pass(where):
    def stubborn():
        while True:
            with suppress(Exception):
                spin()

    start = time.monotonic()
    assert where(0.1, stubborn) == "out of time"
    assert 0.1 <= time.monotonic() - start < 30


@pytest.mark.parametrize("where", [ends, in_thread])
@pytest.mark.parametrize("limit", [None, 600])
def test_work_within_its_time_is_left_alone_and_nothing_comes_after_it(where, limit):
    before = set(threading.enumerate())
    assert where(limit, lambda: 3) == 3
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    watchers = [thread for thread in set(threading.enumerate()) - before if thread.name == "fsp deadline"]
    assert limit is not None or watchers == []


def test_the_main_thread_is_woken_from_its_sleep():
    assert ends(0.1, lambda: time.sleep(600)) == "out of time"


def test_a_timer_and_a_handler_that_were_there_go_on():
    rung = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        assert ends(0.05, spin) == "out of time"
        while not rung:
            signal.pause()
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert len(rung) == 1


def test_limits_nest():
    assert ends(600, lambda: ends(0.05, spin)) == "out of time"
    assert in_thread(0.05, lambda: ends(600, spin)) == "out of time"


def test_the_last_resort_is_called_when_a_call_does_not_return(monkeypatch):
    monkeypatch.setattr(deadline_module, "GRACE", 0.05)
    asked = threading.Event()
    assert in_thread(0.05, lambda: asked.wait(60), last_resort=asked.set) == "out of time"
    assert asked.is_set()


def test_a_limit_that_comes_as_the_work_ends_never_hits_what_follows():
    def again_and_again():
        words = set()
        for _ in range(300):
            words.add(ends(1e-4, lambda: time.sleep(1e-4)))
            sum(range(50))  # an exception that comes late would come here, and leave this function
        return words

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(again_and_again).result(60) <= {None, "out of time"}
        assert again_and_again() <= {None, "out of time"}
    finally:
        sys.setswitchinterval(switch)
