# The image of training pods, helper pods and the pruning job. docker/README.md says what each choice is for.
# Layers from slow to quick: compiler, locked dependencies, code. A change of code renews the last one only, a few MB.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS runtime
# Triton and torch.compile compile at run time: C and C++ compilers, and Python's headers where the base lacks them.
RUN apt-get update \
 && headers=$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h \
 && apt-get install --yes --no-install-recommends gcc g++ libc6-dev $(test -e "$headers" || echo python3-dev) \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log \
 && groupadd --gid 1000 oslo \
 && useradd --uid 1000 --gid 1000 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin oslo
ARG EXTRAS=train
COPY docker/requirements-*.lock /opt/locks/
# Installed here and not copied from another stage: a copy of gigabytes is hashed at every build.
# Bytecode stays: pods cannot write any (their root is read-only), and would compile every import anew.
RUN lock=/opt/locks/requirements-$(echo "$EXTRAS" | tr , -).lock \
 && if ! test -f "$lock"; then echo "EXTRAS=$EXTRAS has no lock; there are:" /opt/locks/* >&2; exit 1; fi \
 && python3 -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir --no-deps --requirement "$lock" \
 && /opt/venv/bin/pip check \
 && cd /opt/venv/lib/python3*/site-packages \
 && find . -type d \( -name tests -o -name test \) -path './*/*' ! -path './torch/*' -prune -exec rm -rf {} + \
 && find . -name '*.a' -delete
ENV PATH=/opt/venv/bin:$PATH

FROM runtime AS code
COPY LICENSE README.md pyproject.toml /src/
COPY opensloth /src/opensloth
COPY runner /src/runner
# Not editable, and aside: what lands in /opt/code is what the last layer adds to the environment.
RUN pip install --no-cache-dir --no-deps --no-index --no-build-isolation --ignore-installed --prefix /opt/code /src

FROM runtime
COPY --from=code /opt/code /opt/venv
ENV HOME=/tmp \
    PYTHONUNBUFFERED=1
WORKDIR /tmp
# By number: Kubernetes checks runAsNonRoot only against a number.
USER 1000:1000
ENTRYPOINT []
CMD ["oslo", "--help"]
# Version and revision come by `--label` (make image): buildah would take those of an ARG from its cache.
LABEL org.opencontainers.image.title="opensloth" \
      org.opencontainers.image.description="Fine-tunes language models: the training side of oslo" \
      org.opencontainers.image.licenses="Apache-2.0"
