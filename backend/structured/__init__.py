"""Structured outputs: grammars, their compilation beside the busy loop, the masks they make."""
