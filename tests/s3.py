"""An S3 server with one bucket: `python tests/s3.py ADDRESS` prints its port and stays."""

from __future__ import annotations

import logging
import sys

from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

if __name__ == "__main__":
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it would tell of every request
    application = DomainDispatcherApplication(create_backend_app)
    server = make_server(sys.argv[1], 0, application, threaded=True)
    s3_backends[DEFAULT_ACCOUNT_ID]["aws"].create_bucket("rayfin-test", "us-east-1")
    print(server.server_port, flush=True)
    server.serve_forever()
