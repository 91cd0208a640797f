"""The names of those who are compared, in the order of the table."""

BASE = "base"
BASE_AGAIN = "base, again"
PEFT = "PEFT, one LoRA"
PEFT_FP32 = "PEFT, one LoRA, fp32"
ARROW = "PEFT, Arrow of 8"
DENSE = "dense"
COMPILED = "dense, compiled"
LOOP = "loop"
GROUPED = "grouped_mm"
SCATTER = "ScatterMoE"
MOELORA = "moelora"
SHARED = "moelora, shared router"

ORDER = (BASE, BASE_AGAIN, PEFT_FP32, PEFT, ARROW, LOOP, GROUPED, SCATTER, DENSE, COMPILED, SHARED, MOELORA)

MIXTURES = (DENSE, COMPILED, LOOP, GROUPED, SCATTER, MOELORA)
"""Layers that compute the same function, `peers.expected_output`."""

GRAPHABLE = (BASE, BASE_AGAIN, PEFT, DENSE, SHARED, MOELORA)
"""Whose device time is taken from CUDA graphs as well. The loop and ScatterMoE wait for the host in the middle."""
