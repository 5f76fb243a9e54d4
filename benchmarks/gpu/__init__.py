"""Speed and memory on one CUDA GPU: one script, one call, under ten minutes, after a parity suite.

    python -m benchmarks.gpu                        # on a machine with a GPU; writes benchmarks/results/gpu.json
    python -m benchmarks.gpu --out FOLDER/gpu.json  # elsewhere
    python -m benchmarks.gpu --rehearse             # the same code at toy sizes, on a CPU, in triton's interpreter

Nobody needs to watch and nothing is downloaded. First the kernels are compared with their definitions in fp64
(``parity.py``); if that is red, nothing is measured. Then stages follow, each within its share of the time: layers of
attention against exact attention (FlashAttention and cuDNN through SDPA), against the floor that bytes and the
measured speed of copies set, against FlexAttention and against transformers' Reformer; training steps of whole models;
decoding; the longest sequence that trains. After every stage the file is written again, so a run that is cut off
leaves what it has.

A peer that would take over ``Plan.slow`` seconds a call is not run at that length: the row says so and predicts its
time, and predictions enter no ratio. Out of memory is a result. Anything else that goes wrong is recorded and does
not stop the other stages.

Prints rows as they come, then the table of requirements, then one JSON line, the last on stdout. Exit codes: 0 all
well, also where requirements were missed; 1 parity is red, a stage failed or the run hung and was cut off; 2 no GPU. A
rehearsal writes ``gpu-rehearsal.json``, measures nothing, and lists what stood in for the GPU.
"""
