"""underpass: TCP between processes of one Linux node passes under the TCP/IP stack."""

__version__ = "0.1.0"
