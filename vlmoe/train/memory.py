"""How freed memory is kept between the steps of a CPU."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, up to 2 GiB. glibc hands a step's tensors back to the system, which
    gives them again page by page in the next one; in a model of width 768 that is a sixth of the time. Other C libraries are
    left alone."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**28)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
