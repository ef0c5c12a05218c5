"""A fork server with a thread that never ends, as a library may start one when it is imported."""

import threading

from footplate.backend.fork_server import main

if __name__ == "__main__":
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    main()
