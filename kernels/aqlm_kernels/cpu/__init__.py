"""Compiled kernels for the CPU, written in Numba.

Threads: each kernel runs on `numba.get_num_threads()` threads, set by the caller; nothing here changes a global.
Numba keeps its own pool beside torch's. Its layer is chosen at the first parallel call: OpenMP where the system has it,
else `workqueue`, which must not be entered from two Python threads at once.
"""
