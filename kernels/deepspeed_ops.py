"""Sooner compilation of DeepSpeed's ops, at their first use on a machine; to be imported before one is loaded."""

import functools

import cpuinfo
from torch.utils import cpp_extension

# DeepSpeed asks for the processor's features twice for each op, and the answer is a process of a second.
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)

load_with_debug_information = cpp_extension.load


def load(name: str, sources: list[str], extra_cflags: list[str] | None = None, *args, **options):
    """PyTorch's, without the debug information that DeepSpeed asks for and which takes a quarter of the time."""
    return load_with_debug_information(name, sources, [*(extra_cflags or ()), "-g0"], *args, **options)


cpp_extension.load = load
