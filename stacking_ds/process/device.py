"""Measures this process's device: the FLOP/s of matrix products, and the most memory held."""

import resource
import time

import torch


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this rank has held so far: of the GPU, or resident on the host without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure_matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few square matrix products: the yardstick of model FLOP
    utilization, measured where and when the run runs."""
    size, rounds = (8192, 5) if device.type == "cuda" else (1024, 5)
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(rounds + 1):  # the first one warms up and cannot be the fastest
        start = seconds_now(device)
        left @ right
        best = min(best, seconds_now(device) - start)
    return 2 * size**3 / best


def seconds_now(device: torch.device) -> float:
    """The clock, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
