"""Exceptions for what is wrong with the machine. What is wrong with an argument is a ValueError or a TypeError."""


class Error(RuntimeError):
    """Base class."""


class UnsupportedError(Error):
    """The arguments are right, but this machine cannot serve them: GPU architecture, driver or NVRTC."""


class CompilationError(Error):
    """NVRTC refused a kernel; the message holds its log."""


class CudaError(Error):
    """The CUDA driver returned an error."""


class PeerTimeoutError(Error):
    """A rank did not come in time; the message says which, and for what it was awaited."""


class AbortedError(Error):
    """A rank has called `abort`, or the group has been closed."""


class CapacityError(Error):
    """More rows than there was room for; the message says how many."""
