"""The benchmark: default against shortcut, with real programs, proven by the kernel's counters.

``compare``, ``qperf`` and ``programs`` decide and parse; ``bed``, ``processes`` and ``runner`` act;
``report`` and ``chart`` show. Nothing here touches a running installation: namespaces, cgroups,
pins and processes are the benchmark's own and carry its pid in their names.
"""
