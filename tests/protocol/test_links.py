"""Addresses, the paths that are derived from them, and the folders they lie in."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from footplate.protocol import links
from footplate.protocol.errors import EngineStartError, InvalidParameterError
from footplate.protocol.links import (
    accepts_output_endpoint,
    address_to_connect,
    default_address,
    ipc_path,
    make_owned_dir,
    make_private_dir,
    new_client_id,
    output_endpoint,
    require_protected,
    session_of,
)

IPC = "ipc:///run/engine.sock"
TCP = "tcp://127.0.0.1:5555"
LONGEST_PATH = 87  # bytes, so that a client's path fits too


# ---- names


def test_a_client_key_has_one_name_for_ever() -> None:
    # A request may be kept by a core while the client's package is updated.
    assert session_of("0123456789abcdef").hex() == "80b559f0417472bc1cc2bc2788d9c6b1"
    names = {session_of(key) for key in ("x" * 16, "x" * 17, "y" * 16, "é" * 256, "\ud800" * 16)}
    assert {len(name) for name in names} == {16} and len(names) == 5


@pytest.mark.parametrize("key", ["x" * 15, "x" * 257, b"x" * 16, None])
def test_what_is_no_client_key_is_refused(key: Any) -> None:
    with pytest.raises(InvalidParameterError, match="client_key"):
        session_of(key)


# ---- addresses


def test_an_ipc_address_has_a_path_and_a_tcp_address_has_none() -> None:
    assert ipc_path(IPC) == Path("/run/engine.sock")
    for address in (TCP, "tcp://127.8.9.1:1", "tcp://localhost:65535"):
        assert ipc_path(address) is None


@pytest.mark.parametrize(
    "address",
    [
        "",
        "engine.sock",
        "/run/engine.sock",
        "ipc://",
        "ipc://engine.sock",
        "ipc://./engine.sock",
        "udp://127.0.0.1:5555",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:-1",
        "tcp://127.0.0.1:5x",
        "tcp://127.0.0.1:٥",  # noqa: RUF001  # a digit to Python, not to ZeroMQ
        "tcp://127.0.0.1:*",
        "tcp://a b:5555",
        "tcp://127.0.0.1;10.0.0.1:5555",
        "tcp://[::1]:5555",
        "tcp://:5555",
        "tcp://5555",
    ],
)
def test_what_is_no_address_is_refused_by_name(address: str) -> None:
    with pytest.raises(InvalidParameterError, match="address="):
        ipc_path(address)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "*", "10.0.0.1", "192.168.1.1", "8.8.8.8", "example.org", "eth0", "127.1"]
)
def test_a_link_without_keys_does_not_leave_the_machine_whatever_its_owner_says(host: str) -> None:
    address = f"tcp://{host}:5555"
    for insecure_tcp in (False, True):
        with pytest.raises(InvalidParameterError, match="loopback"):
            require_protected(address, has_keys=False, insecure_tcp=insecure_tcp)
    require_protected(address, has_keys=True, insecure_tcp=False)


def test_a_link_on_this_machine_has_keys_or_an_owner_who_wants_none() -> None:
    with pytest.raises(InvalidParameterError, match="insecure_tcp"):
        require_protected(TCP, has_keys=False, insecure_tcp=False)
    require_protected(TCP, has_keys=False, insecure_tcp=True)
    require_protected(TCP, has_keys=True, insecure_tcp=False)
    with pytest.raises(InvalidParameterError, match="insecure_tcp"):
        require_protected(TCP, has_keys=True, insecure_tcp=True)


def test_an_ipc_link_is_protected_by_its_folder_and_takes_no_keys() -> None:
    require_protected(IPC, has_keys=False, insecure_tcp=False)
    for has_keys in (False, True):
        with pytest.raises(InvalidParameterError, match="folder"):
            require_protected(IPC, has_keys=has_keys, insecure_tcp=not has_keys)


def test_a_core_that_listens_everywhere_is_found_on_its_own_machine() -> None:
    assert address_to_connect("tcp://*:5555") == TCP
    assert address_to_connect("tcp://0.0.0.0:5555") == TCP
    for address in (IPC, TCP, "tcp://example.org:5555"):
        assert address_to_connect(address) == address


def test_the_longest_path_leaves_room_for_the_paths_of_clients() -> None:
    path = "/" + "x" * (LONGEST_PATH - 1)
    assert ipc_path(f"ipc://{path}") == Path(path)
    endpoint = output_endpoint(f"ipc://{path}", new_client_id())
    assert len(endpoint.removeprefix("ipc://")) <= links.MAX_IPC_PATH_BYTES
    with pytest.raises(InvalidParameterError, match=f"at most {LONGEST_PATH} bytes"):
        ipc_path(f"ipc://{path}x")
    with pytest.raises(InvalidParameterError, match="bytes"):
        ipc_path("ipc:///" + "ü" * (LONGEST_PATH - 10))  # two bytes each


# ---- what a client claims


def test_client_ids_differ_and_never_begin_with_the_byte_that_zeromq_reserves() -> None:
    ids = {new_client_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert {len(client_id) for client_id in ids} == {links.CLIENT_ID_BYTES}
    assert not any(client_id.startswith(b"\0") for client_id in ids)


def test_an_ipc_client_listens_beside_the_core_at_a_path_of_its_own() -> None:
    endpoints = {output_endpoint(IPC, new_client_id()) for _ in range(1000)}
    assert len(endpoints) == 1000
    assert all(endpoint.startswith(f"{IPC}.") for endpoint in endpoints)
    assert all("/" not in endpoint.removeprefix(IPC) for endpoint in endpoints)


def test_a_tcp_client_listens_at_a_free_port_of_the_same_host() -> None:
    assert output_endpoint("tcp://127.0.0.9:5555", new_client_id()) == "tcp://127.0.0.9:*"


def test_a_core_connects_to_a_clients_own_endpoint() -> None:
    client = new_client_id()
    assert accepts_output_endpoint(IPC, client, output_endpoint(IPC, client))
    assert accepts_output_endpoint(TCP, client, "tcp://127.0.0.1:40123")


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        IPC,
        f"{IPC}.lock",
        output_endpoint(IPC, b"another client"),
        "ipc:///etc/passwd",
        "ipc://@abstract",
        "inproc://x",
        TCP,
    ],
)
def test_a_core_opens_no_path_that_is_not_the_clients_own(endpoint: str) -> None:
    assert not accepts_output_endpoint(IPC, new_client_id(), endpoint)


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "tcp://10.0.0.1:80",
        "tcp://example.org:80",
        "tcp://0.0.0.0:80",
        "tcp://127.0.0.1:*",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1;10.0.0.1:80",
        "ipc:///run/engine.sock.abc",
    ],
)
def test_a_core_on_tcp_connects_to_no_other_machine(endpoint: str) -> None:
    assert not accepts_output_endpoint(TCP, new_client_id(), endpoint, "127.0.0.1")


def test_a_core_connects_to_the_machine_that_the_client_is_on() -> None:
    address, client = "tcp://0.0.0.0:5555", new_client_id()
    assert output_endpoint(address, client, "10.0.0.7") == "tcp://10.0.0.7:*"
    assert accepts_output_endpoint(address, client, "tcp://10.0.0.7:40123", "10.0.0.7")
    for elsewhere in ("10.0.0.8", "127.0.0.1", "localhost", "example.org", "*"):
        assert not accepts_output_endpoint(address, client, f"tcp://{elsewhere}:80", "10.0.0.7")
    assert not accepts_output_endpoint(address, client, "tcp://10.0.0.7:80", "127.0.0.1")


# ---- folders


def test_the_default_address_lies_in_the_run_time_folder_of_the_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert default_address() == "ipc:///run/user/1000/footplate/engine.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_address() == f"ipc:///tmp/footplate-{os.getuid()}/engine.sock"


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_private_folders_are_fresh_and_for_the_owner_alone() -> None:
    first, second = make_private_dir(), make_private_dir()
    try:
        assert first != second
        assert mode_of(first) == mode_of(second) == 0o700
        assert ipc_path(f"ipc://{first}/engine.sock")
    finally:
        first.rmdir()
        second.rmdir()


def test_an_owned_folder_is_made_once_and_found_again(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    make_owned_dir(folder)
    assert mode_of(folder) == 0o700
    make_owned_dir(folder)


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777, 0o755, 0o711, 0o710, 0o704])
def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(EngineStartError, match=f"chmod 700 {folder}"):
        make_owned_dir(folder)
    folder.chmod(0o700)
    make_owned_dir(folder)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("precious")
    with pytest.raises(EngineStartError, match="directory"):
        make_owned_dir(tmp_path / "x")
    with pytest.raises(EngineStartError, match="directory"):
        make_owned_dir(tmp_path / "x" / "below")
    assert (tmp_path / "x").read_text() == "precious"


def test_a_link_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(EngineStartError, match="link"):
        make_owned_dir(tmp_path / "link")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)
    with pytest.raises(EngineStartError, match="you own"):
        make_owned_dir(folder)
