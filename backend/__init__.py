"""The engine core: scheduler, paged KV cache, model runner.

Imports neither asyncio nor `footplate.frontend`. `python -m footplate.backend` is the process that
engine cores are forked from.
"""
