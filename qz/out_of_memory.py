"""Whether an error of torch means that memory ran out, the machine's or a device's: by type most are RuntimeErrors."""

from __future__ import annotations

_SAYS = (
    "out of memory",
    "DefaultCPUAllocator",
    # CUDA's libraries, which ask for memory when a thread first uses them, and when they compute.
    "cublasCreate",
    "cublasLtCreate",
    "cudnnCreate",
    "cusolverDnCreate",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """By what is raised (MemoryError, ``torch.OutOfMemoryError``) or said; torch is not imported for it."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"MemoryError", "OutOfMemoryError"}:
        return True
    return "RuntimeError" in kinds and any(each in str(error) for each in _SAYS)
