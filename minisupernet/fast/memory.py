"""Memory that a training step frees, kept for the next step."""

import ctypes

__all__ = ["keep_memory"]


def keep_memory() -> bool:
    """Have Linux's C library keep the memory that a step frees for the next step; True
    where it will.

    By itself it gives large tensors back to the system as they are freed, and the next
    step pays for each page anew. The process then stays as large as its largest step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    never_map, never_trim = (
        mallopt(-4, 0),
        mallopt(-1, 2**31 - 1),
    )  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    return bool(never_map and never_trim)
