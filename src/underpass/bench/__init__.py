"""The benchmark: default against shortcut, with real programs, proven by the kernel's counters.

``compare``, ``qperf``, ``programs``, ``parallel`` and ``idle`` decide and parse, ``workloads``
names them, ``holder`` is a program that one of them runs; ``bed``, ``processes``, ``naive`` and
``runner`` act; ``report``, ``chart``, ``page`` and ``drawing`` show. Nothing here touches a
running installation: namespaces, cgroups, pins and processes are the benchmark's own and carry
its pid in their names.
"""
