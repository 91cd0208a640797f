"""The mixture in Triton. Begin with `ops.py` (what is registered with torch), then `dense.py` (the path it takes most).

Each file holds one kernel beside the function that launches it. A launcher allocates what it returns, launches and
does nothing else; whoever calls it has checked shapes, dtypes and devices. Products accumulate in fp32; nothing is
added up by atomics, so two runs give the same bits.
"""
