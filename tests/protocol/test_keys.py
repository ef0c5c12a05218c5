"""Files with keys: who may read them, what may be in them, and that nothing is overwritten."""

import os
import stat
from pathlib import Path

import msgspec
import pytest

from footplate.protocol.errors import EngineStartError, InvalidParameterError, KeyFileError
from footplate.protocol.keys import (
    MAX_KEY_FILE_BYTES,
    ClientKeys,
    Guest,
    KeyPair,
    has_server_key,
    is_key,
    make_client_key,
    make_server_key,
    read_client_keys,
    read_guests,
    read_server_key,
    revoke,
)

SERVER = KeyPair("s" * 40, "S" * 40)
ALICE = KeyPair("a" * 40, "A" * 40)


@pytest.fixture
def key_dir(tmp_path: Path) -> Path:
    make_server_key(tmp_path / "keys", SERVER)
    return tmp_path / "keys"


def make_alice(key_dir: Path, name: str = "alice", **guest: object) -> Path:
    key_file = key_dir.parent / f"{name}.key"
    fields = msgspec.convert({"public_key": ALICE.public_key, **guest}, Guest)
    make_client_key(key_dir, name, ALICE, key_file, fields)
    return key_file


def test_what_is_made_is_read(key_dir: Path) -> None:
    key_file = make_alice(key_dir, role="admin", max_requests=3, max_queued_tokens=99)
    assert read_server_key(key_dir) == SERVER
    keys = ClientKeys(ALICE.public_key, ALICE.secret_key, SERVER.public_key)
    assert read_client_keys(key_file) == keys
    alice = Guest(public_key="a" * 40, role="admin", max_requests=3, max_queued_tokens=99)
    assert read_guests(key_dir) == ({"a" * 40: ("alice", alice)}, [])


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_what_is_made_is_for_its_owner_alone_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    if umask == 0o777 and os.getuid() != 0:
        pytest.skip("only root can go on in a folder without any permission")
    before = os.umask(umask)
    try:
        if umask == 0o777:
            (tmp_path / "keys" / "clients").mkdir(parents=True)
            for folder in (tmp_path / "keys", tmp_path / "keys" / "clients"):
                folder.chmod(0o700)
        make_server_key(tmp_path / "keys", SERVER)
        make_alice(tmp_path / "keys")
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_nothing_is_overwritten_and_no_draft_is_left(key_dir: Path) -> None:
    key_file = make_alice(key_dir)
    before = {path: path.read_bytes() for path in key_dir.parent.rglob("*") if path.is_file()}
    other = KeyPair("b" * 40, "B" * 40)
    guest = Guest(public_key=other.public_key)
    with pytest.raises(KeyFileError, match="there already"):
        make_server_key(key_dir, other)
    with pytest.raises(KeyFileError, match="there already"):
        make_client_key(key_dir, "alice", other, key_dir.parent / "other.key", guest)
    with pytest.raises(KeyFileError, match="there already"):
        make_client_key(key_dir, "bob", other, key_file, guest)
    (key_dir.parent / "dangling").symlink_to(key_dir.parent / "nowhere")
    with pytest.raises(KeyFileError, match="there already"):
        make_client_key(key_dir, "bob", other, key_dir.parent / "dangling", guest)
    (key_dir.parent / "dangling").unlink()
    after = {path: path.read_bytes() for path in key_dir.parent.rglob("*") if path.is_file()}
    assert after == before


def test_a_client_needs_an_engine_with_a_key(tmp_path: Path) -> None:
    assert not has_server_key(tmp_path)
    with pytest.raises(KeyFileError, match=r"server\.key"):
        make_alice(tmp_path / "keys")
    assert list(tmp_path.iterdir()) == []


def test_a_revoked_client_is_gone_and_its_name_is_free(key_dir: Path) -> None:
    make_alice(key_dir).unlink()
    revoke(key_dir, "alice")
    assert read_guests(key_dir) == ({}, [])
    with pytest.raises(KeyFileError, match="no client alice"):
        revoke(key_dir, "alice")
    make_alice(key_dir)


@pytest.mark.parametrize("name", ["", ".", "..", "../alice", "a/b", ".hidden", "-x", "a" * 65, "ä"])
def test_a_name_leads_to_no_other_folder(key_dir: Path, name: str) -> None:
    with pytest.raises(InvalidParameterError, match="name="):
        revoke(key_dir, name)
    with pytest.raises(InvalidParameterError, match="name="):
        make_client_key(key_dir, name, ALICE, key_dir / "x", Guest(public_key="a" * 40))


