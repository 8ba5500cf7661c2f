"""What is promised must hold when processes are killed, frozen and cut off.

Worker processes (`worker.py`) publish and consume through the public API alone, and write down what they do (`history.py`).
A `Stage` starts them beside a real server and does the harm; in the end the checker (`checker.py`) says from the histories what
was lost, doubled, out of order or repeated without a fault that explains it.  `make test` runs one round of each scenario,
`make test-faults` all of them on each server, with other seeds.
"""
