# syntax=docker/dockerfile:1.7
# The image of a run, built from the locks:
#   docker build --target gpu -t plad-dist:0.2.0 .
#   docker build --target cpu -t plad-dist:0.2.0-cpu .
# For reproducible builds:
#   --build-arg REVISION=$(git rev-parse HEAD) --build-arg SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
#   --output type=image,name=NAME,push=true,rewrite-timestamp=true
#   --build-arg PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:...
# You pin the digest of the base image; Debian's packages are still those of the build date.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

# Build stages. The image contains only their /opt/venv.
FROM ${PYTHON_IMAGE} AS build
ARG UV_VERSION=0.13.9
ARG HATCHLING_VERSION=1.33.0
# Bytecode files identify their source by hash, not by date: Python could not rewrite a stale file
# on a read-only root file system. Build outputs are dated 1980, the earliest date of a zip archive.
ENV SOURCE_DATE_EPOCH=315532800 PYC_INVALIDATION_MODE=CHECKED_HASH PIP_DISABLE_PIP_VERSION_CHECK=1
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /build
RUN pip install --no-cache-dir "uv==${UV_VERSION}" \
    && uv venv --no-cache --python /usr/local/bin/python /opt/venv \
    && echo "hatchling==${HATCHLING_VERSION}" >build-constraints.txt

FROM build AS build-gpu
COPY requirements/gpu.txt requirements/
RUN uv pip sync --no-cache --python /opt/venv/bin/python --compile-bytecode requirements/gpu.txt
COPY pyproject.toml README.md LICENSE ./
COPY ds_configs ds_configs
COPY ray_jobs ray_jobs
COPY plad_dist plad_dist
RUN uv pip install --no-cache --python /opt/venv/bin/python --compile-bytecode --no-deps \
    --build-constraints build-constraints.txt .

FROM build AS build-cpu
COPY requirements/cpu.txt requirements/cpu-torch.txt requirements/
RUN uv pip sync --no-cache --python /opt/venv/bin/python --compile-bytecode --torch-backend cpu \
    requirements/cpu.txt requirements/cpu-torch.txt
COPY pyproject.toml README.md LICENSE ./
COPY ds_configs ds_configs
COPY ray_jobs ray_jobs
COPY plad_dist plad_dist
RUN uv pip install --no-cache --python /opt/venv/bin/python --compile-bytecode --no-deps \
    --build-constraints build-constraints.txt .

FROM ${PYTHON_IMAGE} AS run
ARG PYTHON_IMAGE
LABEL org.opencontainers.image.title="plad-dist" \
    org.opencontainers.image.description="Preference-based distillation of large language models on clusters" \
    org.opencontainers.image.version="0.2.0" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.base.name="docker.io/library/${PYTHON_IMAGE}"
# g++: Triton and torch.compile (FlexAttention in the trainer, vLLM) compile small launchers at run
# time. DeepSpeed compiles the AdamW of an offloaded optimizer.
# No CUDA toolkit: torch's wheels contain the libraries, the trainer uses torch's AdamW, and it uses
# no other CUDA operation of DeepSpeed.
# wget: older KubeRay operators probe with it.
# Versions are not pinned: a Debian release keeps one version of each package, and the base image
# sets the release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 wget \
    && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/cache/ldconfig/aux-cache \
    && SOURCE_DATE_EPOCH=315532800 useradd --uid 1000 --user-group --create-home --shell /bin/bash plad \
    && echo "export PATH=/opt/venv/bin:\$PATH" >/etc/profile.d/plad-dist.sh
# /etc/profile.d/plad-dist.sh is for operators that start Ray from a login shell, which resets PATH.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/home/plad
WORKDIR /opt/plad-dist
COPY LICENSE ./
COPY ds_configs ds_configs
COPY ray_jobs ray_jobs

FROM run AS cpu
COPY --from=build-cpu /opt/venv /opt/venv
COPY requirements/cpu.txt requirements/
ARG REVISION=unknown
LABEL org.opencontainers.image.revision="${REVISION}"
USER 1000:1000
CMD ["plad", "--help"]

FROM run AS gpu
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-gpu /opt/venv /opt/venv
COPY requirements/gpu.txt requirements/
ARG REVISION=unknown
LABEL org.opencontainers.image.revision="${REVISION}"
USER 1000:1000
CMD ["plad", "--help"]
