"""The keys that are let in follow their files."""

import os
from pathlib import Path

import pytest
import zmq

from footplate.backend.gatekeeper import Gatekeeper
from footplate.backend.keyring import OWNER, Keyring
from footplate.protocol.config import SecurityConfig
from footplate.protocol.errors import EngineStartError, InvalidParameterError, KeyFileError
from footplate.protocol.keys import Guest, KeyPair, make_client_key, make_server_key, revoke

ALICE, BOB, OWNER_KEY = "a" * 40, "b" * 40, "o" * 40
ADDRESS = "tcp://127.0.0.1:5555"


@pytest.fixture
def key_dir(tmp_path: Path) -> Path:
    make_server_key(tmp_path / "keys", KeyPair("s" * 40, "S" * 40))
    for name, key in (("alice", ALICE), ("bob", BOB)):
        let_in(tmp_path / "keys", name, key)
    return tmp_path / "keys"


def let_in(key_dir: Path, name: str, key: str) -> None:
    file = key_dir.parent / f"{name}.key"
    make_client_key(key_dir, name, KeyPair(key, "S" * 40), file, Guest(public_key=key))


def names(ring: Keyring) -> list[str]:
    return [found[0] for key in (ALICE, BOB) if (found := ring.find(key))]


def test_it_knows_who_has_a_file_and_the_owner(key_dir: Path) -> None:
    ring = Keyring(key_dir, OWNER_KEY)
    assert names(ring) == ["alice", "bob"]
    owner = ring.find(OWNER_KEY)
    assert owner is not None and owner[0] == OWNER and owner[1].role == "admin"
    for key in ("", "c" * 40, "s" * 40):
        assert ring.find(key) is None
    assert Keyring(key_dir).find("") is None, "no owner's key is nobody's key"


def test_it_changes_with_the_files_and_says_so(key_dir: Path) -> None:
    ring = Keyring(key_dir)
    assert not ring.refresh()
    revoke(key_dir, "alice")
    assert ring.refresh() and not ring.refresh()
    assert names(ring) == ["bob"]
    (key_dir.parent / "alice.key").unlink()
    let_in(key_dir, "alice", ALICE)
    assert ring.refresh()
    assert names(ring) == ["alice", "bob"]


@pytest.mark.parametrize(
    "damage", ["open", "no json", "no key", "other fields", "link", "replaced", "another's key"]
)
def test_a_file_that_is_no_longer_right_lets_nobody_in_and_harms_no_other(
    key_dir: Path, damage: str
) -> None:
    ring = Keyring(key_dir)
    let_in(key_dir, "carol", "c" * 40)
    path = key_dir / "clients" / "alice.json"
    match damage:
        case "open":
            path.chmod(0o644)
        case "no json":
            path.write_text("{")
        case "no key":
            path.write_text('{"public_key": "short"}')
        case "other fields":
            path.write_text(path.read_text().replace("role", "roll"))
        case "link":
            path.rename(key_dir / "moved")
            path.symlink_to(key_dir / "moved")
        case "replaced":
            path.write_text(path.read_text().replace(ALICE, "d" * 40))
        case _:
            (key_dir / "clients" / "alias.json").touch(0o600)
            (key_dir / "clients" / "alias.json").write_text(path.read_text())
    assert ring.refresh()
    assert names(ring) == ["bob"]
    assert ring.find("c" * 40) is not None


def test_a_folder_that_is_gone_lets_nobody_in(key_dir: Path) -> None:
    ring = Keyring(key_dir)
    (key_dir / "clients").rename(key_dir / "elsewhere")
    assert ring.refresh()
    assert names(ring) == []


@pytest.mark.parametrize("which", ["server.key", "clients/alice.json", "clients", "."])
def test_an_engine_does_not_start_with_keys_that_others_can_open(key_dir: Path, which: str) -> None:
    path = key_dir / which
    path.chmod(0o755 if path.is_dir() else 0o644)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with pytest.raises(EngineStartError, match="chmod") as caught:
        Gatekeeper(context, ADDRESS, SecurityConfig(key_dir=str(key_dir)))
    assert str(key_dir) in str(caught.value)
    context.destroy(linger=0)


def test_an_engine_does_not_start_with_a_damaged_client_file(key_dir: Path) -> None:
    (key_dir / "clients" / "alice.json").write_text("{")
    with pytest.raises(KeyFileError, match=r"alice\.json"):
        Keyring(key_dir)


@pytest.mark.parametrize(
    ("address", "security", "words"),
    [
        (ADDRESS, SecurityConfig(), "insecure_tcp"),
        ("tcp://0.0.0.0:5555", SecurityConfig(insecure_tcp=True), "loopback"),
        ("tcp://*:5555", SecurityConfig(insecure_tcp=True), "loopback"),
    ],
)
def test_a_core_does_not_open_what_its_supervisor_should_not_have_asked_for(
    address: str, security: SecurityConfig, words: str
) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with pytest.raises(InvalidParameterError, match=words):
        Gatekeeper(context, address, security)
    context.destroy(linger=0)


@pytest.mark.parametrize(
    ("address", "is_let_in"),
    [
        (f"localhost:{os.getuid()}:0:1", True),
        (f"localhost:{os.getuid() + 1}:0:1", False),
        (f"localhost:1{os.getuid()}:0:1", False),
        ("localhost::0:1", False),
        ("localhost", True),  # of a system that does not tell
    ],
)
def test_over_ipc_the_kernel_says_whose_process_it_is(
    tmp_path: Path, address: str, is_let_in: bool
) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    gatekeeper = Gatekeeper(context, f"ipc://{tmp_path}/x", SecurityConfig())
    assert gatekeeper._lets_in(address, b"NULL", "") is is_let_in
    assert not gatekeeper._lets_in(f"localhost:{os.getuid()}:0:1", b"PLAIN", "")
    gatekeeper.close()
    context.destroy(linger=0)
