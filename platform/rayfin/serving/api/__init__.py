"""The HTTP API, as OpenAI's clients know it: `rayfin.serving.api.app.create_app`.

Nothing is imported here: the process that renders templates starts from this package too.
"""
