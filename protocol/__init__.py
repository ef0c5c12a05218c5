"""What crosses the process boundary: messages, parameters, configuration, errors.

Imports neither `footplate.frontend` nor `footplate.backend`, nor torch, nor zmq.
"""
