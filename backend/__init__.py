"""The engine core: scheduler, paged KV cache, model runner.

Imports neither asyncio nor `footplate.frontend`. Runs as `python -m footplate.backend`.
"""
