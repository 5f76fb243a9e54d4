"""Operations on a GPU in Triton: fused, gathered from unsorted tensors, exact in fp32 inside.

Letters as in ``ops``. Every operation is a registered operator with a fake and, where it has one, a gradient. Nothing
waits for the device: seeds are read by the kernels, shapes decide every launch. Files that begin with ``_`` are
workings. The kernels also run on CPU tensors in triton's interpreter, which is how they are tested without a GPU.
"""
