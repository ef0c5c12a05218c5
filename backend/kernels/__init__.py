"""Footplate's own CPU kernels: packed linear layers, norms, paged attention.

`build` compiles them on first use and gives None where that is not possible; `ops` makes typed
functions of what it loaded. What these work on is made by `linear`, `experts`, `norm`, `cache` and
`decoder_layer`, each beside the header of its name. `build` can be imported without torch.
"""
