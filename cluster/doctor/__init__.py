"""`nanoserve doctor`: what of this machine, checkpoint and cluster would stop a server, and what to do about it.

A check has two halves: one reads the system into a value, the other judges that value and knows no system.
"""
