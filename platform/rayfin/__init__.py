"""rayfin: a Ray-based distributed experiment platform for parameter-efficient fine-tuning.

Importing it loads neither torch nor ray: each part loads what it needs when it is used.
"""

__version__ = "0.1.0"
