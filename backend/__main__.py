"""`python -m footplate.backend`: the fork server, whose forks are engine cores. Started by a
supervisor, not by hand."""

from footplate.backend.fork_server import main

if __name__ == "__main__":
    main()
