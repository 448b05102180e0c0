"""What a training process spends its first seconds on, for the process from which the tests fork theirs."""

import importlib

import cpuinfo

for name in ("training.pretrainer", "matplotlib.figure", "deepspeed.runtime.zero.muon.muon_optimizer"):
    importlib.import_module(name)
cpuinfo.get_cpu_info()
