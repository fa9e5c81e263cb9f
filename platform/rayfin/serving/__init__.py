"""Serving: one base model, many adapters, switched per request."""
