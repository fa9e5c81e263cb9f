"""`python -m rayfin`."""

from rayfin.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
