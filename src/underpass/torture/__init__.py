"""Torture: every shape of connection at once, every byte checked, while the ground is moved.

Pure: ``content``, ``plans``, ``schedule``. In worker processes: ``worker``, ``endpoints``,
``traffic``, ``churn``, ``stall``. In the process that commands them: ``bed``, ``generation``,
``disturber``, ``run``.
"""
