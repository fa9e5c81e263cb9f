"""The engine: rows of different adapters, and of different kinds of adapter, decode in one batch.

It imports no Ray: it also runs, and is measured, where only torch, transformers and peft are.
"""
