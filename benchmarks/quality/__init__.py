"""What routing brings, in quality: every method on the same data, tuned with the same budget, several seeds.

    python -m benchmarks.quality.run decoder --model ../decoder-s --data ../data     on a GPU
    python -m benchmarks.quality.run encoder --questions a c --device cpu
    python -m benchmarks.quality.run mixed --data ../data                            on either
    python -m benchmarks.quality.report

`study.py` says what a run is and which runs answer which question, as data; `decoder.py`, `encoder.py` and `mixed.py`
carry runs out; `run.py` hands them to worker processes and keeps a CSV of what is done; `report.py` makes the tables
and plots. Begin with study.py.
"""
