"""What Python code calls: sweep, train, recommend, estimate and serve, with typed results.

Users reach it as `rayfin.sweep`, `rayfin.train`, …, which load the modules here when they are first
used; the command line calls the same functions. Nothing here prints to standard output. The process
ends in one case alone: when a training in it, or its history or storage, makes no progress for
scaling.hang_timeout_minutes, as a thread that hangs can only be ended with its process
(`tuning/single.py`, `tuning/driver_watch.py`, `watchdog.py`).
"""
