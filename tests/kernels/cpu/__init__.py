"""The kernels for CPUs: values and gradients as defined, whatever the slabs, the memory and the threads."""
