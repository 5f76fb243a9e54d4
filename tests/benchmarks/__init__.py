"""The benchmarks' own logic, where a wrong number would look like a right one."""
