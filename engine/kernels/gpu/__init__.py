"""Kernels in Triton, for NVIDIA GPUs of compute capability 9.0 and similar ones; each equals a function of plain torch.

A launch never waits for the device and asks it for nothing: grids follow from sizes that the host knows, and lengths
are read where they are used. So all of them can be captured into a CUDA graph. Numbers of tokens and pointers to a few
integers are not specialised (`do_not_specialize`), so that another step does not mean another kernel to compile.
Without a GPU they run in Triton's interpreter.
"""
