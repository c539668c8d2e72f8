"""Tests of underpass."""
