"""What moelora costs on a GPU, beside its peers, in interleaved runs. Begin with `layer.py`.

    python -m benchmarks.gpu.layer     # one projection: forward, forward with backward, memory
    python -m benchmarks.gpu.decode    # a few tokens, in a CUDA graph
    python -m benchmarks.gpu.model     # a Llama of 1.1 B: prefill, training step, one decoded token
    python -m benchmarks.gpu.growth    # time against the number of tokens and of experts
    python -m benchmarks.gpu.table     # benchmarks/results/gpu/*.csv -> README.md beside them

Each script takes `--rounds`, `--cases`, `--providers`, `--backend`, `--output` and `--revision`; `--tiny` tries its
logic on a CPU. What they share: `timing.py` (how time is taken), `peers.py` and `scatter.py` (who is compared),
`passes.py` (what is run), `results.py` (rows and files), `command.py` (the options), `goals.py` (what was promised).
"""
