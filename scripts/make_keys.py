"""Make and revoke the keys of an engine on tcp: see docs/security.md."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from footplate.frontend.link_keys import new_key_pair
from footplate.protocol.errors import FootplateError
from footplate.protocol.keys import Guest, Role, has_server_key, make_client_key, make_server_key
from footplate.protocol.keys import revoke as revoke_key

EX_CONFIG = 78

app = App(name="make_keys", help_format="plaintext")


@app.default
def make_keys(
    key_dir: Path,
    *,
    name: str,
    role: Role = "generate",
    max_requests: int | None = None,
    max_queued_tokens: int | None = None,
    key_file: Path | None = None,
    revoke: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Make the keys of one client, and those of the engine if there are none; or revoke a client's.

    Start the engine with --key-dir KEY_DIR and give the client its key file.
    Nothing is overwritten. An engine that runs sees by itself what has changed.

    Parameters
    ----------
    key_dir:
        The engine's folder; made if it is not there.
    name:
        Of the client: letters, digits, _ and -.
    role:
        What it may ask for: generate, or admin.
    max_requests:
        Most live requests with this key; no limit if not given.
    max_queued_tokens:
        Most prompt tokens of its requests that wait for their first step.
    key_file:
        The client's file; NAME.key in this folder if not given.
    revoke:
        Let this client in no longer.
    """
    try:
        if revoke:
            revoke_key(key_dir, name)
            print(f"{name} is no longer let in")
            return 0
        if not has_server_key(key_dir):
            make_server_key(key_dir, new_key_pair())
        pair, key_file = new_key_pair(), key_file or Path(f"{name}.key")
        guest = Guest(
            public_key=pair.public_key,
            role=role,
            max_requests=max_requests,
            max_queued_tokens=max_queued_tokens,
        )
        make_client_key(key_dir, name, pair, key_file, guest)
    except FootplateError as error:
        print(f"make_keys: {error}", file=sys.stderr)
        return EX_CONFIG
    print(f"{name} ({role}) is let in with {key_file}: it is a secret, move it to its client")
    return 0


if __name__ == "__main__":
    sys.exit(app())
