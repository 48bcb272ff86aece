"""`python -m torch_offload`, the same as `torch-offload`."""

from torch_offload.cli import run

run()
