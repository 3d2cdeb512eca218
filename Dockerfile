# What nodes of a cluster run, and the pods of KubeRay: Danlu installed, with Ray's own version.
#   docker build --target cpu -t danlu:latest .     # cleans, and does the rest on CPUs
#   docker build --target cuda -t danlu:latest .    # trains and serves on GPUs; CUDA's libraries come with PyTorch's wheels
FROM python:3.11-slim-bookworm AS base
# wget: by it KubeRay asks whether a node is well. libnuma1: vLLM on a CPU. The font: charts with Chinese.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends fonts-wqy-zenhei libnuma1 make procps wget \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 danlu \
    && install --directory --owner=danlu /opt/danlu
USER 1000
WORKDIR /opt/danlu
ENV PATH=/opt/danlu/.venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1
COPY --chown=1000 Makefile pyproject.toml README.md LICENSE ./
COPY --chown=1000 requirements requirements
COPY --chown=1000 pipelines pipelines
COPY --chown=1000 rayjobs rayjobs
COPY --chown=1000 serve serve

FROM base AS cpu
RUN make install

FROM base AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 0
# Triton compiles kernels where they run.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
USER 1000
RUN make install-gpu