@pytest.mark.parametrize("limit", ["max_requests", "max_queued_tokens"])
@pytest.mark.parametrize("value", [0, -1, 2**63])
def test_a_limit_is_at_least_one(key_dir: Path, limit: str, value: int) -> None:
    guest = msgspec.structs.replace(Guest(public_key="a" * 40), **{limit: value})
    with pytest.raises(InvalidParameterError, match=limit):
        make_client_key(key_dir, "alice", ALICE, key_dir / "x", guest)


# ---- files that are not used


@pytest.mark.parametrize("mode", [0o640, 0o660, 0o604, 0o606, 0o644, 0o610])
def test_a_file_that_others_can_open_is_refused_with_what_helps(key_dir: Path, mode: int) -> None:
    path = key_dir / "server.key"
    path.chmod(mode)
    with pytest.raises(KeyFileError, match=f"chmod 600 {path}"):
        read_server_key(key_dir)
    path.chmod(0o600)
    assert read_server_key(key_dir) == SERVER


@pytest.mark.parametrize("kind", ["nothing", "link", "folder", "pipe"])
def test_what_is_no_file_is_not_opened(key_dir: Path, kind: str) -> None:
    path = key_dir / "server.key"
    path.rename(key_dir / "moved")
    match kind:
        case "link":
            path.symlink_to(key_dir / "moved")
        case "folder":
            path.mkdir(mode=0o700)
        case "pipe":
            os.mkfifo(path, 0o600)
    with pytest.raises(KeyFileError, match=str(path)):
        read_server_key(key_dir)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_a_file_of_somebody_else_is_refused(key_dir: Path) -> None:
    os.chown(key_dir / "server.key", 65534, 65534)
    with pytest.raises(KeyFileError, match="you own"):
        read_server_key(key_dir)


GOOD = msgspec.json.encode(KeyPair("p" * 40, "S" * 40)).decode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        GOOD.replace("p" * 40, "p" * 39),
        GOOD.replace("p" * 40, "p" * 41),
        GOOD.replace("p" * 40, "p" * 39 + "~"),
        GOOD.replace("p" * 40, "p" * 39 + "\\n"),
        GOOD.replace("}", ', "more": 1}'),
        GOOD.replace('"secret_key"', '"secret"'),
        " " * MAX_KEY_FILE_BYTES + GOOD,
    ],
)
def test_a_damaged_file_is_refused_and_not_quoted(key_dir: Path, text: str) -> None:
    path = key_dir / "server.key"
    path.write_text(text)
    with pytest.raises(KeyFileError, match=str(path)) as caught:
        read_server_key(key_dir)
    assert "SSSS" not in str(caught.value)
    path.write_text(GOOD)
    assert read_server_key(key_dir).public_key == "p" * 40


def test_damaged_guests_are_named_and_the_others_come_in(key_dir: Path) -> None:
    make_alice(key_dir)
    clients = key_dir / "clients"
    (clients / "open.json").write_text("{}")
    (clients / "damaged.json").touch(mode=0o600)
    (clients / ".draft.json.17").touch(mode=0o600)
    (clients / "readme.txt").touch()
    guests, errors = read_guests(key_dir)
    assert list(guests) == ["a" * 40]
    assert len(errors) == 2
    assert {path for path in ("open.json", "damaged.json") for e in errors if path in str(e)} == {
        "open.json",
        "damaged.json",
    }


def test_a_key_that_two_files_have_lets_nobody_in(key_dir: Path) -> None:
    make_alice(key_dir)
    make_alice(key_dir, "alias", role="admin")
    guests, errors = read_guests(key_dir)
    assert guests == {}
    assert "another client" in str(errors[0])


def test_a_folder_of_keys_that_others_may_enter_takes_none(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys").chmod(0o755)
    with pytest.raises(EngineStartError, match="chmod 700"):
        make_server_key(tmp_path / "keys", SERVER)


def test_a_secret_is_in_no_representation() -> None:
    for keys in (SERVER, ClientKeys("a" * 40, "S" * 40, "s" * 40)):
        assert "SSSS" not in f"{keys!r} {keys} {[keys]}"


def test_what_is_a_key_and_what_is_none() -> None:
    assert is_key("0" * 40) and is_key("aZ9.-:+=^!/*?&<>()[]{}@%$#" + "0" * 14)
    for text in ("", "0" * 39, "0" * 41, "0" * 39 + "\n", "0" * 40 + "\n", "~" * 40, '"' * 40):
        assert not is_key(text)
