"""Holds for every test and every process that a test starts; set before anything imports torch or triton."""

import glob
import os

# Idle threads sleep: those of a parallel region otherwise spin while they wait for each other, and where tests,
# servers and ranks share a few cores, that slows a step of a small model twentyfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Without a GPU, kernels run in Triton's interpreter, which must be chosen before the first kernel file is imported.
if not glob.glob("/dev/nvidia[0-9]*"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
