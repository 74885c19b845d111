"""Exceptions for what is wrong with the machine. What is wrong with an argument is a ValueError or a TypeError."""


class Error(RuntimeError):
    """Base class."""


class UnsupportedError(Error):
    """The arguments are right, but this machine cannot serve them: GPU architecture, driver or NVRTC."""


class CompilationError(Error):
    """NVRTC refused a kernel; the message holds its log."""


class CudaError(Error):
    """The CUDA driver returned an error."""
