"""`underpass agent`: keeps the node as it was asked to be. What passes messages is in the kernel.

``plan`` decides and does no I/O; ``loop`` acts, thinly. Killing it changes no traffic.
"""
