"""Launch an engine core to which clients attach. Installed as `footplate-engine`."""

import sys

from footplate.frontend.launch import main

if __name__ == "__main__":
    sys.exit(main())
