"""Tests with the real kernel: every test has namespaces, cgroups and pins of its own."""
