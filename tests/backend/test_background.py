"""What runs in the background has a low priority until that is over. In processes of their
own: only a privileged one gets its priority back."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, threading
from footplate.backend.background import NICENESS, Background

def nice(): return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

background = Background()
"""


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + program], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_call_and_its_threads_give_way_and_the_main_thread_does_not() -> None:
    assert (
        run("""
before = nice()
def call():
    found = [nice()]
    thread = threading.Thread(target=lambda: found.append(nice()))
    thread.start(); thread.join()
    return found
assert background.call(call) == [NICENESS, NICENESS]
assert nice() == before
print("right")
""")
        == "right"
    )


def test_a_call_that_begins_when_the_background_is_over_is_as_fast_as_others() -> None:
    assert (
        run("""
background.end()
assert background.call(nice) == nice()
print("right")
""")
        == "right"
    )


def test_a_session_is_as_important_as_others_afterwards() -> None:
    said = run("""
from pathlib import Path
group = Path("/proc/self/autogroup")
def read():
    # Empty: the session of who started us is in no group of its own.
    said = group.read_text().split() if group.exists() else []
    return said[-1] if said else "none"
others = read()
assert background.call(read) == others
os.setsid()
during = background.call(read)
background.end()
print(during, read())
""")
    if "none" in said:
        pytest.skip("this kernel has no groups of sessions")
    assert said == "10 0"


def test_an_error_comes_through() -> None:
    assert (
        run("""
try:
    background.call(lambda: 1 / 0)
except ZeroDivisionError:
    print("right")
""")
        == "right"
    )
