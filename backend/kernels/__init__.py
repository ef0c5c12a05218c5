"""Footplate's own CPU kernels: packed linear layers, norms, paged attention.

`build` compiles them on first use and gives None where that is not possible; `ops` makes typed
functions of what it loaded. `build` can be imported without torch.
"""
