# One image for every service; docker-compose.yml says which one a container is.
# No Docker engine was at hand when this was written: hadolint has read it and its pip commands were tried by hand, but
# the images themselves were never built.

FROM python:3.12-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python -m venv /opt/lepton
ENV PATH=/opt/lepton/bin:$PATH
# The lock first: this layer, the large one, is built again only when the lock changes.
COPY requirements.lock ./
RUN pip install --require-hashes --requirement requirements.lock
COPY LICENSE README.md pyproject.toml ./
COPY examples examples
COPY lepton_ai lepton_ai
COPY pipeline pipeline
COPY queues queues
COPY tasks tasks
# The services travel inside the wheel; the link gives them a path without a Python version in it.
RUN pip install --no-deps --no-build-isolation . \
    && ln -s "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lepton_ai/_services" /opt/lepton/services

FROM python:3.12-slim-bookworm AS service
# Numba's OpenMP layer: the only one of its three that is safe with several threads and comes with Debian. And the
# linker, with which PoCL builds the OpenCL kernels of an emulated fpga.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1=12.* binutils=2.40* \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --create-home lepton
ENV NUMBA_CACHE_DIR=/tmp/numba \
    PATH=/opt/lepton/bin:$PATH \
    POCL_CACHE_DIR=/tmp/pocl \
    PYTHONPATH=/opt/lepton/services \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/tmp/cache
USER 10001
WORKDIR /home/lepton

COPY --from=build /opt/lepton /opt/lepton
CMD ["lepton", "--help"]
