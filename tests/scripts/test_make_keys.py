"""Making and revoking keys by command."""

import os
import stat
import subprocess
import sys
from pathlib import Path

from footplate.protocol.keys import read_client_keys, read_guests, read_server_key

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_keys.py"


def make_keys(folder: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, SCRIPT, "keys", *arguments],
        cwd=folder,
        env={**os.environ, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


def test_one_command_makes_a_client_that_can_come_in_and_another_revokes_it(tmp_path: Path) -> None:
    flags = ("--role", "admin", "--max-requests", "9", "--max-queued-tokens", "99")
    status, said = make_keys(tmp_path, "--name", "alice", *flags)
    assert status == 0 and "alice.key" in said
    keys = read_client_keys(tmp_path / "alice.key")
    server = read_server_key(tmp_path / "keys")
    ((name, guest),) = read_guests(tmp_path / "keys")[0].values()
    assert keys.server_public_key == server.public_key
    assert (name, guest.public_key) == ("alice", keys.public_key)
    assert (guest.role, guest.max_requests, guest.max_queued_tokens) == ("admin", 9, 99)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    for secret in (keys.secret_key, server.secret_key):
        assert secret not in said

    before = (tmp_path / "alice.key").read_bytes()
    status, said = make_keys(tmp_path, "--name", "alice")
    assert status == 78 and "there already" in said and "Traceback" not in said
    assert (tmp_path / "alice.key").read_bytes() == before
    assert read_server_key(tmp_path / "keys") == server

    assert make_keys(tmp_path, "--name", "alice", "--revoke")[0] == 0
    assert read_guests(tmp_path / "keys") == ({}, [])
    status, said = make_keys(tmp_path, "--name", "../x", "--revoke")
    assert status == 78 and "name=" in said
