"""What Python code calls: sweep, train, recommend, estimate and serve, with typed results.

Users reach it as `rayfin.sweep`, `rayfin.train`, …, which load the modules here when they are first
used; the command line calls the same functions. Nothing here prints to standard output or ends the
process.
"""
